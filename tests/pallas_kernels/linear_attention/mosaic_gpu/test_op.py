"""Mosaic GPU kernels for Hopper without a GPU: run by Pallas' interpreter of GPUs, and lowered for CUDA.

The interpreter of JAX 0.10.2 executes copies, barriers, warpgroups and shared memory; of a kernel it does not see the
wgmma instructions and register layouts (see `tiles`). Those are checked by lowering.
"""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from pallas_kernels import dispatch, linear_attention
from pallas_kernels.linear_attention import api, reference
from pallas_kernels.linear_attention.cases import ACCURACY, Case
from pallas_kernels.linear_attention.mosaic_gpu import op as implementation
from pallas_kernels.linear_attention.mosaic_gpu import plan as plans
from pallas_kernels.linear_attention.mosaic_gpu import sweep as kernel
from tests.pallas_kernels import gpu_interpreter
from tests.pallas_kernels.accuracy import Results, relative_errors, results_of
from tests.pallas_kernels.quick import joined, quick

interpreted = pytest.mark.skipif(
    gpu_interpreter.InterpretGPUParams is None,
    reason=f"JAX {jax.__version__} has no Pallas interpreter of GPUs where 0.10.2 has it",
)
BOUND = 4e-3
H200 = "NVIDIA H200"


@pytest.fixture
def interpreter():
    """Parameters by length: memory is NaN before it is written, and reads out of bounds raise.

    Not so where the last chunk reaches beyond N: there the copy engine fills with zeros, which the interpreter knows
    only as the value of all memory.
    """

    def parameters(length: int, **options):
        if length % plans.TILE:
            options |= {"out_of_bounds_reads": "uninitialized", "uninitialized_memory": "zero"}
        return gpu_interpreter.InterpretGPUParams(**options)

    with gpu_interpreter.interpreting():
        yield parameters


def evaluate(arguments: dict, options: dict, run) -> Results:
    """Outputs, the state among them, and gradients, but that of a decay per head."""
    fixed = {"log_decay": arguments.get("log_decay")} if without_gradient(arguments, options) else {}
    given = {name: x for name, x in arguments.items() if name not in fixed}
    return results_of(lambda given: run(api.normal_form(**given, **fixed, **options, return_state=True)), given)


def without_gradient(arguments: dict, options: dict) -> bool:
    """Whether the decay is one per head: segments make it one per token."""
    return "segment_ids" not in options and getattr(arguments.get("log_decay"), "ndim", 0) == 1


def errors(arguments: dict, options: dict, run) -> Results:
    """Relative RMS errors of outputs and gradients against the float64 recurrence on the same numbers."""
    got = evaluate(arguments, options, run)
    with jax.enable_x64(True):
        exact = jax.tree.map(lambda x: jnp.asarray(np.asarray(x, np.float64)), arguments)
        return relative_errors(got, evaluate(exact, options, reference.run))


def check(case: Case, run, scale: float | None = None) -> None:
    """Outputs and gradients of a case within the bounds."""
    arguments, options = case.arguments(jnp.bfloat16)
    if scale is not None:
        arguments["scale"] = jnp.float32(scale)
    found = errors(arguments, options, run)
    assert max(found.outputs) <= BOUND, found.outputs
    assert set(found.gradients) == set(arguments) - ({"log_decay"} if without_gradient(arguments, options) else set())
    assert max(found.gradients.values()) <= 2 * BOUND, found.gradients


# ---- numbers

