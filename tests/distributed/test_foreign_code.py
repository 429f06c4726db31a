"""No Python of a model's folder ever runs, whoever says yes."""

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.distributed.test_commands import RECIPE
from tests.processes import ROOT, environment
from tests.tiny import completion_rows, tiny_model, write_jsonl

AUTO = ("Auto", "auto_class")


def test_everything_that_transformers_loads_is_told_not_to_trust() -> None:
    found = []
    for path in sorted((ROOT / "peft_dist").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if (
                isinstance(node, ast.Call)
                and isinstance(node.func, ast.Attribute)
                and node.func.attr in ("from_pretrained", "from_config")
                and isinstance(node.func.value, ast.Name)
                and node.func.value.id.startswith(AUTO)
            ):
                words = {word.arg: word.value for word in node.keywords}
                trust = words.get("trust_remote_code")
                found.append(f"{path.name}:{node.lineno}")
                assert isinstance(trust, ast.Constant) and trust.value is False, found[-1]
    assert len(found) >= 4, found


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
