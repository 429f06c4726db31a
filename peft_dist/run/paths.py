"""Every path in a run directory: what stands where, and what it tells."""

from dataclasses import dataclass
from pathlib import Path

ARRAY_FILE = "array.json"
"""In the folder of an array: which runs it has."""


@dataclass(frozen=True)
class RunPaths:
    """Where a run's files are, in its folder."""

    path: Path

    @property
    def recipe(self) -> Path:
        """The resolved recipe: every default written out, local paths absolute."""
        return self.path / "recipe.yaml"

    @property
    def next_recipe(self) -> Path:
        """What a start is to go on by, until its rows and model are seen to fit the checkpoints."""
        return self.path / "recipe.next.yaml"

    @property
    def run_facts(self) -> Path:
        """When, with which versions and by which command the run was made; written last."""
        return self.path / "run.json"

    @property
    def ledger(self) -> Path:
        """One JSON line per step, evaluation, checkpoint, and start or end of an attempt."""
        return self.path / "ledger.jsonl"

    @property
    def plan(self) -> Path:
        """What was foreseen of the run: bytes of a rank, and seconds of a step."""
        return self.path / "plan.json"

    @property
    def result(self) -> Path:
        """The summary of a finished run."""
        return self.path / "result.json"

    @property
    def adapter(self) -> Path:
        """The final adapter in PEFT format."""
        return self.path / "adapter"

    @property
    def checkpoints(self) -> Path:
        """What the run can go on from."""
        return self.path / "checkpoints"

    @property
    def logs(self) -> Path:
        """What the processes said."""
        return self.path / "logs"

    @property
    def launcher_log(self) -> Path:
        """Standard error of the launcher and of all its processes."""
        return self.logs / "launcher.log"

    @property
    def system(self) -> Path:
        """The newest sample of every machine but rank 0's, while they train."""
        return self.path / "system"

    @property
    def profile(self) -> Path:
        """Traces of steps."""
        return self.path / "profile"

    @property
    def report(self) -> Path:
        """The page that `peft-dist report` makes."""
        return self.path / "report.html"

    @property
    def evaluation(self) -> Path:
        """The last scoring of the finished adapter."""
        return self.path / "evaluation.json"

    @property
    def evaluation_log(self) -> Path:
        """Standard error of the last scoring's processes."""
        return self.logs / "evaluation.log"

    @property
    def attempts(self) -> Path:
        """One file per attempt to train the run; the newest is its holder's lease."""
        return self.path / "attempts"

    @property
    def array(self) -> Path | None:
        """The folder of the array that the run belongs to, if it does."""
        return self.path.parent if (self.path.parent / ARRAY_FILE).is_file() else None

    @property
    def is_finished(self) -> bool:
        """Whether the run has trained to its end."""
        return self.result.exists()

    @property
    def has_checkpoints(self) -> bool:
        """Whether there is something to go on from."""
        return any(self.checkpoints.glob("step-*"))

    @property
    def failure(self) -> Path:
        """Why starting the run again cannot help, until a person has looked."""
        return self.path / "failure.json"
