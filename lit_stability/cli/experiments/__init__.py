"""Experiments: configs with an expected result, and the comparison with the actual outcome.

A config has ``about``, one line, and ``expect``, an `Expectation`. A run writes an `Outcome` to its
folder; `judge` compares the two. Imports neither torch nor Lightning.
"""

from lit_stability.cli.experiments.expectation import Comparison, Expectation
from lit_stability.cli.experiments.judgement import Verdict, judge
from lit_stability.cli.experiments.outcome import Ending, Outcome

__all__ = ["Comparison", "Ending", "Expectation", "Outcome", "Verdict", "judge"]
