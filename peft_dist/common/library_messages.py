"""Recognise the errors of other libraries that have no type of their own, by their messages.

Each entry has a test that provokes the real message: a library that words it anew is found there.
"""

import errno

OUT_OF_MEMORY = ("DefaultCPUAllocator: can't allocate memory",)
"""Of torch on a CPU; on a GPU it has a type for what its own allocator lacks."""
OUT_OF_DEVICE_MEMORY = (
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDA error: out of memory",  # torch's, of what its allocator has no part in
    "Cuda failure 'out of memory'",  # NCCL's
    "Cuda failure 2 'out of memory'",
)
"""Of CUDA's libraries, which have no room for themselves beside torch."""
LOST_PEER = (
    "Connection closed by peer",  # the process at the other end has ended
    "Connection reset",  # it was killed with data on the way
)
"""Of gloo."""
LOST_NCCL_PEER = (
    "NCCL communicator was aborted on rank",
    "Some NCCL operations have failed or timed out",
    "Watchdog caught collective operation timeout",
    "remote process exited or there was a network error",
)
"""Of torch's process group over NCCL, and of NCCL."""
PORT_TAKEN = ("EADDRINUSE",)
"""Of torch's TCPStore; a socket of Python has an errno for it."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that a device's or the machine's memory is used up."""
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"  # torch's, which may not be imported yet
        or _says(error, (*OUT_OF_MEMORY, *OUT_OF_DEVICE_MEMORY))
    )


def is_lost_peer(error: BaseException) -> bool:
    """Whether an error follows from the end of another process of the group."""
    return _says(error, (*LOST_PEER, *LOST_NCCL_PEER))


def is_port_taken(error: BaseException) -> bool:
    """Whether a store could not be served because another program has its port."""
    return getattr(error, "errno", None) == errno.EADDRINUSE or _says(error, PORT_TAKEN)


def _says(error: BaseException, messages: tuple[str, ...]) -> bool:
    return any(message in str(error) for message in messages)
