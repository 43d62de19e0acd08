"""What can be expected, and what is refused before a run is spent on it."""

import math
import re

import pytest

from lit_stability.cli.experiments import Comparison, Expectation


@pytest.mark.parametrize(
    ("text", "value", "holds"),
    [
        ("< 2.0", 1.9, True),
        ("< 2.0", 2.0, False),
        ("<= 2", 2.0, True),
        (">1e-3", 2e-3, True),
        (" >= 0.99 ", 0.98, False),
        ("== 0", 0.0, True),
        ("== 0", 1e-9, False),
        *((f"{sign} 1", math.nan, False) for sign in ("<", "<=", ">", ">=", "==")),
        *((f"{sign} 1", None, False) for sign in ("<", "<=", ">", ">=", "==")),
        ("> 6", math.inf, True),
        ("not finite", math.nan, True),
        ("not finite", -math.inf, True),
        ("not finite", 1.0, False),
        ("not finite", None, False),
    ],
)
def test_comparison_of_a_value_holds_or_not(text, value, holds):
    assert Comparison(text).holds(value) is holds


@pytest.mark.parametrize("text", ["", "2.0", "< two", "=< 2", "< nan", "> inf", "!= 1", "finite"])
def test_comparison_that_cannot_be_read_is_refused_with_its_text(text):
    with pytest.raises(ValueError, match=r"is not a comparison; write '< 2\.0'") as caught:
        Comparison(text)
    assert repr(text) in str(caught.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ends": "died"}, "ends='died' is unknown; choose one of"),
        ({"metrics": {"test/loss": "below 2"}}, "metrics.test/loss: 'below 2' is not a comparison"),
        ({"causes": []}, "causes=[] checks nothing"),
        ({"causes": ["zeroed gain", ""]}, "an empty name matches anything"),
        ({"locates": ""}, "locates='': an empty name matches anything"),
    ],
)
def test_expectation_that_asks_nothing_or_nonsense_is_refused(options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        Expectation(**options)
