"""What two ranks run where the loss changes on purpose."""

from tests.rank_cases import Net, outcome


class Staged(Net):
    """Its loss has a factor of a thousand from step 40 on."""

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        return loss * 1000 if self.global_step >= 40 else loss


def changed(root):
    """What a rank tells of it, by strategy."""
    return {
        name: outcome(root / name, name, module=Staged, max_steps=90) for name in ("ddp", "fsdp2")
    }
