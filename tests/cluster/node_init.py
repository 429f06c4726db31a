"""The first process of a node: it sets the machine up, starts slurmd and reaps what is left.

It is process 1 of new namespaces, so that its end is the end of everything on the node. It does not
end with slurmd, as a machine does not either; SIGUSR1 makes it start slurmd again.
"""

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path


def main() -> None:
    """Do what the file named by the only argument says, then reap for ever."""
    settings = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    socket.sethostname(settings["hostname"])
    for mount in settings["mounts"]:
        subprocess.run(["mount", *mount], check=True)
    signals = {signal.SIGUSR1, signal.SIGCHLD}
    signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    slurmd: int | None = start(settings["slurmd"])
    while True:
        if signal.sigwait(signals) == signal.SIGCHLD:
            slurmd = None if slurmd in reaped() else slurmd
        elif slurmd is None:
            slurmd = start(settings["slurmd"])


def start(argv: list[str]) -> int:
    """Start a command with signals as any program expects them; return its pid."""
    pid = os.fork()
    if pid == 0:
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # Python ignores it, and jobs inherit that
        signal.pthread_sigmask(signal.SIG_SETMASK, ())
        os.execvp(argv[0], argv)
    return pid


def reaped() -> list[int]:
    """Wait for all children that have ended and return their pids."""
    pids: list[int] = []
    while True:
        try:
            pid, _ = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return pids
        if pid == 0:
            return pids
        pids.append(pid)


if __name__ == "__main__":
    main()
