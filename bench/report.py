"""The tables of the newest result files, and the README sections that show them. `python -m bench report` updates the sections."""

from pathlib import Path
from typing import Any

from bench import (
    accelerated,
    cpu_table,
    encoder,
    hours,
    kernels_cpu,
    kernels_table,
    rehearse,
    results,
    serving,
    steps_gpu,
    times,
    turboctc_gpu,
    whole_model,
    words,
)

__all__ = ["headline", "report", "sections", "write"]

ROOT = Path(__file__).parents[1]


def write() -> None:
    for file, command, text in sections():
        results.replace_section(file, command, text)


def sections() -> list[tuple[Path, str, str]]:
    """Every generated section: its file, the command in its markers, and its text."""
    readme, all_kernels, checkpoint = (ROOT / name for name in ("README.md", "bench/results/README.md", "granite_speech/assets/README.md"))
    return [
        (readme, "report: headline", headline()),
        (
            readme,
            "report",
            report("cpu", "turboctc", "encoder", "accelerated", "serving", "whole-model", "decode-steps", "kernels summary"),
        ),
        (all_kernels, "report: kernels", report("kernels", "kernels-cpu")),
        (all_kernels, "report: rehearsal", report("rehearsal")),
        (all_kernels, "report: hours", report("hours")),
        (all_kernels, "report: times", report("times")),
        (checkpoint, "words", report("words")),
    ]


def report(*tables: str) -> str:
    """These tables for the newest run on each machine, as Markdown."""
    newest = results.newest()
    return "\n\n".join(_TABLES[name](run) for name in tables for run in newest if run["kind"] == name.removesuffix(" summary"))


def headline() -> str:
    """The speedups over transformers in the newest whole-model run, and in the encoder run on the same machine."""
    newest = results.newest()
    whole = max((run for run in newest if run["kind"] == "whole-model"), key=lambda run: run["run"]["date"])
    of_encoder = next(run for run in newest if run["kind"] == "encoder" and run["run"]["machine"] == whole["run"]["machine"])
    where = f"{whole['run']['machine']}, {whole['shape']['dtype']}"
    return "\n".join(
        [
            f"| {where} | here | transformers {whole['run']['versions']['transformers']} | speedup |",
            "|---|---|---|---|",
            *encoder.comparisons(of_encoder),
            *whole_model.comparisons(whole),
        ]
    )


def _kernels(run: dict[str, Any]) -> str:
    return kernels_table.table(_timed_in_graphs(run))


def _kernels_summary(run: dict[str, Any]) -> str:
    return kernels_table.summary(_timed_in_graphs(run))


def _timed_in_graphs(run: dict[str, Any]) -> dict[str, Any]:
    """The run itself, or, if it was timed with events, the times that are the device's and those of the experiments made with it."""
    if run.get("timing") == "graph":
        return run
    experiments = [other for other in results.newest() if other["kind"] == "experiments" and _place(other) == _place(run)]
    return kernels_table.without_host_times(run, experiments[0] if experiments else None)


def _place(run: dict[str, Any]) -> tuple[str, str]:
    return run["run"]["machine"], run["run"]["commit"]


_TABLES = {
    "cpu": cpu_table.table,
    "encoder": encoder.table,
    "whole-model": whole_model.table,
    "decode-steps": steps_gpu.table,
    "turboctc": turboctc_gpu.table,
    "accelerated": accelerated.table,
    "serving": serving.table,
    "rehearsal": rehearse.table,
    "hours": hours.table,
    "times": times.table,
    "kernels": _kernels,
    "kernels summary": _kernels_summary,
    "kernels-cpu": kernels_cpu.table,
    "words": words.table,
}
