"""The sentences for a Trainer."""

import pytest
import torch

from models.causal.datamodule import CausalDataModule


def first(data, part="train"):
    return next(iter(getattr(data, f"{part}_dataloader")()))


def test_same_seed_gives_the_same_batches_and_another_epoch_another_order(data_of):
    one, other = data_of(), data_of()
    one.setup(), other.setup()
    assert torch.equal(first(one).tokens_BL, first(other).tokens_BL)
    loader = one.train_dataloader()
    epochs = [torch.cat([b.target_B for b in loader]) for _ in range(2)]
    assert not torch.equal(*epochs)
    assert torch.equal(*(each.sort().values for each in epochs))


def test_parts_are_drawn_apart(data_of):
    data = data_of()
    data.setup()
    train, val = ({(s.prefix, s.continuation) for s in data.sentences[p]} for p in ("train", "val"))
    assert len(val - train) > len(val) / 2


def test_target_after_which_a_number_comes_is_the_class_after_the_last_token(data_of, trunk):
    data = data_of(numbers=1.0)
    data.setup()
    batch = first(data)
    assert set(batch.target_B.tolist()) == {320}
    assert batch.known_B.all()
    assert (batch.value_B > 0).all()


@pytest.mark.parametrize("name", ["batch_size", "n_train", "n_val", "n_test"])
def test_empty_size_is_refused_with_its_value(name):
    with pytest.raises(ValueError, match=f"{name}=0 must be at least 1"):
        CausalDataModule(**{name: 0})
