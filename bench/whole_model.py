"""Tables of one run of the whole model on a GPU and of transformers': their stages, and the decode step captured in a CUDA graph."""

import re
from typing import Any

from bench import results

__all__ = ["comparisons", "table"]

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
            f"Whole model, {what}, {shape['new_tokens']} new tokens: {where}; median time, here / transformers (– if not measured):",
            "",
            *_stages(result),
            "",
            f"One decode step, run eagerly (as the package does) and captured in a CUDA graph (an experiment, not yet in the package), "
            f"{what}: {where}:",
            "",
            *_steps(result),
        ]
    )


def comparisons(result: dict[str, Any]) -> list[str]:
    """Table lines of the whole runs that transformers made too: input, time here, time in transformers, speedup."""
    lines = []
    for model, clips in _runs(result, "ours"):
        ours, theirs = (_figures(result, f"{name} {model} x{clips}") for name in ("ours", "transformers"))
        if theirs:
            what = f"whole run of {_label(model)}, {clips} clip{'s' * (clips > 1)} of {result['shape']['clip_seconds']} s"
            times = [results.time_text(figures["whole_s"]) for figures in (ours, theirs)]
            lines.append(f"| {what} | {times[0]} | {times[1]} | {theirs['whole_s'] / ours['whole_s']:.2f}x |")
    return lines


def _stages(result: dict[str, Any]) -> list[str]:
    lines = [f"| model | clips | {' | '.join(STAGES.values())} | seconds of audio per second |", "|---" * (3 + len(STAGES)) + "|"]
    for model, clips in _runs(result, "ours"):
        both = [_figures(result, f"{name} {model} x{clips}") for name in ("ours", "transformers")]
        times = [" / ".join(results.time_text(figures[stage]) if figures else "–" for figures in both) for stage in STAGES]
        speeds = " / ".join(_speed(figures["rtfx"]) if figures else "–" for figures in both)
        lines.append(f"| {_label(model)} | {clips} | {' | '.join(times)} | {speeds} |")
    return lines


def _steps(result: dict[str, Any]) -> list[str]:
    lines = ["| model | clips | launches | device busy | eager | in a CUDA graph |", "|---|---|---|---|---|---|"]
    for model, clips in _runs(result, "graph"):
        profile = result["profiles"].get(f"{model.removesuffix(' lora')} decode step, batch {clips}")
        busy = [f"{profile['launches']:,}", results.time_text(profile["device_ms"] / 1e3)] if profile else ["–", "–"]
        times = [results.time_text(result[f"graph {model} x{clips}"][name]) for name in ("eager_step_s", "captured_step_s")]
        lines.append(f"| {_label(model)} | {clips} | {' | '.join(busy + times)} |")
    return lines


def _runs(result: dict[str, Any], kind: str) -> list[tuple[str, int]]:
    """Model and number of clips of the runs named "<kind> <model> x<clips>", in the file's order."""
    found = (re.fullmatch(rf"{kind} (.+) x(\d+)", name) for name in result if _figures(result, name))
    return [(match[1], int(match[2])) for match in found if match]


def _figures(result: dict[str, Any], name: str) -> dict[str, float] | None:
    """The figures of a run; None if it is missing or failed."""
    run = result.get(name)
    return None if not isinstance(run, dict) or "error" in run else run


def _label(model: str) -> str:
    return model.replace(" lora", " with adapter")


def _speed(rtfx: float) -> str:
    return f"{rtfx:.0f}" if rtfx >= 100 else f"{rtfx:.1f}"
