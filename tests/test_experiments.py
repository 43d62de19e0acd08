"""The reference experiments: every config is sound, and the main job does what it says."""

import contextlib
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from lit_stability import TrainingStopped, read_incidents, stability_callbacks
from lit_stability.cli.config import compose, resolve
from lit_stability.cli.experiments import Ending, Expectation, Outcome, judge
from lit_stability.cli.experiments.catalogue import catalogue
from lit_stability.cli.fit import check_options, fit

ROOT = Path(__file__).parent.parent
EXPERIMENTS = sorted(p.stem for p in (ROOT / "configs").glob("*.yaml"))
SHORT = (
    *("causal_default_init", "causal_lr_dead", "causal_small_gain_init", "causal_unfrozen"),
    *("translation_embedding_unscaled", "translation_inner_zero", "translation_mask_inverted"),
    "translation_zombie",
)
"""The others are run by ``make experiments`` only: together they take as long as a fifth of all
tests."""
LONGER = {
    *("translation_embedding_unscaled", "translation_inner_zero", "translation_mask_inverted"),
    *("translation_zombie", "causal_small_gain_init", "causal_unfrozen"),
}
"""Of the short ones, those whose findings have tests of their own, and the longest; run by
``make test-long``."""
RESULTS = {
    each["name"]: each
    for each in json.loads((ROOT / "benchmarks/results/experiments.json").read_text())[
        "experiments"
    ]
}
"""What `make experiments` found, by experiment."""
TRANSLATION = [each for each in EXPERIMENTS if each.startswith("translation_")]
CAUSAL = [each for each in EXPERIMENTS if each.startswith("causal_")]


@pytest.fixture(autouse=True)
def _in_the_clone(monkeypatch):
    monkeypatch.chdir(ROOT)


@pytest.mark.parametrize("experiment", TRANSLATION)
@pytest.mark.parametrize(
    "extra", [[], ["model/translation_medium"], ["model/conservative"], ["data/classical_modern"]]
)
def test_translation_composes_and_fits_its_targets(experiment, extra):
    """K5, V2: each model and each source of data under each experiment."""
    overrides = ["data.root=/somewhere"] if "data/classical_modern" in extra else []
    check_options(resolve(compose([experiment, *extra], overrides)))


@pytest.mark.parametrize("experiment", CAUSAL)
@pytest.mark.parametrize(
    "extra", [[], ["model/causal_embedded"], ["model/causal_full_shape"], ["model/causal_qwen"]]
)
def test_classifier_composes_and_fits_its_targets(experiment, extra, tmp_path):
    """K5, C1: each trunk under each experiment; real weights are a folder or a pinned commit."""
    overrides = [f"model.backbone.path={tmp_path}"] if "model/causal_qwen" in extra else []
    check_options(resolve(compose([experiment, *extra], overrides)))


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_experiment_says_what_it_is_about_and_what_is_expected_of_it(experiment):
    """K5: one line, an expectation of more than its end, and the rows that it shows."""
    own = catalogue()[experiment]
    assert 0 < len(own["about"]) <= 100
    assert set(own["expect"]) - {"ends"}
    assert re.search(
        r"^#.*\b[KSNVTC]\d+\b", (ROOT / f"configs/{experiment}.yaml").read_text(), re.M
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    "experiment",
    [pytest.param(name, marks=[pytest.mark.long] if name in LONGER else []) for name in SHORT],
)
def test_experiment_shows_what_it_states(experiment, tmp_path):
    """C1 to C5, S7, T1 to T4, V1, V2: as shipped, under the suite; each config says which."""
    overrides = [f"run_dir={tmp_path}/run", "trainer.enable_progress_bar=false"]
    config = compose([experiment], overrides)
    with contextlib.suppress(TrainingStopped):
        fit(config)
    expect = Expectation(**resolve(config)["expect"])
    verdicts = judge(expect, Outcome.read(tmp_path / "run"))
    assert [each for each in verdicts if not each.met] == []


