"""Recognise the errors of other libraries that have no type of their own, by their messages.

Each entry has a test that provokes the real message: a library that words it anew is found there.
"""

import errno

OUT_OF_MEMORY = ("DefaultCPUAllocator: can't allocate memory",)
"""Of torch on a CPU; on a GPU it has a type for this."""
LOST_PEER = (
    "Connection closed by peer",  # the process at the other end has ended
    "Connection reset",  # it was killed with data on the way
)
"""Of gloo."""
PORT_TAKEN = ("EADDRINUSE",)
"""Of torch's TCPStore; a socket of Python has an errno for it."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that a device's or the machine's memory is used up."""
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"  # torch's, which may not be imported yet
        or _says(error, OUT_OF_MEMORY)
    )


def is_lost_peer(error: BaseException) -> bool:
    """Whether an error follows from the end of another process of the group."""
    return _says(error, LOST_PEER)


def is_port_taken(error: BaseException) -> bool:
    """Whether a store could not be served because another program has its port."""
    return getattr(error, "errno", None) == errno.EADDRINUSE or _says(error, PORT_TAKEN)


def _says(error: BaseException, messages: tuple[str, ...]) -> bool:
    return any(message in str(error) for message in messages)
