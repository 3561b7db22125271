"""Union of experts (2025, arXiv:2503.02495): a feed-forward cut into experts, each for the tokens that were sent to it.

A feed-forward of hidden channels F is cut into E experts of F / E each, so that all of them together are the whole:

    p = softmax(x W_g + b_g),   m = the k largest of p
    y = Σ_e m_e (gelu(x W1_e + b1_e) W2_e + b2_e)

p only selects: it weighs nothing, so no gradient ever reaches W_g and b_g. Routing is not learned; they are constants
here. The authors' code (YujiaoYang-work/UoE) gives each expert a list of exactly N/2 tokens, those of the highest gates

    g = p m / (Σ over the batch p m + ε) · B

and others, of gate 0, to fill it. Here every token goes to all of its k experts unless `capacity` bounds the lists,
which then keep the tokens of the highest p, so that an example does not depend on the others of its batch; what fills a
list is left out unless `fillers` says otherwise.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import ArrayLike

from attnlab.contract import Constant, record
from attnlab.nn.activations import Activation, gelu
from attnlab.nn.heads import ToHeads
from attnlab.nn.linear import compute_in_input_dtype
from attnlab.nn.routing import Routing, TokenList, add_tokens, route, select_tokens, take_tokens
from attnlab.registry import Cost, Example, Kind, Paper, Source, register
from pallas_kernels.dtypes import at_least_float32

PAPER = Paper(
    "Union of Experts: Adapting Hierarchical Routing to Equivalently Decomposed Transformer",
    "Yang et al.",
    2025,
    arxiv="2503.02495",
    number=61,
)


def batch_gates(routing: Routing, *, capacity_factor: float = 1.0, eps: float = 1e-8) -> jax.Array:
    """g `(B, N, E)` of the authors' code: p m over its sum at the same place of all examples, times ⌊factor · B⌋.

    Of a batch of one all gates are about 1, and their order is lost in rounding.
    """
    kept = jnp.where(routing.chosen, routing.probabilities, 0)
    return kept / (kept.sum(0, keepdims=True) + eps) * int(capacity_factor * kept.shape[0])


def expert_lists(routing: Routing, capacity: float, *, real: ArrayLike | None = None) -> TokenList:
    """The tokens of each expert, at most ⌊capacity · N⌋ of them: those of the highest p among the chosen.

    Args:
      routing: of tokens `(B, N)`.
      capacity: share of the tokens, above 0 and at most 1; a list has at least one place.
      real: `(B, N)` boolean, which tokens may be taken; all when None.

    Returns:
      Places and what was chosen, `(B, E, L)`.
    """
    probabilities, chosen = (jnp.swapaxes(part, 1, 2) for part in routing)
    chosen = chosen if real is None else chosen & jnp.asarray(real)[:, None]
    return select_tokens(probabilities, max(int(capacity * chosen.shape[-1]), 1), chosen=chosen)


def check_capacity(capacity: float | None, fillers: bool) -> None:
    """Raises `ValueError` for a capacity outside (0, 1], or fillers of lists that are not bounded."""
    if capacity is not None and not 0 < capacity <= 1:
        raise ValueError(f"capacity must be above 0 and at most 1, got {capacity}")
    if fillers and capacity is None:
        raise ValueError("fillers complete lists of a capacity, and there is none")


class FixedRouter(nnx.Module):
    """p and m of tokens, by a random map that is not learned.

    Args:
      features: channels C of the tokens.
      num_experts: E.
      k: experts of each token.
      param_dtype: of the map.
      rngs: stream `params`.

    Raises:
      ValueError: if k is not in 1..E.
    """

    def __init__(self, features: int, num_experts: int, k: int, *, param_dtype: Any = jnp.float32, rngs: nnx.Rngs):
        if not 1 <= k <= num_experts:
            raise ValueError(f"k must be in 1..{num_experts}, the number of experts, got {k}")
        self.k = k
        kernel = nnx.initializers.glorot_normal()(rngs.params(), (features, num_experts), param_dtype)
        self.kernel = Constant(kernel)
        self.bias = Constant(jnp.zeros((num_experts,), param_dtype))

    def __call__(self, x: ArrayLike) -> Routing:
        """Tokens `(…, C)`; logits are in float32 (or wider)."""
        x = jnp.asarray(x)
        wide = at_least_float32(x.dtype)
        x, kernel, bias = (part.astype(wide) for part in (x, self.kernel[...], self.bias[...]))
        return route(jnp.dot(x, kernel, precision="highest") + bias, self.k)


class FromExperts(nnx.Module):
    """Affine maps out of experts, each with its bias, summed over those that took the token.

    Args:
      num_experts: E.
      size: channels D of what an expert makes.
      features: channels C that go out.
      use_bias: whether there are biases `(E, C)`.
      dtype: of the computation and the result; that of the input when None.
      param_dtype: of the parameters.
      rngs: stream `params`.
    """

    def __init__(
        self,
        num_experts: int,
        size: int,
        features: int,
        *,
        use_bias: bool = True,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        self.dtype = dtype
        init = nnx.initializers.glorot_normal(in_axis=1, out_axis=2, batch_axis=0)
        kernel = init(rngs.params(), (num_experts, size, features), param_dtype)
        self.kernel = nnx.Param(kernel, logical_axes=("heads", None, "embed"))
        self.bias = nnx.data(None)
        if use_bias:
            bias = jnp.zeros((num_experts, features), param_dtype)
            self.bias = nnx.Param(bias, logical_axes=("heads", "embed"))

    def __call__(self, y: ArrayLike, taken: jax.Array) -> jax.Array:
        """`(…, E, D)`, zeros where the token `(…)` was not `taken` `(…, E)`, to `(…, C)`."""
        y, kernel, bias = self._cast(y)
        x = jnp.einsum("...ed,edc->...c", y, kernel)
        return x if bias is None else x + jnp.einsum("...e,ec->...c", taken.astype(x.dtype), bias)

    def apart(self, y: ArrayLike) -> jax.Array:
        """What each expert makes of its own tokens: `(B, E, L, D)` to `(B, E, L, C)`."""
        y, kernel, bias = self._cast(y)
        x = jnp.einsum("beld,edc->belc", y, kernel)
        return x if bias is None else x + bias[:, None]

    def _cast(self, y: ArrayLike) -> tuple[Any, ...]:
        bias = None if self.bias is None else self.bias[...]
        return compute_in_input_dtype((y, self.kernel[...], bias), dtype=self.dtype)


def _example() -> Example:
    mlp = UnionOfExpertsMLP(6, 8, capacity=0.5, rngs=nnx.Rngs(0))
    return Example(mlp, (jax.random.normal(jax.random.key(1), (3, 8, 6)),))


@register(
    "uoe_smha.mlp",
    kind=Kind.MODULE,
    paper=PAPER,
    source=Source.AUTHORS_CODE,
    repository="YujiaoYang-work/UoE",
    cost=Cost(time="O(N·C·F), with a capacity c O(c·N·C·F)", memory="O(N·F)"),
    summary="a feed-forward cut into experts, of which each token takes some, by a router that is not learned",
    small=_example,
)
class UnionOfExpertsMLP(nnx.Module):
    """Tokens `(B, *S, C)` to the same shape; see the module docstring. Without a capacity it works token by token.

    Args:
      features: channels C in and out.
      hidden_features: F, hidden channels of all experts together; 4 C when None.
      num_experts: E, a divisor of F.
      k: experts of each token; half of them when None.
      capacity: at most this share of an example's tokens for an expert; all that are sent to it when None.
      fillers: whether lists that are not full are completed by other tokens, as in the authors' code.
      activation: `gelu` (exact) unless given.
      use_bias: whether the maps have biases.
      dropout: rate on the result, in training.
      dtype: of the computation and the result; that of the input when None.
      param_dtype: of the parameters.
      rngs: streams `params` and, for dropout, `dropout`.

    Raises:
      ValueError: for sizes that do not fit.
    """

    def __init__(
        self,
        features: int,
        hidden_features: int | None = None,
        *,
        num_experts: int = 4,
        k: int | None = None,
        capacity: float | None = None,
        fillers: bool = False,
        activation: Activation = gelu,
        use_bias: bool = True,
        dropout: float = 0.0,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        hidden = 4 * features if hidden_features is None else hidden_features
        if num_experts < 1 or hidden % num_experts:
            raise ValueError(f"num_experts must divide the {hidden} hidden channels, got {num_experts}")
        check_capacity(capacity, fillers)
        k = max(num_experts // 2, 1) if k is None else k
        self.capacity, self.fillers, self.activation, self.features = capacity, fillers, activation, features
        self.router = FixedRouter(features, num_experts, k, param_dtype=param_dtype, rngs=rngs)
        common: dict[str, Any] = {"use_bias": use_bias, "dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.fc1 = ToHeads(features, num_experts, hidden // num_experts, **common)
        self.fc2 = FromExperts(num_experts, hidden // num_experts, features, **common)
        self.dropout = nnx.Dropout(dropout, rngs=rngs) if dropout > 0 else nnx.data(None)

    def __call__(self, x: ArrayLike, *, token_ids: ArrayLike | None = None, deterministic: bool = True) -> jax.Array:
        """The feed-forward.

        Args:
          x: tokens `(B, *S, C)`.
          token_ids: `(B, E, L)` integers, the tokens that each expert takes in place of those routed to it.
          deterministic: False in training.

        Raises:
          ValueError: for shapes that do not fit.
        """
        x = jnp.asarray(x)
        if x.ndim < 3 or x.shape[-1] != self.features:
            raise ValueError(f"x must be tokens (B, *S, {self.features}), got {x.shape}")
        tokens = x.reshape(x.shape[0], -1, x.shape[-1])
        routing = self.router(tokens)
        record(self, "gate", lambda: jnp.where(routing.chosen, routing.probabilities, 0))
        if token_ids is not None:
            y = self._listed(tokens, jnp.asarray(token_ids), None)
        elif self.capacity is not None:
            lists = expert_lists(routing, self.capacity)
            y = self._listed(tokens, lists.places, None if self.fillers else lists.chosen)
        else:
            hidden = self.activation(self.fc1(tokens))
            y = self.fc2(jnp.where(routing.chosen[..., None], hidden, 0), routing.chosen)
        y = y.reshape(x.shape)
        return y if self.dropout is None else self.dropout(y, deterministic=deterministic)

    def _listed(self, tokens: jax.Array, places: jax.Array, where: jax.Array | None) -> jax.Array:
        """What experts make of lists `(B, E, L)` of tokens, `where` they take part."""
        bias = None if self.fc1.bias is None else self.fc1.bias[...]
        taken = take_tokens(tokens[:, None], places)
        taken, kernel, bias = compute_in_input_dtype((taken, self.fc1.kernel[...], bias), dtype=self.fc1.dtype)
        hidden = jnp.einsum("belc,ced->beld", taken, kernel)
        hidden = self.activation(hidden if bias is None else hidden + bias[:, None])
        return add_tokens(self.fc2.apart(hidden), places, tokens.shape[1], where=where)
