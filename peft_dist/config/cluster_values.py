"""What a value of a cluster file may be: the patterns that keep a script from being rewritten.

Knows no field; `cluster.py` does.
"""

import re
from collections.abc import Mapping
from typing import Annotated

from pydantic import AfterValidator, StrictInt

from peft_dist.common.durations import duration_s
from peft_dist.common.errors import ClusterError
from peft_dist.config.section import Matches

SECRET_NAME = (
    r"(?:[A-Z0-9_]*_)?(?:API)?KEY|[A-Z0-9_]*(?:TOKEN|SECRET|PASSWO?R?D|PASSPHRASE|CREDENTIALS?)"
)
"""The name of a variable that is nobody else's business, such as WANDB_API_KEY; NCCL_IB_PKEY and
TOKENIZERS_PARALLELISM are none."""
SECRET_IN_SETUP = re.compile(rf"\b({SECRET_NAME})=(?![\"']?(?:[$`\s]|$))", re.IGNORECASE)
"""One that gets a value which stands there, and is not read from somewhere."""
KEY_AS_ARGUMENT = re.compile(r"\bwandb\s+login\b[^\n;|&]*\s[0-9a-fA-F]{40,}")
PASSWORD_IN_ADDRESS = re.compile(r"://[^/@:\s]*:[^/@\s]+@")
SET_BY_OTHERS = re.compile(
    r"SLURM_\w*|PEFT_DIST_(?!CACHE(?:_SHARED)?$)\w*|PET_\w*|(LOCAL_)?RANK|(LOCAL_)?WORLD_SIZE"
    # bash refuses to set these
    r"|BASHOPTS|BASH_VERSINFO|EUID|PPID|SHELLOPTS|UID"
)
"""Variables that Slurm, the scripts, the launcher or the shell sets."""

LONGEST_TEXT = 16_384
"""Far below the 131,072 bytes that Linux takes as one variable or argument."""


def _check_duration(text: str) -> str:
    try:
        duration_s(text)
    except ClusterError as error:
        raise ValueError(str(error)) from None
    return text


def check_printable(text: str) -> str:
    """Return a text.

    Raises:
        ValueError: For one that is too long or holds a control character.
    """
    if len(text) > LONGEST_TEXT:
        raise ValueError(f"has {len(text)} characters; must be at most {LONGEST_TEXT}")
    if not text.isprintable():
        raise ValueError(f"got {text[:80]!r}; must be without control characters")
    return text


def _check_environment(variables: Mapping[str, str | int]) -> Mapping[str, str | int]:
    for name, value in variables.items():
        is_secret = re.fullmatch(SECRET_NAME, name, re.IGNORECASE)
        if is_secret or PASSWORD_IN_ADDRESS.search(str(value)):
            raise ValueError(
                f"{name} looks like a secret, and would stand in a script; put it in secrets_file"
            )
        if SET_BY_OTHERS.fullmatch(name):
            raise ValueError(f"{name} is not set by cluster files; remove it")
    return variables


def _check_set_up(text: str) -> str:
    if not re.sub(r"[\n\t]", "", text).isprintable():
        raise ValueError("holds a control character; remove it")
    found = SECRET_IN_SETUP.search(text)
    if found is not None or PASSWORD_IN_ADDRESS.search(text) or KEY_AS_ARGUMENT.search(text):
        name = "a password or key" if found is None else found[1]
        raise ValueError(
            f"gives {name}, which looks like a secret and would stand in a script; "
            "put it in secrets_file"
        )
    return text


Name = Annotated[
    str,
    Matches(r"[A-Za-z0-9_][A-Za-z0-9_.,:@/+=-]{0,127}", "letters, digits and _ . , : @ / + = -"),
]
Constraint = Annotated[
    str,
    Matches(
        r"[A-Za-z0-9_(\[!][A-Za-z0-9_.,:*&|()\[\]!=@/+-]{0,255}",
        "features joined by & | * ( ) [ ] !",
    ),
]
Gres = Annotated[
    str,
    Matches(
        r"[A-Za-z0-9_][A-Za-z0-9_.,:=-]{0,127}:\{gpus\}(,[A-Za-z0-9_.,:=-]{1,127})?",
        "a request like gpu:a100:{gpus}",
    ),
]
Memory = Annotated[
    str, Matches(r"[0-9]{1,12}[KMGT]?", 'a size like 480G, or "0" for all of a node')
]
Interface = Annotated[
    str,
    Matches(
        r"\^?=?[A-Za-z0-9_.:-]{1,15}(,[A-Za-z0-9_.:-]{1,15}){0,15}",
        "a name like ib0, or several, or ^lo,docker for all others",
    ),
]
"""As `NCCL_SOCKET_IFNAME`, or auto."""
InterfaceName = Annotated[str, Matches(r"[A-Za-z0-9_.:-]{1,15}", "a name like hsn0")]
HostSuffix = Annotated[str, Matches(r"[A-Za-z0-9.-]{1,63}", "letters, digits, . and -")]
Duration = Annotated[
    str, Matches(r"[0-9:-]*", "a time like HH:MM:SS"), AfterValidator(_check_duration)
]
AbsolutePath = Annotated[
    str,
    Matches(r"~?/[^\x00-\x1f]{0,4095}", "an absolute path, or one that begins with ~/"),
    AfterValidator(check_printable),
]
NodeFolder = Annotated[
    str,
    Matches(
        r"(~?/|\$(SLURM_TMPDIR|TMPDIR|LOCAL_SCRATCH)(/|$))([^$\x00-\x1f]|\$USER(?=/|$)){0,4095}",
        "an absolute path, in which $USER may stand, or one that begins with $SLURM_TMPDIR, "
        "$TMPDIR or $LOCAL_SCRATCH",
    ),
    AfterValidator(check_printable),
]
NodeProgram = Annotated[
    str,
    Matches(
        r"(~?/|\$(SLURM_TMPDIR|TMPDIR|LOCAL_SCRATCH)/)[^\x00-\x1f]{0,4095}",
        "an absolute path, or one that begins with ~/, $SLURM_TMPDIR/, $TMPDIR/ or $LOCAL_SCRATCH/",
    ),
    AfterValidator(check_printable),
]
"""A path, literal but for a variable that it begins with, which each node knows."""
SetUp = Annotated[str, AfterValidator(_check_set_up)]
VariableName = Annotated[str, Matches(r"[A-Za-z_][A-Za-z0-9_]{0,127}", "a variable's name")]
Variables = Annotated[
    dict[VariableName, Annotated[str, AfterValidator(check_printable)] | StrictInt],
    AfterValidator(_check_environment),
]
Image = Annotated[
    str,
    Matches(r"(~/)?[A-Za-z0-9_./][A-Za-z0-9_./:@#+-]{0,511}", "a path or reference of an image"),
]
Mount = Annotated[
    str,
    Matches(r"/[^\s:,\x00-\x1f]*(:/[^\s:,\x00-\x1f]*)?(:ro|:rw)?", "/folder or /here:/there"),
    AfterValidator(check_printable),
]
