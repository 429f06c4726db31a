"""Bring a recipe's model, tokenizer, rows and adapter here, for nodes that reach no network."""

import argparse
from pathlib import Path

from peft_dist.checkpoint.start_adapter import start_folder
from peft_dist.common.console import show
from peft_dist.common.errors import CacheError
from peft_dist.config import load_recipe
from peft_dist.data.encode import load_tokenizer
from peft_dist.data.fetched import note_dataset
from peft_dist.data.first_rows import hub_sources
from peft_dist.model.weights import WeightFiles, model_folder
from peft_dist.worker.process import run_worker


def main(argv: list[str]) -> int:
    """Fetch what one recipe names; return the exit code."""
    parser = argparse.ArgumentParser(prog="peft-dist fetch", description=main.__doc__)
    parser.add_argument("recipe", help="recipe file (YAML)")
    parser.add_argument("overrides", nargs="*", help="key=value")
    options = parser.parse_args(argv)
    return run_worker(lambda _: _fetch(options))


def _fetch(options: argparse.Namespace) -> None:
    recipe = load_recipe(options.recipe, options.overrides)
    folder = model_folder(recipe.model.name, recipe.model.revision)
    size = sum(file.stat().st_size for file in WeightFiles(folder).files)
    show(f"model {recipe.model.name}: {size / 1e9:,.1f} GB in {folder}")
    start = recipe.method.start_from
    if start is not None:
        show(f"adapter {start}: in {start_folder(start)}")
    load_tokenizer(recipe)
    show("tokenizer: loads")
    for source in hub_sources(recipe):
        dataset = source.dataset()
        files = [Path(file["filename"]) for file in dataset.cache_files]
        try:
            note_dataset(source.name, source.split, files)
        except OSError as error:
            raise CacheError(
                f"cannot be written: {error}", where="cache", remedy="set PEFT_DIST_CACHE"
            ) from error
        show(f"rows {source.name} ({source.split}): {len(dataset):,}")


if __name__ == "__main__":
    import sys

    sys.exit(main(sys.argv[1:]))
