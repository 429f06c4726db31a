"""Log one run to W&B: its name, its configuration, its rows.

Used by processes beside training or after it, never in it. No code, console, command line,
environment, git state or host name is uploaded, and W&B cannot stop the run.
"""

import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil

from peft_dist.common.atomic import replace_file
from peft_dist.common.errors import PeftDistError
from peft_dist.config import Recipe, load_recipe
from peft_dist.ledger.events import StartEvent
from peft_dist.run.directory import RunDir
from peft_dist.run.provenance import versions
from peft_dist.tracking.wandb.identity import folder_of, identity, text_of
from peft_dist.tracking.wandb.rows import STEP, Row

INIT_TIMEOUT_S = 4.0
"""Seconds after which a server that does not answer is done without; with what the SDK does besides
an `init` takes less than 5."""
FINISH_TIMEOUT_S = 7.0
"""Seconds that the end of a run may wait for uploads; by default W&B retries for days."""
CONFIRM_S = 2.0
"""Seconds in which the server should have counted the rows that it has taken."""
SEND_EVERY_S = 5.0
"""Seconds between two requests with rows."""
SERVICE_END_S = 10.0
"""Seconds in which the SDK's own process must end, which may wait for a server that is gone."""


class Unreachable(Exception):
    """W&B's server did not answer, or not in time; another try may help."""


class NotAllowed(PeftDistError):
    """There is no key, or not one that W&B takes."""


def recipe_of(run: RunDir) -> Recipe:
    """Return the recipe of a run, whose files may be gone by now."""
    return load_recipe(run.recipe, check_paths=False)


def end_service(wandb: Any) -> None:
    """End the SDK's own process, which is all that this one has started; kill it if it will not.

    The SDK waits for it without a limit, also at the end of the interpreter.
    """
    late = threading.Timer(SERVICE_END_S, _kill_children)
    late.daemon = True
    late.start()
    try:
        with suppress(Exception, SystemExit):  # what it exits with is the end of that process
            wandb.teardown(1)
    finally:
        late.cancel()


def _kill_children() -> None:
    for child in psutil.Process().children():
        with suppress(psutil.NoSuchProcess):
            child.kill()


class WandbRun:
    """A W&B run that this process logs, at the server or into a file in the run directory."""

    def __init__(
        self,
        run: RunDir,
        start: StartEvent,
        *,
        online: bool,
        first_row: int = 0,
        is_last: bool = True,
        finish_timeout_s: float = FINISH_TIMEOUT_S,
    ) -> None:
        """Begin, or go on with the run that is there.

        Args:
            run: Which run.
            start: The start of the newest attempt.
            online: At the server, or into a file.
            first_row: Rows not to write into the file; the server knows itself what it has.
            is_last: Whether the run is over for the server when this ends.
            finish_timeout_s: Seconds that `finish` may wait for uploads.

        Raises:
            Unreachable: Where the server does not answer.
            NotAllowed: Where there is no key that it takes.
            OSError: Where the run directory cannot be written.
        """
        import wandb  # takes a second

        self._wandb, self.is_online = wandb, online
        recipe, known = recipe_of(run), identity(run)
        settings = recipe.tracking.wandb
        name, group = _names(run)
        try:
            self._run = wandb.init(
                id=known["id"],
                project=settings.project,
                entity=settings.entity,
                name=name,
                group=settings.group or group,
                tags=list(settings.tags) or None,
                mode="online" if online else "offline",
                resume="allow" if online else None,
                dir=str(run.path),
                config=_config(recipe, start),
                allow_val_change=True,
                settings=_settings(wandb, finish_timeout_s, is_last=is_last),
            )
            # Everything is drawn over our own step: W&B's counts rows, through every restart.
            self._run.define_metric(STEP)
            self._run.define_metric("*", step_metric=STEP)
            self._path = f"{self._run.entity}/{self._run.project}/{self._run.id}"
        except Exception as error:
            end_service(self._wandb)
            raise explained(error) from error
        self.url: str | None = self._run.url if online else None
        """Where the run is to be seen."""
        self.first_row: int = self._run.starting_step if online else first_row
        """How many rows of the run there are already."""
        if online and known.get("url") != self.url:
            with suppress(OSError):
                replace_file(folder_of(run) / "run.json", text_of(known | {"url": self.url}))

    def log(self, row: Row) -> None:
        """Queue one row.

        Raises:
            Unreachable: Where the SDK's own process is gone; so for all that follow.
        """
        with _sdk():
            self._run.log(row)

    def alert(self, title: str, text: str, level: str, *, at_most_every_s: float) -> None:
        """Alert whoever follows the run."""
        with _sdk():
            self._run.alert(title, text, level, wait_duration=at_most_every_s)

    def log_adapter(self, files: Mapping[str, Path], timeout_s: float) -> None:
        """Upload an adapter; one with the same digest that is there already stays.

        Args:
            files: What to upload, by the names they get.
            timeout_s: Seconds after which it is given up.
        """
        artifact = self._wandb.Artifact(f"adapter-{self._run.id}", type="adapter")
        with _sdk():
            for name, path in files.items():
                # Neither copied nor cached: it lies in the run directory.
                artifact.add_file(str(path), name=name, policy="immutable", skip_cache=True)
            self._run.log_artifact(artifact).wait(timeout=int(timeout_s))

    def finish(self, outcome: str | None, rows: int) -> bool:
        """End the run here; return whether the server then has all rows, which a file never does.

        Args:
            outcome: How the attempt ended.
            rows: How many there are.

        Raises:
            Unreachable: Where the server has not taken everything in time.
        """
        try:
            with _sdk():
                if self.is_online and outcome == "interrupted":
                    self._run.mark_preempting()
                self._run.finish(exit_code=0 if outcome in ("done", None) else 1)
                # An end without complaint does not mean that every row was taken.
                return self.is_online and self._has(rows)
        finally:
            self.abandon()

    def abandon(self) -> None:
        """End at once."""
        # A run of the same id can only be begun again once the SDK's process is gone.
        end_service(self._wandb)

    def _has(self, rows: int) -> bool:
        found = self._wandb.Api(timeout=5).run(self._path)
        deadline = time.monotonic() + CONFIRM_S
        while found.historyLineCount < rows and time.monotonic() < deadline:
            time.sleep(0.5)
            found.load(force=True)
        return bool(found.historyLineCount >= rows)


