import dataclasses
import json

import pytest

from attnlab import experiment
from attnlab.cli import configs
from attnlab.cli.main import main


def err_of(capsys, *arguments, code=2):
    assert main(arguments) == code
    err = capsys.readouterr().err
    assert "Traceback" not in err
    return err


def test_configuration_is_needed_and_listed(capsys):
    err = err_of(capsys, "train")
    assert "digits_vit" in err and "usage: attnlab train CONFIG" in err


def test_misspelt_configuration_gets_a_suggestion(capsys):
    assert "did you mean digits_vit?" in err_of(capsys, "train", "digits_vitt")


def test_misspelt_mixer_gets_a_suggestion(capsys):
    err = err_of(capsys, "train", "digits_vit", "--dry-run", "--model.mixer", "hedgehogg")
    assert "no variant is called 'hedgehogg'" in err and "hedgehog" in err


def test_misspelt_option_gets_a_suggestion(capsys):
    err = err_of(capsys, "train", "digits_vit", "--train.stepz", "3", "--dry-run")
    assert "--train.stepz" in err and "--train.steps" in err


def test_value_of_a_wrong_type_is_refused(capsys):
    assert "--train.steps" in err_of(capsys, "train", "digits_vit", "--dry-run", "--train.steps", "many")


def test_pooling_is_no_mixer(capsys):
    assert "is a pooling" in err_of(capsys, "train", "digits_vit", "--dry-run", "--model.mixer", "efficient_probing")


def test_missing_data_says_where_to_get_it(capsys, tmp_path):
    err = err_of(capsys, "train", "cifar10_vit", "--data.path", str(tmp_path / "no"), "--out-dir", str(tmp_path / "o"))
    assert "cs.toronto.edu" in err


def test_configuration_is_printed_in_full_with_overrides(capsys):
    arguments = ["--train.steps", "7", "--model.mixer", "hedgehog", "agent_attention", "--data.augment.padding", "0"]
    assert main(["train", "digits_vit", "--dry-run", *arguments]) == 0
    lines = [line.strip() for line in capsys.readouterr().out.splitlines()]
    for line in ("train.steps = 7", "model.mixer = ('hedgehog', 'agent_attention')", "data.augment.padding = 0"):
        assert line in lines
    for part in ("model", "data", "task", "train"):
        config = getattr(configs.load("digits_vit"), part)
        for field in dataclasses.fields(config):
            assert any(line.startswith(f"{part}.{field.name}") for line in lines), field.name


def test_mixer_options_are_json(capsys):
    options = '{"softmax_attention": {"qk_norm": true}}'
    assert main(["train", "digits_vit", "--dry-run", "--model.mixer-options", options]) == 0
    assert "model.mixer_options = {'softmax_attention': {'qk_norm': True}}" in capsys.readouterr().out
    assert "not JSON" in err_of(capsys, "train", "digits_vit", "--dry-run", "--model.mixer-options", "{qk")


def test_own_file_with_config_function(tmp_path, capsys):
    file = tmp_path / "mine.py"
    file.write_text(
        "import dataclasses\nfrom experiments.digits_vit import CONFIG as base\n"
        "def config():\n    return dataclasses.replace(base, train=dataclasses.replace(base.train, steps=11))\n"
    )
    assert main(["train", str(file), "--dry-run"]) == 0
    assert "train.steps = 11" in capsys.readouterr().out
    file.write_text("def config(:\n")
    assert f"{file}:1" in err_of(capsys, "train", str(file))
    file.write_text("CONFIG = 3\n")
    assert "defines no CONFIG" in err_of(capsys, "train", str(file))
    assert "no such file" in err_of(capsys, "train", str(tmp_path / "other.py"))


def test_run_saves_its_experiment_and_goes_on(text_run, capsys):
    saved, info = experiment.load(text_run)
    assert saved.train.steps == 3 and saved.model.features == 16 and info.kind == "text"
    lines = [json.loads(line) for line in (text_run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if line["split"] == "train"] == [1, 2, 3]
    assert main(["train", str(text_run), "--train.steps", "4"]) == 0
    lines = [json.loads(line) for line in (text_run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if line["split"] == "train"] == [1, 2, 3, 4]
    assert experiment.load(text_run)[0].train.steps == 4


def test_other_settings_in_the_same_directory_are_refused(text_run, capsys):
    before = (text_run / experiment.EXPERIMENT_FILE).read_text()
    err = err_of(capsys, "train", str(text_run), "--train.optimizer.learning-rate", "0.5")
    assert "learning_rate" in err and "0.5" in err
    assert "warmup_steps=50" in err_of(capsys, "train", str(text_run), "--train.optimizer.warmup-steps", "50")
    assert (text_run / experiment.EXPERIMENT_FILE).read_text() == before


def test_seeds_and_directories_out_of_range_are_mistakes(tiny_text, capsys, tmp_path):
    assert "seed must lie in 0..2**32 - 1" in err_of(capsys, "train", *tiny_text, "--train.seed", "1" * 20)
    assert "no name in UTF-8" in err_of(capsys, "train", *tiny_text, "--out-dir", f"{tmp_path}/\udcff")


def generated(capsys, text_run, *options):
    assert main(["generate", str(text_run), "--prompt", "the ", "--max-new-tokens", "12", *options]) == 0
    return capsys.readouterr().out


def test_generate_is_reproducible_by_seed(text_run, capsys):
    first = generated(capsys, text_run, "--seed", "1")
    assert first.startswith("the ") and generated(capsys, text_run, "--seed", "1") == first
    assert generated(capsys, text_run, "--seed", "2") != first


def test_generate_stops_before_a_stop_text(text_run, capsys):
    greedy = generated(capsys, text_run, "--temperature", "0").removesuffix("\n")
    stop = greedy[len("the ") + 3]
    cut = generated(capsys, text_run, "--temperature", "0", "--stop", stop).removesuffix("\n")
    assert cut == "the " + greedy[len("the ") :].partition(stop)[0] and len(cut) < len(greedy)


@pytest.mark.parametrize(
    "option", [("--top-p", "3"), ("--top-k", "0"), ("--max-new-tokens", "0"), ("--stop", ""), ("--seed", "1" * 20)]
)
def test_generate_refuses_values_out_of_range(text_run, capsys, option):
    err = err_of(capsys, "generate", str(text_run), "--prompt", "the", *option)
    assert option[0].strip("-").replace("-", "_") in err.replace("-", "_")


def test_generate_needs_a_run(tmp_path, capsys):
    assert "no such file" in err_of(capsys, "generate", str(tmp_path), "--prompt", "a")
