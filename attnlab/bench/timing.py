"""Seconds of a call, and what this machine can do at best, measured in the same run."""

import dataclasses
import functools
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

ROUND = 0.02  # seconds of calls that are queued together, so that starting one hides behind the one before


def median_seconds(call: Callable[[], Any], budget: float = 0.5, wait: Callable[[Any], Any] | None = None) -> float:
    """Median seconds of a call that has been compiled.

    Calls are queued in rounds and waited for together, as a program would run them.

    Args:
      call: does the work; what it returns is waited for.
      budget: seconds to spend, at least; three rounds are always run.
      wait: waits for a result; that of JAX when None.
    """
    wait = wait or jax.block_until_ready

    def run(count: int) -> float:
        start = time.perf_counter()
        for _ in range(count):
            result = call()
        wait(result)
        return (time.perf_counter() - start) / count

    first = min(run(1), run(1))
    count = max(1, min(1000, int(ROUND / max(first, 1e-7))))
    times: list[float] = []
    while len(times) < 3 or sum(times) * count < budget:
        times.append(run(count))
    return statistics.median(times)


@dataclasses.dataclass(frozen=True)
class Machine:
    """What a device was measured to do.

    Attributes:
      kind: of the device, as JAX names it.
      bandwidth: bytes read and written per second by an array operation too large for any cache.
      rate: floating-point operations per second of a large square matrix product.
    """

    kind: str
    bandwidth: float
    rate: float

    def bound(self, minimum_bytes: int, operations: int) -> float:
        """Seconds below which a task of so many bytes and operations cannot be done."""
        return max(minimum_bytes / self.bandwidth, operations / self.rate)


@functools.cache
def measure_machine(dtype: str) -> Machine:
    """Bandwidth of the default device, and its rate in `dtype`."""
    device = jax.devices()[0]
    small = device.platform == "cpu"
    x = jnp.zeros(2**26 if small else 2**29, jnp.bfloat16 if not small else jnp.float32)
    add = jax.jit(lambda x: x + 1)
    add(x).block_until_ready()
    moved = 2 * x.nbytes / median_seconds(lambda: add(x))
    side = 2048 if small else 8192
    a = jnp.ones((side, side), dtype)
    # XLA's products of half precision on a CPU are no measure of what it can do.
    a = a.astype(jnp.float32) if small else a
    product = jax.jit(lambda a: a @ a)
    product(a).block_until_ready()
    return Machine(device.device_kind, moved, 2 * side**3 / median_seconds(lambda: product(a)))
