"""Late detection, verdicts, and what cannot be replayed."""

import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from lit_stability import AutoRollback, GradientMonitor, TrainingStopped, read_incidents
from lit_stability.detectors import Divergence, NonFinite
from lit_stability.faults import CorruptWeight, FaultInjector, NanLoss
from tests.conftest import fit, flat, lines_of, make_trainer, regression_data
from tests.exact import Batches, differences, loader, run
from tests.exact_net import Net

MARK = 77.0


def marked(left_out=(), mark=(), **options):
    """Batches of which some carry a mark that `Poisoned` takes for the order to break a weight."""
    data = Batches(80, left_out=left_out, **options)
    for each in mark:
        data.x[data.kept.index(each), 0, 0] = MARK
    return loader(data)


class Poisoned(Net):
    """A batch with the mark spoils a weight after its update, whenever it comes."""

    damage = float("nan")

    def on_train_batch_end(self, outputs, batch, batch_idx):
        if batch[0][0, 0] == MARK:
            with torch.no_grad():
                self.first[0].weight[0, 0] = self.damage


class Shifted(Poisoned):
    """The damage is finite and slow to show: the output is off by a constant."""

    def on_train_batch_end(self, outputs, batch, batch_idx):
        if batch[0][0, 0] == MARK:
            with torch.no_grad():
                self.last[1].bias += 30.0

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 1e-4)


LATE = {
    # What the detectors are, and how late they are.
    "NaN weight, found within ten steps": (Poisoned, lambda: None),
    "divergence, found five steps late": (
        Shifted,
        lambda: [NonFinite(), Divergence(persist=5, window=20, min_history=5)],
    ),
    "divergence, found eighteen steps late": (
        Shifted,
        lambda: [NonFinite(), Divergence(persist=18, window=20, min_history=5)],
    ),
}


@pytest.mark.each_value
@pytest.mark.parametrize("bad", [30, 33, 37, 41])
@pytest.mark.parametrize(("module", "detectors"), LATE.values(), ids=list(LATE))
def test_batch_that_does_damage_is_found_by_replay_and_left_out(module, detectors, bad, tmp_path):
    """S17: the first replay shows that it returns, the second goes without the suspect."""
    monitor = GradientMonitor(detectors=detectors())
    options = {"max_epochs": 1}
    faulty = run(tmp_path, module, marked(mark=(bad,)), [monitor, AutoRollback()], **options)
    clean = run(tmp_path / "clean", module, marked(left_out=(bad,)), [], **options)
    assert differences(faulty, clean) == {}
    (incident,) = read_incidents(tmp_path)
    assert (incident["verdict"], incident["outcome"]) == ("deterministic", "recovered")
    assert incident["responses"] == [
        "rolled back and replayed",
        "rolled back and replayed without the suspect",
    ]


def test_damage_from_outside_is_transient_and_blames_nothing(tmp_path):
    injector = FaultInjector([CorruptWeight(step=33, parameter="first.0.weight")])
    suite = [GradientMonitor(), AutoRollback()]
    faulty = run(tmp_path, Net, marked(), [injector, *suite], max_epochs=1)
    clean = run(tmp_path / "clean", Net, marked(), [], max_epochs=1)
    assert differences(faulty, clean) == {}
    (incident,) = read_incidents(tmp_path)
    assert incident["verdict"] == "transient"
    assert incident["responses"] == ["rolled back and replayed"]


def test_bad_batch_among_replayed_steps_has_its_own_trial_and_snapshots_go_on(tmp_path):
    """What strikes during a replay must not keep later snapshots from being taken."""

    damage = [CorruptWeight(step=s, parameter="first.0.weight") for s in (33, 75)]
    # The trial of the damage of step 33 lasts until step 44.
    injector = FaultInjector([*damage, NanLoss(step=41)])
    rollback = AutoRollback()
    result = run(tmp_path, Net, marked(), [injector, GradientMonitor(), rollback], max_epochs=2)
    clean = run(tmp_path / "clean", Net, marked(), [], max_epochs=2)
    assert differences(result, clean) == {}
    incidents = read_incidents(tmp_path)
    assert {i["verdict"] for i in incidents} == {"transient"}
    replayed = [r for i in incidents for r in i["responses"]]
    assert "step skipped" not in replayed
    assert rollback.backoff.lr_factor == 1.0


