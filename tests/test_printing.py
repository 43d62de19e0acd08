"""What is printed has no character that a terminal acts on, and says what there was."""

from hypothesis import given, settings
from hypothesis import strategies as st

from lit_stability.printing import printable


@settings(derandomize=True, max_examples=200)
@given(st.text())
def test_any_text_is_printable_afterwards_and_can_be_read_back(text):
    shown = printable(text)
    assert shown.isprintable()
    if text.isascii():
        raw = shown.encode("ascii").decode("unicode_escape")
        assert raw == text or "\\" in text


def test_letters_of_all_languages_are_kept():
    text = "encoder.层.ü.слой.ا"
    assert printable(text) == text


def test_kept_characters_are_not_escaped():
    assert printable("a\n\tb\x1b", keep="\n") == "a\n\\tb\\x1b"
