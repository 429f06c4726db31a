"""Which decoders a test trains, and which others the installed transformers knows; no torch."""

import ast
import importlib.util
from pathlib import Path

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
_TABLE = ("models", "auto", "modeling_auto.py")
_NAMES = "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES"


def known_to_transformers() -> list[str]:
    """Return the model types that transformers has a decoder for; none where it is not installed.

    Read from its source, for it takes seconds to import.
    """
    spec = importlib.util.find_spec("transformers")
    if spec is None or spec.origin is None:
        return []
    source = Path(spec.origin).parent.joinpath(*_TABLE).read_text(encoding="utf-8")
    for node in ast.walk(ast.parse(source)):
        targets = node.targets if isinstance(node, ast.Assign) else []
        if any(isinstance(one, ast.Name) and one.id == _NAMES for one in targets):
            pairs = next(part for part in ast.walk(node) if isinstance(part, ast.List))
            return sorted({ast.literal_eval(pair)[0] for pair in pairs.elts})
    return []
