"""What the processes of tests/callbacks/test_preemption_checkpoint.py train: fits that are sent a
signal at a chosen place, or go on from where one has ended."""

import errno
import logging
import multiprocessing
import os
import signal
import subprocess
import threading
import time
import warnings

import torch
from lightning.pytorch import Callback, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader, TensorDataset

from lit_stability import (
    AutoRollback,
    GradientMonitor,
    LastKnownGood,
    PreemptionCheckpoint,
    find_resume_checkpoint,
)
from lit_stability.callbacks.preemption_checkpoint import signal_flag
from tests.conftest import Regression, by_hand, make_trainer, regression_data
from tests.rank_cases import fit_rank, whole

STEPS = 45
SUITE = (GradientMonitor, LastKnownGood, AutoRollback)


class Call:
    """A function with options, for another process."""

    def __init__(self, function, options):
        self.function, self.options = function, options

    def __call__(self, *args):
        self.function(*args, **self.options)


def send(signum=signal.SIGTERM):
    os.kill(os.getpid(), signum)


class Once:
    """Sends a signal the first time that a place is reached at a step or later."""

    def __init__(self, place, step, signum):
        self.place, self.step, self.signum = place, step, signum

    def reached(self, place, step):
        if place == self.place and step >= self.step:
            self.place = None
            send(self.signum)


class Disturbed(Regression):
    """Reports the places that it passes."""

    once = Once(None, 0, 0)

    def __init__(self):
        super().__init__(scheduler="onecycle")

    def training_step(self, batch, batch_idx):
        self.once.reached("forward", self.trainer.global_step)
        loss = super().training_step(batch, batch_idx)
        step = self.trainer.global_step
        loss.register_hook(lambda grad: self.once.reached("backward", step))
        return loss

    def optimizer_step(self, *args, **options):
        super().optimizer_step(*args, **options)
        self.once.reached("optimizer", self.trainer.global_step)

    def validation_step(self, batch, batch_idx):
        place = "sanity check" if self.trainer.sanity_checking else "validation"
        self.once.reached(place, self.trainer.global_step)
        super().validation_step(batch, batch_idx)

    def on_train_epoch_end(self):
        self.once.reached("epoch end", self.trainer.global_step)

    def on_save_checkpoint(self, checkpoint):
        self.once.reached("save", self.trainer.global_step)


class Data(TensorDataset):
    """Reports each sample that is read, as a step of 16 samples."""

    once, count = Once(None, 0, 0), 0

    def __getitem__(self, index):
        self.count += 1
        self.once.reached("loader", self.count // 16)
        return super().__getitem__(index)


class Log(logging.Handler):
    """Prints the lines of the suite's log."""

    def emit(self, record):
        print(record.levelname, record.getMessage(), flush=True)


def quiet():
    warnings.simplefilter("ignore")
    logger = logging.getLogger("lightning.pytorch.lit_stability")
    logger.setLevel(logging.INFO)
    logger.propagate = False
    logger.handlers[:] = [Log()]


def train(folder, place=None, step=20, signum=signal.SIGTERM, grace=30.0, **options):
    """Trains, or goes on, and saves what the fit ended with to ``folder/end.pt``."""
    quiet()
    os.environ.update(options.pop("environment", {}))
    checkpoint = find_resume_checkpoint(folder) if options.pop("find", True) else None
    seed_everything(0 if checkpoint is None else 1, verbose=False)
    workers, module = options.pop("workers", 0), options.pop("module", Disturbed)()
    suite = options.pop("suite", SUITE)
    data = Data(*regression_data(19).dataset.tensors)
    Disturbed.once = Data.once = Once(place, step, signum)
    callbacks = [
        *(kind() for kind in suite),
        PreemptionCheckpoint(grace=grace),
        ModelCheckpoint(folder / "checkpoints", every_n_train_steps=7, save_top_k=-1),
        *options.pop("callbacks", ()),
    ]
    defaults = {"max_steps": STEPS, "enable_checkpointing": True, "val_check_interval": 6}
    trainer = make_trainer(folder, callbacks, **(defaults | options))
    # Workers that are children of this process, as in a script; here the default is a fork server.
    context = "fork" if workers else None
    loader = DataLoader(
        data, 16, shuffle=True, num_workers=workers, multiprocessing_context=context
    )
    (folder / "begun0").touch()
    trainer.fit(module, loader, regression_data(3, seed=1), ckpt_path=checkpoint)
    torch.save(end_of(trainer, module), folder / "end.pt")
    return trainer


def end_of(trainer, module):
    return {
        "weights": module.state_dict(),
        "optimizer": trainer.optimizers[0].state_dict(),
        "schedulers": [s.scheduler.state_dict() for s in trainer.lr_scheduler_configs],
        "rng": torch.get_rng_state(),
        "metrics": {name: float(value) for name, value in trainer.callback_metrics.items()},
        "step": trainer.global_step,
        "batches": trainer.fit_loop.epoch_loop.batch_progress.total.ready,
    }


def train_with_a_signal_in_the_save(folder):
    """The second signal comes while the checkpoint for the first is written."""

    class Twice(Disturbed):
        def on_save_checkpoint(self, checkpoint):
            if self.trainer.global_step == 20:
                send()

    train(folder, "forward", 19, module=Twice)


def train_with_a_full_disk(folder):
    """The checkpoint cannot be written."""

    class Full(Disturbed):
        def on_save_checkpoint(self, checkpoint):
            if self.trainer.global_step == 20:
                raise OSError(errno.ENOSPC, "no space left on device")

    train(folder, "forward", 19, module=Full)


def fork_in_a_fit(folder):
    """What a forked process does at the signals that mean the fit."""

    class Forks(Callback):
        def on_train_batch_start(self, trainer, *args):
            if trainer.global_step == 5:
                child = multiprocessing.get_context("fork").Process(target=time.sleep, args=(60,))
                child.start()
                time.sleep(0.2)
                os.kill(child.pid, signal.SIGUSR1)
                time.sleep(0.2)
                assert child.is_alive()
                child.terminate()
                child.join(10)
                assert child.exitcode == -signal.SIGTERM

    train(folder, callbacks=[Forks()])


class ByHand(by_hand(Disturbed)):
    """Steps its optimizer itself; the scheduler is left out."""

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), 1e-2)


