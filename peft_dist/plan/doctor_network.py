"""What `peft-dist doctor` looks at of the network: links, names, interfaces, the hub.

Other nodes are not reached from here: the checks before a job trains do that, from the job itself.
"""

import socket
from collections.abc import Iterator, Mapping
from pathlib import Path
from urllib.parse import urlsplit

from peft_dist.plan.finding import Finding
from peft_dist.plan.plan import hub_is_off

HUB = "https://huggingface.co"
PATIENCE_S = 5.0
NETWORKS, ADAPTERS = Path("/sys/class/net"), Path("/sys/class/infiniband")


def examine_network(environ: Mapping[str, str]) -> Iterator[Finding]:
    """Look at everything of the network that one machine can see."""
    yield from _links()
    yield from _own_name()
    yield from _interfaces(environ)
    yield _hub(environ)


def _links() -> Iterator[Finding]:
    """Name the links that are up, with the speed that their drivers tell."""
    found = []
    for folder in _folders(NETWORKS):
        speed = _read(folder / "speed")
        if _read(folder / "operstate") == "up" and speed.isdecimal() and int(speed) > 0:
            found.append(f"{folder.name} {int(speed) / 1000:g} Gb/s")
    for port in (port for folder in _folders(ADAPTERS) for port in _folders(folder / "ports")):
        name, state = f"{port.parents[1].name} port {port.name}", _read(port / "state")
        if state.endswith("ACTIVE"):
            found.append(f"{name} {_read(port / 'rate')}")
        else:
            yield Finding(
                "note", f"{name} is {state or 'in no known state'}; ask who runs the node"
            )
    yield Finding("ok", f"links: {', '.join(found) or 'none that tells its speed'}")


def _own_name() -> Iterator[Finding]:
    """See whether processes can meet at this machine's name, as gloo and NCCL let them."""
    name = socket.gethostname()
    try:
        address = socket.gethostbyname(name)
    except OSError as error:
        yield Finding("note", f"{name} has no address ({error.strerror or error}); several nodes "
                      "need one: see `head` and `interface` of a cluster file")  # fmt: skip
        return
    if address.startswith("127."):
        yield Finding("note", f"{name} is {address}, which no other node reaches; see `head` and "
                      "`interface` of a cluster file")  # fmt: skip
        return
    try:
        with socket.create_server((address, 0)) as server:
            socket.create_connection(server.getsockname()[:2], timeout=PATIENCE_S).close()
    except OSError as error:
        yield Finding("bad", f"{name} ({address}) does not reach itself "
                      f"({error.strerror or error}); let processes connect to it")  # fmt: skip
        return
    yield Finding("ok", f"{name} is reached at {address}")


def _interfaces(environ: Mapping[str, str]) -> Iterator[Finding]:
    """Refuse interfaces that libraries are told to use and that are not there."""
    there = [folder.name for folder in _folders(NETWORKS)]
    for variable in ("NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME"):
        text = environ.get(variable, "")
        if not text or text.startswith("^"):
            continue
        names = [name.lstrip("=") for name in text.split(",")]
        if not any(own.startswith(name) for own in there for name in names):
            yield Finding("bad", f"{variable}={text[:100]} names no interface of this machine "
                          f"({', '.join(there)}); unset it")  # fmt: skip


def _hub(environ: Mapping[str, str]) -> Finding:
    """See whether the hub is reached, where libraries may ask it."""
    if hub_is_off():
        return Finding("ok", "Hugging Face's libraries are off the network (HF_HUB_OFFLINE)")
    url = urlsplit(environ.get("HF_ENDPOINT") or HUB)
    proxy = environ.get("https_proxy") or environ.get("HTTPS_PROXY")
    if proxy:
        url = urlsplit(proxy if "//" in proxy else f"//{proxy}")
    try:
        host, port = url.hostname or "", url.port or (80 if url.scheme == "http" else 443)
        socket.create_connection((host, port), timeout=PATIENCE_S).close()
    except (OSError, ValueError) as error:
        told = getattr(error, "strerror", None) or str(error) or type(error).__name__
        return Finding(
            "note",
            f"{url.hostname} is not reached ({told}): starts wait for it in vain; set "
            "HF_HUB_OFFLINE=1 and name folders, or bring models here by `peft-dist fetch`",
        )
    by = " by a proxy" if proxy else ""
    return Finding("ok", f"Hugging Face's libraries may download{by} ({url.hostname} is reached)")


def _folders(folder: Path) -> list[Path]:
    try:
        return sorted(folder.iterdir())
    except OSError:
        return []


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:  # a link that is down has no speed
        return ""
