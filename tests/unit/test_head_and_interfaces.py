"""The first node's address, and each node's network interfaces."""

import os
import socket
from pathlib import Path
from typing import Any

import pytest

from peft_dist.common.errors import ClusterError
from peft_dist.config.cluster import check_cluster
from peft_dist.slurm import interfaces, supervisor
from peft_dist.slurm.interfaces import addresses, interface_variables, matching
from tests.unit.slurm_jobs import Machines
from tests.unit.test_slurm_scripts import job_of, split

NODE = {"lo": "127.0.0.1", "eno1np0": "", "eno2np0": "10.0.0.2", "hsn0": "10.1.0.2",
        "hsn1": "10.1.0.3", "docker0": "172.17.0.1", "ib0": "10.2.0.2", "ib0.8001": ""}  # fmt: skip


@pytest.mark.parametrize(
    ("wanted", "names"),
    [
        ("ib0", ["ib0"]),  # also where ib0.8001 begins with it
        ("hsn0,hsn1", ["hsn0", "hsn1"]),
        ("hsn", ["hsn0"]),
        ("eno", ["eno2np0"]),  # the one that is up, as nodes call it differently
        ("=eno2np0", ["eno2np0"]),
        ("=eno", []),
        ("^lo,docker,eno", ["hsn0"]),
        ("^lo,docker,eno,hsn", ["ib0"]),
        ("^=hsn0,docker0,eno2np0", ["hsn1"]),
        ("wlan", []),
    ],
)
def test_gloo_gets_whole_names_of_what_nccl_would_take(wanted: str, names: list[str]) -> None:
    assert matching(wanted, NODE) == names


@pytest.fixture
def node(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME", "PET_LOCAL_ADDR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(interfaces, "addresses", lambda: NODE)


def test_both_libraries_and_torch_are_told(node: None, monkeypatch: pytest.MonkeyPatch) -> None:
    assert interface_variables("^lo,docker,eno", "node1") == {
        "NCCL_SOCKET_IFNAME": "^lo,docker,eno",
        "GLOO_SOCKET_IFNAME": "hsn0",
        "PET_LOCAL_ADDR": "10.1.0.2",
    }
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "mine")  # as a cluster file's environment: does
    assert "GLOO_SOCKET_IFNAME" not in interface_variables("ib0", "node1")


def test_what_no_interface_matches_is_left_to_the_preflight_to_name(node: None) -> None:
    assert interface_variables("wlan", "node1") == {
        "NCCL_SOCKET_IFNAME": "wlan",
        "GLOO_SOCKET_IFNAME": "wlan",
    }


def test_auto_takes_the_interface_that_leads_to_the_head(
    node: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = {"lo": "127.0.0.1"}
    monkeypatch.setattr(interfaces, "addresses", lambda: own)
    assert interface_variables("auto", "127.0.0.1") == {}  # the loopback leads nowhere
    assert interface_variables("auto", "no-such-host.invalid") == {}
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))
        except OSError:
            pytest.skip("this machine has no route to anywhere")
        own["net0"] = probe.getsockname()[0]
    assert interface_variables("auto", "192.0.2.1") == {
        "NCCL_SOCKET_IFNAME": "=net0",
        "GLOO_SOCKET_IFNAME": "net0",
        "PET_LOCAL_ADDR": own["net0"],
    }


def test_this_machines_interfaces_have_their_addresses() -> None:
    assert addresses()["lo"] == "127.0.0.1"


def heads(machines: Machines, script: Path, **more: Any) -> list[str]:
    done = machines.run(script, nodes=2, **more)
    assert done.returncode == 0, done.stderr
    return [machines.variables(index)["PEFT_DIST_HEAD"] for index in (0, 1)]


