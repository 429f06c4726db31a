"""Chat templates in files of their own, which a recipe names in place of the tokenizer's."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from peft_dist.common.errors import DataError

if TYPE_CHECKING:
    from jinja2 import Environment

MOST_BYTES = 10_000_000
"""Longest file that is read: released templates have some thousand bytes."""


@dataclass(frozen=True)
class TemplateFile:
    """A chat template; two with one text are the same."""

    text: str
    path: str = field(compare=False)


def read_template(path: str) -> TemplateFile:
    """Read a chat template and see that it is one; renders nothing.

    Raises:
        DataError: The file cannot be read, or is no Jinja template.
    """
    from jinja2 import TemplateSyntaxError

    remedy = "name a file that holds a Jinja chat template alone"
    try:
        with Path(path).open("rb") as file:
            raw = file.read(MOST_BYTES + 1)
        # as transformers reads its own: with line ends of one kind
        text = raw.decode("utf-8-sig").replace("\r\n", "\n")
    except OSError as error:
        problem = f"chat template cannot be read: {error.strerror or error}"
        raise DataError(problem, where=path, remedy=remedy) from error
    except UnicodeDecodeError as error:
        raise DataError("chat template is not UTF-8", where=path, remedy=remedy) from error
    if not text.strip() or len(raw) > MOST_BYTES:
        problem = "is longer than 10 MB" if text.strip() else "is empty"
        raise DataError(f"chat template {problem}", where=path, remedy=remedy)
    try:
        _environment().parse(text)
    except TemplateSyntaxError as error:
        why = " ".join(str(error.message).split())
        raise DataError(
            f"chat template is broken: {why}", where=f"{path}:{error.lineno}", remedy="fix it"
        ) from error
    return TemplateFile(text, path)


def _environment() -> "Environment":
    """Return what knows the tags that transformers knows; it renders nothing."""
    from jinja2 import Environment, nodes
    from jinja2.ext import Extension, loopcontrols
    from jinja2.parser import Parser

    class Generation(Extension):
        """`{% generation %}`, which marks what the assistant says."""

        tags = {"generation"}

        def parse(self, parser: Parser) -> list[nodes.Node]:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    return Environment(extensions=[Generation, loopcontrols])
