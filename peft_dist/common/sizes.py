"""Sizes in words."""


def megabytes(count: int) -> str:
    """Return a number of bytes as people read it, such as `58.2 MB`."""
    return f"{count / 1e6:,.1f} MB"
