"""Shapes of neighborhood attention that tests, benchmarks and documentation share."""

import dataclasses
import zlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from pallas_kernels.dtypes import at_least_float32
from pallas_kernels.neighborhood_attention.api import neighborhood_attention
from pallas_kernels.trials import Trial


@dataclasses.dataclass(frozen=True)
class Case:
    """One call of `neighborhood_attention`.

    Attributes:
      name: unique.
      shape: lengths of the axes of tokens.
      kernel_size: as in `neighborhood_attention`, and so stride, dilation, is_causal and scale.
      stride: likewise.
      dilation: likewise.
      is_causal: likewise.
      scale: likewise.
      batch: B.
      heads: H.
      kv_heads: G; H when None.
      key_size: D.
      value_size: E; D when None.
      bias: whether there is a relative position bias.
      additional: A, 0 for no additional keys.
      masked: whether some keys do not exist, among them all that some query sees.
    """

    name: str
    shape: tuple[int, ...]
    kernel_size: int | tuple[int, ...]
    stride: int | tuple[int, ...] = 1
    dilation: int | tuple[int, ...] = 1
    is_causal: bool | tuple[bool, ...] = False
    scale: float | None = None
    batch: int = 1
    heads: int = 2
    kv_heads: int | None = None
    key_size: int = 8
    value_size: int | None = None
    bias: bool = False
    additional: int = 0
    masked: bool = False

    @property
    def options(self) -> dict[str, object]:
        """Arguments that have no gradient."""
        names = ("kernel_size", "stride", "dilation", "is_causal", "scale")
        options = {name: getattr(self, name) for name in names}
        if self.masked:
            rng = np.random.default_rng(zlib.crc32(self.name.encode()))
            mask = rng.random((self.batch, *self.shape)) < 0.7
            mask[0, : (self.shape[0] + 1) // 2] = False
            options["key_mask"] = mask
        return options

    def arrays(self, dtype: DTypeLike = jnp.float32) -> dict[str, jnp.ndarray]:
        """Array arguments in `dtype`, the bias in float32 or wider; the same numbers every time."""
        rng = np.random.default_rng(zlib.crc32(self.name.encode()))
        b, h, g, d = self.batch, self.heads, self.kv_heads or self.heads, self.key_size
        e = self.value_size or d
        shapes = {"q": (b, *self.shape, h, d), "k": (b, *self.shape, g, d), "v": (b, *self.shape, g, e)}
        if self.additional:
            shapes |= {"additional_keys": (b, self.additional, g, d), "additional_values": (b, self.additional, g, e)}
        arrays = {name: jnp.asarray(rng.standard_normal(shape), dtype) for name, shape in shapes.items()}
        if self.bias:
            kernel = self.kernel_size if isinstance(self.kernel_size, tuple) else (self.kernel_size,) * len(self.shape)
            bias = rng.standard_normal((h, *(2 * k - 1 for k in kernel)))
            arrays["bias"] = jnp.asarray(bias, at_least_float32(dtype))
        return arrays


# Small enough to check against float64 in a second; together they meet every option.
SMALL = (
    Case("one_token", (1,), 1),
    Case("sequence", (19,), 5, batch=2),
    Case("sequence_even", (20,), 6, stride=3),
    Case("sequence_masked", (21,), 5, dilation=2, is_causal=True, batch=2, heads=4, kv_heads=2, masked=True),
    Case("sequence_blocks", (24,), 6, stride=6),
    Case("sequence_causal", (23,), 4, is_causal=True),
    Case("sequence_causal_stride_dilation", (23,), 4, stride=2, dilation=3, is_causal=True, value_size=3),
    Case("sequence_full", (17,), 17, additional=2),
    Case("sequence_causal_full", (17,), 17, is_causal=True, heads=4, kv_heads=1),
    Case("image", (9, 11), (5, 3), batch=2),
    Case("image_mixed", (10, 9), (4, 3), stride=(2, 1), dilation=(2, 1), is_causal=(False, True), heads=4, kv_heads=2),
    Case("image_bias_dilation", (10, 9), 3, dilation=(2, 3), bias=True, heads=4, kv_heads=2),
    Case("image_additional", (7, 6), 3, additional=5, scale=0.3, bias=True),
    Case("image_row", (1, 12), (1, 5)),
    Case("image_masked", (9, 7), 3, batch=2, bias=True, masked=True),
    Case("image_masked_additional", (7, 6), 3, additional=2, masked=True),
    Case("video_mixed", (5, 6, 5), (2, 3, 4), stride=(1, 2, 1), dilation=(2, 1, 1), is_causal=(True, False, False)),
    Case("video_bias", (3, 5, 4), 3, bias=True, additional=2, value_size=4),
)

# What benchmarks time.
SPEED = (
    Case("digits_8x8_k7", (8, 8), 7, batch=32, heads=4, key_size=16),
    Case("image_16x16_k7", (16, 16), 7, heads=4, key_size=32),
    Case("image_32x32_k7", (32, 32), 7, heads=4, key_size=32),
    Case("image_64x64_k7", (64, 64), 7, heads=4, key_size=32),
    Case("image_64x64_k13", (64, 64), 13, heads=4, key_size=32),
    Case("image_64x64_k13_blocks", (64, 64), 13, stride=13, heads=4, key_size=32),
    Case("video_8x16x16_k5", (8, 16, 16), 5, heads=4, key_size=32),
    Case("sequence_16384_k128_causal", (16384,), 128, is_causal=True, heads=4, key_size=32),
)

# What a kernel must be right in to qualify on a device.
TRIED = ("sequence", "image_bias_dilation", "image_mixed", "image_additional", "video_mixed")


def trials() -> tuple[Trial, ...]:
    """What kernels of `neighborhood_attention` are tried with."""
    small = [_trial(case, dtype) for case in SMALL if case.name in TRIED for dtype in ("bfloat16", "float32")]
    timed = [case for case in SPEED if case.name in ("image_64x64_k7", "image_64x64_k13")]
    return (*small, *(_trial(case, "bfloat16", timed=True) for case in timed))


def _trial(case: Case, dtype: str, timed: bool = False) -> Trial:
    def call(arrays: dict[str, Any], implementation: str) -> Any:
        return neighborhood_attention(**arrays, **case.options, implementation=implementation)

    return Trial(case.name, dtype, jax.tree.map(np.asarray, case.arrays(jnp.dtype(dtype))), call, timed)
