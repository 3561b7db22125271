"""Short causal convolutions of sequences, with a decode state, restarted at packed segments.

y_t = Σ_{d=0}^{K-1} kernel[K-1-d] x_{t-d} + bias        x is zero before the first token
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import ArrayLike

from attnlab.nn.linear import uniform_init
from attnlab.nn.masking import segment_positions
from pallas_kernels.dtypes import at_least_float32

FORMS = ("depthwise", "shared", "dense")


def causal_conv(
    x: ArrayLike,
    kernel: ArrayLike,
    bias: ArrayLike | None = None,
    *,
    state: ArrayLike | None = None,
    real: ArrayLike | None = None,
    segment_ids: ArrayLike | None = None,
    before: ArrayLike | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Convolves each sequence with the tokens before.

    Args:
      x: `(B, N, C)`, or heads `(B, N, H, D)`.
      kernel: depthwise, `(K, C)` or `(K, H, D)`; shared by heads, `(K, D)` or `(K, 1, D)`; or dense in each head,
        `(K, H, D, E)`. The last entry is that of the token itself.
      bias: added to the result, of any shape that broadcasts against it.
      state: `(B, K-1, *channels)` in float32, the last tokens before these; zeros when None.
      real: `(B, N)` boolean; tokens that are not are as if they were not there, and get zeros.
      segment_ids: `(B, N)`, each run of equal ids is a sequence of its own; the state is that before the first.
      before: what stands before the first token of a sequence, broadcastable to `(*channels)`; zeros when None.

    Returns:
      The convolved tokens, in the dtype of `x`, and the new state.

    Raises:
      ValueError: if the kernel fits neither form.
    """
    x, kernel = jnp.asarray(x), jnp.asarray(kernel)
    batch, tokens, *channels = x.shape
    dense = kernel.ndim == 4 and x.ndim == 4
    if not dense and kernel.ndim > x.ndim - 1:
        raise ValueError(f"kernel of shape {kernel.shape} does not fit tokens of shape {x.shape}")
    wide = at_least_float32(x.dtype)
    reach = kernel.shape[0] - 1
    before = jnp.zeros((), wide) if before is None else jnp.asarray(before, wide)
    kept = wide if state is None else jnp.result_type(state)
    if state is None:
        state = jnp.broadcast_to(before, (batch, reach, *channels))
    inputs, ids, rank = x.astype(wide), segment_ids, None
    count = jnp.full((batch,), tokens)
    if real is not None:
        # Real tokens to the front, in order; back again at the end.
        real = jnp.asarray(real)
        order = jnp.argsort(~real, axis=1, stable=True)
        count, rank = real.sum(1), jnp.maximum(jnp.cumsum(real, 1) - 1, 0)
        inputs = _take(inputs, order)
        ids = None if ids is None else jnp.take_along_axis(jnp.asarray(ids), order, axis=1)
    padded = jnp.concatenate([jnp.asarray(state, wide), inputs], axis=1)
    place = None if ids is None else _places(ids, reach)
    y = jnp.zeros((), wide)
    for tap in range(reach + 1):
        source = padded[:, tap : tap + tokens]
        if place is not None:
            source = jnp.where((place >= reach - tap).reshape(batch, tokens, *(1,) * len(channels)), source, before)
        weight = kernel[tap].astype(wide)
        y = y + (jnp.einsum("bnhd,hde->bnhe", source, weight) if dense else source * weight)
    y = y if bias is None else y + jnp.asarray(bias, wide)
    if rank is not None:
        y = jnp.where(real.reshape(batch, tokens, *(1,) * len(channels)), _take(y, rank), 0)
    return y.astype(x.dtype), _take(padded, count[:, None] + jnp.arange(reach)).astype(kept)


def _places(ids: jax.Array, reach: int) -> jax.Array:
    """Place of each token in its segment, where those of the first count on from the state."""
    place = segment_positions(ids)
    first = jnp.cumsum(place == 0, axis=1) == 1
    return jnp.where(first, place + reach, place)


def _take(x: jax.Array, index: jax.Array) -> jax.Array:
    return jnp.take_along_axis(x, index.reshape(*index.shape, *(1,) * (x.ndim - 2)), axis=1)


class CausalConv(nnx.Module):
    """A `causal_conv` with learned weights.

    Args:
      channels: C, or heads and head size (H, D).
      kernel_size: tokens K that are read, the present one included.
      form: of heads, `"depthwise"` with a kernel `(K, H, D)`, `"shared"` by the heads, `(K, D)`, or `"dense"` in each
        head, `(K, H, D, D)`; channels C are depthwise, `(K, C)`.
      use_bias: whether a bias `(C,)`, `(H, D)` or, shared, `(D,)` is added.
      dtype: of the result; that of the tokens when None.
      param_dtype: of the kernel, uniform in ±1/√fan_in at the start, and the bias, zero.
      rngs: stream `params`.

    Raises:
      ValueError: for a kernel size below 1, or a form that the channels do not have.
    """

    def __init__(
        self,
        channels: int | Sequence[int],
        kernel_size: int = 4,
        *,
        form: str = "depthwise",
        use_bias: bool = False,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        if kernel_size < 1:
            raise ValueError(f"kernel_size must be at least 1, got {kernel_size}")
        self.kernel_size, self.dtype = (kernel_size,), dtype
        self.channels = (channels,) if isinstance(channels, int | np.integer) else tuple(channels)
        if form not in (FORMS if len(self.channels) == 2 else FORMS[:1]):
            raise ValueError(f"form must be one of {', '.join(FORMS)}, the latter two of heads, got {form!r}")
        self.form, size = form, self.channels[-1]
        within: tuple[int, ...] = (size,) if form == "shared" else self.channels
        axes: tuple[str | None, ...] = (None,)
        if form != "shared":
            axes = ("embed",) if len(self.channels) == 1 else ("heads", None)
        out, fan_in = ((size,), kernel_size * size) if form == "dense" else ((), kernel_size)
        kernel = uniform_init(fan_in)(rngs.params(), (kernel_size, *within, *out), param_dtype)
        self.kernel = nnx.Param(kernel, logical_axes=(None, *axes, *(None for _ in out)))
        self.bias = nnx.data(None)
        if use_bias:
            self.bias = nnx.Param(jnp.zeros(within, param_dtype), logical_axes=axes)

    def init_state(self, batch_size: int) -> jax.Array:
        """Before the first token: zeros `(B, K-1, *channels)` float32."""
        return jnp.zeros((batch_size, self.kernel_size[0] - 1, *self.channels), jnp.float32)

    def __call__(self, x: ArrayLike, state: ArrayLike | None = None, **tokens: Any) -> tuple[jax.Array, jax.Array]:
        """Convolved tokens and the new state; more arguments are `real`, `segment_ids`, `before` of `causal_conv`."""
        bias = None if self.bias is None else self.bias[...]
        return causal_conv(jnp.asarray(x, self.dtype), self.kernel[...], bias, state=state, **tokens)
