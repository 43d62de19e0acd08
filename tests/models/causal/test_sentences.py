"""The generated sentences."""

import math
from itertools import islice

import pytest

from models.causal.sentences import Sentence, SentenceSource


def draw(n=400, seed=0, **options):
    return list(islice(SentenceSource(**options).draw(seed), n))


def numbers(sentences):
    pieces = [p for s in sentences for p in (*s.pieces, s.target)]
    return [p for p in pieces if isinstance(p, float)]


def test_draw_with_the_same_seed_gives_the_same_sentences():
    assert draw(seed=1) == draw(seed=1)
    assert draw(seed=1) != draw(seed=2)


def test_draw_mixes_languages_words_and_numbers():
    drawn = draw(1000)
    followed = sum(isinstance(each.target, float) for each in drawn) / 1000
    assert 0.45 < followed < 0.55
    chinese = sum(any("一" <= c <= "鿿" for c in each.prefix) for each in drawn) / 1000
    assert 0.45 < chinese < 0.55
    with_number = [s for s in drawn if any(isinstance(p, float) for p in s.pieces)]
    assert any(isinstance(each.target, str) for each in with_number), "a number must not tell"


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_share_of_numbers_is_kept(share):
    assert {isinstance(each.target, float) for each in draw(numbers=share)} == {share == 1.0}


def test_one_language_says_nothing_in_the_other():
    assert all(each.prefix.isascii() for each in draw(languages=("en",)))
    assert not any(each.prefix.isascii() for each in draw(languages=("zh",)))


def test_ordinary_numbers_are_positive_and_of_a_few_digits():
    found = numbers(draw(1000))
    assert min(found) > 0
    assert max(found) < 1000
    assert all(len(f"{x:g}".replace(".", "").strip("0")) <= 3 for x in found)


@pytest.mark.parametrize(
    ("kind", "is_so"),
    [
        ("zero", lambda x: x == 0),
        ("negative", lambda x: x < 0),
        ("extreme", lambda x: abs(x) >= 1e6),
        ("missing", math.isnan),
    ],
)
def test_unusual_numbers_come_with_their_share(kind, is_so):
    """C5: extreme data is the second suspect."""
    found = numbers(draw(3000, unusual=(kind,), share=0.2))
    assert 0.16 < sum(map(is_so, found)) / len(found) < 0.24
    assert not any(map(is_so, numbers(draw(1000))))


def test_number_that_stands_in_the_sentence_comes_next():
    sentence = Sentence(("Today it is", 3.5, " degrees, and tomorrow the same,"), 3.5, " ")
    assert sentence.prefix == "Today it is 3.5 degrees, and tomorrow the same,"
    assert sentence.continuation == " 3.5"
    doubled = [s for s in draw(2000) if "twice" in s.prefix]
    assert doubled
    assert all(s.target == 2 * s.pieces[1] for s in doubled)


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"numbers": 1.5}, r"numbers=1\.5 must be a share"),
        ({"share": -0.1}, r"share=-0\.1 must be a share"),
        ({"unusual": ("huge",)}, r"unusual=\['huge'\]: choose from"),
        ({"languages": ("fr",)}, r"languages=\['fr'\]: choose from \['en', 'zh'\]"),
        ({"languages": ()}, r"languages=\[\] is empty"),
    ],
)
def test_impossible_option_is_refused_with_its_value(options, problem):
    with pytest.raises(ValueError, match=problem):
        SentenceSource(**options)
