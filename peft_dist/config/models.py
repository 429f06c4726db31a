"""What is known of models without torch: their config.json, and which decoders there are."""

import ast
import importlib.util
import json
from pathlib import Path
from typing import Any

from peft_dist.common.errors import ModelError

TESTED = (
    "gemma2",
    "gemma3_text",
    "gpt2",
    "gpt_neox",
    "llama",
    "mistral",
    "opt",
    "phi3",
    "qwen2",
    "qwen3",
)
"""Model types that tests train on every engine."""
TESTED_CLASSIFIERS = ("bert",)
_TABLE = ("models", "auto", "modeling_auto.py")
_NAMES = {
    False: "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
    True: "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES",
}


def read_model_config(file: Path) -> dict[str, Any]:
    """Return what a model's config.json holds.

    Raises:
        ModelError: Where there is none, or no JSON object in it.
    """
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        problem = f"no {file.name} in {file.parent}"
    except (OSError, ValueError, RecursionError) as error:  # one that nests without an end
        problem = f"{file} cannot be read ({error})"
    else:
        if isinstance(config, dict):
            return config
        problem = f"{file} holds no object"
    raise ModelError(
        problem,
        where="model.name",
        remedy="name the folder that holds config.json and the safetensors files",
    )


def known_to_transformers(*, classify: bool = False) -> list[str]:
    """Return the model types that transformers has a decoder for; none where it is not installed.

    Read from its source, for it takes seconds to import.

    Args:
        classify: Return those that it has a classifier of text for.
    """
    spec = importlib.util.find_spec("transformers")
    if spec is None or spec.origin is None:
        return []
    source = Path(spec.origin).parent.joinpath(*_TABLE).read_text(encoding="utf-8")
    for node in ast.walk(ast.parse(source)):
        targets = node.targets if isinstance(node, ast.Assign) else []
        if any(isinstance(one, ast.Name) and one.id == _NAMES[classify] for one in targets):
            pairs = next(part for part in ast.walk(node) if isinstance(part, ast.List))
            return sorted({ast.literal_eval(pair)[0] for pair in pairs.elts})
    return []
