"""The command, in the process: what it prints and writes, and its exit codes."""

import json
import math
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lit_stability import find_last_good
from lit_stability.cli.main import main
from lit_stability.faults import NanLoss
from tests.checks.checkpoint.examples import checkpoint_of
from tests.conftest import Regression


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run's folder with a checkpoint in it and good ones below."""
    folder = tmp_path_factory.mktemp("run")
    checkpoint_of(folder, Regression)
    return folder


@pytest.fixture
def damaged(run, tmp_path):
    checkpoint = torch.load(run / "saved.ckpt", weights_only=True)
    checkpoint["state_dict"]["net.0.weight"][0, 0] = float("nan")
    torch.save(checkpoint, tmp_path / "damaged.ckpt")
    return tmp_path / "damaged.ckpt"


def doctor(*arguments):
    return main(["doctor", *map(str, arguments)])


def test_healthy_checkpoint_exits_with_0_and_is_printed(run, capsys):
    """V4."""
    assert doctor(run / "saved.ckpt") == 0
    printed = capsys.readouterr().out
    assert "a checkpoint of lightning 2." in printed
    assert "step 40, epoch 1" in printed
    assert "nothing found" in printed
    assert "optimizer 0, group 0: 6 parameters, lr 0.01, betas (0.9, 0.999)" in printed
    assert "steps 0 to 39, nine tenths: loss" in printed
    assert "net.4.weight" in printed


def test_damaged_checkpoint_exits_with_1_and_says_what_to_do(damaged, capsys):
    """S3, V4."""
    assert doctor(damaged) == 1
    printed = capsys.readouterr().out
    assert "error: non-finite weight\n  where: net.0.weight\n" in printed
    assert "lit-stability resume RUN" in printed
    assert "found: 1 error" in printed


def test_two_checkpoints_are_compared_and_the_worse_one_counts(run, damaged, capsys):
    assert doctor(run / "saved.ckpt", damaged) == 1
    printed = capsys.readouterr().out
    assert "9 tensors compared, step 40 to step 40" in printed
    assert "0 -> 1" in printed
    assert doctor(run / "saved.ckpt", run / "saved.ckpt") == 0
    assert "9 of them are unchanged" in capsys.readouterr().out


def test_folder_of_a_run_means_its_last_known_good(run, capsys):
    assert doctor(run) == 0
    good = find_last_good(run)
    assert f"{good}, the last known good of {run}" in capsys.readouterr().out


