import pytest

from attnlab.cli.main import main

TINY_TEXT = [
    *("--data.path", "TEXT", "--model.features", "16", "--model.depth", "1", "--model.num-heads", "2"),
    *("--task.sequence-length", "32", "--train.steps", "3", "--train.batch-size", "4", "--train.dtype", "float32"),
    *("--train.optimizer.warmup-steps", "1", "--train.log-every", "1", "--train.no-tensorboard"),
]


@pytest.fixture(scope="session")
def text_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("the quick brown fox jumps over the lazy dog\n" * 60)
    return path


@pytest.fixture(scope="session")
def tiny_text(text_file):
    """Options that make a language model configuration tiny, on a small file."""
    options = [str(text_file) if option == "TEXT" else option for option in TINY_TEXT]
    return ["wikitext_language_model", *options, "--data.eval-path", "None"]


@pytest.fixture(scope="session")
def text_run(tiny_text, tmp_path_factory):
    """Directory of a language model trained for three steps."""
    directory = tmp_path_factory.mktemp("runs") / "text"
    mixer = ["--model.mixer", "lightning_attention_2", "--model.mixer-options", "{}"]
    assert main(["train", *tiny_text, *mixer, "--out-dir", str(directory)]) == 0
    return directory
