"""Record on one rank which signal asked it to stop; the training loop acts on it.

While a rank sets itself up there is nothing to save, and the main thread may be blocked in C++ for
minutes (a rendezvous, a download), where Python runs no handler. Then a thread ends the process.
What reads rows ahead is no fork of a rank, which would inherit these handlers and outlive a SIGTERM
(see `data/parallel.py`); keep it so.
"""

import functools
import os
import signal
import socket
import threading
import traceback
from collections.abc import Callable
from types import FrameType
from typing import NoReturn

from peft_dist.common.env import LAUNCH_MARK
from peft_dist.common.errors import EXIT_DONE, EXIT_INTERRUPTED

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP)


class StopRequests:
    """The signals this process got since `install`."""

    def __init__(self) -> None:
        self.requested: str | None = None
        """Name of the first signal, such as "SIGTERM"; the rank saves and ends at its next step."""
        self.count = 0
        """How many signals there were; all but the first change nothing."""
        self.on_request: Callable[[str], None] | None = None
        """Called with the name of the first signal that comes in training, from another thread."""
        self._in_setup = True
        self._note_setup_stop: Callable[[str], None] | None = None
        self._told = False
        self._ending = threading.Lock()
        """Held while setup is ended, so that either the main thread or ours does it, and once."""

    def end_setup_by(self, note: Callable[[str], None]) -> None:
        """Let a stop during setup end the process from here on; one that came already does so now.

        Before this call nobody knows which run a signal stops, and it would be started again.

        Args:
            note: Called with the signal's name just before the process ends.
        """
        with self._ending:
            self._note_setup_stop = note
            if self.requested is not None:
                self._end_setup(self.requested)

    def begin_training(self) -> None:
        """Leave setup: from here on a signal is only recorded. Ends the process if one is already.

        A signal that comes while this runs is either seen here or left in `requested`.
        """
        with self._ending:
            if self.requested is not None:
                self._end_setup(self.requested)
            self._in_setup = False

    def _install(self) -> None:
        self._reader, self._writer = socket.socketpair()
        self._writer.setblocking(False)
        # Python writes each signal's number here from C, whatever the main thread is doing.
        signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
        threading.Thread(target=self._watch, name="stop", daemon=True).start()
        for number in STOP_SIGNALS:
            # Under nohup SIGHUP is ignored, and that is what its user wants.
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, self._record)

    def _record(self, number: int, _frame: FrameType | None) -> None:
        self.count += 1
        if self.requested is None:
            self.requested = signal.Signals(number).name

    def _watch(self) -> None:
        while True:
            for number in self._reader.recv(4096):
                if number in STOP_SIGNALS:
                    name = signal.Signals(number).name
                    with self._ending:
                        if self._in_setup:
                            self.requested = self.requested or name
                            if self._note_setup_stop is not None:
                                self._end_setup(name)
                            continue
                        told, self._told = self._told, True
                    if not told and self.on_request is not None:
                        self.on_request(name)

    def _end_setup(self, name: str) -> NoReturn:
        try:
            if self._note_setup_stop is not None:
                self._note_setup_stop(name)
        except Exception:  # a note that cannot be written must not keep the process alive
            traceback.print_exc()
        os._exit(EXIT_INTERRUPTED)


def interrupted_code() -> int:
    """Return the exit code of a rank that a signal stopped while it trained, and that has saved."""
    # torchrun would start the group again for any code but 0; `peft-dist` asks the run directory.
    return EXIT_DONE if LAUNCH_MARK in os.environ else EXIT_INTERRUPTED


@functools.cache
def install() -> StopRequests:
    """Record signals from now on; return this process's one record of them.

    The first thing a worker does, in its main thread, before torch is imported: until then a
    signal has its usual effect. Later calls return the same record.
    """
    requests = StopRequests()
    requests._install()
    return requests