def test_files_are_written_whole_and_what_was_there_is_kept(run, damaged, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    out, plot = tmp_path / "report.json", tmp_path / "picture.png"
    assert doctor(damaged, "--out", out, "--plot", plot) == 1
    first = json.loads(out.read_text())["checkpoint"]
    assert (first["schema"], first["healthy"]) == (1, False)
    assert first["tensors"][0]["nan"] == 1
    assert first["findings"][0]["where"] == ["net.0.weight"]
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert doctor(run / "saved.ckpt", damaged, "--out", out, "--plot", plot) == 1
    assert json.loads(out.read_text())["comparison"]["changes"][0]["non_finite_after"] == 1
    assert {"report.1.json", "picture.1.png"} <= {path.name for path in tmp_path.iterdir()}


def test_all_prints_every_row(tmp_path, capsys):
    torch.save({f"w{i}": torch.ones(2) for i in range(40)}, tmp_path / "many.pt")
    assert doctor(tmp_path / "many.pt") == 0
    printed = capsys.readouterr().out
    assert "25 more tensors; --all shows them" in printed
    assert "a bare state dict" in printed
    assert doctor(tmp_path / "many.pt", "--all") == 0
    printed = capsys.readouterr().out
    assert "more tensors" not in printed
    assert "w39 " in printed


def test_folder_of_an_incident_shows_its_gradients(tmp_path, capsys):
    """S3: NaN gradients, by name, of the step that went wrong."""
    pytest.importorskip("matplotlib")
    checkpoint_of(tmp_path, Regression, fault=NanLoss(step=20))
    (folder,) = (tmp_path / "incidents").iterdir()
    plot = tmp_path / "flow.png"
    assert doctor(folder, "--plot", plot) == 1
    printed = capsys.readouterr().out
    assert "error: non-finite gradient\n  where: net.0.weight, net.0.bias" in printed
    assert "6 of 6 gradients of the offending step are NaN or Inf" in printed
    assert plot.stat().st_size > 10_000


class Attached:
    """What a checkpoint may carry, and runs when it is unpickled."""

    def __reduce__(self):
        return (print, ("was run",))


def write_object(path):
    torch.save({"state_dict": {"w": torch.ones(2)}, "extra": Attached()}, path)


def write_shards(path):
    path.mkdir()
    (path / ".metadata").touch()


def write_cut(path):
    torch.save({"w": torch.ones(1000)}, path)
    path.write_bytes(path.read_bytes()[:2000])


REFUSED = {
    "nothing": (lambda path: None, "no such file; give a checkpoint, or the folder of a run"),
    "folder": (
        lambda path: path.mkdir(),
        "contains no known good checkpoint; give the path of a checkpoint file",
    ),
    "shards": (write_shards, "is a sharded checkpoint"),
    "cut": (write_cut, "is no checkpoint, or is truncated"),
    "text": (lambda path: path.write_text("hello"), "is no checkpoint, or is truncated"),
    "object": (write_object, "other objects are not loaded, because they may run code"),
    "number": (
        lambda path: torch.save(3, path),
        "contains the type int; expected the dict of a checkpoint",
    ),
    "no tensor": (
        lambda path: torch.save({"epoch": 3}, path),
        "no tensor among the keys ['epoch']",
    ),
}


EVIL = "net\x1b[31m\u202eweight\nfound: nothing\x9b2J"
"""Colours, turns round, fakes a line of the report, and clears the screen."""


def spoiled(run):
    """The checkpoint of a run in which every text is evil."""
    saved = torch.load(run / "saved.ckpt", weights_only=True)
    saved["state_dict"][EVIL] = torch.tensor([1.0, math.nan])
    saved["pytorch-lightning_version"] = EVIL
    saved["callbacks"] = {"PrecisionFallback": {"ladder": {"names": [EVIL], "at": 0}}}
    saved["optimizer_states"][0]["param_groups"][0]["param_names"] = [EVIL] * 6
    saved["optimizer_states"][0]["state"]["x\x1b"] = {"step": EVIL}
    return saved


def test_names_of_a_file_are_printed_without_control_characters(run, tmp_path, capsys):
    torch.save(spoiled(run), tmp_path / "evil\x1b.ckpt")
    assert doctor(tmp_path / "evil\x1b.ckpt", run / "saved.ckpt", "--all") == 1
    printed = capsys.readouterr().out
    assert [c for c in printed if not c.isprintable() and c != "\n"] == []
    assert "net\\x1b[31m\\u202eweight\\nfound: nothing" in printed
    assert "\nfound: nothing\n" not in printed


def test_names_of_a_file_are_drawn_as_they_are_and_not_as_formulas(run, tmp_path, recwarn):
    pytest.importorskip("matplotlib")
    saved = spoiled(run)
    saved["state_dict"]["a$\\frac$b"] = torch.ones(2)
    torch.save(saved, tmp_path / "$evil$\x1b.ckpt")
    assert doctor(tmp_path / "$evil$\x1b.ckpt", "--plot", tmp_path / "p.png") == 1
    assert (tmp_path / "p.png").stat().st_size > 10_000


def write_raw_pickle(path, pickled):
    torch.save({"w": torch.ones(2)}, path)
    with zipfile.ZipFile(path) as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in parts.items():
            archive.writestr(name, pickled if name.endswith("data.pkl") else content)


@pytest.mark.parametrize(
    ("write", "reasons"),
    [
        (lambda p: torch.save({"a": Attached(), "b": Path("x")}, p), ["print", "PosixPath"]),
        (lambda p: torch.save(torch.nn.Linear(2, 2), p), ["torch.nn.modules.linear.Linear"]),
        (lambda p: write_raw_pickle(p, b"\x80\x02cos\nsystem\n."), ["os.system", "blocked"]),
        (lambda p: write_raw_pickle(p, b"\x80\x02c" + b"m" * 900 + b"\nn\n."), ["m" * 900 + ".n"]),
        (lambda p: write_raw_pickle(p, b"\x80\x02ca\x1b[1m\nb\n."), ["a\\x1b[1m.b"]),
        (lambda p: torch.save({"a": 3}, p, pickle_protocol=4), ["Unsupported operand 149"]),
    ],
)
def test_refusal_gives_the_whole_reason_and_no_advice_to_load_the_file_unchecked(
    write, reasons, tmp_path, capsys
):
    write(tmp_path / "given")
    assert doctor(tmp_path / "given") == 2
    error = capsys.readouterr().err
    assert [each for each in reasons if each not in error] == []
    assert [w for w in ("weights_only", "add_safe_globals", "documentation") if w in error] == []
    assert "with only its state_dict and optimizer_states" in error


def test_flipped_bit_is_an_error_although_the_file_loads(run, tmp_path, capsys):
    content = bytearray((run / "saved.ckpt").read_bytes())
    state = torch.load(run / "saved.ckpt", weights_only=True)["state_dict"]
    content[content.index(state["net.0.weight"].numpy().tobytes()) + 4] ^= 1
    (tmp_path / "flipped.ckpt").write_bytes(content)
    assert doctor(tmp_path / "flipped.ckpt") == 1
    printed = capsys.readouterr().out
    assert "error: damaged file" in printed
    assert "Bad CRC-32" in printed


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=4), inner),
    max_leaves=4,
)


