"""No Python of a model's folder ever runs, whoever says yes."""

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.distributed.test_commands import RECIPE
from tests.processes import ROOT, environment
from tests.tiny import completion_rows, tiny_model, write_jsonl

LOADS = ("from_pretrained", "from_config")
RUN_NO_CODE_OF_A_MODEL = ("PeftConfig", "PeftModel", "nn.Embedding")
"""Classes whose methods of these names take no such argument."""


def calls(path: Path) -> Iterator[ast.Call]:
    """Yield where a file loads something as transformers does, or hands on what would."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    found = {id(node.func): node for node in ast.walk(tree) if isinstance(node, ast.Call)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and node.attr in LOADS:
            assert id(node) in found, f"{path.name}:{node.lineno} is not called where it stands"
            if ast.unparse(node.value) not in RUN_NO_CODE_OF_A_MODEL:
                yield found[id(node)]


def test_everything_that_transformers_loads_is_told_not_to_trust() -> None:
    trusting, checked = [], 0
    for folder in ("peft_dist", "launch", "benchmarks"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            for call in calls(path):
                words = {word.arg: word.value for word in call.keywords}
                trust = words.get("trust_remote_code")
                checked += 1
                if not isinstance(trust, ast.Constant) or trust.value is not False:
                    trusting.append(f"{path.relative_to(ROOT)}:{call.lineno}")
    assert not trusting
    assert checked >= 9, "where are they?"


@pytest.mark.distributed
def test_a_model_folders_own_python_does_not_run_when_somebody_says_yes(tmp_path: Path) -> None:
    model = tmp_path / "model"
    tiny_model(model, "llama")
    canary = tmp_path / "canary"
    (model / "evil.py").write_text(
        f"import os\nos.system('touch {canary}')\n"
        "from transformers import LlamaConfig as Config, PreTrainedTokenizerFast as Tokenizer\n",
        encoding="utf-8",
    )
    for name, classes in (
        ("config.json", {"AutoConfig": "evil.Config"}),
        ("tokenizer_config.json", {"AutoTokenizer": [None, "evil.Tokenizer"]}),
    ):
        settings = json.loads((model / name).read_text(encoding="utf-8"))
        (model / name).write_text(json.dumps(settings | {"auto_map": classes}), encoding="utf-8")
    write_jsonl(tmp_path / "rows.jsonl", completion_rows(32))
    write_jsonl(tmp_path / "held.jsonl", completion_rows(11, seed=1))
    (tmp_path / "recipe.yaml").write_text(RECIPE, encoding="utf-8")
    done = subprocess.run(
        [sys.executable, str(ROOT / "launch" / "train.py"), "recipe.yaml", "train.steps=1"],
        env=environment(tmp_path / "cache"), cwd=tmp_path, input="y\n" * 100,
        capture_output=True, text=True, timeout=180, check=False,
    )  # fmt: skip
    assert not canary.exists()
    assert done.returncode in (0, 2), done.stderr
    assert "trust_remote_code=True" not in done.stdout + done.stderr, "nobody is asked"
