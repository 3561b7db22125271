"""The gradient of a loss with respect to attention: an intervention that adds a parameter of zeros.

    probe = AttentionProbe((L, B, H, N, N))
    probed = attach(model, probe)
    grads = nnx.grad(loss, argnums=nnx.DiffState(0, Probe))(probed, batch)

`attention_gradients` does this, with the shapes of the model at hand.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from attnlab.points import At, Editable, Intervention, attach


class Probe(nnx.Variable):
    """Zeros whose gradient is that of the value they are added to."""


class AttentionProbe(Intervention):
    """Zeros added to the weights of attention.

    Args:
      shape: `(L, B, H, N, M)`: of the L layers of the model, each the shape of its weights.
    """

    def __init__(self, shape: tuple[int, ...]):
        self.zeros = Probe(jnp.zeros(shape, jnp.float32))

    def attention(self, weights: jax.Array, at: At, memory: Any) -> tuple[jax.Array, Any]:
        return weights + self.zeros[...][at.layer], memory


def attention_gradients(model: Editable, loss: Callable[..., jax.Array], *args: Any) -> jax.Array:
    """dL/dA of all layers, `(L, B, H, N, M)` in float32.

    Args:
      model: of which every layer has the point `attention`, with weights of one shape.
      loss: `loss(model, *args)`, a scalar.
      *args: the loss's further arguments.

    Raises:
      ValueError: if layers differ in the shape of their weights, or have none.
    """
    count = len(model.edited_layers())
    shapes: list[tuple[int, ...]] = []

    class Look(Intervention):
        def attention(self, weights: jax.Array, at: At, memory: Any) -> tuple[jax.Array, Any]:
            shapes.append(weights.shape)
            return weights, memory

    graph, state = nnx.split(attach(model, Look()))
    jax.eval_shape(lambda state: loss(nnx.merge(graph, state), *args), state)
    if len(shapes) != count or len(set(shapes)) != 1:
        raise ValueError(f"the {count} layers must have weights of one shape each, got {shapes}")
    probed = attach(model, AttentionProbe((count, *shapes[0])))
    gradients = nnx.grad(loss, argnums=nnx.DiffState(0, Probe))(probed, *args)
    return jax.tree.leaves(gradients)[0]
