"""Visual attention redistribution, VAR (Kang et al., ICLR 2025, arXiv:2503.03321): from sinks to the image.

In a language model that was given an image, some tokens draw attention whatever the question: sinks, which a few
dimensions of the hidden state betray. Heads that look at the image, but not at its sinks, give a part of the attention
on sinks to the rest of the image. With weights A over keys k, image tokens V and sinks S, x the layer's input:

    S = {n : max_{d ∈ dims} |x_nd| / √(mean_c x_nc² + 1e-6) > τ}
    a row is image-centric if  Σ_{V∩S} A / Σ_V (A + 1e-6) ≤ ρ  and  Σ_V A ≥ summ  and V∩S is not empty
    in such rows  A'_k = p A_k for k ∈ S,   A'_k = A_k (1 + (1 - p) Σ_S A / Σ_{V∖S} A) for k ∈ V∖S,   else A'_k = A_k

S holds text tokens too (the first one), and rows keep their sums. Sinks are found among the prompt once; tokens that
are generated are never sinks. Rows are edited behind the last image token. Every example of a batch has its own sinks.

Reference: seilk/VisAttnSink, `DimProspector`, `HeadFork`, `VARProcessor`. There the first two layers are left out
(`layers=range(2, L)`) and weights are detached; here they have gradients. A row without attention on V∖S, which the
authors' code divides by, cannot be selected with `summ` above 0 and ρ below 1; here it stays as it is.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from attnlab.interventions.parts import move_mass
from attnlab.points import At, Intervention, Setting
from attnlab.registry import Cost, Example, Kind, Paper, Source, register
from pallas_kernels.dtypes import at_least_float32


def sink_tokens(hidden: ArrayLike, dims: Sequence[int], tau: float) -> jax.Array:
    """Which tokens are sinks, `(B, N)` boolean, from the layer's input `(B, N, C)`; see the module."""
    hidden = jnp.asarray(hidden)
    hidden = hidden.astype(at_least_float32(hidden.dtype))
    size = jax.lax.rsqrt(jnp.mean(jnp.square(hidden), axis=-1, keepdims=True) + 1e-6)
    return (jnp.abs(hidden[..., jnp.asarray(dims)] * size) > tau).any(-1)


def image_centric_heads(
    weights: ArrayLike, image: ArrayLike, sinks: ArrayLike, *, rho: float, summ: float
) -> jax.Array:
    """Which rows look at the image but not at its sinks.

    Args:
      weights: `(B, H, N, M)`.
      image: which keys are image tokens, `(B|1, M)`.
      sinks: which keys are sinks, `(B|1, M)`.
      rho: largest share of the image's attention that is on its sinks.
      summ: least attention on the image.

    Returns:
      `(B, H, N)` boolean.
    """
    weights, image, sinks = jnp.asarray(weights), _of_keys(image), _of_keys(sinks)
    on_sinks = jnp.where(image & sinks, weights, 0).sum(-1)
    share = on_sinks / jnp.where(image, weights + 1e-6, 0).sum(-1, initial=jnp.finfo(weights.dtype).tiny)
    return (share <= rho) & (jnp.where(image, weights, 0).sum(-1) >= summ) & (image & sinks).any(-1)


def redistribute(weights: ArrayLike, image: ArrayLike, sinks: ArrayLike, selected: ArrayLike, *, p: float) -> jax.Array:
    """The weights `(B, H, N, M)` with attention moved from sinks to the rest of the image in the selected rows.

    Args:
      weights: `(B, H, N, M)`.
      image: which keys are image tokens, `(B|1, M)`.
      sinks: which keys are sinks, `(B|1, M)`.
      selected: `(B, H, N)` boolean.
      p: what sinks keep of their attention.
    """
    weights, image, sinks = jnp.asarray(weights), _of_keys(image), _of_keys(sinks)
    moved = move_mass(weights, sinks, image & ~sinks, kept=p)
    return jnp.where(jnp.asarray(selected)[..., None], moved, weights)