def test_step_that_is_clean_the_second_time_is_called_transient(tmp_path):
    callbacks = [FaultInjector([NanLoss(step=30)]), GradientMonitor(), AutoRollback()]
    run(tmp_path, Net, marked(), callbacks, max_epochs=1)
    (incident,) = read_incidents(tmp_path)
    assert (incident["verdict"], incident["responses"]) == ("transient", ["step retried"])


def late():
    """A suite that needs five steps to see the shift."""
    monitor = GradientMonitor(
        detectors=[NonFinite(), Divergence(persist=5, window=20, min_history=5)]
    )
    return [monitor, AutoRollback()]


def is_shifted(file):
    return bool(torch.load(file, weights_only=True)["state_dict"]["last.1.bias"] > 20)


def test_checkpoints_written_since_the_snapshot_are_renamed_and_written_again(tmp_path):
    """Nothing is deleted, and the files that remain are those of the clean run."""
    saved = {}
    for name, options in (("faulty", {"mark": (33,)}), ("clean", {"left_out": (33,)})):
        checkpoint = ModelCheckpoint(
            tmp_path / name, every_n_train_steps=3, save_top_k=-1, filename="{step}"
        )
        suite = late() if name == "faulty" else []
        run(
            tmp_path,
            Shifted,
            marked(**options),
            [*suite, checkpoint],
            max_epochs=1,
            enable_checkpointing=True,
        )
        saved[name] = {f.name: f for f in (tmp_path / name).iterdir()}
    faulty, clean = saved.values()
    renamed = {n for n in faulty if "quarantined" in n}
    assert any(is_shifted(faulty[n]) for n in renamed), "the damaged ones are among them"
    assert {n for n in faulty if n.endswith(".ckpt")} == set(clean)
    for name, file in clean.items():
        a, b = (torch.load(f, weights_only=True)["state_dict"] for f in (file, faulty[name]))
        assert all(torch.equal(a[k], b[k]) for k in a)


def test_best_checkpoint_removed_for_a_damaged_one_comes_back(tmp_path):
    """A removal waits until nothing can go back before it."""

    class Flatters(Shifted):
        def validation_step(self, batch, batch_idx):
            shifted = bool(self.last[1].bias > 20)
            self.log("val/loss", float(self.trainer.global_step) - 100.0 * shifted)

    checkpoint = ModelCheckpoint(
        tmp_path / "best", monitor="val/loss", save_top_k=1, filename="{step}"
    )
    options = {"max_epochs": 1, "val_check_interval": 17, "enable_checkpointing": True}
    data, val = marked(mark=(33,)), loader(Batches(2))
    result = run(tmp_path, Flatters, data, [*late(), checkpoint], val=val, **options)
    assert result["global_step"] == 79
    files = {f.name: f for f in (tmp_path / "best").iterdir()}
    # The first replay, with the suspect, writes the damaged one again.
    renamed = {"step=34.ckpt.quarantined", "step=34.ckpt.quarantined.1"}
    assert set(files) == {"step=17.ckpt", *renamed}
    assert not is_shifted(files["step=17.ckpt"])
    assert all(is_shifted(files[n]) for n in renamed)
    assert checkpoint.best_model_path.endswith("step=17.ckpt")


def test_registered_object_is_taken_back_with_the_weights(tmp_path):
    class Average(Callback):
        """A moving average that nobody knows of."""

        def __init__(self, rollback=None):
            self.rollback = rollback

        def on_fit_start(self, trainer, pl_module):
            self.average = AveragedModel(
                nn.Sequential(pl_module.first, pl_module.last),
                multi_avg_fn=get_ema_multi_avg_fn(0.9),
            )
            if self.rollback is not None:
                self.rollback.register(self.average)

        def on_train_batch_end(self, trainer, pl_module, *args):
            self.average.update_parameters(nn.Sequential(pl_module.first, pl_module.last))

    averages = []
    for name, faults in (
        ("faulty", [NanLoss(step=25), CorruptWeight(step=35, parameter="first.0.weight")]),
        ("clean", []),
    ):
        rollback = AutoRollback()
        average = Average(rollback if faults else None)
        suite = [FaultInjector(faults), GradientMonitor(), rollback] if faults else []
        run(tmp_path / name, Net, marked(), [*suite, average], max_epochs=1)
        averages.append(flat(average.average))
    assert torch.equal(*averages)


