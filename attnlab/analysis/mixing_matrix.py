"""The matrix by which a mixer mixes tokens: M with M V = what it computes in front of its last map.

After the abstract of "A Unified View of Long-Sequence Models towards Modeling Million-Scale Dependencies" (2023,
arXiv:2302.06218), in which models of long sequences are cases of one template; that the template is this is our reading
(no code is public):

    Y = channel_mix(P(X)),    P(X)_h = M_h(X) V_h,    V = X W^v

    softmax attention    M = softmax(Q Kᵀ / √D)
    linear attention     M = diag(φ(Q) φ(K)ᵀ 1)⁻¹ φ(Q) φ(K)ᵀ
    sparse, local        M = the softmax of masked scores
    spectral, Toeplitz   M of each channel, whatever X

M is made of unit vectors: of what is linear in its values at fixed weights, value m = 1 and all others 0 give column m.
Where values are no point of a mixer, it is made of derivatives, a matrix for each channel, right for mixers that are
linear and keep channels apart; `error` tells. `influence` is for any mixer: how much each token moves with another.
All of this is for small N: the cost is that of N calls, and of N·C for the influence.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import ArrayLike

from attnlab.contract import TokenMixer, UnsupportedArgument
from attnlab.nn.sharded_attention import PAPER
from attnlab.points import Attachment, Edits, Intervention, Setting
from attnlab.registry import Cost, Example, Kind, Source, register
from pallas_kernels.dtypes import at_least_float32

Mix = Callable[[jax.Array], jax.Array]


class Mixing(NamedTuple):
    """A mixing matrix and what it mixes.

    Attributes:
      matrix: M `(B, H, N, M)`, float32 or wider.
      values: V `(B, M, H, E)`.
      output: what the mixer computes of them, `(B, N, H, E)`.
      error: `(B,)`, relative root mean square of M V against the output: 0 but for rounding where the mixer is what the
        template says.
    """

    matrix: jax.Array
    values: jax.Array
    output: jax.Array
    error: jax.Array


def _neighbours(values: jax.Array) -> jax.Array:
    """Half of each token and half of the one before it, for the example."""
    return (values + jnp.roll(values, 1, axis=1)) * jnp.asarray(0.5, values.dtype)


def _example() -> Example:
    return Example(mixing_matrix, (_neighbours, jax.random.normal(jax.random.key(0), (2, 5, 2, 3))), {}, (1,), (1,))


@register(
    "unified_long_sequence",
    kind=Kind.FUNCTION,
    paper=PAPER,
    source=Source.ABSTRACT_ONLY,
    cost=Cost(time="O(N) calls", memory="O(N²·H)"),
    summary="the matrix of any mixing of tokens that is linear in the values, one for each head",
    small=_example,
)
def mixing_matrix(mix: Mix, values: ArrayLike) -> Mixing:
    """The matrix of a function of values.

    Args:
      mix: from values `(B, M, G, E)` to `(B, N, H, E)`, H a multiple of G; linear, and the same for all E channels.
      values: V.

    Raises:
      ValueError: for shapes that do not fit.
    """
    v = jnp.asarray(values)
    output = mix(v)
    if v.ndim != 4 or output.ndim != 4 or output.shape[2] % v.shape[2] or output.shape[3] != v.shape[3]:
        raise ValueError(f"mix must map (B, M, G, E) to (B, N, H, E), H a multiple of G, got {v.shape}, {output.shape}")
    wide = at_least_float32(v.dtype)

    def column(m: jax.Array) -> jax.Array:
        unit = (jnp.arange(v.shape[1]) == m).astype(v.dtype)
        return mix(jnp.broadcast_to(unit[:, None, None], v.shape))[..., 0].astype(wide)

    matrix = jnp.moveaxis(jax.lax.map(column, jnp.arange(v.shape[1])), (0, 3), (3, 1))
    shared = jnp.repeat(v, output.shape[2] // v.shape[2], axis=2)
    return _judged(matrix, shared, output)


def _judged(matrix: jax.Array, values: jax.Array, output: jax.Array) -> Mixing:
    got = jnp.einsum("bhnm,bmhe->bnhe", matrix, values.astype(matrix.dtype), precision="highest")
    wide = output.astype(matrix.dtype)
    scale = jnp.square(wide).mean((1, 2, 3))
    away = jnp.square(got - wide).mean((1, 2, 3))
    error = jnp.sqrt(jax.lax.stop_gradient(away / jnp.where(scale == 0, 1, scale)))
    return Mixing(matrix, values, output, error)


class _Values(Intervention):
    """Other values in the place of those that were projected."""

    def __init__(self, values: jax.Array):
        self.values = Setting(values)

    def qkv(self, value: Any, at: Any, memory: Any) -> tuple[Any, Any]:
        return value._replace(v=self.values[...]), memory


def mixing_of(mixer: nnx.Module, x: ArrayLike, context: ArrayLike | None = None, **given: Any) -> Mixing:
    """The matrix of a token mixer on some tokens.

    Args:
      mixer: a `TokenMixer`. With the points `qkv` and `heads` it has a matrix for each head, between values and heads;
        without them one for each channel, H = C and E = 1, between tokens and result.
      x: tokens, as the mixer takes them.
      context: of cross-attention.
      **given: further arguments of the call, such as `mask`.

    Raises:
      UnsupportedArgument: for a mixer that is called with interventions already, or for a context where values are no
        point of the mixer.
      ValueError: if its values and its heads do not have one head size.
    """
    x = jnp.asarray(x)
    sources = () if context is None else (jnp.asarray(context),)
    if "edits" in given:
        raise UnsupportedArgument("mixing_of edits the mixer itself: it does not take edits")
    if not {"qkv", "heads"} <= getattr(mixer, "points", frozenset()):
        if context is not None:
            raise UnsupportedArgument(f"{type(mixer).__name__} has no point qkv: it does not take context here")
        return _by_channels(lambda tokens: _call(mixer, tokens, **given), x)
    graph, state = nnx.split(mixer)

    def recorded(**edits: Any) -> tuple[Any, jax.Array]:
        module = nnx.merge(graph, state)
        _, seen = nnx.capture(module, nnx.Intermediate)(x, *sources, **given, **edits)
        return cast(Any, seen)["qkv"][0], cast(Any, seen)["heads"][0]

    heads, _ = recorded()
    return mixing_matrix(lambda v: recorded(edits=Edits([Attachment(_Values(v))], 0))[1], heads.v)


def _by_channels(call: Mix, x: jax.Array) -> Mixing:
    """A matrix for each channel, of derivatives."""
    channels = x.shape[-1]
    flat = x.reshape(x.shape[0], -1, channels)
    output, pull = jax.vjp(lambda tokens: call(tokens.reshape(x.shape)).reshape(flat.shape), flat)

    def row(n: jax.Array) -> jax.Array:
        unit = (jnp.arange(flat.shape[1]) == n).astype(output.dtype)
        return pull(jnp.broadcast_to(unit[:, None], output.shape))[0].astype(at_least_float32(x.dtype))

    matrix = jnp.moveaxis(jax.lax.map(row, jnp.arange(flat.shape[1])), (0, 3), (2, 1))
    return _judged(matrix, flat[..., None], output[..., None])


def influence(mixer: Callable[..., Any], x: ArrayLike, **given: Any) -> jax.Array:
    """How much each token of the result moves with each token that comes in, of any mixer or module.

    Args:
      mixer: from tokens `(B, *S, C)` to `(B, *S, C')`.
      x: tokens; what is measured depends on them.
      **given: further arguments of the call.

    Returns:
      `(B, N, M)` float32 or wider: Frobenius norms of the blocks `(C', C)` of the Jacobian.
    """
    x = jnp.asarray(x)
    y, pull = jax.vjp(lambda tokens: _call(mixer, tokens, **given), x)
    batch, outputs = y.shape[0], int(np.prod(y.shape[1:-1]))
    wide = at_least_float32(x.dtype)

    def row(index: jax.Array) -> jax.Array:
        unit = jnp.zeros((outputs * y.shape[-1],), y.dtype).at[index].set(1)
        cotangent = jnp.broadcast_to(unit.reshape(1, *y.shape[1:]), y.shape)
        return jnp.square(pull(cotangent)[0].astype(wide)).sum(-1).reshape(batch, -1)

    squares = jax.lax.map(row, jnp.arange(outputs * y.shape[-1]))
    return jnp.sqrt(jnp.moveaxis(squares.reshape(outputs, y.shape[-1], batch, -1).sum(1), 1, 0))


def _call(mixer: Callable[..., Any], x: jax.Array, **given: Any) -> jax.Array:
    """A call that is differentiated may not keep what it records."""
    if not isinstance(mixer, nnx.Module):
        return mixer(x, **given)
    graph, state = nnx.split(mixer)
    return nnx.merge(graph, state)(x, **given)


def depends_on_input(mixer: TokenMixer, x: ArrayLike, other: ArrayLike, **given: Any) -> jax.Array:
    """How much the matrix changes from some tokens to others, relative to it: 0 where it is fixed; a scalar."""
    one, two = (mixing_of(mixer, tokens, **given).matrix for tokens in (x, other))
    return jnp.linalg.norm(two - one) / jnp.linalg.norm(one)


class MixingProperties(NamedTuple):
    """What kind of matrix it is; float32 or wider, `(B, H)` each.

    Attributes:
      future: share of the squares above the diagonal: 0 where token n sees tokens up to n alone.
      negative: share of the squares that are of negative entries.
      row_sum: mean of the sums of rows, 1 for an average.
      row_spread: standard deviation of these sums, 0 for an average.
      toeplitz: relative distance from the nearest Toeplitz matrix, 0 for a convolution.
      stable_rank: ‖M‖²_F / ‖M‖²_2, at most the rank.
    """

    future: jax.Array
    negative: jax.Array
    row_sum: jax.Array
    row_spread: jax.Array
    toeplitz: jax.Array
    stable_rank: jax.Array


def _matrices() -> Example:
    return Example(mixing_properties, (jax.random.normal(jax.random.key(0), (2, 3, 5, 5)),), {}, (0,), ())


@register(
    "unified_long_sequence.properties",
    kind=Kind.ANALYSIS,
    paper=PAPER,
    source=Source.ABSTRACT_ONLY,
    cost=Cost(time="O(N³·H)", memory="O(N²·H)"),
    summary="whether a mixing matrix is causal, an average, a convolution, or of low rank",
    small=_matrices,
)
def mixing_properties(matrix: ArrayLike) -> MixingProperties:
    """What kind of matrix it is.

    Args:
      matrix: M `(B, H, N, M)`, as `mixing_matrix` makes it.

    Raises:
      ValueError: for another rank.
    """
    m = jnp.asarray(matrix)
    if m.ndim != 4:
        raise ValueError(f"matrix must be (B, H, N, M), got {m.shape}")
    m = m.astype(at_least_float32(m.dtype))
    queries, keys = m.shape[-2:]
    squares = jnp.square(m)
    total = squares.sum((-2, -1))
    safe = jnp.where(total == 0, 1, total)
    offset = np.arange(keys) - np.arange(queries)[:, None]
    sums = m.sum(-1)
    # The nearest Toeplitz matrix has the mean of each diagonal.
    which = (offset + queries - 1).ravel()
    counts = np.bincount(which, minlength=queries + keys - 1)
    diagonals = jnp.zeros((*m.shape[:2], counts.size), m.dtype).at[..., which].add(m.reshape(*m.shape[:2], -1))
    nearest = (diagonals / jnp.asarray(counts, m.dtype))[..., which].reshape(m.shape)
    largest = jnp.linalg.svd(m, compute_uv=False)[..., 0]
    peak = jnp.square(largest)
    return MixingProperties(
        jnp.where(offset > 0, squares, 0).sum((-2, -1)) / safe,
        jnp.where(m < 0, squares, 0).sum((-2, -1)) / safe,
        sums.mean(-1),
        jnp.std(sums, axis=-1),
        jnp.sqrt(jnp.square(m - nearest).sum((-2, -1)) / safe),
        total / jnp.where(peak == 0, 1, peak),
    )
