"""What programs do besides a plain ``training_step``, for the matrix of exact recoveries.

Modules and callbacks that keep state, write weights themselves, train other parameters from some
epoch on, or change their batches.
"""

import copy

import torch
from lightning.pytorch.callbacks import (
    BackboneFinetuning,
    BaseFinetuning,
    Callback,
    GradientAccumulationScheduler,
    ModelCheckpoint,
    StochasticWeightAveraging,
)
from torch import nn

from tests.exact import Batches, loader
from tests.exact_net import Net


class Weighted(Net):
    """Weighs its loss by `weight`, which subclasses compute from what they keep."""

    def weight(self, x):
        return 1.0

    def training_step(self, batch, batch_idx):
        return super().training_step(batch, batch_idx) * self.weight(batch[0])


class CountsSteps(Weighted):
    """A weight that is annealed by a counter of its own."""

    seen = 0

    def weight(self, x):
        self.seen += 1
        return 1 / (1 + 0.05 * self.seen)


class RunningScale(Weighted):
    """A running average in a float attribute, which a NaN would spoil for good."""

    def __init__(self):
        super().__init__()
        self.scale = 1.0

    def weight(self, x):
        self.scale = 0.9 * self.scale + 0.1 * float(x.square().mean())
        return 1 / self.scale


class RunningTensors(Weighted):
    """One tensor attribute is changed in place, another is replaced."""

    def __init__(self):
        super().__init__()
        self.counts, self.mean = torch.zeros(8), torch.zeros(8)

    def weight(self, x):
        self.counts += (x > 0).sum(0)
        self.mean = 0.9 * self.mean + 0.1 * x.mean(0)
        return 1 + 1e-3 * self.counts.sum() / (1 + self.mean.square().sum())


class Centre(nn.Module):
    """A submodule that initializes itself from its first batch, behind a flag."""

    def __init__(self):
        super().__init__()
        self.initialized, self.calls, self.value = False, 0, None

    def forward(self, x):
        self.calls += 1
        if not self.initialized:
            self.value, self.initialized = x.mean(0), True
        self.value.lerp_(x.mean(0), 0.1)
        return x - self.value.detach() / self.calls


class StateInSubmodule(Net):
    def __init__(self):
        super().__init__()
        self.centre = Centre()

    def training_step(self, batch, batch_idx):
        x, y = batch
        return super().training_step((self.centre(x), y), batch_idx)


class Codebook(Net):
    """Adds the nearest of eight codes to its input; averages pull the codes to the data."""

    def __init__(self, kind="parameter"):
        super().__init__()
        codes = torch.randn(8, 8)
        if kind == "buffer":
            self.register_buffer("codes", codes)
        else:
            self.codes = nn.Parameter(codes, requires_grad=kind == "trained")
        self.kind = kind

    def training_step(self, batch, batch_idx):
        x, y = batch
        nearest = torch.cdist(x.detach(), self.codes.detach()).argmin(1)
        with torch.no_grad():
            hit = torch.zeros(8, 8).index_add(0, nearest, x)
            count = torch.bincount(nearest, minlength=8).unsqueeze(1)
            mean = torch.where(count > 0, hit / count.clamp(min=1), self.codes)
            codes = self.codes.data if self.kind == "written through data" else self.codes
            codes.lerp_(mean, 0.1)
        return super().training_step((x + 0.1 * self.codes[nearest], y), batch_idx)

    def configure_optimizers(self):
        trained = [p for n, p in self.named_parameters() if n != "codes" or self.kind == "trained"]
        return torch.optim.AdamW(trained, 1e-2)


class Teacher(Net):
    """A slow copy of the first layer, updated after each batch, that the loss looks at."""

    def __init__(self, through_data=True):
        super().__init__()
        self.slow = copy.deepcopy(self.first[0]).requires_grad_(False)
        self.through_data = through_data

    def training_step(self, batch, batch_idx):
        apart = (self.slow(batch[0]) - self.first[0](batch[0])).square().mean()
        return super().training_step(batch, batch_idx) + 0.01 * apart

    @torch.no_grad()
    def on_train_batch_end(self, outputs, batch, batch_idx):
        for slow, fast in zip(self.slow.parameters(), self.first[0].parameters(), strict=True):
            (slow.data if self.through_data else slow).lerp_(fast, 0.1)


