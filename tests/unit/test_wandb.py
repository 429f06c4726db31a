"""W&B beside a run, with the real SDK and a server on the loopback that fails on demand."""

import json
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from peft_dist.ledger.events import SkippedEvent
from peft_dist.ledger.gap import read_gap
from peft_dist.run.directory import RunDir
from peft_dist.tracking.wandb.identity import identity, wandb_environment
from tests.faults.long import cases, only_long
from tests.unit.wandb_runs import (
    VERSIONS,
    Training,
    command_lines,
    ledger,
    make_run,
    play,
    rows_of,
    side_cars,
    sync,
    user,
    wait_for,
    wanted_rows,
)
from tests.wandb_stub import KEY, Stub, wandb_stub

pytest.importorskip("wandb")
pytestmark = pytest.mark.slow

FAULTS = ("refuse", "hang", "500", "429", "reset", "401")
END_LIMIT_S = 10.0 + 10.0
"""What the end of training may wait, and as much as a loaded machine may add to it."""
WAIT_FOR_A_SERVER_S = 2.0
"""Who waits for one that hangs waits longer."""


@pytest.fixture
def stub() -> Iterator[Stub]:
    with wandb_stub() as server:
        yield server


@pytest.fixture
def here(stub: Stub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """Make this process, and what it starts, one of a user with a key."""
    home = tmp_path / "home"
    home.mkdir()
    variables = user(home, stub)
    for name in set(os.environ) - set(variables):
        monkeypatch.delenv(name)
    for name, text in variables.items():
        monkeypatch.setenv(name, text)
    return variables


def spoil(stub: Stub, fault: str) -> None:
    if fault == "refuse":
        stub.refuse()
    else:
        stub.fault = fault


def repair(stub: Stub, fault: str) -> None:
    if fault == "refuse":
        stub.listen_again()
    else:
        stub.fault = None


def test_two_thousand_steps_arrive_row_for_row(
    stub: Stub, here: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = make_run(tmp_path / "run", tags=["a", "b"], group="g")
    training = Training(run)
    training.train(2000)
    training.end()
    server = stub.run()
    assert len(server.lines) == 2002
    assert rows_of(server) == wanted_rows(run)
    losses = [row["train/loss"] for row in server.rows if row["event"] == "step"]
    assert losses == [record["loss"] for record in ledger(run) if record["event"] == "step"]
    assert server.rows[-1]["goodput/fraction"] > 0.0
    times = [json.loads(line)["_timestamp"] for line in server.lines]
    assert times == pytest.approx([record["time"] for record in ledger(run)], abs=1e-6)
    assert (server.tags, server.group, server.exit_codes) == (["a", "b"], "g", [0])
    assert capsys.readouterr().out.startswith(f"W&B: {stub.url}/the-team/a-project/runs/")
    assert stub.unknown == []


def test_the_configuration_is_recipe_placement_and_versions(
    stub: Stub, here: dict[str, str], tmp_path: Path
) -> None:
    run = make_run(tmp_path / "run")
    Training(run).end()
    config = {name: entry["value"] for name, entry in stub.run().config.items()}
    assert config["train"]["warmup_fraction"] == 0.05
    assert config["placement"] == {
        "processes": 2, "strategy": "fsdp", "nodes": 2, "device": "cpu",
        "base_bytes_per_rank": [1000, 1000],
    }  # fmt: skip
    assert config["versions"] == VERSIONS
    axes = {entry.get("1") or entry.get("2"): entry for entry in config["_wandb"]["m"]}
    assert list(axes)[:2] == ["train/step", "*"]
    assert axes["*"]["5"] == 1  # every figure is drawn over the first


@pytest.mark.parametrize(
    "fault",
    [
        fault if fault in ("hang", "401") else pytest.param(fault, marks=only_long)
        for fault in FAULTS
    ],
)
def test_a_server_that_fails_at_the_start_costs_training_nothing(
    stub: Stub, here: dict[str, str], tmp_path: Path, fault: str
) -> None:
    spoil(stub, fault)
    run = make_run(tmp_path / "run", wait_s=10.0)
    training = Training(run)
    training.train(300, pause_s=0.01)
    assert training.end() < END_LIMIT_S
    assert_steps_are_not_slower(training, tmp_path)
    assert stub.runs == {}
    repair(stub, fault)
    assert_sync_completes(stub, here, run)


@pytest.mark.parametrize(
    "fault",
    [fault if fault == "refuse" else pytest.param(fault, marks=only_long) for fault in FAULTS],
)
def test_a_server_that_dies_in_the_middle_costs_training_nothing(
    stub: Stub, here: dict[str, str], tmp_path: Path, fault: str
) -> None:
    run = make_run(tmp_path / "run", wait_s=10.0)
    training = Training(run)
    training.train(50)
    wait_for(lambda: stub.runs and stub.run().lines)
    spoil(stub, fault)
    training.train(300, pause_s=0.01)
    assert training.end() < END_LIMIT_S
    assert_steps_are_not_slower(training, tmp_path)
    assert len(stub.run().lines) < 300
    repair(stub, fault)
    assert_sync_completes(stub, here, run)


def assert_steps_are_not_slower(training: Training, tmp_path: Path) -> None:
    """Compare with a run that nobody logs."""
    alone = Training(make_run(tmp_path / "alone"), with_wandb=False)
    alone.train(300, pause_s=0.01)
    alone.end()
    with_wandb, without = (statistics.median(one.write_s[-300:]) for one in (training, alone))
    print(f"a step's record: {with_wandb * 1e3:.3f} ms, {without * 1e3:.3f} ms without W&B")
    # How the machine schedules is in every single one; that a server is waited for would be, too.
    assert with_wandb - without <= 1e-3
    assert max(training.write_s) < WAIT_FOR_A_SERVER_S


def assert_sync_completes(stub: Stub, here: dict[str, str], run: RunDir) -> None:
    done = sync(here, run.path)
    assert done.returncode == 0, done.stderr
    assert rows_of(stub.run()) == wanted_rows(run)
    again = sync(here, run.path)
    assert again.returncode == 0, again.stderr
    assert "sent 0 of" in again.stdout
    assert rows_of(stub.run()) == wanted_rows(run)


INIT = """
import os, sys, time
from peft_dist.ledger.events import SkippedEvent
from peft_dist.run.directory import RunDir
from peft_dist.tracking.wandb.identity import wandb_environment
from peft_dist.ledger.events import StartEvent
from peft_dist.tracking.wandb.wandb_run import Unreachable, WandbRun
os.environ.update(wandb_environment(os.environ))
import wandb
begun = time.monotonic()
try:
    WandbRun(RunDir.open(sys.argv[1]), StartEvent(step=0), online=True)
except Unreachable:
    print(time.monotonic() - begun)
"""


def test_init_gives_a_server_up_after_five_seconds(
    stub: Stub, here: dict[str, str], tmp_path: Path
) -> None:
    stub.fault = "hang"
    run = make_run(tmp_path / "run")
    done = subprocess.run(
        [sys.executable, "-c", INIT, str(run.path)],
        env=here, capture_output=True, text=True, timeout=60, check=True,
    )  # fmt: skip
    assert 3.9 < float(done.stdout) < 5.0 + 1.0  # a loaded machine starts the SDK late


def test_three_restarts_are_one_run(stub: Stub, here: dict[str, str], tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    for attempt, outcome in enumerate(("interrupted", "crashed", "interrupted", "done"), start=1):
        training = Training(run, attempt=attempt, step=20 * (attempt - 1))
        training.train(20)
        training.write(SkippedEvent(step=training.step, reason="loss nan"))
        training.end(outcome)
        assert identity(run)["id"] == stub.run().name
    assert rows_of(stub.run()) == wanted_rows(run)
    assert [row["attempt"] for row in stub.run().rows if row["event"] == "end"] == [1, 2, 3, 4]
    assert stub.run().inits == 4
    assert stub.run().exit_codes == [1, 1, 1, 0]
    assert stub.run().preempting
    titles = [alert["title"] for alert in stub.run().alerts]
    assert titles == [
        "Step skipped", "Interrupted",
        "Started again", "Step skipped", "Ended early",
        "Started again", "Step skipped", "Interrupted",
        "Started again", "Step skipped",
    ]  # fmt: skip
    assert stub.run().alerts[0]["text"] == "loss nan"


def test_rows_whose_lines_were_lost_after_they_were_sent_cost_no_later_row(
    stub: Stub, here: dict[str, str], tmp_path: Path
) -> None:
    run = make_run(tmp_path / "run")
    training = Training(run)
    training.train(20)
    training.end("crashed")
    sent = list(stub.run().rows)
    lines = run.ledger.read_text(encoding="utf-8").splitlines(keepends=True)
    run.ledger.write_text("".join(lines[:13]), encoding="utf-8")
    training = Training(run, attempt=2, step=20)
    gap = read_gap(run.ledger, 20)
    assert gap is not None and (gap.from_step, gap.to_step) == (13, 20)
    training.write(gap)
    training.train(5)
    training.end("done")
    rows = rows_of(stub.run())
    assert rows[: len(sent)] == sent
    assert [row["train/step"] for row in rows if row["event"] == "step"] == list(range(1, 26))
    assert rows[len(sent) :] == wanted_rows(run)[len(sent) :]


def test_many_events_of_a_kind_are_told_with_a_limit(
    stub: Stub, here: dict[str, str], tmp_path: Path
) -> None:
    run = make_run(tmp_path / "run")
    training = Training(run)
    for step in range(1, 6):
        training.write(SkippedEvent(step=step, reason="loss nan"))
    training.end()
    # The server keeps to the limit that comes with each.
    assert {alert["waitDuration"] for alert in stub.run().alerts} == {300_000}
    assert stub.run().rows[-2]["mishaps/skipped"] == 5


def test_a_killed_rank_loses_no_row(stub: Stub, here: dict[str, str], tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    process = play(here, str(run.path), "500", "0")
    assert process.stdout is not None and process.stdout.readline().startswith("trained")
    (side_car,) = side_cars(run)
    process.kill()
    process.communicate()
    wait_for(lambda: not Path(f"/proc/{side_car}").exists(), timeout_s=60)
    assert rows_of(stub.run()) == wanted_rows(run)
    assert len(stub.run().lines) == 501
    assert [alert["text"] for alert in stub.run().alerts] == ["crashed or killed after step 500"]


def test_signals_to_everything_lose_no_row(
    stub: Stub, here: dict[str, str], tmp_path: Path
) -> None:
    """Slurm signals every process of a job, W&B's own ones too."""
    run = make_run(tmp_path / "run")
    training = Training(run)
    training.train(50)
    wait_for(lambda: stub.runs and stub.run().lines)
    (side_car,) = side_cars(run)
    for pid in [side_car, *children(side_car)]:
        os.kill(pid, signal.SIGTERM)
    time.sleep(1.0)
    training.train(50)
    time.sleep(2.0)
    assert side_cars(run) == [side_car]
    training.end("interrupted")
    assert rows_of(stub.run()) == wanted_rows(run)


def children(pid: int) -> list[int]:
    listed = Path(f"/proc/{pid}/task/{pid}/children").read_text(encoding="ascii").split()
    return [int(word) for word in listed]


def test_without_a_key_the_file_of_an_offline_run_holds_the_ledger(
    stub: Stub,
    here: dict[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.delenv("WANDB_API_KEY")
    run = make_run(tmp_path / "run")
    for attempt, outcome in ((1, "interrupted"), (2, "done")):
        training = Training(run, attempt=attempt, step=40 * (attempt - 1))
        training.train(40)
        training.end(outcome)
    said = capfd.readouterr()
    assert said.err == ""
    assert stub.received == []
    assert said.out.count("W&B: offline; `peft-dist sync ") == 2
    files = sorted(run.path.glob("wandb/offline-run-*/run-*.wandb"))
    assert [row for file in files for row in rows_in(file)] == wanted_rows(run)
    done = sync(here | {"WANDB_API_KEY": KEY}, run.path)
    assert done.returncode == 0, done.stderr
    assert rows_of(stub.run()) == wanted_rows(run)


def rows_in(file: Path) -> list[dict[str, Any]]:
    """Read a `.wandb` file with the SDK's own reader."""
    done = subprocess.run(
        [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(file)],
        env=wandb_environment(os.environ), capture_output=True, text=True, timeout=60, check=True,
    )  # fmt: skip
    records = [json.loads(line) for line in done.stdout.splitlines()]
    rows = [record["history"]["item"] for record in records if record["type"] == "history"]
    return [{k: row[k] for k in row if not k.startswith("_")} for row in rows]


@pytest.mark.parametrize("mode", ["auto", "online"][: cases(1, 2)])
def test_a_key_that_is_refused_is_one_warning(
    stub: Stub,
    here: dict[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    mode: str,
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "f" * 40)
    run = make_run(tmp_path / "run", mode=mode)
    training = Training(run)
    training.train(10)
    training.end()
    (warning,) = capfd.readouterr().err.splitlines()
    assert warning.split(maxsplit=1)[1].startswith("warning: W&B: refuses the key")
    (file,) = run.path.glob("wandb/offline-run-*/run-*.wandb")
    assert rows_in(file) == wanted_rows(run)


def test_a_server_that_comes_back_gets_the_run_while_it_trains(
    stub: Stub, here: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stub.refuse()
    run = make_run(tmp_path / "run")
    code = (
        "import sys; from peft_dist.tracking.wandb import sidecar\n"
        "sidecar.TRY_AGAIN_S = 1.0\n"
        "sys.exit(sidecar.main(sys.argv[1:]))\n"
    )
    training = Training(run, with_wandb=False)
    training.train(20)
    process = subprocess.Popen(
        [sys.executable, "-c", code, "9.5", str(run.path)], env=here, stdin=subprocess.PIPE
    )
    wait_for(lambda: list(run.path.glob("wandb/offline-run-*/run-*.wandb")))
    stub.listen_again()
    wait_for(lambda: stub.runs and stub.run().lines)
    training.train(20)
    training.end()
    assert process.stdin is not None
    process.stdin.close()
    assert process.wait(timeout=15) == 0
    assert rows_of(stub.run()) == wanted_rows(run)


SECRETS = {
    "HF_TOKEN": "hf_planted_secret_1",
    "AWS_SECRET_ACCESS_KEY": "planted-secret-2",
    "MY_PASSWORD": "planted-secret-3",
}


def test_secrets_are_found_nowhere_but_in_the_header(
    stub: Stub, here: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, secret in SECRETS.items():
        monkeypatch.setenv(name, secret)
    run = make_run(tmp_path / "run")
    training = Training(run)
    training.train(50)
    wait_for(lambda: stub.runs and stub.run().lines)
    shown = json.dumps(list(command_lines().values()))
    training.end()
    assert sync(dict(os.environ), run.path).returncode == 0
    kept = {path: path.read_bytes() for path in run.path.rglob("*") if path.is_file()}
    assert any(path.suffix == ".wandb" for path in kept)
    assert stub.received
    for secret in (KEY, *SECRETS.values()):
        assert secret not in shown
        assert [path for path, content in kept.items() if secret.encode() in content] == []
        assert [one for one in stub.received if secret.encode() in one] == []
    # Neither is what W&B would learn of the machine by default.
    for fact in (os.uname().nodename, sys.executable, "node-7", str(Path.cwd()), "sidecar.py"):
        found = [one for one in stub.received if fact.encode() in one.split(b"\n\n", 1)[1]]
        assert found == [], fact
    assert len(stub.authorizations - {""}) == 1


def test_what_lies_in_the_run_directory_is_private(
    stub: Stub, here: dict[str, str], tmp_path: Path
) -> None:
    umask = os.umask(0o022)
    try:
        run = make_run(tmp_path / "run")
        Training(run).end()
    finally:
        os.umask(umask)
    for path in run.path.rglob("*"):
        assert path.stat().st_mode & 0o077 == 0, path


def test_the_users_own_settings_of_other_runs_do_not_reach_ours(
    stub: Stub, here: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    others = {"RUN_ID": "theirs", "NAME": "theirs", "PROJECT": "theirs", "TAGS": "theirs",
              "NOTES": "theirs", "RUN_GROUP": "theirs", "MODE": "disabled"}  # fmt: skip
    for name, text in others.items():
        monkeypatch.setenv(f"WANDB_{name}", text)
    Training(make_run(tmp_path / "run")).end()
    assert stub.run().project == "a-project"
    assert not any(b"theirs" in one for one in stub.received)


def test_an_element_of_an_array_is_grouped_by_it(
    stub: Stub, here: dict[str, str], tmp_path: Path
) -> None:
    array = tmp_path / "sweep"
    array.mkdir()
    (array / "array.json").write_text("{}", encoding="utf-8")
    Training(make_run(array / "003")).end()
    assert (stub.run().display_name, stub.run().group) == ("sweep/003", "sweep")


def test_a_full_disk_is_told_and_sync_completes_the_run(
    stub: Stub, here: dict[str, str], tmp_path: Path
) -> None:
    run = make_run(tmp_path / "run", mode="offline")
    (run.path / "wandb").mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "none", str(run.path / "wandb")]
    alone = ["unshare", "--map-root-user", "--mount"]
    if subprocess.run([*alone, *mount], capture_output=True, check=False).returncode != 0:
        pytest.skip("no file system can be mounted here")
    player = [sys.executable, "-m", "tests.unit.wandb_runs", str(run.path), "600", "0"]
    script = 'shift_mount="$1"; shift; mount -t tmpfs -o size=64k none "$shift_mount" && exec "$@"'
    done = subprocess.run(
        [*alone, "sh", "-c", script, "sh", str(run.path / "wandb"), *player],
        env=here, input="\n", capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert len(ledger(run)) == 602
    assert "No space left on device" in done.stderr
    assert "W&B lacks rows of this run; `peft-dist sync" in done.stdout
    completed = sync(here, run.path)
    assert completed.returncode == 0, completed.stderr
    assert rows_of(stub.run()) == wanted_rows(run)
