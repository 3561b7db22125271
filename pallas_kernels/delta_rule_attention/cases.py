"""Shapes of delta rule attention that tests, benchmarks and documentation share."""

import dataclasses
import zlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from pallas_kernels.delta_rule_attention.api import delta_rule_attention
from pallas_kernels.dtypes import at_least_float32
from pallas_kernels.trials import Trial


@dataclasses.dataclass(frozen=True)
class Case:
    """One call of `delta_rule_attention`; keys are L2-normalised.

    Attributes:
      name: unique.
      batch: B.
      length: N.
      heads: H.
      key_size: D.
      value_size: E; D when None.
      kv_heads: G; H when None.
      beta: "uniform" in [0, 1], a few of them exactly 0, or "wide" in [0, 2], a few exactly 0 and 2; or one number.
      decay: None, "head" (H,) or "token" (B, N, H).
      strength: log decays are drawn from [-strength, 0]; a few per cent of per-token ones are 0 or -20 exactly.
      uniform: all log decays are -strength instead.
      repeat: keys repeat after so many tokens; 0 for keys that do not.
      segments: number of segments, 0 for none.
      initial_state: whether there is one.
      scale: None, or the scale.
    """

    name: str
    batch: int = 2
    length: int = 128
    heads: int = 2
    key_size: int = 16
    value_size: int | None = None
    kv_heads: int | None = None
    beta: str | float = "uniform"
    decay: str | None = None
    strength: float = 0.2
    uniform: bool = False
    repeat: int = 0
    segments: int = 0
    initial_state: bool = False
    scale: float | None = None

    def arrays(self) -> tuple[dict[str, np.ndarray], dict[str, object]]:
        """Floating arguments in float64, and the other keyword arguments; the same numbers every time."""
        rng = np.random.default_rng(zlib.crc32(self.name.encode()))
        b, n, h, d, e = self.batch, self.length, self.heads, self.key_size, self.value_size or self.key_size
        g = self.kv_heads or h
        q, k, v = (rng.standard_normal(s) for s in ((b, n, h, d), (b, n, g, d), (b, n, g, e)))
        if self.repeat:
            k = k[:, np.arange(n) % self.repeat]
        k = k / np.linalg.norm(k, axis=-1, keepdims=True)
        arrays: dict[str, np.ndarray] = {"q": q * d**-0.5, "k": k, "v": v, "beta": self._betas(rng, (b, n, h))}
        if self.decay is not None:
            shape = {"head": (h,), "token": (b, n, h)}[self.decay]
            decay = np.full(shape, -self.strength) if self.uniform else -self.strength * rng.random(shape)
            if self.decay == "token" and not self.uniform:
                kind = rng.random(shape)
                decay = np.where(kind < 0.03, -20.0, np.where(kind < 0.06, 0.0, decay))
            arrays["log_decay"] = decay
        if self.initial_state:
            arrays["initial_state"] = rng.standard_normal((b, h, d, e))
        if self.scale is not None:
            arrays["scale"] = np.asarray(self.scale)
        options: dict[str, object] = {}
        if self.segments:
            options["segment_ids"] = np.sort(rng.integers(0, self.segments, (b, n)), axis=1)
        return arrays, options

    def _betas(self, rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
        if not isinstance(self.beta, str):
            return np.full(shape, float(self.beta))
        top, kind = {"uniform": 1.0, "wide": 2.0}[self.beta], rng.random(shape)
        return np.where(kind < 0.05, 0.0, np.where(kind < 0.1, top, top * rng.random(shape)))

    def arguments(self, dtype: DTypeLike = jnp.float32) -> tuple[dict[str, object], dict[str, object]]:
        """Arguments on the device: q, k, v in `dtype`; the others in float32 or wider."""
        arrays, options = self.arrays()
        wide = at_least_float32(dtype)
        return {name: jnp.asarray(x, dtype if name in "qkv" else wide) for name, x in arrays.items()}, options


# Small enough to check against float64 in a second; together they meet every option.
SMALL = (
    Case("one_token", length=1),
    Case("one_token_state", length=1, decay="token", initial_state=True),
    Case("size_one", length=65, heads=1, key_size=1, value_size=1, decay="token"),
    Case("plain_63", length=63),
    Case("wide_150", length=150, beta="wide", initial_state=True, scale=0.0),
    Case("head_97", length=97, heads=3, decay="head", value_size=24, scale=0.3),
    Case("token_200", length=200, decay="token", initial_state=True),
    Case("grouped_head", length=140, heads=4, kv_heads=2, decay="head", initial_state=True),
    Case("grouped_token", length=130, heads=6, kv_heads=2, decay="token", value_size=8),
    Case("strong_head", length=150, heads=3, decay="head", strength=20.0),
    Case("strong_token", length=150, decay="token", strength=20.0),
    Case("repeated_keys", length=150, repeat=5, beta=1.0),
    Case("packed", length=150, segments=5, initial_state=True),
    Case("packed_head", length=200, segments=3, decay="head", initial_state=True, beta="wide"),
    Case("packed_token", length=120, segments=4, decay="token", heads=4, kv_heads=2),
)

# Nothing contracts: every token is a reflection, and errors add up along the sequence, in the recurrence too.
REFLECTIONS = (
    Case("reflections", length=150, beta=2.0, initial_state=True),
    Case("one_key_reflected", length=150, repeat=1, beta=2.0, initial_state=True),
    Case("one_key_nearly_reflected", length=150, repeat=1, beta=1.9, initial_state=True),
)

# A long sequence of each decay; with those of 1 and 63 tokens in `SMALL`, where accuracy is promised.
ACCURACY = tuple(
    Case(f"accuracy_{decay or 'none'}_{length}", 1, length, key_size=32, beta="wide", decay=decay, strength=strength)
    for length in (63, 1000, 4097)
    for decay, strength in ((None, 0.0), ("head", 0.05), ("token", 0.5))
) + tuple(
    Case(f"accuracy_minus_20_{decay}_{length}", 1, length, key_size=32, decay=decay, strength=20.0, uniform=True)
    for length in (63, 1000, 4097)
    for decay in ("head", "token")
)

# What benchmarks time: one layer of 8 heads.
SPEED = tuple(
    Case(f"speed_{decay or 'none'}_{length}", 1, length, heads=8, key_size=64, decay=decay, strength=0.05)
    for length in (1024, 4096, 16384)
    for decay in (None, "head", "token")
)

# What a kernel must be right in to qualify on a device.
TRIED = ("plain_63", "head_97", "token_200", "grouped_token", "strong_token", "packed_head")
WIDE = (
    Case("wide_token", 1, 300, heads=4, kv_heads=2, key_size=128, decay="token", initial_state=True),
    Case("wide_64", 2, 200, heads=2, key_size=64, value_size=128),
)


def trials() -> tuple[Trial, ...]:
    """What kernels of `delta_rule_attention` are tried with."""
    small = [(case, dtype) for case in SMALL if case.name in TRIED for dtype in ("bfloat16", "float32")]
    correct = [_trial(case, dtype) for case, dtype in (*small, *((case, "bfloat16") for case in WIDE))]
    speed = [case for case in SPEED if case.length == 4096 and case.decay in (None, "token")]
    return (*correct, *(_trial(case, "bfloat16", timed=True) for case in speed))


def _trial(case: Case, dtype: str, timed: bool = False) -> Trial:
    arguments, options = case.arguments(jnp.dtype(dtype))
    if "scale" in arguments:  # its gradient is one sum that may cancel
        options["scale"] = np.asarray(arguments.pop("scale"))

    def call(arguments: dict[str, Any], implementation: str) -> Any:
        return delta_rule_attention(**arguments, **options, return_state=True, implementation=implementation)

    return Trial(case.name, dtype, jax.tree.map(np.asarray, arguments), call, timed)