def test_object_without_state_dict_is_refused():
    with pytest.raises(TypeError, match=r"needs state_dict and load_state_dict, int lacks them"):
        AutoRollback().register(3)


class DrawsItself(Net):
    def training_step(self, dataloader_iter):
        batch, batch_idx, _ = next(dataloader_iter)
        return super().training_step(batch, batch_idx)


@pytest.mark.filterwarnings("ignore:.*dataloader_iter.*")
def test_module_that_draws_its_batches_itself_is_reported_at_fit_start(tmp_path, caplog):
    callbacks = [FaultInjector([NanLoss(step=20)]), GradientMonitor(), AutoRollback()]
    run(tmp_path, DrawsItself, marked(), callbacks, max_epochs=1)
    assert lines_of(caplog)[0] == (
        "training_step draws from dataloader_iter: batches are skipped, not replayed"
    )
    (incident,) = read_incidents(tmp_path)
    assert incident["responses"] == ["step skipped"]
    assert incident["outcome"] == "recovered"


class WritesIntoItsBatch(Net):
    def training_step(self, batch, batch_idx):
        batch[0].mul_(0.5)
        return super().training_step(batch, batch_idx)


class WritesLater(Net):
    """Writes into its batches from step 25 on."""

    def training_step(self, batch, batch_idx):
        if self.trainer.global_step >= 25:
            batch[0].mul_(0.5)
        return super().training_step(batch, batch_idx)


def test_batch_written_into_is_replayed_from_a_copy_and_that_is_said_once(tmp_path, caplog):
    faults = [NanLoss(step=20), CorruptWeight(step=33, parameter="first.0.weight")]
    callbacks = [FaultInjector(faults), GradientMonitor(), AutoRollback()]
    run(tmp_path, WritesIntoItsBatch, marked(), callbacks, max_epochs=2)
    told = lines_of(caplog)
    copies = "training_step changes its batch: a copy of each batch is kept from now on"
    assert told.count(copies) == 1
    first = next(i for i, line in enumerate(told) if line.startswith("incident"))
    assert told.index(copies) < first, "at the first batch, before anything happens"
    responses = [i["responses"] for i in read_incidents(tmp_path)]
    assert responses == [["step retried"], ["rolled back and replayed"]]


def test_batch_written_into_without_a_copy_is_skipped_and_the_remedy_is_said(tmp_path, caplog):
    callbacks = [FaultInjector([NanLoss(step=25)]), GradientMonitor(), AutoRollback()]
    run(tmp_path, WritesLater, marked(), callbacks, max_epochs=1)
    assert sum("pass AutoRollback(clone_batches=True)" in line for line in lines_of(caplog)) == 1
    (incident,) = read_incidents(tmp_path)
    assert incident["responses"] == ["step skipped"]


def test_ring_too_small_falls_back_to_new_data_and_says_so(tmp_path, caplog):
    callbacks = [
        FaultInjector([CorruptWeight(step=33, parameter="first.0.weight")]),
        GradientMonitor(),
        AutoRollback(max_replay_bytes=1000),
    ]
    module, trainer = fit(tmp_path, callbacks, Net, marked(), max_steps=80, max_epochs=None)
    assert "more than max_replay_bytes=1000: they are skipped, not replayed" in caplog.text
    (incident,) = read_incidents(tmp_path)
    assert incident["responses"] == ["rolled back"]
    assert trainer.global_step == 80
    assert torch.isfinite(flat(module)).all()


