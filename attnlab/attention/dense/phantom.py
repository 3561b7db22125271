"""Phantom dimension: heads widened by what they read of one special token (Lee et al., 2024, arXiv:2409.14713).

One token of a sequence is the phantom token: the first that exists, a learned start of sequence in the paper. From its
rotated heads q°, k°, v° every token makes a second half for its own, with weights of its own for each of the three:

    X(a, s) = η gelu(softmax_g(D^-1/2 gelu(a W_q)·gelu(s_g W_k)) gelu(s_g W_v) W_o)        g: the heads of the phantom
    Q = [q | X_q(q, q°)]        K = [k | X_k(k, k°)]        V = [v | v + X_v(v, v°)]
    [o₁ | o₂] = softmax(Q Kᵀ D^-1/2) V        D of the original heads
    α = sigmoid(o₁·g₁ + b₁ - o₂·g₂ - b₂)        y = concat_h(α o₁ + (1 - α) o₂) W_o

The softmax of X runs over the heads of the one phantom token. With η = 0 this is plain attention for any gates; η is
1e-4. Scores and sums cost about twice those of plain attention, O(N·M·(D+E)) per head; the cache is a plain one, and
the phantom's queries. The authors' code (ByungKwanLee/Phantom) forms α by raw exponentials.

Their training objective beside it, a preference of correct over ambiguous answers, has no code: it is not part of this.
Packed segments have a phantom token each; the non-causal form is our extension.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import ArrayLike

from attnlab.contract import Given, Layout, Pattern, View
from attnlab.nn.cache import KVCache
from attnlab.nn.dense_mixer import Heads, HeadSizes
from attnlab.nn.linear import Linear, uniform_init
from attnlab.nn.masking import segment_pair
from attnlab.nn.projected_mixer import ProjectedMixer
from attnlab.nn.rotary import Rotary
from attnlab.nn.softmax_core import SoftmaxCore
from attnlab.points import Edits, visit
from attnlab.registry import Cost, Paper, Source, register
from pallas_kernels.dtypes import at_least_float32


class HeadReader(nnx.Module):
    """X: what each head reads of the heads of the phantom token, `(…, N, H, D)` and `(…, N|1, G, D)` to `(…, N, H, D)`.

    Args:
      head_dim: head size D.
      eta: factor η of the result.
      dtype: of the computation and the result; that of the heads when None.
      param_dtype: of the parameters, four maps D to D without bias.
      rngs: stream `params`.
    """

    def __init__(
        self, head_dim: int, *, eta: float = 1e-4, dtype: Any = None, param_dtype: Any = jnp.float32, rngs: nnx.Rngs
    ):
        self.eta = eta
        options: dict[str, Any] = {"use_bias": False, "axes": (None, None), "kernel_init": uniform_init(head_dim)}
        options |= {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.query, self.key, self.value, self.out = (Linear(head_dim, head_dim, **options) for _ in range(4))

    def __call__(self, heads: jax.Array, phantom: jax.Array) -> jax.Array:
        q = _gelu(self.query(heads))
        k, v = _gelu(self.key(phantom)), _gelu(self.value(phantom))
        wide = at_least_float32(heads.dtype)
        scores = jnp.einsum("...hd,...gd->...hg", q, k, preferred_element_type=wide) * q.shape[-1] ** -0.5
        read = jnp.einsum("...hg,...gd->...hd", jax.nn.softmax(scores, axis=-1).astype(v.dtype), v)
        return (self.eta * _gelu(self.out(read))).astype(heads.dtype)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PhantomCache:
    """A cache of plain keys and values, whose first slot is the phantom token, and that token's queries.

    Attributes:
      tokens: keys and values of all tokens.
      query: `(B, 1, H, D)`, rotated; zeros before the first token.
    """

    tokens: KVCache
    query: jax.Array

    @property
    def length(self) -> jax.Array:
        """`(B,)` int32, tokens stored."""
        return self.tokens.length


class PhantomCore(SoftmaxCore):
    """Softmax over heads that the phantom token widens.

    Args:
      num_heads: query heads H.
      head_dim: size D of queries and keys.
      value_dim: size E of values.
      eta: η.
      dtype, param_dtype: as in `HeadReader`.
      rngs: streams `params`, and `dropout` if there is any.
      **options: those of `ProductCore`.
    """

    def __init__(
        self,
        num_heads: int,
        head_dim: int,
        value_dim: int,
        *,
        eta: float = 1e-4,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
        **options: Any,
    ):
        super().__init__(num_heads, scale=head_dim**-0.5, **options, rngs=rngs)
        self.permutation_equivariant = False
        given: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.query = HeadReader(head_dim, eta=eta, **given)
        self.key = HeadReader(head_dim, eta=eta, **given)
        self.value = HeadReader(value_dim, eta=eta, **given)
        init = {"kernel_init": uniform_init(value_dim), "bias_init": uniform_init(value_dim)}
        self.gate1 = Linear(value_dim, 1, axes=(None, None), **init, **given)
        self.gate2 = Linear(value_dim, 1, axes=(None, None), **init, **given)

    def init_cache(
        self, sizes: HeadSizes, batch_size: int, max_length: int, dtype: Any, **context: Any
    ) -> PhantomCache:
        tokens = KVCache.create(batch_size, max_length, *sizes, dtype=dtype)
        return PhantomCache(tokens, jnp.zeros((batch_size, 1, self.num_heads, sizes.key_size), tokens.keys.dtype))

    def __call__(
        self,
        heads: Heads,
        view: View,
        cache: PhantomCache | None = None,
        *,
        edits: Edits | None = None,
        deterministic: bool = True,
        owner: nnx.Module | None = None,
    ) -> tuple[jax.Array, PhantomCache | None]:
        q, k, v, view, cache = self._widened(heads, view, cache)
        y = self.attend(q, k, v, view, edits=edits, deterministic=deterministic, owner=owner)
        first, second = jnp.split(y, 2, axis=-1)
        weight = jax.nn.sigmoid((self.gate1(first) - self.gate2(second)).astype(jnp.float32)).astype(y.dtype)
        return weight * first + (1 - weight) * second, cache

    def attention(self, heads: Heads, view: View) -> jax.Array:
        q, k, _, view, _ = self._widened(heads, view, None)
        return self.weights(q, k, view)

    def _widened(
        self, heads: Heads, view: View, cache: PhantomCache | None
    ) -> tuple[jax.Array, jax.Array, jax.Array, View, PhantomCache | None]:
        """As `placed`, with both halves."""
        given = heads.q.shape[1]
        if cache is None:
            at = heads.extra[0] if heads.extra else first_tokens(view, given)
            q, k, v, view, _ = self.placed(heads, view, None)
            of_q, of_k, of_v = (jnp.take_along_axis(part, at[:, :, None, None], axis=1) for part in (q, k, v))
        else:
            at = first_tokens(View(mask=view.mask), given)[:, :1, None, None]
            empty = (cache.length == 0)[:, None, None, None]
            q, k, v, view, tokens = self.placed(heads, view, cache.tokens)
            fresh = jnp.take_along_axis(q, at, axis=1).astype(cache.query.dtype)
            cache = PhantomCache(tokens, jnp.where(empty, fresh, cache.query))
            k, v = k.astype(q.dtype), v.astype(q.dtype)
            of_q, of_k, of_v = cache.query.astype(q.dtype), k[:, :1], v[:, :1]
        wide_q = jnp.concatenate([q, self.query(q, of_q)], axis=-1)
        wide_k = jnp.concatenate([k, self.key(k, of_k)], axis=-1)
        wide_v = jnp.concatenate([v, v + self.value(v, of_v)], axis=-1)
        return wide_q, wide_k, wide_v, view, cache


def first_tokens(view: View, tokens: int) -> jax.Array:
    """The index `(B|1, N)` of the first token that exists in each token's segment, int32.

    A key mask `(B, M)` says which exist; all do under one of rank 4.
    """
    real = None if view.mask is None or view.mask.ndim != 2 else view.mask
    if view.segment_ids is None:
        first = jnp.zeros((1, 1), jnp.int32) if real is None else jnp.argmax(real, axis=1)[:, None]
        return jnp.broadcast_to(first, (first.shape[0], tokens)).astype(jnp.int32)
    q_ids, k_ids = segment_pair(view.segment_ids)
    same = q_ids[:, :, None] == k_ids[:, None, :]
    return jnp.argmax(same if real is None else same & real[:, None], axis=2).astype(jnp.int32)


def _gelu(x: jax.Array) -> jax.Array:
    return jax.nn.gelu(x, approximate=False)


@register(
    "phantom",
    paper=Paper(
        "Phantom of Latent for Large Language and Vision Models", "Lee et al.", 2024, arxiv="2409.14713", number=72
    ),
    source=Source.AUTHORS_CODE,
    repository="ByungKwanLee/Phantom",
    cost=Cost(time="O(N·M·H·(D+E))", memory="O(N·M·H)", state="M·G·(D+E) + H·D"),
    summary="heads of twice the width, whose second half is read from the heads of the first token",
    small={"eta": 0.5},
)
class PhantomAttention(ProjectedMixer):
    """Tokens of any layout to the same shape. See the module docstring for the equations.

    Args:
      features: channels C.
      num_heads: query heads H.
      head_dim: D; C / H when None.
      value_dim: E; D when None.
      eta: η, the size of what is read of the phantom token.
      rotary: rotary positions along the axes of the layout, or theta for `Rotary(theta)`.
      rotate_keys: whether `rotary` turns keys too, not queries alone.
      attention_dropout: rate on the weights.
      block_size: keys per block, for memory linear in M; all at once when None.
      out_bias: whether the last map has a bias.
      dtype: of the computation and the result; that of the tokens when None.
      param_dtype: of the parameters.
      rngs: streams `params`, and `dropout` if there is any.
      **projections: sizes and biases of the projections, pattern and layout: see `ProjectedMixer`.

    Raises:
      ValueError: for sizes that do not fit, or options that exclude each other.
    """

    patterns = frozenset({Pattern.SELF, Pattern.CAUSAL_SELF})
    collectives = frozenset({"all-gather"})  # of the phantom token's heads

    def __init__(
        self,
        features: int,
        *,
        num_heads: int,
        head_dim: int | None = None,
        value_dim: int | None = None,
        eta: float = 1e-4,
        rotary: Rotary | float | None = None,
        rotate_keys: bool = True,
        attention_dropout: float = 0.0,
        block_size: int | None = None,
        out_bias: bool = False,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
        **projections: Any,
    ):
        common: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        sizes = {"num_heads": num_heads, "head_dim": head_dim, "value_dim": value_dim}
        super().__init__(features, **sizes, out_bias=out_bias, **projections, **common)
        core = {"rotary": rotary, "rotate_keys": rotate_keys, "dropout": attention_dropout, "block_size": block_size}
        self.set_core(PhantomCore(num_heads, *self.sizes[1:], eta=eta, **core, **common))

    def attend(
        self,
        x: ArrayLike,
        phantom_position: ArrayLike,
        *,
        mask: ArrayLike | None = None,
        positions: ArrayLike | None = None,
        deterministic: bool = True,
        edits: Edits | None = None,
    ) -> jax.Array:
        """The mixer of a sequence with a phantom token elsewhere than in front.

        Args:
          x: tokens `(B, N, C)`.
          phantom_position: `(B, N)` boolean, True at one token of each row.
          mask, positions, deterministic, edits: as in the call.

        Raises:
          ValueError: for shapes that do not fit.
        """
        self.check_call(x, mask=mask, positions=positions)
        x = jnp.asarray(x, self.dtype)
        if self.layout is not Layout.SEQUENCE or jnp.shape(phantom_position) != x.shape[:2]:
            raise ValueError(
                f"phantom_position must be (B, N) = {x.shape[:2]} in a sequence, got {jnp.shape(phantom_position)}"
            )
        at = jnp.broadcast_to(jnp.argmax(jnp.asarray(phantom_position), axis=1)[:, None], x.shape[:2])
        mask = None if mask is None else jnp.asarray(mask)
        given = Given(mask=mask, positions=None if positions is None else jnp.asarray(positions))
        heads = visit(self, edits, "qkv", self.project(x, x, given))._replace(extra=(at,))
        view = self._view(x.shape[1:-1], None, given)
        y, _ = self.core(heads, view, edits=edits, deterministic=deterministic, owner=self)
        return self.merge(visit(self, edits, "heads", y), x, deterministic=deterministic)
