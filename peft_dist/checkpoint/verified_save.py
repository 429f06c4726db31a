"""Save the adapter of a model setup only where it is proven to come back as it was trained.

Trained biases that no file holds, tensors saved empty by ranks that held a shard, names that PEFT
ignores with a warning: all of them have cost people a training. The file format is not known here.
"""

import copy
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
import torch.distributed as torch_dist
from peft import PeftConfig
from safetensors import SafetensorError
from torch import nn
from transformers import PreTrainedModel

from peft_dist.checkpoint import adapter_file as adapter_file
from peft_dist.checkpoint.saved_tokenizer import tokenizer_to_save
from peft_dist.common.errors import PeftDistError, TrainingError
from peft_dist.common.paths import cache_dir
from peft_dist.config.batch_shape import micro_batch_rows
from peft_dist.data.token_cache import TokenizedRows
from peft_dist.distributed.collectives import broadcast_object, gather_objects
from peft_dist.methods.virtual import SAVED
from peft_dist.model import architectures
from peft_dist.model.fingerprint import fingerprint_rows
from peft_dist.model_setup import ModelSetup

PROBE_ROWS = 4
"""Most training rows whose losses are compared."""
TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 1e-2, torch.float16: 1e-2}
"""Difference of two losses, absolute and relative, that passes for none."""


