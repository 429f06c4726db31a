"""What makes a run directory and a run of W&B one: its id, kept for good; its lock; the way there.

Knows nothing of rows, and never imports wandb.
"""

import json
import os
import socket
import urllib.request
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from urllib.parse import urlsplit

from peft_dist.common.atomic import make_file, replace_file
from peft_dist.common.locks import lock_file
from peft_dist.common.sharing import folder_mode
from peft_dist.run.directory import RunDir

PROBE_BYTES = 1 << 16
"""As much as the SDK holds back before it writes."""
DEFAULT_URL = "https://api.wandb.ai"

_REACHING = (
    "API_KEY", "BASE_URL", "CACHE_DIR", "CONFIG_DIR", "CREDENTIALS_FILE", "DATA_DIR", "ENTITY",
    "HTTP_PROXY", "HTTPS_PROXY", "HTTP_TIMEOUT", "IDENTITY_TOKEN_FILE", "INSECURE_DISABLE_SSL",
)  # fmt: skip
"""W&B's variables that are heeded: how its server is reached. What is logged the recipe says."""


def wandb_environment(environ: Mapping[str, str]) -> dict[str, str]:
    """Return the environment in which W&B's SDK is used."""
    kept = {
        name: value
        for name, value in environ.items()
        if not name.startswith("WANDB_") or name.removeprefix("WANDB_") in _REACHING
    }
    # Neither chatter on our streams nor reports about us to the makers of the SDK.
    return kept | {"WANDB_SILENT": "true", "WANDB_ERROR_REPORTING": "false"}


def folder_of(run: RunDir) -> Path:
    """Return where everything of W&B lies in a run directory."""
    return run.path / "wandb"


def identity(run: RunDir) -> dict[str, str]:
    """Return `id`, the W&B run that a run directory is for good, and `url` once it was online.

    Raises:
        OSError: Where it cannot be kept; then no run may be made that nobody would find again.
    """
    file = folder_of(run) / "run.json"
    file.parent.mkdir(mode=folder_mode(), exist_ok=True)
    if not file.exists():
        make_file(file, text_of({"id": uuid.uuid4().hex[:16]}))
    known: dict[str, str] = json.loads(file.read_text(encoding="utf-8"))
    return known


def prove_room(run: RunDir) -> None:
    """See that the folder can be written: the SDK loses rows without a word where it cannot.

    Raises:
        OSError: Where it cannot.
    """
    probe = folder_of(run) / "probe"
    try:
        replace_file(probe, " " * PROBE_BYTES)
    finally:
        probe.unlink(missing_ok=True)


def known_url(run: RunDir) -> str | None:
    """Return where a run was last seen online."""
    with suppress(OSError, ValueError):
        return identity(run).get("url")
    return None


def text_of(value: object) -> str:
    """Return the content of a JSON file."""
    return json.dumps(value) + "\n"


def reachable() -> bool:
    """Whether anything answers where W&B's server, or the proxy before it, is."""
    url = urlsplit(os.environ.get("WANDB_BASE_URL", DEFAULT_URL))
    proxy = urllib.request.getproxies().get(url.scheme)
    if proxy and not urllib.request.proxy_bypass(url.hostname or ""):
        url = urlsplit(proxy)
    port = url.port or (80 if url.scheme == "http" else 443)
    try:
        socket.create_connection((url.hostname or "", port), timeout=2.0).close()
    except (OSError, ValueError):
        return False
    return True


@contextmanager
def only_writer(run: RunDir, wait_s: float) -> Iterator[bool]:
    """Hold the lock of those that send a run to W&B; yield False where another one has it.

    Two would do no harm to the rows, which are the same whoever sends them, but one would say that
    the run is over while the other still sends.
    """
    folder = folder_of(run)
    folder.mkdir(mode=folder_mode(), exist_ok=True)
    with lock_file(folder / "lock", wait_s=wait_s) as is_held:
        yield is_held
