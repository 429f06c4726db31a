"""Load what a rank works with: torch, transformers and all that stands on them; seconds."""

import logging
import os

from peft_dist.common import logs
from peft_dist.common.imports import without_collector
from peft_dist.common.screen import stage
from peft_dist.model.import_bitsandbytes import import_bitsandbytes
from peft_dist.worker.process import quieten_libraries

log = logging.getLogger(__name__)


def preload(*, talks: bool) -> None:
    """Load what the ranks of a node have in common, before they are forked from this process.

    On a GPU bitsandbytes, and with it peft, is left to each rank: it opens CUDA as it is imported,
    which no fork can share.

    Args:
        talks: Whether people are told of it here.
    """
    logs.begin(0 if talks else 1)
    quieten_libraries()
    with stage("loading torch and transformers", log) as told, without_collector():
        import torch

        if torch.cuda.is_available():
            import transformers.modeling_utils  # noqa: F401
        else:
            load_libraries()
        if os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true":
            import deepspeed  # noqa: F401
        told.append("libraries loaded")
    logs.end()


def load_libraries() -> None:
    """Load all that `fine_tune` works with."""
    with without_collector():
        import_bitsandbytes()
        import peft_dist.finetune  # noqa: F401