class ByLBFGS(Disturbed):
    """A closure that runs many times per step."""

    def configure_optimizers(self):
        return torch.optim.LBFGS(self.parameters(), 1e-2, max_iter=3)


class WithoutSomeSteps(Disturbed):
    """Returns no loss for every third batch, the ones after the signal among them."""

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        return None if batch_idx >= 15 else loss


def train_slowly(folder, seconds=0.04, **options):
    """A fit that takes a second, for signals at any moment."""

    class Slow(Callback):
        def on_train_batch_start(self, *args):
            time.sleep(seconds)

    train(folder, callbacks=[Slow()], **options)


def train_with_endless_validation(folder, interruptible=True):
    """The grace time expires in a validation."""

    class Endless(Disturbed):
        def validation_step(self, batch, batch_idx):
            if self.trainer.global_step >= 12:
                send()
                lock = threading.Lock()
                lock.acquire()
                if interruptible:
                    time.sleep(60)
                else:
                    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
                    time.sleep(60)

    signal_flag.UNWIND = 1.0

    class Ends(Callback):
        def on_exception(self, trainer, pl_module, exception):
            print("on_exception", type(exception).__name__, flush=True)

    train(folder, module=Endless, grace=0.5, callbacks=[Ends()])


def train_with_handler(folder):
    """A handler of the program, from before the fit, is called and there again after it."""
    calls = []

    def own(signum, frame):
        calls.append(signum)

    signal.signal(signal.SIGTERM, own)
    signal.signal(signal.SIGUSR1, own)
    try:
        train(folder, "forward", 10)
    except SystemExit as end:
        assert calls == [signal.SIGTERM], calls
        assert signal.getsignal(signal.SIGTERM) is own
        assert signal.getsignal(signal.SIGUSR1) is own
        raise SystemExit(end.code - 100) from None


def train_with_own_usr1(folder):
    """SIGUSR1 belongs to the program, and the fit goes on."""
    calls = []
    signal.signal(signal.SIGUSR1, lambda *_: calls.append(1))
    train(folder, "forward", 10, signal.SIGUSR1)
    assert calls == [1]


def train_with_stacks(folder):
    """SIGUSR1 prints the stacks, by a handler in C that Python does not know of."""
    import faulthandler

    with open(folder / "stacks", "w") as file:
        faulthandler.register(signal.SIGUSR1, file)
        train(folder, "forward", 10, signal.SIGUSR1)


def train_in_a_thread(folder):
    """Outside of the main thread nothing can be installed."""
    thread = threading.Thread(target=train, args=(folder,))
    thread.start()
    thread.join()


def fit_twice_and_validate(folder):
    """The handlers of the program are there between and after."""
    before = {s: signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGUSR1, signal.SIGCHLD)}
    trainer = train(folder)
    assert {s: signal.getsignal(s) for s in before} == before
    trainer.validate(trainer.lightning_module, regression_data(3), verbose=False)
    trainer.fit_loop.epoch_loop.max_steps = STEPS + 10
    trainer.fit(trainer.lightning_module, regression_data(19))
    assert trainer.global_step == STEPS + 10
    assert {s: signal.getsignal(s) for s in before} == before
    assert threading.active_count() == 1


def train_as_a_group(folder, signum, workers=2):
    """The scheduler sends the signal to every process of the job, the loader's workers included."""

    class ToAll(Callback):
        def on_before_backward(self, trainer, *args):
            if trainer.global_step == 20:
                command = ["kill", f"-{int(signum)}", "--", f"-{os.getpgrp()}"]
                # Not by this process: a worker takes SIGTERM from it for the end of the loader.
                subprocess.run(command, start_new_session=True, check=True)
                time.sleep(0.3)

    os.setpgid(0, 0)
    resumed = find_resume_checkpoint(folder) is not None
    train(folder, workers=workers, callbacks=[] if resumed else [ToAll()])


def train_rank(root, name, hits, step=12, signum=signal.SIGTERM, grace=30.0, endless=(), **options):
    """One of two ranks; those in `hits` are sent a signal, those in `endless` stop for ever."""
    quiet()
    rank, resume = int(os.environ["LOCAL_RANK"]), find_resume_checkpoint(root)
    if environment := options.pop("environment", {}):
        of_rank = {"SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank)}
        os.environ |= environment | of_rank | {"SLURM_NTASKS": "2", "SLURM_NTASKS_PER_NODE": "2"}

    class Hit(Callback):
        def on_before_backward(self, trainer, *args):
            if trainer.global_step == step and rank in hits and resume is None:
                send(signum if isinstance(signum, int) else signum[rank])
            if trainer.global_step == step and rank in endless:
                time.sleep(60)

    class Places(Callback):
        def on_exception(self, trainer, pl_module, exception):
            print("ended at", trainer.global_step, flush=True)

    suite = [GradientMonitor(), LastKnownGood(), PreemptionCheckpoint(grace=grace), AutoRollback()]
    callbacks = [Hit(), *suite, Places()]
    defaults = {"max_steps": 30, "val": True, "resume": resume}
    net, trainer = fit_rank(root, name, callbacks, **(defaults | options))
    norm = float(whole(net.parameters()).norm())
    print("finished at", trainer.global_step, norm, flush=True)
