"""Conversion to multi-head latent attention: what is exact is exact, what has no counterpart is refused."""

import numpy as np
import pytest
from flax import nnx

from attnlab import experiment as experiments
from attnlab.attention.dense.mla import MultiHeadLatentAttention
from attnlab.attention.dense.softmax_attention import SoftmaxAttention
from attnlab.contract import UnsupportedArgument
from attnlab.convert import runner, to_mla
from attnlab.interop.mla_upcycling import latent_attention
from tests.accuracy import relative_rms
from tests.attnlab.convert.test_convert import config_of, experiment, text_file  # noqa: F401


def test_one_key_head_and_whole_ranks_lose_nothing():
    """One key head is its own mean; without rotary positions all of attention is kept, biases too."""
    old = SoftmaxAttention(12, num_heads=3, num_kv_heads=1, causal=True, scale=0.4, rngs=nnx.Rngs(0))
    for part in (old.query, old.key, old.value, old.out):
        part.bias[...] = np.random.default_rng(part.bias.size).normal(size=part.bias.shape)
    new = latent_attention(old, kv_rank=16, query_rank=16)
    x = np.random.default_rng(1).normal(size=(2, 7, 12)).astype(np.float32)
    assert relative_rms(new(x), old(x)) < 1e-5
    state = new.init_state(2, 7)
    assert sum(part.shape[-1] for part in (state.keys, state.values)) == 16 + new.core.rope_dim
    assert relative_rms(new.prefill(x, state)[0], old(x)) < 1e-5


def test_less_rank_is_less_exact_and_energy_chooses_it():
    old = SoftmaxAttention(32, num_heads=4, num_kv_heads=1, qkv_bias=False, rngs=nnx.Rngs(0))
    x = np.random.default_rng(1).normal(size=(2, 7, 32)).astype(np.float32)
    errors = [relative_rms(latent_attention(old, kv_rank=rank)(x), old(x)) for rank in (8, 16)]
    assert errors[1] < 1e-5 < 0.05 < errors[0]
    chosen = latent_attention(old, kv_rank=8, kv_energy=0.999, query_energy=0.5)
    assert chosen.core.rank == 16 and chosen.query.in_features < 32


@pytest.mark.parametrize("option", [{"alibi": True}, {"qk_norm": True}, {"softcap": 5.0}, {"value_dim": 2}])
def test_what_latent_attention_lacks_is_refused(option):
    old = SoftmaxAttention(8, num_heads=2, rngs=nnx.Rngs(0), **option)
    with pytest.raises(UnsupportedArgument, match=next(iter(option))):
        latent_attention(old, kv_rank=8)


def test_a_model_is_converted_with_its_weights(text_file, tmp_path):  # noqa: F811
    given_experiment = experiment(text_file, depth=2, mixer=("softmax_attention", "hedgehog"))
    dataset = given_experiment.open()
    model = given_experiment.model.build(dataset.info, dtype=None, rngs=nnx.Rngs(0))
    given = runner.Given(given_experiment, dataset, model, progress=False)
    config, new = to_mla.convert(given, to_mla.Options(run_dir="run", kv_rank=8), tmp_path)
    assert config.mixer == ("mla", "hedgehog") and isinstance(new.blocks.blocks[0].mixer, MultiHeadLatentAttention)
    np.testing.assert_array_equal(new.embedding[...], model.embedding[...])
    tokens = np.arange(8)[None] % dataset.info.vocab_size
    assert relative_rms(new(tokens), model(tokens)) < 0.5  # a random one has 1.4


def test_a_model_without_softmax_attention_is_refused():
    config, _ = config_of(mixer="softmax_attention", mixer_options={"softmax_attention": {"qk_norm": True}})
    with pytest.raises(ValueError, match="softmax_attention has qk_norm=True, and latent attention no such option"):
        to_mla.new_config(config, None)


@pytest.mark.slow
def test_fine_tuning_gives_the_quality_back(text_file, tmp_path):  # noqa: F811
    run = tmp_path / "run"
    experiments.run(experiment(text_file, steps=200, features=32, depth=2), run, progress=False)
    options = to_mla.Options(run_dir=str(run), tune_steps=150, rank=None, kv_rank=16)
    quality = runner.convert(options, progress=False).quality
    before, converted, tuned = (quality[stage]["loss"] for stage in runner.STAGES)
    assert before < converted and tuned - before < 0.3 * (converted - before), quality
    assert experiments.load_trained(tmp_path / "run_mla").blocks.blocks[0].mixer.core.rank == 16
