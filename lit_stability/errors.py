"""Exceptions that more than one room raises or catches. Imports nothing of this package."""


class ConfigError(ValueError):
    """A config that cannot be run: every problem on a line of its own, with value and remedy."""

    def __init__(self, *problems: str) -> None:
        """Keep the problems apart, for a program that shows them its own way."""
        super().__init__("\n".join(problems))
        self.problems = problems
