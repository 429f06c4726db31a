"""The generated pages of the documentation say what the code says."""

import re
from collections.abc import Callable

import pytest

from peft_dist.cli import docs as cli_docs
from peft_dist.cli.main import build_parser
from peft_dist.cli.options import _subcommands, _words
from peft_dist.cli.submit_command import join_words
from peft_dist.config import docs as config_docs
from peft_dist.ledger import docs as ledger_docs
from tests.processes import ROOT

PAGES = {
    "recipe-reference.md": config_docs.render_recipe_docs,
    "cluster-reference.md": config_docs.render_cluster_docs,
    "cli.md": cli_docs.render_docs,
    "ledger.md": ledger_docs.render_docs,
}


@pytest.mark.parametrize(("page", "render"), PAGES.items())
def test_a_generated_page_is_what_the_code_says(page: str, render: Callable[[], str]) -> None:
    on_disk = (ROOT / "docs" / page).read_text(encoding="utf-8")
    assert on_disk == render(), f"docs/{page} is out of date: `make docs` writes it anew"


def test_every_key_has_its_meaning() -> None:
    for render in (config_docs.render_recipe_docs, config_docs.render_cluster_docs):
        rows = [line for line in render().splitlines() if line.startswith("| `")]
        assert rows
        assert [row for row in rows if row.rstrip(" |").count("|") < 4] == []


def test_every_command_that_a_page_names_is_one_with_these_options() -> None:
    commands = _subcommands(build_parser())
    pages = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")]
    text = "\n".join(page.read_text(encoding="utf-8") for page in pages)
    text = re.sub(r"\s#[^\n]*", "", text)
    named = re.findall(r"`peft-dist ([a-z][^`]*)`|^ *peft-dist ([a-z][^:\n]*)$", text, re.M)
    assert len(named) >= 40
    for words in (join_words((one or other).split()) for one, other in named):
        parser = commands[words[0]]
        for name in words[1:]:
            parser = _subcommands(parser).get(name, parser)
        options = {word.partition("=")[0] for word in words if word.startswith("--")}
        assert options <= {*_words(parser), "--help"}, words


def test_the_site_shows_every_page() -> None:
    navigation = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    assert [page.name for page in (ROOT / "docs").glob("*.md") if page.name not in navigation] == []
