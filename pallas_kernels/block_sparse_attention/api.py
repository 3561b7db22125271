"""Block-sparse attention: the contract that every implementation keeps.

Softmax attention of each query over the keys that a mask allows, of which only blocks with an allowed pair are visited:

    s_ij = mod(cap(scale · q_i·k_j) + bias_ij)      y_i = Σ_j softmax_j(s_ij) v_j      lse_i = log Σ_j exp(s_ij)

Sources: online softmax (arXiv:2112.05682, arXiv:2205.14135), block-sparse FlashAttention (arXiv:2205.14135, section
3.3), score and mask modifications as functions (FlexAttention, arXiv:2412.05496).
"""

from collections.abc import Callable
from typing import Any, cast

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from pallas_kernels import array_masks, dispatch
from pallas_kernels.block_sparse_attention import checks, reference
from pallas_kernels.block_sparse_attention.arguments import Arguments, Extras, Rules, ScoreMod
from pallas_kernels.block_sparse_attention.blocks import Blocks
from pallas_kernels.masks import Full, Mask
from pallas_kernels.promotion import numpy_ranks

OP = "block_sparse_attention"
SegmentIds = ArrayLike | tuple[ArrayLike, ArrayLike]

dispatch.register(
    OP,
    [
        dispatch.Implementation("tpu", "pallas_kernels.block_sparse_attention.tpu.op", platforms=("tpu",)),
        dispatch.Implementation(
            "triton",
            "pallas_kernels.block_sparse_attention.triton.op",
            platforms=("gpu",),
            packages=("triton", "jax_triton"),
        ),
        dispatch.Implementation("xla", "pallas_kernels.block_sparse_attention.xla"),
        dispatch.Implementation("reference", "pallas_kernels.block_sparse_attention.reference"),
    ],
    trials="pallas_kernels.block_sparse_attention.cases:trials",
)


