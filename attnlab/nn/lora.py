"""Low-rank adaptation (LoRA; Hu et al., 2021, arXiv:2106.09685): trained changes of small rank beside linear maps.

    y = W x + Σ_a (α_a / r_a) B_a A_a x         A_a (r, C) drawn, B_a (C', r) zero: at the start nothing changes

Adapters have names. Several stand beside one map, each of a rank of its own, and those that are active are added:

    model = with_adapter(model, "style", rank=8, rngs=nnx.Rngs(0))              # beside query, key, value and out
    result = train(model, ..., trainable=adapter_parameters("style"))           # everything else stays as it is
    plain = use_adapters(result.model, ())                                      # the model as it was
    merged = merge_adapters(result.model)                                       # no adapters, W + (α / r) B A for W

Each of these makes a new structure; arrays that do not change are the same. Maps that can be adapted are `Linear`,
`ToHeads` and `FromHeads`. Where the kernel is cut over devices, so are the adapters: no more is exchanged than r
channels.
"""

from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import ArrayLike

from attnlab.nn.heads import FromHeads, ToHeads
from attnlab.nn.linear import Linear, compute_in_input_dtype, uniform_init
from attnlab.suggest import suggestion

PROJECTIONS = ("query", "key", "value", "out")
MAPS = (Linear, ToHeads, FromHeads)

Map = Linear | ToHeads | FromHeads
Path = tuple[Any, ...]
Where = Collection[str] | Callable[[Path], bool]
ModelT = TypeVar("ModelT", bound=nnx.Module)


class Adapter(nnx.Module):
    """One low-rank change: `(…, *ins)` to `(…, *outs)` through r channels; zero until it is trained.

    Args:
      base: the map beside which it stands, for sizes and logical axes.
      rank: r.
      alpha: α; the change is scaled by α / r.
      rngs: stream `params`.
    """

    def __init__(self, base: Map, rank: int, alpha: float, *, rngs: nnx.Rngs):
        kernel, inputs = base.kernel, _input_axes(base)
        ins, outs = kernel.shape[:inputs], kernel.shape[inputs:]
        axes = kernel.get_metadata().get("logical_axes", (None,) * len(kernel.shape))
        fan_in = 1
        for size in ins:
            fan_in *= size
        down = uniform_init(fan_in)(rngs.params(), (*ins, rank), kernel.dtype)
        self.down = nnx.Param(down, logical_axes=(*axes[:inputs], None))
        self.up = nnx.Param(jnp.zeros((rank, *outs), kernel.dtype), logical_axes=(None, *axes[inputs:]))
        self.inputs, self.scale, self.dtype = inputs, alpha / rank, base.dtype

    def __call__(self, x: ArrayLike) -> jax.Array:
        x, down, up = compute_in_input_dtype((x, self.down[...], self.up[...]), dtype=self.dtype)
        return jnp.tensordot(jnp.tensordot(x, down, self.inputs), up, 1) * jnp.asarray(self.scale, x.dtype)

    def change(self) -> jax.Array:
        """What it adds to the kernel, float32."""
        down, up = (param[...].astype(jnp.float32) for param in (self.down, self.up))
        return self.scale * jnp.tensordot(down, up, 1)


class Adapted(nnx.Module):
    """A linear map with adapters beside it; called as the map is.

    Args:
      base: the map.
    """

    def __init__(self, base: Map):
        self.base = base
        self.adapters: nnx.Dict[Adapter] = nnx.Dict({})
        self.active: tuple[str, ...] = ()

    def __call__(self, x: ArrayLike) -> jax.Array:
        x = jnp.asarray(x)
        y = self.base(x)
        for name in self.active:
            y = y + self.adapters[name](x)
        return y

    @property
    def kernel(self) -> jax.Array:
        """The kernel that acts, that of the map and the active changes: for mechanisms that read it."""
        return self.kernel_with(self.active)

    @property
    def bias(self) -> Any:
        """The map's own."""
        return self.base.bias

    def kernel_with(self, names: Sequence[str]) -> jax.Array:
        """The map's kernel and the changes of some adapters, in the dtype of the former."""
        kernel = self.base.kernel[...]
        total = kernel.astype(jnp.float32)
        for name in names:
            total = total + self.adapters[name].change()
        return total.astype(kernel.dtype)


