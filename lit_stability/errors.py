"""Exceptions shared by several subpackages. Imports nothing from this package."""


class ConfigError(ValueError):
    """Raised for a config that cannot be run, with one line per problem: value and fix."""

    def __init__(self, *problems: str) -> None:
        """Joins the problems to a message, and keeps them separately as ``problems``."""
        super().__init__("\n".join(problems))
        self.problems = problems
