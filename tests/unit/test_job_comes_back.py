"""A job at sites as they are: it comes back by one way or another, and is neither lost nor doubled.

The batch script is real; Slurm's commands answer as some sites' do.
"""

import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from tests.unit.run_folders import slurm_commands
from tests.unit.slurm_jobs import CPUS, SCONTROL, Machines, json_lines
from tests.unit.test_slurm_scripts import job_of

REFUSED = "echo 'sbatch: error: Batch job submission failed: Access/permission denied' >&2; exit 1"
BANNER = """echo '-----
          Welcome to the Supercomputer, 12 nodes
-----
--> Verifying valid submit host...OK'"""
CHAIN = {"requeue": {"allowed": False}}
NO_REQUEUE = f"""case $1 in
  requeue) echo "Requested operation is presently disabled for job $2" >&2; exit 1 ;;
esac
{SCONTROL}"""


class Site:
    """A site with a job whose script runs here."""

    def __init__(self, folder: Path, **cluster: Any) -> None:
        """Write the job's scripts."""
        self.machines = Machines(folder)
        self.run_dir = folder / "run"
        self.script = job_of(self.machines, folder, **cluster)
        self.answer(sleep="")  # of the pauses between two tries

    def answer(self, **commands: str) -> None:
        """Let commands answer otherwise."""
        slurm_commands(self.machines.commands, **commands)

    def run(self, **given: Any) -> subprocess.CompletedProcess[str]:
        """Run the batch script to its end."""
        return self.machines.run(self.script, **given)

    def calls(self, command: str) -> list[str]:
        """Return how a command was called."""
        lines = (self.machines.commands / "calls").read_text(encoding="utf-8").splitlines()
        return [line for line in lines if line.split()[0] == command]

    def events(self, kind: str) -> list[dict[str, Any]]:
        """Return the notes of one kind."""
        return [e for e in json_lines(self.run_dir / "slurm" / "jobs.jsonl") if e["event"] == kind]

    @property
    def requeued(self) -> bool:
        """Whether Slurm was told to queue the job again."""
        return (self.machines.seen / "requeued").exists()

    @property
    def successor(self) -> str:
        """The job that is noted to take over; empty where there is none."""
        file = self.run_dir / "slurm" / "successor"
        return file.read_text(encoding="utf-8") if file.exists() else ""


@pytest.mark.parametrize("cluster", [{}, CHAIN])
def test_a_job_that_hangs_into_its_time_limit_comes_back(
    tmp_path: Path, cluster: dict[str, Any]
) -> None:
    site = Site(tmp_path, **cluster)
    soon = time.strftime("%Y-%m-%dT%H:%M:%S", time.localtime(time.time() + 21))
    if cluster:  # there the next start is refused until the end
        site.answer(sbatch=REFUSED)
    done = site.run(decision="", STAND_IN_HANGS="1", STAND_IN_END=soon)
    assert done.returncode == 75, done.stderr
    assert site.requeued
    assert [event["decision"] for event in site.events("ended")] == ["again"]


def test_the_timer_of_a_job_that_ends_before_its_limit_does_nothing(tmp_path: Path) -> None:
    site = Site(tmp_path)
    later = time.strftime("%Y-%m-%dT%H:%M:%S", time.localtime(time.time() + 3600))
    done = site.run(decision="done", STAND_IN_END=later)
    assert (done.returncode, site.requeued) == (0, False)
    end_s = float((site.run_dir / "logs" / "12-0" / "job-end").read_text(encoding="utf-8"))
    assert abs(end_s - time.time() - 3600) < 300


def test_a_limit_that_is_extended_while_the_job_runs_is_the_one_that_counts(tmp_path: Path) -> None:
    site = Site(tmp_path)
    later_s = int(time.time()) + 3600
    # Until the third answer the end is near; once the new one is known, the ranks end.
    known = f'until grep -q {later_s} "$PEFT_DIST_LOGS/job-end"; do /usr/bin/sleep 0.1; done'
    extended = f"""case "$1 $2" in
      "show job") echo >>$SEEN/asked; end="28 seconds"
        if [ $(wc -l <$SEEN/asked) -ge 3 ]; then
          end=@{later_s}
          sh -c '{known}; touch $SEEN/requeued' >/dev/null 2>&1 &
        fi
        echo "JobId=12 JobState=RUNNING Restarts=0 EndTime=$(date -d "$end" +%FT%T)" ;;
      *) {SCONTROL} ;;
    esac"""
    site.answer(scontrol=extended)
    assert site.run(decision="done", STAND_IN_HANGS="1").returncode == 0
    assert not [call for call in site.calls("scontrol") if " requeue " in call]


