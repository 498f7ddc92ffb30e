"""How many threads a model on the CPU gets: one for each core that this process may use and that others leave free.

Threads wait for each other after every operation. If one of them has to wait for a core, each operation takes some milliseconds: a
thread more than there are free cores costs far more than it gains.
"""

import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

__all__ = ["Load", "available_cores", "no_slower", "set_threads", "thread_count"]

# Where the hierarchies of control groups are mounted, and where the one with the limit on processor time is. Version 2 first.
_UNIFIED = ("sys/fs/cgroup", "sys/fs/cgroup/unified")
_VERSION_1 = ("sys/fs/cgroup/cpu", "sys/fs/cgroup/cpu,cpuacct")
# How often a product is tried, how many seconds of other work come before it, and how much longer several threads may take than one.
_TRIES, _PAUSE, _CLEARLY = 6, 0.015, 1.5
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


def set_threads(count: int) -> None:
    """Set the number of threads for products, and make those of GNU OpenMP sleep while they wait for each other.

    They would spin, and on a busy machine keep the core from the very thread that they wait for: each operation then takes 4 to 16 ms.
    They sleep if OpenMP has more threads than there are cores, so this thread gets a team too, which has nothing to do.
    """
    import torch

    torch.set_num_threads(count)
    if count > 1:
        torch.ones(1 << 18).add(1)


def no_slower(count: int, model: Any) -> int:
    """So many threads, or one if products of the model's size take clearly longer with all of them.

    They do on a busy machine, and for a small model on a system that is slow to wake threads.

    Args:
        count: of threads.
        model: on a CPU. Its encoder's size and its dtype count.
    """
    if count == 1:
        return 1
    from granite_speech.config_ctc import GraniteSpeech5EncoderConfig

    encoder = model.config.encoder_config
    with ThreadPoolExecutor(1) as alone:  # the team of threads that a thread gets ends with it
        if isinstance(encoder, GraniteSpeech5EncoderConfig):
            size = encoder.hidden_size, encoder.intermediate_size
        else:
            size = encoder.hidden_dim, encoder.hidden_dim * encoder.feedforward_mult
        one, several = alone.submit(_compare, count, size, model.dtype).result()
    return count if several < _CLEARLY * one else 1


def _compare(count: int, size: tuple[int, int], dtype: Any) -> tuple[float, float]:
    """Seconds of products with one thread and with several, which have had time to fall asleep, as while the model does other work."""
    import torch

    rows, weight = torch.ones(150, size[0], dtype=dtype), torch.ones(size[1], size[0], dtype=dtype)
    seconds = []
    for threads in (1, count):
        torch.set_num_threads(threads)
        torch.nn.functional.linear(rows, weight)
        taken = 0.0
        for _ in range(_TRIES):
            time.sleep(_PAUSE if threads > 1 else 0)
            began = time.perf_counter()
            for _ in range(2):
                torch.nn.functional.linear(rows, weight)
            taken += time.perf_counter() - began
        seconds.append(taken)
    return seconds[0], seconds[1]


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
