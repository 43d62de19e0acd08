"""Loss and scores, T4 and T5, on known answers."""

import math

import pytest
import torch

from models.translation.metrics import token_loss, translation_metrics


def test_token_loss_splits_the_first_token_from_the_rest():
    """T4: certain about the first token, clueless about the others; padding does not count."""
    logits = torch.zeros(2, 3, 4)
    logits[:, 0, 1] = 100.0
    expected = torch.tensor([[1, 2, 3], [1, 2, 0]])
    loss = token_loss(logits, expected, pad_id=0)
    assert loss.first.item() == pytest.approx(0.0, abs=1e-6)
    assert loss.rest.item() == pytest.approx(math.log(4))
    assert loss.total.item() == pytest.approx(3 / 5 * math.log(4))


def test_token_loss_with_smoothing_is_the_formula():
    """T4: (1 - e) * nll + e * mean over classes, for one token."""
    logits = torch.tensor([[[2.0, 1.0, 0.0]]])
    log_p = logits.log_softmax(-1)[0, 0]
    loss = token_loss(logits, torch.tensor([[1]]), pad_id=0, label_smoothing=0.1)
    torch.testing.assert_close(loss.total, -(0.9 * log_p[1] + 0.1 * log_p.mean()))


def test_token_loss_of_one_token_has_no_rest():
    loss = token_loss(torch.zeros(1, 1, 3), torch.tensor([[1]]), pad_id=0)
    assert loss.rest.item() == 0.0


def test_token_loss_of_half_precision_logits_is_float32():
    loss = token_loss(torch.zeros(1, 2, 3, dtype=torch.float16), torch.tensor([[1, 2]]), pad_id=0)
    assert loss.total.dtype == torch.float32


def test_scores_of_perfect_translations_are_one():
    """T5."""
    sentences = ["客人在集市上买下了毛笔。", "如果农夫献上鱼，国君就会高兴。"]
    metrics = translation_metrics("test/")
    metrics.update(sentences, [[sentence] for sentence in sentences])
    scores = {name: value.item() for name, value in metrics.compute().items()}
    assert scores == pytest.approx({"test/exact_match": 1, "test/bleu": 1, "test/chrf": 1})


def test_scores_of_one_wrong_translation_in_two_are_between():
    """T5: half of the sentences are right, most of the characters are."""
    metrics = translation_metrics("")
    metrics.update(
        ["客人在集市上买下了毛笔。", "如果农夫献上鱼，国君就会高兴。"],
        [["客人在集市上买下了毛笔。"], ["如果农夫献上鱼，国君就会生气。"]],
    )
    scores = metrics.compute()
    assert scores["exact_match"].item() == 0.5
    assert 0.5 < scores["bleu"].item() < 1.0
    assert 0.5 < scores["chrf"].item() < 1.0
