"""Weights, as a meter sees them, in; those that no update has changed so, out."""

import copy
import dataclasses
import math
from itertools import pairwise

import pytest
import torch
from lightning.pytorch import Callback
from torch import nn
from torch.optim import lr_scheduler as s

from lit_stability import stability_callbacks
from lit_stability.detectors import WeightCorruption
from lit_stability.measurement.step_meter import StepMeter
from lit_stability.measurement.step_stats import WeightMoves
from tests.conftest import fit, flat
from tests.detectors.streams import anomalies_of, step, steps_of, through_a_checkpoint


def rows(norms, distance=0.02, rate=0.01, gradient=0.1):
    """One scan of one weight in ten steps; its largest value and elements stay as they are."""
    out = []
    for i, (before, now) in enumerate(pairwise(norms)):
        moves = WeightMoves(
            since=10 * i,
            norms=(before,),
            peaks=((0.5, 0.5),),
            distances=(distance,),
            farthest=((0.01, 0.01),),
        )
        fields = {"weight_norms": (("w", now),), "weight_moves": moves, "names": ("w",)}
        fields |= {"grad_norms": (gradient,), "learning_rates": (rate,)}
        out.append(step(10 * i + 10, **fields))
    return out


STEADY = [10.0 + 0.01 * i for i in range(9)]


@pytest.mark.parametrize(
    ("norms", "options", "expected"),
    [
        (STEADY, {}, []),
        ([*STEADY, 11.0, 11.01, 11.02], {}, [90]),
        ([*STEADY, 9.0], {}, [90]),
        # The tensor has moved as far, by the sample.
        ([*STEADY, 11.0], {"distance": 0.4}, []),
        # Learning rate and gradients explain it.
        ([*STEADY, 11.0], {"rate": 10.0}, []),
        # Not ten times as much as it has done before; not a thousandth of it.
        ([10.0, 10.2, 10.0, 10.2, 10.0, 11.5], {}, []),
        ([10.0, 10.0001, 10.0002, 10.0003, 10.0004, 10.009], {"distance": 0.0}, []),
        # Too early to say; non-finite ones are for another detector.
        ([10.0, 10.01, 10.02, 11.0], {}, []),
        ([*STEADY, math.inf, 11.0], {}, []),
    ],
)
def test_change_of_a_norm_that_nothing_explains_is_flagged(norms, options, expected):
    assert steps_of(anomalies_of(WeightCorruption(), rows(norms, **options))) == expected


@pytest.mark.parametrize(
    ("moved", "rate", "adaptive", "expected"),
    [
        # Elements move by 0.001 as a rule; the largest of all is 0.5.
        (0.06, 0.001, False, [90]),
        (0.06, 0.001, True, [90]),
        # A tenth of the largest is the least.
        (0.045, 0.001, False, []),
        # Adam may have moved it by four learning rates; gradient descent has never.
        (0.06, 0.02, True, []),
        (0.06, 0.02, False, [90]),
    ],
)
def test_element_that_moved_far_beyond_all_others_is_flagged(moved, rate, adaptive, expected):
    stream = rows([*STEADY, 10.09], rate=rate)
    near = {"moment_ratio": 1.0 if adaptive else None}
    for i, stats in enumerate(stream):
        farthest = ((moved if i == 8 else 0.001, 0.001),)
        moves = dataclasses.replace(stats.weight_moves, farthest=farthest)
        stream[i] = dataclasses.replace(stats, weight_moves=moves, **near)
    assert steps_of(anomalies_of(WeightCorruption(), stream)) == expected


def test_state_is_corrupted_since_the_scan_before():
    (anomaly,) = anomalies_of(WeightCorruption(), rows([*STEADY, 11.0]))
    assert anomaly.state_corrupted
    assert not anomaly.warn_only
    assert (anomaly.since, anomaly.layers) == (80, (("w", 11.0),))
    assert (anomaly.baseline, anomaly.value) == (pytest.approx(10.08), 11.0)


def test_what_comes_back_when_the_steps_are_taken_again_is_accepted():
    """The memory is not wrong twice in one place: it is the run's own code, such as pruning."""
    detector, stream = WeightCorruption(), rows([*STEADY, 11.0])
    anomalies_of(detector, stream[:-1])
    state = through_a_checkpoint(detector.state_dict())
    assert detector.check(stream[-1]) is not None
    detector.load_state_dict(state)
    assert detector.check(stream[-1]) is None
    assert detector.regimes == 1


def test_next_corruption_of_the_same_weight_is_flagged_again():
    stream = rows([*STEADY, 11.0, 11.01, 11.02, 11.03, 14.0])
    assert steps_of(anomalies_of(WeightCorruption(), stream)) == [90, 130]


