"""Have a job wait until runs, or other commands' jobs, have ended well: `--after FOLDER`.

Slurm's `afterok` names a job, and a run may change its job: each script of a run hands what waits
for it on to the job that takes over, by the list that is kept in its folder here.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from peft_dist.common.errors import RunDirError, SlurmError
from peft_dist.run import job_events
from peft_dist.run.command_folder import find_folder
from peft_dist.run.directory import RunDir
from peft_dist.run.sweep import array_elements
from peft_dist.slurm.job_state import is_live, is_over, job_states


@dataclass(frozen=True)
class Waiting:
    """What a new job waits for."""

    jobs: Mapping[Path, str] = field(default_factory=dict)
    """The jobs that must end well, by the folder of what they do."""
    singleton: bool = False
    """Whether no other job of its name may run, besides."""

    @property
    def options(self) -> list[str]:
        """Options of sbatch, which replace what the script says of dependencies."""
        if not self.jobs:
            return []
        text = ",".join([*(f"afterok:{job}" for job in self.jobs.values()),
                         *(["singleton"] if self.singleton else [])])  # fmt: skip
        # A run that has stopped may be taken up again.
        return [f"--dependency={text}", "--kill-on-invalid-dep=no"]

    def note(self, job: str) -> None:
        """Leave the job that waits where scripts of the runs find it."""
        for folder in self.jobs:
            with (folder / "slurm" / "dependents").open("a", encoding="utf-8") as file:
                file.write(f"{job}\n")


def wait_for(names: Sequence[str | Path], *, singleton: bool = False) -> Waiting:
    """Return what a job must wait for; nothing of what has finished already.

    Args:
        names: Folders of runs, of arrays or of other commands' jobs.
        singleton: As in `Waiting`.

    Raises:
        RunDirError: For one that has not finished, and that no job is going to finish.
        SlurmError: Where nobody can tell.
    """
    folders = [part for name in names for part in _parts(find_folder(name))]
    open_folders = [folder for folder in folders if not RunDir(folder).is_finished]
    jobs = {
        folder: job_events.candidates(folder, job_events.events(folder)) for folder in open_folders
    }
    states = job_states([job for found in jobs.values() for job in found]) if jobs else {}
    waited: dict[Path, str] = {}
    for folder, found in jobs.items():
        live = [job for job in found if is_live(states[job].state)]
        unknown = [states[job] for job in found if not is_over(states[job].state)]
        if live:
            waited[folder] = job_events.bare(live[0])
        elif unknown:
            raise SlurmError(
                f"cannot tell whether job {unknown[0].job} is over: {unknown[0].reason}",
                where=f"--after {folder}",
                remedy="try again when Slurm answers",
            )
        else:
            raise RunDirError(
                "has not finished, and no job of it waits or runs",
                where=f"--after {folder}",
                remedy="submit or resume it first",
            )
    return Waiting(waited, singleton)


def _parts(folder: Path) -> list[Path]:
    return [folder / element["run_dir"] for element in array_elements(folder)] or [folder]
