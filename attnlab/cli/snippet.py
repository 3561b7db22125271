"""A few lines of Python that build and call a variant at the small sizes it was registered with."""

import dataclasses
import inspect
import json
from collections.abc import Mapping
from typing import Any

from attnlab.cli import describe
from attnlab.contract import Layout, Pattern, Site, UnsupportedArgument
from attnlab.registry import Kind, Variant

FEATURES, HEADS, BATCH, IMAGE = 16, 2, 2, 32
GRIDS = {Layout.SEQUENCE: (12,), Layout.IMAGE: (4, 6), Layout.VIDEO: (2, 4, 3)}
AXES = {Layout.SEQUENCE: "B, N, C", Layout.IMAGE: "B, H, W, C", Layout.VIDEO: "B, T, H, W, C"}


def snippet(variant: Variant) -> str:
    """Python that imports the variant, builds it and calls it."""
    if variant.kind is Kind.MIXER:
        return _mixer(variant)
    if variant.kind is Kind.POOLING:
        return _pooling(variant)
    if variant.kind is Kind.BACKBONE:
        return _backbone(variant)
    return _task(variant) if variant.kind is Kind.TASK else _example(variant)


def _mixer(variant: Variant) -> str:
    site = _site(variant)
    shape, axes = (BATCH, *(site.grid or ()), FEATURES), AXES[site.layout]
    cross = site.context_features is not None
    lines = [
        f"mixer = {_build(variant, site)}",
        f"x = jax.random.normal(jax.random.key(0), {shape})  # ({axes})",
        f"y = mixer(x{', context' if cross else ''})  # ({axes})",
    ]
    if cross:
        lines.insert(2, f"context = jax.random.normal(jax.random.key(1), ({BATCH}, 8, {FEATURES}))  # (B, M, C)")
    if site.pattern is Pattern.CAUSAL_SELF and describe.decode_bytes(variant):
        lines += [
            "",
            f"state = mixer.init_state(batch_size={BATCH}, max_length={GRIDS[site.layout][0] + 1})",
            "y, state = mixer.prefill(x, state)",
            "y_t, state = mixer.step(x[:, -1], state)  # (B, C)",
        ]
    return _program(variant, lines)


def _site(variant: Variant) -> Site:
    """The first place that the mixer has a form for, decoding if there is one."""
    for pattern in (Pattern.CAUSAL_SELF, Pattern.SELF, Pattern.CROSS, Pattern.CAUSAL_CROSS):
        for layout in sorted(variant.layouts, key=list(Layout).index):
            site = Site(
                FEATURES,
                HEADS,
                layout=layout,
                causal=pattern in (Pattern.CAUSAL_SELF, Pattern.CAUSAL_CROSS),
                grid=GRIDS[layout],
                context_features=FEATURES if pattern in (Pattern.CROSS, Pattern.CAUSAL_CROSS) else None,
            )
            try:
                variant.site_class.check_site(site)
            except UnsupportedArgument:
                continue
            return site
    raise ValueError(f"{variant.name} has no form for any pattern in any layout that it declares")


def _pooling(variant: Variant) -> str:
    site = Site(FEATURES, HEADS, grid=(4, 4))
    return _program(
        variant,
        [
            f"pool = {_build(variant, site)}",
            f"x = jax.random.normal(jax.random.key(0), ({BATCH}, 16, {FEATURES}))  # (B, N, C)",
            "y = pool(x)  # (B, pool.out_features)",
        ],
    )


def _build(variant: Variant, site: Site) -> str:
    """The call of the constructor with what a model at this site would tell it, where it differs from the defaults."""
    known = describe.parameters(variant.target)
    told = {field.name: getattr(site, field.name) for field in dataclasses.fields(site) if field.name in known}
    given = told | variant.site_class.site_defaults(site) | dict(variant.options)
    return _call(variant, {name: value for name, value in given.items() if value != known[name].default})


