import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from attnlab.interventions.act_calibration import AttentionCalibration, calibrate_sinks, received_attention
from attnlab.interventions.parts import move_mass
from attnlab.models.language_model import LanguageModel
from attnlab.points import attach

SCORES = jnp.where(jnp.tri(9, dtype=bool), jax.random.normal(jax.random.key(0), (2, 3, 9, 9)), -jnp.inf)
WEIGHTS = jax.nn.softmax(SCORES.at[..., 0].add(3).at[:, :2, :, 4].add(jnp.where(jnp.arange(9) >= 4, 4, 0)))


def test_sinks_keep_a_share_and_rows_their_sums():
    moved = calibrate_sinks(WEIGHTS, beta=0.3, theta=0.25)
    np.testing.assert_allclose(moved.sum(-1), 1, rtol=1e-5)
    received = received_attention(WEIGHTS)
    assert received[0, 0, 4] > 0.25 and received[0, 0, 0] > 0.25
    np.testing.assert_allclose(moved[:, :2, 4:, 4], 0.3 * WEIGHTS[:, :2, 4:, 4], rtol=1e-6)
    assert (moved[:, :2, 5:, 0] > WEIGHTS[:, :2, 5:, 0]).all(), "the first sink is spared, and takes its share"
    np.testing.assert_allclose(calibrate_sinks(WEIGHTS, beta=1.0), WEIGHTS, rtol=1e-6)
    some = calibrate_sinks(WEIGHTS, heads=(1,), beta=0.3, theta=0.25)
    np.testing.assert_array_equal(some[:, [0, 2]], WEIGHTS[:, [0, 2]])
    np.testing.assert_allclose(some[:, 1], moved[:, 1], rtol=1e-6)
    with pytest.raises(ValueError, match="heads must be among the 3"):
        calibrate_sinks(WEIGHTS, heads=(3,))


def test_mass_stays_where_there_is_nothing_to_move_it_to():
    row = jnp.asarray([[[[0.5, 0.5, 0.0]]]])
    flags = jnp.asarray([True, True, False])
    np.testing.assert_array_equal(move_mass(row, flags, True, kept=0.2), row)
    np.testing.assert_allclose(move_mass(row, flags[::-1], True, kept=0.5)[0, 0, 0], [0.75, 0.25, 0.0])


@pytest.mark.slow
def test_padded_prompts_are_calibrated_as_if_alone_and_steps_not_at_all():
    model = LanguageModel(11, features=8, depth=1, num_heads=2, rngs=nnx.Rngs(0))
    model = attach(model, AttentionCalibration(beta=0.1, theta=0.05))
    ids = np.random.default_rng(0).integers(0, 11, (1, 7))
    whole, state = model.prefill(ids, model.init_state(1, 8))
    np.testing.assert_allclose(whole, model(ids), atol=1e-5)
    mask = jnp.arange(9)[None] >= 2
    padded = model.prefill(np.pad(ids, ((0, 0), (2, 0))), model.init_state(1, 9), mask=mask)[0]
    np.testing.assert_allclose(padded[:, 2:], whole, atol=1e-5)
    plain = model.step(ids[:, 0], state)[0]
    assert jnp.isfinite(plain).all()
