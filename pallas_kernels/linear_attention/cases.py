"""Shapes of linear attention that tests, benchmarks and documentation share."""

import dataclasses
import zlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from pallas_kernels.dtypes import at_least_float32
from pallas_kernels.linear_attention.api import linear_attention, linear_attention_step
from pallas_kernels.recurrence import NormalizedState
from pallas_kernels.trials import Trial


@dataclasses.dataclass(frozen=True)
class Case:
    """One call of `linear_attention`.

    Attributes:
      name: unique.
      batch: B.
      length: N.
      heads: H.
      key_size: D.
      value_size: E; D when None.
      kv_heads: G; H when None.
      kv_length: M; N when None.
      decay: None, "head" (H,), "token" (B, N, H) or "channel" (B, N, H, D).
      strength: log decays are drawn from [-strength, 0]; a few per cent of per-token ones are 0 or -20 exactly.
      uniform: all log decays are -strength instead.
      causal: as in `linear_attention`.
      normalize: as in `linear_attention`; queries and keys are then positive.
      segments: number of segments, 0 for none.
      initial_state: whether there is one.
    """

    name: str
    batch: int = 2
    length: int = 128
    heads: int = 2
    key_size: int = 16
    value_size: int | None = None
    kv_heads: int | None = None
    kv_length: int | None = None
    decay: str | None = None
    strength: float = 0.2
    uniform: bool = False
    causal: bool = True
    normalize: bool = False
    segments: int = 0
    initial_state: bool = False

    def arrays(self) -> tuple[dict[str, np.ndarray], dict[str, object]]:
        """Floating arguments in float64, and the other keyword arguments; the same numbers every time."""
        rng = np.random.default_rng(zlib.crc32(self.name.encode()))
        b, n, h, d, e = self.batch, self.length, self.heads, self.key_size, self.value_size or self.key_size
        g, m = self.kv_heads or h, self.kv_length or n
        q, k, v = (rng.standard_normal(s) for s in ((b, n, h, d), (b, m, g, d), (b, m, g, e)))
        q = q * d**-0.5
        if self.normalize:
            q, k = np.exp(q), np.exp(k)
        arrays: dict[str, object] = {"q": q, "k": k, "v": v}
        if self.decay is not None:
            shape = {"head": (h,), "token": (b, n, h), "channel": (b, n, h, d)}[self.decay]
            decay = np.full(shape, -self.strength) if self.uniform else -self.strength * rng.random(shape)
            if self.decay != "head" and not self.uniform:
                kind = rng.random(shape)
                decay = np.where(kind < 0.03, -20.0, np.where(kind < 0.06, 0.0, decay))
            arrays["log_decay"] = decay
        if self.initial_state:
            kv, sums = rng.standard_normal((b, h, d, e)), rng.random((b, h, d))
            arrays["initial_state"] = NormalizedState(kv, sums) if self.normalize else kv
        options: dict[str, object] = {"causal": self.causal, "normalize": self.normalize}
        if self.segments and self.causal:
            options["segment_ids"] = np.sort(rng.integers(0, self.segments, (b, n)), axis=1)
        elif self.segments:  # the last query id has no key
            options["segment_ids"] = rng.integers(0, self.segments + 1, (b, n)), rng.integers(0, self.segments, (b, m))
        return arrays, options

    def arguments(self, dtype: DTypeLike = jnp.float32) -> tuple[dict[str, object], dict[str, object]]:
        """Arguments on the device: q, k, v in `dtype`; log_decay and initial_state in float32 or wider."""
        arrays, options = self.arrays()
        wide = at_least_float32(dtype)
        put = {name: jnp.asarray(arrays[name], dtype) for name in "qkv"}
        if "log_decay" in arrays:
            put["log_decay"] = jnp.asarray(arrays["log_decay"], wide)
        if "initial_state" in arrays:
            state = arrays["initial_state"]
            put["initial_state"] = (
                NormalizedState(*(jnp.asarray(x, wide) for x in state)) if self.normalize else jnp.asarray(state, wide)
            )
        return put, options


# Small enough to check against float64 in a second; together they meet every option.
SMALL = (
    Case("one_token", length=1),
    Case("one_token_channel", length=1, decay="channel", initial_state=True),
    Case("size_one", length=65, heads=1, key_size=1, value_size=1, decay="token"),
    Case("plain_63", length=63),
    Case("head_97", length=97, heads=3, decay="head", value_size=24),
    Case("token_300", length=300, decay="token", initial_state=True),
    Case("channel_150", length=150, decay="channel", initial_state=True),
    Case("grouped_head", length=200, heads=4, kv_heads=2, decay="head", initial_state=True),
    Case("grouped_token", length=130, heads=6, kv_heads=2, decay="token", value_size=8),
    Case("grouped_channel", length=70, heads=4, kv_heads=1, decay="channel"),
    Case("strong_head", length=200, decay="head", strength=20.0),
    Case("strong_token", length=260, decay="token", strength=20.0),
    Case("strong_channel", length=100, decay="channel", strength=20.0),
    Case("normalized", length=150, normalize=True, initial_state=True),
    Case("normalized_token", length=150, normalize=True, decay="token", initial_state=True, heads=4, kv_heads=2),
    Case("packed", length=200, segments=5, initial_state=True),
    Case("packed_head", length=300, segments=3, decay="head", initial_state=True),
    Case("packed_channel", length=90, segments=4, decay="channel", initial_state=True),
    Case("packed_normalized", length=180, segments=6, decay="token", normalize=True),
    Case("full", length=100, causal=False, initial_state=True),
    Case("full_cross", length=40, kv_length=150, heads=4, kv_heads=2, causal=False, value_size=8),
    Case("full_normalized", length=65, causal=False, normalize=True),
    Case("full_packed", length=90, causal=False, segments=4),
    Case("full_packed_cross", length=50, kv_length=170, heads=4, kv_heads=2, causal=False, segments=3, normalize=True),
)

