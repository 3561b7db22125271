"""What the conformance suite runs over: each registered mixer in each pattern and layout it declares, small."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import attnlab
from attnlab import Kind, Layout, Pattern, Site
from tests.accuracy import relative_rms

FEATURES, HEADS, BATCH = 16, 2, 2
GRIDS = {Layout.SEQUENCE: (12,), Layout.IMAGE: (4, 6), Layout.VIDEO: (2, 4, 3)}
ODD_GRIDS = {
    Layout.SEQUENCE: [(1,), (2,), (7,)],
    Layout.IMAGE: [(1, 1), (5, 3)],
    Layout.VIDEO: [(1, 1, 1), (3, 2, 5)],
}


@dataclasses.dataclass(frozen=True)
class Subject:
    """A mixer in one pattern and one layout."""

    name: str
    pattern: Pattern
    layout: Layout

    def __str__(self) -> str:
        return f"{self.name}-{self.pattern}-{self.layout}".replace(" ", "_")

    @property
    def causal(self) -> bool:
        return self.pattern in (Pattern.CAUSAL_SELF, Pattern.CAUSAL_CROSS)

    @property
    def cross(self) -> bool:
        return self.pattern in (Pattern.CROSS, Pattern.CAUSAL_CROSS)

    def site(self, grid: tuple[int, ...] | None = None, **changes) -> Site:
        place = Site(
            FEATURES,
            HEADS,
            layout=self.layout,
            causal=self.causal,
            grid=GRIDS[self.layout] if grid is None else grid,
            layer=1,
            num_layers=4,
            context_features=FEATURES if self.cross else None,
            rotary=100.0 if self.pattern is Pattern.CAUSAL_SELF and self.layout is Layout.SEQUENCE else None,
        )
        return dataclasses.replace(place, **changes)

    def build(self, grid: tuple[int, ...] | None = None, *, seed: int = 0, noise: bool = True, **options) -> nnx.Module:
        """The mixer, its parameters moved off their initial values so that none is zero or one by accident."""
        options = {**attnlab.get(self.name).options, **options}
        mixer = attnlab.create(self.name, self.site(grid), rngs=nnx.Rngs(seed), **options)
        if noise:
            state = nnx.state(mixer, nnx.Param)
            leaves, tree = jax.tree.flatten(state)
            keys = jax.random.split(jax.random.key(seed + 100), max(len(leaves), 1))
            moved = [
                leaf + 0.05 * jax.random.normal(key, leaf.shape, leaf.dtype)
                for leaf, key in zip(leaves, keys, strict=False)
            ]
            nnx.update(mixer, jax.tree.unflatten(tree, moved))
        return mixer

    def tokens(self, grid: tuple[int, ...] | None = None, *, batch: int = BATCH, seed: int = 1) -> jax.Array:
        shape = (batch, *(GRIDS[self.layout] if grid is None else grid), FEATURES)
        return jax.random.normal(jax.random.key(seed), shape)

    def arguments(self, x: jax.Array, seed: int = 2) -> tuple[jax.Array, ...]:
        """Positional arguments of a call: the tokens, and a context of as many tokens where it is cross-attention."""
        if not self.cross:
            return (x,)
        return (x, jax.random.normal(jax.random.key(seed), flat(x).shape, x.dtype))


def flat(x: jax.Array) -> jax.Array:
    """Tokens of any layout as a sequence (B, N, C), in row-major order."""
    return x.reshape(x.shape[0], -1, x.shape[-1])


@functools.cache
def mixers() -> tuple[Subject, ...]:
    return tuple(
        Subject(variant.name, pattern, layout)
        for variant in attnlab.variants(kind=Kind.MIXER)
        for pattern in sorted(variant.patterns)
        for layout in sorted(variant.layouts)
        if supported(variant.name, pattern, layout)
    )


def supported(name: str, pattern: Pattern, layout: Layout) -> bool:
    """Whether a declared pattern exists in a declared layout: some mixers are causal on sequences alone."""
    try:
        attnlab.get(name).cls.check_site(Subject(name, pattern, layout).site())
    except attnlab.UnsupportedArgument:
        return False
    return True


@functools.cache
def accepts(subject: Subject) -> frozenset[str]:
    """Arguments that the mixer takes when built for this pattern and layout; nothing is computed to learn it."""
    return nnx.eval_shape(lambda: subject.build(noise=False)).accepts


def close(got, want, tolerance: float = 2e-5) -> None:
    assert np.shape(got) == np.shape(want)
    assert np.isfinite(np.asarray(got, np.float64)).all()
    error = relative_rms(got, want)
    assert error <= tolerance, f"relative RMS {error:.2e} above {tolerance:.0e}"


def parameters(module: nnx.Module) -> dict[str, jax.Array]:
    flat = jax.tree_util.tree_flatten_with_path(nnx.state(module, nnx.Param))[0]
    return {jax.tree_util.keystr(path): leaf for path, leaf in flat}


def as_dtype(module: nnx.Module, dtype) -> nnx.Module:
    """The module with its floating parameters cast, the rest as it is."""
    graph, state = nnx.split(module)
    cast = jax.tree.map(lambda a: a.astype(dtype) if jnp.issubdtype(a.dtype, jnp.floating) else a, state)
    return nnx.merge(graph, cast)
