"""Pictures in the course of a real fit: which steps, where they go, and that nothing changes."""

import logging

import pytest
import torch
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lit_stability import AutoRollback, GradientFlow, GradientMonitor, stability_callbacks
from lit_stability.callbacks.gradient_flow import callback as gradient_flow
from lit_stability.cli.main import main
from lit_stability.faults import CorruptWeight, FaultInjector, NanLoss
from tests.callbacks.test_battery import TwoOptimizers
from tests.conftest import Regression, fit, flat, make_trainer, regression_data

pytest.importorskip("matplotlib")


def pictures(folder):
    return sorted(path.name for path in (folder / "gradient_flow").iterdir())


def flow_of(every=20, details_every=10):
    return [GradientMonitor(details_every=details_every), GradientFlow(every_n_steps=every)]


def test_pictures_are_of_the_steps_that_were_measured(tmp_path):
    """S8: details at steps 9, 19, ...; the first of them, and then one in twenty steps."""
    fit(tmp_path, flow_of(), max_steps=40)
    assert pictures(tmp_path) == [f"step={step:08d}.png" for step in (9, 29)]
    content = (tmp_path / "gradient_flow" / "step=00000009.png").read_bytes()
    assert content.startswith(b"\x89PNG")
    assert len(content) > 10_000


def test_pictures_go_to_tensorboard_where_it_takes_them(tmp_path):
    """S8, V4."""
    tensorboard = TensorBoardLogger(tmp_path / "tb")
    callbacks = [FaultInjector([NanLoss(step=35)]), *flow_of()]
    fit(tmp_path, callbacks, logger=[CSVLogger(tmp_path / "csv"), tensorboard], max_steps=40)
    assert not list(tmp_path.rglob("*.png"))
    events = EventAccumulator(tensorboard.log_dir, size_guidance={"images": 0}).Reload()
    flow = events.Images("stability/gradient_flow")
    assert [image.step for image in flow] == [9, 29]
    assert flow[0].width > 700
    assert [i.step for i in events.Images("stability/gradient_flow_incident")] == [35]


@pytest.mark.usefixtures("empty_pictures")
def test_logger_that_takes_no_images_leaves_files(tmp_path):
    logger = CSVLogger(tmp_path / "csv")
    fit(tmp_path, flow_of(), logger=logger, max_steps=12)
    assert [path.name for path in tmp_path.rglob("*.png")] == ["step=00000009.png"]


def test_incident_is_drawn_once_before_its_gradients_are_dropped(tmp_path, monkeypatch):
    """S8, S3: of the offending step, though AutoRollback takes it back."""
    drawn = []
    draw = gradient_flow.draw_gradient_flow

    def spy(details, **options):
        drawn.append((options["title"], [d.norm for d in details], len(options["history"])))
        return draw(details, **options)

    monkeypatch.setattr(gradient_flow, "draw_gradient_flow", spy)
    suite = stability_callbacks()[1:]
    fit(tmp_path, [FaultInjector([NanLoss(step=35)]), *flow_of(1000), *suite], max_steps=40)
    assert "step=00000035-incident-1.png" in pictures(tmp_path)
    ((title, norms, history),) = (each for each in drawn if each[0].startswith("incident"))
    first, usual = title.split("\n")
    assert first == "incident 1 at step 35: non-finite loss"
    assert usual.startswith("so far in descent (steps 1 to 34): gradient norm")
    assert all(norm != norm for norm in norms)
    assert history == 3


def test_after_a_responder_it_says_that_there_is_nothing_to_draw(tmp_path, caplog):
    caplog.set_level(logging.INFO, logger="lightning.pytorch.lit_stability")
    callbacks = [GradientMonitor(), AutoRollback(after_rollback="skip"), GradientFlow()]
    fit(tmp_path, [FaultInjector([NanLoss(step=15)]), *callbacks], max_steps=20)
    assert "no gradient flow of incident 1: its gradients were dropped" in caplog.text
    assert not (tmp_path / "gradient_flow").exists()


