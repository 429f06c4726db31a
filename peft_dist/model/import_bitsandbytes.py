"""Import bitsandbytes without the compiler, which it loads and a training never uses.

On import it hands five of its plain PyTorch kernels to `torch.compile`: a fifth of the start of
every process. A CPU and a CUDA device have kernels of their own for all that a training calls;
where `torch.compile` refuses, bitsandbytes keeps its functions as they are (`_try_torch_compile` in
its backends/default/ops.py, 0.50).
"""

from typing import Any, NoReturn


def import_bitsandbytes() -> None:
    """Import bitsandbytes with its fallback kernels uncompiled; to be called before peft is."""
    import torch

    def refuse(*_: Any, **__: Any) -> NoReturn:
        raise RuntimeError("not while bitsandbytes is imported")

    compile_ = torch.compile
    torch.compile = refuse
    try:
        import bitsandbytes  # noqa: F401
    finally:
        torch.compile = compile_
