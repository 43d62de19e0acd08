"""Backbone and heads together, C1."""

import torch

from models.causal.batches import Batch


def test_prediction_has_a_class_for_every_token_and_one_for_numbers(module_of, batch):
    network = module_of().network
    n_tokens = network.trunk.get_input_embeddings().weight.shape[0]
    found = network(batch)
    assert network.num_id == n_tokens
    assert tuple(found.scores_BK.loc.shape) == (len(batch.target_B), n_tokens + 1)
    assert tuple(found.value_B.scale.shape) == (len(batch.target_B),)
    assert (found.scores_BK.scale > 0).all()


def test_padding_changes_no_prediction(module_of, batch):
    network = module_of().network.eval()
    longer = Batch(*(torch.nn.functional.pad(each, (0, 5)) for each in batch[:4]), *batch[4:])
    with torch.no_grad():
        one, other = network(batch), network(longer)
    assert torch.allclose(one.scores_BK.loc, other.scores_BK.loc, atol=1e-6)


def test_value_of_a_number_is_seen_and_its_place_in_the_padding_is_not(module_of, batch):
    network = module_of().network.eval()
    number_BL = batch.tokens_BL == network.num_id
    rows = number_BL.any(dim=1)
    assert rows.any()
    assert not rows.all()
    other = batch._replace(values_BL=torch.where(number_BL, 500.0, batch.values_BL))
    unread = batch._replace(values_BL=torch.where(number_BL, batch.values_BL, 9.0))
    with torch.no_grad():
        before, after, same = (network(each) for each in (batch, other, unread))
    changed = (before.value_B.loc - after.value_B.loc).abs() > 0
    assert torch.equal(changed, rows)
    assert torch.equal(before.value_B.loc, same.value_B.loc)


def test_frozen_trunk_keeps_its_weights_and_lets_numbers_learn(module_of, batch):
    network = module_of().network
    found = network(batch)
    (found.scores_BK.loc.sum() + found.value_B.loc.sum()).backward()
    assert all(p.grad is None for p in network.trunk.parameters())
    assert network.numbers.direction_H.grad.abs().sum() > 0
    assert network.abduction.loc.weight.grad.abs().sum() > 0
    trained = module_of(freeze=False).network
    trained(batch).scores_BK.loc.sum().backward()
    assert all(p.grad is not None for p in trained.trunk.layers.parameters())
