"""Neighborhood attention: the contract that every implementation keeps.

Softmax attention of each query over the keys of its neighborhood, a product of one window per axis (`windows` defines
them), and over additional keys that every query sees, in one softmax:

    s_ij = scale · q_i·k_j + bias[j - i]        y_i = Σ_j softmax_j(s_ij) v_j        lse_i = log Σ_j exp(s_ij)

Sources: Neighborhood Attention Transformer (arXiv:2204.07143), Dilated NAT (arXiv:2209.15001), Faster Neighborhood
Attention (arXiv:2403.04690), Generalized Neighborhood Attention (arXiv:2504.16922).
"""

import math
import operator
from collections.abc import Sequence
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from pallas_kernels import dispatch
from pallas_kernels.grid_masks import Grid
from pallas_kernels.neighborhood_attention import reference
from pallas_kernels.neighborhood_attention.arguments import FLOATS, Arguments
from pallas_kernels.neighborhood_attention.windows import Window
from pallas_kernels.promotion import numpy_ranks

OP = "neighborhood_attention"
PerAxis = int | Sequence[int]

dispatch.register(
    OP,
    [
        dispatch.Implementation("tpu", "pallas_kernels.neighborhood_attention.tpu", platforms=("tpu",)),
        dispatch.Implementation("xla", "pallas_kernels.neighborhood_attention.xla"),
        dispatch.Implementation("reference", "pallas_kernels.neighborhood_attention.reference"),
    ],
    trials="pallas_kernels.neighborhood_attention.cases:trials",
)