def with_adapter(
    model: ModelT, name: str, *, rank: int, alpha: float | None = None, where: Where = PROJECTIONS, rngs: nnx.Rngs
) -> ModelT:
    """The model with one more adapter beside some of its linear maps, active behind those that are.

    Args:
      model: its maps may have adapters already.
      name: of the adapter, in all of these maps.
      rank: r.
      alpha: α; r when None, so that the factor is 1.
      where: names of the attributes that hold the maps; or a function of the path from the model to a map, such as
        `("blocks", "blocks", 0, "mixer", "query")`.
      rngs: stream `params`.

    Raises:
      ValueError: if there is no such map, a map has an adapter of that name, or the rank is less than 1.
    """
    if rank < 1:
        raise ValueError(f"rank must be at least 1, got {rank}")
    model = nnx.clone(model)
    wanted = where if callable(where) else lambda path: path[-1] in where
    chosen = [(path, part) for path, part in _maps(model) if wanted(path)]
    if not chosen:
        there = ", ".join(sorted({str(path[-1]) for path, _ in _maps(model)})) or "none"
        raise ValueError(f"where chooses none of the model's linear maps; they are called: {there}")
    for path, part in chosen:
        adapted = part if isinstance(part, Adapted) else Adapted(part)
        if name in adapted.adapters:
            raise ValueError(f"{'/'.join(map(str, path))} has an adapter {name!r} already")
        adapted.adapters[name] = Adapter(adapted.base, rank, rank if alpha is None else alpha, rngs=rngs)
        adapted.active = (*adapted.active, name)
        _put(model, path, adapted)
    return model


def adapter_names(model: nnx.Module) -> tuple[str, ...]:
    """The names of the adapters in a model, in the order in which they came."""
    return tuple(dict.fromkeys(name for _, part in _adapted(model) for name in part.adapters))


def use_adapters(model: ModelT, names: Sequence[str]) -> ModelT:
    """The model with these adapters active and no others.

    Raises:
      ValueError: for a name that no adapter has.
    """
    _check_names(model, names)
    model = nnx.clone(model)
    for _, part in _adapted(model):
        part.active = tuple(name for name in names if name in part.adapters)
    return model


def merge_adapters(model: ModelT, names: Sequence[str] | None = None) -> ModelT:
    """The model without adapters, the changes of some added to the kernels; a plain model again.

    Args:
      model: with adapters or without.
      names: of those to add; the active ones when None. The others are dropped.

    Raises:
      ValueError: for a name that no adapter has.
    """
    _check_names(model, names or ())
    model = nnx.clone(model)
    for path, part in list(_adapted(model)):
        chosen = part.active if names is None else [name for name in names if name in part.adapters]
        if chosen:
            part.base.kernel[...] = part.kernel_with(chosen)
        _put(model, path, part.base)
    return model


def adapter_parameters(*names: str) -> Callable[[Path, Any], bool]:
    """A filter of nnx: the parameters of the adapters of these names, of all adapters if none is named.

    For `train(..., trainable=...)`, `nnx.state` and `nnx.split`.
    """

    def belongs(path: Path, value: Any) -> bool:
        is_param = isinstance(value, nnx.Param) or getattr(value, "type", None) is nnx.Param
        at = path.index("adapters") if "adapters" in path else None
        return is_param and at is not None and (not names or path[at + 1] in names)

    return belongs


def _input_axes(base: Map) -> int:
    return 2 if isinstance(base, FromHeads) else 1


def _maps(model: nnx.Module) -> Iterator[tuple[Path, Any]]:
    """Paths and maps, adapted or not; a map inside an adapted one is not told apart from it."""
    found = [(path, part) for path, part in nnx.iter_modules(model) if isinstance(part, (*MAPS, Adapted))]
    inside = {(*path, "base") for path, part in found if isinstance(part, Adapted)}
    return ((path, part) for path, part in found if path and path not in inside)


def _adapted(model: nnx.Module) -> Iterator[tuple[Path, Adapted]]:
    return ((path, part) for path, part in _maps(model) if isinstance(part, Adapted))


def _put(model: nnx.Module, path: Path, part: nnx.Module) -> None:
    parent: Any = model
    for key in path[:-1]:
        parent = parent[key] if isinstance(parent, nnx.List | nnx.Dict) else getattr(parent, key)
    if isinstance(parent, nnx.List | nnx.Dict):
        parent[path[-1]] = part
    else:
        setattr(parent, path[-1], part)


def _check_names(model: nnx.Module, names: Sequence[str]) -> None:
    known = adapter_names(model)
    for name in names:
        if name not in known:
            hint = suggestion(name, known) if known else "there is none"
            raise ValueError(f"no adapter is called {name!r}: {hint}")
