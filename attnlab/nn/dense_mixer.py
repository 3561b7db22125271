"""A token mixer with dense scores: projections around a core, which is replaceable.

Mechanisms of dense attention differ in how tokens become heads (`DenseMixer.project`, `merge`) or in what happens
between the projections (a `Core`: rotary positions, cache, scores, weights). The call, masks, packed segments, unlocked
spans, decoding, cross-attention to a context that is projected once, points and the recorded map are here, once.
"""

import dataclasses
import math
from collections.abc import Callable, Collection
from typing import Any, NamedTuple, Self, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import ArrayLike

from attnlab.contract import Given, Layout, Pattern, TokenMixer, UnsupportedArgument, View
from attnlab.nn.cache import ContextCache
from attnlab.nn.grids import to_tokens
from attnlab.nn.masking import segment_orders
from attnlab.nn.positions import grid_positions
from attnlab.points import Edits, visit
from pallas_kernels.integers import integers
from pallas_kernels.masks import Causal

ModuleT = TypeVar("ModuleT", bound=nnx.Module)


class Heads(NamedTuple):
    """What the projections make of tokens, before rotary positions.

    Attributes:
      q: queries `(B, N, H, D)`.
      k: keys `(B, M, G, D)`, H a multiple of G.
      v: values `(B, M, G, E)`.
      extra: further arrays that a mechanism's projection hands to its core.
    """

    q: jax.Array
    k: jax.Array
    v: jax.Array
    extra: tuple[Any, ...] = ()


class HeadSizes(NamedTuple):
    """Sizes of what is cached: key heads G, head sizes D of keys and E of values."""

    num_kv_heads: int
    key_size: int
    value_size: int

    @classmethod
    def of(
        cls,
        features: int,
        num_heads: int,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        value_dim: int | None = None,
    ) -> Self:
        """The sizes that a constructor's usual arguments mean: G = H, D = C / H and E = D where they are None.

        Raises:
          ValueError: if heads do not divide the channels, or key heads the heads.
        """
        groups = num_heads if num_kv_heads is None else num_kv_heads
        if num_heads < 1 or groups < 1 or num_heads % groups:
            raise ValueError(f"num_heads {num_heads} must be a multiple of num_kv_heads {groups}, both at least 1")
        if head_dim is None and features % num_heads:
            raise ValueError(f"features {features} is not a multiple of num_heads {num_heads}; give head_dim")
        head_dim = features // num_heads if head_dim is None else head_dim
        return cls(groups, head_dim, head_dim if value_dim is None else value_dim)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class CarriedState:
    """The decode state of a mixer whose projections look at the tokens before, such as convolutions.

    Attributes:
      cache: of the core.
      carry: what the projections remember.
    """

    cache: Any
    carry: Any

    @property
    def length(self) -> jax.Array:
        """`(B,)` int32, tokens stored."""
        return self.cache.length


class Core(nnx.Module):
    """Base of cores: everything between the projections of a `DenseMixer`.

    Attributes:
      points: what may be edited inside, see `attnlab.points`.
      looks_at_positions: whether the result depends on the positions of tokens.
      permutation_equivariant: whether the non-causal form takes tokens as a set.
    """

    points: frozenset[str] = frozenset()
    looks_at_positions: bool = False
    permutation_equivariant: bool = True

    def check(self, sizes: HeadSizes, layout: Layout) -> None:
        """Raises `ValueError` if the core does not fit heads of these sizes, or tokens laid out so."""

    def init_cache(
        self,
        sizes: HeadSizes,
        batch_size: int,
        max_length: int,
        dtype: Any,
        *,
        context: Heads | None = None,
        context_mask: ArrayLike | None = None,
    ) -> Any:
        """An empty cache, or with `context` one that holds the context's keys and values."""
        raise UnsupportedArgument(f"{type(self).__name__} does not decode")

    def __call__(
        self,
        heads: Heads,
        view: View,
        cache: Any = None,
        *,
        edits: Edits | None = None,
        deterministic: bool = True,
        owner: nnx.Module | None = None,
    ) -> tuple[jax.Array, Any]:
        """Attends.

        Args:
          heads: of all tokens, or with a cache of the new ones.
          view: who sees whom, complete. With a cache its mask `(B, N)` says which of the new tokens are real, and what
            the cache knows (order, and positions unless given) is None.
          cache: what `init_cache` or an earlier call returned.
          edits: interventions on this layer of this call.
          deterministic: False in training, for dropout.
          owner: module on which scores and weights are recorded; nowhere when None.

        Returns:
          `(B, N, H, E)` in the dtype of the values, and the new cache (None without one).
        """
        raise NotImplementedError

    def attention(self, heads: Heads, view: View) -> jax.Array:
        """The weights `(B, H, N, M)` in float32 by which a call without cache mixes values."""
        raise NotImplementedError

    def refuse_masks(self, view: View) -> None:
        """Raises `UnsupportedArgument` if the view hides anything: for cores in which all tokens see all."""
        for name in ("rule", "segment_ids", "mask"):
            if getattr(view, name) is not None:
                raise UnsupportedArgument(f"{type(self).__name__} does not take {name}: all its tokens see all")


