import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import attnlab.data
from attnlab import experiment
from attnlab.cli import configs
from attnlab.nn.masking import SameLabel
from attnlab.nn.rotary import Rotary
from attnlab.registry import Kind, get
from attnlab.training import ConfigMismatch
from experiments import demo, digits_vit
from pallas_kernels.masks import Causal, SlidingWindow

INFO = {
    "image": {"image_shape": (32, 32, 3), "num_classes": 10},
    "text": {"vocab_size": 258},
    "vectors": {"token_features": 6, "responses": 1},
    "image pairs": {"image_shape": (16, 16, 3), "upscale": 1},
}


def info_for(config):
    sizes = dict(INFO[config.model.kind])
    if config.data.name == "digits":
        sizes["image_shape"] = (8, 8, 1)
    if config.data.name == "image_folder":
        sizes["image_shape"] = (config.data.size, config.data.size, 3)
    if config.data.name == "degraded" and config.data.degradation == "downscale":
        sizes["upscale"] = config.data.factor
    return attnlab.data.DatasetInfo(config.data.name, config.model.kind, 10, 10, "digest", **sizes)


@pytest.mark.parametrize("name", configs.names())
def test_configuration_builds_and_survives_json(name, tmp_path):
    config = configs.load(name)
    config.check()
    info = info_for(config)
    (tmp_path / experiment.EXPERIMENT_FILE).write_text(json.dumps(experiment.document(config, info)))
    again, same = experiment.load(tmp_path)
    assert experiment.as_dict(again) == experiment.as_dict(config) and same == info
    model = nnx.eval_shape(lambda: again.model.build(info, dtype=jnp.float32, rngs=nnx.Rngs(0)))
    kind = config.model.kind
    shape = {"text": (16,), "vectors": (16, 6)}.get(kind, info.image_shape)
    dtype = jnp.int32 if kind == "text" else jnp.float32
    out = nnx.eval_shape(lambda m, x: m(x), model, jax.ShapeDtypeStruct((2, *shape), dtype))
    finer = 16 * (info.upscale or 1)
    shapes = {"image": (2, 10), "text": (2, 16, 258), "vectors": (2, 1), "image pairs": (2, finer, finer, 3)}
    assert out.shape == shapes[kind]


@pytest.mark.parametrize("name", configs.names())
def test_docstring_states_its_command(name):
    module = __import__(f"experiments.{name}", fromlist=["CONFIG"])
    assert f"attnlab train {name}" in module.__doc__


def test_demo_compares_registered_mixers_that_fit():
    assert len(demo.IMAGE_MIXERS) >= 5 and "softmax_attention" in demo.IMAGE_MIXERS
    assert set(demo.TEXT_MIXERS) == {"softmax_attention", "lightning_attention_2"}
    for mixer in {*demo.IMAGE_MIXERS, *demo.TEXT_MIXERS}:
        assert get(mixer).kind is Kind.MIXER


def test_loading_refuses_what_it_does_not_know():
    raw = experiment.as_dict(digits_vit.CONFIG)
    with pytest.raises(ValueError, match=r"ViTConfig has no 'depht'.*did you mean depth"):
        experiment.from_dict(raw | {"model": {**raw["model"], "depht": 3}})
    with pytest.raises(ValueError, match=r"no type is called 'Digit'.*did you mean Digits"):
        experiment.from_dict(raw | {"data": {**raw["data"], "type": "Digit"}})


def test_options_come_back_as_what_they_were():
    given = {
        "softmax_attention": {
            "rotary": Rotary(np.float32(500), split=(1, 2)),
            "structural_mask": SlidingWindow(np.int64(7), 0) & ~Causal() | SameLabel(),
            "dtype": jnp.bfloat16,
            "scale": np.float32(0.5),
            "type": "plain",
        }
    }
    raw = json.loads(json.dumps(experiment.as_dict(given)))
    config = configs.load("wikitext_language_model")
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, mixer_options=given))
    again = experiment.from_dict(json.loads(json.dumps(experiment.as_dict(config)))).model.mixer_options
    assert again == given | {"softmax_attention": given["softmax_attention"] | {"dtype": jnp.dtype("bfloat16")}}
    assert experiment._parse_json([json.dumps(raw)]) == again, "and from the command line"
    for wrong, words in (
        ({"activation": jnp.tanh}, r"experiment.activation: .* cannot be read again"),
        ({"a": {"b": [Stranger()]}}, r"experiment.a.b\[0\]: a tests.*Stranger cannot be read again"),
        ({1: 2}, "keys must be text, not 1"),
    ):
        with pytest.raises(ValueError, match=words):
            experiment.as_dict(wrong)
    for name in ("os.system", "attnlab.registry.get", "attnlab.nothing.There"):
        with pytest.raises(ValueError, match="no value class is called"):
            experiment._parse_json([json.dumps({"a": {"type": name}})])


