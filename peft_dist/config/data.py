"""The recipe's section about rows: where they are read, and how they become tokens."""

import datetime as dt
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from peft_dist.config.row_sources import (
    AMOUNTS,
    Columns,
    EvalSources,
    RowSource,
    TrainSources,
    held_out,
    require_one_kind_of_amount,
)
from peft_dist.config.section import Section, Text


class Data(Section):
    """The rows."""

    train: TrainSources
    """JSONL, JSON, CSV or Parquet file, several such as rows/part-*.jsonl, or `datasets` folder
    (relative to the recipe), or a hub name; or a list of such sources, mixed."""
    eval: EvalSources | None = None
    """Held-out rows in any form `train` takes, each of several sources with a loss of its own; or
    how many of the training rows are held out, such as 500 or 5%: which ones follows from their
    content and `train.seed`. Off: no evaluation."""
    train_split: Text = "train"
    """Split to read where `train` is a hub name or a folder with several splits; of any source
    also a part of it, such as train[:10%]."""
    eval_split: Text = "test"
    """The same of `eval`."""
    columns: Columns = Columns()
    """Which columns to read, where they have names of their own, such as {prompt: question,
    completion: answer}. Alpaca's, ShareGPT's and OpenAI's forms need none."""
    template: Text | None = None
    """File with the chat template (Jinja) that conversations are rendered with, relative to the
    recipe. Default: the tokenizer's own."""
    max_length: Annotated[int, Field(ge=2)] = 1024
    """Most tokens of one row; see `truncation`."""
    truncation: Literal["end", "start", "split", "drop", "error"] = "end"
    """What happens to a longer row: cut its end, cut its start, split a text into several rows that
    each go on where the one before ends (and cut the end of a row with a prompt, for nothing would
    ask for the rest), leave it out, or stop."""
    packing: bool | None = None
    """Lay the rows of a micro-batch end to end, without padding and without attention between
    rows; the loss is the same. Default: on for causal-lm where the start proves that the model
    keeps them apart, off for classification."""
    streaming: bool = False
    """Read and tokenise training rows as their steps come, instead of all before the first one:
    for JSONL and Parquet files that are larger than a disk cache. Their order is the same."""
    max_bad_rows: Annotated[int, Field(ge=0)] = 0
    """Malformed rows of a source to leave out, each reported with file and line, before
    stopping."""
    date: dt.date | None = None
    """What a chat template that prints the date takes for today. Default: the day, in UTC, on which
    the run is first started."""

    @model_validator(mode="after")
    def _sources_are_consistent(self) -> Self:
        held_out(self.eval)
        if not isinstance(self.train, str):
            require_one_kind_of_amount(self.train)
        if isinstance(self.eval, tuple):
            for source in self.eval:
                for name in AMOUNTS:
                    if getattr(source, name) is not None:
                        raise ValueError(f"eval: {name} is for training rows; remove it")
        own = [source.template for source in (*self._named("train"), *self._named("eval"))]
        if self.template is not None and all(own):
            raise ValueError("template: every source has one of its own; remove it")
        return self

    @property
    def held_out(self) -> int | float | None:
        """How many of the training rows are held out, or what share; None: none of them."""
        return held_out(self.eval)

    @property
    def mixed_sources(self) -> int:
        """How many training sources are told apart: none where there is one."""
        return len(self.train) if isinstance(self.train, tuple) and len(self.train) > 1 else 0

    def sources(self, which: Literal["train", "eval"]) -> tuple[RowSource, ...]:
        """Return where rows are read, with what `data` says of each; () for no held-out rows."""
        of_train = which == "train" or self.held_out is not None
        split = self.train_split if of_train else self.eval_split
        return tuple(
            source.model_copy(
                update={
                    "split": source.split or split,
                    "columns": source.columns or self.columns,
                    "template": source.template or self.template,
                }
            )
            for source in self._named(which)
        )

    @property
    def templates(self) -> tuple[str, ...]:
        """The files with chat templates, each once."""
        sources = (*self.sources("train"), *self.sources("eval"))
        return tuple(dict.fromkeys(one.template for one in sources if one.template is not None))

    def _named(self, which: Literal["train", "eval"]) -> tuple[RowSource, ...]:
        """Return the sources as they are written, as a list."""
        value = self.train if which == "train" or self.held_out is not None else self.eval
        assert not isinstance(value, int), "that is a part of the training rows"
        return (RowSource(path=value),) if isinstance(value, str) else value or ()