def test_a_suffix_goes_to_the_heads_own_name_for_preflight_and_launch(tmp_path: Path) -> None:
    machines = Machines(tmp_path)
    script = job_of(machines, tmp_path, nodes=2, head={"suffix": "i"}, interface="ib0")
    assert heads(machines, script) == ["node1i", "node1i"]
    own, launcher = split(machines.words("argv-1"))
    assert launcher[launcher.index("--main_process_ip") + 1] == "node1i"
    assert "host=node1i," in launcher[launcher.index("--rdzv_conf") + 1]
    assert "--interface=ib0" in own


def test_a_suffix_stands_before_the_domain(tmp_path: Path) -> None:
    machines = Machines(tmp_path)
    script = job_of(machines, tmp_path, nodes=2, head={"suffix": "-ib"})
    scontrol = machines.commands / "scontrol"
    text = scontrol.read_text(encoding="utf-8").replace("echo", "site=.a.b; echo", 1)
    scontrol.write_text(text.replace('"node$node"', '"node$node$site"', 1), encoding="utf-8")
    assert heads(machines, script)[0] == "node1-ib.a.b"


IP = r"""
[ "$*" = "-o -4 address show dev hsn0 scope global" ] || exit 1
echo '7: hsn0    inet 10.1.0.7/16 brd 10.1.255.255 scope global hsn0\       valid_lft forever'
echo '7: hsn0    inet 10.9.0.7/16 brd 10.9.255.255 scope global hsn0\       valid_lft forever'
"""


def test_an_interfaces_address_is_the_heads_and_auto_follows_it(tmp_path: Path) -> None:
    machines = Machines(tmp_path)
    script = job_of(machines, tmp_path, nodes=2, head={"interface": "hsn0"})
    ip = machines.commands / "ip"
    ip.write_text(f"#!/bin/bash\n{IP}", encoding="utf-8")
    ip.chmod(0o755)
    assert heads(machines, script) == ["10.1.0.7", "10.1.0.7"]
    assert "--interface=auto" in machines.words("argv-0")
    ip.write_text("#!/bin/bash\nexit 1\n", encoding="utf-8")
    done = machines.run(script, nodes=2)
    assert done.returncode == 3
    assert "node1 has no IPv4 address at its interface hsn0" in done.stderr


@pytest.mark.parametrize("head", [{}, {"suffix": "i", "interface": "ib0"}])
def test_the_head_has_one_address(head: dict[str, str]) -> None:
    with pytest.raises(ClusterError, match=r"head: takes either suffix or interface; give one"):
        check_cluster({"head": head}, where="x.yaml")


def test_the_preflight_meets_at_the_heads_address_and_a_strange_order_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    called: list[list[str]] = []

    class Ended:
        code, signal_name = 98, None

    def run_launcher(command: list[str], **_: Any) -> Ended:
        called.append(command)
        return Ended()

    monkeypatch.setattr(supervisor, "run_launcher", run_launcher)
    for name, value in {
        "SLURM_NODEID": "0", "PEFT_DIST_HOSTS": "node1,node2", "PEFT_DIST_PORT": "29999",
        "PEFT_DIST_LOGS": str(tmp_path), "PEFT_DIST_NONCE": "f00d", "PEFT_DIST_HEAD": "node1i",
        "SLURMD_NODENAME": "node1",
    }.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    argv = ["--run-dir", str(tmp_path), "--max-starts", "3", "--max-starts-without-progress", "3"]
    options = supervisor.parser().parse_args(argv)
    node = supervisor.Node(options, ["true"])
    ending = node._preflight(supervisor.RunDir(tmp_path))
    assert ending is not None and ending.kind is supervisor.Kind.PORT_TAKEN
    assert called[0][called[0].index("--head") + 1] == "node1i"
    monkeypatch.setenv("SLURMD_NODENAME", "node2")
    (tmp_path / "recipe.yaml").write_text("x", encoding="utf-8")
    (tmp_path / "run.json").write_text("{}", encoding="utf-8")
    with pytest.raises(supervisor.SlurmError, match="node 0 of the step is node2, and node1 in"):
        supervisor.Node(options, ["true"]).work()
    assert os.environ["PEFT_DIST_HEAD"] == "node1i"
