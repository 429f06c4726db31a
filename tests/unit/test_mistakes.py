"""A user's mistakes: each is one line with field or file, value and remedy, exit code 2, at once.

None of them starts a process, and nothing is made.
"""

import json
import shlex
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from peft_dist.cli.main import main

ROW = json.dumps({"prompt": "a", "completion": "b"}) + "\n"
BASE = "model: {name: ./model}\ndata: {train: rows.jsonl}\n"
FILES: dict[str, str | bytes] = {
    "ok.yaml": BASE,
    "rows.jsonl": ROW * 50,
    "tabs.yaml": "model:\n\tname: x\n",
    "utf16.yaml": BASE.encode("utf-16"),
    "empty.yaml": "",
    "list.yaml": "- a\n",
    "twice.yaml": BASE + "model: {name: x}\n",
    "open.yaml": "model: {name: ./model\ndata: x\n",
    "binary.yaml": b"\x00\xff\x01",
    "lora.yaml": BASE + "method: {kind: lora, rank: 4, alpha: 8}\n",
    "empty.jsonl": "",
    "broken.jsonl": ROW + '{"prompt": ',
    "unanswered.jsonl": '{"messages": [{"role": "user", "content": "x"}]}\n',
    "text.jsonl": '{"messages": "hi"}\n',
    "semicolons.csv": "prompt;completion\na;b\n",
    "tabs.csv": "prompt\tcompletion\na\tb\n",
    "rows.txt": "hello\n",
    "list.jsonl": '[{"text": "a"}]\n',
    "unknown.jsonl": '{"frage": "a", "antwort": "b"}\n' * 9,
    "guessed.csv": "question,answer\na,b\n",
    "utf16.jsonl": ROW.encode("utf-16"),
    "latin.jsonl": '{"text": "\xe4"}\n'.encode("latin-1"),
    "null.jsonl": '{"text": null}\n',
    "a-file": "x",
}
VALIDATE = {
    # what stands in a recipe, or replaces it
    "quantization=no": "quantization: got 'no'; must be one of 'none', 'nf4'; did you mean 'none'",
    "quantization=int8": "quantization: got 'int8'; must be one of",
    "method.rank=0": "method.rank: got 0; must be a whole number above 0",
    "train.learning_rate=-1": "train.learning_rate: got -1; must be a number above 0.0",
    "train.learning_rate=fast": "train.learning_rate: got 'fast'; must be a number",
    "train.learning_rate=1e-4,2e-4": "to train each: --array train.learning_rate=1e-4,2e-4",
    "train.steps=3 train.epochs=1": "train: steps and epochs are both given; keep one",
    "train.steps": "'train.steps' is not key=value; write it like",
    "train.steps=": "train.steps: no value is given; write null",
    "train.steps=true": "train.steps: got True; must be a whole number",
    "train.seed=1.5": "train.seed: got 1.5; must be a whole number",
    "train.global_batch_size=0": "train.global_batch_size: got 0; must be",
    "train.learning_rte=1": "train.learning_rte: no such key; did you mean 'learning_rate'?",
    "train.lr=1": "here that is train.learning_rate",
    "learning_rate=1": "here that is train.learning_rate",
    "train.num_train_epochs=1": "here that is train.epochs",
    "method.r=8": "here that is method.rank",
    "method.lora_r=8": "here that is method.rank",
    "train.batch_size=8": "here that is train.global_batch_size (rows per step) and",
    "gradient_accumulation_steps=4": "train.global_batch_size, from which accumulation follows",
    "bf16=true": "here that is model.dtype: bfloat16",
    "load_in_4bit=true": "here that is quantization: nf4",
    "run_dir=x": "run_dir: no such key; valid: checkpoint, data,",
    "method.kind=qlora": "kind 'qlora' is not known; here that is lora with quantization: nf4",
    "method.kind=lorra": "kind 'lorra' is not known; did you mean 'lora'?",
    "objective=dpoo": "objective: kind 'dpoo' is not known; did you mean 'dpo'?",
    "parallel.strategy=fsdp2": "got 'fsdp2'; must be one of",
    "method.init=pissa": "method.init pissa splits the full weights; set quantization: none",
    "evaluate.max_rows=4": "evaluate.max_rows: has no meaning here: there is no data.eval; remove",
    "model.revision=main": "model.revision: has no meaning here: model.name is a folder",
    "method.kind=prefix method.projection=true method.text=hi": "method.text: has no meaning here",
    "data.eval=rows.jsonl 'evaluate.choices=[\"x\"]'": "choices must be two or more different",
    "data.eval=150%": "eval 150% must be above 0% and below 100%",
    # rows
    "data.train=nowhere.jsonl": "data.train: 'nowhere.jsonl' does not exist; relative paths start",
    "data.eval=nowhere.jsonl": "data.eval: 'nowhere.jsonl' does not exist; relative paths start",
    "data.train=empty.jsonl": "empty.jsonl: has no rows; add some",
    "data.train=broken.jsonl": "broken.jsonl:2: invalid JSON at column 11",
    "data.train=unanswered.jsonl": "unanswered.jsonl:1: messages has no turn of role assistant",
    "data.train=text.jsonl": "text.jsonl:1: messages is 'hi', not a list of role and content; fix",
    "data.train=semicolons.csv": "the columns with commas between them, where this file has ';'",
    "data.train=tabs.csv": "the columns with commas between them, where this file has tabs",
    "data.train=rows.txt": "unknown kind of file '.txt'; known: .jsonl",
    "data.train=./nomodel": "nomodel: not a folder that `datasets` saved; name a file",
    "data.train=list.jsonl": "holds a JSON list, not one object a line",
    "data.train=unknown.jsonl": "(first of 9 bad rows; 8 more for the same reason); say which keys",
    "data.train=guessed.csv": "data.columns: {prompt: question, completion: answer}",
    "data.train=utf16.jsonl": "utf16.jsonl: is UTF-16; save it as UTF-8 text",
    "data.train=latin.jsonl": "latin.jsonl:1: broken UTF-8 at byte 11 of the line; fix the row",
    "data.train=null.jsonl": "null.jsonl:1: text is null; fix the row",
    "objective=dpo": "has no chosen; its keys: 'prompt', 'completion' (first of 50 bad",
    # the model
    "model.name=./nowhere": "model.name: './nowhere' does not exist; relative paths start",
    "model.name=./nomodel": "model.name: no config.json in",
    "'method.targets=[q_prj]'": "'q_prj' is no layer of this model; did you mean 'q_proj'",
    "train.lr=1 train.num_train_epochs=2 x=1": "(also wrong: train.num_train_epochs, x)",
    "data.train=rows.xlsx": "data.train: 'rows.xlsx' does not exist; relative paths start",
    "--learning_rate 1e-4": "here that is train.learning_rate, written key=value; see",
    "--train.learning_rate=1": "settings have no dashes: train.learning_rate=VALUE; see",
    "--output-dir x": "'--output-dir'; here that is the option --run-dir; see",
    "--strict": "unrecognized argument '--strict'; see peft-dist validate --help",
    "--show-mask": "--show-mask: says how rows are shown; add --rows N",
}
OTHERS = {
    "": "required: COMMAND; see peft-dist --help",
    "trian ok.yaml": "argument COMMAND: there is no 'trian'; did you mean 'train'?",
    "train": "required: RECIPE; see peft-dist train --help",
    "train nowhere.yaml": "nowhere.yaml: no such file; name a file that is there",
    "validate model": "model: is a folder; name the recipe.yaml inside it",
    "validate tabs.yaml": "tabs.yaml:2: is not YAML: found character '\\t'",
    "validate utf16.yaml": "utf16.yaml: is not UTF-8 (byte 0); save it as UTF-8 text",
    "validate empty.yaml": "empty.yaml: is empty; start with model: {name: ...}",
    "validate list.yaml": "list.yaml: is not a mapping but ['a']; start with",
    "validate twice.yaml": "twice.yaml:3: the key 'model' is there twice; keep one",
    "validate open.yaml": "open.yaml:2: is not YAML: expected ',' or '}', but got ':'; close the",
    "validate binary.yaml": "binary.yaml: is not UTF-8 (byte 1); save it as UTF-8 text",
    "validate lora.yaml method.kind=prompt": "method.rank: no such key; valid: init, kind,",
    "train ok.yaml --gpus 2": "'--gpus'; here that is --nproc; see peft-dist train --help",
    "train ok.yaml --rundir x": "did you mean '--run-dir'? see peft-dist train --help",
    "train ok.yaml --resume": "here that is `peft-dist resume RUN_DIR`, or the same command again",
    "status --gpus 2": "unrecognized argument '--gpus'; see peft-dist status --help",
    "resume x --fresh": "unrecognized argument '--fresh'; see peft-dist resume --help",
    "train ok.yaml --run-dir a-file": "a-file: is a file; choose another folder with --run-dir",
    "train ok.yaml --run-dir a-file/x": "is a file; choose another folder with --run-dir",
    "train ok.yaml --nproc 0": "--nproc: got '0'; must be a whole number above 0",
    "train ok.yaml --nproc two": "--nproc: got 'two'; must be a whole number above 0",
    "train ok.yaml --quiet --verbose": "--verbose: not allowed with argument --quiet",
    "train ok.yaml --json": "--json is for --dry-run; see peft-dist train --help",
    "train ok.yaml --array seed": "--array: 'seed' is neither key=v1,v2,... nor a file; write it",
    "train ok.yaml --array nowhere.yaml": "'nowhere.yaml' is neither key=v1,v2,... nor a file",
    "train ok.yaml --array train.seed=1,1": "or one of its values, twice; write it like",
    "plan ok.yaml --gpu h1000": "--gpu: no GPU 'h1000'; did you mean 'h100-80gb'?",
    "plan ok.yaml --nodes 0": "--nodes: got '0'; must be whole numbers such as 1,2,4",
    "submit ok.yaml": "required: --cluster; see peft-dist submit --help",
    "submit ok.yaml --cluster nowhere.yaml": "nowhere.yaml: no such file; name a file",
    "submit ok.yaml --cluster ok.yaml": "ok.yaml: is a recipe; name a cluster file",
    "merge nowhere": "required: --out; see peft-dist merge --help",
    "schema x": "unrecognized argument 'x'; see peft-dist schema --help",
    "completion tcsh": "there is no 'tcsh'; valid: bash, fish, zsh",
    **{
        f"{command} nowhere": "is no folder (recipe.yaml and run.json missing); name a folder"
        for command in ("resume", "status", "report", "goodput", "logs", "merge --out m",
                        "evaluate", "cancel", "stop")
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with everything that can be wrong."""
    path = tmp_path_factory.mktemp("mistakes")
    for name, content in FILES.items():
        (path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    (path / "nomodel").mkdir()
    (path / "model").mkdir()
    (path / "model" / "config.json").write_text('{"model_type": "llama"}')
    weights = {
        f"model.layers.0.self_attn.{name}.weight": torch.zeros(1) for name in ("q_proj", "o_proj")
    }
    save_file(weights, path / "model" / "model.safetensors")
    return path


MISTAKES = {**{f"validate ok.yaml {words}": told for words, told in VALIDATE.items()}, **OTHERS}


@pytest.mark.parametrize("line", MISTAKES)
def test_a_mistake_is_one_line_with_its_place_and_its_remedy(
    line: str, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(folder)
    before = sorted(folder.rglob("*"))
    assert main(shlex.split(line)) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("peft-dist: error: ") and err.count("\n") == 1, err
    assert MISTAKES[line] in err
    assert len(err) < 500, "one line that is read"
    assert sorted(folder.rglob("*")) == before


def test_targets_that_the_model_has_and_other_methods_are_no_mistake(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    assert main(["validate", "ok.yaml", "method.targets=[q_proj]"]) == 0
    assert main(["validate", "ok.yaml", "method.kind=bottleneck"]) == 0
