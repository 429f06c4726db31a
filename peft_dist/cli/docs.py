"""Print `docs/cli.md`: every command with its arguments, from the parsers themselves."""

import argparse
from collections.abc import Iterator

from peft_dist.cli.main import build_parser
from peft_dist.common.console import show

INTRODUCTION = """\
# Every command

<!-- Generated from peft_dist/cli by `python -m peft_dist.cli.docs`. -->

`peft-dist COMMAND --help` prints the same. [Exit codes](exit-codes.md) tell a script
what came of it.
"""


def render_docs() -> str:
    """Return the page."""
    parts = [INTRODUCTION]
    for parser in _commands(build_parser()):
        parts += [f"## `{parser.prog}`\n", f"{_sentence(parser.description or '')}\n"]
        rows = [
            f"| `{_name(action)}` | {_sentence(_help(action, parser))} |"
            for action in parser._actions
            if not isinstance(action, argparse._HelpAction | argparse._SubParsersAction)
        ]
        if rows:
            parts.append("\n".join(["| argument | meaning |", "|---|---|", *rows, ""]))
    return "\n".join(parts)


def _commands(parser: argparse.ArgumentParser) -> Iterator[argparse.ArgumentParser]:
    """Return the parser of every command that does something itself, in the order of `--help`."""
    inner = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    for action in inner:
        for sub in action.choices.values():
            yield from _commands(sub)
    if not inner:
        yield parser


def _name(action: argparse.Action) -> str:
    """Return an argument as it is typed."""
    value = action.metavar or (action.choices and "|".join(map(str, action.choices))) or action.dest
    word = str(value).replace("|", "\\|")
    if not action.option_strings:
        return word
    flag = ", ".join(action.option_strings)
    return flag if action.nargs == 0 else f"{flag} {word}"


def _help(action: argparse.Action, parser: argparse.ArgumentParser) -> str:
    return (action.help or "") % {**vars(action), "prog": parser.prog}


def _sentence(text: str) -> str:
    text = " ".join(text.split()).replace("|", "\\|")
    return text[:1].upper() + text[1:]


if __name__ == "__main__":
    show(render_docs(), end="")
