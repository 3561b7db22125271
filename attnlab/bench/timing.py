"""Seconds of a call, and what this machine can do at best, measured in the same run."""

import dataclasses
import functools
import math
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

    first = [run(1), run(1)]
    count = max(1, min(1000, int(ROUND / max(min(first), 1e-7))))
    times = first if count == 1 else []
    while len(times) < 3 or sum(times) * count < budget:
        times.append(run(count))
    return statistics.median(times)


@dataclasses.dataclass(frozen=True)
class Machine:
    """What a device was measured to do.

    Attributes:
      kind: of the device, as JAX names it.
      bandwidth: bytes read and written per second by an array operation on as many bytes as a task moves.
      rate: floating-point operations per second of a large square matrix product.
    """

    kind: str
    bandwidth: float
    rate: float

    def bound(self, minimum_bytes: int, operations: int) -> float:
        """Seconds below which a task of so many bytes and operations cannot be done."""
        return max(minimum_bytes / self.bandwidth, operations / self.rate)


def measure_machine(dtype: str, minimum_bytes: int) -> Machine:
    """The default device, in `dtype`, for tasks that move about so many bytes: few of them stay in a cache."""
    device = jax.devices()[0]
    most = 2**28 if device.platform == "cpu" else 2**30  # too large for any cache
    size = min(most, 2 ** math.ceil(math.log2(max(minimum_bytes, 2))))
    return Machine(device.device_kind, _bandwidth(size), _rate(dtype))


@functools.cache
def _bandwidth(size: int) -> float:
    """Bytes per second of adding one to an array of so many bytes, in its place: new memory is not what is measured."""
    x = jnp.zeros(size // 4, jnp.float32)
    add = jax.jit(lambda x: x + 1, donate_argnums=0)

    def call() -> jax.Array:
        nonlocal x
        x = add(x)
        return x

    call().block_until_ready()
    return 2 * size / median_seconds(call)


@functools.cache
def _rate(dtype: str) -> float:
    """Operations per second of a matrix product."""
    small = jax.devices()[0].platform == "cpu"
    side = 2048 if small else 8192
    # XLA's products of half precision on a CPU are no measure of what it can do.
    a = jnp.ones((side, side), jnp.float32 if small else dtype)
    product = jax.jit(lambda a: a @ a)
    product(a).block_until_ready()
    return 2 * side**3 / median_seconds(lambda: product(a))