# A case, its scale, and how it is cut; with one multiprocessor two heads share a CTA.
CASES = {
    "none, two batches": (Case("none", 2, 70, heads=1, key_size=64), None, {}),
    "head, D=E=128": (Case("head", 1, 70, heads=2, key_size=128, decay="head"), 0.7, {}),
    "token, D=192": (Case("large", 1, 70, heads=1, key_size=192, value_size=64, decay="token"), None, {}),
    "token, D=E=128": (Case("both", 1, 130, heads=1, key_size=128, decay="token", initial_state=True), 0.7, {}),
    "head, several borders": (
        Case("head_640", 1, 640, 1, 64, decay="head", strength=0.05, initial_state=True),
        None,
        {},
    ),
    "head, -20": (Case("h20", 1, 100, 1, 64, decay="head", strength=20.0, uniform=True), None, {}),
    "token, grouped": (Case("token", 1, 70, 2, 64, kv_heads=1, decay="token", initial_state=True), 0.7, {}),
    "token, several borders": (Case("long", 1, 650, 1, 64, decay="token", strength=0.1), None, {}),
    "token, -20": (Case("t20", 1, 130, 1, 64, decay="token", strength=20.0, uniform=True), None, {}),
    "token, one": (Case("one", 1, 1, 1, 64, decay="token", initial_state=True), 0.0, {}),
    "segments": (Case("packed", 1, 130, 1, 64, segments=3, decay="head", initial_state=True), None, {}),
    "token, splits": (Case("splits", 1, 256, 1, 64, decay="token", initial_state=True), 0.7, {"splits": 2}),
    "token, pairs": (Case("pairs", 1, 130, 2, 64, kv_heads=1, decay="token"), None, {"processors": 1}),
    "head, pairs": (Case("pairs", 1, 70, 2, 192, 64, decay="head"), None, {"processors": 1}),
    "head, splits": (Case("head_in_splits", 1, 128, 1, 64, decay="head", strength=0.05), None, {"splits": 2}),
}