def _settings(wandb: Any, finish_timeout_s: float, *, is_last: bool) -> Any:
    return wandb.Settings(
        console="off",
        disable_code=True,
        disable_git=True,
        disable_job_creation=True,
        label_disable=True,
        save_code=False,
        host="",
        program="",
        x_executable="",
        x_disable_machine_info=True,
        x_disable_meta=True,
        x_disable_stats=True,
        x_save_requirements=False,
        silent=True,
        symlink=False,
        init_timeout=INIT_TIMEOUT_S,
        finish_timeout=finish_timeout_s,
        finish_timeout_raises=True,
        x_file_stream_transmit_interval=SEND_EVERY_S,
        x_update_finish_state=is_last,
        stop_fn=_nothing,  # the stop button would interrupt this process, which trains nothing
    )


@contextmanager
def _sdk() -> Iterator[None]:
    """Turn whatever the SDK raises into `Unreachable`: it raises many kinds."""
    try:
        yield
    except Exception as error:
        raise Unreachable(_first_line(error)) from error


def _nothing() -> None:
    """Do nothing."""


def _names(run: RunDir) -> tuple[str, str | None]:
    """Return the name of a run, and the group that it belongs to: its array."""
    array = run.array
    return (run.path.name, None) if array is None else (f"{array.name}/{run.path.name}", array.name)


def _config(recipe: Recipe, start: StartEvent) -> dict[str, Any]:
    """Return what W&B shows, sorts and compares runs by."""
    placement = {
        "processes": start.world_size,
        "strategy": start.strategy,
        "nodes": None if start.hosts is None else len(start.hosts),
        "device": start.device,
        "base_bytes_per_rank": start.base_bytes_per_rank,
    }
    return {
        **recipe.model_dump(mode="json"),
        "placement": {name: value for name, value in placement.items() if value is not None},
        "versions": start.versions or versions(),
        "steps": start.steps,
    }


def explained(error: Exception) -> Exception:
    """Return which of the two errors above an error of the SDK is."""
    line, kind = _first_line(error), type(error).__name__
    if kind == "UsageError" and "API key" in line:
        return NotAllowed("no key", where="W&B", remedy="set WANDB_API_KEY, or run `wandb login`")
    # An AuthenticationError may also say that the server was too slow to check the key.
    if any(word in line for word in ("error 401", "error 403", "ermission denied", "invalid")):
        return NotAllowed(f"refuses the key: {line}", where="W&B", remedy="set WANDB_API_KEY")
    return Unreachable(line)


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).split("\n")[0]
