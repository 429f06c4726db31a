"""Download files of a repository of the hub into the cache that all its users share."""

from collections.abc import Sequence
from pathlib import Path

from peft_dist.common.errors import ModelError
from peft_dist.common.sharing import users_umask


def download(
    name: str, revision: str | None, patterns: Sequence[str], *, kind: str, field: str
) -> Path:
    """Return the folder of a hub id's files, downloading those that are not in the cache.

    Args:
        name: Hub id.
        revision: Branch, tag or commit. Default: main.
        patterns: Names of the files that are wanted.
        kind: What it is, in a word for errors.
        field: The recipe field that names it, for errors.

    Raises:
        ModelError: There is no such thing, it is not given to this user, or the hub is not reached.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    try:
        with users_umask():  # others may read the same cache
            return Path(snapshot_download(name, revision=revision, allow_patterns=[*patterns]))
    except GatedRepoError:
        raise ModelError(
            f"the hub gives {name!r} only to users who have accepted its terms",
            where=field,
            remedy="accept them on its page, and set HF_TOKEN to a token of that account",
        ) from None
    except RepositoryNotFoundError:
        raise ModelError(
            f"{name!r} is neither a folder here nor a public {kind} of the hub",
            where=field,
            remedy=f"check the name; for a private {kind} set HF_TOKEN",
        ) from None
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise ModelError(
            f"{name!r} is neither a folder here nor a hub {kind} that can be reached "
            f"({type(error).__name__})",
            where=field,
            remedy=f"check the path, or download the {kind} where there is a network and name its "
            "folder",
        ) from None
