"""Conversions of language models: what is carried over, what is refused, and a whole one on a small trained model."""

import dataclasses
import json

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import attnlab.data
from attnlab import experiment as experiments
from attnlab.attention.dense.softmax_attention import SoftmaxAttention
from attnlab.attention.linear.hedgehog import HedgehogAttention
from attnlab.cli.main import main
from attnlab.convert import runner, to_hedgehog
from attnlab.convert.carry_over import carry_over
from attnlab.experiment import Experiment, LanguageModelConfig
from attnlab.training import LanguageTask, OptimizerConfig, TrainConfig
from tests.conformance.subjects import close


def experiment(path, *, steps=2, **model):
    sizes = {"features": 16, "depth": 1, "num_heads": 2, "mixer": "softmax_attention"}
    return Experiment(
        model=LanguageModelConfig(**(sizes | model)),
        data=attnlab.data.TextFiles(path=str(path)),
        task=LanguageTask(sequence_length=24),
        train=TrainConfig(
            steps=steps,
            batch_size=8,
            tensorboard=False,
            optimizer=OptimizerConfig(learning_rate=1e-2, warmup_steps=1, weight_decay=0.0),
        ),
    )


@pytest.fixture(scope="module")
def text_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    rng = np.random.default_rng(0)
    words = ["attention", "linear", "softmax", "a", "of", "weights", "keys"]
    path.write_text("\n".join(" ".join(rng.permutation(words)) for _ in range(200)))
    return path


def config_of(**options):
    model = LanguageModelConfig(features=16, depth=2, num_heads=2, **options)
    return model, nnx.eval_shape(lambda: model.cls(11, features=16, depth=2, num_heads=2, **options, rngs=nnx.Rngs(0)))


def test_the_new_configuration_keeps_what_both_have():
    options = {"softmax_attention": {"num_kv_heads": 1, "out_bias": False, "scale": 0.3}}
    config, model = config_of(mixer="softmax_attention", mixer_options=options)
    new = to_hedgehog.new_config(config, model, {"feature_dim": 4})
    assert new.mixer == "hedgehog"
    assert new.mixer_options == {
        "hedgehog": {"num_kv_heads": 1, "qkv_bias": True, "out_bias": False, "zero_init": True, "feature_dim": 4}
    }
    config, model = config_of(mixer=("lightning_attention_2", "softmax_attention"))
    assert to_hedgehog.new_config(config, model, {}).mixer == ("lightning_attention_2", "hedgehog")


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"mixer": "lightning_attention_2"}, "no layer is softmax_attention; the mixers are lightning_attention_2"),
        (
            {"mixer": "softmax_attention", "mixer_options": {"softmax_attention": {"qk_norm": True}}},
            "softmax_attention has qk_norm=True, and Hedgehog's attention no such option",
        ),
    ],
)
def test_what_has_no_counterpart_is_refused(options, text):
    with pytest.raises(ValueError, match=text):
        to_hedgehog.new_config(*config_of(**options), {})


def test_weights_are_carried_over_by_their_paths():
    old = SoftmaxAttention(8, num_heads=2, causal=True, rngs=nnx.Rngs(0))
    options = {"num_heads": 2, "qkv_bias": True, "out_bias": True, "rngs": nnx.Rngs(1)}

    def new(path):
        return "query_map" in path or "key_map" in path

    mixer = carry_over(old, HedgehogAttention(8, **options), new=new)
    np.testing.assert_array_equal(mixer.out.bias[...], old.out.bias[...])
    np.testing.assert_array_equal(mixer.key.kernel[...], old.key.kernel[...])
    with pytest.raises(ValueError, match="its key_map/kernel is not in the other; its query_map/kernel"):
        carry_over(old, HedgehogAttention(8, **options), new=lambda path: False)
    with pytest.raises(ValueError, match="query/bias has no place in it"):
        carry_over(old, HedgehogAttention(8, **options | {"qkv_bias": False}), new=new)
    with pytest.raises(ValueError, match=r"query/kernel is \(8, 2, 4\), its own \(8, 4, 2\)"):
        carry_over(old, HedgehogAttention(8, **options | {"num_heads": 4}), new=new)


