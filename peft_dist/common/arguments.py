"""Command-line options that the command and the programs it starts share."""

import argparse


def add_allow_changed(parser: argparse.ArgumentParser) -> None:
    """Add `--allow-changed FIELD`, which may be given several times."""
    parser.add_argument(
        "--allow-changed",
        action="append",
        default=[],
        metavar="FIELD",
        help="go on although this setting, or these rows or this model, have changed",
    )


GGUF_TYPES = ("q8_0", "f16", "bf16", "f32")
"""What numbers a GGUF file may have."""