@pytest.mark.usefixtures("empty_pictures")
def test_each_optimizer_has_its_own_pictures(tmp_path):
    fit(tmp_path, flow_of(), TwoOptimizers, max_steps=20)
    assert pictures(tmp_path) == ["step=00000018.png", "step=00000019-optimizer-1.png"]


def test_weights_are_bit_identical_with_and_without(tmp_path):
    """S8: nothing is changed."""
    drawn, _ = fit(tmp_path / "drawn", flow_of(every=10), max_steps=20)
    plain, _ = fit(tmp_path / "plain", [], max_steps=20)
    assert torch.equal(flat(drawn), flat(plain))
    assert drawn.losses == plain.losses


@pytest.mark.usefixtures("empty_pictures")
def test_unwritable_folder_is_a_warning_and_training_goes_on(tmp_path, caplog):
    (tmp_path / "gradient_flow").write_text("in the way")
    _, trainer = fit(tmp_path, flow_of(), max_steps=15)
    assert trainer.global_step == 15
    assert "picture of the gradient flow was not written" in caplog.text
    assert "was not written" in caplog.text


def test_second_run_in_the_same_folder_keeps_the_pictures_of_the_first(tmp_path):
    for seed in range(2):
        fit(tmp_path, flow_of(), max_steps=12, seed=seed)
    assert pictures(tmp_path) == ["step=00000009.1.png", "step=00000009.png"]


@pytest.mark.parametrize("option", ["every_n_steps", "layers"])
def test_option_below_one_is_refused(option):
    with pytest.raises(ValueError, match=f"{option} must be at least 1, got 0"):
        GradientFlow(**{option: 0})


def test_monitor_without_details_is_refused_with_the_line_to_write(tmp_path):
    with pytest.raises(ValueError, match=r"write GradientMonitor\(details_every=50\)"):
        fit(tmp_path, flow_of(details_every=0))


@pytest.mark.usefixtures("empty_pictures")
def test_norms_by_phase_are_logged_saved_and_printed_by_the_doctor(tmp_path, caplog, capsys):
    """V3: warm-up and descent of a OneCycle run, from its own history."""
    caplog.set_level(logging.INFO, logger="lightning.pytorch.lit_stability")
    callbacks = flow_of(every=1000)
    _, trainer = fit(tmp_path, callbacks, lambda: Regression(scheduler="onecycle"))
    phase_range = callbacks[1].phases.range_of("warm-up")
    assert (phase_range.first_step, phase_range.last_step) == (1, 59)
    assert 0 < phase_range.low < phase_range.middle < phase_range.high
    assert f"gradient norms by phase\n{phase_range.in_words()}" in caplog.text
    trainer.save_checkpoint(tmp_path / "saved.ckpt")
    resumed = flow_of(every=1000)
    fit_on = make_trainer(tmp_path, resumed, max_steps=61)
    fit_on.fit(
        Regression(scheduler="onecycle"), regression_data(), ckpt_path=tmp_path / "saved.ckpt"
    )
    assert resumed[1].phases.range_of("warm-up").first_step == 1
    assert resumed[1].phases.range_of("warm-up").steps == phase_range.steps + 1
    assert main(["doctor", str(tmp_path / "saved.ckpt")]) == 0
    assert phase_range.in_words() in capsys.readouterr().out


@pytest.mark.usefixtures("empty_pictures")
def test_steps_taken_again_after_a_rollback_count_once(tmp_path):
    suite = stability_callbacks()[1:]
    hurt = flow_of(every=1000)
    fit(tmp_path / "hurt", [FaultInjector([CorruptWeight(step=25)]), *hurt, *suite], max_steps=40)
    calm = flow_of(every=1000)
    fit(tmp_path / "calm", [*calm, *stability_callbacks()[1:]], max_steps=40)
    assert hurt[1].phases.state_dict() == calm[1].phases.state_dict()
