"""Secondary attention sinks (Wong et al., 2025, arXiv:2512.22213): tokens that middle layers turn into sinks.

Of one sequence, with h_l the stream behind layer l = 0..L-1 (the embedding is not among them), (N, C):

    b      the candidate whose |h_l| is largest, averaged over layers: the primary sink, mostly the first token
    range  start = 1 + argmax_l (|h_{l+1}[b]| - |h_l[b]|),   end = 1 + start + argmin_{l ≥ start} (the same difference)
    listed p > b is listed at l in start..end-1 if |cos(h_l[p], h_l[b])| > 0.9;  b itself is listed in the whole range
    label  by the number of layers c at which p is listed: c ≥ L - 15 "primary-like", 4 < c < L - 15 "secondary",
           0 < c ≤ 4 "noise"

The absolute value lets tokens that point the other way count. The margins 15 and 4 are for models of 28 to 64 layers;
for shallower ones choose others. A token's creation layer is the first at which it is listed, its lifetime is c; tokens
of equal (creation layer, lifetime) are of one sink level.

The sink score of a token at a layer is the mean of the attention on it, over heads and later queries; this is our
reading, since the authors' notebook that computes it could not be read.

Reference: JeffreyWong20/Secondary-Attention-Sinks, `hidden_state_norm_detection`, `sink_labeling_machine`. There the
first sink is the place in the list of candidates, which are therefore 0, 1, ...; here it is the candidate itself.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from attnlab.registry import Cost, Example, Kind, Paper, Source, register
from pallas_kernels.dtypes import at_least_float32

PAPER = Paper(
    "On the Existence and Behaviour of Secondary Attention Sinks", "Wong et al.", 2025, "2512.22213", number=162
)
TYPES = ("not listed", "noise", "secondary", "primary-like")
"""What the numbers in `Sinks.type` mean."""


class Sinks(NamedTuple):
    """The sinks of sequences.

    Attributes:
      member: `(B, L, N)` boolean, which tokens are listed at which layers.
      type: `(B, N)` int32, an index of `TYPES`.
      has_secondary: `(B,)` boolean.
      primary: `(B,)` int32, the place b of the primary sink.
      layers: `(B, 2)` int32, start and end of the range.
      creation: `(B, N)` int32, the first layer at which a token is listed; -1 if it is not.
      lifetime: `(B, N)` int32, the number of layers at which it is.
    """

    member: jax.Array
    type: jax.Array
    has_secondary: jax.Array
    primary: jax.Array
    layers: jax.Array
    creation: jax.Array
    lifetime: jax.Array


def _example() -> Example:
    hidden = jax.random.normal(jax.random.key(0), (2, 6, 5, 8))
    # A first token that grows and shrinks again, and one like it in the middle, clear of rounding.
    hidden = hidden.at[:, 1:5, 0].add(40.0).at[:, 2:4, 3].add(30.0)
    return Example(detect_sinks, (hidden,), {"long_margin": 1, "min_layers": 1}, differentiable=())


@register(
    "secondary_sinks",
    kind=Kind.ANALYSIS,
    paper=PAPER,
    source=Source.AUTHORS_CODE,
    repository="JeffreyWong20/Secondary-Attention-Sinks",
    cost=Cost("O(L·N·C)", "O(L·N)"),
    summary="tokens that align with the first one's massive stream in middle layers, and for how many of them",
    small=_example,
)
def detect_sinks(
    hidden: ArrayLike,
    *,
    candidates: Sequence[int] = (0, 1),
    threshold: float = 0.9,
    clip: bool = True,
    long_margin: int = 15,
    min_layers: int = 4,
    mask: ArrayLike | None = None,
) -> Sinks:
    """Finds primary and secondary sinks.

    Args:
      hidden: streams behind each layer, `(B, L, N, C)`, L at least 2.
      candidates: places among which the primary sink is.
      threshold: of the cosine's absolute value.
      clip: whether only the layers of the range are looked at; else all.
      long_margin: a token listed at L - `long_margin` layers or more is like the primary sink.
      min_layers: one listed at so many layers or fewer is noise.
      mask: `(B, N)` boolean, which tokens exist; all when None.

    Raises:
      ValueError: for shapes that do not fit, or candidates out of range.
    """
    hidden = jnp.asarray(hidden)
    if hidden.ndim != 4 or hidden.shape[1] < 2:
        raise ValueError(f"hidden must be (B, L, N, C) with L at least 2, got shape {hidden.shape}")
    hidden = hidden.astype(at_least_float32(hidden.dtype))
    batch, depth, tokens, _ = hidden.shape
    if not candidates or any(not 0 <= place < tokens for place in candidates):
        raise ValueError(f"candidates must be places below {tokens}, got {list(candidates)}")
    if mask is not None and (jnp.shape(mask) != (batch, tokens) or jnp.result_type(mask) != jnp.bool_):
        raise ValueError(f"mask must be boolean {(batch, tokens)}, got {jnp.result_type(mask)} {jnp.shape(mask)}")
    norms = jnp.linalg.norm(hidden, axis=-1)
    places = jnp.asarray(candidates, jnp.int32)
    primary = places[jnp.argmax(norms[:, :, places].mean(1), -1)]
    own = jnp.take_along_axis(norms, primary[:, None, None], 2)[..., 0]
    change = jnp.diff(own, axis=1)
    start = jnp.argmax(change, 1) + 1
    # Drops before the start do not count; if none is left, the range reaches to the last layer.
    later = jnp.arange(depth - 1) >= start[:, None]
    end = jnp.where(later.any(1), jnp.argmin(jnp.where(later, change, jnp.inf), 1) + 1, depth)
    layers = jnp.arange(depth)
    inside = (layers >= start[:, None]) & (layers < end[:, None]) if clip else jnp.ones((batch, depth), bool)

    first = jnp.take_along_axis(hidden, primary[:, None, None, None], 2)
    product = jnp.einsum("blnc,blnc->bln", hidden, jnp.broadcast_to(first, hidden.shape))
    size = norms * own[..., None]
    aligned = jnp.abs(product) > threshold * size
    place = jnp.arange(tokens)
    member = inside[..., None] & (
        ((place > primary[:, None])[:, None] & aligned) | (place == primary[:, None])[:, None]
    )
    if mask is not None:
        member &= jnp.asarray(mask)[:, None]
    lifetime = member.sum(1, dtype=jnp.int32)
    kind = jnp.where(lifetime >= depth - long_margin, 3, jnp.where(lifetime > min_layers, 2, 1))
    kind = jnp.where(lifetime > 0, kind, 0).astype(jnp.int32)
    creation = jnp.where(lifetime > 0, jnp.argmax(member, 1), -1).astype(jnp.int32)
    bounds = jnp.stack([start, end], -1).astype(jnp.int32)
    return Sinks(member, kind, (kind == 2).any(-1), primary, bounds, creation, lifetime)


def sink_score(attention: ArrayLike, *, mask: ArrayLike | None = None) -> jax.Array:
    """Mean attention on each token, over heads and later queries: `(B, N)` float32, 0 for the last token.

    Args:
      attention: causal weights `(B, H, N, N)`.
      mask: `(B, N)` boolean, which queries count; all when None.

    Raises:
      ValueError: for weights of another shape.
    """
    weights = jnp.asarray(attention)
    if weights.ndim != 4 or weights.shape[2] != weights.shape[3]:
        raise ValueError(f"attention must be (B, H, N, N), got shape {weights.shape}")
    weights = weights.astype(at_least_float32(weights.dtype))
    tokens = weights.shape[-1]
    later = jnp.arange(tokens)[:, None] > jnp.arange(tokens)
    later = later[None] if mask is None else later & jnp.asarray(mask)[:, :, None]
    received = jnp.where(later, weights.mean(1), 0).sum(1)
    return received / jnp.maximum(later.sum(1), 1)