@numpy_ranks()
def neighborhood_attention(
    q: ArrayLike,
    k: ArrayLike,
    v: ArrayLike,
    kernel_size: PerAxis,
    *,
    stride: PerAxis = 1,
    dilation: PerAxis = 1,
    is_causal: bool | Sequence[bool] = False,
    scale: float | None = None,
    bias: ArrayLike | None = None,
    additional_keys: ArrayLike | None = None,
    additional_values: ArrayLike | None = None,
    key_mask: ArrayLike | None = None,
    return_lse: bool = False,
    implementation: str | None = None,
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """Softmax attention over the neighborhood of each token, on 1, 2 or 3 axes of tokens *S.

    Scores, softmax and sums are float32 (float64 for float64 inputs). Differentiable in every floating array; works
    under jit, grad, vmap, scan, remat and shard_map; for forward-mode derivatives see `dispatch.forward_mode`.

    Args:
      q: queries, (B, *S, H, D); float16, bfloat16, float32 or float64.
      k: keys, (B, *S, G, D), in the dtype of q; H is a multiple of G, and query head h reads key head h // (H / G).
      v: values, (B, *S, G, E), in the dtype of q.
      kernel_size: keys of a window, one number or one per axis. Away from borders an odd window is centred at the
        query, an even one has one more key before it than after it; at a border it is shifted, never cut.
      stride: s, one number or one per axis: each run of s queries shares the window of its leader; at most the kernel
        size. A stride equal to the kernel size makes windows that do not overlap.
      dilation: d, one number or one per axis: keys of a window are d apart. kernel_size · dilation is at most the
        length of the axis.
      is_causal: one flag or one per axis: along that axis a query sees no later key, and windows end at the query.
      scale: factor of q·k, a number; D^-1/2 when None or 0.
      bias: relative position bias (H, 2k-1, …), an axis of tokens each: entry (j - i)/d + k - 1 is added to the score
        of query i and key j; -inf hides that offset. Odd kernel sizes, no stride, not causal.
      additional_keys: (B, A, G, D), in the dtype of q: seen by every query beside its neighborhood.
      additional_values: (B, A, G, E), with `additional_keys`.
      key_mask: (B, *S) booleans, False for keys that no query sees, such as padding; additional keys are always there.
        Windows lie where they lie without it.
      return_lse: also return the log of the sum of exponentials.
      implementation: name of one of `explain(...)`; None for the best one that supports these arguments here. A named
        implementation runs or raises, it never falls back.

    Returns:
      y (B, *S, H, E) in the dtype of q; with `return_lse` the pair (y, lse), lse (B, *S, H) in float32 (or float64).
      A query that `key_mask` and `bias` leave no key has y = 0 and lse = -inf, and gives no gradient.

    Raises:
      ValueError: for shapes, options or combinations that have no meaning; the message names the argument.
      TypeError: for dtypes that are not allowed.
      dispatch.UnsupportedError: if the named implementation, or all of them, refuse these arguments.
    """
    args = normal_form(
        q,
        k,
        v,
        kernel_size,
        stride=stride,
        dilation=dilation,
        is_causal=is_causal,
        scale=scale,
        bias=bias,
        additional_keys=additional_keys,
        additional_values=additional_values,
        key_mask=key_mask,
    )
    y, lse = dispatch.choose(OP, args, implementation).load().run(args)
    return (y, lse) if return_lse else y


@numpy_ranks()
def neighborhood_attention_weights(q: ArrayLike, k: ArrayLike, kernel_size: PerAxis, **options: Any) -> jax.Array:
    """The weights that `neighborhood_attention` never builds, to look at: O(N²) memory.

    Args:
      q: queries, (B, *S, H, D).
      k: keys, (B, *S, G, D).
      kernel_size: as in `neighborhood_attention`.
      **options: stride, dilation, is_causal, scale, bias and key_mask of the call.

    Returns:
      (B, H, N, N) in float32 (or float64), tokens in row-major order; zeros for a query without keys.

    Raises:
      ValueError: as `neighborhood_attention`.
      TypeError: as `neighborhood_attention`.
    """
    return reference.weights(normal_form(q, k, k, kernel_size, **options))


def neighborhood_mask(
    shape: Sequence[int],
    kernel_size: PerAxis,
    *,
    stride: PerAxis = 1,
    dilation: PerAxis = 1,
    is_causal: bool | Sequence[bool] = False,
) -> Grid:
    """The neighborhoods as a structural mask over tokens in row-major order.

    Args:
      shape: lengths of the 1, 2 or 3 axes of tokens.
      kernel_size: as in `neighborhood_attention`, and so the rest.
      stride: likewise.
      dilation: likewise.
      is_causal: likewise.

    Raises:
      ValueError: as `neighborhood_attention`.
      TypeError: as `neighborhood_attention`.
    """
    shape = tuple(operator.index(n) for n in shape)
    if len(shape) not in (1, 2, 3):
        raise ValueError(f"shape must have 1, 2 or 3 axes, got {shape}")
    axes = zip(
        shape,
        _integers("kernel_size", kernel_size, len(shape)),
        _integers("stride", stride, len(shape)),
        _integers("dilation", dilation, len(shape)),
        _flags(is_causal, len(shape)),
        strict=True,
    )
    windows = []
    for axis, options in enumerate(axes):
        try:
            windows.append(Window(*options))
        except ValueError as error:
            raise ValueError(f"axis {axis} of the tokens {shape}: {error}") from None
    return Grid(shape, tuple(windows))


def explain(*args: Any, platform: str | None = None, **options: Any) -> list[dispatch.Choice]:
    """Which implementations would run a call of `neighborhood_attention`, best first, and why the others would not.

    Args:
      *args: q, k, v and kernel_size of the call; none of them to ask about the machine alone.
      platform: "cpu", "gpu" or "tpu"; the current one when None.
      **options: keyword arguments of the call, without `return_lse` and `implementation`.

    Returns:
      (name, ok, reason) of each implementation.

    Raises:
      ValueError: as `neighborhood_attention`.
      TypeError: as `neighborhood_attention`.
    """
    return dispatch.explain(OP, normal_form(*args, **options) if args or options else None, platform=platform)


def normal_form(
    q: ArrayLike,
    k: ArrayLike,
    v: ArrayLike,
    kernel_size: PerAxis,
    *,
    stride: PerAxis = 1,
    dilation: PerAxis = 1,
    is_causal: bool | Sequence[bool] = False,
    scale: float | None = None,
    bias: ArrayLike | None = None,
    additional_keys: ArrayLike | None = None,
    additional_values: ArrayLike | None = None,
    key_mask: ArrayLike | None = None,
) -> Arguments:
    """Checks the arguments of `neighborhood_attention` and brings them to the one form that implementations read.

    Raises:
      ValueError: as `neighborhood_attention`.
      TypeError: as `neighborhood_attention`.
    """
    q, k, v = (jnp.asarray(x) for x in (q, k, v))
    _check_tensors(q, k, v)
    mask = neighborhood_mask(q.shape[1:-2], kernel_size, stride=stride, dilation=dilation, is_causal=is_causal)
    windows = cast(tuple[Window, ...], mask.masks)
    if (additional_keys is None) != (additional_values is None):
        missing = "additional_values" if additional_values is None else "additional_keys"
        raise ValueError(f"additional_keys and additional_values must be given together; {missing} is None")
    more_keys, more_values = (None if x is None else jnp.asarray(x) for x in (additional_keys, additional_values))
    if more_keys is not None and more_values is not None:
        _check_additional(q, k, v, more_keys, more_values)
    return Arguments(
        q=q,
        k=k,
        v=v,
        bias=None if bias is None else _checked_bias(jnp.asarray(bias), q.shape[-2], windows),
        additional_keys=more_keys,
        additional_values=more_values,
        key_mask=None if key_mask is None else _checked_key_mask(jnp.asarray(key_mask), q.shape[:-2]),
        windows=windows,
        scale=_checked_scale(scale) or q.shape[-1] ** -0.5,
    )


def _check_tensors(q: jax.Array, k: jax.Array, v: jax.Array) -> None:
    for name, x, axes in (("q", q, "(B, *S, H, D)"), ("k", k, "(B, *S, G, D)"), ("v", v, "(B, *S, G, E)")):
        if x.ndim not in (4, 5, 6):
            raise ValueError(f"{name} must be {axes} with 1, 2 or 3 axes of tokens *S, got shape {x.shape}")
        if 0 in x.shape:
            raise ValueError(f"{name} must have no empty axis, got shape {x.shape}")
        if x.dtype.name not in FLOATS:
            raise TypeError(f"{name} must be one of {', '.join(FLOATS)}, got {x.dtype.name}")
    if not q.dtype == k.dtype == v.dtype:
        raise TypeError(f"q, k and v must have one dtype, got {q.dtype.name}, {k.dtype.name} and {v.dtype.name}")
    if q.shape[:-2] != k.shape[:-2]:
        raise ValueError(f"q and k must agree in (B, *S), got {q.shape} and {k.shape}")
    if k.shape[:-1] != v.shape[:-1]:
        raise ValueError(f"k and v must agree in (B, *S, G), got {k.shape} and {v.shape}")
    if q.shape[-1] != k.shape[-1]:
        raise ValueError(f"q and k must agree in D, got {q.shape} and {k.shape}")
    if q.shape[-2] % k.shape[-2]:
        raise ValueError(f"heads of q must be a multiple of the heads of k, got {q.shape[-2]} and {k.shape[-2]}")


def _check_additional(q: jax.Array, k: jax.Array, v: jax.Array, keys: jax.Array, values: jax.Array) -> None:
    for name, x, own in (("additional_keys", keys, k), ("additional_values", values, v)):
        if x.ndim != 4 or 0 in x.shape or (x.shape[0], *x.shape[2:]) != (own.shape[0], *own.shape[-2:]):
            wanted = f"({own.shape[0]}, A, {own.shape[-2]}, {own.shape[-1]}) with A at least 1"
            raise ValueError(f"{name} must have shape {wanted}, got {x.shape}")
        if x.dtype != q.dtype:
            raise TypeError(f"{name} must have the dtype of q, {q.dtype.name}, got {x.dtype.name}")
    if keys.shape[1] != values.shape[1]:
        raise ValueError(f"additional_keys and additional_values must agree in A, got {keys.shape} and {values.shape}")


def _checked_bias(bias: jax.Array, heads: int, windows: tuple[Window, ...]) -> jax.Array:
    for axis, window in enumerate(windows):
        if window.kernel_size % 2 == 0 or window.stride > 1 or window.is_causal:
            raise ValueError(
                f"bias needs an odd kernel_size, stride 1 and is_causal False on every axis, got kernel_size "
                f"{window.kernel_size}, stride {window.stride}, is_causal {window.is_causal} on axis {axis}"
            )
    wanted = (heads, *(2 * window.kernel_size - 1 for window in windows))
    if bias.shape != wanted:
        raise ValueError(f"bias must be (H, 2k-1, …) = {wanted}, got shape {bias.shape}")
    if bias.dtype.name not in FLOATS:
        raise TypeError(f"bias must be one of {', '.join(FLOATS)}, got {bias.dtype.name}")
    return bias


def _checked_key_mask(mask: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    if mask.dtype != bool:
        raise TypeError(f"key_mask must be boolean, got {mask.dtype.name}")
    if mask.shape != shape:
        raise ValueError(f"key_mask must be (B, *S) = {shape}, got shape {mask.shape}")
    return mask


def _checked_scale(scale: float | None) -> float:
    if scale is None:
        return 0.0
    if isinstance(scale, jax.core.Tracer) or np.ndim(scale) != 0:
        raise TypeError(f"scale must be a number or None, known when tracing, got {scale!r}")
    scale = float(scale)
    if not math.isfinite(scale):
        raise ValueError(f"scale must be finite, got {scale}")
    return scale


def _integers(name: str, value: Any, axes: int) -> tuple[int, ...]:
    try:
        return (operator.index(value),) * axes
    except TypeError:
        pass
    try:
        values = tuple(operator.index(x) for x in value)
    except TypeError:
        raise TypeError(f"{name} must be an integer or one per axis, got {value!r}") from None
    if len(values) != axes:
        raise ValueError(f"{name} must have one entry for each of the {axes} axes of tokens, got {values}")
    return values


def _flags(value: bool | Sequence[bool], axes: int) -> tuple[bool, ...]:
    values = (value,) * axes if isinstance(value, bool | np.bool_) else value
    if not isinstance(values, list | tuple) or not all(isinstance(x, bool | np.bool_) for x in values):
        raise TypeError(f"is_causal must be a bool or one per axis, got {value!r}")
    if len(values) != axes:
        raise ValueError(f"is_causal must have one entry for each of the {axes} axes of tokens, got {values}")
    return tuple(bool(x) for x in values)
