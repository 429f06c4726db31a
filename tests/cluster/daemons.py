"""The processes of a cluster, and the promise that nothing of it stays.

Whatever is made is told to the sweeper, which removes it when this process stops or dies.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from tests.cluster.sweeper import kill
from tests.processes import ROOT

LINES = 10
"""Of what a daemon has said, when it ends or does not do its work."""


class Daemons:
    """What runs, each under a name, with what it says in `log/NAME.out`."""

    def __init__(self, base: Path, environment: Mapping[str, str]) -> None:
        """Start the sweeper.

        Args:
            base: The cluster's folder, which exists.
            environment: What every daemon finds in its own.
        """
        self._log = base / "log"
        self._log.mkdir()
        self._environment = dict(environment)
        self._running: dict[str, subprocess.Popen[bytes]] = {}
        self._told = base / "log" / "sweeper.out"
        with self._told.open("wb") as told:
            self._sweeper = subprocess.Popen(
                [sys.executable, "-m", "tests.cluster.sweeper"],
                stdin=subprocess.PIPE,
                stdout=told,
                stderr=subprocess.STDOUT,
                cwd=ROOT,
                start_new_session=True,
            )

    def made(self, kind: str, value: object) -> None:
        """Have a process, link, netns, cgroup or folder removed at the end."""
        assert self._sweeper.stdin is not None
        self._sweeper.stdin.write(json.dumps([kind, str(value)]).encode() + b"\n")
        self._sweeper.stdin.flush()

    def start(self, name: str, argv: Sequence[str], **environment: str) -> None:
        """Start a process that has to run until `end`."""
        with (self._log / f"{name}.out").open("ab") as output:
            process = subprocess.Popen(
                list(argv),
                env=os.environ | self._environment | environment,
                cwd="/",
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self.made("process", process.pid)
        self._running[name] = process

    def runs(self, name: str) -> bool:
        """Return whether a process was started and not ended."""
        return name in self._running

    def pid(self, name: str) -> int:
        """Return the pid of a running process."""
        return self._running[name].pid

    def end(self, name: str, freezers: Sequence[Path]) -> None:
        """Kill a process with its children, and wait until they are gone.

        Args:
            name: Which.
            freezers: Cgroups in which Slurm may have frozen some of them.
        """
        process = self._running.pop(name)
        if not kill([process.pid], freezers):
            raise RuntimeError(f"{name} cannot be killed")
        process.wait()

    def wait_until(
        self, condition: Callable[[], bool], what: str, *, timeout_s: float, every_s: float
    ) -> None:
        """Wait for something; raise RuntimeError where it does not come or a process ends."""
        deadline = time.monotonic() + timeout_s
        while not condition():
            for name, process in self._running.items():
                if process.poll() is not None:
                    raise RuntimeError(f"{name} ended with {process.poll()}:\n{self._said(name)}")
            if time.monotonic() > deadline:
                said = "\n".join(f"--- {name}\n{self._said(name)}" for name in self._running)
                raise RuntimeError(f"waited {timeout_s:g} s in vain for {what}\n{said}")
            time.sleep(every_s)

    def close(self) -> None:
        """Let the sweeper remove everything; raise RuntimeError where something stays."""
        assert self._sweeper.stdin is not None
        self._sweeper.stdin.close()
        code = self._sweeper.wait()
        for process in self._running.values():
            process.wait()
        if code:
            raise RuntimeError(self._told.read_text(encoding="utf-8", errors="replace"))

    def _said(self, name: str) -> str:
        text = (self._log / f"{name}.out").read_text(encoding="utf-8", errors="replace")
        return "\n".join(text.splitlines()[-LINES:])
