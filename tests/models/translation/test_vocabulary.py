"""The character vocabulary, T5."""

import pytest

from models.translation.pairs import Pair
from models.translation.vocabulary import BOS, EOS, PAD, UNK, Vocabulary


def test_special_tokens_have_fixed_ids():
    assert (PAD, BOS, EOS, UNK) == (0, 1, 2, 3)


def test_from_pairs_orders_by_frequency_then_by_character():
    """T5: the order of the pairs does not matter."""
    pairs = [Pair("王怒", "君王生气"), Pair("王归", "君王回家")]
    vocabulary = Vocabulary.from_pairs(pairs)
    assert vocabulary.characters[:2] == ("王", "君")
    assert vocabulary == Vocabulary.from_pairs(pairs[::-1])
    assert len(vocabulary) == 4 + len(set("王怒君王生气王归回家"))


def test_encode_then_decode_gives_the_text_back():
    vocabulary = Vocabulary("学而时习之")
    assert vocabulary.decode(vocabulary.encode("时习之", bos=True, eos=True)) == "时习之"


def test_encode_of_an_unseen_character_is_unknown_and_stays_so():
    vocabulary = Vocabulary("学而")
    assert vocabulary.encode("学思") == [4, UNK]
    assert vocabulary.decode([4, UNK]) == "学\ufffd"
    assert vocabulary.decode([4, UNK], unknown="□") == "学□"


def test_decode_stops_at_the_end_and_skips_padding():
    assert Vocabulary("学而").decode([BOS, 4, PAD, 5, EOS, 4]) == "学而"


def test_save_then_load_gives_an_equal_vocabulary(tmp_path):
    vocabulary = Vocabulary("学而时习之，。")
    vocabulary.save(tmp_path / "v.json")
    loaded = Vocabulary.load(tmp_path / "v.json")
    assert loaded == vocabulary
    assert hash(loaded) == hash(vocabulary)


@pytest.mark.parametrize(
    ("text", "message"),
    [("{", "is not JSON"), ("[]", "format 'list'"), ('{"format": "x"}', "format 'x'")],
)
def test_load_of_another_file_names_it(text, message, tmp_path):
    path = tmp_path / "v.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=f"v.json.*{message}"):
        Vocabulary.load(path)


def test_from_pairs_with_min_count_leaves_rare_characters_out():
    vocabulary = Vocabulary.from_pairs([Pair("王王怒", "王")], min_count=2)
    assert vocabulary.characters == ("王",)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Vocabulary(["学而"]), "one character, got"),
        (lambda: Vocabulary("学学"), "occur twice"),
        (lambda: Vocabulary.from_pairs([], min_count=1), "no character"),
        (lambda: Vocabulary("学").decode([9]), "id 9 is outside the vocabulary of 5"),
    ],
)
def test_vocabulary_of_wrong_input_says_what_is_wrong(make, message):
    with pytest.raises(ValueError, match=message):
        make()
