"""Tell a webhook what came of a start: a stop, an end, or a node that was lost.

The address is a secret (who has it may write to the channel): it comes from the environment or the
file of secrets, and no message or log has it. A notice that nobody takes changes nothing.
"""

import json
import os
import sys
import urllib.error
import urllib.request
from collections.abc import Mapping
from contextlib import suppress
from http.client import HTTPException
from pathlib import Path

from peft_dist.common.console import say
from peft_dist.common.env import WEBHOOK
from peft_dist.common.errors import ClusterError
from peft_dist.run.restart_policy import Decision, Ending, Kind
from peft_dist.slurm.secrets import read_secrets

LIMIT_S = 10.0
"""How long the end of a job waits for an answer."""
LOST_NODES = (Kind.NODE_FAILED, Kind.NODES_UNFIT, Kind.NO_DECISION)
"""Ends of a start by the loss of a node, after which the run may go on."""


def notify(run: Path, job: str, ending: Ending, decision: Decision, secrets: Path | None) -> None:
    """Send a notice where there is something to say, and somebody to say it to.

    Args:
        run: The run directory.
        job: The Slurm job.
        ending: How its start ended.
        decision: What comes of the run.
        secrets: The file of secrets, where there is one.
    """
    line = notice(run.name, job, ending, decision)
    url = _address(os.environ, secrets)
    if line and url:
        problem = _post(url, {"text": line, "content": line})
        if problem:
            say(f"peft-dist: warning: no notice was sent: {problem}", sys.stderr)


def notice(run: str, job: str, ending: Ending, decision: Decision) -> str:
    """Return what to say of a start, in one line; nothing where nobody needs to know."""
    name = f"peft-dist: {run} (job {job})"
    if decision.word == "done":
        return f"{name} has finished"
    if decision.word == "stop":
        return f"{name} has stopped: {decision.reason}"
    if decision.again and ending.kind in LOST_NODES:
        return f"{name} has lost a node, or a start of it, and goes on: {decision.reason}"
    return ""


def _address(environ: Mapping[str, str], secrets: Path | None) -> str:
    if environ.get(WEBHOOK) or secrets is None:
        return environ.get(WEBHOOK, "")
    with suppress(ClusterError):  # told when the job began
        return read_secrets(secrets).get(WEBHOOK, "")
    return ""


def _post(url: str, message: Mapping[str, str]) -> str:
    """Send a message as JSON; return what went wrong, without a word of the address."""
    if not url.startswith(("https://", "http://")):
        return f"{WEBHOOK} is no https:// address"
    try:
        request = urllib.request.Request(
            url, json.dumps(message).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=LIMIT_S):
            return ""
    except urllib.error.HTTPError as error:
        return f"the webhook answers {error.code}"
    except (OSError, ValueError, HTTPException) as error:
        return f"the webhook does not answer ({type(error).__name__})"