def behind_image(image: ArrayLike, q_idx: ArrayLike, k_idx: ArrayLike) -> jax.Array:
    """Which queries come after the last image token, `(B, N)` boolean.

    Args:
      image: which keys are image tokens, `(B|1, M)`.
      q_idx: order of the queries, `(B|1, N)`.
      k_idx: order of the keys, `(B|1, M)`.
    """
    last = jnp.max(jnp.where(jnp.asarray(image), k_idx, -1), axis=-1)
    return jnp.asarray(q_idx) > last[:, None]


def _of_keys(flags: ArrayLike) -> jax.Array:
    return jnp.asarray(flags, bool)[:, None, None, :]


def _example() -> Example:
    from attnlab.interventions.examples import small_language_model
    from attnlab.points import attach

    tokens, model = small_language_model()
    image = jnp.arange(tokens.shape[1])[None] < 4
    edit = VisualRedistribution(image, dims=(1, 3), tau=1.2, rho=0.8, summ=0.1)
    return Example(attach(model, edit), (tokens,), differentiable=())


@register(
    "var",
    kind=Kind.INTERVENTION,
    paper=Paper(
        "See What You Are Told: Visual Attention Sink in Large Multimodal Models",
        "Kang et al.",
        2025,
        "2503.03321",
        number=23,
    ),
    source=Source.AUTHORS_CODE,
    repository="seilk/VisAttnSink",
    cost=Cost("O(N·M)", "O(N·M)", state="O(M)"),
    summary="moves attention from sinks to the rest of the image, in heads that look at the image",
    small=_example,
)
class VisualRedistribution(Intervention):
    """Redistribution in a causal language model that decodes; attach it to all layers but the first two.

    Args:
      image: which tokens of the prompt are image tokens, `(B, L)` or `(1, L)` boolean; padding in front of a prompt
        that is decoded does not count.
      dims: the dimensions that betray sinks, a property of the model: 2533, 1415 for LLaMA-2-7B; 2100, 4743 for 13B.
      tau: τ, threshold of sinks.
      rho: ρ, largest share of the image's attention that is on its sinks.
      summ: least attention on the image.
      p: what sinks keep of their attention.

    Raises:
      ValueError: for an image mask of another rank or dtype, or no dimensions.
    """

    def __init__(
        self,
        image: ArrayLike,
        *,
        dims: Sequence[int],
        tau: float = 20.0,
        rho: float = 0.5,
        summ: float = 0.2,
        p: float = 0.6,
    ):
        image = jnp.asarray(image)
        if image.ndim != 2 or image.dtype != jnp.bool_:
            raise ValueError(f"image must be boolean (B, L), got {image.dtype}{list(image.shape)}")
        if not len(dims):
            raise ValueError("dims must name at least one dimension")
        self.image, self.dims = Setting(image), tuple(int(dim) for dim in dims)
        self.tau, self.rho, self.summ, self.p = tau, rho, summ, p

    def init_memory(self, batch_size: int, max_length: int | None) -> jax.Array:
        """Which tokens are sinks, `(B, max_length)`, in order."""
        return jnp.zeros((batch_size, max_length), bool)

    def stream(self, x: jax.Array, at: At, sinks: jax.Array) -> tuple[jax.Array, jax.Array]:
        if at.phase != "step":
            sinks = at.store(sinks, sink_tokens(x, self.dims, self.tau))
        return x, sinks

    def attention(self, weights: jax.Array, at: At, sinks: jax.Array) -> tuple[jax.Array, jax.Array]:
        image, on = at.keys(self.image[...]), at.keys(sinks)
        selected = image_centric_heads(weights, image, on, rho=self.rho, summ=self.summ)
        selected &= behind_image(image, at.q_idx, at.k_idx)[:, None]
        return redistribute(weights, image, on, selected, p=self.p), sinks
