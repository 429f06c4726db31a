"""Stop a worker whose `peft-dist` command was killed: nobody passes signals on to it any more.

Every worker watches the command and sends SIGTERM to itself. It is not sent to torchrun, which
kills workers that need more than 30 s to save.
"""

import os
import shutil
import signal
import sys
import threading
import time

from peft_dist.common.console import say
from peft_dist.common.env import FAILURES
from peft_dist.common.process_identity import is_alive, launcher

LOOK_EVERY_S = 0.5
"""Seconds between two looks at the command: five small files of /proc."""


def end_with_launcher() -> None:
    """Send SIGTERM to this process once its `peft-dist` command has ended; return at once.

    Nothing happens where no command has started it, or where the command cannot be seen from here.
    """
    record = launcher()
    if record is None or is_alive(record) is None:
        return

    def watch() -> None:
        while is_alive(record) is not False:
            time.sleep(LOOK_EVERY_S)
        if os.environ.get("RANK", "0") == "0":
            text = f"the command that started this run (process {record['pid']}) was killed"
            say(f"peft-dist: {text}; the run ends as after SIGTERM", sys.stderr)
        if FAILURES in os.environ:  # the command can neither read nor remove it any more
            shutil.rmtree(os.environ[FAILURES], ignore_errors=True)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, name="launcher", daemon=True).start()
