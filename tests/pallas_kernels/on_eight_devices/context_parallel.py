"""One sequence cut over devices gives what one device does, and devices exchange nothing but states."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from pallas_kernels import linear_attention
from pallas_kernels.linear_attention.cases import Case
from tests.pallas_kernels.eight_devices import collectives

FORMS = {
    "head": {"decay": "head", "heads": 4, "kv_heads": 2, "initial_state": True},
    "token": {"decay": "token", "initial_state": True},
    "channel": {"decay": "channel", "initial_state": True},
    "strong_token": {"decay": "token", "strength": 20.0},
    "normalized": {"normalize": True, "initial_state": True},
    "normalized_token": {"decay": "token", "normalize": True, "heads": 4, "kv_heads": 2},
    "packed": {"segments": 5, "initial_state": True},
    "packed_head": {"decay": "head", "segments": 5},
    "packed_channel": {"decay": "channel", "segments": 3, "normalize": True, "initial_state": True},
    "full": {"causal": False, "initial_state": True},
    "full_normalized": {"causal": False, "normalize": True, "heads": 4, "kv_heads": 2},
}


def mesh_of(devices: int):
    return jax.make_mesh((devices,), ("seq",), axis_types=(AxisType.Auto,), devices=jax.devices()[:devices])


def in_parts(options, ids, arguments, mesh):
    """(y, state) of arguments whose tokens are cut over `mesh`."""

    def spec(name, x):
        return P(None, "seq") if name in "qkv" or (name == "log_decay" and x.ndim > 1) else P()

    specs = {name: jax.tree.map(lambda x, name=name: spec(name, x), x) for name, x in arguments.items()}

    def local(arguments, ids):
        return linear_attention(**arguments, **options, segment_ids=ids, return_state=True, axis_name="seq")

    ids_spec = None if ids is None else P(None, "seq")
    return jax.shard_map(local, mesh=mesh, in_specs=(specs, ids_spec), out_specs=(P(None, "seq"), P()))(arguments, ids)


def loss_of(outputs):
    leaves = [x.astype(jnp.float32) for x in jax.tree.leaves(outputs)]
    # Not vdot: it flattens, and gathers what is cut along an inner axis.
    return sum(jnp.sum(x * jnp.cos(jnp.arange(x.size, dtype=x.dtype)).reshape(x.shape)) for x in leaves)


def evaluated(run, arguments):
    def loss(arguments):
        outputs = run(arguments)
        return loss_of(outputs), outputs

    (_, outputs), gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))(arguments)
    return outputs, gradients


def assert_alike(got, want, tolerance):
    for (path, g), w in zip(jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(want), strict=True):
        g, w = np.asarray(g, np.float64), np.asarray(w, np.float64)
        error = np.sqrt(np.mean((g - w) ** 2)) / (np.sqrt(np.mean(w**2)) or 1.0)
        assert error < tolerance, (jax.tree_util.keystr(path), error)


@pytest.mark.parametrize("name", FORMS)
def test_equals_one_device(name):
    devices = 3 if name in ("token", "packed_head") else 8
    arguments, options = Case(f"context_{name}", 2, 24 * devices, **FORMS[name]).arguments()
    ids = options.pop("segment_ids", None)
    ids = None if ids is None else jnp.asarray(ids)

    def whole(arguments):
        return linear_attention(**arguments, **options, segment_ids=ids, return_state=True)

    want = evaluated(whole, arguments)
    got = evaluated(lambda arguments: in_parts(options, ids, arguments, mesh_of(devices)), arguments)
    assert_alike(got[0], want[0], 1e-6)
    assert_alike(got[1], want[1], 2e-6)


def test_half_precision():
    arguments, options = Case("context_half", 2, 512, key_size=32, decay="token").arguments(jnp.bfloat16)
    exact = jax.tree.map(lambda x: x.astype(jnp.float32), arguments)
    got = evaluated(lambda arguments: in_parts(options, None, arguments, mesh_of(8)), arguments)
    want = evaluated(lambda arguments: linear_attention(**arguments, **options, return_state=True), exact)
    assert_alike(got[0], want[0], 4e-3)
    assert_alike(got[1], want[1], 8e-3)


def test_a_run_crosses_borders_and_may_start_at_one():
    x = Case("runs", 1, 64).arguments()[0]
    whole = jax.jit(lambda ids: linear_attention(**x, segment_ids=ids, return_state=True))
    parts = jax.jit(lambda ids: in_parts({}, ids, x, mesh_of(8)))
    for starts in ((8, 16), (12,), (1, 24, 25), ()):
        ids = np.zeros((1, 64), int)
        ids[:, list(starts)] = 1
        ids = jnp.asarray(np.cumsum(ids, axis=1) % 2)  # an id comes again, in a run of its own
        assert_alike(parts(ids), whole(ids), 1e-6)


@pytest.mark.parametrize("name", ["head", "packed_channel", "full"])
def test_what_is_exchanged_does_not_grow_with_the_sequence(name):
    """Forward: a state from each of 1, 1, 2, 4 shards before; backward likewise; nothing else."""
    sent = {}
    for length in (128, 512):
        arguments, options = Case(f"exchange_{name}", 1, length, **FORMS[name]).arguments()
        ids = options.pop("segment_ids", None)
        ids = None if ids is None else jnp.asarray(ids)

        def run(arguments, options=options, ids=ids):
            return loss_of(in_parts(options, ids, arguments, mesh_of(8)))

        cut = NamedSharding(mesh_of(8), P(None, "seq"))
        placed = {
            name: jax.device_put(x, cut) if name in "qkv" or (name == "log_decay" and x.ndim > 1) else x
            for name, x in arguments.items()
        }
        forward = collectives(jax.jit(run).lower(placed).compile())
        both = collectives(jax.jit(jax.value_and_grad(run)).lower(placed).compile())
        sent[length] = forward, both
        state = arguments["q"].shape[2] * 16 * (16 + options["normalize"])
        assert max(int(np.prod(shape)) for _, shape in both) == state
        assert {kind for kind, _ in both} <= {"collective-permute", "all-reduce"}
        if options["causal"]:
            assert sum(int(np.prod(shape)) == state for kind, shape in forward if kind == "collective-permute") == 4
            assert sum(int(np.prod(shape)) == state for kind, shape in both if kind == "collective-permute") == 8
    assert sent[128] == sent[512]


@pytest.mark.parametrize("decay", ["head", "token", "channel"])
def test_batch_and_heads_cut_under_jit(decay):
    """XLA gathers no operand, forward or backward; the gradient of a decay per head is summed over the batch."""
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    arguments, options = Case("cut", 4, 150, heads=4, kv_heads=2, decay=decay, initial_state=True).arguments()

    def place(name, x):
        of_tokens = P("data", None, "model")
        spec = {"initial_state": P("data", "model"), "log_decay": P("model") if x.ndim == 1 else of_tokens}
        return jax.device_put(x, NamedSharding(mesh, spec.get(name, of_tokens)))

    def run(arguments):
        return linear_attention(**arguments, **options, return_state=True)

    def grad(arguments):
        return jax.value_and_grad(lambda arguments: loss_of(run(arguments)))(arguments)

    placed = {name: place(name, x) for name, x in arguments.items()}
    want = grad(arguments)
    compiled = jax.jit(grad).lower(placed).compile()
    sent = collectives(compiled)
    assert {kind for kind, _ in sent} <= {"all-reduce"}, sent
    assert all(int(np.prod(shape)) <= 4 for _, shape in sent), sent
    assert_alike(compiled(placed)[1], want[1], 2e-6)
