import os
import subprocess
import sys

import pytest

import attnlab
from attnlab.cli import main as cli
from attnlab.cli.main import main


def run(capsys, *arguments):
    code = main(arguments)
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_help_names_every_command(capsys):
    code, out, _ = run(capsys, "--help")
    assert code == 0
    for command in ("train", "compare", "generate", "list", "show", "doctor"):
        assert f"  {command} " in out


def test_no_command_is_a_mistake(capsys):
    code, out, _ = run(capsys)
    assert code == 2 and "usage: attnlab" in out


def test_version(capsys):
    assert run(capsys, "--version")[:2] == (0, f"{attnlab.__version__}\n")


def test_misspelt_command_gets_a_suggestion(capsys):
    code, _, err = run(capsys, "lits")
    assert code == 2
    assert "no command is called 'lits'" in err and "did you mean list?" in err


def test_a_mistake_has_no_traceback_and_debug_gives_it(capsys):
    code, _, err = run(capsys, "show", "agent_atention")
    assert code == 2
    assert "did you mean agent_attention" in err and "Traceback" not in err
    with pytest.raises(KeyError, match="agent_atention"):
        main(["show", "agent_atention", "--debug"])


def test_message_of_a_key_error_has_no_extra_quotes():
    assert cli.message(KeyError("no such thing")) == "no such thing"
    assert cli.message(ValueError()) == "ValueError"


def test_help_list_and_show_import_no_training():
    code = """
import sys
from attnlab.cli.main import main
assert main(["--help"]) == 0 and main(["list"]) == 0 and main(["show", "softmax_attention"]) == 0
heavy = {"orbax.checkpoint", "tensorboardX", "sklearn", "grain", "matplotlib", "attnlab.training"} & set(sys.modules)
assert not heavy, heavy
"""
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("device", ["accel0", "vfio/0", None])
def test_libtpu_is_told_that_there_is_no_tpu_where_there_is_none(device, tmp_path, monkeypatch):
    monkeypatch.setattr(cli, "DEVICES", tmp_path)
    for name in cli.WITHOUT_TPU:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TPU_WORKER_HOSTNAMES", "mine")
    if device is not None:
        (tmp_path / device).parent.mkdir(exist_ok=True)
        (tmp_path / device).touch()
    cli.quiet()
    found = {name: os.environ[name] for name in cli.WITHOUT_TPU if name in os.environ}
    expected = cli.WITHOUT_TPU if device is None else {}
    assert found == expected | {"TPU_WORKER_HOSTNAMES": "mine"}
