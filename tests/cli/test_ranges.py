"""The command, end to end on the translation model."""

import json
import sys
from pathlib import Path

import pytest
import torch

import lit_stability
from lit_stability.cli.main import main

ROOT = Path(lit_stability.__file__).parents[1]
TINY = [
    *("data.n_train=64", "data.n_val=8", "data.n_test=8", "data.batch_size=8"),
    *("model.network.d_model=16", "model.network.d_feedforward=24", "evaluate=none"),
    *("model.network.n_encoder_layers=1", "model.network.n_decoder_layers=1"),
    *("trainer.enable_progress_bar=false", "trainer.precision=bf16-true"),
]


@pytest.fixture
def ranges(tmp_path, monkeypatch):
    """Run the command on the tiny translation model, in a folder of the test."""
    monkeypatch.chdir(ROOT)

    def run(*arguments):
        tiny = [*TINY, f"run_dir={tmp_path}/run"]
        return main(["ranges", "-c", "translation_rescue", *tiny, *map(str, arguments)])

    return run


def files_in(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def test_command_prints_a_verdict_and_writes_report_and_picture_alone(ranges, tmp_path, capsys):
    """S9, K5: on a config of three faults, which do not occur, in bf16-true, which is not used."""
    pytest.importorskip("matplotlib")
    assert ranges("--batches", 2) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("translation_rescue, untrained\n\nfloat16: fits")
    assert "measured in float32 over 2 batches" in printed
    assert files_in(tmp_path) == ["run/ranges/ranges.json", "run/ranges/ranges.png"]
    report = json.loads((tmp_path / "run/ranges/ranges.json").read_text())
    assert (report["batches"], report["measured_in"]) == (2, "float32")
    assert [verdict["format"] for verdict in report["verdicts"]] == ["float16", "bfloat16"]
    kinds = {row["kind"] for row in report["rows"]}
    assert kinds == {"weights", "activations", "weight gradients", "activation gradients"}
    row = next(row for row in report["rows"] if row["layer"].endswith("encoder.norm"))
    assert sum(row["exponents"].values()) + row["zeros"] == row["elements"]


def test_command_measures_a_checkpoint_and_keeps_the_report_before(ranges, tmp_path, capsys):
    """S9: weights from the newest checkpoint of the run; 1e5 in one weight overflows."""
    fit = ["fit", "-c", "translation_clean", *TINY, f"run_dir={tmp_path}/run"]
    assert main([*fit, "trainer.max_steps=2", "trainer.precision=32-true"]) == 0
    out = tmp_path / "elsewhere"
    assert ranges("--batches", 1, "--out", out, "--checkpoint", "last") == 0
    (path,) = (tmp_path / "run").glob("**/checkpoints/*.ckpt")
    assert f"translation_rescue, {path}" in capsys.readouterr().out
    saved = torch.load(path, weights_only=True)
    saved["state_dict"]["network.encoder.layers.0.feedforward.hidden.weight"][0, 0] = 1e5
    torch.save(saved, tmp_path / "hot.ckpt")
    assert ranges("--batches", 1, "--out", out, "--checkpoint", tmp_path / "hot.ckpt", "--all") == 0
    printed = capsys.readouterr().out
    assert "float16: overflows" in printed
    assert "network.encoder.layers.0.feedforward.hidden" in printed
    assert "more rows" not in printed
    assert {"ranges.json", "ranges.1.json"} <= set(files_in(out))


def test_callbacks_and_logger_of_the_config_are_not_even_built(ranges):
    """Either would refuse: a callback with a bad option, a logger whose package is missing."""
    refusing = "{_target_: lit_stability.cli.range_meter.RangeMeter, batches: 0}"
    missing = "{_target_: lightning.pytorch.loggers.MLFlowLogger}"
    assert ranges("--batches", 1, f"callbacks.bad={refusing}", f"logger={missing}") == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--checkpoint", "nowhere/a.ckpt"], "checkpoint=nowhere/a.ckpt: no such checkpoint"),
        (["--checkpoint", "last"], "checkpoint=last: no checkpoint under"),
        (["--batches", "0"], "--batches 0: must be at least 1"),
        (["trainer.max_steps=0", "model.schedule=none"], "trainer: takes no training step"),
        (["trainer.max_step=1"], "trainer.max_step=1: unknown option"),
    ],
)
def test_bad_option_is_a_message_and_code_2(arguments, message, ranges, tmp_path, capsys):
    assert ranges(*arguments) == 2
    assert message in capsys.readouterr().err
    assert files_in(tmp_path) == []


def test_checkpoint_of_another_shape_is_a_message_and_code_2(ranges, tmp_path, capsys):
    path = tmp_path / "other.ckpt"
    torch.save({"state_dict": {"network.projection.weight": torch.ones(2, 2)}}, path)
    assert ranges("--checkpoint", path) == 2
    assert f"checkpoint={path}: does not match TranslationModule" in capsys.readouterr().err
    assert files_in(tmp_path) == ["other.ckpt"]


def test_without_matplotlib_the_report_is_written_and_the_extra_named(
    ranges, tmp_path, capsys, monkeypatch
):
    for name in [name for name in sys.modules if name.split(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert ranges("--batches", 1) == 0
    error = capsys.readouterr().err
    assert "ranges.png was not written: matplotlib is not installed; pip install" in error
    assert files_in(tmp_path) == ["run/ranges/ranges.json"]