class RestartsCodes(Net):
    """Overwrites rows of a trained weight by rows of the batch, now and then."""

    def __init__(self):
        super().__init__()
        self.steps = 0

    def training_step(self, batch, batch_idx):
        self.steps += 1
        if self.steps % 7 == 0:
            self.first[0].weight.data[self.steps % 16] = 0.1 * batch[0][0]
        return super().training_step(batch, batch_idx)


class Projects(Net):
    """Normalizes the rows of a weight before each forward pass, and clamps another afterwards."""

    def training_step(self, batch, batch_idx):
        weight = self.first[0].weight
        weight.data.div_(weight.data.norm(dim=1, keepdim=True).clamp(min=1))
        return super().training_step(batch, batch_idx)

    @torch.no_grad()
    def on_train_batch_end(self, outputs, batch, batch_idx):
        self.last[1].weight.clamp_(-0.3, 0.3)


class LateBuffer(Net):
    """A buffer that follows the batches, updated after each of them."""

    def __init__(self):
        super().__init__()
        self.register_buffer("level", torch.zeros(8))

    def training_step(self, batch, batch_idx):
        x, y = batch
        return super().training_step((x - self.level, y), batch_idx)

    def on_train_batch_end(self, outputs, batch, batch_idx):
        self.level = 0.9 * self.level + 0.1 * batch[0].mean(0)


class ByHand(CountsSteps):
    """One backward pass for two optimizers, a counter, and a teacher updated in the step."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False
        self.slow = copy.deepcopy(self.first[0]).requires_grad_(False)

    def training_step(self, batch, batch_idx):
        apart = (self.slow(batch[0]) - self.first[0](batch[0])).square().mean()
        loss = super().training_step(batch, batch_idx) + 0.01 * apart
        for optimizer in self.optimizers():
            optimizer.zero_grad()
        self.manual_backward(loss)
        for optimizer in self.optimizers():
            optimizer.step()
        with torch.no_grad():
            for slow, fast in zip(self.slow.parameters(), self.first[0].parameters(), strict=True):
                slow.lerp_(fast, 0.1)

    def configure_optimizers(self):
        trunk = torch.optim.AdamW(self.first.parameters(), 1e-2)
        return [trunk, torch.optim.SGD(self.last.parameters(), 1e-2, momentum=0.9)]


class UpdatesByHand(Net):
    """Updates one parameter itself, from its gradient, and leaves it out of the optimizer."""

    def on_after_backward(self):
        bias = self.first[0].bias
        bias.data.sub_(0.01 * bias.grad)
        bias.grad = None

    def configure_optimizers(self):
        trained = [p for n, p in self.named_parameters() if n != "first.0.bias"]
        return torch.optim.AdamW(trained, 1e-2)


class DrawsAfterwards(Net):
    """Draws the noise of the next batch at the end of each."""

    def __init__(self):
        super().__init__()
        self.noise = 0.0

    def training_step(self, batch, batch_idx):
        return super().training_step((batch[0] + self.noise, batch[1]), batch_idx)

    def on_train_batch_end(self, outputs, batch, batch_idx):
        self.noise = 0.01 * float(torch.randn(()))


class Unfreezes(Net):
    """Trains the first layer from the second epoch on; a flag says that it was done."""

    def __init__(self):
        super().__init__()
        self.first[0].requires_grad_(False)
        self.unfrozen = False

    def on_train_epoch_start(self):
        if self.trainer.current_epoch == 1 and not self.unfrozen:
            unfreeze(self, self.trainer)
            self.unfrozen = True

    def configure_optimizers(self):
        return torch.optim.AdamW((p for p in self.parameters() if p.requires_grad), 1e-2)


def unfreeze(module, trainer):
    module.first[0].requires_grad_(True)
    trainer.optimizers[0].add_param_group({"params": [*module.first[0].parameters()], "lr": 1e-3})


class Frozen(Net):
    """Its first layers are left to a callback to unfreeze."""

    def __init__(self, scheduled=False):
        super().__init__()
        self.backbone = self.first[0]
        self.scheduled = scheduled

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW((p for p in self.parameters() if p.requires_grad), 1e-2)
        if not self.scheduled:
            return optimizer
        return [optimizer], [torch.optim.lr_scheduler.LambdaLR(optimizer, lambda e: 0.9**e)]


class UnfreezesOnce(Callback):
    """Unfreezes in the second epoch, and keeps that it has in an attribute."""

    done = False

    def setup(self, trainer, pl_module, stage):
        pl_module.first.requires_grad_(False)

    def on_train_epoch_start(self, trainer, pl_module):
        if trainer.current_epoch != 1 or self.done:
            return
        self.done = True
        pl_module.first.requires_grad_(True)
        group = {"params": [*pl_module.first.parameters()], "lr": 1e-3, "initial_lr": 1e-3}
        trainer.optimizers[0].add_param_group(group)
        for config in trainer.lr_scheduler_configs:
            config.scheduler.base_lrs.append(1e-3)
            config.scheduler.lr_lambdas.append(config.scheduler.lr_lambdas[0])


class JoinsTheGroup(UnfreezesOnce):
    """Puts the unfrozen parameters into the group that is there."""

    def on_train_epoch_start(self, trainer, pl_module):
        if trainer.current_epoch == 1 and not self.done:
            self.done = True
            pl_module.first.requires_grad_(True)
            trainer.optimizers[0].param_groups[0]["params"].extend(pl_module.first.parameters())


class FreezesForAnEpoch(Callback):
    """Freezes a layer at the first batch of the second epoch, and unfreezes it in the third."""

    frozen = False

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if (trainer.current_epoch == 1) != self.frozen:
            self.frozen = not self.frozen
            pl_module.first[0].requires_grad_(not self.frozen)


class Finetunes(BaseFinetuning):
    """Unfreezes with Lightning's base class, and keeps a flag of its own."""

    def __init__(self):
        super().__init__()
        self.done = False

    def freeze_before_training(self, pl_module):
        self.freeze(pl_module.backbone)

    def finetune_function(self, pl_module, epoch, optimizer):
        if epoch == 1 and not self.done:
            self.unfreeze_and_add_param_group(pl_module.backbone, optimizer, lr=1e-3)
            self.done = True


