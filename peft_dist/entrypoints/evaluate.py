"""Score the adapter of a finished run on its held-out rows, as one process of a world.

Uses the run's own recipe, on any number of processes; changes nothing in the run but adding
`evaluation.json`.
"""

import argparse
import json
from dataclasses import asdict, replace
from pathlib import Path

from peft_dist.checkpoint import adapter_file as adapter_file
from peft_dist.checkpoint.same_inputs import describe_inputs, refuse_different_inputs
from peft_dist.checkpoint.start_adapter import load_start
from peft_dist.common.cache_folder import usable_cache_dir
from peft_dist.common.console import show
from peft_dist.common.errors import RecipeError, RunDirError
from peft_dist.config import load_recipe
from peft_dist.config.parallel import Parallel
from peft_dist.data.token_cache import tokenize_rows
from peft_dist.distributed import process_group
from peft_dist.distributed.world import read_world
from peft_dist.evaluation.scoring import make_eval_set, score
from peft_dist.methods import METHODS
from peft_dist.model.precision import compute_dtype
from peft_dist.model.source import find_base
from peft_dist.model.vocabulary import refuse_unknown_ids
from peft_dist.model_setup import set_up_model
from peft_dist.objective.reference import reference_scores
from peft_dist.run.directory import RunDir, write_text_atomic
from peft_dist.worker.process import run_worker


def main(argv: list[str]) -> int:
    """Score one run as one process of a world; return the exit code."""
    parser = argparse.ArgumentParser(prog="launch/score.py", description=main.__doc__)
    parser.add_argument("run_dir", type=Path, help="folder of a finished run")
    parser.add_argument("overrides", nargs="*", help="key=value, such as data.eval=other.jsonl")
    options = parser.parse_args(argv)
    return run_worker(lambda _: _evaluate(options))


def _evaluate(options: argparse.Namespace) -> None:
    world = read_world()
    run = RunDir.open(options.run_dir)
    recipe = load_recipe(run.recipe, options.overrides)
    # Scoring may use other processes than training did: what the launcher says is what counts.
    method = METHODS[recipe.method.kind].of_saved(recipe.method)
    if recipe.objective.has_reference and method != recipe.method:
        raise RecipeError(
            f"the start of this {method.kind} is not what its saved form starts as, so there is no "
            f"reference for {recipe.objective.kind}",
            where="objective.kind",
            remedy="see the run's own evaluations, or score with objective=sft",
        )
    if not recipe.objective.has_reference:
        method = method.model_copy(update={"start_from": None})
    recipe = recipe.model_copy(update={"parallel": Parallel(), "method": method})
    if not (run.adapter / adapter_file.ADAPTER_FILE).is_file():
        raise RunDirError(
            "holds no adapter", where=str(run.path), remedy="wait until training has finished"
        )
    if recipe.data.eval is None:
        raise RecipeError(
            "there are no held-out rows", where="data.eval", remedy="add data.eval=FILE"
        )
    cache = usable_cache_dir()
    rows = tokenize_rows(recipe, "eval", cache / "rows")
    eval_set = make_eval_set(recipe, rows)
    source = find_base(recipe, cache)
    refuse_unknown_ids(recipe, source.files.folder, eval_set.texts())
    dtype, _ = compute_dtype(recipe.model, world.device)
    inputs = describe_inputs(recipe, {"data.eval": rows}, source.files, dtype)
    process_group.start(world)
    refuse_different_inputs(inputs)
    setup = set_up_model(recipe, world, source, label_names=rows.label_names)
    setup.check_rows(eval_set.rows)
    if recipe.objective.has_reference:
        load_start(setup)
        held = reference_scores(setup, eval_set.rows, cache / "reference")
        eval_set = replace(eval_set, reference=held)
    state = adapter_file.load_adapter(run.adapter, setup.method, setup.peft, setup.adapter)
    setup.engine.load_adapter_state(state)
    result = score(setup, eval_set)
    if world.is_main:
        text = json.dumps(asdict(result), indent=2)
        write_text_atomic(run.evaluation, text + "\n")
        accuracy = "" if result.accuracy is None else f"accuracy {result.accuracy:.3f}  "
        show(f"{accuracy}held-out loss {result.loss:.4f}  ({result.rows} rows)")
    process_group.stop()
