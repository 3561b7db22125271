"""What is timed: an op at one shape, dtype and decay, in one mode."""

import dataclasses
import functools
import math
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from attnlab.suggest import suggestion

MODES = ("forward", "gradient", "decode")
DTYPES = ("bfloat16", "float16", "float32")


@dataclasses.dataclass(frozen=True)
class Op:
    """An op that can be timed.

    Attributes:
      name: of its dispatch table and of its function in `pallas_kernels`.
      decays: forms of the decay that it takes.
      operations: floating-point operations per token and entry of the state, forward, as a recurrence.
      corrects: whether it takes beta, and keys of unit length: the delta rule.
    """

    name: str
    decays: tuple[str, ...]
    operations: int
    corrects: bool = False


OPS = {
    op.name: op
    for op in (
        Op("linear_attention", ("none", "head", "token", "channel"), operations=4),
        Op("delta_rule_attention", ("none", "head", "token"), operations=6, corrects=True),
    )
}


@dataclasses.dataclass(frozen=True)
class Shape:
    """Sizes of one call.

    Attributes:
      batch: B.
      length: N.
      heads: H.
      key_size: D.
      value_size: E.
    """

    batch: int
    length: int
    heads: int
    key_size: int
    value_size: int

    @classmethod
    def parse(cls, text: str) -> "Shape":
        """Reads BxNxHxD or BxNxHxDxE, such as 1x8192x96x128.

        Raises:
          ValueError: for any other text.
        """
        if not re.fullmatch(r"[1-9]\d*(x[1-9]\d*){3,4}", text):
            raise ValueError(f"a shape must be BxNxHxD or BxNxHxDxE, such as 1x8192x96x128, got {text!r}")
        sizes = [int(size) for size in text.split("x")]
        return cls(*sizes, *sizes[3:]) if len(sizes) == 4 else cls(*sizes)

    def __str__(self) -> str:
        value = "" if self.value_size == self.key_size else f" E{self.value_size}"
        return f"B{self.batch} N{self.length} H{self.heads} D{self.key_size}{value}"


