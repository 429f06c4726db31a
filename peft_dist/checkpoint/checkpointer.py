"""Checkpoints of a training: taken by all processes together, written by rank 0 in the background.

A checkpoint holds the adapter in PEFT's format, the optimizer by parameter name, and where the
training stands. Nothing in it depends on how many processes there were, or on their engine.
"""

import json
import logging
import shutil
import threading
import time
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import PeftConfig
from safetensors.torch import load_file, save_file

from peft_dist.checkpoint import directory
from peft_dist.checkpoint.adapter_file import check_file, load_adapter, write_adapter
from peft_dist.checkpoint.state import ANEW, FORMAT, STATE_FILE, Facts, held_out_loss, read_state
from peft_dist.checkpoint.verified_save import AdapterSaver
from peft_dist.common.errors import Superseded, TrainingError
from peft_dist.common.manifest import seal, step_name
from peft_dist.common.sharing import folder_mode
from peft_dist.config.run_sections import Checkpoint
from peft_dist.distributed.collectives import broadcast_object, gather_objects
from peft_dist.ledger.events import SavedEvent, SaveFailedEvent
from peft_dist.optim.optimizer import AdapterOptimizer, Moments
from peft_dist.run.saving import SaveMark

log = logging.getLogger(__name__)

SaveEvent = SavedEvent | SaveFailedEvent
ADAPTER_FOLDER = "adapter"
OPTIMIZER_FILE = "optimizer.safetensors"


@dataclass(frozen=True)
class _Snapshot:
    """A checkpoint in host memory."""

    step: int
    adapter: dict[str, torch.Tensor]
    config: PeftConfig
    optimizer: dict[str, torch.Tensor]
    state: Facts