def test_suite_of_the_configs_is_the_default_one():
    """K5: a run launched by config is protected like one in code, in the same order."""
    found = resolve(compose(["translation_rescue"]))["callbacks"]
    names = [each["_target_"].rsplit(".", 1)[1] for each in found.values()]
    assert [n for n in names if n != "FaultInjector"] == [
        type(each).__name__ for each in stability_callbacks()
    ]


def test_conservative_preset_trains_slowly_up_and_down_again(tmp_path):
    """N4: AdamW under one cycle: a low peak, reached late, and next to nothing at the end."""
    small = ["trainer.max_steps=30", "model.warmup_steps=10", "data.n_train=512"]
    small += ["data.n_test=8", "data.n_val=8", "evaluate=null", f"run_dir={tmp_path}/run"]
    result = fit(compose(["translation_clean", "model/conservative"], small))
    (optimizer,) = result.trainer.optimizers
    (group, _) = optimizer.param_groups
    assert (type(optimizer).__name__, group["weight_decay"]) == ("AdamW", 1e-3)
    assert (group["initial_lr"], group["max_lr"]) == (5e-5 / 25, 5e-5)
    assert group["lr"] < group["max_lr"] / 100
    assert result.trainer.gradient_clip_val == 0.5


def test_real_corpus_without_its_folder_says_what_to_give():
    problem = r"data\.root: has no value; set it in a config file or with data\.root=VALUE"
    with pytest.raises(ValueError, match=problem):
        check_options(resolve(compose(["translation_rescue", "data/classical_modern"])))


def test_experiment_runs_a_few_steps(tmp_path):
    small = ["trainer.max_steps=3", "data.n_train=256", "data.n_test=8", "data.n_val=8"]
    result = fit(compose(["translation_rescue"], [*small, f"run_dir={tmp_path}/run"]))
    assert result.trainer.global_step == 3
    assert set(result.metrics) >= {"train/loss", "test/loss", "test/exact_match"}
    assert (tmp_path / "run" / "config.yaml").exists()


@pytest.fixture(scope="module")
def rescue(tmp_path_factory):
    """The run with three faults as a user starts it; its folder and output."""
    folder = tmp_path_factory.mktemp("rescue")
    command = [sys.executable, "-m", "lit_stability.cli.main", "fit", "-c", "translation_rescue"]
    done = subprocess.run(
        [*command, f"run_dir={folder}", "trainer.enable_progress_bar=false"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    return folder, done.stdout + done.stderr


@pytest.mark.long
def test_rescued_run_ends_where_the_clean_run_ends(rescue):
    """K3, K4: within 5 % relative of the clean twin's exact match on held-out sentences, T5."""
    rescued = json.loads((rescue[0] / "metrics.json").read_text())["test/exact_match"]
    observed = RESULTS["translation_clean"]["verdicts"][1]["observed"]
    clean = float(observed)
    assert clean >= 0.9
    assert rescued >= 0.95 * clean
    assert "\nexpectation met: finished, " in rescue[1]


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_experiment_was_run_whole_and_showed_what_it_states(experiment):
    """K3, K4, K5: as `make experiments` found it, with the expectations of the present config."""
    expect = Expectation(**resolve(compose([experiment]))["expect"])
    assert RESULTS[experiment]["met"], "run `make experiments` again"
    nothing = Outcome(ending=Ending(ends="finished", started=0.0, seconds=0.0))
    then = [each["expected"] for each in RESULTS[experiment]["verdicts"]]
    assert then == [each.expected for each in judge(expect, nothing)]


@pytest.mark.long
def test_rescued_run_tells_what_happened(rescue):
    """K5: live lines, the summary, the record, and the command for TensorBoard."""
    folder, output = rescue
    kinds = ["non-finite loss", "non-finite weight", "learning-rate jump"]
    assert [i["kind"] for i in read_incidents(folder)] == kinds
    assert {i["outcome"] for i in read_incidents(folder)} == {"recovered"}
    for number, kind in enumerate(kinds, 1):
        assert f"incident {number} at step" in output
        assert f"incident {number} ({kind}) recovered" in output
    assert "[stability] summary: " in output
    assert f"tensorboard --logdir {folder}" in output
    assert len(list((folder / "incidents").iterdir())) == 3