# The lengths and decays at which accuracy is promised.
ACCURACY = tuple(
    Case(f"accuracy_{decay or 'none'}_{length}", 1, length, key_size=32, decay=decay, strength=strength)
    for length in (1, 63, 1000, 4097)
    for decay, strength in ((None, 0.0), ("head", 0.05), ("token", 0.5), ("channel", 0.5))
) + tuple(
    Case(f"accuracy_minus_20_{decay}_{length}", 1, length, key_size=32, decay=decay, strength=20.0, uniform=True)
    for length in (63, 1000, 4097)
    for decay in ("head", "token", "channel")
)

# What benchmarks time: one layer of 8 heads.
SPEED = tuple(
    Case(f"speed_{decay or 'none'}_{length}", 1, length, heads=8, key_size=64, decay=decay, strength=0.05)
    for length in (1024, 4096, 16384, 65536)
    for decay in (None, "head", "token", "channel")
)

# What a kernel must be right in to qualify on a device, beside some of `SMALL`: sizes that all kernels take.
WIDE = (
    Case("wide_none", 1, 500, heads=4, key_size=128),
    Case("wide_head", 2, 700, heads=4, kv_heads=2, key_size=64, decay="head", strength=0.05, initial_state=True),
    Case("wide_token", 2, 700, heads=4, key_size=64, value_size=128, decay="token", initial_state=True),
    Case("wide_token_256", 1, 300, heads=2, key_size=256, decay="token"),
)
TRIED = ("grouped_head", "token_300", "channel_150", "strong_token", "normalized_token", "packed_head", "full_packed")


def trials() -> tuple[Trial, ...]:
    """What kernels of `linear_attention` are tried with."""
    small = [(case, dtype) for case in SMALL if case.name in TRIED for dtype in ("bfloat16", "float32")]
    correct = [_trial(case, dtype) for case, dtype in (*small, *((case, "bfloat16") for case in WIDE))]
    speed = [case for case in SPEED if case.length == 4096 and case.decay in (None, "token")]
    return (*correct, *(_trial(case, "bfloat16", timed=True) for case in speed))


def _trial(case: Case, dtype: str, timed: bool = False) -> Trial:
    arguments, options = case.arguments(jnp.dtype(dtype))
    options["return_state"] = case.causal or not case.segments

    def call(arguments: dict[str, Any], implementation: str) -> Any:
        return linear_attention(**arguments, **options, implementation=implementation)

    return Trial(case.name, dtype, jax.tree.map(np.asarray, arguments), call, timed)


def step_trials() -> tuple[Trial, ...]:
    """What kernels of `linear_attention_step` are tried with: one token, and four."""
    cases = [
        Case("step", 4, 1, heads=4, key_size=64, decay="head", initial_state=True),
        Case("steps", 2, 4, heads=4, kv_heads=2, key_size=128, decay="token", initial_state=True),
        Case("steps_channel", 2, 4, heads=4, key_size=64, decay="channel", initial_state=True),
        Case("steps_normalized", 2, 4, heads=4, key_size=64, normalize=True, initial_state=True),
    ]
    timed = Case("step_timed", 64, 1, heads=16, key_size=128, decay="head", initial_state=True)
    return (
        *(_step_trial(case, dtype) for case in cases for dtype in ("bfloat16", "float32")),
        _step_trial(timed, "bfloat16", timed=True),
    )


def _step_trial(case: Case, dtype: str, timed: bool = False) -> Trial:
    arguments, _ = case.arguments(jnp.dtype(dtype))

    def call(arguments: dict[str, Any], implementation: str) -> Any:
        if implementation == "reference":  # a step is a short sequence
            return linear_attention(
                **arguments, normalize=case.normalize, return_state=True, implementation=implementation
            )
        q, k, v, state = (arguments[name] for name in ("q", "k", "v", "initial_state"))
        how = {"log_decay": arguments.get("log_decay"), "normalize": case.normalize, "implementation": implementation}
        return linear_attention_step(q, k, v, state, **how)

    return Trial(case.name, dtype, jax.tree.map(np.asarray, arguments), call, timed, differentiable=not timed)