def test_overflow_of_a_loss_scaler_does_not_blind_it():
    stream = rows([*STEADY, 11.0])
    overflow = dataclasses.replace(stream[5], step=55, grad_norm=math.inf, grad_norms=(math.inf,))
    overflow = dataclasses.replace(overflow, weight_norms=(), weight_moves=None)
    assert steps_of(anomalies_of(WeightCorruption(), [*stream[:5], overflow, *stream[5:]])) == [90]


def test_rejected_step_teaches_nothing_and_state_survives_a_checkpoint():
    detector, stream = WeightCorruption(), rows([*STEADY, 11.0])
    anomalies_of(detector, stream[:-1])
    before = detector.state_dict()
    twin = WeightCorruption()
    twin.load_state_dict(through_a_checkpoint(before))
    assert anomalies_of(detector, stream[-1:]) == anomalies_of(twin, stream[-1:])
    assert detector.state_dict() == before


class Words(nn.Module):
    """An embedding of which a batch uses few rows, a norm, and a single number."""

    def __init__(self, *, sparse=False, tied=False, batch_norm=False):
        super().__init__()
        self.words = nn.Embedding(1000, 32, sparse=sparse)
        self.up, self.down = nn.Linear(32, 128), nn.Linear(128, 32)
        self.norm = nn.BatchNorm1d(128) if batch_norm else nn.LayerNorm(128)
        self.scale, self.head = nn.Parameter(torch.ones(())), nn.Linear(32, 1000)
        if tied:
            nn.init.normal_(self.words.weight, std=0.05)
            self.head.weight = self.words.weight

    def forward(self, x):
        return self.head(self.scale * self.down(self.norm(self.up(self.words(x))).relu()))


class Run:
    """A real run of `Words` under the detector, batches of 8 to 128 words of a skew vocabulary."""

    def __init__(self, net, optimizer, schedule=None):
        torch.manual_seed(0)
        self.net, self.step, self.found = net(), 0, []
        self.optimizer = optimizer(self.net.parameters())
        self.schedule = schedule and schedule(self.optimizer)
        self.meter = StepMeter(self.net.named_parameters(), self.optimizer)
        self.detector = WeightCorruption()

    def measure(self, meter=None):
        size = int(8 + 120 * torch.rand(()) ** 4)
        x = (1000 * torch.rand(size) ** 3).long()
        self.optimizer.zero_grad()
        nn.functional.cross_entropy(self.net(x), (7 * x + 3) % 1000).backward()
        rates = [group["lr"] for group in self.optimizer.param_groups]
        scan = (self.step + 1) % 10 == 0
        meter = meter or self.meter
        return meter.measure(self.step, None, learning_rates=rates, scan_weights=scan)

    def train(self, steps):
        for _ in range(steps):
            self.found += anomalies_of(self.detector, [self.measure()])
            self.optimizer.step()
            if self.schedule:
                self.schedule.step()
            self.step += 1
        return self

    def finds(self, name, index, bit):
        """Whether a bit flipped before the next scan is found, and how; restores all."""
        memory = dict(self.net.named_parameters())[name].data.view(-1).view(torch.int32)
        memory[index] ^= 1 << bit
        stats = self.measure(copy.copy(self.meter))
        memory[index] ^= 1 << bit
        if stats.bad_weights:
            return "non-finite"
        anomaly = copy.deepcopy(self.detector).check(stats)
        return None if anomaly is None else anomaly.layers[0][0]


OPTIMIZERS = {
    "SGD": lambda p: torch.optim.SGD(p, 0.1),
    "momentum": lambda p: torch.optim.SGD(p, 0.3, momentum=0.9),
    "AdamW": lambda p: torch.optim.AdamW(p, 1e-3, weight_decay=0.1),
    "AdamW, 0.1": lambda p: torch.optim.AdamW(p, 0.1),
}
NETS = {
    "embedding": Words,
    "tied": lambda: Words(tied=True),
    "BatchNorm": lambda: Words(batch_norm=True),
}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("net", NETS)
def test_real_optimizer_changes_no_weight_beyond_what_is_explained(net, optimizer):
    assert Run(NETS[net], OPTIMIZERS[optimizer]).train(150).found == []


SCHEDULES = {
    "warm-up": lambda o: s.LambdaLR(o, lambda i: min(1.0, (i + 1) / 100)),
    "warm restarts": lambda o: s.CosineAnnealingWarmRestarts(o, 50),
    "a thousandth, then full": lambda o: s.ConstantLR(o, 1e-3, 80),
}


