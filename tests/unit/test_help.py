"""Help and completion: at once, in words for users, without torch, for every command."""

import argparse
import json
import subprocess
import sys
from pathlib import Path

import pytest

from peft_dist.cli.main import build_parser, main
from peft_dist.cli.options import SHELLS, _subcommands
from tests.processes import environment

COMMANDS = sorted(_subcommands(build_parser()))
ALL_HELP = """
import contextlib, io, json, sys
from peft_dist.cli.main import main
for words in json.loads(sys.argv[1]):
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.suppress(SystemExit):
        main([*words, "--help"])
    assert out.getvalue().startswith("usage: peft-dist"), words
heavy = "pydantic rich ruamel torch transformers accelerate peft bitsandbytes numpy".split()
assert not {*heavy} & {*sys.modules}
"""


def test_help_of_every_command_needs_no_torch_and_no_library_warns(tmp_path: Path) -> None:
    words = [[], *([name] for name in COMMANDS), ["cluster", "probe"], ["recipes", "ls"],
             ["recipes", "cp"]]  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", ALL_HELP, json.dumps(words)], env=environment(tmp_path),
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def parsers(parser: argparse.ArgumentParser) -> list[argparse.ArgumentParser]:
    below = [inner for sub in _subcommands(parser).values() for inner in parsers(sub)]
    return [parser, *below]


def test_every_command_and_every_option_says_what_it_is_for() -> None:
    for parser in parsers(build_parser()):
        assert parser.description, parser.prog
        for action in parser._actions:
            if not isinstance(action, argparse._SubParsersAction):
                assert action.help, f"{parser.prog} {action.dest}"
        assert "process of a world" not in parser.format_help()


def test_help_is_a_command_too(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["help"])
    assert capsys.readouterr().out.startswith("usage: peft-dist [-h]")


@pytest.mark.parametrize(
    ("argv", "told"),
    [
        (["train"], "required: RECIPE; see peft-dist train --help"),
        (["validate", "--strict", "x.yaml"], "'--strict'; see peft-dist validate --help"),
        (["resume", "x", "--fresh"], "'--fresh'; see peft-dist resume --help"),
        (["quantize"], "required: MODEL; see peft-dist quantize --help"),
        (["quantize", "m", "--task", "x"], "see peft-dist quantize --help"),
        (["train", "r.yaml", "--quiet", "--verbose"], "not allowed with argument --quiet"),
    ],
)
def test_a_wrong_word_points_to_the_help_of_its_own_command(
    capsys: pytest.CaptureFixture[str], argv: list[str], told: str
) -> None:
    assert main(argv) == 2
    assert told in capsys.readouterr().err


def test_a_merge_that_cannot_be_is_refused_without_torch(
    recipe_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    from peft_dist.config import load_recipe
    from peft_dist.launch import launcher_process
    from peft_dist.run.directory import RunDir

    def never(*_: object, **__: object) -> int:
        raise AssertionError("no process is needed to refuse it")

    monkeypatch.setattr(launcher_process, "run_tool", never)
    run = RunDir.create(tmp_path / "run", load_recipe(recipe_file))
    out = tmp_path / "merged"
    out.mkdir()
    (out / "file").touch()
    assert main(["merge", str(run.path), "--out", str(out)]) == 2
    assert "merged: already there; choose another folder with --out" in capsys.readouterr().err


@pytest.mark.parametrize("shell", SHELLS)
def test_every_shell_gets_every_command_and_its_options(
    capsys: pytest.CaptureFixture[str], shell: str
) -> None:
    assert main(["completion", shell]) == 0
    script = capsys.readouterr().out
    for name in COMMANDS:
        assert all(word in script for word in name.split())
    assert "allow-changed" in script and "sequence-classification" in script


def completed(script: Path, *words: str) -> list[str]:
    """Return what bash offers for the last of some words."""
    code = (
        f"source {script}; COMP_WORDS=({' '.join(map(repr, words))}); "
        f"COMP_CWORD={len(words) - 1}; _peft_dist; printf '%s\\n' \"${{COMPREPLY[@]}}\""
    )
    done = subprocess.run(
        ["bash", "-c", code], capture_output=True, text=True, check=True, cwd=script.parent
    )
    return done.stdout.split()


def test_bash_completes_commands_options_choices_and_files(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["completion", "bash"]) == 0
    script = tmp_path / "script.sh"
    script.write_text(capsys.readouterr().out, encoding="utf-8")
    (tmp_path / "trained.yaml").touch()
    assert completed(script, "peft-dist", "tra") == ["train", "trained.yaml"]
    assert completed(script, "peft-dist", "train", "--dr") == ["--dry-run"]
    assert completed(script, "peft-dist", "completion", "fi") == ["fish"]
    assert completed(script, "peft-dist", "submit", "mer") == ["merge"]
    assert completed(script, "peft-dist", "validate", "trained") == ["trained.yaml"]
