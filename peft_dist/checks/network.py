"""What one machine sees of the network: links, its name, interfaces, the hub.

Other nodes are not reached from here: the pre-flight tries the links between nodes itself.
"""

import socket
from collections.abc import Iterator, Mapping
from pathlib import Path
from urllib.parse import urlsplit

from peft_dist.checks.context import CheckContext
from peft_dist.checks.finding import Finding

HUB = "https://huggingface.co"
PATIENCE_S = 5.0
NETWORKS, ADAPTERS = Path("/sys/class/net"), Path("/sys/class/infiniband")
SOCKET_INTERFACES = ("NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME")


def hub_is_off(environ: Mapping[str, str]) -> bool:
    """Whether the environment keeps Hugging Face's libraries from the network."""
    return environ.get("HF_HUB_OFFLINE", "").lower() in ("1", "true", "yes", "on")


def check_links(_context: CheckContext) -> Iterator[Finding]:
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
            text = f"{name} is {state or 'in no known state'}"
            yield Finding("note", "links", text, "ask who runs the node")
    yield Finding("ok", "links", f"links: {', '.join(found) or 'none that tells its speed'}")


def check_own_name(context: CheckContext) -> Iterator[Finding]:
    """See whether processes can meet at this machine's name, as gloo and NCCL let them."""
    if context.nodes == 1 or any(context.environ.get(name) for name in SOCKET_INTERFACES):
        return  # nobody asks for it
    name = socket.gethostname()
    remedy = "several nodes need one: see `head` and `interface` of a cluster file"
    try:
        address = socket.gethostbyname(name)
    except OSError as error:
        text = f"{name} has no address ({error.strerror or error})"
        yield Finding("note", "own name", text, remedy)
        return
    if address.startswith("127."):
        text = f"{name} is {address}, which no other node reaches"
        yield Finding("note", "own name", text, remedy)
        return
    try:
        with socket.create_server((address, 0)) as server:
            socket.create_connection(server.getsockname()[:2], timeout=PATIENCE_S).close()
    except OSError as error:
        text = f"{name} ({address}) does not reach itself ({error.strerror or error})"
        yield Finding("bad", "own name", text, "let processes connect to it")
        return
    yield Finding("ok", "own name", f"{name} is reached at {address}")


def check_interfaces(context: CheckContext) -> Iterator[Finding]:
    """Refuse interfaces that libraries are told to use and that are not there."""
    there = [folder.name for folder in _folders(NETWORKS)]
    for variable in SOCKET_INTERFACES:
        text = context.environ.get(variable, "")
        if not text or text.startswith("^"):
            continue
        names = [name.lstrip("=") for name in text.split(",")]
        if not any(own.startswith(name) for own in there for name in names):
            told = f"{variable}={text[:100]} names no interface of this machine"
            yield Finding("bad", "interface", f"{told} ({', '.join(there)})", "unset it")


def check_hub(context: CheckContext) -> Iterator[Finding]:
    """See whether the hub is reached, where libraries may ask it."""
    environ = context.environ
    if hub_is_off(environ):
        text = "Hugging Face's libraries are off the network (HF_HUB_OFFLINE)"
        yield Finding("ok", "hub", text)
        return
    url = urlsplit(environ.get("HF_ENDPOINT") or HUB)
    proxy = environ.get("https_proxy") or environ.get("HTTPS_PROXY")
    if proxy:
        url = urlsplit(proxy if "//" in proxy else f"//{proxy}")
    try:
        host, port = url.hostname or "", url.port or (80 if url.scheme == "http" else 443)
        socket.create_connection((host, port), timeout=PATIENCE_S).close()
    except (OSError, ValueError) as error:
        told = getattr(error, "strerror", None) or str(error) or type(error).__name__
        yield Finding(
            "note",
            "hub",
            f"{url.hostname} is not reached ({told}): starts wait for it in vain",
            "set HF_HUB_OFFLINE=1 and name folders, or bring models here by `peft-dist fetch`",
        )
        return
    by = " by a proxy" if proxy else ""
    text = f"Hugging Face's libraries may download{by} ({url.hostname} is reached)"
    yield Finding("ok", "hub", text)


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
