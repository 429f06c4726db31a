"""Options that several commands share, and the completion of their names by a shell."""

import argparse
import os
import sys
from collections.abc import Sequence

from peft_dist.common import logs
from peft_dist.common.console import show
from peft_dist.common.env import VERBOSITY

SHELLS = ("bash", "zsh", "fish")


def add_verbosity(parser: argparse.ArgumentParser) -> None:
    """Add `--quiet` and `--verbose`."""
    group = parser.add_mutually_exclusive_group()
    group.add_argument(
        "--quiet", action="store_true", help="show no progress: only warnings and the result"
    )
    group.add_argument(
        "--verbose", action="store_true", help="show what every process and library has to say"
    )


def begin_logs(arguments: argparse.Namespace) -> None:
    """Let log lines be seen as the options say, here and in all processes that are started."""
    for name in ("quiet", "verbose"):
        if getattr(arguments, name, False):
            os.environ[VERBOSITY] = name
    logs.begin()


def tell_given_twice(overrides: Sequence[str]) -> None:
    """Say of which key the last of several values counts, once the recipe has proved right."""
    from peft_dist.config.load import given_twice

    for line in given_twice(overrides):
        show(f"peft-dist: {line}", sys.stderr)


def completion(parser: argparse.ArgumentParser, shell: str) -> str:
    """Return a script that makes a shell complete commands, options and their choices.

    Args:
        parser: The parser of `peft-dist`, with its subcommands.
        shell: One of `SHELLS`.
    """
    commands = {name: sub for name, sub in _subcommands(parser).items()}
    words = {name: _words(sub) for name, sub in commands.items()}
    if shell == "fish":
        return _fish(commands)
    # Those of two words come first; where the second is not there yet, it is one of the words.
    by_length = sorted(words, key=lambda name: -len(name.split()))
    for name in by_length:
        first, _, second = name.partition(" ")
        if second:
            words[first].append(second)
    patterns = {name: f"'{name}'" if " " in name else f"'{name} '*" for name in by_length}
    cases = "\n".join(f"    {patterns[n]}) words='{' '.join(words[n])}' ;;" for n in by_length)
    body = f"""_peft_dist() {{
  local current="${{COMP_WORDS[COMP_CWORD]}}" words=''
  case "${{COMP_WORDS[1]}} ${{COMP_WORDS[2]}}" in
{cases}
  esac
  if [ "$COMP_CWORD" -eq 1 ]; then
    words='{" ".join(name for name in words if " " not in name)}'
  fi
  COMPREPLY=($(compgen -W "$words" -- "$current") $(compgen -f -- "$current"))
}}
complete -o filenames -F _peft_dist peft-dist
"""
    if shell == "zsh":
        return f"autoload -U +X bashcompinit && bashcompinit\n{body}"
    return body


def _subcommands(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            return dict(action.choices)
    return {}


def _words(parser: argparse.ArgumentParser) -> list[str]:
    options = [option for action in parser._actions for option in action.option_strings]
    choices = [
        str(choice)
        for action in parser._actions
        if action.choices is not None and not isinstance(action, argparse._SubParsersAction)
        for choice in action.choices
    ]
    return [*_subcommands(parser), *(o for o in options if o.startswith("--")), *choices]


def _fish(commands: dict[str, argparse.ArgumentParser]) -> str:
    lines = []
    for name, sub in commands.items():
        text = (sub.description or "").replace("'", r"\'")
        first, _, second = name.partition(" ")
        seen = f"__fish_seen_subcommand_from {first}"
        if second:
            lines.append(f"complete -c peft-dist -n '{seen}' -a {second} -d '{text}'")
            inside = f"-n '{seen}; and __fish_seen_subcommand_from {second}'"
        else:
            lines.append(f"complete -c peft-dist -n __fish_use_subcommand -a {name} -d '{text}'")
            inside = f"-n '{seen}'"
        for word in _words(sub):
            given = f"-l {word[2:]}" if word.startswith("--") else f"-a {word}"
            lines.append(f"complete -c peft-dist {inside} {given}")
    return "\n".join(lines) + "\n"
