"""Union of experts: YujiaoYang-work/UoE."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from attnlab.attention.sparse.uoe_smha import SelectiveHeadAttention
from attnlab.interop.names import Mapped, Name, Squeezed
from attnlab.interop.official import Inputs, Official, Only, options
from attnlab.nn.norms import LayerNorm
from attnlab.nn.routing import Routing, select_tokens
from attnlab.nn.union_of_experts import UnionOfExpertsMLP, batch_gates


class _Residual(nnx.Module):
    """A branch x + f(x), with a norm behind the sum that is there, but not used, if `pre_lnorm`."""

    def __init__(self, branch: nnx.Module, features: int, pre_lnorm: bool, *, rngs: nnx.Rngs):
        self.branch, self.pre_lnorm = branch, pre_lnorm
        self.norm = LayerNorm(features, eps=1e-5, rngs=rngs)

    def sum(self, x: jax.Array, y: jax.Array) -> jax.Array:
        return x + y if self.pre_lnorm else self.norm(x + y)


class SelectiveLayer(_Residual):
    """Selective attention as it stands in the authors' layer."""

    branch: SelectiveHeadAttention

    def __init__(
        self,
        features: int,
        *,
        num_heads: int,
        head_dim: int | None = None,
        rotary: float | None = None,
        pre_lnorm: bool = False,
        rngs: nnx.Rngs,
    ):
        mixer = SelectiveHeadAttention(features, num_heads=num_heads, head_dim=head_dim, rotary=rotary, rngs=rngs)
        super().__init__(mixer, features, pre_lnorm, rngs=rngs)


class ExpertsLayer(_Residual):
    """The feed-forward as it stands in the authors' layer."""

    branch: UnionOfExpertsMLP

    def __init__(
        self,
        features: int,
        *,
        hidden_features: int,
        num_experts: int,
        k: int,
        pre_lnorm: bool = False,
        rngs: nnx.Rngs,
    ):
        mlp = UnionOfExpertsMLP(features, hidden_features, num_experts=num_experts, k=k, rngs=rngs)
        super().__init__(mlp, features, pre_lnorm, rngs=rngs)


def _selected(routing: Routing, gates: jax.Array, given: jax.Array) -> jax.Array:
    """Lists `(E, B, L)` by our routing, completed from lists that are given: among gates of 0 the choice is free."""
    chosen = jnp.swapaxes(routing.chosen, 1, 2)
    # In a batch of one gates are all about 1, in the order of the probabilities.
    rank = jnp.swapaxes(gates if gates.shape[0] > 1 else routing.probabilities, 1, 2)
    places = jnp.swapaxes(given, 0, 1)
    rows, columns = jnp.arange(rank.shape[0])[:, None, None], jnp.arange(rank.shape[1])[:, None]
    filler = jnp.zeros(rank.shape, bool).at[rows, columns, places].set(True)
    lists = select_tokens(jnp.where(chosen, rank, filler), given.shape[-1], chosen=chosen)
    return jnp.swapaxes(lists.places, 0, 1)


def _call(module: Any, inputs: Inputs, given: Mapping[str, Any]) -> dict[str, jax.Array]:
    x, ids = inputs["x"], jnp.asarray(inputs["seq_ids"])
    lists = jnp.swapaxes(ids, 0, 1)
    if isinstance(module, SelectiveLayer):
        y = module.branch.attend(x, lists)
    else:
        y = module.branch(x, token_ids=lists)
    routing = module.branch.router(x)
    gates = batch_gates(routing, capacity_factor=given["capacity"], eps=given["epsilon"])
    return {"y": module.sum(x, y), "route_mat": gates, "seq_ids": _selected(routing, gates, ids)}


def _experts_first(kernel: jax.Array) -> jax.Array:
    """`(C, E, D)` to `(E, C, D)` and back."""
    return jnp.swapaxes(kernel, 0, 1)


def _names(module: _Residual) -> dict[Any, Any]:
    gate = {
        "branch.router.kernel": Mapped("switch_gate.w_gate.weight", jnp.transpose, jnp.transpose),
        "branch.router.bias": Name("switch_gate.w_gate.bias"),
        "norm": "layer_norm",
    }
    if isinstance(module, ExpertsLayer):
        return gate | {
            "branch.fc1": None,
            "branch.fc1.kernel": Mapped("linear1.weight.0", _experts_first, _experts_first),
            "branch.fc1.bias": Squeezed("linear1.bias.0", 1),
            "branch.fc2.kernel": "linear2.weight.0",
            "branch.fc2.bias": "linear2.bias",
        }
    assert isinstance(module, SelectiveLayer)
    channels, heads, size = module.branch.key.kernel.shape

    def join_kernels(both: jax.Array) -> jax.Array:
        return both.reshape(2, channels, heads, size).transpose(2, 1, 0, 3).reshape(heads, channels, 2 * size)

    def split_kernels(both: jax.Array) -> jax.Array:
        return both.reshape(heads, channels, 2, size).transpose(2, 1, 0, 3).reshape(2 * channels, heads, size)

    def join_biases(both: jax.Array) -> jax.Array:
        return both.reshape(2, heads, size).transpose(1, 0, 2).reshape(heads, 1, 2 * size)

    def split_biases(both: jax.Array) -> jax.Array:
        return both.reshape(heads, 2, size).transpose(1, 0, 2).reshape(2 * heads, size)

    return gate | {
        "branch.query": None,
        "branch.key": None,
        "branch.value": None,
        "branch.query.kernel": Mapped("W_q.weight.0", _experts_first, _experts_first),
        "branch.query.bias": Squeezed("W_q.bias.0", 1),
        ("branch.key.kernel", "branch.value.kernel"): Mapped("W_kv.weight.0", split_kernels, join_kernels),
        ("branch.key.bias", "branch.value.bias"): Mapped("W_kv.bias.0", split_biases, join_biases),
        "branch.out.kernel": "ff.weight.0",
        "branch.out.bias": "ff.bias",
    }


_SHARED = options("pre_lnorm", d_model="features", capacity=None, epsilon=None)
_GATE = {"capacity": 1.0, "epsilon": 1e-8}

OFFICIAL = [
    Official(
        "SparseSelfAttention",
        SelectiveLayer,
        _SHARED
        | options(
            n_head="num_heads",
            d_head="head_dim",
            rope_theta="rotary",
            attn_mask=Only("triu(1) True=blocked"),
            position_ids=Only("0..L-1 of the compacted sequence"),
        ),
        _names,
        _call,
        defaults=_GATE,
    ),
    Official(
        "U_MLP",
        ExpertsLayer,
        _SHARED | options(d_inner="hidden_features", n_experts="num_experts", topk="k"),
        _names,
        _call,
        defaults=_GATE,
        ignore=("linear3.*",),
    ),
]