@interpreted
@pytest.mark.parametrize("name", quick(CASES, ("none, two batches", "token, grouped")))
def test_outputs_and_gradients(name, interpreter):
    case, scale, how = CASES[name]
    how = {"splits": 1} | how
    interpret = interpreter(case.length // how["splits"])
    check(case, lambda args: implementation.run(args, interpret=interpret, **how), scale)


@pytest.mark.slow
@interpreted
@pytest.mark.parametrize("case", [case for case in ACCURACY if case.decay != "channel"], ids=lambda case: case.name)
def test_accuracy_at_the_lengths_where_it_is_promised(case, interpreter):
    interpret = interpreter(case.length)
    case = dataclasses.replace(case, key_size=64)
    check(case, lambda args: implementation.run(args, interpret=interpret, splits=1))


RACES = [Case("tiles", 1, 192, 1, 64, 128, decay="token"), Case("heads", 1, 256, 2, 64, decay="token")]


@interpreted
@pytest.mark.parametrize("case", quick(RACES, ("tiles",), lambda case: case.name))
def test_barriers_order_all_accesses(case, interpreter):
    """Of two tiles of a head and, in the second case, of two heads, and of dk and dv."""
    arguments, options = case.arguments(jnp.bfloat16)
    how = {"interpret": interpreter(case.length, detect_races=True), "splits": 1, "processors": 1}

    def loss(arguments):
        args = api.normal_form(**arguments, **options)
        return jnp.sum(implementation.run(args, **how)[0].astype(jnp.float32))

    gradients = jax.jit(jax.grad(loss))(arguments)
    assert all(np.isfinite(np.asarray(g, np.float32)).all() for g in gradients.values())
    assert not gpu_interpreter.get_races().races_found


@pytest.mark.slow
@interpreted
def test_gradient_with_a_mask_of_what_is_differentiated(interpreter):
    """Without a differentiated decay the backward pass writes no sums, and its other gradients stay the same."""
    arguments, options = Case("fixed", 1, 64, 1, 64, decay="token").arguments(jnp.bfloat16)

    def gradients(names):
        def loss(some):
            args = api.normal_form(**(arguments | some), **options)
            return jnp.sum(implementation.run(args, interpret=interpreter(64), splits=1)[0].astype(jnp.float32))

        return jax.jit(jax.grad(loss))({name: arguments[name] for name in names})

    fewer, all_of_them = gradients("qkv"), gradients(("q", "k", "v", "log_decay"))
    for name in "qkv":
        np.testing.assert_array_equal(np.asarray(fewer[name], np.float32), np.asarray(all_of_them[name], np.float32))


@pytest.mark.parametrize(("size", "keep"), [(64, 4), (192, 6), (256, 8)])
def test_what_passes_over_a_chunk_is_known_from_kept_states(size, keep):
    """Float64 states of 21 chunks, one of which forgets, and of them those that are kept."""
    assert plans.chunks_between_kept(size, size) == keep
    rng, chunks = np.random.default_rng(0), 21
    decay = np.full((1, chunks, plans.TILE, 1), -0.01)
    decay[:, 5] = -1.0
    weights = np.exp(decay.sum(axis=(0, 2, 3)))
    added, added_cotangents = rng.standard_normal((2, chunks, size, size))
    states, cotangents = [rng.standard_normal((size, size))], [rng.standard_normal((size, size))]
    for c in range(chunks):
        states.append(weights[c] * states[-1] + added[c])
        cotangents.append(weights[chunks - 1 - c] * cotangents[-1] + added_cotangents[chunks - 1 - c])
    cotangents.reverse()
    a, b = np.zeros((2, 1, 1, chunks, plans.TILE))
    a[..., 0] = [np.vdot(states[c], added_cotangents[c]) for c in range(chunks)]
    b[..., 0] = [np.vdot(added[c], cotangents[c + 1]) for c in range(chunks)]
    kept = [*range(0, chunks, keep), chunks - 1]
    with jax.enable_x64(True):
        common = implementation.Common(
            implementation.Config(), 1, jnp.asarray(decay.reshape(1, -1, 1)), None, chunks * plans.TILE
        )
        crossing = implementation._crossing(
            common,
            jnp.asarray(a),
            jnp.asarray(b),
            jnp.asarray(np.stack([states[c] for c in kept]))[None, None],
            jnp.asarray(np.stack([cotangents[c] for c in kept]))[None, None],
            jnp.asarray(np.vdot(states[0], cotangents[0]))[None, None],
            jnp.asarray(cotangents[-1])[None, None],
        )
    expected = [weights[c] * np.vdot(states[c], cotangents[c + 1]) for c in range(chunks)]
    np.testing.assert_allclose(crossing[0, 0], expected, rtol=1e-4, atol=1e-4)


# ---- lowering for CUDA


def lowered(
    sizes: tuple[int, int],
    decay: str | None,
    *,
    gradient: bool,
    length: int = 1000,
    heads: int = 4,
    device_kind: str = H200,
    **more,
):
    """Text of the program for CUDA, of the call or of its gradient in all that has one."""
    shape = {None: None, "head": (heads,), "token": (2, length, heads)}[decay]
    arrays = {name: jax.ShapeDtypeStruct((2, length, heads, sizes[name == "v"]), jnp.bfloat16) for name in "qkv"}
    if shape is not None:
        arrays["log_decay"] = jax.ShapeDtypeStruct(shape, jnp.float32)

    def call(arrays):
        if decay == "head":
            arrays = arrays | {"log_decay": jax.lax.stop_gradient(arrays["log_decay"])}
        return linear_attention(**arrays, implementation="mosaic_gpu", **more)

    def loss(arrays):
        return sum(jnp.sum(x.astype(jnp.float32)) for x in jax.tree.leaves(call(arrays)))

    with dispatch.target("gpu", device_kind=device_kind, qualified_only=False):
        traced = jax.jit(jax.grad(loss) if gradient else call).trace(arrays)
        return traced.lower(lowering_platforms=("cuda",)).as_text()


def launches(text: str) -> int:
    return text.count("@mosaic_gpu")


LOWERED = itertools.product((64, 128, 256), (None, "head", "token"))


@pytest.mark.parametrize(("size", "decay"), quick(LOWERED, ("64-token", "128-head"), joined))
def test_lowers_for_cuda(size, decay):
    assert launches(lowered((size, size), decay, gradient=False)) == 1
    assert launches(lowered((size, size), decay, gradient=True)) == 1  # no forward pass


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [(64, 192), (256, 64), (192, 128)])
def test_unequal_sizes_lower_for_cuda(sizes):
    text = lowered(sizes, "token", gradient=True, scale=0.5, return_state=True, length=77)
    assert launches(text) == 1


def test_constant_decay_is_one_launch_on_arrays_in_place():
    text = lowered((128, 128), "head", gradient=False)
    assert launches(text) == 1
    assert not [line for line in text.splitlines() if "stablehlo.transpose" in line or "stablehlo.pad" in line]


def test_vmapped_axis_joins_the_batch():
    with dispatch.target("gpu", device_kind=H200, qualified_only=False):
        call = jax.vmap(lambda q, g: linear_attention(q, q, q, log_decay=g, implementation="mosaic_gpu"))
        shapes = [jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in ((3, 2, 80, 4, 64), (3, 2, 80, 4))]
        text = jax.jit(call).trace(*shapes).lower(lowering_platforms=("cuda",)).as_text()
    assert launches(text) == 1
    assert "-> tensor<6x80x4x64xbf16>" in text


