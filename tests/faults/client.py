"""The harness's end of the pipes to `nursery.py`."""

import json
import os
import select
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

from tests.processes import ROOT, environment

ANSWER_S = 60.0
"""Longest wait for an answer, and for the imports at its start."""


class Nursery:
    """The harness's end of `nursery.py`."""

    def __init__(self, folder: Path) -> None:
        """Start it and wait until it has imported everything."""
        self._lock = threading.Lock()
        self._unread = b""
        self._log = folder / "nursery.log"
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "tests.faults.nursery"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                cwd=ROOT,
                env=environment(folder / "cache"),
                start_new_session=True,
            )
        self._read(time.monotonic() + ANSWER_S)

    def ask(self, **request: Any) -> dict[str, Any]:
        """Send a request and return the answer."""
        assert self._process.stdin is not None
        with self._lock:
            self._process.stdin.write(json.dumps(request).encode() + b"\n")
            self._process.stdin.flush()
            return self._read(time.monotonic() + ANSWER_S)

    def close(self) -> None:
        """Let it end, and all its ranks with it."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(ANSWER_S)
        finally:
            self._process.kill()
            self._process.wait()

    @property
    def pid(self) -> int:
        """Its process."""
        return self._process.pid

    def _read(self, deadline: float) -> dict[str, Any]:
        assert self._process.stdout is not None
        pipe = self._process.stdout.fileno()
        while b"\n" not in self._unread:
            ready, _, _ = select.select([pipe], [], [], max(0.0, deadline - time.monotonic()))
            data = os.read(pipe, 1 << 20) if ready else b""
            if not data:
                said = self._log.read_text(encoding="utf-8", errors="replace")[-4000:]
                raise RuntimeError(f"the nursery {'ended' if ready else 'is silent'}:\n{said}")
            self._unread += data
        line, _, self._unread = self._unread.partition(b"\n")
        answer: dict[str, Any] = json.loads(line)
        return answer
