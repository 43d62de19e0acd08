"""`lit-stability completion`: what bash offers, with its own script."""

import shutil
import subprocess
import sys

import pytest

from lit_stability.cli.main import main

ASK = """
source "$1"; shift
COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); COMPREPLY=()
_shtab_lit_stability
printf '%s\\n' "${COMPREPLY[@]}"
"""


@pytest.fixture
def script(tmp_path, monkeypatch, capsys):
    pytest.importorskip("shtab")
    if shutil.which("bash") is None:
        pytest.skip("there is no bash")
    assert main(["completion", "bash"]) == 0
    file = tmp_path / "complete.sh"
    file.write_text(capsys.readouterr().out)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "my_run.yaml").touch()
    (tmp_path / "saved.ckpt").touch()
    return file


@pytest.mark.parametrize(
    ("words", "offered"),
    [
        (["do"], ["doctor"]),
        (["fit", "--na"], ["--name"]),
        (["fit", "-c", "my"], ["my_run"]),
        (["fit", "-c", "configs/my"], ["configs/my_run.yaml"]),
        (["doctor", "sav"], ["saved.ckpt"]),
        (["completion", ""], ["bash", "zsh", "tcsh"]),
    ],
)
def test_bash_offers_commands_options_configs_and_files(words, offered, script):
    asked = ["bash", "-c", ASK, "ask", str(script), "lit-stability", *words]
    done = subprocess.run(asked, capture_output=True, text=True, check=True)
    assert done.stdout.split() == offered


@pytest.mark.parametrize("shell", ["zsh", "tcsh"])
def test_scripts_of_other_shells_are_printed(shell, capsys):
    pytest.importorskip("shtab")
    assert main(["completion", shell]) == 0
    assert "lit-stability" in capsys.readouterr().out


def test_without_the_package_the_message_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "shtab", None)
    assert main(["completion", "bash"]) == 2
    assert "pip install 'lit-stability[completion]'" in capsys.readouterr().err
