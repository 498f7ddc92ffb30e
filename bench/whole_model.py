"""The tables of one run of the whole model on a GPU, beside transformers: its stages, and its decode step inside a CUDA graph."""

import re
from typing import Any

from bench import results

__all__ = ["table"]

STAGES = {
    "encoder_projector_s": "encoder and projector",
    "first_token_s": "first token",
    "decode_step_s": "one decode step",
    "whole_s": "whole run",
}


def table(result: dict[str, Any]) -> str:
    """Markdown of one run: both tables."""
    shape, run = result["shape"], result["run"]
    versions = ", ".join(f"{name} {run['versions'][name]}" for name in ("torch", "triton", "transformers"))
    where = f"{run['machine']}, {versions}, commit {run['commit'][:8]}"
    what = f"{shape['dtype']}, {shape['weights']}, clips of {shape['clip_seconds']} s"
    return "\n".join(
        [
            f"Whole model, {what}, {shape['new_tokens']} new tokens: {where}; median time, here / transformers (– where that was not run):",
            "",
            *_stages(result),
            "",
            f"The decode step as it is, and the same step captured in a CUDA graph, {what}: {where}. The capture is an experiment, "
            "which the package does not do yet:",
            "",
            *_steps(result),
        ]
    )


def _stages(result: dict[str, Any]) -> list[str]:
    rows = [f"| model | clips | {' | '.join(STAGES.values())} | audio seconds a second |", "|---" * (3 + len(STAGES)) + "|"]
    for model, clips in _runs(result, "ours"):
        both = [_ran(result, f"{who} {model} x{clips}") for who in ("ours", "transformers")]
        times = [" / ".join(results.time_text(one[stage]) if one else "–" for one in both) for stage in STAGES]
        speeds = " / ".join(_speed(one["rtfx"]) if one else "–" for one in both)
        rows.append(f"| {_named(model)} | {clips} | {' | '.join(times)} | {speeds} |")
    return rows


def _steps(result: dict[str, Any]) -> list[str]:
    rows = ["| model | clips | launches | busy on the device | eager | in a CUDA graph |", "|---|---|---|---|---|---|"]
    for model, clips in _runs(result, "graph"):
        profile = result["profiles"].get(f"{model.removesuffix(' lora')} decode step, batch {clips}")
        busy = [f"{profile['launches']:,}", results.time_text(profile["device_ms"] / 1e3)] if profile else ["–", "–"]
        times = [results.time_text(result[f"graph {model} x{clips}"][name]) for name in ("eager_step_s", "captured_step_s")]
        rows.append(f"| {_named(model)} | {clips} | {' | '.join(busy + times)} |")
    return rows


def _runs(result: dict[str, Any], who: str) -> list[tuple[str, int]]:
    """Model and number of clips of the runs named "<who> <model> x<clips>", in the file's order."""
    found = (re.fullmatch(rf"{who} (.+) x(\d+)", name) for name in result if _ran(result, name))
    return [(one[1], int(one[2])) for one in found if one]


def _ran(result: dict[str, Any], name: str) -> dict[str, float] | None:
    """The figures of a run; None if there was none or it failed."""
    run = result.get(name)
    return None if not isinstance(run, dict) or "error" in run else run


def _named(model: str) -> str:
    return model.replace(" lora", " with adapter")


def _speed(rtfx: float) -> str:
    return f"{rtfx:.0f}" if rtfx >= 100 else f"{rtfx:.1f}"
