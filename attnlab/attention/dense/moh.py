"""Mixture-of-head attention, MoH (2024, arXiv:2410.11842; code: SkyworkAI/MoH): heads as experts, chosen by each token.

Ordinary attention makes o of all H heads. The first S heads are shared by all tokens, of the R = H - S others a token x
takes K, and every head counts by a gate of its own:

    p = softmax(x W_g),  m = the K largest of p,  r = K · p m / Σ p m           the R routed heads
    s = S · softmax(x W_1)   (1 for S = 1)                                      the S shared heads
    (a₁, a₂) = 2 · softmax(x W_0)   (1, 1 for S = 0 or K = 0)
    y = concat_h(g_h o_h) W_o,   g = [a₁ s | a₂ r]

so that gates are 1 where no head is preferred. Training adds the loss R Σ_e mean(p_e) mean(m_e) of the routed heads'
load, averaged over the layers. Three forms: `moh`, softmax attention as in the authors' DiT; `moh.cosine`, that of
their vision transformer, a TransNeXt (Shi, 2023, arXiv:2311.17132), with

    z_ij = ln N · softplus(τ_h) (q̂_i + e_h)·k̂_j + MLP(log-spaced offset of i and j)_h,    q̂ = q / |q|

and `moh.norm_router`, that of their LLaMA: the K routed heads of the longest queries (before rotary positions) are
added as they are, the others are left out; the router has no parameters and no gradient.

Gates come from the query's token, so that causal forms decode with a plain cache. Cost O(N·M·(D+E)) per head: all heads
are computed, as in the authors' code. Their DiT has no form with S = 1 and K > 0; here its gate is that of the vision
transformer. The paper's norm router weighs heads by gates in training; the code that was released does not.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from attnlab.contract import Given, Layout, Pattern, View, record
from attnlab.nn.activations import relu
from attnlab.nn.dense_mixer import Core, Heads
from attnlab.nn.linear import Linear, trunc_normal
from attnlab.nn.masking import existing_keys, masked_softmax, visible_count, visible_keys
from attnlab.nn.mlp import MLP
from attnlab.nn.norms import LayerNorm, unit_norm
from attnlab.nn.position_bias import NetworkBias
from attnlab.nn.projected_mixer import ProjectedMixer
from attnlab.nn.rotary import Rotary
from attnlab.nn.routing import Routing, SoftmaxRouter, top_k_mask
from attnlab.nn.softmax import attention_scores
from attnlab.nn.softmax_core import ProductCore, SoftmaxCore
from attnlab.points import Edits
from attnlab.registry import Cost, Paper, Source, register
from pallas_kernels.dtypes import at_least_float32

_PAPER = Paper(
    "MoH: Multi-Head Attention as Mixture-of-Head Attention", "Jin et al.", 2024, arxiv="2410.11842", number=47
)


def head_gates(
    shared: jax.Array | int, routing: Routing | None = None, balance_logits: jax.Array | None = None
) -> jax.Array:
    """Gates g of all heads, shared ones first.

    Args:
      shared: logits x W_1 `(…, S)`, or how many shared heads there are, at most 1, whose gate is 1.
      routing: of the tokens `(…)` to the routed heads; None if all heads are shared.
      balance_logits: x W_0 `(…, 2)`; None if one of the kinds is missing.

    Returns:
      `(…, H)` in float32 (or wider).
    """
    parts = []
    if not isinstance(shared, int):
        parts.append(shared.shape[-1] * jax.nn.softmax(_wide(shared)))
    elif shared:
        assert routing is not None
        parts.append(jnp.ones((*routing.chosen.shape[:-1], 1), routing.probabilities.dtype))
    if routing is not None:
        parts.append(routing.gates)
    if balance_logits is not None:
        share = 2 * jax.nn.softmax(_wide(balance_logits))
        parts = [part * share[..., i, None] for i, part in enumerate(parts)]
    sizes = [part.shape[-1] for part in parts]
    # Sums of products with zeros and ones: unlike joined arrays, their heads can be cut over devices anywhere.
    places = jnp.split(jnp.eye(sum(sizes), dtype=parts[0].dtype), sizes[:1])
    gates = [jnp.dot(part, place, precision="highest") for part, place in zip(parts, places, strict=False)]
    return gates[0] if len(gates) == 1 else gates[0] + gates[1]


def longest_heads(q: jax.Array, shared_heads: int, active_heads: int) -> jax.Array:
    """Gates 0 or 1 `(B, N, H)` of queries `(B, N, H, D)`: the shared heads, and of the others the longest queries."""
    lengths = jnp.square(_wide(jax.lax.stop_gradient(q))).sum(-1)
    lengths = jnp.where(jnp.arange(q.shape[2]) < shared_heads, jnp.inf, lengths)
    return top_k_mask(lengths, shared_heads + active_heads).astype(lengths.dtype)


def _wide(x: jax.Array) -> jax.Array:
    return x.astype(at_least_float32(x.dtype))


def head_counts(num_heads: int, shared_heads: int | None, active_heads: int | None) -> tuple[int, int]:
    """S and K of constructor arguments: half of the heads, and half of the others, where they are None.

    Raises:
      ValueError: if there are not so many heads, or some would never be used.
    """
    shared = num_heads // 2 if shared_heads is None else shared_heads
    rest = num_heads - shared
    active = (rest + 1) // 2 if active_heads is None else active_heads
    if not 0 <= shared <= num_heads:
        raise ValueError(f"shared_heads must be in 0..{num_heads}, the number of heads, got {shared}")
    if not min(rest, 1) <= active <= rest:
        raise ValueError(
            f"active_heads must be in {min(rest, 1)}..{rest}, of {num_heads} heads those not shared, got {active}"
        )
    return shared, active


class HeadRouter(nnx.Module):
    """Gates of heads from tokens, by three linear maps.

    Args:
      features: channels C of the tokens.
      num_heads: heads H.
      shared_heads: S.
      active_heads: K.
      load_factor: of the loss of the load, which is left in `routed.balance` for the training to add.
      param_dtype: of the parameters.
      rngs: stream `params`.
    """

    def __init__(
        self,
        features: int,
        num_heads: int,
        shared_heads: int,
        active_heads: int,
        *,
        load_factor: float,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        routed, self.shared_heads = num_heads - shared_heads, shared_heads
        common: dict[str, Any] = {"use_bias": False, "param_dtype": param_dtype, "rngs": rngs}
        axes = ("embed", None)
        self.routed = self.shared = self.balance = nnx.data(None)
        if active_heads:
            self.routed = SoftmaxRouter(features, routed, active_heads, balance_factor=load_factor, **common)
        if shared_heads > 1:
            self.shared = Linear(features, shared_heads, axes=axes, **common)
        if shared_heads and active_heads:
            self.balance = Linear(features, 2, axes=axes, **common)

    def __call__(self, x: jax.Array, *, real: jax.Array | None = None, deterministic: bool = True) -> jax.Array:
        """Tokens `(…, C)` to gates `(…, H)` in float32; `real` `(…)` says which count in the loss."""
        x = _wide(x)
        routing = None if self.routed is None else self.routed(x, real=real, deterministic=deterministic)
        if self.shared_heads == 1 and routing is None:
            return jnp.ones((*x.shape[:-1], 1), x.dtype)
        shared = self.shared_heads if self.shared is None else self.shared(x)
        return head_gates(shared, routing, None if self.balance is None else self.balance(x))


class GatedCore(Core):
    """Mixed into a core: what a head makes is multiplied by its gate, which the projections hand over.

    `Heads.extra` holds the gates `(B, N, H)`.
    """

    def __call__(self, heads: Heads, view: View, cache: Any = None, **given: Any) -> tuple[jax.Array, Any]:
        y, cache = super().__call__(heads, view, cache, **given)
        wide = at_least_float32(y.dtype)
        return (y.astype(wide) * heads.extra[0][..., None].astype(wide)).astype(y.dtype), cache


class GatedSoftmaxCore(GatedCore, SoftmaxCore):
    """Softmax attention with gated heads."""


class GatedCosineCore(GatedCore, ProductCore):
    """Softmax of scaled cosines with a bias, with gated heads.

    Args:
      num_heads: heads H.
      head_dim: size D of queries and keys.
      bias: module whose call gives a bias broadcastable to `(B, H, N, M)`.
      param_dtype: of τ `(H,)` and e `(H, D)`.
      dropout: rate on the weights.
      rngs: streams `params`, and `dropout` if there is any.
    """

    def __init__(
        self,
        num_heads: int,
        head_dim: int,
        *,
        bias: nnx.Module,
        param_dtype: Any = jnp.float32,
        dropout: float = 0.0,
        rngs: nnx.Rngs,
    ):
        super().__init__(dropout=dropout, rngs=rngs)
        self.permutation_equivariant = False
        # softplus(τ) is 1 / 0.24 at the start.
        start = jnp.full((num_heads,), jnp.log(jnp.expm1(1 / 0.24)), param_dtype)
        self.temperature = nnx.Param(start, logical_axes=("heads",))
        vectors = trunc_normal(rngs.params(), (num_heads, head_dim), param_dtype)
        self.query_vectors = nnx.Param(vectors, logical_axes=("heads", None), weight_decay=False)
        self.bias = bias

    def weights(
        self, q: jax.Array, k: jax.Array, view: View, *, edits: Edits | None = None, owner: nnx.Module | None = None
    ) -> jax.Array:
        visible = visible_keys(view)
        wide = at_least_float32(q.dtype)
        temperature = jax.nn.softplus(self.temperature[...].astype(wide))[:, None]
        turned = (unit_norm(q.astype(wide)) + self.query_vectors[...].astype(wide)) * temperature
        length = jnp.log(jnp.maximum(visible_count(visible, k.shape[1]), 1)).astype(wide)
        scores = attention_scores(turned, unit_norm(k.astype(wide)), scale=1.0) * length + self.bias().astype(wide)
        scores = self.edited(edits, owner, "scores", scores, view=view, q=q, k=k)
        return masked_softmax(scores, visible)


class GatedHeadsMixer(ProjectedMixer):
    """Base of the three forms: projections that hand gates to a core which multiplies heads by them."""

    def gates(self, x: jax.Array, heads: Heads, given: Given) -> jax.Array:
        """Gates `(B, N, H)` of the queries' tokens `(B, N, C)`, whose heads are given too."""
        raise NotImplementedError

    def project(self, x: jax.Array, source: jax.Array, given: Given) -> Heads:
        heads = super().project(x, source, given)
        gates = self.gates(x, heads, given)
        record(self, "gate", lambda: gates)
        return heads._replace(extra=(gates,))

    def set_core(self, core: Core) -> None:
        if not isinstance(core, GatedCore):
            raise ValueError(f"core must be a GatedCore, which multiplies heads by gates, got {type(core).__name__}")
        super().set_core(core)