def test_a_model_that_imitates_perfectly_has_no_divergence():
    """The linear layer against itself in the teacher's place."""
    config = LanguageModelConfig(features=8, depth=1, num_heads=2, mixer="hedgehog")
    teacher = config.cls(11, features=8, depth=1, num_heads=2, mixer=config.mixer, rngs=nnx.Rngs(0))
    maps = to_hedgehog.Maps(teacher, [nnx.clone(teacher.blocks.blocks[0].mixer)], (0,))
    tokens = jnp.asarray([[1, 2, 3, 4, 5, 6], [3, 3, 9, 0, 0, 0]])
    segments = jnp.asarray([[0, 0, 1, 1, 1, 1], [0, 0, 0, 1, 1, 1]])
    cross_entropy, entropy = maps(tokens, segment_ids=segments)
    close(cross_entropy, entropy, 1e-5)
    task = to_hedgehog.MapsTask(6, positions=False)
    batch = {"inputs": tokens, "segment_ids": segments, "weight": jnp.asarray([[1.0] * 6, [0.0] * 6])}
    metrics = task.metrics({k: float(v) for k, v in task.sums(maps, batch, deterministic=True).items()})
    assert metrics["loss"] == pytest.approx(float(entropy[0]), rel=1e-5) and abs(metrics["divergence"]) < 1e-5


@pytest.mark.slow
def test_one_command_converts_a_run(text_file, tmp_path, capsys):
    """Two steps of everything: the new run generates, a second call finds it finished, another one is refused."""
    run = tmp_path / "run"
    experiments.run(experiment(text_file), run, progress=False)
    arguments = ["convert", str(run), "--distill-steps", "2", "--tune-steps", "2", "--rank", "2"]
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    for stage in runner.STAGES:
        assert stage in printed
    new = tmp_path / "run_hedgehog"
    assert main(["generate", str(new), "--prompt", "linear", "--max-new-tokens", "3"]) == 0
    assert capsys.readouterr().out.startswith("linear")
    quality = json.loads((new / "conversion.json").read_text())["quality"]
    assert set(quality) == set(runner.STAGES) and all(q["loss"] > 0 for q in quality.values())
    model = experiments.load_trained(new)
    assert isinstance(model.blocks.blocks[0].mixer, HedgehogAttention)
    old = experiments.load_trained(run)
    np.testing.assert_array_equal(model.embedding[...], old.embedding[...])  # low-rank changes are of the mixers
    assert not np.array_equal(
        model.blocks.blocks[0].mixer.query.kernel[...], old.blocks.blocks[0].mixer.query.kernel[...]
    )
    assert main(arguments) == 0  # from what is there
    assert main([*arguments, "--rank", "3"]) == 2
    assert "holds a conversion with another rank" in capsys.readouterr().err
    longer, _ = experiments.load(new)
    longer = dataclasses.replace(longer, train=dataclasses.replace(longer.train, steps=3))
    assert experiments.run(longer, new, progress=False).steps == 3


def test_mistakes_are_named(tmp_path, capsys):
    assert main(["convert", "--help"]) == 0
    assert "hedgehog" in capsys.readouterr().out
    assert main(["convert", str(tmp_path), "--to", "hedgehg"]) == 2
    assert "did you mean hedgehog" in capsys.readouterr().err
    assert main(["convert", str(tmp_path)]) == 2
    assert "no such file" in capsys.readouterr().err
    assert main(["convert", str(tmp_path), "--distill-steps", "0"]) == 2
    assert "distill_steps must be at least 1" in capsys.readouterr().err


@pytest.mark.slow
def test_quality_survives_the_conversion(text_file, tmp_path):
    """A trained softmax model: distilled maps are better than the identity, and fine-tuning gives most of it back."""
    run = tmp_path / "run"
    experiments.run(experiment(text_file, steps=200, features=32, depth=2), run, progress=False)
    common = {"run_dir": str(run), "tune_steps": 100, "rank": 4}
    found = {
        steps: runner.convert(
            to_hedgehog.Options(**common, distill_steps=steps, out_dir=str(tmp_path / f"hedgehog{steps}")),
            progress=False,
        ).quality
        for steps in (1, 150)
    }
    loss = {steps: [quality[stage]["loss"] for stage in runner.STAGES] for steps, quality in found.items()}
    before, converted, tuned = loss[150]
    assert converted < loss[1][1], loss
    assert tuned < converted, loss
    assert tuned - before < 0.3 * (loss[1][1] - before), loss