def _backbone(variant: Variant) -> str:
    small = variant.options
    if vocabulary := small.get("vocab_size"):
        inputs = f"tokens = jax.random.randint(jax.random.key(0), ({BATCH}, 12), 0, {vocabulary})  # (B, N)"
        name = "tokens"
    elif numbers := small.get("token_features"):
        inputs = f"vectors = jax.random.normal(jax.random.key(0), ({BATCH}, 12, {numbers}))  # (B, N, F)"
        name = "vectors"
    else:
        size = small.get("image_size", IMAGE)
        rows, columns = (size, size) if isinstance(size, int) else size
        inputs = f"images = jax.random.normal(jax.random.key(0), ({BATCH}, {rows}, {columns}, 3))  # (B, H, W, C)"
        name = "images"
    return _program(variant, [f"model = {_call(variant, small)}", inputs, f"logits = model({name})"])


def _task(variant: Variant) -> str:
    name = variant.target.__name__
    arguments = ", ".join(f"{key}={_source(value)}" for key, value in variant.options.items())
    return "\n".join(
        [
            "import numpy as np",
            "",
            f"from {variant.target.__module__} import {name}",
            "",
            f"task = {name}({arguments})",
            "batch = task.sample(np.random.default_rng(0), 4)",
            'answer = task.oracle(batch["inputs"])',
        ]
    )


def _example(variant: Variant) -> str:
    import jax

    example = variant.example()
    same = example.call is variant.target
    shapes = [
        f"# {name}: {jax.tree.map(_shape, value)}".replace("'", "")
        for name, value in [*enumerate(example.args), *example.kwargs.items()]
    ]
    lines = ["import attnlab"]
    if same:
        lines += ["", f"from {variant.target.__module__} import {variant.target.__name__}"][1:]
    call = variant.target.__name__ if same else "example.call"
    return "\n".join(
        [
            *lines,
            "",
            f'example = attnlab.get("{variant.name}").example()',
            *shapes,
            f"result = {call}(*example.args, **example.kwargs)",
        ]
    )


def _shape(value: Any) -> str:
    import numpy as np

    shape = getattr(value, "shape", None)
    if shape is not None:
        return f"{np.dtype(value.dtype).name}{list(shape)}"
    # What Python prints of a function holds its address.
    return f"the function {value.__name__}" if inspect.isfunction(value) else repr(value)


def _program(variant: Variant, lines: list[str]) -> str:
    uses = [f"from attnlab import {name}" for name in ("Layout",) if any(f"{name}." in line for line in lines)]
    imports = sorted([f"from {variant.target.__module__} import {variant.target.__name__}", *uses])
    return "\n".join(["import jax", "from flax import nnx", "", *imports, "", *lines])


def _call(variant: Variant, options: Mapping[str, Any]) -> str:
    known = describe.parameters(variant.target)
    positional = [
        name
        for name, parameter in known.items()
        if name in options
        and parameter.kind is parameter.POSITIONAL_OR_KEYWORD
        and parameter.default is parameter.empty
    ]
    rest = [name for name in options if name not in positional]
    arguments = [_source(options[name]) for name in positional]
    arguments += [f"{name}={_source(options[name])}" for name in rest]
    arguments.append("rngs=nnx.Rngs(0)")
    one_line = f"{variant.target.__name__}({', '.join(arguments)})"
    if len(one_line) <= 100:
        return one_line
    return f"{variant.target.__name__}(\n" + "".join(f"    {argument},\n" for argument in arguments) + ")"


def _source(value: Any) -> str:
    """The value as Python source, in the project's format: words in double quotes."""
    if isinstance(value, Layout):
        return f"Layout.{value.name}"
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False)
    if isinstance(value, tuple | list):
        inside = ", ".join(map(_source, value))
        return f"[{inside}]" if isinstance(value, list) else f"({inside},)" if len(value) == 1 else f"({inside})"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{_source(key)}: {_source(item)}" for key, item in value.items()) + "}"
    if isinstance(value, bool | int | float | type(None)):
        return repr(value)
    raise ValueError(
        f"{value!r} cannot be written as source: give small options as numbers, words, tuples or dictionaries"
    )
