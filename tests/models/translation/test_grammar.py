"""The synchronous grammar, T5: its sentences, their number, and the held-out combinations."""

import random
from itertools import islice

import pytest

from models.translation.constructions import CONSTRUCTIONS, Rule
from models.translation.grammar import Grammar
from models.translation.lexicon import LEXICON, Word

KNOWN = [
    ("nominal_predication", "者，", "是"),
    ("passive_wei_suo", "所", "被"),
    ("passive_jian_yu", "见", "被"),
    ("fronted_pronoun", "未之", "还没有"),
    ("fronted_exclusive", "是", "一心只"),
    ("question_he", "何", "什么"),
    ("question_shu", "孰", "谁"),
    ("question_an", "安", "哪里"),
    ("rhetorical_yan", "焉能", "怎么能"),
    ("causative_shi", "使", "派"),
    ("causative_ling", "令", "让"),
    ("comparison_yu", "于", "比"),
    ("negation_wei", "未", "还没有"),
    ("negation_fu", "弗", "不"),
    ("prohibition_wu", "勿", "不要"),
    ("relative_suo", "所", "的是"),
    ("relative_zhe", "者", "的人是"),
    ("quotation_yue", "曰：“", "说：“"),
    ("conditional_ruo_ze", "则", "就会"),
    ("concession_sui", "虽", "虽然"),
    ("sequence_ji_nai", "乃", "之后，就"),
    ("purpose_yi", "以", "为了|用来"),
    ("existential_person", "有", "有个"),
    ("exclusive_wei", "唯", "只有"),
    ("double_negation_mo", "莫不", "没有谁不"),
    ("time_phrase", "，", "，"),
]


@pytest.fixture(scope="module")
def grammar():
    return Grammar()


@pytest.mark.parametrize("name", CONSTRUCTIONS)
def test_construction_when_drawn_gives_two_finished_sentences(name, grammar):
    """T5: each of the constructions, more than 25 of them."""
    assert len(CONSTRUCTIONS) >= 25
    rng = random.Random(0)
    for _ in range(50):
        derivation = grammar.draw(rng, name)
        assert derivation.construction == name
        for side in derivation.pair:
            assert side.endswith(("。", "？", "！", "”"))
            assert not set(side) & set("{}=. ")
            assert 4 <= len(side) <= 24


@pytest.mark.parametrize(("name", "classical", "modern"), KNOWN)
def test_construction_renders_its_marks(name, classical, modern, grammar):
    """T5: the words that make the construction are there on both sides."""
    pair = grammar.draw(random.Random(1), name).pair
    assert classical in pair.source
    assert any(mark in pair.target for mark in modern.split("|"))


def test_draw_of_a_tiny_grammar_is_its_only_sentence():
    """T5: known answer, with the object before the verb on one side."""
    lexicon = {"who": (Word("客", "客人"),), "food": (Word("鱼", "鱼"),)}
    tiny = Grammar({"x": (Rule("{who}唯{food}是食。", "{who}只吃{food}。"),)}, {}, lexicon)
    derivation = tiny.draw(random.Random(0))
    assert derivation.pair == ("客唯鱼是食。", "客人只吃鱼。")
    assert derivation.combination == ("x", "客", "鱼")


def test_grammar_has_more_than_100000_pairs_and_one_rendering_for_each(grammar):
    """T5: no sentence can be drawn with two translations, so that 100 % is within reach."""
    rng, renderings = random.Random(3), {}
    for _ in range(200_000):
        pair = grammar.draw(rng).pair
        assert renderings.setdefault(pair.source, pair.target) == pair.target
    assert len(renderings) > 100_000


def test_lexicon_has_one_modern_word_for_each_in_a_class():
    for name, words in LEXICON.items():
        assert len({word.classical for word in words}) == len(words), name


def test_sentence_has_no_word_twice_unless_the_construction_says_so(grammar):
    for derivation in islice(grammar.derivations(0), 3000):
        assert len(set(derivation.content)) == len(derivation.content)


def test_splits_are_the_same_for_a_seed_and_differ_between_seeds(grammar):
    """T5: and the global generator is not touched."""
    random.seed(5)
    before = random.getstate()
    first, again, other = (
        grammar.splits(n_train=300, n_val=30, n_test=30, seed=seed) for seed in (1, 1, 2)
    )
    assert first == again
    assert first != other
    assert random.getstate() == before


def test_held_out_combinations_are_never_trained_on_though_their_words_are(grammar):
    """T5: memorising does not pass."""
    combinations = {"train": set(), "val": set(), "test": set()}
    words = {"train": set(), "val": set(), "test": set()}
    sources = {"train": set(), "val": set(), "test": set()}
    for derivation in islice(grammar.derivations(0), 30_000):
        split = derivation.split(0.1)
        combinations[split].add(derivation.combination)
        sources[split].add(derivation.pair.source)
        words[split] |= {derivation.construction, *derivation.content}
    assert combinations["train"].isdisjoint(combinations["val"] | combinations["test"])
    assert combinations["val"].isdisjoint(combinations["test"])
    assert words["val"] | words["test"] <= words["train"]
    assert words["train"] >= set(CONSTRUCTIONS)
    splits = grammar.splits(n_train=5000, n_val=300, n_test=300, seed=0)
    assert {pair.source for pair in splits.train} <= sources["train"]
    assert {pair.source for pair in splits.test} <= sources["test"]


def test_sentences_that_differ_only_in_time_are_in_the_same_split(grammar):
    """T5: an adjunct makes no new combination."""
    rng, splits = random.Random(0), {}
    for _ in range(20_000):
        derivation = grammar.draw(rng, "time_phrase")
        splits.setdefault(derivation.pair.source.split("，")[1], set()).add(derivation.split(0.3))
    assert all(len(found) == 1 for found in splits.values())
    assert len(splits) < 20_000


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda g: g.splits(n_train=1, n_val=1, n_test=1, seed=0, held_out=0.0), "held_out=0.0"),
        (lambda g: Grammar({"x": (Rule("{who}", "{you}"),)}), "name different children"),
        (
            lambda g: Grammar({"x": (Rule("{nobody}", "{nobody}"),)}),
            r"unknown classes \['nobody'\]",
        ),
    ],
)
def test_grammar_of_wrong_input_says_what_is_wrong(make, message, grammar):
    with pytest.raises(ValueError, match=message):
        make(grammar)


def test_splits_of_more_sentences_than_there_are_raises():
    words = {"who": (Word("客", "客人"), Word("王", "君王"))}
    tiny = Grammar({"x": (Rule("{who}怒。", "{who}生气。"),)}, {}, words)
    with pytest.raises(ValueError, match="ask for fewer"):
        tiny.splits(n_train=10, n_val=10, n_test=10, seed=0)
