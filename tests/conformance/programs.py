"""The compiled programs of a module: each is compiled once, and read by many tests.

Compilation is what these tests cost, not arithmetic. So the call and its gradient are one program, run with whatever
inputs the properties need; a program of its own have only other shapes, other dtypes and other arguments.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from tests.conformance.subjects import Subject


class Pulled(NamedTuple):
    """A call and the pull-back of one cotangent.

    Attributes:
      y: the result.
      params: gradient of every parameter.
      arguments: gradient of the tokens, and of the context; nothing for ids.
    """

    y: jax.Array
    params: nnx.State
    arguments: tuple[jax.Array, ...]


class Programs:
    """A module, the arguments of its usual call, and its programs.

    Attributes:
      module: whose state is an argument of every program.
      arguments: float32 NumPy arrays.
      cotangent: of the result, random where None.
    """

    def __init__(self, module: nnx.Module, arguments: tuple[np.ndarray, ...], cotangent: np.ndarray | None = None):
        self.module, self.arguments, self.cotangent = module, arguments, cotangent
        self.graph, self.state = nnx.split(module)
        self._call = jax.jit(self.eager)
        self._pull = jax.jit(self._call_and_gradient)

    def eager(self, state: nnx.State, *arguments: Any, **given: Any) -> jax.Array:
        return nnx.merge(self.graph, state)(*arguments, **given)

    def call(self, *arguments: Any, state: nnx.State | None = None, **given: Any) -> np.ndarray:
        """The call, compiled for every combination of shapes, dtypes and arguments."""
        return np.asarray(self._call(self.state if state is None else state, *arguments, **given))

    def pull(
        self, arguments: tuple[Any, ...], cotangent: Any = None, *, state: nnx.State | None = None, **given: Any
    ) -> Pulled:
        """The call and its gradient against `cotangent`, that of the class where None; arrays are NumPy's."""
        cotangent = self.cotangent if cotangent is None else cotangent
        state = self.state if state is None else state
        params, rest = nnx.split_state(state, nnx.Param, ...)
        return Pulled(*jax.device_get(self._pull(params, rest, arguments, cotangent, given)))

    def traced(self, params: Any, rest: Any, arguments: Any) -> Any:
        """What `pull` compiles, to be traced in another setting of JAX."""
        return self._call_and_gradient(params, rest, arguments, None, {})

    def _call_and_gradient(self, params: Any, rest: Any, arguments: Any, cotangent: Any, given: Any) -> Any:
        real = all(jnp.issubdtype(a.dtype, jnp.floating) for a in arguments)

        def call(params, moved):
            return self.eager(nnx.merge_state(params, rest), *(moved if real else arguments), **given)

        y, pull = jax.vjp(call, params, arguments if real else ())
        cotangent = random_cotangent(y) if cotangent is None else cotangent
        return y, *pull(jnp.asarray(cotangent, y.dtype))

    @functools.cached_property
    def plain(self) -> Pulled:
        """Of the arguments, in float32."""
        return self.pull(self.arguments)

    @functools.cached_property
    def half(self) -> Pulled:
        """Of the arguments, in bfloat16."""
        return self.pull(rounded(self.arguments))

    def rematerialised(self) -> tuple[Any, Any]:
        """The gradients of `plain`, where the call is computed anew for them."""
        params, rest = nnx.split_state(self.state, nnx.Param, ...)

        def gradients(params, arguments, cotangent):
            call = jax.checkpoint(lambda params, arguments: self.eager(nnx.merge_state(params, rest), *arguments))
            return jax.vjp(call, params, arguments)[1](cotangent)

        return jax.device_get(jax.jit(gradients)(params, self.arguments, self.cotangent))


def random_cotangent(x: Any) -> np.ndarray:
    return np.random.default_rng(9).standard_normal(np.shape(x)).astype(np.float32)


def rounded(arguments: tuple[np.ndarray, ...], dtype: Any = jnp.bfloat16) -> tuple[np.ndarray, ...]:
    return tuple(a.astype(dtype) for a in arguments)


class MixerPrograms(Programs):
    """Those of a subject, its parameters moved off their initial values."""

    def __init__(self, subject: Subject):
        arguments = subject.arguments(subject.tokens())
        super().__init__(subject.build(), arguments, random_cotangent(arguments[0]))
        self.subject = subject

    @functools.cached_property
    def untouched(self) -> nnx.State:
        """The state with the initial values of the parameters, whose biases are zero."""
        return nnx.state(self.subject.build(noise=False))


@functools.lru_cache(maxsize=2)
def programs(subject: Subject) -> MixerPrograms:
    return MixerPrograms(subject)
