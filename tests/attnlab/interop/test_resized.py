"""The authors' tables of another image size."""

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import attnlab
from attnlab.contract import Layout, Site
from attnlab.interop.names import StateDictError
from attnlab.interop.resized import resized_to
from attnlab.interop.weights import find, load
from attnlab.nn.resampling import resize_bicubic

RNG = np.random.default_rng(0)


def line(values: np.ndarray, count: int) -> np.ndarray:
    """Linear interpolation between centres of pixels, the outermost values beyond them."""
    places = (np.arange(count) + 0.5) * len(values) / count - 0.5
    return np.interp(places, np.arange(len(values)), values)


def agent(side: int, seed: int = 0):
    site = Site(16, 2, layout=Layout.IMAGE, grid=(side, side))
    return attnlab.create("agent_attention", site, num_agents=4, rngs=nnx.Rngs(seed))


def test_agent_biases_of_another_image_size():
    small, large = agent(4), agent(6, seed=1)
    (official, *_) = [each for each in find(small) if each.symbol == "AgentAttention" and each.when == "num_patches"]
    arrays = official.dump(small)
    with pytest.raises(StateDictError):
        load(large, arrays)
    load(large, arrays, resize=True)
    for name in ("aggregate_row", "aggregate_column"):
        table, got = small.core, large.core
        table, got = np.asarray(getattr(table, name)[...]), np.asarray(getattr(got, name)[...])
        axis = next(axis for axis, (a, b) in enumerate(zip(table.shape, got.shape, strict=True)) if a != b)
        want = np.apply_along_axis(line, axis, table, 6)
        np.testing.assert_allclose(got, want, atol=1e-6)
    np.testing.assert_array_equal(small.query.kernel[...], large.query.kernel[...])


@pytest.mark.parametrize(
    ("name", "old", "new", "want"),
    [
        ("a.relative_position_bias_table", (9, 2), (25, 2), lambda x: bicubic(x, 3, 5)),
        ("pos_embed", (1, 10, 2), (1, 17, 2), lambda x: np.concatenate([x[0, :1], bicubic(x[0, 1:], 3, 4)])[None]),
        ("a.ha_bias", (1, 2, 3, 1, 4), (1, 2, 5, 1, 4), lambda x: np.apply_along_axis(line, 2, x, 5)),
        ("patch_embed.proj.weight", (2, 3, 4, 4), (2, 3, 2, 2), None),
        ("other.weight", (4, 2), (5, 2), lambda x: x),
        ("pos_embed", (1, 10, 2), (1, 16, 2), lambda x: x),
        ("a.relative_position_bias_table", (8, 2), (25, 2), lambda x: x),
    ],
)
def test_tables_by_their_names(name, old, new, want):
    table = RNG.normal(size=old).astype(np.float32)
    got = resized_to({name: jnp.zeros(new)}, {name: table})[name]
    if want is None:
        assert got.shape == new
    else:
        np.testing.assert_allclose(got, want(table), atol=1e-6)


def bicubic(table: np.ndarray, old: int, new: int) -> np.ndarray:
    square = table.reshape(1, old, old, -1)
    return np.asarray(resize_bicubic(square, (new, new))).reshape(new * new, -1)
