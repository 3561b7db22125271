"""The layer of every model: a token mixer and a feed-forward with their norms; and the choice of a mixer per layer.

x = x + mixer(norm(x));   x = x + mlp(norm(x))
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, ClassVar, Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from attnlab import registry
from attnlab.contract import (
    Layout,
    Site,
    SiteModule,
    TokenMixer,
    UnsupportedArgument,
    View,
    constructor_parameters,
)
from attnlab.nn.activations import gelu, gelu_tanh, relu
from attnlab.nn.chain import call
from attnlab.nn.cut import cut_cotangent
from attnlab.nn.mlp import MLP, DropPath, GatedMLP
from attnlab.nn.norms import LayerNorm, RMSNorm
from attnlab.nn.union_of_experts import UnionOfExpertsMLP
from attnlab.points import Edits, Layer, visit


def _identity(x: jax.Array) -> jax.Array:
    return x


MixerNames = str | Sequence[str]
MixerOptions = Mapping[str, Mapping[str, Any]]

NORMS = {"layer": LayerNorm, "rms": RMSNorm, "srms": functools.partial(RMSNorm, use_scale=False)}
MLPS = {
    "gelu": MLP,
    "gelu_tanh": functools.partial(MLP, activation=gelu_tanh),
    "relu": functools.partial(MLP, activation=relu),
    "linear": functools.partial(MLP, activation=_identity),
    "swiglu": GatedMLP,
    "geglu": functools.partial(GatedMLP, activation=gelu),
    "sglu": functools.partial(GatedMLP, activation=_identity),
    "uome": UnionOfExpertsMLP,
}
MLPName = Literal["gelu", "gelu_tanh", "relu", "linear", "swiglu", "geglu", "sglu", "uome"]
PIECES = ("mixer", "mlp", "norm1", "norm2")
"""What may be left out of a block; without a branch its norm is left out too."""


class Count(NamedTuple):
    """Decode state of a block without a mixer: `length` `(B,)`, how many tokens it has seen."""

    length: jax.Array


def mixers_per_layer(mixer: MixerNames, depth: int, options: MixerOptions | None = None) -> tuple[str, ...]:
    """One mixer name for each of `depth` layers; a shorter pattern is repeated, one of `depth` names is any plan.

    `("lightning_attention_2",) * 3 + ("softmax_attention",)` gives three linear layers to one of softmax.

    Raises:
      ValueError: if the pattern is empty or does not divide the depth, or options are given for a mixer not in it.
    """
    names = per_layer("mixer", mixer, depth)
    if unused := set(options or ()) - set(names):
        known = ", ".join(dict.fromkeys(names))
        raise ValueError(f"mixer_options: {', '.join(sorted(unused))} is not among the mixers {known}")
    return names


def per_layer(argument: str, names: str | Sequence[str], depth: int) -> tuple[str, ...]:
    """One name for each of `depth` layers; a shorter pattern is repeated.

    Raises:
      ValueError: if the pattern is empty or does not divide the depth.
    """
    pattern = (names,) if isinstance(names, str) else tuple(names)
    if not pattern or depth % len(pattern):
        raise ValueError(f"{argument}: a pattern of {len(pattern)} {argument}s does not divide a depth of {depth}")
    return pattern * (depth // len(pattern))


def site_seen_by(mixer: type[SiteModule], site: Site) -> Site:
    """The place of a mixer in a model, in a layout that the mixer takes.

    Tokens of an image are a sequence, row by row, to a mixer that takes no images, and behind a prefix to one that has
    no option for it; their grid is then the number of all tokens.

    Raises:
      UnsupportedArgument: if it takes tokens in neither layout.
    """
    layouts = getattr(mixer, "layouts", frozenset())
    if site.layout in layouts and (not site.prefix or "prefix" in constructor_parameters(mixer)):
        return site
    if Layout.SEQUENCE not in layouts:
        takes = ", ".join(sorted(layouts)) or "no tokens at all"
        ours = {Layout.SEQUENCE: None, site.layout: None}
        behind = f" behind a prefix of {site.prefix}" if site.prefix else ""
        raise UnsupportedArgument(
            f"{mixer.__name__} takes {takes}; this model has tokens laid out as {' or '.join(ours)}{behind}"
        )
    grid = None if site.grid is None else (site.prefix + math.prod(site.grid),)
    return dataclasses.replace(site, layout=Layout.SEQUENCE, grid=grid)


Order = Literal["pre", "post"]


class Block(Layer):
    """One layer, of given parts; a part that is None is left out.

        x = x + before(x)
        x = x + scale1(mixer(norm1(x)));  x = x + scale2(mlp(norm2(x)))          order "pre"
        x = norm1(x + scale1(mixer(x)));  x = norm2(x + scale2(mlp(x)))          order "post"
        x = after(x)

    With `scaled="skip"` the scales stand before the sum's other term: `x = scale1(x) + mixer(norm1(x))`.
    Each branch is under stochastic depth. `before` may also stand in front of the second branch (`before2`). Parts
    whose call takes `deterministic` are told. A mixer of sequences is handed the tokens of an image as a sequence.

    Args:
      mixer: maps tokens to tokens: a `TokenMixer`, or any module that takes them in the layout of the model; None for a
        layer without.
      mlp: feed-forward, or None for a layer without.
      norm1: of the mixer's branch; None for none.
      norm2: of the feed-forward's branch; None for none.
      scale1: factor of the mixer's branch, such as `LayerScale`.
      scale2: factor of the feed-forward's branch.
      before: module whose result is added first, such as a depthwise convolution (conditional positions).
      before2: the same in front of the feed-forward's branch.
      after: module whose result takes the place of what the block leaves.
      order: norms before the branches, or after the sums.
      scaled: whether the scales are factors of the "branch", or of the "skip" connection beside it.
      drop_path: probability that a branch is dropped for an example in training.
      rngs: stream `dropout` if `drop_path` is positive.

    Raises:
      ValueError: for an unknown order, or a scale of anything else.
    """

    sums_branches: ClassVar[bool] = True

    def __init__(
        self,
        mixer: nnx.Module | None,
        mlp: nnx.Module | None,
        norm1: nnx.Module | None,
        norm2: nnx.Module | None,
        *,
        scale1: nnx.Module | None = None,
        scale2: nnx.Module | None = None,
        before: nnx.Module | None = None,
        before2: nnx.Module | None = None,
        after: nnx.Module | None = None,
        order: Order = "pre",
        scaled: Literal["branch", "skip"] = "branch",
        drop_path: float = 0.0,
        rngs: nnx.Rngs | None = None,
    ):
        if order not in ("pre", "post"):
            raise ValueError(f"order must be 'pre' or 'post', got {order!r}")
        if scaled not in ("branch", "skip"):
            raise ValueError(f"scaled must be 'branch' or 'skip', got {scaled!r}")
        self.order, self.scaled = order, scaled
        parts = {"mixer": mixer, "mlp": mlp, "norm1": norm1, "norm2": norm2, "scale1": scale1, "scale2": scale2}
        for name, part in (parts | {"before": before, "before2": before2, "after": after}).items():
            setattr(self, name, nnx.data(None) if part is None else part)
        self.drop_path = DropPath(drop_path, rngs=rngs) if drop_path > 0 else nnx.data(None)

    @property
    def points(self) -> frozenset[str]:
        own = {"stream", "middle"} | (set() if self.mlp is None else {"mlp"})
        own |= set() if self.mixer is None else {"normed", "mixed"}
        # What needs the grid of its tokens can hand over no fewer.
        of_sequences = getattr(self.mixer, "layout", None) is Layout.SEQUENCE and getattr(self.mixer, "prefix", 0) == 0
        if of_sequences and self.before is None and self.before2 is None and self.after is None:
            own.add("tokens")
        return getattr(self.mixer, "points", frozenset()) | own

    def __call__(
        self,
        x: jax.Array,
        *,
        edits: Edits | None = None,
        paths: list[jax.Array] | None = None,
        deterministic: bool = True,
        **arguments: Any,
    ) -> jax.Array:
        """Tokens `(B, *S, C)` to the same shape; `arguments` go to the mixer.

        `positions` is passed on only to a mixer whose result depends on them. What each branch adds to the stream is
        appended to `paths`.

        Raises:
          ValueError: for `paths` of a block that is no sum of its branches.
        """
        if "positions" in arguments and not self.looks_at_positions:
            del arguments["positions"]
        if edits is not None and isinstance(self.mixer, TokenMixer):
            arguments["edits"] = edits

        def mix(tokens: jax.Array) -> tuple[jax.Array, None]:
            if getattr(self.mixer, "layout", None) is Layout.SEQUENCE:
                tokens = tokens.reshape(tokens.shape[0], -1, tokens.shape[-1])
            return call(self.mixer, tokens, deterministic, **arguments).reshape(x.shape), None

        told = () if paths is None else (self._added_up(paths),)
        return self._through(x, None if self.mixer is None else mix, edits, deterministic, *told)[0]

    def _added_up(self, paths: list[jax.Array]) -> list[jax.Array]:
        """The list that branches append to; raises `ValueError` where the stream is no sum of what it was and them."""
        if not self.sums_branches or self.after is not None or self.order != "pre" or self.scaled != "branch":
            raise ValueError(f"paths: what this {type(self).__name__} returns is no sum of its branches and its tokens")
        return paths

    def prefill(
        self,
        x: jax.Array,
        state: Any,
        *,
        mask: jax.Array | View | None = None,
        positions: jax.Array | None = None,
        edits: Edits | None = None,
    ) -> tuple[jax.Array, Any]:
        """Decodes a run of tokens `(B, N, C)`."""
        if self.mixer is None:
            real = jnp.ones(x.shape[:2], bool) if mask is None else mask.mask if isinstance(mask, View) else mask
            new = Count(state.length + jnp.sum(jnp.asarray(real), axis=1, dtype=jnp.int32))
            return self._through(x, None, edits, True)[0], new
        given = {"positions": self._positions(positions), "edits": edits}
        return self._through(x, lambda tokens: self.mixer.prefill(tokens, state, mask=mask, **given), edits, True)

    def step(
        self, x_t: jax.Array, state: Any, *, positions: jax.Array | None = None, edits: Edits | None = None
    ) -> tuple[jax.Array, Any]:
        """Decodes one token `(B, C)`, at `positions` `(B,)`."""
        if self.mixer is None:
            return self._through(x_t[:, None], None, edits, True)[0][:, 0], Count(state.length + 1)
        given = {"positions": self._positions(positions), "edits": edits}

        def mix(tokens: jax.Array) -> tuple[jax.Array, Any]:
            y, new = self.mixer.step(tokens[:, 0], state, **given)
            return y[:, None], new

        # Interventions see tokens (B, 1, C).
        y, state = self._through(x_t[:, None], mix, edits, True)
        return y[:, 0], state

    def attend(
        self, x: jax.Array, memory: jax.Array, *, edits: Edits | None = None, deterministic: bool = True
    ) -> jax.Array:
        """Tokens `(B, N, C)` under a mixer that also attends to a memory `(B, M, C)` of this block's inputs before."""
        normed = memory if self.norm1 is None or self.order == "post" else call(self.norm1, memory, deterministic)

        def mix(tokens: jax.Array) -> tuple[jax.Array, Any]:
            return self.mixer.attend(tokens, normed, deterministic=deterministic, edits=edits), None

        return self._through(x, mix, edits, deterministic)[0]

    def _through(
        self,
        x: jax.Array,
        mix: Callable[[jax.Array], tuple[jax.Array, Any]] | None,
        edits: Edits | None,
        deterministic: bool,
        paths: list[jax.Array] | None = None,
    ) -> tuple[jax.Array, Any]:
        x = visit(self, edits, "stream", x)
        if self.before is not None:
            x = _added(x, call(self.before, x, deterministic), paths)
        pre, new = self.order == "pre", None

        def mixed(tokens: jax.Array) -> jax.Array:
            nonlocal new
            y, new = mix(visit(self, edits, "normed", tokens))
            return visit(self, edits, "mixed", y)

        def fed(tokens: jax.Array) -> jax.Array:
            return visit(self, edits, "mlp", call(self.mlp, tokens, deterministic))

        if mix is not None:
            x = self._branch(x, mixed, self.norm1, self.scale1, pre, deterministic, paths)
        x = visit(self, edits, "middle", x)
        if self.before2 is not None:
            x = _added(x, call(self.before2, x, deterministic), paths)
        if self.mlp is not None:
            x = self._branch(x, fed, self.norm2, self.scale2, pre, deterministic, paths)
        return (x if self.after is None else call(self.after, x, deterministic)), new

    def _branch(
        self,
        x: jax.Array,
        branch: Callable[[jax.Array], jax.Array],
        norm: nnx.Module | None,
        scale: nnx.Module | None,
        pre: bool,
        deterministic: bool,
        paths: list[jax.Array] | None = None,
    ) -> jax.Array:
        def normed(tokens: jax.Array) -> jax.Array:
            return tokens if norm is None else call(norm, tokens, deterministic)

        x = cut_cotangent(x)
        y = branch(normed(x) if pre else x)
        if scale is not None:
            x, y = (x, scale(y)) if self.scaled == "branch" else (scale(x), y)
        y = y if self.drop_path is None else self.drop_path(y, deterministic=deterministic)
        return _added(x, y, paths) if pre else normed(_added(x, y, paths))

    def init_state(self, batch_size: int, max_length: int | None = None, *, dtype: Any = None) -> Any:
        """Decode state of the mixer, or a `Count` without one."""
        if self.mixer is None:
            return Count(jnp.zeros((batch_size,), jnp.int32))
        return self.mixer.init_state(batch_size, max_length, dtype=dtype)

    @property
    def looks_at_positions(self) -> bool:
        """Whether the mixer takes positions."""
        return self.mixer is not None and "positions" in self.mixer.accepts

    def _positions(self, positions: jax.Array | None) -> jax.Array | None:
        return positions if self.looks_at_positions else None