class Curriculum(Callback):
    """Raises the dropout step by step; its state is saved in checkpoints."""

    def __init__(self):
        self.level = 0

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.level += 1
        pl_module.last[0].p = min(0.5, 0.1 + 0.002 * self.level)

    def state_dict(self):
        return {"level": self.level}

    def load_state_dict(self, state_dict):
        self.level = state_dict["level"]


class SlowWeights(Callback):
    """Averages the weights in a dict of its own, and pulls the weights to it now and then."""

    def __init__(self):
        self.slow, self.steps = {}, 0

    @torch.no_grad()
    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.steps += 1
        for name, p in pl_module.named_parameters():
            slow = self.slow.setdefault(name, p.detach().clone())
            slow.lerp_(p, 0.2)
            if self.steps % 5 == 0:
                p.copy_(slow)

    def state_dict(self):
        return {"slow": self.slow, "steps": self.steps}

    def load_state_dict(self, state_dict):
        self.slow, self.steps = dict(state_dict["slow"]), state_dict["steps"]


class Lookahead(torch.optim.SGD):
    """An optimizer that keeps a count in an attribute."""

    def __init__(self, parameters):
        super().__init__(parameters, 1e-2, momentum=0.9)
        self.count = 0

    def step(self, closure=None):
        loss = super().step(closure)
        self.count += 1
        if self.count % 5 == 0:
            with torch.no_grad():
                for p in self.param_groups[0]["params"]:
                    p.mul_(0.99)
        return loss


class OwnOptimizer(Net):
    def configure_optimizers(self):
        return Lookahead(self.parameters())


class Sample:
    """A batch of a graph library: Lightning passes the object itself on."""

    def __init__(self, x, y):
        self.x, self.y = x, y


class InObjects(Batches):
    def __getitem__(self, index):
        return Sample(*super().__getitem__(index))


class InDicts(Batches):
    def __getitem__(self, index):
        x, y = super().__getitem__(index)
        return {"x": x, "y": y}


class InArrays(Batches):
    def __getitem__(self, index):
        return [each.numpy() for each in super().__getitem__(index)]


class InLists(Batches):
    def __getitem__(self, index):
        return list(super().__getitem__(index))


class OwnMemory(Batches):
    """Returns views of its own memory, so that a write into a batch changes the data."""

    def __getitem__(self, index):
        return self.x[index], self.y[index]


