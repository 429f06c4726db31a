"""A model as a GGUF file: transformers reads the same model and tokenizer back from it."""

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf import GGUFReader
from tokenizers import Tokenizer, decoders, models, normalizers, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig, PreTrainedTokenizerFast

from peft_dist.common.errors import LaunchError, ModelError
from peft_dist.entrypoints.merge_gguf import GgufPlan
from peft_dist.model.weights import WeightFiles
from tests.tiny import CORPUS, VOCABULARY, tiny_model

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 1e4,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
GEMMA = {"head_dim": 256, "query_pre_attn_scalar": 256}
# Where transformers' reader takes what no file can say for the default, so do these.
MODELS: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": None},
    "phi3": {},
    "qwen2": {},
    "qwen3": {"head_dim": 128},
    "gemma2": {**GEMMA, "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0},
    "gemma3_text": {**GEMMA, "layer_types": ["sliding_attention", "sliding_attention"]},
}


@pytest.fixture(autouse=True)
def _no_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TQDM_DISABLE", "1")


def written(folder: Path, outtype: str) -> Path:
    """Write the GGUF file of a model folder."""
    file = folder / f"model-{outtype}.gguf"
    GgufPlan(WeightFiles(folder), outtype, folder).write(folder, file)
    return file


def read_back(file: Path) -> torch.nn.Module:
    model: torch.nn.Module = AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, quantization_config=GgufConfig(dequantize=True)
    )
    return model.float().eval()


def logits(model: torch.nn.Module) -> torch.Tensor:
    torch.manual_seed(2)
    with torch.no_grad():
        found: torch.Tensor = model(torch.randint(3, 300, (3, 17))).logits
    return found


def pieces_tokenizer(folder: Path) -> None:
    """Save a tokenizer like those made of SentencePiece models, over the tiny model's own."""
    bytes_ = [f"<0x{number:02X}>" for number in range(256)]
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    )
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    special = ["<unk>", "<s>", "</s>"]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=special + bytes_, show_progress=False
    )
    tokenizer.train_from_iterator([line.replace(" ", "\u2581") for line in CORPUS * 4], trainer)
    facts = json.loads(tokenizer.to_str())
    facts["added_tokens"] = facts["added_tokens"][:3]  # bytes are not found in texts
    PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(facts)),
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
    ).save_pretrained(folder)


@pytest.mark.parametrize("architecture", list(MODELS))
def test_a_float32_file_holds_the_model(tmp_path: Path, architecture: str) -> None:
    model = tiny_model(tmp_path, architecture, **MODELS[architecture])
    found = logits(read_back(written(tmp_path, "f32")))
    torch.testing.assert_close(found, logits(model), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("outtype", "size"), [("q8_0", 34 / 32), ("f16", 2.0), ("bf16", 2.0), ("f32", 4.0)]
)
def test_matrices_have_the_type_that_was_asked_for(
    tmp_path: Path, outtype: str, size: float
) -> None:
    tiny_model(tmp_path, "llama", dtype=torch.bfloat16, intermediate_size=80)
    for tensor in GGUFReader(written(tmp_path, outtype)).tensors:
        if len(tensor.shape) == 1:
            expected, kind = 4.0, "F32"
        elif outtype == "q8_0" and tensor.shape[0] == 80:  # no multiple of its blocks of 32
            expected, kind = 2.0, "F16"
        else:
            expected, kind = size, outtype.upper()
        assert (tensor.tensor_type.name, tensor.n_bytes) == (kind, expected * tensor.n_elements)


def test_the_tokenizer_and_its_template_come_back(tmp_path: Path) -> None:
    tiny_model(tmp_path, "llama")
    file = written(tmp_path, "q8_0")
    ours, theirs = (
        AutoTokenizer.from_pretrained(tmp_path, **source)
        for source in ({}, {"gguf_file": file.name})
    )
    text = "<|start|>user\nthe cat's mat<|end|> 2024\n\n  na\u00efve"
    assert theirs.encode(text) == ours.encode(text)
    fields = GGUFReader(file).fields
    assert fields["tokenizer.chat_template"].contents() == ours.chat_template
    assert fields["tokenizer.ggml.pre"].contents() == "gpt-2"
    assert fields["tokenizer.ggml.eos_token_id"].contents() == ours.eos_token_id
    assert not fields["tokenizer.ggml.add_bos_token"].contents()


