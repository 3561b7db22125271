"""How the TPU kernels cut their work: layouts of heads, blocks, bytes, on-chip memory, refusals; and they compile."""

import dataclasses
import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import dispatch, linear_attention
from pallas_kernels.linear_attention.api import normal_form
from pallas_kernels.linear_attention.cases import Case
from pallas_kernels.linear_attention.tpu import kernels as tpu_kernels
from pallas_kernels.linear_attention.tpu import op as tpu
from pallas_kernels.linear_attention.tpu import plan as tpu_plan
from pallas_kernels.tpu import chips
from tests.jaxprs import equations
from tests.pallas_kernels.linear_attention.tpu.checks import check, interpreted
from tests.pallas_kernels.quick import joined, quick
from tests.pallas_kernels.tpu_compile import TOPOLOGIES, compile_for, device_kind, kernels_of, needs_tpu_compiler, shape

LAYOUTS = {
    "odd heads share lanes": (Case("odd_heads", 1, 150, heads=3, key_size=64, decay="token", initial_state=True), {}),
    "blocks of heads": (Case("head_blocks", 1, 150, heads=6, key_size=64, decay="head"), {"lanes": 128}),
    "keys in place": (
        Case("shared_in_place", 1, 150, heads=4, kv_heads=2, key_size=128, decay="token", normalize=True),
        {"lanes": 256},
    ),
    "wide values": (Case("wide_values", 1, 140, heads=4, key_size=48, value_size=256, decay="channel"), {}),
    "narrow values": (Case("narrow_values", 1, 140, heads=2, key_size=256, value_size=96, decay="head"), {}),
    "chunks of 256": (Case("wide_chip", 1, 520, heads=1, key_size=128, decay="token"), {"device_kind": "TPU v6e"}),
    "not causal": (
        Case("full_blocks", 1, 200, heads=4, kv_length=140, key_size=64, causal=False, normalize=True),
        {"lanes": 128},
    ),
}


@pytest.mark.parametrize("name", quick(LAYOUTS, ("blocks of heads",)))
def test_layouts_of_heads(name, errors):
    case, options = LAYOUTS[name]
    check(errors, case, "float32", **{"tokens": 256} | options)


@pytest.mark.parametrize("decay", quick([None, "token"], ("None",)))
def test_heads_in_turns_and_one_after_another_compute_the_same(decay):
    config = tpu_plan.Config(chips.chip_of("TPU v5e"), decay=decay)
    plan = tpu_plan.plan_for(config, 1, 512, 4, 4, 64, 64, jnp.dtype("bfloat16"))
    alone = dataclasses.replace(plan, in_turns=False)
    assert plan.in_turns and len(plan.groups) == 2 and (plan.unroll, alone.unroll) == (4, 1)
    rng = np.random.default_rng(0)
    for kind in ("keep", "backward"):
        arrays = {}
        for operand in plan.inputs(kind):
            x = rng.standard_normal(operand.shape)
            arrays[operand.name] = jnp.asarray(-np.cumsum(abs(x), -1) if operand.name == "decay" else x, operand.dtype)
        with interpreted():
            results = [tpu_kernels.call(one, kind, arrays) for one in (plan, alone)]
        jax.tree.map(np.testing.assert_array_equal, *results)


def test_heads_come_one_after_another_where_values_of_all_do_not_fit():
    config = tpu_plan.Config(chips.chip_of("TPU v4"), decay="channel")
    plans = [tpu_plan.plan_for(config, 1, 8192, 8, 8, 64, 64, jnp.dtype(dtype)) for dtype in ("bfloat16", "float32")]
    assert [plan.in_turns for plan in plans] == [True, False]


@st.composite
def cases(draw):
    decay, heads = draw(st.sampled_from((None, "head", "token", "channel"))), draw(st.integers(1, 4))
    return Case(
        "random",
        draw(st.integers(1, 2)),
        draw(st.integers(1, 300)),
        heads,
        draw(st.sampled_from((16, 24, 64, 80))),
        draw(st.sampled_from((16, 32, 64))),
        draw(st.sampled_from([g for g in range(1, heads + 1) if heads % g == 0])),
        decay=decay,
        strength=draw(st.sampled_from((0.05, 1.0, 20.0))),
        normalize=draw(st.booleans()),
        segments=draw(st.sampled_from((0, 3))),
        initial_state=draw(st.booleans()),
    )