@numpy_ranks()
def block_sparse_attention(
    q: ArrayLike,
    k: ArrayLike,
    v: ArrayLike,
    *,
    mask: Mask | None = None,
    blocks: Blocks | None = None,
    segment_ids: SegmentIds | None = None,
    bias: ArrayLike | None = None,
    score_mod: ScoreMod | Callable[..., jax.Array] | None = None,
    scale: ArrayLike | None = None,
    softcap: float | None = None,
    sinks: ArrayLike | None = None,
    return_lse: bool = False,
    implementation: str | None = None,
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """Softmax attention over the keys that are allowed, at a cost that follows the blocks that hold any.

    Scores, softmax and sums are float32 (float64 for float64 inputs). Differentiable in every floating array; works
    under jit, grad, vmap, scan, remat and shard_map; for forward-mode derivatives see `dispatch.forward_mode`.

    Args:
      q: queries, (B, N, H, D); float16, bfloat16, float32 or float64.
      k: keys, (B, M, G, D), in the dtype of q; H is a multiple of G, and query head h reads key head h // (H / G).
      v: values, (B, M, G, E), in the dtype of q.
      mask: who may see whom, by a rule on indices (`pallas_kernels.masks`), one for all heads or one per head; and on
        arrays, traced or not (`pallas_kernels.array_masks`): captured values of queries and keys, and choices of groups
        of keys by each row. They combine by `&`, `|` and `~`.
      blocks: which blocks of keys each block of queries visits, made at run time (`Blocks`); beside `mask`.
      segment_ids: integers, (B, N) where N = M, or a pair (B, N), (B, M): tokens attend inside their segment; tiles
        without a common segment are skipped. Padding is a segment of its own.
      bias: added to the scores, (B|1, H|G|1, N|1, M|1); its gradient has this shape too.
      score_mod: a further change of the scores, `ScoreMod(function, arrays)`, or a function without arrays.
      scale: factor of q·k, a scalar; D^-1/2 when None.
      softcap: scores become softcap · tanh(score / softcap), before bias, `score_mod` and masks.
      sinks: (H,), the score of one further key per head, whose value is zero; it takes part in lse.
      return_lse: also return the log of the sum of exponentials.
      implementation: name of one of `explain(...)`; None for the best one that supports these arguments here. A named
        implementation runs or raises, it never falls back.

    Returns:
      y (B, N, H, E) in the dtype of q; with `return_lse` the pair (y, lse), lse (B, N, H) in float32 (or float64).
      A query without keys has y = 0 and lse = -inf (the sink's score, where there are sinks), and gives no gradient.

    Raises:
      ValueError: for shapes, options or combinations that have no meaning; the message names the argument.
      TypeError: for dtypes that are not allowed.
      dispatch.UnsupportedError: if the named implementation, or all of them, refuse these arguments.
    """
    args = normal_form(
        q,
        k,
        v,
        mask=mask,
        blocks=blocks,
        segment_ids=segment_ids,
        bias=bias,
        score_mod=score_mod,
        scale=scale,
        softcap=softcap,
    )
    sinks = None if sinks is None else checks.sinks(jnp.asarray(sinks), args.q.shape[2], args.accumulator)
    y, lse = dispatch.choose(OP, args, implementation).load().run(args)
    if sinks is not None:
        kept = jax.nn.sigmoid(lse - sinks)  # what the sink leaves to the keys
        y = (y * kept[..., None]).astype(y.dtype)
        lse = sinks + jax.nn.softplus(lse - sinks)
    return (y, lse) if return_lse else y


@numpy_ranks()
def attention_weights(q: ArrayLike, k: ArrayLike, **options: Any) -> jax.Array:
    """The weights that `block_sparse_attention` never builds, to look at: O(N·M) memory.

    Args:
      q: queries, (B, N, H, D).
      k: keys, (B, M, G, D).
      **options: mask, blocks, segment_ids, bias, score_mod, scale, softcap and sinks of the call.

    Returns:
      (B, H, N, M) in float32 (or float64); zeros for a query without keys. Sinks have no column.

    Raises:
      ValueError: as `block_sparse_attention`.
      TypeError: as `block_sparse_attention`.
    """
    sinks = options.pop("sinks", None)
    args = normal_form(q, k, k, **options)
    weights = reference.weights(args)
    if sinks is None:
        return weights
    _, lse = reference.run(args)
    left = jax.nn.sigmoid(lse - checks.sinks(jnp.asarray(sinks), args.q.shape[2], args.accumulator))
    return weights * jnp.moveaxis(left, 2, 1)[..., None]


def explain(*args: Any, platform: str | None = None, **options: Any) -> list[dispatch.Choice]:
    """Which implementations would run a call of `block_sparse_attention`, best first, and why the others would not.

    Args:
      *args: q, k and v of the call; none of them to ask about the machine alone.
      platform: "cpu", "gpu" or "tpu"; the current one when None.
      **options: keyword arguments of the call, without `sinks`, `return_lse` and `implementation`.

    Returns:
      (name, ok, reason) of each implementation.

    Raises:
      ValueError: as `block_sparse_attention`.
      TypeError: as `block_sparse_attention`.
    """
    return dispatch.explain(OP, normal_form(*args, **options) if args or options else None, platform=platform)


def normal_form(
    q: ArrayLike,
    k: ArrayLike,
    v: ArrayLike,
    *,
    mask: Mask | None = None,
    blocks: Blocks | None = None,
    segment_ids: SegmentIds | None = None,
    bias: ArrayLike | None = None,
    score_mod: ScoreMod | Callable[..., jax.Array] | None = None,
    scale: ArrayLike | None = None,
    softcap: float | None = None,
) -> Arguments:
    """Checks the arguments of `block_sparse_attention` and brings them to the one form that implementations read.

    Raises:
      ValueError: as `block_sparse_attention`.
      TypeError: as `block_sparse_attention`.
    """
    q, k, v = (jnp.asarray(x) for x in (q, k, v))
    checks.tensors(q, k, v)
    sizes = checks.Sizes(q.shape[0], q.shape[1], k.shape[1], q.shape[2], k.shape[2])
    extras = Extras()
    mask = Full() if mask is None else mask
    if not isinstance(mask, Mask):
        raise TypeError(f"mask must be a pallas_kernels.masks.Mask or None, got {type(mask).__name__}")
    if mask.heads not in (1, sizes.heads):
        raise ValueError(f"mask has {mask.heads} rules for the {sizes.heads} heads of q")
    mask, values = array_masks.split(_shared(mask), sizes.keys)
    extras = checks.with_values(extras, values, sizes)
    if blocks is not None:
        checks.blocks(blocks, sizes)
    if segment_ids is not None:
        extras = checks.with_segments(extras, segment_ids, sizes)
    if bias is not None:
        extras = extras._replace(bias=checks.bias(jnp.asarray(bias), sizes))
    function = None
    if score_mod is not None:
        mod = score_mod if isinstance(score_mod, ScoreMod) else ScoreMod(score_mod)
        function, extras = mod.function, checks.with_mod(extras, mod, sizes)
    number = cast(float | None, q.shape[3] ** -0.5 if scale is None else None)
    if scale is not None:
        if isinstance(scale, jax.Array):
            if scale.ndim or not jnp.issubdtype(scale.dtype, jnp.floating):
                raise ValueError(f"scale must be a floating scalar, got {scale.dtype.name} of shape {scale.shape}")
            extras = extras._replace(scale=scale.reshape(1, 1, 1, 1, 1))
        else:
            number = checks.number("scale", scale)
    if softcap is not None and checks.number("softcap", softcap) <= 0:
        raise ValueError(f"softcap must be positive, got {softcap}")
    return Arguments(q, k, v, extras, blocks, Rules(mask, number, softcap, function))


def _shared(mask: Mask) -> Mask:
    """The mask of one head where all have the same, so that they share their lists of blocks."""
    heads = {mask.head(h) for h in range(mask.heads)} if mask.heads > 1 and mask.static else ()
    return next(iter(heads)) if len(heads) == 1 else mask
