"""Our methods are PEFT's: its functions find them by name, in any process that imports ours."""

import copy
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftConfig, PeftType, get_peft_config, get_peft_model
from peft.utils import register_peft_method
from transformers import AutoModelForCausalLM

from peft_dist.common.errors import PeftDistError
from peft_dist.methods.bitfit import BitFitConfig, BitFitModel
from peft_dist.methods.bottleneck import BottleneckConfig, BottleneckModel
from peft_dist.methods.register import register
from tests.tiny import tiny_model

CONFIGS: list[type[PeftConfig]] = [BottleneckConfig, BitFitConfig]
TOKENS = torch.arange(3, 15)[None]

_LOAD = """
import json, sys, torch, peft_dist.methods
from peft import AutoPeftModelForCausalLM, PeftModel
from transformers import AutoModelForCausalLM
base, *folders = sys.argv[1:]
tokens = torch.arange(3, 15)[None]
models = [AutoPeftModelForCausalLM.from_pretrained(folder) for folder in folders] + [
    PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder)
    for folder in folders
]
with torch.no_grad():
    print(json.dumps([model.eval()(input_ids=tokens).logits[0, -1].tolist() for model in models]))
"""

_SHUT = """
from peft import PeftType
type.__delattr__(PeftType, "_value2member_map_")
import peft_dist.methods
"""


def python(code: str, *arguments: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=240,
    )


@pytest.mark.parametrize("config", CONFIGS)
def test_the_enum_has_a_full_member_for_each_method(config: type[PeftConfig]) -> None:
    kind = config().peft_type
    name = config.__name__.removesuffix("Config").upper()
    assert kind is PeftType(name) is PeftType[name] is getattr(PeftType, name)
    assert kind == name and kind in list(PeftType) and isinstance(kind, PeftType)
    assert copy.deepcopy(kind) is kind
    assert repr(kind) == f"<PeftType.{name}: '{name}'>"
    assert isinstance(get_peft_config({"peft_type": name}), config)


def test_registering_again_is_no_harm() -> None:
    before = list(PeftType)
    register("bottleneck", BottleneckConfig, BottleneckModel)
    register("bitfit", BitFitConfig, BitFitModel)
    assert list(PeftType) == before
    with pytest.raises(KeyError, match="already PEFT method"):
        register_peft_method(name="bitfit", config_cls=BitFitConfig, model_cls=BitFitModel)


def test_a_method_of_the_same_name_in_peft_is_not_replaced() -> None:
    with pytest.raises(
        PeftDistError, match=r"^peft: peft .* has a method lora of its own; install"
    ):
        register("lora", BottleneckConfig, BottleneckModel)
    assert isinstance(get_peft_config({"peft_type": "LORA"}), LoraConfig)


@pytest.mark.slow
def test_an_enum_that_cannot_grow_is_named() -> None:
    done = python(_SHUT)
    assert done.returncode != 0
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("peft_dist.common.errors.PeftDistError: peft: peft "), done.stderr
    assert "cannot take the method bitfit (" in last and "_value2member_map_" in last


@pytest.mark.slow
def test_another_process_loads_them_after_one_import(tmp_path: Path) -> None:
    tiny_model(tmp_path / "base", "opt")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    folders, expected = [], []
    for config in CONFIGS:
        model = get_peft_model(copy.deepcopy(base), config(task_type="CAUSAL_LM")).eval()
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data += torch.randn_like(parameter) * 0.1
        folders.append(tmp_path / config.__name__)
        model.save_pretrained(folders[-1])
        with torch.no_grad():
            expected.append(model(input_ids=TOKENS).logits[0, -1])
    done = python(_LOAD, tmp_path / "base", *folders)
    assert done.returncode == 0, done.stderr
    found = torch.tensor(json.loads(done.stdout.splitlines()[-1]))
    torch.testing.assert_close(found, torch.stack(expected * 2), atol=1e-6, rtol=1e-6)
