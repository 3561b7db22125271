"""What the conformance suite runs over: each registered mixer in the patterns and layouts it declares, small.

A mixer is run whole where it is at home, in the paper's own pattern and layout, which are its constructor's defaults.
Its other patterns and layouts are `slow`, and only what may differ there is run; of several mixers of one paper, those
after the first are slow too. What a base makes of its mixers, cross-attention and other layouts, is run for one of
these, drawn by the mixer's name, and traced for the others; where pattern and layout both are other than its own, every
mixer is traced, no more. `REPRESENTATIVES` stand for the bases: they run everywhere. `OFTEN` do so in sequences among
the quick tests.
"""

import dataclasses
import functools
import zlib
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import pytest
from flax import nnx

import attnlab
from attnlab import Kind, Layout, Pattern, Site
from attnlab.contract import constructor_parameters
from attnlab.nn.dense_mixer import DenseMixer
from attnlab.nn.linear_mixer import LinearMixer
from tests.accuracy import relative_rms

FEATURES, HEADS, BATCH = 16, 2, 2
GRIDS = {Layout.SEQUENCE: (12,), Layout.IMAGE: (4, 6), Layout.VIDEO: (2, 4, 3)}
ODD_GRIDS = {
    Layout.SEQUENCE: [(1,), (2,), (7,)],
    Layout.IMAGE: [(1, 1), (5, 3)],
    Layout.VIDEO: [(1, 1, 1), (3, 2, 5)],
}
OFTEN = frozenset({"softmax_attention", "hedgehog"})
REPRESENTATIVES = OFTEN | {"lightnet"}


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

    def site(self, grid: tuple[int, ...] | None = None, **changes: Any) -> Site:
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

    def build(
        self,
        grid: tuple[int, ...] | None = None,
        *,
        seed: int = 0,
        noise: bool = True,
        layer: int = 1,
        **options: Any,
    ) -> nnx.Module:
        """The mixer, its parameters moved off their initial values so that none is zero or one by accident."""
        variant = attnlab.get(self.name)
        small = variant.options if grid is None else {}  # on other grids what follows from the site
        mixer = variant.create(self.site(grid, layer=layer), rngs=nnx.Rngs(seed), **{**small, **options})
        if noise:
            rng = np.random.default_rng(seed + 100)
            state = nnx.state(mixer, nnx.Param)
            moved = [
                (np.asarray(leaf) + 0.05 * rng.standard_normal(leaf.shape)).astype(leaf.dtype)
                for leaf in jax.tree.leaves(state)
            ]
            nnx.update(mixer, jax.tree.unflatten(jax.tree.structure(state), jax.device_put(moved)))
        return mixer

    def abstract(self, **options: Any) -> nnx.Module:
        """The mixer as shapes and dtypes alone; nothing is computed."""
        return nnx.eval_shape(lambda: self.build(noise=False, **options))

    def tokens(self, grid: tuple[int, ...] | None = None, *, batch: int = BATCH, seed: int = 1) -> np.ndarray:
        shape = (batch, *(GRIDS[self.layout] if grid is None else grid), FEATURES)
        return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)

    def arguments(self, x: np.ndarray, seed: int = 2) -> tuple[np.ndarray, ...]:
        """Positional arguments of a call: the tokens, and a context of as many tokens where it is cross-attention."""
        if not self.cross:
            return (x,)
        return (x, np.random.default_rng(seed).standard_normal(flat(x).shape).astype(x.dtype))


def flat(x: Any) -> Any:
    """Tokens of any layout as a sequence (B, N, C), in row-major order."""
    return x.reshape(x.shape[0], -1, x.shape[-1])


@functools.cache
def subjects_of(name: str) -> tuple[Subject, ...]:
    """All subjects of a mixer: where it is at home first, then the others."""
    variant = attnlab.get(name)
    there = [
        Subject(name, pattern, layout)
        for pattern in sorted(variant.patterns)
        for layout in sorted(variant.layouts)
        if supported(Subject(name, pattern, layout))
    ]
    parameters = constructor_parameters(variant.cls)
    causal = parameters["causal"].default if "causal" in parameters else variant.cls.causal
    layout = parameters["layout"].default if "layout" in parameters else variant.cls.layout
    own = Pattern.CAUSAL_SELF if causal is True else Pattern.SELF
    home = min(there, key=lambda subject: (subject.pattern is not own, subject.layout is not layout))
    return (home, *(subject for subject in there if subject != home))


