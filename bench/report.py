"""Every kind of result file and its table; `python -m bench report` writes them into the README."""

from collections.abc import Sequence
from typing import Any

from bench import kernels_cpu, kernels_table, model, results, whole_model, words

__all__ = ["report"]

SPEEDS = ("encoder", "whole-model", "kernels", "kernels-cpu")


def report(kinds: Sequence[str] = SPEEDS) -> str:
    """Markdown of the newest run of each of these kinds on each machine."""
    newest = results.newest()
    return "\n\n".join(_TABLES[kind](run) for kind in kinds for run in newest if run["kind"] == kind)


def _kernels(run: dict[str, Any]) -> str:
    if run.get("timing") == "graph":
        return kernels_table.table(run)
    place = (run["run"]["machine"], run["run"]["commit"])
    alike = [one for one in results.newest() if one["kind"] == "experiments" and (one["run"]["machine"], one["run"]["commit"]) == place]
    return kernels_table.table(kernels_table.without_host_times(run, alike[0] if alike else None))


_TABLES = {
    "encoder": model.table,
    "whole-model": whole_model.table,
    "kernels": _kernels,
    "kernels-cpu": kernels_cpu.table,
    "words": words.table,
}