def test_a_tokenizer_of_pieces_is_merged_in_its_own_order(tmp_path: Path) -> None:
    tiny_model(tmp_path, "llama")
    pieces_tokenizer(tmp_path)
    fields = GGUFReader(written(tmp_path, "q8_0")).fields
    assert fields["tokenizer.ggml.model"].contents() == "llama"
    assert fields["tokenizer.ggml.add_space_prefix"].contents()
    scores = fields["tokenizer.ggml.scores"].contents()
    tokens = fields["tokenizer.ggml.tokens"].contents()
    kinds = fields["tokenizer.ggml.token_type"].contents()
    assert [kinds[tokens.index(name)] for name in ("<unk>", "<s>", "<0x41>", "t")] == [2, 3, 6, 1]
    score = dict(zip(tokens, scores, strict=True))
    ours = AutoTokenizer.from_pretrained(tmp_path)
    for text in ("the cat sat on the mat", "animal dog category", "them at"):
        words = list("\u2581" + text.replace(" ", "\u2581"))
        while True:  # as llama.cpp does: the pair whose token scores highest, the first of equals
            pairs = [a + b for a, b in zip(words, words[1:], strict=False)]
            best = max((pair for pair in pairs if pair in score), key=score.__getitem__, default="")
            if not best:
                break
            at = pairs.index(best)
            words[at : at + 2] = [best]
        assert words == ours.tokenize(text)


def test_stretched_rotary_embeddings_stand_in_a_tensor(tmp_path: Path) -> None:
    model = tiny_model(tmp_path, "llama", rope_parameters=LLAMA3, head_dim=64)
    found = {tensor.name: tensor for tensor in GGUFReader(written(tmp_path, "f32")).tensors}
    factors = torch.tensor(found["rope_freqs.weight"].data)
    plain = 1e4 ** -(torch.arange(0, 64, 2) / 64)
    torch.testing.assert_close(plain / factors, model.model.rotary_emb.inv_freq)
    assert (factors.min(), factors.max()) == pytest.approx((1.0, 8.0))


def _with_unknown_splitter(folder: Path) -> None:
    file = folder / "tokenizer.json"
    facts = json.loads(file.read_text(encoding="utf-8"))
    facts["pre_tokenizer"] = {"type": "Whitespace"}
    file.write_text(json.dumps(facts), encoding="utf-8")


@pytest.mark.parametrize(
    ("architecture", "changes", "problem"),
    [
        ("gpt_neox", {}, "models of type gpt_neox are not written here"),
        ("qwen2", {"hidden_act": "gelu"}, "no qwen2 with the activation gelu"),
        ("gemma2", {"query_pre_attn_scalar": 9}, "scales queries otherwise than by 9"),
        ("gemma3_text", {}, "no gemma3_text with these layer_types"),
        ("qwen3", {"rope_parameters": LLAMA3}, "llama3 rotary embeddings of qwen3"),
        ("llama", {"splitter": True}, "splits text in a way that is not known here"),
    ],
)
def test_what_is_not_known_is_left_to_llama_cpp(
    tmp_path: Path, architecture: str, changes: dict[str, Any], problem: str
) -> None:
    splitter = changes.pop("splitter", False)
    tiny_model(tmp_path, architecture, **changes)
    if splitter:
        _with_unknown_splitter(tmp_path)
    with pytest.raises(ModelError, match=problem) as refused:
        GgufPlan(WeightFiles(tmp_path), "q8_0", tmp_path / "out")
    assert "convert_hf_to_gguf.py" in str(refused.value)
    assert f"{tmp_path}/out --outtype q8_0" in str(refused.value)


def test_the_package_that_is_missing_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny_model(tmp_path, "llama")
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "gguf" else find(name)
    )
    with pytest.raises(LaunchError, match=r"--gguf f16: needs .*; pip install 'gguf"):
        GgufPlan(WeightFiles(tmp_path), "f16", tmp_path / "out")
    assert not list(tmp_path.glob("*.gguf"))
