"""The kinds of layers: where their arrays stand, and in which layout, in the authors' PyTorch modules and in ours.

A Linear's weight is (out, in) there and (in, out) here, a convolution's (out, in/groups, *k) there and
(*k, in/groups, out) here, that of a transposed one (in, out, *k) there and (*k, in, out) here, a norm's weight is
called `scale` here, heads have an axis of their own here.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from attnlab.nn.causal_conv import CausalConv
from attnlab.nn.depthwise import DepthwiseConv
from attnlab.nn.heads import FromHeads, ToHeads, WithinHeads
from attnlab.nn.mlp import LayerScale
from attnlab.nn.norms import GroupNorm, LayerNorm, RMSNorm
from attnlab.nn.upsampling import ConvTranspose

Transform = Callable[[jax.Array], jax.Array]


class Leaf(NamedTuple):
    """One array of a layer: where it stands in the layer, and its layout there and here."""

    path: str
    variable: nnx.Variable
    here: Transform
    there: Transform


def _same(array: jax.Array) -> jax.Array:
    return array


def _leaves(layer: Any, **names: tuple[str, Transform, Transform] | str) -> dict[str, Leaf]:
    """Leaves by official name, of what the layer has: `weight=("kernel", here, there)`, `bias="bias"`."""
    found = {}
    for name, place in names.items():
        path, here, there = (place, _same, _same) if isinstance(place, str) else place
        variable = getattr(layer, path, None)
        if isinstance(variable, nnx.Variable):
            found[name] = Leaf(path, variable, here, there)
    return found


@functools.singledispatch
def leaves(part: Any) -> dict[str, Leaf] | None:
    """The arrays of a layer by their usual official names, "" for a bare parameter; None for what is no layer.

    Another kind of layer is made known by `@leaves.register(ItsClass)`.
    """
    return None


@leaves.register
def _(part: nnx.Variable) -> dict[str, Leaf]:
    return {"": Leaf("", part, _same, _same)}


@leaves.register(nnx.Linear)
def _(layer: Any) -> dict[str, Leaf]:
    return _leaves(layer, weight=("kernel", jnp.transpose, jnp.transpose), bias="bias")


@leaves.register(nnx.Conv)
def _(layer: Any) -> dict[str, Leaf]:
    def here(weight: jax.Array) -> jax.Array:
        return jnp.moveaxis(weight, (0, 1), (-1, -2))

    def there(kernel: jax.Array) -> jax.Array:
        return jnp.moveaxis(kernel, (-1, -2), (0, 1))

    return _leaves(layer, weight=("kernel", here, there), bias="bias")


@leaves.register(ConvTranspose)
def _(layer: ConvTranspose) -> dict[str, Leaf]:
    def here(weight: jax.Array) -> jax.Array:
        return jnp.moveaxis(weight, (0, 1), (-2, -1))

    def there(kernel: jax.Array) -> jax.Array:
        return jnp.moveaxis(kernel, (-2, -1), (0, 1))

    return _leaves(layer, weight=("kernel", here, there), bias="bias")


@leaves.register(ToHeads)
def _(layer: ToHeads) -> dict[str, Leaf]:
    channels, heads, size = layer.kernel.shape
    return _leaves(
        layer,
        weight=(
            "kernel",
            lambda weight: weight.T.reshape(channels, heads, size),
            lambda kernel: kernel.reshape(channels, heads * size).T,
        ),
        bias=("bias", lambda bias: bias.reshape(heads, size), jnp.ravel),
    )


@leaves.register(FromHeads)
def _(layer: FromHeads) -> dict[str, Leaf]:
    heads, size, channels = layer.kernel.shape
    return _leaves(
        layer,
        weight=(
            "kernel",
            lambda weight: weight.T.reshape(heads, size, channels),
            lambda kernel: kernel.reshape(heads * size, channels).T,
        ),
        bias="bias",
    )


@leaves.register(WithinHeads)
def _(layer: WithinHeads) -> dict[str, Leaf]:
    heads, size, out = layer.kernel.shape
    return _leaves(
        layer,
        weight=(
            "kernel",
            lambda weight: weight.reshape(heads, out, size).swapaxes(1, 2),
            lambda kernel: kernel.swapaxes(1, 2).reshape(heads * out, size, 1),
        ),
        bias=("bias", lambda bias: bias.reshape(heads, out), jnp.ravel),
    )


@leaves.register(CausalConv)
@leaves.register(DepthwiseConv)
def _(layer: CausalConv | DepthwiseConv) -> dict[str, Leaf]:
    size, channels = layer.kernel_size, layer.channels
    form = layer.form if isinstance(layer, CausalConv) else "depthwise"
    if form == "dense":
        heads, within = channels
        return _leaves(
            layer,
            weight=(
                "kernel",
                lambda weight: weight.reshape(heads, within, within, *size).transpose(3, 0, 2, 1),
                lambda kernel: kernel.transpose(1, 3, 2, 0).reshape(heads * within, within, *size),
            ),
            bias=("bias", lambda bias: bias.reshape(channels), jnp.ravel),
        )
    channels = channels[-1:] if form == "shared" else channels
    return _leaves(
        layer,
        weight=(
            "kernel",
            lambda weight: jnp.moveaxis(weight, (0, 1), (-1, -2)).reshape(*size, *channels),
            lambda kernel: jnp.moveaxis(kernel.reshape(*size, 1, -1), (-1, -2), (0, 1)),
        ),
        bias=("bias", lambda bias: bias.reshape(channels), jnp.ravel),
    )


@leaves.register(LayerNorm)
@leaves.register(RMSNorm)
def _(layer: LayerNorm | RMSNorm) -> dict[str, Leaf]:
    # A norm over all heads together has an axis for them here.
    return _leaves(
        layer,
        weight=("scale", lambda weight: weight.reshape(layer.scale.shape), jnp.ravel),
        bias=("bias", lambda bias: bias.reshape(layer.bias.shape), jnp.ravel),
    )


@leaves.register(nnx.LayerNorm)
@leaves.register(nnx.RMSNorm)
@leaves.register(nnx.GroupNorm)
@leaves.register(GroupNorm)
def _(layer: Any) -> dict[str, Leaf]:
    return _leaves(layer, weight="scale", bias="bias")


@leaves.register(nnx.BatchNorm)
def _(layer: Any) -> dict[str, Leaf]:
    return _leaves(layer, weight="scale", bias="bias", running_mean="mean", running_var="var")


@leaves.register(nnx.Embed)
def _(layer: Any) -> dict[str, Leaf]:
    return _leaves(layer, weight="embedding")


@leaves.register(LayerScale)
def _(layer: LayerScale) -> dict[str, Leaf]:
    # With a bias it is a depthwise convolution of one tap there.
    if layer.bias is None:
        return {"": Leaf("scale", layer.scale, _same, _same)}
    return _leaves(layer, weight=("scale", jnp.ravel, lambda scale: scale.reshape(-1, 1, 1, 1)), bias="bias")