class RoutedHeadsMixer(GatedHeadsMixer):
    """Base of the two forms whose gates a `HeadRouter` makes, in `router`."""

    router: HeadRouter

    def gates(self, x: jax.Array, heads: Heads, given: Given) -> jax.Array:
        # In cross-attention the mask is about the context.
        real = existing_keys(given.mask) if given.context is None else None
        real = None if real is None else jnp.broadcast_to(real, x.shape[:2])
        return self.router(x, real=real, deterministic=given.deterministic)


@register(
    "moh",
    paper=_PAPER,
    source=Source.AUTHORS_CODE,
    repository="SkyworkAI/MoH",
    cost=Cost(time="O(N·M·H·(D+E))", memory="O(N·M·H), with block_size O(N·H·(D+E))", state="M·G·(D+E)"),
    summary="heads as experts: each token weighs a few of them by learned gates, beside some that all tokens share",
    small={"num_heads": 4, "shared_heads": 1, "active_heads": 2},
)
class MixtureOfHeadAttention(RoutedHeadsMixer):
    """Tokens of any layout to the same shape. See the module docstring for the equations.

    Args:
      features: channels C.
      num_heads: query heads H.
      shared_heads: S, heads that all tokens use; half of H when None.
      active_heads: K, how many of the other heads a token uses; half of them when None, rounded up.
      balance_factor: of the loss of the load, over all layers; 0 for none.
      num_layers: layers that share `balance_factor`.
      qkv_bias: whether the maps to queries, keys and values have a bias.
      qk_norm: whether queries and keys pass a LayerNorm over D.
      rotary: rotary positions along the axes of the layout, or theta for `Rotary(theta)`.
      attention_dropout: rate on the weights.
      block_size: keys per block, for memory linear in M; all at once when None.
      rngs: streams `params`, and `dropout` if there is any.
      **projections: sizes and biases of the projections, pattern and layout: see `ProjectedMixer`.

    Raises:
      ValueError: for sizes that do not fit, or options that exclude each other.
    """

    def __init__(
        self,
        features: int,
        *,
        num_heads: int,
        shared_heads: int | None = None,
        active_heads: int | None = None,
        balance_factor: float = 0.01,
        num_layers: int = 1,
        qkv_bias: bool = True,
        qk_norm: bool = False,
        rotary: Rotary | float | None = None,
        attention_dropout: float = 0.0,
        block_size: int | None = None,
        rngs: nnx.Rngs,
        **projections: Any,
    ):
        super().__init__(features, num_heads=num_heads, qkv_bias=qkv_bias, rngs=rngs, **projections)
        stored: dict[str, Any] = {"param_dtype": self.param_dtype, "rngs": rngs}
        if qk_norm:
            norm: Any = functools.partial(LayerNorm, self.sizes.key_size, eps=1e-5, **stored)
            self.query_norm, self.key_norm = norm(), norm()
        counts = head_counts(num_heads, shared_heads, active_heads)
        self.router = HeadRouter(features, num_heads, *counts, load_factor=balance_factor / num_layers, **stored)
        core: dict[str, Any] = {"rotary": rotary, "dropout": attention_dropout, "block_size": block_size}
        self.set_core(GatedSoftmaxCore(num_heads, **core, rngs=rngs))


