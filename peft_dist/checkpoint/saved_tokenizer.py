"""The tokenizer beside an adapter, with the chat template that the adapter was trained with."""

import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

from peft_dist.config import Recipe
from peft_dist.data.template_file import read_template

log = logging.getLogger(__name__)

TEMPLATE = "chat_template.jinja"
"""Where transformers looks for a chat template first."""
_CONFIG = "tokenizer_config.json"


def tokenizer_to_save(recipe: Recipe, files: Sequence[Path]) -> Mapping[str, Path | str]:
    """Return what stands beside an adapter by name: a file to copy, or a text.

    Args:
        recipe: What is trained.
        files: The tokenizer of its model.

    Raises:
        DataError: A chat template cannot be read.
    """
    found: dict[str, Path | str] = {file.name: file for file in files}
    used = {source.template for source in recipe.data.sources("train")}
    templates = {None if path is None else read_template(path) for path in used}
    if len(templates) > 1:
        log.info(
            "the training rows have several chat templates, so the tokenizer is saved beside the "
            "adapter with its own"
        )
        return found
    (template,) = templates
    if template is None:
        return found
    # Readers differ in which of several places they look at first.
    found = {name: file for name, file in found.items() if not name.startswith("chat_template")}
    if _CONFIG in found:
        config = json.loads(Path(found[_CONFIG]).read_text(encoding="utf-8"))
        config.pop("chat_template", None)
        found[_CONFIG] = json.dumps(config, indent=2, ensure_ascii=False) + "\n"
    return found | {TEMPLATE: template.text}