@dataclasses.dataclass(frozen=True)
class Problem:
    """One thing to time; causal, without segments.

    Attributes:
      op: key of `OPS`.
      shape: sizes; the length of a decoding step is 1.
      decay: "none", "head" (H,), "token" (B, N, H) or "channel" (B, N, H, D).
      dtype: of q, k, v, one of `DTYPES`.
      mode: "forward"; "gradient", the forward and the backward pass; or "decode", one token and the state.

    Raises:
      ValueError: for an unknown op, decay, dtype or mode.
    """

    op: str
    shape: Shape
    decay: str = "head"
    dtype: str = "bfloat16"
    mode: str = "forward"

    def __post_init__(self):
        if self.op not in OPS:
            raise ValueError(f"no benchmark is called {self.op!r}: {suggestion(self.op, OPS)}")
        allowed = {"decay": OPS[self.op].decays, "dtype": DTYPES, "mode": MODES}
        for name, values in allowed.items():
            if getattr(self, name) not in values:
                raise ValueError(f"{name} of {self.op} must be one of {', '.join(values)}, got {getattr(self, name)!r}")
        if self.mode == "decode" and self.shape.length != 1:
            object.__setattr__(self, "shape", dataclasses.replace(self.shape, length=1))

    def __str__(self) -> str:
        decay = {"none": "no decay"}.get(self.decay, f"decay per {self.decay}")
        return f"{self.mode}, {self.shape}, {self.dtype}, {decay}"

    def inputs(self) -> dict[str, tuple[tuple[int, ...], jnp.dtype]]:
        """Shape and dtype of each array that is read, by the name of the argument."""
        b, n, h, d, e = dataclasses.astuple(self.shape)
        dtype, wide = jnp.dtype(self.dtype), jnp.dtype(jnp.float32)
        sizes = {"q": ((b, n, h, d), dtype), "k": ((b, n, h, d), dtype), "v": ((b, n, h, e), dtype)}
        if OPS[self.op].corrects:
            sizes["beta"] = ((b, n, h), dtype)
        if self.decay != "none":
            sizes["log_decay"] = {"head": (h,), "token": (b, n, h), "channel": (b, n, h, d)}[self.decay], wide
        if self.mode == "decode":
            sizes["state"] = (b, h, d, e), wide
        return sizes

    @property
    def differentiated(self) -> tuple[str, ...]:
        """Arguments whose gradients mode "gradient" takes: all that are made of tokens.

        A decay per head is a constant, as it is in lightning attention and retention.
        """
        beta = ("beta",) if OPS[self.op].corrects else ()
        decay = ("log_decay",) if self.decay in ("token", "channel") else ()
        return ("q", "k", "v", *beta, *decay)

    @property
    def output_shape(self) -> tuple[int, int, int, int]:
        """(B, N, H, E)."""
        return (self.shape.batch, self.shape.length, self.shape.heads, self.shape.value_size)

    def minimum_bytes(self) -> int:
        """Bytes that any implementation moves: every input read once, every output written once.

        With the gradient: the forward pass, and a backward pass that reads the inputs and dy and writes the gradients.
        """
        read = {name: math.prod(shape) * dtype.itemsize for name, (shape, dtype) in self.inputs().items()}
        output = math.prod(self.output_shape) * jnp.dtype(self.dtype).itemsize
        forward = sum(read.values()) + output + read.get("state", 0)
        if self.mode != "gradient":
            return forward
        return forward + sum(read.values()) + output + sum(read[name] for name in self.differentiated)

    def operations(self) -> int:
        """Floating-point operations of the recurrence; three times as many with the gradient."""
        b, n, h, d, e = dataclasses.astuple(self.shape)
        return b * n * h * d * e * OPS[self.op].operations * (3 if self.mode == "gradient" else 1)

    def draw(self, seed: int = 0) -> dict[str, jax.Array]:
        """Random arguments on the device; decays per head are those of lightning attention, -8h/H."""

        def make(key: jax.Array) -> dict[str, jax.Array]:
            made = {}
            for name, (shape, dtype) in self.inputs().items():
                key, own = jax.random.split(key)
                x = jax.random.normal(own, shape, jnp.float32)
                if name == "q":
                    x = x * self.shape.key_size**-0.5
                elif name == "k" and OPS[self.op].corrects:
                    x = x / jnp.linalg.norm(x, axis=-1, keepdims=True)
                elif name == "beta":
                    x = jax.nn.sigmoid(x)
                elif name == "log_decay":
                    heads = self.shape.heads
                    x = -8 / heads * jnp.arange(heads) if self.decay == "head" else jax.nn.log_sigmoid(x)
                made[name] = x.astype(dtype)
            return made

        return jax.jit(make)(jax.random.key(seed))

    def function(self, implementation: str | None) -> Callable[[dict[str, jax.Array]], Any]:
        """The op on a dictionary of arguments: y, or y and the state when decoding."""
        import pallas_kernels

        if self.mode == "decode":
            step = getattr(pallas_kernels, f"{self.op}_step")
            if implementation is not None:
                step = functools.partial(step, implementation=implementation)

            def decode(arrays: dict[str, jax.Array]) -> Any:
                rest = dict(arrays)
                tokens = [rest.pop(name)[:, 0] for name in ("q", "k", "v", "beta") if name in rest]
                if self.decay in ("token", "channel"):
                    rest["log_decay"] = rest["log_decay"][:, 0]
                return step(*tokens, rest.pop("state"), **rest)

            return decode
        op = getattr(pallas_kernels, self.op)
        return lambda arrays: op(**arrays, implementation=implementation)


def rows_of(array: Any, name: str, decay: str, rows: tuple[tuple[int, int], ...], prefix: int) -> np.ndarray:
    """Some (batch, head) rows of an argument, as if each were a batch of one head.

    Args:
      array: an argument or an output, (B, N, H, ...), the state (B, H, D, E), or a decay per head (H,).
      name: of the argument.
      decay: form of the decay.
      rows: pairs of a batch index and a head.
      prefix: how many of the first tokens to keep.

    Returns:
      (rows, prefix, 1, ...), (rows, 1, D, E), or (rows, prefix, 1) for a decay per head.
    """
    cut = []
    for b, h in rows:
        if name == "log_decay" and decay == "head":
            cut.append(np.full((prefix, 1), np.asarray(array[h], np.float64)))
        elif name == "state":
            cut.append(np.asarray(array[b, h : h + 1].astype(jnp.float32), np.float64))
        else:
            cut.append(np.asarray(array[b, :prefix, h : h + 1].astype(jnp.float32), np.float64))
    return np.stack(cut)