def places(value, path=()):
    """The paths to everything in a checkpoint but its tensors."""
    inner = value.items() if isinstance(value, dict) else enumerate(value)
    for key, each in inner:
        yield (*path, key)
        if isinstance(each, (dict, list)):
            yield from places(each, (*path, key))


@settings(
    derandomize=True,
    max_examples=120,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(data=st.data(), value=VALUES)
def test_any_value_in_any_place_of_a_checkpoint_is_reported_and_the_rest_examined(
    data, value, run, tmp_path, capsys
):
    saved = torch.load(run / "saved.ckpt", weights_only=True)
    *path, key = data.draw(st.sampled_from([p for p in places(saved) if "state_dict" not in p]))
    inner = saved
    for each in path:
        inner = inner[each]
    inner[key] = value
    torch.save(saved, tmp_path / "mutated.ckpt")
    assert doctor(tmp_path / "mutated.ckpt") in (0, 1)
    assert "net.0.weight" in capsys.readouterr().out


@pytest.mark.parametrize("what", REFUSED)
def test_what_cannot_be_examined_is_a_message_and_code_2(what, tmp_path, capsys):
    """V4: and no code of the file's is run."""
    write, message = REFUSED[what]
    write(tmp_path / "given")
    assert doctor(tmp_path / "given") == 2
    printed = capsys.readouterr()
    assert f"lit-stability: {tmp_path / 'given'}: " in printed.err
    assert message in printed.err
    assert "was run" not in printed.out
    assert "Traceback" not in printed.err


def test_older_format_of_torch_is_read(tmp_path):
    torch.save({"w": torch.ones(2)}, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    assert doctor(tmp_path / "old.pt") == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--out", "report.txt"], "--out report.txt: must end in .json"),
        (["--plot", "picture.pdf"], "--plot picture.pdf: must end in .png"),
        (["--out", "nowhere/a.json"], "--out nowhere/a.json: no such folder nowhere"),
    ],
)
def test_target_that_cannot_be_written_is_refused_first(arguments, message, run, capsys):
    assert doctor(run / "saved.ckpt", *arguments) == 2
    printed = capsys.readouterr()
    assert message in printed.err
    assert printed.out == ""


def test_without_matplotlib_the_report_is_written_and_the_extra_named(
    run, tmp_path, capsys, monkeypatch
):
    for name in [name for name in sys.modules if name.split(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    out, plot = tmp_path / "report.json", tmp_path / "picture.png"
    assert doctor(run / "saved.ckpt", "--out", out, "--plot", plot) == 0
    assert "pip install 'lit-stability[plots]'" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["report.json"]


def test_help_documents_the_exit_codes_and_loads_no_torch(capsys):
    code = (
        "import sys; from lit_stability.cli.main import main\n"
        "try: main(['doctor', '--help'])\n"
        "except SystemExit: sys.exit('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert "1  an error was found in PATH" in done.stdout
