"""The pre-norm block around any registered mixer, and the choice of a mixer for each layer.

x = x + mixer(norm(x));   x = x + mlp(norm(x))
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from attnlab import registry
from attnlab.contract import Layout, Site, UnsupportedArgument
from attnlab.nn.mlp import MLP, DropPath, GatedMLP
from attnlab.nn.norms import LayerNorm, RMSNorm


def _identity(x: jax.Array) -> jax.Array:
    return x


MixerNames = str | Sequence[str]
MixerOptions = Mapping[str, Mapping[str, Any]]

NORMS = {"layer": LayerNorm, "rms": RMSNorm, "srms": functools.partial(RMSNorm, use_scale=False)}
MLPS = {"gelu": MLP, "swiglu": GatedMLP, "sglu": functools.partial(GatedMLP, activation=_identity)}


def mixers_per_layer(mixer: MixerNames, depth: int, options: MixerOptions | None = None) -> tuple[str, ...]:
    """One mixer name for each of `depth` layers; a shorter pattern is repeated.

    `("lightning_attention_2",) * 3 + ("softmax_attention",)` gives three linear layers to one of softmax.

    Raises:
      ValueError: if the pattern is empty or does not divide the depth, or options are given for a mixer not in it.
    """
    pattern = (mixer,) if isinstance(mixer, str) else tuple(mixer)
    if not pattern or depth % len(pattern):
        raise ValueError(f"mixer: a pattern of {len(pattern)} mixers does not divide a depth of {depth}")
    if unused := set(options or ()) - set(pattern):
        raise ValueError(f"mixer_options: {', '.join(sorted(unused))} is not among the mixers {', '.join(pattern)}")
    return pattern * (depth // len(pattern))


def layout_for(name: str, allowed: Sequence[Layout]) -> Layout:
    """The first of the `allowed` layouts that the variant takes.

    Raises:
      UnsupportedArgument: if it takes none of them.
    """
    variant = registry.get(name)
    for layout in allowed:
        if layout in variant.layouts:
            return layout
    takes = ", ".join(sorted(variant.layouts)) or "no tokens at all"
    raise UnsupportedArgument(f"{name} takes {takes}; this model has tokens laid out as {' or '.join(allowed)}")


class Block(nnx.Module):
    """One layer: a token mixer and a feed-forward, each behind a norm and added to its input.

    Args:
      site: where the mixer stands; its layout is that of the mixer, and tokens are reshaped to it.
      mixer: name of a registered token mixer.
      mixer_options: constructor options for the mixer.
      mlp: `"gelu"`, `"swiglu"`, or `"sglu"` (gated, without activation, as TransNormerLLM has it).
      mlp_ratio: hidden channels over channels, rounded down.
      mlp_bias: whether the feed-forward has biases; its usual choice when None (yes for GELU, no for the gated ones).
      norm: `"layer"`, `"rms"`, or `"srms"` (RMSNorm without weights).
      dropout: rate inside the feed-forward.
      drop_path: probability that a branch is dropped for an example in training.
      dtype: of the computation; that of the input when None.
      param_dtype: of the parameters.
      rngs: streams `params` and, in training, `dropout`.
    """

    def __init__(
        self,
        site: Site,
        *,
        mixer: str,
        mixer_options: Mapping[str, Any] | None = None,
        mlp: str = "gelu",
        mlp_ratio: float = 4.0,
        mlp_bias: bool | None = None,
        norm: str = "layer",
        dropout: float = 0.0,
        drop_path: float = 0.0,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        for argument, value, table in (("norm", norm, NORMS), ("mlp", mlp, MLPS)):
            if value not in table:
                raise ValueError(f"{argument} must be one of {', '.join(table)}, got {value!r}")
        common = {"dtype": dtype, "param_dtype": param_dtype}
        self.layout = site.layout
        self.norm1 = NORMS[norm](site.features, param_dtype=param_dtype, rngs=rngs)
        self.mixer = registry.create(mixer, site, rngs=rngs, **(common | dict(mixer_options or {})))
        self.norm2 = NORMS[norm](site.features, param_dtype=param_dtype, rngs=rngs)
        hidden = int(site.features * mlp_ratio)
        bias = {} if mlp_bias is None else {"use_bias": mlp_bias}
        self.mlp = MLPS[mlp](site.features, hidden, dropout=dropout, **bias, **common, rngs=rngs)
        self.drop_path = DropPath(drop_path, rngs=rngs)

    def __call__(self, x: jax.Array, *, deterministic: bool = True, **arguments: Any) -> jax.Array:
        """Tokens of any layout that holds as many as the mixer's; `arguments` go to the mixer.

        `positions` is passed on only to a mixer whose result depends on them.
        """
        if "positions" in arguments and "positions" not in self.mixer.accepts:
            del arguments["positions"]
        tokens = self.norm1(x)
        if self.layout is Layout.SEQUENCE:
            tokens = tokens.reshape(x.shape[0], -1, x.shape[-1])
        y = self.mixer(tokens, deterministic=deterministic, **arguments).reshape(x.shape)
        return self._rest(x, y, deterministic=deterministic)

    def prefill(self, x: jax.Array, state: Any, *, mask: jax.Array | None = None) -> tuple[jax.Array, Any]:
        """Decodes a run of tokens `(B, N, C)`."""
        y, state = self.mixer.prefill(self.norm1(x), state, mask=mask)
        return self._rest(x, y, deterministic=True), state

    def step(self, x_t: jax.Array, state: Any) -> tuple[jax.Array, Any]:
        """Decodes one token `(B, C)`."""
        y, state = self.mixer.step(self.norm1(x_t), state)
        return self._rest(x_t, y, deterministic=True), state

    def _rest(self, x: jax.Array, y: jax.Array, *, deterministic: bool) -> jax.Array:
        x = x + self.drop_path(y, deterministic=deterministic)
        y = self.mlp(self.norm2(x), deterministic=deterministic)
        return x + self.drop_path(y, deterministic=deterministic)


class Blocks(nnx.Module):
    """A run of blocks, each with the mixer of its layer; arguments as `Block`.

    Args:
      site: of the first layer; `layer` counts on from `site.layer`.
      depth: number of blocks.
      mixer: a name, or a pattern of names that is repeated over the depth.
      mixer_options: constructor options by mixer name.
      layouts: layouts in which the model can hand over its tokens, the preferred first.
      drop_path: one rate per block, or the last block's rate, to which it rises linearly over `site.num_layers`.
      remat: recompute each block in the backward pass instead of keeping what is inside.
      **block: further arguments of `Block`.
    """

    def __init__(
        self,
        site: Site,
        depth: int,
        *,
        mixer: MixerNames,
        mixer_options: MixerOptions | None = None,
        layouts: Sequence[Layout] = (Layout.SEQUENCE,),
        drop_path: float = 0.0,
        remat: bool = False,
        rngs: nnx.Rngs,
        **block: Any,
    ):
        options = mixer_options or {}
        self.remat = remat
        self.blocks = nnx.List()
        for index, name in enumerate(mixers_per_layer(mixer, depth, options)):
            layer = site.layer + index
            layout = layout_for(name, layouts)
            place = dataclasses.replace(site, layer=layer, layout=layout, grid=_grid_as(layout, site.grid))
            self.blocks.append(
                Block(
                    place,
                    mixer=name,
                    mixer_options=options.get(name),
                    drop_path=drop_path * layer / max(site.num_layers - 1, 1),
                    rngs=rngs,
                    **block,
                )
            )

    def __call__(self, x: jax.Array, **arguments: Any) -> jax.Array:
        for block in self.blocks:
            # What is recorded inside a rematerialised block cannot leave it.
            if self.remat and not hasattr(self, "__captures__"):
                x = nnx.remat(lambda block, x: block(x, **arguments))(block, x)
            else:
                x = block(x, **arguments)
        return x

    def init_state(self, batch_size: int, max_length: int | None = None, *, dtype: Any = None) -> tuple[Any, ...]:
        """Decode states of all blocks."""
        return tuple(block.mixer.init_state(batch_size, max_length, dtype=dtype) for block in self.blocks)

    def prefill(
        self, x: jax.Array, state: tuple[Any, ...], *, mask: jax.Array | None = None
    ) -> tuple[jax.Array, tuple[Any, ...]]:
        """Decodes a run of tokens `(B, N, C)`."""
        new = []
        for block, old in zip(self.blocks, state, strict=True):
            x, after = block.prefill(x, old, mask=mask)
            new.append(after)
        return x, tuple(new)

    def step(self, x_t: jax.Array, state: tuple[Any, ...]) -> tuple[jax.Array, tuple[Any, ...]]:
        """Decodes one token `(B, C)`."""
        new = []
        for block, old in zip(self.blocks, state, strict=True):
            x_t, after = block.step(x_t, old)
            new.append(after)
        return x_t, tuple(new)


def _grid_as(layout: Layout, grid: tuple[int, ...] | None) -> tuple[int, ...] | None:
    if grid is None or layout is not Layout.SEQUENCE:
        return grid
    tokens = 1
    for length in grid:
        tokens *= length
    return (tokens,)