def _added(x: jax.Array, y: jax.Array, paths: list[jax.Array] | None) -> jax.Array:
    if paths is not None:
        paths.append(y)
    return x + y


def block_for(
    site: Site,
    *,
    mixer: str,
    mixer_options: Mapping[str, Any] | None = None,
    mlp: str = "gelu",
    mlp_ratio: float = 4.0,
    mlp_features: int | None = None,
    mlp_bias: bool | None = None,
    norm: str = "layer",
    norm_eps: float = 1e-6,
    norm_bias: bool | None = None,
    order: Order = "pre",
    without: Collection[str] = (),
    dropout: float = 0.0,
    drop_path: float = 0.0,
    dtype: Any = None,
    param_dtype: Any = jnp.float32,
    rngs: nnx.Rngs,
) -> Block:
    """A block of parts by name.

    Args:
      site: where the mixer stands.
      mixer: name of a registered token mixer.
      mixer_options: constructor options for the mixer.
      mlp: `"gelu"` (exact), `"gelu_tanh"` (as GPT-2 computes it), `"relu"`, `"linear"` (no activation), or gated:
        `"swiglu"`, `"geglu"`, `"sglu"` (without activation, as TransNormerLLM has it); or `"uome"`, a union of experts.
      mlp_ratio: hidden channels over channels, rounded down.
      mlp_features: hidden channels, in place of the ratio.
      mlp_bias: whether the feed-forward has biases; its usual choice when None (yes for GELU, no for the gated ones).
      norm: `"layer"`, `"rms"`, or `"srms"` (RMSNorm without weights).
      norm_eps: of both norms.
      norm_bias: whether a LayerNorm has a bias, as it does when None; the others have none.
      order: norms before the branches, or after the sums.
      without: which of `PIECES` are left out.
      dropout: rate inside the feed-forward.
      drop_path: probability that a branch is dropped for an example in training.
      dtype: of the computation; that of the input when None.
      param_dtype: of the parameters.
      rngs: streams `params` and, in training, `dropout`.

    Raises:
      ValueError: for a norm, a feed-forward or a piece that is not known, or a bias that the norm does not have.
    """
    for argument, values, table in (("mlp", [mlp], MLPS), ("without", without, PIECES)):
        if unknown := [value for value in values if value not in table]:
            raise ValueError(f"{argument} must be one of {', '.join(table)}, got {unknown[0]!r}")
    common = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
    bias = {} if mlp_bias is None else {"use_bias": mlp_bias}
    hidden = int(site.features * mlp_ratio) if mlp_features is None else mlp_features

    def make_norm(piece: str, branch: str) -> nnx.Module | None:
        if piece in without or branch in without:
            return None
        return norm_for(site.features, norm, eps=norm_eps, bias=norm_bias, param_dtype=param_dtype, rngs=rngs)

    def make_mixer() -> nnx.Module | None:
        if "mixer" in without:
            return None
        return registry.create(mixer, site, **(common | dict(mixer_options or {})))

    def make_mlp() -> nnx.Module | None:
        return None if "mlp" in without else MLPS[mlp](site.features, hidden, dropout=dropout, **bias, **common)

    return Block(
        norm1=make_norm("norm1", "mixer"),
        mixer=make_mixer(),
        norm2=make_norm("norm2", "mlp"),
        mlp=make_mlp(),
        order=order,
        drop_path=drop_path,
        rngs=rngs,
    )