@dataclasses.dataclass(frozen=True)
class Stranger:
    """A value of a class outside the packages."""


def test_parts_must_fit_together():
    config = configs.load("wikitext_language_model")
    with pytest.raises(ValueError, match="LanguageModelConfig is trained for LanguageTask"):
        dataclasses.replace(config, task=digits_vit.CONFIG.task).check()
    with pytest.raises(ValueError, match="takes text data; digits is image"):
        dataclasses.replace(config, data=digits_vit.CONFIG.data).open()
    with pytest.raises(KeyError, match="did you mean hedgehog"):
        model = dataclasses.replace(config.model, mixer_options={"hedgehgo": {}})
        dataclasses.replace(config, model=model).check()


def test_a_registered_backbone_is_a_model_of_experiments(tmp_path):
    sizes = {"features": 8, "num_heads": (2, 2), "depths": (1, 1), "num_agents": (4, 1), "replaced": (None, 0)}
    model = experiment.model_config("agent_attention.swin", **sizes, agent_window=4, window=4, patch_size=2)
    assert model.drop_path == 0.1 and model.mixers == ()
    config = dataclasses.replace(configs.load("cifar10_vit"), model=model)
    config.check()
    (tmp_path / experiment.EXPERIMENT_FILE).write_text(json.dumps(experiment.document(config, info_for(config))))
    again, info = experiment.load(tmp_path)
    assert again == config and type(again.model).__name__ == "AgentSwinConfig"
    built = nnx.eval_shape(lambda: again.model.build(info, rngs=nnx.Rngs(0)))
    assert built.image_shape == (32, 32, 3)
    with pytest.raises(ValueError, match="AgentSwinConfig has no option mixer"):
        config.with_mixer("hedgehog")
    with pytest.raises(ValueError, match=r"agent_attention\.swin has no option 'depth': did you mean depths"):
        experiment.model_config("agent_attention.swin", depth=3)
    with pytest.raises(ValueError, match="hedgehog is a mixer that does not say what data it takes"):
        experiment.model_config("hedgehog")


def test_options_reach_their_mixer_and_no_other():
    config = configs.load("stdlib_language_model")
    model = dataclasses.replace(config.model, mixer_options={"softmax_attention": {"qk_norm": True}})
    config, info = dataclasses.replace(config, model=model), info_for(config)
    sizes = {}
    for mixer in ("softmax_attention", "lightning_attention_2"):
        trial = config.with_mixer(mixer)
        assert trial.mixers == (mixer,)
        trial.check()
        built = nnx.eval_shape(lambda trial=trial: trial.model.build(info, rngs=nnx.Rngs(0)))
        sizes[mixer] = sorted("/".join(map(str, path)) for path, _ in nnx.to_flat_state(nnx.state(built, nnx.Param)))
    assert any("mixer/query_norm" in name for name in sizes["softmax_attention"])
    assert not any("query_norm" in name for name in sizes["lightning_attention_2"])


@pytest.mark.slow
def test_trained_model_is_what_is_loaded(tmp_path):
    config = digits_vit.CONFIG
    config = dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, features=16, depth=1, num_heads=2, patch_size=4),
        train=dataclasses.replace(config.train, steps=2, batch_size=8, eval_every=None, tensorboard=False,
                                  optimizer=dataclasses.replace(config.train.optimizer, warmup_steps=1)),
    )  # fmt: skip
    trained = experiment.run(config, tmp_path, progress=False).model
    images = jax.random.normal(jax.random.key(0), (3, 8, 8, 1))
    np.testing.assert_array_equal(experiment.load_trained(tmp_path)(images), trained(images))


def test_demo_does_not_overwrite_what_an_older_one_left(tmp_path, monkeypatch, capsys):
    def refuse(*arguments, **options):
        raise ConfigMismatch("digits/softmax_attention holds checkpoints of a run with other settings")

    monkeypatch.setattr(demo.runner, "compare", refuse)
    assert demo.main(["--out-dir", str(tmp_path)]) == 2
    said = capsys.readouterr().err
    assert "other settings" in said
    assert f"remove {tmp_path}" in said
