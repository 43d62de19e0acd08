"""Experiments: configs that say beforehand what they show, and whether they have shown it.

A config states ``about``, one line, and ``expect``, an `Expectation`. A run leaves in its folder
what is needed to judge it, an `Outcome`; `judge` compares the two. Imports neither torch nor
Lightning.
"""

from lit_stability.cli.experiments.expectation import Comparison, Expectation
from lit_stability.cli.experiments.judgement import Verdict, judge
from lit_stability.cli.experiments.outcome import Ending, Outcome

__all__ = ["Comparison", "Ending", "Expectation", "Outcome", "Verdict", "judge"]