class Checkpointer:
    """Takes, writes and reads the checkpoints of one model setup."""

    def __init__(
        self,
        saver: AdapterSaver,
        checkpoints: Path,
        settings: Checkpoint,
        *,
        attempt: int,
        facts: Facts,
        may_publish: Callable[[], None],
        sync_ledger: Callable[[], None],
    ) -> None:
        """Prepare; nothing is read or written yet.

        Args:
            saver: Knows the adapter's file.
            checkpoints: The folder they lie in.
            settings: The recipe's `checkpoint` section.
            attempt: This attempt's number.
            facts: What every checkpoint says besides its progress: model, rows, recipe.
            may_publish: Raises where another attempt has taken over. Asked on rank 0 only.
            sync_ledger: Makes the ledger survive a power cut, or raises an OSError. Called on rank
                0 only, in the thread that writes checkpoints.
        """
        self.setup = saver.setup
        self.failed_in_a_row = 0
        """Checkpoints that could not be written since the last one that could."""
        self.last_failure = ""
        """Why the last of them could not be, as the end of a line; rank 0 alone knows."""
        self.newest_step = 0
        """Of the newest checkpoint that was written, or gone on from; rank 0 alone knows."""
        self._saver, self._folder, self._settings = saver, checkpoints, settings
        self._attempt, self._facts = attempt, facts
        self._may_publish, self._sync_ledger = may_publish, sync_ledger
        method = self.setup.method
        # Some methods save what their tensors amount to; these must be kept as well then.
        self._file_restores = method.of_saved(method.settings) == method.settings
        self._writer: threading.Thread | None = None
        self._writing_since_s = 0.0
        self._superseded: Superseded | None = None
        self._results: list[SaveEvent] = []
        self._whole: set[Path] = set()
        """Checkpoints that are known not to be damaged."""

    def take(self, progress: Facts, optimizer: AdapterOptimizer) -> None:
        """Copy the training to host memory and let rank 0 write it. Collective.

        Waits where the checkpoint before it is still being written.

        Args:
            progress: Where the training stands, `step` and `cursor` among it.
            optimizer: The adapter's optimizer.

        Raises:
            TrainingError: Where the processes do not hold the same adapter at the same place.
        """
        setup, engine = self.setup, self.setup.engine
        mark = SaveMark() if setup.world.is_main else None
        self.wait()
        trained = engine.adapter_state()
        saved = setup.method.saved(setup.peft, trained)
        moments = optimizer.moments()
        checksum = zlib.crc32(engine.flat(trained).numpy().data)
        here = [progress["step"], progress["cursor"], checksum]
        if any(there != here for there in gather_objects(here)):
            raise TrainingError(
                f"the processes disagree at step {progress['step']}", remedy="please report this"
            )
        if mark is None:
            return
        tensors = {f"exp_avg.{n}": t for n, t in engine.by_name(moments.mean).items()}
        tensors |= {f"exp_avg_sq.{n}": t for n, t in engine.by_name(moments.square).items()}
        if not self._file_restores:
            tensors |= {f"parameter.{name}": tensor for name, tensor in trained.items()}
        snapshot = _Snapshot(
            step=progress["step"],
            adapter=saved,
            config=setup.method.saved_config(setup.peft),
            optimizer=tensors,
            state={
                "format": FORMAT,
                **progress,
                "updates": moments.updates,
                "attempt": self._attempt,
                **self._facts,
            },
        )
        self._writing_since_s = time.monotonic()
        self._writer = threading.Thread(
            target=self._write, args=(snapshot, mark), name="checkpoint"
        )
        self._writer.start()
        if not self._settings.background:
            self.wait()

    @property
    def busy(self) -> bool:
        """Whether a checkpoint is being written. Rank 0 alone knows."""
        return self._writer is not None and self._writer.is_alive()

    def is_due(self, since_s: float, *, hangs_after_s: float) -> bool:
        """Whether a checkpoint is due by time. Rank 0 alone knows.

        The next one waits for one that is being written. It is put off for that, but not where
        that takes too long: the watchdog sees only what the steps wait for.

        Args:
            since_s: Seconds since the last one was taken.
            hangs_after_s: More than writing one may take.
        """
        if self.busy:
            return time.monotonic() - self._writing_since_s > hangs_after_s
        every_s = self._settings.every_seconds
        return every_s is not None and since_s >= every_s

    def warning_unless_saved(self, step: int) -> str:
        """Return what is to be said of a stop whose checkpoint could not be written."""
        if self.newest_step == step or not self.setup.world.is_main:
            return ""
        on = f"goes on after step {self.newest_step}" if self.newest_step else "begins anew"
        return f"; that could not be saved, and the run {on}"

    def wait(self) -> None:
        """Wait until the last checkpoint is written, or has failed.

        Raises:
            Superseded: Where another attempt has taken over meanwhile.
        """
        if self._writer is not None:
            self._writer.join()
            self._writer = None
        if self._superseded is not None:
            raise self._superseded

    def results(self) -> list[SaveEvent]:
        """Return what became of the checkpoints written since the last call."""
        found = list(self._results)
        del self._results[: len(found)]  # the writer may append one at any time
        return found

    def newest(self) -> Path | None:
        """Return the newest checkpoint that is whole, if there is one. Collective.

        Damaged ones are named and set aside.
        """
        self.wait()
        chosen = None
        if self.setup.world.is_main:
            chosen, bad = directory.newest_good(self._folder)
            for folder, why in bad:
                _tell_bad(folder, why, directory.set_aside(folder))
            if chosen is not None:
                self._whole.add(chosen)
            if bad:
                log.warning("going on from %s", "the beginning" if chosen is None else chosen.name)
        shared: str = broadcast_object("" if chosen is None else str(chosen))
        return Path(shared) if shared else None

    def load(self, folder: Path, optimizer: AdapterOptimizer) -> Facts:
        """Put a checkpoint into the model setup; return where it stands. Collective.

        Args:
            folder: What `newest` returned.
            optimizer: Goes on from the checkpoint's state.

        Returns:
            What `take` was given, among other facts.

        Raises:
            TrainingError: Where it holds other tensors than the model setup trains.
        """
        setup, state = self.setup, read_state(folder)
        self.newest_step = state["step"]
        tensors = load_file(folder / OPTIMIZER_FILE)
        parts: dict[str, dict[str, torch.Tensor]] = {}
        for name, tensor in tensors.items():
            kind, _, parameter = name.partition(".")
            parts.setdefault(kind, {})[parameter] = tensor
        wanted = {"exp_avg", "exp_avg_sq"} | (set() if self._file_restores else {"parameter"})
        _require_same(wanted, set(parts), folder)
        for part in parts.values():
            _require_same(set(setup.adapter), set(part), folder)
        trained = parts.get("parameter")
        if trained is None:
            adapter = folder / ADAPTER_FOLDER
            trained = load_adapter(adapter, setup.method, setup.peft, setup.adapter)
            setup.note_base()
        setup.engine.load_adapter_state(trained)
        flat = setup.engine.flat
        moments = Moments(flat(parts["exp_avg"]), flat(parts["exp_avg_sq"]), state["updates"])
        optimizer.restore(moments)
        setup.check_adapters_agree()
        return state

    def _write(self, snapshot: _Snapshot, mark: SaveMark) -> None:
        """Write one checkpoint; what goes wrong is a result, not an end."""
        try:
            self._try_to_write(snapshot)
        finally:
            mark.remove()

    def _try_to_write(self, snapshot: _Snapshot) -> None:
        started = time.monotonic()
        try:
            size = self._publish(snapshot)
            write_s = time.monotonic() - started
            result: SaveEvent = SavedEvent(step=snapshot.step, bytes=size, write_s=write_s)
            self.failed_in_a_row, self.newest_step = 0, snapshot.step
        except Superseded as error:
            self._superseded = error
            return
        except Exception as error:  # of whatever kind: nobody would see a thread end
            if self._is_superseded():  # where the folder is gone nothing can be written to it
                return
            reason = getattr(error, "strerror", None) or str(error)
            self.failed_in_a_row, self.last_failure = self.failed_in_a_row + 1, f": {reason}"
            log.warning("the checkpoint of step %d was not written: %s", snapshot.step, reason)
            write_s = time.monotonic() - started
            result = SaveFailedEvent(step=snapshot.step, reason=reason, write_s=write_s)
        self._results.append(result)

    def _is_superseded(self) -> bool:
        try:
            self._may_publish()
        except Superseded as error:
            self._superseded = error
        except OSError:
            pass
        return self._superseded is not None

    def _publish(self, snapshot: _Snapshot) -> int:
        """Write, check and rename a checkpoint into place; return its bytes."""
        partial = directory.work_folder(self._folder, snapshot.step, self._attempt)
        try:
            adapter = partial / ADAPTER_FOLDER
            adapter.mkdir(mode=folder_mode())
            write_adapter(adapter, snapshot.adapter, snapshot.config)
            check_file(adapter, snapshot.adapter, self._saver.moved(snapshot.adapter))
            save_file(snapshot.optimizer, partial / OPTIMIZER_FILE)
            text = json.dumps(snapshot.state, indent=2, sort_keys=True)
            (partial / STATE_FILE).write_text(f"{text}\n", encoding="utf-8")
            size = seal(partial, {"step": snapshot.step, "attempt": self._attempt})
            # A checkpoint that outlives the lines of its steps would leave a gap in the ledger.
            self._sync_ledger()
            self._may_publish()
            published = self._folder / step_name(snapshot.step)
            directory.publish(partial, published)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
        try:
            for folder, why, aside in directory.set_bad_aside(published, self._whole):
                _tell_bad(folder, why, aside)
            keep_last, keep_best = self._settings.keep_last, self._settings.keep_best
            directory.prune(self._folder, keep_last, keep_best, held_out_loss)
        except OSError as error:
            log.warning("old checkpoints cannot be removed: %s", error.strerror or error)
        return size


def _tell_bad(folder: Path, why: str, aside: Path) -> None:
    log.warning("the checkpoint %s is damaged: %s; see %s", folder, why, aside.name)


def _require_same(wanted: set[str], found: set[str], folder: Path) -> None:
    different = sorted(wanted ^ found)
    if different:
        raise TrainingError(
            f"{different[0]} stands in {OPTIMIZER_FILE} or in the model, but not in both",
            where=str(folder),
            remedy=f"go on with the recipe that the checkpoint was made with, or {ANEW}",
        )