def test_the_id_of_a_successor_is_found_behind_what_a_site_prints_first(tmp_path: Path) -> None:
    site = Site(tmp_path, **CHAIN)
    site.answer(sbatch=f"case $* in *--parsable*) {BANNER}; echo '77;vista' ;; esac")
    site.answer(squeue="case $* in *'-j 77 '*) echo 77 ;; esac")
    done = site.run(decision="done")
    assert done.returncode == 0, done.stderr
    assert site.successor == "77\n"
    assert site.calls("scancel") == ["scancel 77"]


def test_a_successor_whose_id_nobody_printed_is_found_by_its_token(tmp_path: Path) -> None:
    site = Site(tmp_path, **CHAIN)
    token = "$(sed -n 's/.*--comment=\\(peft-dist-[0-9a-f]*\\).*/\\1/p' $0.calls)"
    site.answer(
        sbatch="echo \"$@\" >>${0%/*}/squeue.calls; echo 'Socket timed out' >&2; exit 1",
        squeue=f'case $* in *%F*) echo "76|other"; echo "78|{token}" ;; *) echo 78 ;; esac',
    )
    assert site.run(decision="again").returncode == 75
    assert site.successor == "78\n"
    assert len(site.calls("sbatch")) == 1
    (tried,) = site.events("submitting")
    assert tried["token"].startswith("peft-dist-")
    assert [event["successor"] for event in site.events("queued")] == ["78"]
    assert not site.requeued


def test_a_refused_successor_keeps_nobody_from_training(tmp_path: Path) -> None:
    site = Site(tmp_path, **CHAIN)
    site.answer(sbatch=REFUSED)
    done = site.run(decision="done")
    assert done.returncode == 0
    assert "warning: the next start is not queued: sbatch: sbatch: error: Batch" in done.stderr


def test_a_successor_refused_at_first_is_queued_before_the_end(tmp_path: Path) -> None:
    site = Site(tmp_path, **CHAIN)
    site.answer(
        sbatch=f"test -e {tmp_path}/once && echo 79 && exit; touch {tmp_path}/once;{REFUSED}"
    )
    assert site.run(decision="again").returncode == 75
    assert (site.successor, site.requeued) == ("79\n", False)


@pytest.mark.parametrize("cluster", [{}, CHAIN])
def test_requeue_and_successor_stand_in_for_each_other(
    tmp_path: Path, cluster: dict[str, Any]
) -> None:
    site = Site(tmp_path, **cluster)
    site.answer(**({"sbatch": REFUSED} if cluster else {"scontrol": NO_REQUEUE}))
    assert site.run(decision="again").returncode == 75
    assert (site.requeued, site.successor) == ((True, "") if cluster else (False, "77\n"))


@pytest.mark.parametrize("cluster", [{}, CHAIN])
@pytest.mark.parametrize("decision", ["again", "again-without node1 pre-flight: node1: x"])
def test_a_run_stops_where_slurm_takes_neither(
    tmp_path: Path, cluster: dict[str, Any], decision: str
) -> None:
    site = Site(tmp_path, **cluster)
    site.answer(sbatch=REFUSED, scontrol=NO_REQUEUE)
    done = site.run(decision=decision)
    assert done.returncode == 3
    (line,) = [text for text in done.stderr.splitlines() if "peft-dist: error: " in text]
    assert "Slurm neither requeues this job nor takes another one" in line
    assert f"go on with `peft-dist resume {site.run_dir}` on a login node" in line
    assert site.events("ended")[-1]["decision"] == "stop"


def test_bad_nodes_are_left_out_only_where_slurm_has_enough_others(tmp_path: Path) -> None:
    site = Site(tmp_path)
    excluded = site.run_dir / "slurm" / "excluded"
    excluded.write_text("node1 1700000000\nnode7 1700000001\n", encoding="utf-8")
    assert site.run(decision="again-without node1,node7 x").returncode == 75
    assert "--exclude=node1,node7" in site.calls("sbatch")[-1]
    site.answer(sbatch="case $* in *--test-only*) exit 1 ;; esac; echo 80")
    (site.run_dir / "slurm" / "successor").unlink()
    done = site.run(decision="again-without node1,node7 x")
    assert done.returncode == 75
    assert "Slurm has too few nodes to do without node1,node7" in done.stderr
    assert site.requeued and site.successor == ""