@pytest.mark.slow
@settings(max_examples=4, deadline=None, derandomize=True)
@given(case=cases(), tokens=st.sampled_from((128, 256)), dtype=st.sampled_from(("float32", "bfloat16")))
def test_any_shape(case, tokens, dtype, errors):
    check(errors, case, dtype, tokens=tokens)


# ---- what is refused, and chosen


Q = jnp.ones((1, 8, 2, 16))
REFUSED = {
    "float64": ({}, jnp.float64, "q, k and v must be bfloat16, float16 or float32.*no float64"),
    "head size": ({"v": jnp.ones((1, 8, 2, 300))}, jnp.float32, "head sizes may be 1 to 256, got 300 channels of v"),
    "chunk": ({"chunk_size": 64}, jnp.float32, "chunk_size must be None or one of 128, 256 here, got 64"),
    "chunk per channel": (
        {"chunk_size": 256, "log_decay": -Q},
        jnp.float32,
        "chunk_size must be None or one of 32, 64, 128 here, got 256",
    ),
    "chunk without causality": (
        {"chunk_size": 128, "causal": False},
        jnp.float32,
        "chunk_size must be None, got 128",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refusals_name_the_argument(name):
    options, dtype, message = REFUSED[name]
    with jax.enable_x64(dtype == jnp.float64), dispatch.target("tpu", "TPU v5e", qualified_only=False):
        options = {"v": Q} | options
        q, options["v"] = Q.astype(dtype), options["v"].astype(dtype)
        with pytest.raises(dispatch.UnsupportedError, match=f"implementation='tpu' refuses: .*{message}"):
            linear_attention(q, q, **options, implementation="tpu")


def test_what_fits_no_chip_is_refused():
    q = jax.ShapeDtypeStruct((1, 4096, 41, 64), jnp.float32)  # 41 heads of half a tile do not divide
    args = tpu.Arguments(q=q, k=q, v=q)
    with dispatch.target("tpu", None, qualified_only=False):
        refusal = tpu.supports(args)
        with pytest.raises(dispatch.UnsupportedError, match="no block of q"):
            tpu.traffic(args)
    assert "no block of q (1, 4096, 41, 64), v (1, 4096, 41, 64) in float32 fits the 15728640 bytes" in refusal
    assert "TPU unknown: 41 heads do not divide" in refusal
    with dispatch.target("tpu", "TPU v6e", qualified_only=False):
        assert tpu.supports(args) is None


def test_it_is_the_choice_on_a_tpu_alone():
    with dispatch.target("tpu", "TPU v5e", qualified_only=False):
        assert dispatch.choose("linear_attention", normal_form(Q, Q, Q)).name == "tpu"
    assert dispatch.choose("linear_attention", normal_form(Q, Q, Q), platform="gpu").name != "tpu"


# ---- bytes and blocks, by arithmetic


KINDS = ("TPU v4", "TPU v5e", "TPU v5p", "TPU v6e", "TPU7x", None)


def shapes(dtype, size, decay, heads=8, length=8192, **options):
    q = jax.ShapeDtypeStruct((1, length, heads, size), dtype)
    shape = {"head": (heads,), "token": q.shape[:3], "channel": q.shape}.get(decay)
    g = None if shape is None else jax.ShapeDtypeStruct(shape, jnp.float32)
    return tpu.Arguments(q=q, k=q, v=q, log_decay=g, **options)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [64, 128, 256])
def test_bytes_moved_are_near_the_least_possible(kind, size):
    for options in ({"decay": None}, {"decay": "head"}, {"decay": "token"}, {"decay": None, "causal": False}):
        with dispatch.target("tpu", kind, qualified_only=False):
            moved = tpu.traffic(shapes(jnp.bfloat16, size, **options))
        assert 8 * size <= moved["forward"] <= 1.3 * 8 * size
        assert 14 * size <= moved["backward"] <= 1.3 * 14 * size
    with dispatch.target("tpu", kind, qualified_only=False):
        moved = tpu.traffic(shapes(jnp.bfloat16, size, "channel"))
    assert moved["forward_minimum"] == 12 * size and moved["backward_minimum"] == 22 * size
    assert 12 * size <= moved["forward"] <= 1.3 * 12 * size
    assert 22 * size <= moved["backward"] <= 1.3 * 22 * size


def test_bytes_are_those_of_the_blocks_that_the_kernels_use():
    args = shapes(jnp.bfloat16, 64, "token", length=3000)
    with dispatch.target("tpu", "TPU v5e", qualified_only=False):
        (plan,), moved = tpu.plans(args), tpu.traffic(args)
        gradient = jax.grad(
            lambda q, k, v, g: jnp.sum(
                linear_attention(q, k, v, log_decay=g, implementation="tpu").astype(jnp.float32)
            ),
            argnums=(0, 3),
        )
        traced = equations(gradient, args.q, args.k, args.v, args.log_decay)
        kernels = [x.params["grid_mapping"] for x in traced if "grid_mapping" in x.params]
    assert len(kernels) == 2
    for mapping, total in zip(kernels, (moved["forward"], moved["backward"]), strict=True):
        assert mapping.grid == plan.grid == (1, 1, 3)
        fetched = 0
        for block in mapping.block_mappings:
            size = np.prod([getattr(x, "block_size", 1) for x in block.block_shape])
            fetched += size * block.array_aval.dtype.itemsize * 3  # every block has another index at every step
        assert fetched == total * 3000 * 8


@pytest.mark.parametrize("kind", KINDS)
def test_blocks_fit_every_chip(kind):
    limit = chips.chip_of(kind).vmem_limit
    for dtype in (jnp.bfloat16, jnp.float32):
        for size in (16, 32, 64, 96, 128, 256):
            for options in ({"decay": "token"}, {"decay": "channel"}, {"decay": None, "causal": False}):
                with dispatch.target("tpu", kind, qualified_only=False):
                    for plan in tpu.plans(shapes(dtype, size, normalize=True, return_state=True, **options)):
                        names = ("keep", "backward") if plan.config.causal else ("outer", "read", "read_backward")
                        assert max(map(plan.vmem, names)) <= limit < plan.config.chip.vmem


def test_chips_are_those_that_jax_knows():
    versions = {chip.name: chip for chip in chips.CHIPS.values()}
    for version in pltpu.ChipVersion:
        chip = versions.get(str(version)) or versions.get(f"TPU{version}")
        if chip is not None:
            info = pltpu.get_tpu_info_for_chip(version, 1)
            assert (chip.vmem, chip.mxu) == (info.vmem_capacity_bytes, info.mxu_column_size), version
    assert chips.chip_of(None) == chips.chip_of("TPU v99") == chips.UNKNOWN_CHIP
    assert chips.chip_of("TPU v5 lite").name == "v5e"


# ---- ahead of time, by the TPU compiler


def compiled(topology, dtype, heads, size, decay=None, *, length=2048, value_size=None, kv_heads=None, **options):
    """The executable of a call and its gradient."""
    q, k = shape((1, length, heads, size), dtype), shape((1, length, kv_heads or heads, size), dtype)
    v = shape((1, length, kv_heads or heads, value_size or size), dtype)
    g = {"head": (heads,), "token": q.shape[:3], "channel": q.shape}.get(decay)
    arguments = (q, k, v) if g is None else (q, k, v, shape(g, jnp.float32))

    def loss(q, k, v, log_decay=None):
        y = linear_attention(q, k, v, log_decay=log_decay, implementation="tpu", **options)
        return jnp.sum(jnp.square(y.astype(jnp.float32)))

    return compile_for(topology, jax.grad(loss, argnums=tuple(range(len(arguments)))), *arguments)


KERNELS = itertools.product(("head", "token", "channel", "not causal"), (64, 128, 256), TOPOLOGIES)
QUICK = ("head-128-v5p", "token-64-v5e", "channel-64-v6e", "not causal-128-TPU7x")


@needs_tpu_compiler
@pytest.mark.parametrize(("decay", "size", "topology"), quick(KERNELS, QUICK, joined))
def test_every_kernel_compiles_for_every_chip(decay, size, topology):
    heads = max(1, 128 // size)
    options = {"causal": False} if decay == "not causal" else {}
    executable = compiled(topology, "bfloat16", heads, size, decay, **options)
    assert kernels_of(executable) == (4 if options else 2)


COMPILED = {
    "float32": ("float32", 2, 64, "token", {}),
    "float16": ("float16", 2, 64, None, {}),
    "float32 normalised": ("float32", 1, 128, None, {"normalize": True, "causal": False}),
    "eight heads in a tile": ("bfloat16", 8, 16, "token", {"normalize": True, "scale": 0.5}),
    "four heads in a tile, of two": ("bfloat16", 2, 32, "head", {"value_size": 96}),
    "96 padded": ("bfloat16", 2, 96, "channel", {}),
    "shared keys in place": ("bfloat16", 4, 128, "token", {"kv_heads": 2, "normalize": True}),
    "shared keys repeated": ("bfloat16", 4, 64, "head", {"kv_heads": 2}),
    "one token": ("bfloat16", 2, 64, "head", {"length": 1}),
    "one token, not causal": ("bfloat16", 2, 64, None, {"length": 1, "causal": False}),
    "a tail": ("bfloat16", 3, 64, "head", {"length": 1063}),
}


@needs_tpu_compiler
@pytest.mark.parametrize("name", quick(COMPILED, ("a tail",)))
def test_other_sizes_and_options_compile(name):
    dtype, heads, size, decay, options = COMPILED[name]
    assert kernels_of(compiled("v5e", dtype, heads, size, decay, **options)) in (2, 4)


FULL = [(128, "bfloat16", "head"), (16, "float32", "token"), (16, "float32", "channel"), (256, "float32", "channel")]


@pytest.mark.slow
@needs_tpu_compiler
@pytest.mark.parametrize(("size", "dtype", "decay"), FULL)
def test_on_chip_memory_is_at_most_what_the_plan_says(size, dtype, decay, monkeypatch):
    kind = device_kind("v5e")
    config = tpu_plan.Config(chips.chip_of(kind), decay=decay, initial=True, final=True)
    plan = tpu_plan.plan_for(config, 1, 4096, 8, 8, size, size, jnp.dtype(dtype))
    needed = plan.vmem("backward")
    names = [operand.name for operand in plan.inputs("backward")]
    arguments = [shape(operand.shape, operand.dtype) for operand in plan.inputs("backward")]

    def run(*arrays):
        return tpu_kernels.call(plan, "backward", dict(zip(names, arrays, strict=True)))

    monkeypatch.setattr(chips.Chip, "vmem_limit", needed)
    compile_for("v5e", run, *arguments)
    monkeypatch.setattr(chips.Chip, "vmem_limit", needed // 2)  # the limit is one
    with pytest.raises(jax.errors.JaxRuntimeError, match=r"(?i)vmem"):
        compile_for("v5e", run, *arguments)


@needs_tpu_compiler
@pytest.mark.parametrize("decay", quick([None, "channel"], ("None",)))
def test_operands_are_read_and_written_in_place(decay):
    batch, length, heads, size, features = 2, 1024, 4, 64, 128
    width = heads * size

    def loss(x, to_q, to_k, to_v, to_g, to_y):
        q, k, v, g = ((x @ w).reshape(batch, length, heads, size) for w in (to_q, to_k, to_v, to_g))
        g = None if decay is None else -jax.nn.softplus(g.astype(jnp.float32))
        y = linear_attention(q, k, v, log_decay=g, implementation="tpu")
        return jnp.sum(jnp.square((y.reshape(batch, length, width) @ to_y).astype(jnp.float32)))

    weights = [shape((features, width))] * 4 + [shape((width, features))]
    text = compile_for("v5e", jax.grad(loss, argnums=range(6)), shape((batch, length, features)), *weights).as_text()
    kernels = re.findall(r"= (.*) custom-call\(.*tpu_custom_call", text)
    assert len(kernels) == 2
    # Heads side by side, tokens above: the layout of the projections. A copy would have one of its own.
    assert f"[{batch},{length},{width}]{{2,1,0" in kernels[0] and f"[{batch},{length},{width}]{{2,1,0" in kernels[1]
    moved = rf"\w+\[({batch},{length},{width}|{batch},{length},{heads},{size}|{batch},{heads},{length},{size})\]"
    assert not re.findall(rf"= {moved}\S* (transpose|copy|reshape)\(.*", text)