@pytest.mark.parametrize("optimizer", ["SGD", "AdamW"])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_schedule_that_jumps_is_explained(schedule, optimizer):
    assert Run(Words, OPTIMIZERS[optimizer], SCHEDULES[schedule]).train(150).found == []


@pytest.mark.parametrize("optimizer", ["SGD", "momentum"])
def test_sparse_gradients_of_an_embedding_are_explained(optimizer):
    assert Run(lambda: Words(sparse=True), OPTIMIZERS[optimizer]).train(150).found == []


def test_weights_put_back_by_a_rollback_are_not_compared_with_those_before():
    run = Run(Words, OPTIMIZERS["AdamW"]).train(60)
    weights, windows = copy.deepcopy(run.net.state_dict()), run.detector.state_dict()
    run.train(100)
    run.net.load_state_dict({n: 3 * w for n, w in weights.items()})
    run.detector.load_state_dict(windows)
    run.meter.forget()
    assert run.train(40).found == []


@pytest.fixture(scope="module", params=["SGD", "AdamW"])
def trained(request):
    """109 steps of a run: the next scans the weights."""
    return Run(Words, OPTIMIZERS[request.param]).train(109)


@pytest.fixture(scope="module")
def adamw():
    return Run(Words, OPTIMIZERS["AdamW"]).train(109)


@pytest.mark.parametrize(
    ("name", "index", "bits"),
    [
        # Of a gain every flip, up or down, and of a single number.
        ("norm.weight", 0, range(23, 30)),
        ("norm.weight", 127, range(23, 30)),
        ("scale", 0, range(23, 30)),
    ],
)
def test_flipped_exponent_bit_of_a_small_tensor_is_found(trained, name, index, bits):
    assert {bit: trained.finds(name, index, bit) for bit in bits} == dict.fromkeys(bits, name)


@pytest.mark.parametrize("name", ["words.weight", "up.weight", "head.weight", "norm.weight"])
def test_top_exponent_bit_makes_a_norm_that_is_not_finite(trained, name):
    """N3: what the scan itself finds."""
    assert trained.finds(name, 0, 30) == "non-finite"


@pytest.mark.parametrize("name", ["up.weight", "down.weight", "head.weight"])
def test_flip_that_makes_an_element_of_a_large_tensor_sixteenfold_is_found(adamw, name):
    """Of values below 1 two exponent bits are 0 as a rule: the top one, and one of those below."""
    weight = dict(adamw.net.named_parameters())[name].detach().flatten()
    band = ((weight.abs() > 1 / 32) & (weight.abs() < 1 / 16)).nonzero().flatten().tolist()
    assert {adamw.finds(name, i, 25) for i in band[:20]} == {name}


@pytest.mark.parametrize("bit", [26, 29])
def test_element_of_a_large_tensor_that_nearly_vanishes_is_not_found(trained, bit):
    """A limit: one element of 32,000 less, outside of the sample, changes nothing measured."""
    assert trained.finds("head.weight", 40, bit) is None


@pytest.mark.parametrize(
    "options", [{"slack": 0.5}, {"ratio": 0.9}, {"floor": 0.0}, {"min_history": 0}]
)
def test_option_out_of_range_is_refused_and_repeated(options):
    with pytest.raises(ValueError, match=f"got {next(iter(options.values()))}"):
        WeightCorruption(**options)


class Flip(Callback):
    """Flips a bit of a BatchNorm gain in memory: once, or whenever the step comes."""

    def __init__(self, always=False):
        self.always, self.flips = always, 0

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == 44 and (self.always or not self.flips):
            self.flips += 1
            pl_module.net[1].weight.data[3:4].view(torch.int32).bitwise_xor_(1 << 26)


def test_flipped_bit_of_a_run_is_taken_back_as_if_it_had_never_been(tmp_path):
    clean, _ = fit(tmp_path, stability_callbacks(), max_steps=80)
    suite = stability_callbacks()
    damaged, _ = fit(tmp_path, [*suite, Flip()], max_steps=80)
    (incident,) = suite[0].incidents
    assert (incident.first.kind, incident.outcome) == ("weight corruption", "recovered")
    assert incident.first.layers[0][0] == "net.1.weight"
    assert torch.equal(flat(clean), flat(damaged))


def test_change_that_the_run_makes_itself_is_accepted_after_one_rollback(tmp_path):
    suite, flip = stability_callbacks(), Flip(always=True)
    _, trainer = fit(tmp_path, [*suite, flip], max_steps=80)
    assert [i.first.kind for i in suite[0].incidents] == ["weight corruption"]
    assert (flip.flips, trainer.global_step) == (2, 80)
