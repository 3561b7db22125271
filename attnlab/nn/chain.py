"""Modules one after another, and what each of them is told."""

import functools
import inspect
from typing import Any

import jax
from flax import nnx


@functools.cache
def _is_told(cls: type) -> bool:
    return "deterministic" in inspect.signature(cls.__call__).parameters


def call(part: nnx.Module, x: jax.Array, deterministic: bool, **arguments: Any) -> jax.Array:
    """The part's result; whether this is training (`deterministic=False`) goes to those whose call takes it."""
    if _is_told(type(part)):
        arguments["deterministic"] = deterministic
    return part(x, **arguments)


class Chain(nnx.Module):
    """Parts one after another; those whose call takes `deterministic` are told."""

    def __init__(self, *parts: nnx.Module):
        self.parts = nnx.List(parts)

    def __call__(self, x: jax.Array, *, deterministic: bool = True) -> jax.Array:
        for part in self.parts:
            x = call(part, x, deterministic)
        return x
