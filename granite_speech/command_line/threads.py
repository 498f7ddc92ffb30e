"""How many threads a model on the CPU gets: one for each core that this process may use and that others leave free.

Threads wait for each other after every operation. If one of them has to wait for a core, each operation takes some milliseconds: a
thread more than there are free cores costs far more than it gains.
"""

import os
import time
from pathlib import Path

__all__ = ["Load", "available_cores", "thread_count"]

# Where the hierarchies of control groups are mounted, and where the one with the limit on processor time is. Version 2 first.
_UNIFIED = ("sys/fs/cgroup", "sys/fs/cgroup/unified")
_VERSION_1 = ("sys/fs/cgroup/cpu", "sys/fs/cgroup/cpu,cpuacct")
# A load that is measured for less time says little: the kernel counts in steps of 10 ms.
_SHORTEST = 0.5


def thread_count(asked: int | None, load: "Load") -> int | None:
    """The number of threads to set; None to leave PyTorch's own, which follows the OMP_NUM_THREADS that the user has set.

    Args:
        asked: of `--threads`, which wins over everything.
        load: of the machine.
    """
    if asked is not None:
        return asked
    first = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0].strip()
    if first.isdecimal() and int(first) > 0:  # OpenMP ignores other values
        return None
    return load.free_cores()


def available_cores(root: Path = Path("/")) -> int:
    """Cores that this process may use: those of its affinity mask, or fewer if its control group has a quota.

    Args:
        root: of the file system.
    """
    cores = len(_affinity() or range(os.cpu_count() or 1))
    if hasattr(os, "process_cpu_count"):  # from Python 3.13 on; the user may have set it
        cores = os.process_cpu_count() or cores
    # Rounded down: if more threads are running, all are stopped once the quota of a period is used up.
    return max(1, int(min(cores, _quota(root))))


class Load:
    """How much of the machine others use, from now on.

    Args:
        root: of the file system.
    """

    def __init__(self, root: Path = Path("/")):
        self._root = root
        self._began = self._now()

    def free_cores(self) -> int:
        """Available cores that other processes have left free since then, at least 1; all of them if that is not known."""
        cores = available_cores(self._root)
        began, now = self._began, self._now()
        if began is None or now is None or now[0] - began[0] < _SHORTEST:
            return cores
        seconds, all_busy, own = (after - before for before, after in zip(began, now, strict=True))
        free = len(_affinity()) - (all_busy - own) / seconds
        return max(1, min(cores, round(free)))

    def _now(self) -> tuple[float, float, float] | None:
        """The time, and the processor time of all processes on the cores of the affinity mask and of this one; None if not known."""
        try:
            lines = (self._root / "proc/stat").read_text().splitlines()
            counts = {name: list(map(int, values)) for name, *values in map(str.split, lines) if name.startswith("cpu")}
            # user, nice, system, idle, iowait, irq, softirq, steal
            busy = sum(sum(counts[f"cpu{core}"][place] for place in (0, 1, 2, 5, 6, 7)) for core in _affinity())
        except (OSError, ValueError, KeyError, IndexError):  # another system, or a container whose cores have other numbers
            return None
        return time.monotonic(), busy / os.sysconf("SC_CLK_TCK"), time.process_time()


def _affinity() -> set[int]:
    """The cores that this process may run on; empty on systems that do not say."""
    return os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set()


def _quota(root: Path) -> float:
    """Cores' worth of processor time that the control groups of this process allow; infinite if there is no limit."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return float("inf")
    found = [float("inf")]
    for line in lines:
        _, _, line = line.partition(":")
        controllers, _, path = line.partition(":")
        if controllers and "cpu" not in controllers.split(","):
            continue
        # Inside a container the path may be that of the host, and the container's own group is mounted as the root.
        parts = [part for part in path.split("/") if part not in ("", "..")]
        for mount in _VERSION_1 if controllers else _UNIFIED:
            for depth in range(len(parts) + 1):
                found.append(_limit(root.joinpath(mount, *parts[:depth])))
    return min(found)


def _limit(group: Path) -> float:
    """The quota of one control group, of either version."""
    for names in (("cpu.max",), ("cpu.cfs_quota_us", "cpu.cfs_period_us")):
        try:
            quota, period = " ".join((group / name).read_text() for name in names).split()
            if float(quota) > 0 and float(period) > 0:
                return float(quota) / float(period)
        except (OSError, ValueError):  # there is none: no such file, or "max"
            continue
    return float("inf")
