"""Greedy and beam decoding, T5, and the cache of keys and values."""

import itertools

import pytest
import torch

from models.translation.decoding import beam_decode, greedy_decode

SHAPES = [{}, {"norm_position": "post"}, {"attention": "manual", "norm": "rmsnorm"}]


@pytest.mark.parametrize("options", SHAPES)
def test_decode_with_a_cache_gives_the_logits_of_teacher_forcing(options, model_of, batch):
    """T5: position by position against all at once."""
    model = model_of(**options)
    target = batch.target_BT[:1]
    memory, cache = model.encode(batch.source_BS[:1]), model.new_cache()
    steps = [model.decode(t, memory, batch.source_BS[:1], cache) for t in target.split(1, dim=1)]
    expected = model(batch.source_BS[:1], target)
    torch.testing.assert_close(torch.cat(steps, dim=1), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("options", SHAPES)
@pytest.mark.parametrize("beam_size", [1, 3])
def test_decoding_with_and_without_cache_gives_equal_tokens(options, beam_size, model_of, batch):
    """T5."""
    model = model_of(**options)
    cached, plain = (
        beam_decode(model, batch.source_BS, beam_size=beam_size, max_length=12, use_cache=use)
        for use in (True, False)
    )
    assert torch.equal(cached.tokens_BT, plain.tokens_BT)
    torch.testing.assert_close(cached.score_B, plain.score_B, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("use_cache", [True, False])
def test_beam_of_one_is_greedy(use_cache, model_of, batch):
    """T5."""
    model = model_of()
    greedy = greedy_decode(model, batch.source_BS, max_length=12, use_cache=use_cache)
    beam = beam_decode(
        model, batch.source_BS, beam_size=1, length_penalty=0.0, max_length=12, use_cache=use_cache
    )
    assert torch.equal(greedy.tokens_BT, beam.tokens_BT)
    torch.testing.assert_close(greedy.score_B, beam.score_B)


def test_rows_of_a_padded_batch_decode_as_they_do_alone(model_of, batch):
    """T5: padding and neighbours change nothing."""
    model = model_of()
    together = greedy_decode(model, batch.source_BS, max_length=12).tokens_BT
    for row, source in enumerate(batch.source_BS):
        alone = greedy_decode(model, source[source != 0][None], max_length=12).tokens_BT[0]
        assert torch.equal(together[row, : len(alone)], alone)
        assert not together[row, len(alone) :].any()


@pytest.mark.parametrize("length_penalty", [0.0, 1.0])
def test_wide_beam_finds_the_best_of_all_sentences(length_penalty, model_of):
    """T5: against the exhaustive search over a vocabulary of 5 and at most 3 tokens."""
    model = model_of(vocabulary_size=5)
    source = torch.tensor([[3, 4, 2]])
    scores = {}
    for tokens in itertools.product(range(5), repeat=3):
        end = tokens.index(2) + 1 if 2 in tokens else 3
        target = torch.tensor([[1, *tokens[:end]]])
        log_p = model(source, target[:, :-1]).log_softmax(-1)[0]
        total = log_p.gather(1, target[0, 1:, None]).sum().item()
        if 0 not in tokens[:end]:
            scores[tokens[:end]] = total / ((5 + end) / 6) ** length_penalty
    best = max(scores, key=scores.__getitem__)
    found = beam_decode(model, source, beam_size=125, max_length=3, length_penalty=length_penalty)
    assert tuple(found.tokens_BT[0].tolist()) == best


def test_decoding_stops_when_every_sentence_has_its_end(model_of, batch):
    """T5: a model that wants eos above all writes it once."""
    model = model_of(tie_weights=False)
    with torch.no_grad():
        model.decoder.norm.weight.zero_()
        model.decoder.norm.bias.fill_(1.0)
        model.projection.weight.zero_()
        model.projection.weight[2] = 1.0
    for decoded in (greedy_decode(model, batch.source_BS), beam_decode(model, batch.source_BS)):
        assert decoded.tokens_BT.tolist() == [[2]] * 5


def test_decoding_without_end_stops_at_max_length(model_of, batch):
    """T5."""
    model = model_of(tie_weights=False)
    with torch.no_grad():
        model.projection.weight[2] = -100.0
        model.decoder.norm.weight.zero_()
        model.decoder.norm.bias.fill_(1.0)
    assert greedy_decode(model, batch.source_BS).tokens_BT.shape == (5, 24)
    assert greedy_decode(model, batch.source_BS, max_length=7).tokens_BT.shape == (5, 7)
    assert beam_decode(model, batch.source_BS, max_length=7).tokens_BT.shape == (5, 7)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"beam_size": 0}, "beam_size=0"), ({"max_length": 25}, "max_length=25.*model's 24")],
)
def test_decoding_with_a_wrong_option_repeats_it(options, message, model_of, batch):
    with pytest.raises(ValueError, match=message):
        beam_decode(model_of(), batch.source_BS, **options)