class DenseMixer(TokenMixer):
    """Base of dense mixers.

    A subclass defines `project` and `merge`, and calls `set_core` at the end of its constructor, when `features`,
    `sizes` (of what is cached), `causal`, `layout`, `context_features` (channels of the context; None for
    self-attention) and `dtype` are set. Images and videos are attended as a sequence in row-major order: masks, rules
    and causality go by it. Causal cross-attention lets query i see the keys 0..i of the context, both counted from the
    start.
    """

    patterns = frozenset(Pattern)
    layouts = frozenset(Layout)
    core: Core
    sizes: HeadSizes
    features: int

    def project(self, x: jax.Array, source: jax.Array, given: Given) -> Heads:
        """Heads of the queries' tokens `(B, N, C)` and of the tokens `(B, M, C')` that keys and values are made of."""
        raise NotImplementedError

    def init_carry(self, batch_size: int) -> Any:
        """What `project_run` remembers before the first token; None for projections of each token alone."""
        return None

    def project_run(self, x: jax.Array, source: jax.Array, given: Given, carry: Any) -> tuple[Heads, Any]:
        """`project` for a mixer that carries something from run to run, and what it carries on.

        In a call `carry` is None; in `prefill` and `step` the mask of `given` says which tokens `(B, N)` are real.
        """
        return self.project(x, source, given), carry

    def merge(self, y: jax.Array, x: jax.Array, *, deterministic: bool = True) -> jax.Array:
        """From the core's `(B, N, H, E)` and the tokens `x` `(B, N, C)` to the mixer's `(B, N, C)`."""
        raise NotImplementedError

    def set_core(self, core: Core) -> None:
        """Puts a core between the projections, and takes on what it accepts and where it can be edited.

        Raises:
          ValueError: if the core does not fit the heads or the layout.
        """
        core.check(self.sizes, self.layout)
        self.core = core
        self.accepts = frozenset({"mask", "key_mask", "rule"})
        if self.layout is Layout.SEQUENCE:
            self.accepts |= {"segment_ids"}
        if core.looks_at_positions:
            self.accepts |= {"positions"}
        self.points = frozenset({"qkv", "heads"}) | core.points
        self.permutation_equivariant = core.permutation_equivariant

    def mix(self, x: jax.Array, given: Given) -> jax.Array:
        tokens = to_tokens(x)
        source = self._source(tokens, given.context)
        view = self._view(x.shape[1:-1], None if given.context is None else source.shape[1], given)
        return self._attend(tokens, source, view, None, given)[0].reshape(x.shape)

    def init_state(
        self,
        batch_size: int,
        max_length: int | None = None,
        *,
        context: ArrayLike | None = None,
        context_mask: ArrayLike | None = None,
        dtype: Any = None,
    ) -> Any:
        """An empty cache for `max_length` tokens; in cross-attention the context's keys and values.

        Raises:
          UnsupportedArgument: unless built for sequences, and for causal self-attention or for a context.
          ValueError: without `max_length`, or without the context.
        """
        self.check_decodes(context is not None)
        if context is None:
            if context_mask is not None:
                raise ValueError("context_mask is given without a context")
            if max_length is None:
                raise ValueError(f"{type(self).__name__} caches keys and values: init_state needs max_length")
            cache, carry = self.core.init_cache(self.sizes, batch_size, max_length, dtype), self.init_carry(batch_size)
            return cache if carry is None else CarriedState(cache, carry)
        x = self._no_tokens(batch_size, self.features, jnp.result_type(context))
        source = self._source(x, context)
        heads = self.project(x, source, Given(context=source))
        return self.core.init_cache(
            self.sizes, batch_size, source.shape[1], dtype, context=heads, context_mask=context_mask
        )

    def prefill(
        self,
        x: ArrayLike,
        state: Any,
        *,
        mask: ArrayLike | View | None = None,
        positions: ArrayLike | None = None,
        edits: Edits | None = None,
    ) -> tuple[jax.Array, Any]:
        """Appends a run of tokens `(B, N, C)`; see `KVCache.append` for what happens when the cache is full.

        Raises:
          UnsupportedArgument: unless built for what `init_state` names, or for positions that the core does not use.
          ValueError: for shapes that do not fit, or more tokens than the cache has room for.
        """
        cross = isinstance(state, ContextCache)
        self.check_decodes(cross)
        self.check_call(x, mask=mask, positions=positions, decoding=True)
        x = jnp.asarray(x, self.dtype)
        view = mask if isinstance(mask, View) else View(mask=None if mask is None else jnp.asarray(mask))
        if view.mask is not None and jnp.shape(view.mask) != x.shape[:2]:
            raise ValueError(f"mask must be (B, N) = {x.shape[:2]}, got {jnp.shape(view.mask)}")
        if positions is not None:
            view = dataclasses.replace(view, q_at=integers("positions", positions))
        if view.rule is None and self.causal:
            view = dataclasses.replace(view, rule=Causal())
        source = self._no_tokens(x.shape[0], self._source_features, x.dtype) if cross else x
        return self._attend(x, source, view, state, Given(mask=view.mask, edits=edits))

    def step(
        self, x_t: ArrayLike, state: Any, *, positions: ArrayLike | None = None, edits: Edits | None = None
    ) -> tuple[jax.Array, Any]:
        """Appends one token `(B, C)`."""
        positions = None if positions is None else integers("positions", positions)[:, None]
        y, state = self.prefill(jnp.asarray(x_t)[:, None], state, positions=positions, edits=edits)
        return y[:, 0], state

    def _attend(self, x: jax.Array, source: jax.Array, view: View, cache: Any, given: Given) -> tuple[jax.Array, Any]:
        edits, deterministic, carry = given.edits, given.deterministic, None
        if carried := isinstance(cache, CarriedState):
            cache, carry = cache.cache, cache.carry
        heads, carry = self.project_run(x, source, given, carry)
        heads = visit(self, edits, "qkv", heads)
        y, cache = self.core(heads, view, cache, edits=edits, deterministic=deterministic, owner=self)
        y = self.merge(visit(self, edits, "heads", y), x, deterministic=deterministic)
        return y, CarriedState(cache, carry) if carried else cache

    @property
    def _source_features(self) -> int:
        return self.features if self.context_features is None else self.context_features

    def _no_tokens(self, batch_size: int, channels: int, dtype: Any) -> jax.Array:
        """A token in place of those that are not there: what is projected from it is not used, and not computed."""
        return jnp.zeros((batch_size, 1, channels), dtype if self.dtype is None else self.dtype)

    def _source(self, x: jax.Array, context: ArrayLike | None) -> jax.Array:
        """Tokens `(B, M, C')` that keys and values are made of."""
        if context is None:
            return x
        shape, channels = jnp.shape(context), self._source_features
        if len(shape) != 3 or shape[0] != x.shape[0] or shape[-1] != channels:
            raise ValueError(f"context must be (B, M, {channels}) with B = {x.shape[0]}, got {shape}")
        return jnp.asarray(context, x.dtype)

    def _view(self, grid: tuple[int, ...], num_keys: int | None, given: Given) -> View:
        """The complete view of a call; `num_keys` is M of the context, None in self-attention."""
        own = View() if given.view is None else given.view
        if given.segment_ids is not None:
            q_order, k_order = segment_orders(given.segment_ids)
        else:
            # Of NumPy: what a rule says of them is known when tracing.
            q_order = np.arange(math.prod(grid), dtype=np.int32)[None]
            k_order = q_order if num_keys is None else np.arange(num_keys, dtype=np.int32)[None]
        q_at = jnp.asarray(q_order if len(grid) == 1 else grid_positions(grid))
        k_at = q_at if num_keys is None else jnp.asarray(k_order)
        if given.positions is not None:
            q_at, axes = given.positions, () if len(grid) == 1 else (len(grid),)
            if q_at.ndim < 2 or q_at.shape[1:] != (math.prod(grid), *axes):
                wanted = ", ".join(map(str, ("B", math.prod(grid), *axes)))
                raise ValueError(f"positions must be ({wanted}) for the layout {self.layout}, got {q_at.shape}")
            k_at = q_at if num_keys is None else k_at
        k_at = k_at if own.k_at is None else own.k_at
        if q_at.ndim != jnp.ndim(k_at) and self.core.looks_at_positions:
            raise UnsupportedArgument(
                f"positions in the layout {self.layout} do not reach a context, which is a sequence"
            )
        k_labels = own.q_labels if own.k_labels is None and num_keys is None else own.k_labels
        return View(
            rule=Causal() if own.rule is None and self.causal else own.rule,
            q_at=q_at,
            k_at=k_at,
            q_idx=q_order if own.q_idx is None else own.q_idx,
            k_idx=k_order if own.k_idx is None else own.k_idx,
            q_labels=own.q_labels,
            k_labels=k_labels,
            segment_ids=given.segment_ids,
            mask=given.mask,
        )


def with_core(model: ModuleT, core: Core | Callable[[Core], Core], *, layers: Collection[int] | None = None) -> ModuleT:
    """The same weights under another core.

    Args:
      model: a dense mixer, or a module with dense mixers inside.
      core: put between the projections of each dense mixer, a copy for each; or a function of the mixer's present core.
      layers: which of the model's dense mixers, counted from 0 in the order in which they stand; all when None.

    Returns:
      A new structure that holds the same arrays; `model` is unchanged.

    Raises:
      ValueError: if there is no dense mixer, or no such layer, or the core does not fit.
    """
    model = nnx.clone(model)
    mixers = [part for _, part in nnx.iter_modules(model) if isinstance(part, DenseMixer)]
    chosen = range(len(mixers)) if layers is None else layers
    if not mixers or any(not 0 <= layer < len(mixers) for layer in chosen):
        raise ValueError(f"layers must be among the {len(mixers)} dense mixers of the model, got {list(chosen)}")
    for layer in chosen:
        mixers[layer].set_core(nnx.clone(core) if isinstance(core, Core) else core(mixers[layer].core))
    return model
