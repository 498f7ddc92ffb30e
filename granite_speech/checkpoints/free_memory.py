"""Memory that a program has freed, and that the C library keeps for its next allocations."""

import ctypes

__all__ = ["return_free_memory"]


def return_free_memory() -> None:
    """Give it back to the system: after rounding weights that is as much as the largest of them, several times. Does nothing without
    glibc."""
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (AttributeError, OSError, TypeError):  # another C library, or Windows
        return
