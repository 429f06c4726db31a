"""Every method of the installed PEFT is computed as PEFT does it, or refused in a line."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from transformers import AutoModelForCausalLM

from peft_dist.common.errors import RecipeError
from peft_dist.distributed.world import World
from tests.tiny import save_adapter
from tests.unit.test_any_peft import opened

ON_TWO = {"target_modules": ["q_proj", "v_proj"]}
WORKS: dict[str, dict[str, Any]] = {
    "BEFT": {},
    "BOFT": {},
    "C3A": {"block_size": 16},
    "FOURIERFT": {},
    "GLORA": {},
    "GRALORA": {},
    "HIRA": {},
    "HRA": {},
    "IA3": {},
    "LILY": {},
    "LN_TUNING": {},
    "LOHA": ON_TWO,
    "LOKR": {"target_modules": ["down_proj"], "r": 4},
    "MISS": {"r": 4},
    "OFT": {"oft_block_size": 16, "r": 0},
    "PEANUT": {},
    "PVERA": {"save_projection": False, "r": 8},
    "RANDLORA": {},
    "ROAD": {"group_size": 16},
    "SHADOW": {},
    "SHIRA": {"r": 4},
    "UNILORA": {},
    "VBLORA": {"vector_length": 16, "num_vectors": 32, "topk": 2},
    "VERA": {"r": 8, "save_projection": False},
    "WAVEFT": {"n_frequency": 64},
}
OWN = "has a section of its own; write kind: "
IN_FRONT = "puts learned tokens in front of rows in a way of its own"
FROM_BASE = "from the weights of the base"
REFUSED = {
    "ADALORA": "needs a training loop of its own",
    "ADAMSS": "scikit-learn is required",
    "ADAPTION_PROMPT": "cannot be put on this model",
    "BITFIT": OWN + "bitfit",
    "BOTTLENECK": OWN + "bottleneck",
    "CARTRIDGE": IN_FRONT,
    "CPT": IN_FRONT,
    "DEFT": FROM_BASE,
    "DELORA": FROM_BASE,
    "FROD": FROM_BASE,
    "LORA": OWN + "lora",
    "MULTITASK_PROMPT_TUNING": IN_FRONT,
    "OSF": FROM_BASE,
    "POLY": "needs a training loop of its own",
    "PSOFT": FROM_BASE,
    "TINYLORA": FROM_BASE,
    "SUPERTUNING": FROM_BASE,
    "PREFIX_TUNING": OWN + "prefix",
    "PROMPT_TUNING": OWN + "prompt",
    "P_TUNING": IN_FRONT,
    "TRAINABLE_TOKENS": OWN + "lora, with trainable_tokens",
    "XLORA": "needs a training loop of its own",
}


def test_every_method_of_the_library_is_in_one_of_the_tables() -> None:
    found = {str(kind.value) for kind in PEFT_TYPE_TO_CONFIG_MAPPING}
    assert found == WORKS.keys() | REFUSED.keys()
    assert not WORKS.keys() & REFUSED.keys()


@pytest.mark.parametrize("name", REFUSED)
def test_the_reason_is_one_line(tmp_path: Path, alone: World, name: str) -> None:
    with pytest.raises(RecipeError) as caught:
        opened(tmp_path, alone, {"type": name})
    assert str(caught.value).startswith(f"method.type: {name} ")
    assert REFUSED[name] in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # PEFT's own, which say nothing of what is computed
@pytest.mark.parametrize("name", WORKS)
def test_what_is_trained_is_what_peft_computes(tmp_path: Path, alone: World, name: str) -> None:
    setup = opened(tmp_path, alone, {"type": name, **WORKS[name]}, quantization="none")
    ids = torch.arange(5, 17)[None]
    setup.model.eval()
    with torch.no_grad():
        start = setup.peft.get_base_model()(input_ids=ids, row_lengths=None).logits
        for parameter in setup.adapter.values():
            parameter.add_(0.05 * torch.randn_like(parameter))
        ours = setup.peft.get_base_model()(input_ids=ids, row_lengths=None).logits
    assert (ours - start).abs().max() > 1e-4
    save_adapter(tmp_path / "adapter", setup.method, setup.peft, setup.engine.adapter_state())
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "llama")
    plain = PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    with torch.no_grad():
        torch.testing.assert_close(plain(input_ids=ids).logits, ours, atol=1e-4, rtol=1e-4)
