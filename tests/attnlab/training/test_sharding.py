"""Rules from logical axes to mesh axes, and the loop on eight devices, moved between meshes, and in two processes."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import AbstractMesh, AxisType
from jax.sharding import PartitionSpec as P

from attnlab.training import ClassificationTask, train
from attnlab.training.sharding import MeshConfig, check_batch_size, mesh_from, shardings, spec
from tests.attnlab.training.toy import Classifier, config, images, losses

ROOT = Path(__file__).parents[3]
MESH = AbstractMesh((2, 2, 4), ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3)


@pytest.mark.parametrize(
    ("shape", "axes", "expected"),
    [
        ((8, 8), ("embed", "heads"), P("fsdp", "tensor")),
        ((8, 8), ("embed", "embed"), P("fsdp", None)),  # a mesh axis cuts one array axis only
        ((7, 8), ("embed", "mlp"), P(None, "tensor")),  # 7 does not divide by 2
        ((8, 6), ("embed", "mlp"), P("fsdp", None)),  # nor 6 by 4
        ((8, 3), ("embed", None), P("fsdp", None)),
        ((8, 8), ("unheard", "vocab"), P(None, "tensor")),
        ((5, 8, 8), ("embed", "heads"), P(None, "fsdp", "tensor")),  # stacked layers
        ((8,), ("embed", "heads"), P()),  # a factor of the second moment
        ((), (), P()),
        ((8, 8), (), P(None, None)),
    ],
)
def test_spec(shape, axes, expected):
    assert spec(shape, axes, MESH) == expected


def test_own_rules_and_their_mistakes():
    assert spec((8,), ("embed",), MESH, {"embed": "tensor"}) == P("tensor")
    assert spec((8,), ("embed",), MESH, {"embed": None}) == P(None)
    with pytest.raises(ValueError, match="the rule for 'embed' names the mesh axis 'tensr': did you mean tensor"):
        spec((8,), ("embed",), MESH, {"embed": "tensr"})


def test_optimizer_states_follow_their_parameters():
    params = nnx.State({"w": nnx.Param(jnp.ones((8, 8)), logical_axes=("embed", "mlp")), "b": nnx.Param(jnp.ones(8))})
    state = optax.adamw(1e-3).init(params)
    mesh = mesh_from(MeshConfig(), jax.devices()[:1])
    moments = shardings(state, mesh)[0]
    for tree in (moments.mu, moments.nu):
        assert [sharding.spec for sharding in jax.tree.leaves(tree)] == [P(None), P("fsdp", "tensor")]  # b, w
    assert moments.count.spec == P()


def test_mesh_from_refuses_what_does_not_fit():
    device = jax.devices()[:1]
    assert dict(mesh_from(MeshConfig(), device).shape) == {"data": 1, "fsdp": 1, "tensor": 1}
    with pytest.raises(ValueError, match="does not fit 1 devices"):
        mesh_from(MeshConfig(data=2), device)
    with pytest.raises(ValueError, match="does not fit 1 devices"):
        mesh_from(MeshConfig(data=-1, tensor=2), device)
    with pytest.raises(ValueError, match="one of them may be -1"):
        mesh_from(MeshConfig(data=-1, fsdp=-1), device)


def test_batch_that_cannot_be_cut_is_refused():
    check_batch_size("a micro-batch", 8, MESH)
    with pytest.raises(ValueError, match="a micro-batch of 6 examples cannot be cut over data x fsdp = 4 devices"):
        check_batch_size("a micro-batch", 6, MESH)


@pytest.mark.slow
def test_eight_devices_compute_what_one_does_and_checkpoints_move_between_them(tmp_path):
    environment = {**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=8"}
    command = [sys.executable, "-m", "tests.attnlab.training.toy", str(tmp_path), "devices"]
    program = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert program.returncode == 0, program.stderr
    results = json.loads(program.stdout.splitlines()[-1])
    assert results["1"]["shard"] == results["moved"]["shard"] == [16, 16]
    assert results["8"]["shard"] == results["loaded"]["shard"] == [8, 8]
    assert results["loaded"]["losses"]["1"] < results["1"]["losses"]["1"]  # it begins where that ended
    for name in ("8", "moved"):
        assert list(results[name]["losses"]) == list(map(str, range(1, 11)))
        for step, loss in results["1"]["losses"].items():
            np.testing.assert_allclose(results[name]["losses"][step], loss, rtol=2e-5, err_msg=f"{name}, step {step}")
        np.testing.assert_allclose(results[name]["eval"], results["1"]["eval"], rtol=2e-5)


@pytest.mark.slow
def test_two_processes_compute_what_one_does_and_stop_together(tmp_path):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"

    def both(mode):
        command = [sys.executable, "-m", "tests.attnlab.training.toy", str(tmp_path), mode, address]
        programs = [
            subprocess.Popen([*command, str(i)], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
            for i in range(2)
        ]
        outputs = [program.communicate(timeout=300) for program in programs]
        return [program.returncode for program in programs], outputs

    # The second process alone gets SIGTERM at step 6; both stop there, and go on together.
    codes, outputs = both("stopped_process")
    assert codes == [143, 143], outputs
    codes, outputs = both("process")
    assert codes == [0, 0], outputs
    first, second = (json.loads(out.splitlines()[-1]) for out, _ in outputs)
    assert first["resumed"] == second["resumed"] == 6
    alone = train(Classifier, ClassificationTask(), images(), config(), tmp_path / "alone", progress=False)
    for step, loss in losses(alone.history).items():
        step = str(step)
        np.testing.assert_allclose(first["losses"][step], loss, rtol=2e-5, err_msg=f"step {step}")
    assert list(first["losses"]) == list(map(str, range(1, 11)))
