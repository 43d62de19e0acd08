"""One finding: its severity, and its printed form."""

import pytest

from lit_stability.checks.finding import Finding, count_by_severity, worst_first


def finding(severity="warning", where=(), **texts):
    texts = {"what": "it is", "why": "so", "remedy": "this", "check": "batch"} | texts
    return Finding(severity=severity, where=where, **texts)


def test_finding_of_unknown_severity_is_rejected():
    with pytest.raises(ValueError, match="severity='fatal' is unknown"):
        finding("fatal")


@pytest.mark.parametrize(
    ("names", "line"),
    [
        (("a", "b"), "  where: a, b"),
        (tuple("abcd"), "  where: a, b, c, d"),
        (tuple("abcdef"), "  where: a, b, c, d and 2 more"),
    ],
)
def test_finding_of_many_places_names_the_first(names, line):
    assert line in finding(where=names).text().splitlines()
    assert "  where: " + ", ".join(names) in finding(where=names).text(names=None).splitlines()


def test_long_sentences_of_a_finding_are_wrapped_below_their_label():
    lines = finding(why="word " * 40, check="").text().splitlines()
    assert lines[0] == "warning: it is"
    assert lines[2].startswith("       word")
    assert max(map(len, lines)) <= 100


def test_findings_are_sorted_and_counted_by_severity():
    found = [finding("note"), finding("error"), finding(what="first"), finding(what="second")]
    assert [f.severity for f in worst_first(found)] == ["error", "warning", "warning", "note"]
    assert [f.what for f in worst_first(found)][1:3] == ["first", "second"]
    assert count_by_severity(found) == "1 error, 2 warnings, 1 note"
    assert count_by_severity([]) == ""