def test_a_chain_that_was_queued_beforehand_needs_no_other_start(tmp_path: Path) -> None:
    site = Site(tmp_path)
    (site.run_dir / "slurm" / "successor").write_text("12\n13\n14\n", encoding="utf-8")
    site.answer(
        squeue="case $* in *' 13 '*) echo 'Invalid job id' >&2 ;; *' 14 '*) echo 14 ;; esac"
    )
    assert site.run(decision="again").returncode == 75
    assert not site.requeued and site.calls("sbatch") == []
    assert site.run(decision="done").returncode == 0
    assert site.calls("scancel") == ["scancel 14"]


def test_a_users_account_reaches_the_successor_and_nothing_else_of_the_job_does(
    tmp_path: Path,
) -> None:
    site = Site(tmp_path, **CHAIN)
    site.answer(sbatch=f"env >{tmp_path}/env; echo 77")
    given = {"SBATCH_ACCOUNT": "project_1", "SBATCH_PARTITION": "other", "SLURM_CLUSTERS": "c",
             "SBATCH_MEM_BIND": "local", "SLURM_NTASKS": "3"}  # fmt: skip
    assert site.run(decision="done", **given).returncode == 0
    lines = (tmp_path / "env").read_text(encoding="utf-8").splitlines()
    names = {line.partition("=")[0] for line in lines}
    assert {"SBATCH_ACCOUNT", "SLURM_CLUSTERS", "PEFT_DIST_AFTER"} <= names
    # The cluster file names the partition.
    assert not names & {"SBATCH_PARTITION", "SBATCH_MEM_BIND", "SLURM_NTASKS", "SLURM_JOB_ID"}
    assert CPUS["partition"]


def test_a_node_list_that_sinfo_does_not_give_whole_is_none(tmp_path: Path) -> None:
    site = Site(tmp_path)
    site.answer(sinfo="echo node1 idle; exit 1")
    site.run(decision="", STAND_IN_STATE="COMPLETING", STAND_IN_AFTER="again x")
    logs = site.run_dir / "logs" / "12-0"
    assert (logs / "job.txt").exists() and not (logs / "nodes.txt").exists()


def test_a_set_up_that_fails_on_one_node_is_told_by_another_one(tmp_path: Path) -> None:
    setup = 'if [ "$SLURMD_NODENAME" = node1 ]; then echo "no such module" >&2; false; fi'
    site = Site(tmp_path, setup=setup, processes_per_node=1)
    done = site.run(nodes=2, decision="", STAND_IN_AFTER="again-without node1 the set-up fails")
    assert done.returncode == 75, done.stderr
    logs = site.run_dir / "logs" / "12-0"
    (failed,) = logs.glob("*.set-up-failed")
    assert failed.read_text(encoding="utf-8") == "node1: code 1: no such module\n"
    assert "--nodelist=node2" in site.calls("srun")[-1]


def test_a_set_up_that_fails_on_all_nodes_is_told_once(tmp_path: Path) -> None:
    site = Site(tmp_path, setup="echo 'no such module' >&2\nfalse")
    done = site.run(nodes=3, decision="")
    assert done.returncode == 3
    assert "the set-up fails on 3 of 3 nodes: node1: code 1: no such module" in done.stderr
    assert len(site.calls("srun")) == 1
    assert not site.requeued


@pytest.mark.parametrize("name", ["USR1", "TERM"])
def test_a_signal_during_set_up_is_noted_as_that(tmp_path: Path, name: str) -> None:
    site = Site(
        tmp_path, setup=f"[ -e {tmp_path}/hit ] || {{ touch {tmp_path}/hit; kill -{name} $$; }}"
    )
    done = site.run(decision="again stopped", STAND_IN_AFTER="again stopped")
    (file,) = (site.run_dir / "logs" / "12-0").glob("*.set-up-*")
    assert file.name.endswith(".set-up-stopped")
    assert file.read_text(encoding="utf-8") == f"SIG{name}\n"
    assert done.returncode == 75, done.stderr
