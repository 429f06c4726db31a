"""Options that several commands share, and the completion of their names by a shell."""

import argparse
import os
import sys
from collections.abc import Mapping, Sequence

from peft_dist.common import logs
from peft_dist.common.console import show
from peft_dist.common.env import VERBOSITY

SHELLS = ("bash", "zsh", "fish")
_OPTIONS = {
    "config": "the recipe's path alone",
    "dryrun": "--dry-run",
    "gpus": "--nproc",
    "num_gpus": "--nproc",
    "num_processes": "--nproc",
    "nproc_per_node": "--nproc",
    "overwrite_output_dir": "--fresh",
    "resume": "`peft-dist resume RUN_DIR`, or the same command again",
    "resume_from_checkpoint": "`peft-dist resume RUN_DIR`, or the same command again",
}
"""Options of other programs, and ours for each."""
LEAST_ALIKE = 0.8
"""Of two words, from 0 to 1, for one to be taken for a slip of the other."""


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


def remedy_for_option(word: str, parser: argparse.ArgumentParser) -> str:
    """Return what to write in place of an option that a command does not have.

    Args:
        word: As it was typed.
        parser: Of the command.
    """
    import difflib

    from peft_dist.config.explain import remedy_for_unknown
    from peft_dist.config.recipe import Recipe

    name = word.lstrip("-").partition("=")[0]
    known, plain = _words(parser), name.replace("-", "_")
    takes_settings = any(action.dest == "overrides" for action in parser._actions)
    near = difflib.get_close_matches(f"--{name}", known, n=1, cutoff=LEAST_ALIKE)
    setting = remedy_for_unknown([plain], Recipe) if takes_settings else ""
    remedy = ""
    if plain in _OPTIONS and (takes_settings or _OPTIONS[plain] in known):
        remedy = f"here that is {_OPTIONS[plain]}; "
    elif takes_settings and "." in name:
        remedy = f"settings have no dashes: {name}=VALUE; "
    elif setting.startswith("here that is"):
        remedy = f"{setting}; " if "option" in setting else f"{setting}, written key=value; "
    elif near:
        remedy = f"did you mean {near[0]!r}? "
    return f"{remedy}see {parser.prog} --help"


def completion(parser: argparse.ArgumentParser, shell: str) -> str:
    """Return a script that makes a shell complete commands, options and their choices.

    Args:
        parser: The parser of `peft-dist`, with its subcommands.
        shell: One of `SHELLS`.
    """
    commands = _subcommands(parser)
    words: dict[str, list[str]] = {}
    for name, sub in commands.items():  # some have two words, such as `submit merge`
        first, *second = name.split()
        known = words.setdefault(first, [])
        known += [word for word in (*second, *_words(sub)) if word not in known]
    if shell == "fish":
        texts = {name: commands[name].description or "" for name in words}
        return _fish(words, texts)
    cases = "\n".join(f"    {name}) words='{' '.join(words[name])}' ;;" for name in words)
    body = f"""_peft_dist() {{
  local current="${{COMP_WORDS[COMP_CWORD]}}" words=''
  case "${{COMP_WORDS[1]}}" in
{cases}
  esac
  if [ "$COMP_CWORD" -eq 1 ]; then
    words='{" ".join(words)}'
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


def _fish(words: Mapping[str, Sequence[str]], texts: Mapping[str, str]) -> str:
    lines = []
    for name, known in words.items():
        text = texts[name].replace("'", r"\'")
        lines.append(f"complete -c peft-dist -n __fish_use_subcommand -a {name} -d '{text}'")
        inside = f"-n '__fish_seen_subcommand_from {name}'"
        for word in known:
            given = f"-l {word[2:]}" if word.startswith("--") else f"-a {word}"
            lines.append(f"complete -c peft-dist {inside} {given}")
    return "\n".join(lines) + "\n"