@register(
    "moh.cosine",
    paper=_PAPER,
    source=Source.AUTHORS_CODE,
    repository="SkyworkAI/MoH",
    cost=Cost(time="O(N²·H·D)", memory="O(N²·H)"),
    summary="mixture of heads over an image, with scores of scaled cosines and a bias that a network makes of offsets",
    small={"num_heads": 4, "shared_heads": 1, "active_heads": 2, "bias_features": 16},
)
class CosineMixtureOfHeadAttention(RoutedHeadsMixer):
    """Images `(B, Hh, Ww, C)` of one size to the same shape. See the module docstring for the equations.

    Under a mask N is the number of keys that a query sees.

    Args:
      features: channels C.
      num_heads: heads H.
      grid: rows and columns of the image.
      shared_heads: S, heads that all tokens use; half of H when None.
      active_heads: K, how many of the other heads a token uses; half of them when None, rounded up.
      balance_factor: of the loss of the load, over all layers; 0 for none.
      num_layers: layers that share `balance_factor`.
      bias_features: hidden channels of the network that makes the bias.
      attention_dropout: rate on the weights.
      head_dim: D; C / H when None.
      qkv_bias: whether the maps to queries, keys and values have a bias.
      projection_dropout: rate on the result.
      dtype: of the computation and the result; that of the tokens when None.
      param_dtype: of the parameters.
      rngs: streams `params`, and `dropout` if there is any.

    Raises:
      ValueError: for sizes that do not fit, or without a grid.
    """

    patterns = frozenset({Pattern.SELF})
    layouts = frozenset({Layout.IMAGE})
    layout = Layout.IMAGE

    def __init__(
        self,
        features: int,
        *,
        num_heads: int,
        grid: Sequence[int] | None = None,
        shared_heads: int | None = None,
        active_heads: int | None = None,
        balance_factor: float = 0.01,
        num_layers: int = 1,
        bias_features: int = 512,
        attention_dropout: float = 0.0,
        head_dim: int | None = None,
        qkv_bias: bool = True,
        projection_dropout: float = 0.0,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        if grid is None or len(grid) != 2:
            raise ValueError(f"grid must be the rows and columns of the image, which the bias is made for, got {grid}")
        sizes: dict[str, Any] = {"num_heads": num_heads, "head_dim": head_dim, "layout": Layout.IMAGE}
        sizes |= {"qkv_bias": qkv_bias, "projection_dropout": projection_dropout}
        stored: dict[str, Any] = {"param_dtype": param_dtype, "rngs": rngs}
        super().__init__(features, **sizes, dtype=dtype, **stored)
        self.grid = tuple(grid)
        counts = head_counts(num_heads, shared_heads, active_heads)
        self.router = HeadRouter(features, num_heads, *counts, load_factor=balance_factor / num_layers, **stored)
        network = MLP(2, bias_features, out_features=num_heads, activation=relu, **stored)
        bias = NetworkBias(self.grid, network, log_spaced=True)
        size = self.sizes.key_size
        self.set_core(GatedCosineCore(num_heads, size, bias=bias, dropout=attention_dropout, **stored))

    def mix(self, x: jax.Array, given: Given) -> jax.Array:
        if x.shape[1:-1] != self.grid:
            raise ValueError(f"{type(self).__name__} was built for images {self.grid}, got x of shape {x.shape}")
        return super().mix(x, given)


@register(
    "moh.norm_router",
    paper=_PAPER,
    source=Source.AUTHORS_CODE,
    repository="SkyworkAI/MoH",
    cost=Cost(time="O(N·M·H·(D+E))", memory="O(N·M·H), with block_size O(N·H·(D+E))", state="M·G·(D+E)"),
    summary="softmax attention that leaves out, token by token, the heads of the shortest queries",
    small={"num_heads": 4},
)
class NormRoutedAttention(GatedHeadsMixer):
    """Tokens of any layout to the same shape. See the module docstring for the equations.

    Args:
      features: channels C.
      num_heads: query heads H.
      num_kv_heads: key and value heads G, a divisor of H; H when None.
      shared_heads: S, heads that all tokens use; half of H when None.
      active_heads: K, how many of the other heads a token uses; half of them when None, rounded up.
      causal: whether query i sees keys j ≤ i only.
      rotary: rotary positions along the axes of the layout, or theta for `Rotary(theta)`.
      attention_dropout: rate on the weights.
      block_size: keys per block, for memory linear in M; all at once when None.
      qkv_bias: whether the maps to queries, keys and values have a bias.
      out_bias: whether the last map has a bias.
      rngs: streams `params`, and `dropout` if there is any.
      **projections: sizes of the projections, pattern and layout: see `ProjectedMixer`.

    Raises:
      ValueError: for sizes that do not fit, or options that exclude each other.
    """

    collectives = frozenset({"all-gather"})  # of the queries' lengths

    def __init__(
        self,
        features: int,
        *,
        num_heads: int,
        num_kv_heads: int | None = None,
        shared_heads: int | None = None,
        active_heads: int | None = None,
        causal: bool = True,
        rotary: Rotary | float | None = None,
        attention_dropout: float = 0.0,
        block_size: int | None = None,
        qkv_bias: bool = False,
        out_bias: bool = False,
        rngs: nnx.Rngs,
        **projections: Any,
    ):
        sizes: dict[str, Any] = {"num_heads": num_heads, "num_kv_heads": num_kv_heads, "causal": causal}
        sizes |= {"qkv_bias": qkv_bias, "out_bias": out_bias}
        super().__init__(features, **sizes, **projections, rngs=rngs)
        self.shared_heads, self.active_heads = head_counts(num_heads, shared_heads, active_heads)
        core: dict[str, Any] = {"rotary": rotary, "dropout": attention_dropout, "block_size": block_size}
        self.set_core(GatedSoftmaxCore(num_heads, **core, rngs=rngs))

    def gates(self, x: jax.Array, heads: Heads, given: Given) -> jax.Array:
        return longest_heads(heads.q, self.shared_heads, self.active_heads)