def test_ring_and_ledger_do_not_grow_with_the_run(tmp_path):
    """Memory: batches are kept back to the older snapshot and no further."""

    class Sizes(Callback):
        seen, files = (), ()

        def on_train_batch_end(self, trainer, *args):
            self.seen = (*self.seen, rollback._executor.kept_batches)
            self.files = (
                *self.files,
                len(list((tmp_path / "c").glob("*"))),
            )

    rollback, sizes = AutoRollback(), Sizes()
    checkpoint = ModelCheckpoint(tmp_path / "c", every_n_train_steps=1, save_top_k=1)
    callbacks = [GradientMonitor(), rollback, sizes, checkpoint]
    fit(tmp_path, callbacks, max_steps=400, enable_checkpointing=True)
    assert max(sizes.seen) == max(sizes.seen[:60])
    assert max(sizes.seen) <= 50
    assert max(sizes.files) <= 60, "removed ones are hidden until nothing can go back before it"
    assert len(list((tmp_path / "c").iterdir())) == 1


def test_logger_steps_stay_in_order_and_a_rejected_step_is_not_logged(tmp_path):
    logger = CSVLogger(tmp_path, name="", version="")
    callbacks = [FaultInjector([NanLoss(step=5)]), GradientMonitor(), AutoRollback()]
    trainer = make_trainer(tmp_path, callbacks, logger=logger, max_steps=20, log_every_n_steps=1)
    trainer.fit(Net(), regression_data())
    rows = (tmp_path / "metrics.csv").read_text().splitlines()
    head = rows[0].split(",")
    step, loss = head.index("step"), head.index("train/loss_step")
    logged = [(int(r[step]), r[loss]) for r in (row.split(",") for row in rows[1:]) if r[loss]]
    assert [s for s, _ in logged] == list(range(20))
    assert "nan" not in {value for _, value in logged}


@pytest.mark.parametrize(
    ("epochs", "batches", "step"), [(12, 5, 33), (12, 5, 35), (30, 2, 33), (40, 1, 33)]
)
def test_rollback_across_the_ends_of_epochs_is_exact(epochs, batches, step, tmp_path):
    options = {"max_epochs": epochs, "val": loader(Batches(2))}
    fault = CorruptWeight(step=step, parameter="first.0.weight")
    suite = [FaultInjector([fault]), GradientMonitor(), AutoRollback()]
    quiet = {"log_every_n_steps": 1, **options}
    faulty = run(tmp_path, Net, loader(Batches(batches)), suite, **quiet)
    clean = run(tmp_path / "clean", Net, loader(Batches(batches)), [], **quiet)
    assert differences(faulty, clean) == {}
    (incident,) = read_incidents(tmp_path)
    assert incident["responses"] == ["rolled back and replayed"]


def test_damage_that_always_returns_ends_in_a_stop(tmp_path):
    """S13: every stage is tried, and then it is over, with finite weights."""
    fault = CorruptWeight(step=30, steps=10**9, parameter="first.0.weight")
    suite = [FaultInjector([fault]), GradientMonitor(), AutoRollback()]
    seen = []

    def make():
        seen.append(Net())
        return seen[-1]

    with pytest.raises(TrainingStopped, match="recurred after 8 rollbacks"):
        run(tmp_path, make, marked(), suite, max_epochs=10)
    assert torch.isfinite(flat(seen[0])).all()
    (incident,) = read_incidents(tmp_path)
    assert incident["outcome"] == "stopped"
    assert incident["verdict"] == "deterministic"


@pytest.mark.parametrize("option", [{"after_rollback": "rewind"}, {"max_replay_bytes": 0}])
def test_option_out_of_range_is_refused(option):
    (value,) = option.values()
    with pytest.raises(ValueError, match=f"got {value!r}"):
        AutoRollback(**option)


def test_skipping_leaves_the_data_alone(tmp_path):
    """A rollback goes on with new batches, ``max_steps`` good ones in all."""
    callbacks = [
        FaultInjector([CorruptWeight(step=33, parameter="first.0.weight")]),
        GradientMonitor(),
        AutoRollback(after_rollback="skip"),
    ]
    _, trainer = fit(tmp_path, callbacks, Net, marked(), max_steps=70, max_epochs=None)
    assert trainer.global_step == 70
    assert trainer.fit_loop.epoch_loop.total_batch_idx > 70
