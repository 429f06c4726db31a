"""Find the network interfaces of this node that NCCL, gloo and torch are to use.

NCCL takes beginnings of names, and `^` before those to leave out; gloo takes whole names alone, and
nodes of one cluster may call theirs differently.
"""

import fcntl
import os
import socket
import struct
from collections.abc import Mapping, Sequence

AUTO = "auto"
SIOCGIFADDR = 0x8915
"""Linux's request for the IPv4 address of an interface: netdevice(7)."""


def interface_variables(wanted: str, head: str) -> dict[str, str]:
    """Return the variables that name this node's interfaces and its own address.

    What the environment says already stays. Where no interface matches, gloo is given what was
    asked for, so that the pre-flight names the node with gloo's own words.

    Args:
        wanted: As NCCL reads it, or `auto`: the one by which the head is reached.
        head: Name or address of the first node.
    """
    own = addresses()
    if wanted == AUTO:
        name = _towards(head, own)
        found = {"NCCL_SOCKET_IFNAME": f"={name}"} if name else {}
        names = [name] if name else []
    else:
        names = matching(wanted, own)
        found = {"NCCL_SOCKET_IFNAME": wanted}
        if not names:
            found["GLOO_SOCKET_IFNAME"] = wanted
    if names:
        found["GLOO_SOCKET_IFNAME"] = ",".join(names)
        if own.get(names[0]):
            found["PET_LOCAL_ADDR"] = own[names[0]]
    return {name: value for name, value in found.items() if name not in os.environ}


def matching(wanted: str, own: Mapping[str, str]) -> list[str]:
    """Return the interfaces for gloo, of which every node needs the same number.

    Args:
        wanted: As NCCL reads it: `ib0`, `hsn0,hsn1`, `eno` for eno1np0, `=eth0`, `^lo,docker`.
        own: The node's interfaces with their addresses; an empty one where there is none.
    """
    leaves_out, exact = wanted.startswith("^"), "=" in wanted[:2]
    parts = wanted.lstrip("^").lstrip("=").split(",")

    def fits(name: str, part: str) -> bool:
        return name == part if exact else name.startswith(part)

    if leaves_out:
        kept = [name for name in own if not any(fits(name, part) for part in parts)]
        return [name for name in kept if own[name] and name != "lo"][:1]
    found = []
    for part in parts:
        candidates: Sequence[str] = [part] if part in own else [n for n in own if fits(n, part)]
        found += sorted(candidates, key=lambda name: not own[name])[:1]
    return list(dict.fromkeys(found))


def addresses() -> dict[str, str]:
    """Return the interfaces of this node with their IPv4 addresses; an empty one for none."""
    found = {}
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asked:
        for _, name in socket.if_nameindex():
            try:
                request = struct.pack("256s", os.fsencode(name)[:15])
                answer = fcntl.ioctl(asked.fileno(), SIOCGIFADDR, request)
                found[name] = socket.inet_ntoa(answer[20:24])
            except OSError:
                found[name] = ""
    return found


def _towards(head: str, own: Mapping[str, str]) -> str | None:
    """Return the interface by which another host is reached; None where that cannot be told."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as tried:
        try:
            tried.connect((head, 9))  # sends nothing
            address = tried.getsockname()[0]
        except OSError:
            return None
    if address.startswith("127."):
        return None
    return next((name for name, known in own.items() if known == address), None)
