"""Show the first rows of a recipe as they are trained: `peft-dist validate RECIPE --rows N`."""

import argparse
import json

import numpy as np

from peft_dist.common import logs
from peft_dist.common.cache_folder import usable_cache_dir
from peft_dist.common.console import show
from peft_dist.common.errors import EXIT_DONE, EXIT_USER_ERROR
from peft_dist.config import load_recipe
from peft_dist.data.encoded_row import EncodedRow
from peft_dist.data.known_ids import refuse_ids_above, rows_of_embedding
from peft_dist.data.preview import SourcePreview, preview
from peft_dist.data.record import file_and_line
from peft_dist.data.row_job import RowJob
from peft_dist.data.sources import place
from peft_dist.data.token_cache import row_job
from peft_dist.worker.process import run_worker

SHOWN_CHARACTERS = 400
"""Characters of a stretch that is trained, or not, before its middle is left out."""


def main(argv: list[str]) -> int:
    """Tokenise the first rows and print them; return 2 where one is malformed."""
    parser = argparse.ArgumentParser(prog="peft-dist validate --rows", description=main.__doc__)
    parser.add_argument("recipe", help="recipe file (YAML)")
    parser.add_argument("overrides", nargs="*", help="key=value")
    parser.add_argument("--rows", type=int, required=True, help="lines to read of each source")
    parser.add_argument("--show-mask", action="store_true", help="show long rows whole")
    parser.add_argument("--json", action="store_true", help="print tokens and mask as JSON")
    options = parser.parse_args(argv)
    logs.begin(on_screen=False)  # standard output holds the rows alone
    codes: list[int] = []
    code = run_worker(lambda _: codes.append(show_rows(options)))
    return code or codes[0]


def show_rows(options: argparse.Namespace) -> int:
    """Print the rows; return the exit code.

    Raises:
        PeftDistError: The recipe, a source as a whole or the tokenizer cannot be used, or the
            tokenizer gives ids that the model has no row for.
    """
    recipe = load_recipe(options.recipe, options.overrides)
    job = row_job(recipe, "train", usable_cache_dir() / "rows")
    found = preview(job, options.rows)
    known = rows_of_embedding(recipe)
    if known is not None:
        for _, row in (one for source in found for one in source.rows):
            refuse_ids_above(known, recipe, "data.train", row.tokens)
    if options.json:
        show(json.dumps(as_json(found)))
    else:
        for source in found:
            show(as_text(source, job, whole=options.show_mask))
    return EXIT_USER_ERROR if any(source.counts.bad for source in found) else EXIT_DONE


def as_json(found: list[SourcePreview]) -> dict[str, list[dict[str, object]]]:
    """Return rows and malformed lines as plain values; with source or file where it has several."""

    def named(source: SourcePreview) -> dict[str, object]:
        return {"source": source.counts.name} if len(found) > 1 else {}

    def placed(source: SourcePreview, number: int) -> dict[str, object]:
        file, line = file_and_line(number)
        shards = source.counts.shards
        return {**named(source), **({"file": shards[file]} if shards else {}), "line": line}

    return {
        "rows": [
            {
                **placed(source, row.line),
                **({"part": part} if part else {}),
                "tokens": row.tokens.tolist(),
                "trained": row.trained.astype(int).tolist(),
            }
            for source in found
            for part, row in source.rows
        ],
        "bad": [
            {**placed(source, line), "why": why}
            for source in found
            for line, why in source.counts.bad
        ],
    }


def as_text(source: SourcePreview, job: RowJob, *, whole: bool) -> str:
    """Return rows, trained parts in «», then what is dropped or malformed, and a summary."""
    name = source.counts.name
    lines = []
    for part, row in source.rows:
        label = f", {part}" if part else "" if row.label is None else f", label {row.label}"
        trained = f"{len(row.tokens):,} tokens, {int(row.trained.sum()):,} trained"
        at = place(row.line, name, source.counts.shards)
        lines += [f"{at}  {trained}{label}", _marked(row, job, whole=whole), ""]
    limit = f"nothing to train within data.max_length ({job.recipe.data.max_length})"
    lines += [
        f"dropped: {place(line, name, source.counts.shards)}: {tokens:,} tokens, {limit}"
        for line, tokens in source.dropped
    ]
    lines += [f"bad: {report}" for report in source.counts.reports]
    tokens = sum(len(row.tokens) for _, row in source.rows)
    on = sum(int(row.trained.sum()) for _, row in source.rows)
    counts = source.counts
    lost = f" ({counts.lost_end:,} without a stop token)" if counts.lost_end else ""
    held_out = "" if job.recipe.data.held_out is None else " that are not held out"
    lines.append(
        f"{name}: {source.lines:,} lines{held_out}, {len(source.examples):,} examples, "
        f"{on:,} of {tokens:,} "
        f"tokens trained; {counts.cut:,} cut to data.max_length{lost}, {counts.dropped:,} dropped "
        f"with nothing to train, {len(counts.bad):,} bad"
    )
    return "\n".join(lines)


def _marked(row: EncodedRow, job: RowJob, *, whole: bool) -> str:
    """Return the text of a row with «» around what is trained."""
    borders = [0, *(np.flatnonzero(np.diff(row.trained)) + 1).tolist(), len(row.tokens)]
    # Some tokenizers put a blank before what they decode alone: decode from the beginning.
    ends = [len(job.tokenizer.text(row.tokens[:border])) for border in borders]
    text = job.tokenizer.text(row.tokens)
    parts = []
    for at, (begin, end) in enumerate(zip(ends, ends[1:], strict=False)):
        part = text[begin:end]
        if not whole and len(part) > SHOWN_CHARACTERS:
            half = SHOWN_CHARACTERS // 2
            left_out = len(part) - 2 * half
            part = f"{part[:half]} [... {left_out:,} characters ...] {part[-half:]}"
        parts.append(f"«{part}»" if row.trained[borders[at]] else part)
    return "".join(parts)


if __name__ == "__main__":
    import sys

    sys.exit(main(sys.argv[1:]))