@pytest.mark.parametrize("decay", quick([None, "head", "token"], ("None",)))
def test_gradient_lowers_inside_shard_map(decay):
    """With types that say over which axes a value varies."""
    mesh = jax.make_mesh((1,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    arrays = {name: jax.ShapeDtypeStruct((2, 80, 4, 64), jnp.bfloat16) for name in "qkv"}
    arrays["initial_state"] = jax.ShapeDtypeStruct((2, 4, 64, 64), jnp.float32)
    specs = dict.fromkeys(arrays, P("x"))
    if decay is not None:
        arrays["log_decay"] = jax.ShapeDtypeStruct((4,) if decay == "head" else (2, 80, 4), jnp.float32)
        specs["log_decay"] = P() if decay == "head" else P("x")

    def loss(arrays):
        if decay == "head":
            arrays = arrays | {"log_decay": jax.lax.stop_gradient(arrays["log_decay"])}
        y, state = linear_attention(**arrays, implementation="mosaic_gpu", return_state=True)
        return jnp.sum(y.astype(jnp.float32)) + jnp.sum(state)

    with dispatch.target("gpu", device_kind=H200, qualified_only=False):
        gradient = jax.shard_map(jax.grad(loss), mesh=mesh, in_specs=(specs,), out_specs=specs)
        text = jax.jit(gradient).trace(arrays).lower(lowering_platforms=("cuda",)).as_text()
    assert launches(text) == 1


def test_splits_add_one_sweep():
    text = lowered((64, 64), "head", gradient=False, length=8192)
    assert launches(text) == 2


# ---- sizes and choices


def chosen(sweeps: list[plans.Plan], pairs: bool = False, **of_all) -> list[plans.Plan]:
    return [plans.with_blocks(dataclasses.replace(plan, **of_all), pairs) for plan in sweeps]


@pytest.mark.parametrize("pairs", [False, True])
@pytest.mark.parametrize("key_size", plans.SIZES)
@pytest.mark.parametrize("value_size", plans.SIZES)
def test_every_launch_fits_in_shared_memory(key_size, value_size, pairs):
    forward = plans.Plan((plans.FORWARD,), key_size, value_size)
    light = plans.Plan((plans.DV,), key_size, value_size, reverse=True, outputs=False, final=True)
    for differentiated in (False, True):
        backward = plans.backward(key_size, value_size, decay=differentiated, scale=True, start=True)
        for sweeps in ([forward], [light], backward):
            for decay in ("token",) if differentiated else (None, "head", "token"):
                launch = chosen(sweeps, pairs, decay=decay, scaled=True)
                assert plans.smem_bytes(*launch) <= plans.SMEM_BYTES
                for plan in launch:
                    assert plan.groups * plan.tiles * plans.TILE == plan.outer
                    assert plan.inner in (key_size, value_size)
                    assert plan.warpgroups == plan.tiles * plan.heads * len(plan.jobs)


@pytest.mark.parametrize("size", plans.SIZES)
def test_two_sweeps_of_the_arrays_give_all_gradients(size):
    """dk and dv are of one sweep, or of two side by side in the same direction."""
    sweeps = plans.backward(size, size)
    assert [job.out for plan in sweeps for job in plan.jobs] == ["dq", "dk", "dv"]
    assert [plan.reverse for plan in sweeps for _ in plan.jobs] == [False, True, True]
    assert len(sweeps) == (2 if size <= 128 else 3)


@pytest.mark.parametrize("size", plans.SIZES)
def test_what_a_decays_gradient_keeps_is_a_fifth_of_the_arrays(size, monkeypatch):
    """Beside dq, dk and dv, over q, k, v, y, dy and these three."""
    shape, written, sweep = (1, 8192, 96, size), {}, kernel.sweep

    def recorded(*arguments):
        outputs = sweep(*arguments)
        written[tuple(outputs)] = sum(x.size * x.dtype.itemsize for x in outputs.values())
        return outputs

    def loss(q, log_decay):
        return jnp.sum(implementation.run(api.normal_form(q, q, q, log_decay=log_decay))[0].astype(jnp.float32))

    monkeypatch.setattr(kernel, "sweep", recorded)
    q = jax.ShapeDtypeStruct(shape, jnp.bfloat16)
    g = jax.ShapeDtypeStruct(shape[:3], jnp.float32)
    with dispatch.target("gpu", device_kind=H200, qualified_only=False):
        jax.eval_shape(jax.grad(loss, argnums=(0, 1)), q, g)
    (backward,) = (number for names, number in written.items() if "dq" in names)
    assert 3 * 2 * q.size < backward <= (3 + 8 * 0.2) * 2 * q.size


@pytest.mark.parametrize("decay", ["head", "token"])
@pytest.mark.parametrize("size", [64, 128, 256])
def test_two_warpgroups_compute(size, decay):
    launch = chosen([plans.Plan((plans.FORWARD,), size, size), *plans.backward(size, size)], pairs=True, decay=decay)
    assert [plan.warpgroups for plan in launch] == [2] * len(launch)
    assert all(plan.stages >= 2 for plan in launch)


@pytest.mark.parametrize("decay", [False, True])
@pytest.mark.parametrize("size", [64, 128])
def test_registers_of_both_gradients_of_the_keys(size, decay):
    dq, both = chosen(plans.backward(size, size, decay=decay), decay="token")
    assert (both.warpgroups, both.tiles) == (2, 1)
    assert max(plans.registers(dq), plans.registers(both)) <= 240


@pytest.mark.parametrize(
    ("sizes", "message"),
    [((192, 192), r"need \d+ bytes of shared memory"), ((64, 128), "one head size, got 64 and 128")],
)
def test_other_gradients_of_the_keys_do_not(sizes, message):
    with pytest.raises(ValueError, match=message):
        plans.with_blocks(plans.Plan((plans.DK, plans.DV), *sizes, reverse=True))


@pytest.mark.parametrize("inner", plans.SIZES)
def test_two_heads_of_a_tile_each_share_a_cta(inner):
    plan = plans.with_blocks(plans.Plan((plans.FORWARD,), inner, 64, decay="token"), pairs=True)
    assert plan.heads == (2 if inner <= 128 else 1)  # the tiles of more channels fill shared memory
    assert plan.warpgroups == plan.heads * plan.tiles


@pytest.mark.slow
def test_pairs_of_heads_lower_for_cuda():
    q, g = jax.ShapeDtypeStruct((2, 80, 4, 64), jnp.bfloat16), jax.ShapeDtypeStruct((2, 80, 4), jnp.float32)

    def loss(q, g):
        y, _ = implementation.run(api.normal_form(q, q, q, log_decay=g), processors=1)
        return jnp.sum(y.astype(jnp.float32))

    with dispatch.target("gpu", device_kind=H200, qualified_only=False):
        traced = jax.jit(jax.grad(loss, argnums=(0, 1))).trace(q, g)
        assert launches(traced.lower(lowering_platforms=("cuda",)).as_text()) == 1


def test_budgets_of_the_forward_sweep():
    plan = plans.with_blocks(plans.Plan((plans.FORWARD,), 128, 128, decay="head"))
    assert (plan.warpgroups, plan.stages) == (2, 3)
    # Three stages of q, k, v, per warpgroup the state, and two barriers per stage.
    assert plans.smem_bytes(plan) == 3 * 3 * 64 * 128 * 2 + 2 * 128 * 64 * 2 + 3 * 2 * 8
    assert plans.registers(plan) <= 240
    with pytest.raises(ValueError, match=r"need \d+ bytes of shared memory"):
        plans.with_blocks(plans.Plan((plans.FORWARD,), 1024, 64))


def test_cuts_are_whole_chunks():
    q = jnp.zeros((1, 192, 1, 64), jnp.bfloat16)
    with pytest.raises(ValueError, match="splits must cut N into whole chunks of 64 tokens, got splits=2 and N=192"):
        implementation.run(api.normal_form(q, q, q), splits=2)


@pytest.mark.parametrize(
    ("call", "splits"),
    [
        ((1, 8192, 96, 128, 128), 1),  # 96 CTAs fill more than half
        ((1, 8192, 4, 64, 64), 16),  # of 33 CTAs per head, those that divide 128 chunks into at least eight each
        ((1, 1 << 20, 1, 64, 64), 64),
        ((1, 8191, 4, 64, 64), 1),  # not whole chunks
        ((1, 512, 4, 64, 64), 1),  # eight chunks in all
        ((8, 1024, 8, 64, 64), 1),  # sixteen chunks: two more launches would take longer
        ((4, 2048, 16, 128, 128), 1),
        ((2, 16384, 16, 128, 128), 4),
    ],
)
def test_split_count(call, splits):
    assert implementation.split_count(132, *call) == splits


def arguments(dtype=jnp.bfloat16, d=64, e=64, decay=None, **options):
    q, k, v = (jnp.zeros((1, 8, 2, size), dtype) for size in (d, d, e))
    return api.normal_form(q, k, v, log_decay=decay, **options)


@pytest.mark.parametrize(
    ("args", "kind", "reason"),
    [
        (lambda: arguments(), "NVIDIA A100-SXM4-80GB", r"compute capability 9.0 \(.*\).* got NVIDIA A100"),
        (lambda: arguments(), "NVIDIA B200", "got NVIDIA B200"),
        (lambda: arguments(), "NVIDIA GeForce RTX 5090", "got NVIDIA GeForce RTX 5090"),
        (lambda: arguments(), None, "got None"),
        (lambda: arguments(jnp.float32), H200, "takes bfloat16, got float32: of float32 .* TF32"),
        (lambda: arguments(jnp.float16), H200, "takes bfloat16, got float16: scores are operands too, and overflow"),
        (lambda: arguments(causal=False), H200, "causal=True alone"),
        (lambda: arguments(normalize=True), H200, "normalize=False alone"),
        (lambda: arguments(decay=jnp.zeros((1, 8, 2, 64))), H200, r"\(H,\) or \(B, N, H\)"),
        (lambda: arguments(d=96), H200, "head sizes 64, 128, 192, 256, got D=96"),
        (lambda: arguments(e=32), H200, "got E=32"),
        (lambda: arguments(chunk_size=128), H200, "chunk_size must be None or 64, got 128"),
    ],
)
def test_refusals(args, kind, reason):
    with dispatch.target("gpu", device_kind=kind, qualified_only=False):
        answers = {answer.name: answer for answer in dispatch.explain(api.OP, args())}
        with pytest.raises(dispatch.UnsupportedError, match=reason):
            dispatch.choose(api.OP, args(), "mosaic_gpu")
    assert not answers["mosaic_gpu"].ok


def differentiated(wrap=lambda f: f, **how):
    """The gradient of a decay per head, through `wrap`, traced for a GPU."""
    q, g = jax.ShapeDtypeStruct((1, 8, 2, 64), jnp.bfloat16), jax.ShapeDtypeStruct((2,), jnp.float32)

    def loss(g, q):
        return jnp.sum(linear_attention(q, q, q, log_decay=g, **how).astype(jnp.float32))

    with dispatch.target("gpu", device_kind=H200, qualified_only=False):
        return jax.jit(jax.grad(wrap(loss))).trace(g, q)


def test_a_differentiated_decay_per_head_goes_to_another_implementation():
    with pytest.raises(dispatch.UnsupportedError, match=r"refuses: it has no gradient of log_decay of shape \(H,\)"):
        differentiated(implementation="mosaic_gpu")
    assert "mosaic_gpu" not in str(differentiated().jaxpr)


@pytest.mark.parametrize("wrap", [jax.jit, jax.checkpoint], ids=["jit", "checkpoint"])
def test_a_decay_per_head_that_is_differentiated_later_raises(wrap):
    with pytest.raises(dispatch.UnsupportedError, match="name another one"):
        differentiated(wrap, implementation="mosaic_gpu")


def test_hopper_chooses_it():
    with dispatch.target("gpu", device_kind=H200, qualified_only=False):
        assert dispatch.choose(api.OP, arguments()).name == "mosaic_gpu"
        assert dispatch.choose(api.OP, dataclasses.replace(arguments(), chunk_size=64)).name == "mosaic_gpu"
        assert dispatch.choose(api.OP, arguments(jnp.float32)).name != "mosaic_gpu"
