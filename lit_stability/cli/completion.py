"""The command `lit-stability completion`: prints a script that completes commands in a shell."""

from __future__ import annotations

import argparse
from pathlib import Path

from lit_stability.errors import ConfigError

_SHELLS = ("bash", "zsh", "tcsh")
_INSTALL = {
    "bash": 'eval "$(lit-stability completion bash)"  # in ~/.bashrc',
    "zsh": "lit-stability completion zsh > ~/.zfunc/_lit-stability  # in a folder of $fpath",
    "tcsh": "lit-stability completion tcsh | source /dev/stdin  # in ~/.tcshrc",
}
_CONFIGS = {
    "bash": "lit_stability_configs",
    "zsh": "_files -W '(. configs)' -g '*.yaml'",
    "tcsh": "f:*.yaml",
}
_PREAMBLE = {
    "bash": """\
lit_stability_configs() {
  compgen -f -X '!*.yaml' -- "$1"
  compgen -d -- "$1"
  (cd configs 2>/dev/null && compgen -f -X '!*.yaml' -- "$1" | sed 's/\\.yaml$//')
}"""
}


def add_completion(
    commands: argparse._SubParsersAction[argparse.ArgumentParser],
    parser: argparse.ArgumentParser,
) -> None:
    """Adds the command to a parser.

    Args:
        commands: Sub-commands of the parser.
        parser: Whose commands and options are completed.
    """
    examples = "\n".join(f"  {line}" for line in _INSTALL.values())
    completion = commands.add_parser(
        "completion",
        help="print a script for completion in a shell",
        description="Print a script with which a shell completes commands, options, configs and "
        "files. It needs the package shtab: pip install 'lit-stability[completion]'.",
        epilog=f"examples:\n{examples}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    completion.add_argument("shell", metavar="SHELL", choices=_SHELLS, help=", ".join(_SHELLS))
    completion.set_defaults(command=lambda args: _print_script(parser, commands, args.shell))


def _print_script(
    parser: argparse.ArgumentParser,
    commands: argparse._SubParsersAction[argparse.ArgumentParser],
    shell: str,
) -> int:
    try:
        import shtab
    except ImportError as error:
        raise ConfigError(
            "completion needs the package shtab: pip install 'lit-stability[completion]'"
        ) from error
    for command in commands.choices.values():
        for action in command._actions:
            if "--config" in action.option_strings:
                action.complete = _CONFIGS  # type: ignore[attr-defined]
            elif action.type is Path or action.metavar == "RUN":
                action.complete = shtab.FILE  # type: ignore[attr-defined]
    script = shtab.complete(parser, shell=shell, preamble=_PREAMBLE)  # type: ignore[arg-type]
    print(script)
    return 0