class AdapterSaver:
    """Saves one model setup's adapter, again and again, and proves every copy."""

    def __init__(self, setup: ModelSetup, rows: TokenizedRows) -> None:
        """Note where the adapter starts, so make it before training.

        Args:
            setup: The model.
            rows: Training rows, of which a few are scored.
        """
        self.setup = setup
        self._tokenizer = tokenizer_to_save(setup.recipe, setup.tokenizer_files)
        ids = np.arange(min(PROBE_ROWS, rows.n_rows, micro_batch_rows(setup.recipe)))
        self._batch = setup.pack(rows, ids).to(setup.world.device)
        self._start = {name: _hash(tensor) for name, tensor in self._trained().items()}

    def moved(self, saved: dict[str, torch.Tensor]) -> list[str]:
        """Return the tensors, of those the file holds, that training has changed."""
        return [name for name, tensor in saved.items() if _hash(tensor) != self._start.get(name)]

    def prove(self) -> None:
        """See that PEFT reads what will be saved, before hours of training depend on it.

        Names, shapes and configuration stay as they are; a checkpoint is then compared with what
        was trained, to the bit, and the final adapter passes every check again. Collective.

        Raises:
            TrainingError: On every process.
        """
        now, problem = self._trained(), None
        if self.setup.world.is_main:
            try:
                with tempfile.TemporaryDirectory(prefix="peft-dist-") as folder:
                    config = self.setup.method.saved_config(self.setup.peft)
                    adapter_file.write_adapter(Path(folder), now, config)
                    self._checked(Path(folder), now, config)
            except (OSError, SafetensorError, PeftDistError) as error:
                problem = str(error)
        _agree(problem)

    def save(self, folder: Path, *, may_publish: Callable[[], None] | None = None) -> None:
        """Write the adapter folder in one step, once it has passed every check. Collective.

        Args:
            folder: Where.
            may_publish: Raises where another attempt has taken over. Asked on rank 0 alone, just
                before the folder gets its name.

        Raises:
            TrainingError: On every process; an older folder is as it was then.
            Superseded: On rank 0.
        """
        # PEFT may run a part of the model to name what it saves, and DeepSpeed wants that of all.
        setup, now = self.setup, self._trained()
        tensors = setup.method.saved(setup.peft, setup.engine.adapter_state())
        partial, problem = None, None
        found: dict[str, torch.Tensor] = {}
        if setup.world.is_main:
            try:
                config = setup.method.saved_config(setup.peft)
                partial = adapter_file.write_partial(folder, tensors, config, self._tokenizer)
                found = self._checked(partial, now, config)
            except PeftDistError as error:
                problem = str(error)
                if partial is None:  # hours of training would be lost
                    places = [cache_dir() / "rescued", Path(tempfile.gettempdir())]
                    kept = adapter_file.rescue(folder, tensors, config, places)
                    problem += "" if kept is None else f"; the trained adapter is in {kept}"
        try:
            _agree(problem)
            self._check_probe(found, {name: tensor.shape for name, tensor in now.items()})
            if partial is not None:
                if may_publish is not None:
                    may_publish()
                try:
                    adapter_file.replace_adapter(partial, folder)
                except TrainingError as error:
                    problem = str(error)
            _agree(problem)
        except (TrainingError, OSError):
            if partial is not None:
                shutil.rmtree(partial, ignore_errors=True)
            raise

    def _trained(self) -> dict[str, torch.Tensor]:
        """Return what the file must hold, from the model itself. Collective."""
        setup = self.setup
        live = {name: parameter.detach().cpu() for name, parameter in setup.adapter.items()}
        return setup.method.saved(setup.peft, live)

    def _checked(
        self, folder: Path, now: dict[str, torch.Tensor], config: PeftConfig
    ) -> dict[str, torch.Tensor]:
        """Check a written folder; return the tensors of its file."""
        found = adapter_file.check_file(folder, now, self.moved(now))
        adapter_file.check_with_peft(folder, config, self._bare())
        return found

    def _bare(self) -> PreTrainedModel:
        return architectures.build_skeleton(
            copy.deepcopy(architectures.bare_model(self.setup.peft).config),
            task=self.setup.recipe.head,
            dtype=torch.float32,
            attention="eager",
        )

    def _check_probe(self, found: dict[str, torch.Tensor], shapes: dict[str, torch.Size]) -> None:
        """Score a few rows with what was read back in place of what was trained. Collective.

        Args:
            found: Rank 0's tensors; the others get them from it.
            shapes: Their shapes.
        """
        sizes = [shape.numel() for shape in shapes.values()]
        flat = torch.empty(sum(sizes))
        if self.setup.world.is_main:
            flat = torch.cat([found[name].reshape(-1) for name in shapes])
        flat = flat.to(self.setup.world.device)
        torch_dist.broadcast(flat, src=0)
        parts = zip(shapes.items(), flat.cpu().split(sizes), strict=True)
        before = self._probe()
        with self._reloaded({name: part.view(shape) for (name, shape), part in parts}):
            after = self._probe()
        allowed = TOLERANCE[self.setup.compute_dtype]
        equal = torch.allclose(after, before, atol=allowed, rtol=allowed)
        if not all(gather_objects(equal)):
            raise adapter_file.unsafe(
                f"read back, it gives other losses ({float(after.mean()):.6g}) "
                f"than the trained one ({float(before.mean()):.6g})"
            )

    @contextmanager
    def _reloaded(self, found: dict[str, torch.Tensor]) -> Iterator[None]:
        """Let an adapter file's tensors stand in the model for a while."""
        method, engine, peft = self.setup.method, self.setup.engine, self.setup.peft
        if method.of_saved(method.settings) != method.settings:
            # The network that makes a prefix is not saved: what it gave stands in its place.
            encoders, adapter = peft.prompt_encoder, peft.active_adapter
            trained = encoders[adapter]
            given = found[SAVED].to(self.setup.world.device)
            encoders[adapter] = nn.Embedding.from_pretrained(given)
            try:
                yield
            finally:
                encoders[adapter] = trained
            return
        state = engine.adapter_state()
        engine.load_adapter_state(method.restored(peft, found, self.setup.adapter))
        try:
            yield
        finally:
            engine.load_adapter_state(state)

    def _probe(self) -> torch.Tensor:
        """Return the loss of every target of the probe rows, float32 [N]. Collective."""
        model = self.setup.model
        was_training = model.training
        model.eval()
        try:
            with torch.no_grad(), self.setup.autocast():
                nll: torch.Tensor = model(self._batch).nll
        finally:
            model.train(was_training)
        return nll.float()


def _hash(tensor: torch.Tensor) -> int:
    # A copy: a view of the engine's flat buffer may begin inside a word of the hash.
    return fingerprint_rows(tensor.clone(), 0)


def _agree(problem: str | None) -> None:
    """End on every process what has failed on rank 0. Collective."""
    shared = broadcast_object(problem)
    if shared is not None:
        raise TrainingError(shared)