def norm_for(
    features: int,
    norm: str,
    *,
    eps: float = 1e-6,
    bias: bool | None = None,
    param_dtype: Any = jnp.float32,
    rngs: nnx.Rngs,
) -> nnx.Module:
    """A norm by name; arguments as those of `block_for`.

    Raises:
      ValueError: for an unknown name, or a bias that the norm does not have.
    """
    if norm not in NORMS:
        raise ValueError(f"norm must be one of {', '.join(NORMS)}, got {norm!r}")
    if bias is not None and norm != "layer":
        raise ValueError(f"norm_bias is for norm='layer', got {bias} with {norm!r}")
    options = {} if bias is None else {"use_bias": bias}
    return NORMS[norm](features, eps=eps, **options, param_dtype=param_dtype, rngs=rngs)


def blocks_for(
    site: Site,
    depth: int,
    *,
    mixer: MixerNames,
    mixer_options: MixerOptions | None = None,
    mlp: str | Sequence[str] = "gelu",
    without: Mapping[str, Sequence[int]] | None = None,
    drop_path: float = 0.0,
    rngs: nnx.Rngs,
    **block: Any,
) -> list[Block]:
    """A run of blocks, each with the mixer of its layer.

    Args:
      site: of the first layer, in the model's own layout; `layer` counts on from `site.layer`.
      depth: number of blocks.
      mixer: a name, or a pattern of names that is repeated over the depth.
      mixer_options: constructor options by mixer name.
      mlp: a name, or a pattern of names.
      without: for each of `PIECES` the layers that lack it, counted from the first of the run: `{"mlp": [0, 3]}`.
      drop_path: the last block's rate, to which it rises linearly over `site.num_layers`.
      rngs: streams `params` and, in training, `dropout`.
      **block: further arguments of `block_for`.

    Raises:
      ValueError: for layers that do not exist, or names that are not known.
      UnsupportedArgument: for a mixer that takes no such tokens.
    """
    options, lacking, blocks = mixer_options or {}, dict(without or {}), []
    for piece, layers in lacking.items():
        if piece not in PIECES or not all(0 <= layer < depth for layer in layers):
            raise ValueError(f"without must give layers below {depth} for {', '.join(PIECES)}, got {piece}: {layers}")
    mixers, mlps = mixers_per_layer(mixer, depth, options), per_layer("mlp", mlp, depth)
    for index, name in enumerate(mixers):
        layer = site.layer + index
        blocks.append(
            block_for(
                site_seen_by(registry.get(name).target, dataclasses.replace(site, layer=layer)),
                mixer=name,
                mixer_options=options.get(name),
                mlp=mlps[index],
                without=[piece for piece, layers in lacking.items() if index in layers],
                drop_path=drop_path * layer / max(site.num_layers - 1, 1),
                rngs=rngs,
                **block,
            )
        )
    return blocks