class RebindsAttribute(Net):
    def training_step(self, batch, batch_idx):
        batch.x = 0.5 * batch.x
        return super().training_step((batch.x, batch.y), batch_idx)


class RebindsItem(Net):
    def training_step(self, batch, batch_idx):
        batch["x"] = 0.5 * batch["x"]
        return super().training_step((batch["x"], batch["y"]), batch_idx)


class WritesArrays(Net):
    def training_step(self, batch, batch_idx):
        batch[0] *= 0.5
        return super().training_step([torch.from_numpy(each) for each in batch], batch_idx)


class EmptiesList(Net):
    def training_step(self, batch, batch_idx):
        y, x = batch.pop(), batch.pop()
        return super().training_step((x, y), batch_idx)


class WritesTensors(Net):
    def training_step(self, batch, batch_idx):
        batch[0].mul_(0.5)
        return super().training_step(batch, batch_idx)


class WritesInHook(Net):
    def on_after_batch_transfer(self, batch, dataloader_idx):
        if self.trainer.training:
            batch[0].add_(0.01 * torch.randn_like(batch[0]))
        return batch


def batches_of(kind):
    return lambda **o: loader(kind(**o), collate_fn=lambda item: item)


def with_callback(make, module=Net):
    return {"module": module, "callbacks": lambda root: [make()]}


PRACTICES = {
    "counter in an attribute": {"module": CountsSteps},
    "average in a float": {"module": RunningScale},
    "averages in tensors": {"module": RunningTensors},
    "state of a submodule": {"module": StateInSubmodule},
    "codebook, frozen parameter": {"module": Codebook},
    "codebook, through data": {"module": lambda: Codebook("written through data")},
    "codebook, trained": {"module": lambda: Codebook("trained")},
    "codebook, buffer": {"module": lambda: Codebook("buffer")},
    "teacher, through data": {"module": Teacher},
    "teacher": {"module": lambda: Teacher(through_data=False)},
    "restarted codes": {"module": RestartsCodes},
    "projections": {"module": Projects},
    "buffer after the batch": {"module": LateBuffer},
    "two optimizers, one backward": {"module": ByHand},
    "parameter updated by hand": {"module": UpdatesByHand},
    "random numbers after the batch": {"module": DrawsAfterwards},
    "module unfreezes": {"module": Unfreezes},
    "callback unfreezes": with_callback(UnfreezesOnce, Frozen),
    "callback unfreezes, LambdaLR": with_callback(UnfreezesOnce, lambda: Frozen(scheduled=True)),
    "callback adds to a group": with_callback(JoinsTheGroup, Frozen),
    "layer frozen for an epoch": with_callback(FreezesForAnEpoch) | {"max_epochs": 3},
    "BaseFinetuning": with_callback(Finetunes, Frozen),
    "BackboneFinetuning": with_callback(
        lambda: BackboneFinetuning(1, lambda epoch: 3.0, backbone_initial_lr=1e-3), Frozen
    ),
    "accumulation from an epoch on": with_callback(lambda: GradientAccumulationScheduler({1: 2})),
    "SWA": with_callback(lambda: StochasticWeightAveraging(1e-2, 1)) | {"max_epochs": 3},
    "callback with a state": with_callback(Curriculum),
    "slow weights of a callback": with_callback(SlowWeights),
    "optimizer with a counter": {"module": OwnOptimizer},
    "ModelCheckpoint with a link": {
        "enable_checkpointing": True,
        "callbacks": lambda root: [
            ModelCheckpoint(
                root / "linked",
                every_n_train_steps=4,
                save_top_k=2,
                monitor="step",
                mode="max",
                filename="{step}",
                save_last="link",
            )
        ],
    },
    "batch, attribute rebound": {"module": RebindsAttribute, "loader": batches_of(InObjects)},
    "batch, item rebound": {"module": RebindsItem, "loader": batches_of(InDicts)},
    "batch, array written": {"module": WritesArrays, "loader": batches_of(InArrays)},
    "batch, list emptied": {"module": EmptiesList, "loader": batches_of(InLists)},
    "batch, tensor written": {"module": WritesTensors},
    "batch, memory of the data": {"module": WritesTensors, "loader": batches_of(OwnMemory)},
    "batch, written in a hook": {"module": WritesInHook},
}