def supported(subject: Subject) -> bool:
    """Whether a declared pattern exists in a declared layout: some mixers are causal on sequences alone."""
    try:
        attnlab.get(subject.name).cls.check_site(subject.site())
    except attnlab.UnsupportedArgument:
        return False
    return True


@functools.cache
def mixers() -> tuple[Subject, ...]:
    return tuple(subject for name in attnlab.names(kind=Kind.MIXER) for subject in subjects_of(name))


def at_home(subject: Subject) -> bool:
    return subject == subjects_of(subject.name)[0]


@functools.cache
def first_of_each_paper() -> frozenset[str]:
    """Of the mixers of each paper the first by name, which is that of the paper's slug where there is one."""
    first: dict[str, str] = {}
    for variant in attnlab.variants(kind=Kind.MIXER):
        first.setdefault(variant.slug, variant.name)
    return frozenset(first.values())


def run_whole(subject: Subject) -> bool:
    """Whether it is run at all, or traced, no more.

    At home; made causal, or the contrary, in its own layout; and, of what its base makes of it, one drawn by its name,
    all where it stands for its base.
    """
    home, *others = subjects_of(subject.name)
    if subject == home or subject.name in REPRESENTATIVES:
        return True
    near = [other for other in others if other.pattern is home.pattern or other.layout is home.layout]
    if not issubclass(attnlab.get(subject.name).cls, DenseMixer | LinearMixer):
        return subject in near
    own = [other for other in near if other.layout is home.layout and not other.cross]
    drawn = [other for other in near if other not in own]
    drawn = drawn and [min(drawn, key=lambda other: zlib.crc32(str(other).encode()))]
    return subject in own + drawn


def often_run(subject: Subject) -> bool:
    """Whether it is among the quick tests."""
    represents = subject.name in OFTEN and subject.layout is Layout.SEQUENCE
    return represents or (at_home(subject) and subject.name in first_of_each_paper())


def those(
    wanted: Callable[[Subject], bool] = lambda subject: True,
    *,
    often: Callable[[Subject], bool] = often_run,
    everywhere: bool = False,
) -> pytest.MarkDecorator:
    """Parametrises a test over the subjects that are `wanted`; those that are not to run `often` are slow.

    `everywhere` is for what costs a trace, no more: it is for those too that are not run whole.
    """
    return pytest.mark.parametrize(
        "subject",
        [
            pytest.param(subject, id=str(subject), marks=() if often(subject) else pytest.mark.slow)
            for subject in mixers()
            if (everywhere or run_whole(subject)) and wanted(subject)
        ],
    )


@functools.cache
def accepts(subject: Subject) -> frozenset[str]:
    """Arguments that the mixer takes when built for this pattern and layout; nothing is computed to learn it."""
    return subject.abstract().accepts


def decodes(subject: Subject) -> bool:
    """Causal self-attention of sequences does, and with the common bases attention of a sequence to a context."""
    based = (
        issubclass(attnlab.get(subject.name).cls, DenseMixer | LinearMixer)
        and attnlab.get(subject.name).cls.independent_queries
    )
    return subject.layout is Layout.SEQUENCE and (subject.pattern is Pattern.CAUSAL_SELF or (subject.cross and based))


def close(got: Any, want: Any, tolerance: float = 2e-5, what: str = "") -> None:
    assert np.shape(got) == np.shape(want), what
    assert finite(got), f"{what} is not finite"
    error = relative_rms(got, want)
    assert error <= tolerance, f"{what} relative RMS {error:.2e} above {tolerance:.0e}"


def finite(array: Any) -> bool:
    return bool(np.isfinite(np.asarray(array, np.float64)).all())


def named(tree: Any) -> dict[str, Any]:
    """The leaves of a tree by their paths."""
    return {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def parameters(module: nnx.Module) -> dict[str, jax.Array]:
    return named(nnx.state(module, nnx.Param))
