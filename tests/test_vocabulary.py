"""The package, its configs and its documents use the field's words, and no private language."""

import re
from pathlib import Path

import pytest

import lit_stability

ROOT = Path(lit_stability.__file__).parents[1]
PLACES = ("lit_stability", "models", "configs", "benchmarks", "docs", "README.md")
FILES = sorted(
    path.relative_to(ROOT).as_posix()
    for place in PLACES
    for path in ([ROOT / place] if (ROOT / place).is_file() else (ROOT / place).rglob("*"))
    if path.suffix in (".py", ".md", ".yaml") and "results" not in path.parts
)

PRIVATE_LANGUAGE = (
    # Parts: incident tracker, rank consensus, executor, escalation policy, backoff.
    *("desk", "council", "books", "treatments?", "treated", "rewinders?", "ladders?", "rungs?"),
    *("throttles?", "ceiling", "trials?", "retake", "islands?", "tapes?", "witness", "companions"),
    # What happens to an incident: it recurs, it is resolved.
    *("strikes?", "struck", "settles?", "settled", "settling", "scenes?", "clues?"),
    "hypothes[ei]s",
    # Flags and hooks of version 0.1.0.
    *("observe_only", "state_is_bad", "on_suspicion", "on_new_regime", "takes_steps_again"),
    # Reported, logged, unchanged, rolled back, restored, tolerated, skipped, retried.
    *("told", "said", "left alone", "leave (it )?alone", "taken back", "takes? back"),
    *("given back", "borne", "put back", "taken again", "lets? go of", "anew", "veto(es|ed)?"),
    *("of late", "it is said", "(is|are) to be"),
)
WORDS = re.compile(rf"(?<![A-Za-z])({'|'.join(PRIVATE_LANGUAGE)})(?![A-Za-z])", re.IGNORECASE)

ON_DISK = re.compile(r'"(strikes|hypotheses|ladder|throttle|islands|ceiling|told|borne)"|scene\.pt')
"""Keys and file names that version 0.1.0 wrote, and that are still written and read."""

EXEMPT = {
    # A ladder is one of the goods with a price.
    "models/causal/facts.py": ("PRICE", "}"),
    # Names the hooks of 0.1.0, to say what they are called now.
    "lit_stability/callbacks/hooks.py": ("_OF_0_1", "}"),
    "docs/migration.md": ("<!-- old names -->", "<!-- end of the old names -->"),
}


def lines_of(file):
    """The lines of a file, without those that name old words on purpose."""
    start, end = EXEMPT.get(file, (None, None))
    inside = False
    for number, line in enumerate((ROOT / file).read_text(encoding="utf8").split("\n"), 1):
        inside = inside or (start is not None and line.startswith(start))
        if not inside:
            yield number, ON_DISK.sub("", line)
        inside = inside and line != end


def test_files_are_found():
    assert len(FILES) > 250
    assert {name.split("/")[0] for name in FILES} == {*PLACES}


@pytest.mark.parametrize(
    "sentence",
    ["The ladder has nothing left.", "a step taken again", "It is told once.", "incident.settle()"],
)
def test_private_language_is_recognised(sentence):
    assert WORDS.search(sentence)


@pytest.mark.parametrize("sentence", ["resettled", "untold", '{"strikes": 1}', "a colder desktop"])
def test_other_words_are_not(sentence):
    assert not WORDS.search(ON_DISK.sub("", sentence))


@pytest.mark.parametrize("file", FILES)
def test_file_uses_the_words_of_the_field(file):
    found = [(n, m[0]) for n, line in lines_of(file) for m in WORDS.finditer(line)]
    assert found == []


STATIC = sorted((ROOT / "lit_stability/tensorboard/static").iterdir())
COMMENT = re.compile(r"/\*.*?\*/|(?<![:\"'`/])// [^\n]*", re.DOTALL)
"""A comment of a script or a style sheet; keys of the record, in the code, are not looked at."""


@pytest.mark.parametrize("file", STATIC, ids=lambda file: file.name)
def test_comments_of_the_page_use_the_words_of_the_field(file):
    comments = COMMENT.findall(file.read_text(encoding="utf8"))
    assert comments
    assert [m[0] for comment in comments for m in WORDS.finditer(comment)] == []
