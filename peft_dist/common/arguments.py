"""Command-line options that the command and the programs it starts share."""

import argparse

BASES = ("full", "dequantized")
"""What an adapter may be added to: the weights of the files, or those it was trained on."""
GGUF_TYPES = ("q8_0", "f16", "bf16", "f32")
"""What numbers a GGUF file may have."""


def add_allow_changed(parser: argparse.ArgumentParser) -> None:
    """Add `--allow-changed FIELD`, which may be given several times."""
    parser.add_argument(
        "--allow-changed",
        action="append",
        default=[],
        metavar="FIELD",
        help="go on although this setting, or these rows or this model, have changed",
    )


def add_model_to_quantize(parser: argparse.ArgumentParser) -> None:
    """Add MODEL, `--revision` and `--task`."""
    parser.add_argument("model", metavar="MODEL", help="folder with safetensors files, or hub id")
    parser.add_argument(
        "--revision", metavar="NAME", help="branch, tag or commit of a hub model (default: main)"
    )
    parser.add_argument(
        "--task",
        choices=("causal-lm", "sequence-classification", "reward"),
        default="causal-lm",
        help="what the model will be trained to do (default: %(default)s)",
    )


def add_merge_form(parser: argparse.ArgumentParser) -> None:
    """Add `--base` and `--gguf`."""
    parser.add_argument(
        "--base",
        choices=BASES,
        default=BASES[0],
        help="add it to the weights of the files, or to those that 4-bit training saw "
        "(default: full)",
    )
    parser.add_argument(
        "--gguf",
        choices=GGUF_TYPES,
        help="also write DIR/DIR-TYPE.gguf, for llama.cpp, with numbers of this type",
    )
