"""Resident memory of this process, in bytes."""

from contextlib import suppress
from pathlib import Path

__all__ = ["restart_peak", "status"]


def restart_peak() -> int:
    """Resident bytes now. The peak counts from here; where that is not allowed, it includes that of the import."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    return status("VmRSS")


def status(name: str) -> int:
    """VmRSS, resident now, or VmHWM, its peak."""
    line = next(one for one in Path("/proc/self/status").read_text().splitlines() if one.startswith(name + ":"))
    return int(line.split()[1]) * 1024
