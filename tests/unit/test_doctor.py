"""`peft-dist doctor`: one line per finding, with its remedy, and exit code 2 where one is bad."""

import os
import socket
import threading
from pathlib import Path

import pytest

from peft_dist.checks import gpus, known_faults
from peft_dist.checks.checks import CHECKS, Check, Looking
from peft_dist.checks.context import CheckContext
from peft_dist.checks.finding import Finding
from peft_dist.checks.gpu_tools import GpuFault, amd_gpus
from peft_dist.checks.known_faults import driver_fault, keeps
from peft_dist.checks.launcher_variables import STALE
from peft_dist.cli.main import main
from tests.configs import model_folder
from tests.unit.run_folders import slurm_commands
from tests.unit.slurm_desk import Capture


@pytest.fixture(autouse=True)
def shell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stand in a shell without leftovers, with a cache of its own."""
    for name in STALE:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PEFT_DIST_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(gpus, "visible_gpus", lambda _: 0)
    (tmp_path / "cache").mkdir(mode=0o700)


def findings(capsys: Capture, *words: str) -> tuple[int, dict[str, list[str]]]:
    code = main(["doctor", *words])
    found: dict[str, list[str]] = {"ok": [], "note": [], "bad": []}
    for line in capsys.readouterr().out.splitlines():
        level, text = line.split(maxsplit=1)
        found[level].append(text)
    return code, found


def test_a_sound_machine_has_nothing_bad(capsys: Capture, tmp_path: Path) -> None:
    code, found = findings(capsys)
    assert (code, found["bad"]) == (0, [])
    assert any(text.startswith("installed: ") and "torch 2." in text for text in found["ok"])
    assert any(str(tmp_path / "cache") in text for text in found["ok"] + found["note"])
    assert [path.name for path in (tmp_path / "cache").iterdir()] == []


def test_what_a_launcher_left_behind_is_bad(
    capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "8")
    code, found = findings(capsys)
    assert code == 2
    assert found["bad"] == ["WORLD_SIZE of a launcher is set in this shell; unset WORLD_SIZE"]


def test_a_version_that_we_are_not_made_for_is_bad(
    capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = known_faults.importlib.metadata.version
    monkeypatch.setattr(
        known_faults.importlib.metadata,
        "version",
        lambda name: "1.0" if name == "peft" else real(name),
    )
    code, found = findings(capsys)
    assert code == 2
    assert found["bad"][0].startswith("peft 1.0 is not ")


@pytest.mark.parametrize(
    ("version", "limit", "kept"),
    [
        ("2.13.0+cpu", ">=2.11", True),
        ("2.14.1", "<2.14", False),
        ("6", "<6", False),
        ("5.23.0", ">=5.17", True),
        ("0.50.2", "==0.50.1", False),
    ],
)
def test_limits_of_versions(version: str, limit: str, kept: bool) -> None:
    assert keeps(version, limit) is kept


def test_gpus_are_read_and_a_build_without_them_is_bad(
    capsys: Capture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answer = "echo '0, NVIDIA H100 80GB HBM3, 81559, 5000, 570.86'"
    slurm_commands(tmp_path / "bin", **{"nvidia-smi": answer})
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/usr/bin:/bin")
    monkeypatch.setattr(gpus, "visible_gpus", lambda _: 1)
    real = known_faults.importlib.metadata.version
    monkeypatch.setattr(
        known_faults.importlib.metadata,
        "version",
        lambda name: "2.13.0+cpu" if name == "torch" else real(name),
    )
    code, found = findings(capsys)
    assert code == 2
    assert any("torch is built for the CPU" in text for text in found["bad"])
    assert any("5000 in use" in text and "end what uses it" in text for text in found["note"])


def test_a_recipe_is_looked_at_too(recipe_file: Path, tmp_path: Path, capsys: Capture) -> None:
    cluster = tmp_path / "cluster.yaml"
    cluster.write_text("gpus_per_node: 1\ngpu: l4-24gb\n")
    (tmp_path / "model" / "config.json").write_text("{", encoding="utf-8")
    code, found = findings(capsys, str(recipe_file))
    assert code == 2
    assert "config.json cannot be read" in found["bad"][0]
    model_folder(tmp_path / "model", "llama-3.1-405b")
    code, found = findings(capsys, str(recipe_file), "--cluster", str(cluster))
    assert code == 2
    assert found["bad"][0].startswith("does not fit on one node: ")
    model_folder(tmp_path / "model", "llama-3.1-8b")
    code, found = findings(capsys, str(recipe_file))
    assert (code, found["bad"]) == (0, [])


def test_gpus_of_amd_are_read_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told = """{"card0": {"VRAM Total Memory (B)": "68702699520",
               "VRAM Total Used Memory (B)": "3221225472", "Card Series": "AMD Instinct MI250X"},
               "system": {"Driver version": "6.3.6"}}"""
    folder = slurm_commands(tmp_path / "bin", **{"rocm-smi": f"cat <<'END'\n{told}\nEND"})
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")
    found = amd_gpus()
    assert isinstance(found, list)
    around = CheckContext(devices=1, look_at_gpus=lambda _: found)
    (card,) = [one for one in gpus.check_gpus(around) if one.kind == "device memory"]
    line = "card0: AMD Instinct MI250X, 65520 MiB, 3072 in use; end what uses it"
    assert (card.level, card.line) == ("note", line)
    slurm_commands(folder, **{"rocm-smi": "exit 2"})
    assert amd_gpus() == GpuFault("rocm-smi fails (CalledProcessError)", is_bad=False)


def test_a_folder_that_cannot_be_looked_at_is_bad(
    capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HOME", "x" * 5000)
    code, found = findings(capsys)
    assert code == 2
    (line,) = found["bad"]
    assert "File name too long; name another folder" in line and len(line) < 300


def test_a_gpu_whose_name_is_no_text_steers_nothing(
    capsys: Capture, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    slurm_commands(
        tmp_path / "bin", **{"nvidia-smi": r"printf '0, \033]0;t\007H\377, 80000, 9, 5\n'"}
    )
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    monkeypatch.setattr(gpus, "visible_gpus", lambda _: 1)
    _, found = findings(capsys)
    assert any("GPU 0: ?]0;t?H\ufffd, 80000 MiB, 9 in use" in text for text in found["ok"]), found


@pytest.mark.parametrize(
    ("package", "version", "told_in"),
    [
        ("nvidia-nccl-cu13", "2.29.2", "pytorch/pytorch#174338"),
        ("torch", "2.11.0+cu130", "pytorch/pytorch#119856"),
        ("nvidia-nccl-cu13", "2.29.3", ""),
    ],
)
def test_known_faults_are_named_with_where_they_are_told(
    capsys: Capture, monkeypatch: pytest.MonkeyPatch, package: str, version: str, told_in: str
) -> None:
    real = known_faults.importlib.metadata.version
    monkeypatch.setattr(
        known_faults.importlib.metadata,
        "version",
        lambda name: version if name == package else real(name),
    )
    _, found = findings(capsys)
    told = [text for text in found["note"] if text.startswith(f"{package} {version}: ")]
    assert [text.endswith(f"({told_in})") for text in told] == ([True] if told_in else [])


@pytest.mark.parametrize(
    ("build", "driver", "bad"),
    [
        ("cu130", "570.133.20", True),
        ("cu130", "580.65.06", False),
        ("cu128", "525.60.13", False),
        ("cu126", "470.82.01", True),
        ("cpu", "470.82.01", False),
        ("cu130", "", False),
    ],
)
def test_a_driver_that_is_too_old_for_torch_is_bad(build: str, driver: str, bad: bool) -> None:
    found = driver_fault(build, driver)
    assert (found is not None and found.level == "bad") is bad


def test_the_network_is_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    def looked_at(**environ: str) -> list[Finding]:
        return Looking(CheckContext(environ)).findings()

    with socket.create_server(("127.0.0.1", 0)) as server:
        hub = f"http://127.0.0.1:{server.getsockname()[1]}"
        reached = {one.text: one.level for one in looked_at(HF_ENDPOINT=hub)}
    assert reached["Hugging Face's libraries may download (127.0.0.1 is reached)"] == "ok"
    assert any(text.startswith("links: ") for text in reached)
    away = looked_at(HF_ENDPOINT=hub, NCCL_SOCKET_IFNAME="nowhere0")
    told = {one.text.partition(" ")[0]: one for one in away if one.level != "ok"}
    assert told["127.0.0.1"].level == "note" and "is not reached" in told["127.0.0.1"].text
    assert told["NCCL_SOCKET_IFNAME=nowhere0"].level == "bad"
    assert told["NCCL_SOCKET_IFNAME=nowhere0"].remedy == "unset it"


def test_a_check_that_hangs_is_named_and_one_that_fails_is_heard() -> None:
    hanging, failing = (
        threading.Event(),
        Check("numbers", lambda _: [Finding("ok", str(1 // 0), "")]),
    )
    hung = Check("links", lambda _: [Finding("ok", "links", str(hanging.wait(30)))])
    packages = CHECKS[0]
    looking = Looking(CheckContext(limit_s=-0.9), [hung, packages])
    first, *others = looking.findings()
    hanging.set()
    assert (first.level, first.kind) == ("note", "links")
    assert "the check of links does not end within" in first.text
    assert others
    with pytest.raises(ZeroDivisionError):
        Looking(CheckContext(), [failing]).findings()


def test_a_step_as_long_as_a_hang_is_told(
    recipe_file: Path, tmp_path: Path, capsys: Capture
) -> None:
    model_folder(tmp_path / "model", "llama-3.3-70b")
    cluster = tmp_path / "cluster.yaml"
    cluster.write_text("gpus_per_node: 8\ngpu: h100-80gb\n")
    text = recipe_file.read_text() + "watchdog: {min_s: 1}\n"
    recipe_file.write_text(text)
    _, found = findings(capsys, str(recipe_file), "--cluster", str(cluster))
    assert any("raise watchdog.min_s to" in one for one in found["note"])
