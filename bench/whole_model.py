"""Tables of one run of the whole model on a GPU: captured in CUDA graphs, eager, and in transformers."""

import re
from collections.abc import Callable
from typing import Any

from bench import results

__all__ = ["comparisons", "table"]

STAGES = {
    "encoder_projector_s": "encoder and projector",
    "first_token_s": "first token",
    "decode_step_s": "one decode step",
    "whole_s": "whole run",
}
WAYS = ("captured", "eager", "transformers")


def table(result: dict[str, Any]) -> str:
    """Markdown of one run: its stages and its launches."""
    shape, run = result["shape"], result["run"]
    versions = ", ".join(f"{name} {run['versions'][name]}" for name in ("torch", "triton", "transformers"))
    where = f"{run['machine']}, {versions}, commit {run['commit'][:8]}"
    what = f"{shape['dtype']}, {shape['weights']}, clips of {shape['clip_seconds']} s"
    lines = [
        f"Whole model, {what}, {shape['new_tokens']} new tokens: {where}; median time, captured in CUDA graphs / eager / transformers "
        "(– if not measured):",
        "",
        *_stages(result),
    ]
    if any(name.startswith("graph ") for name in result):
        lines += [
            "",
            f"One decode step, run eagerly (as the package did) and captured in a CUDA graph (an experiment), {what}: {where}:",
            "",
            *_experiment(result),
        ]
    elif result["profiles"]:
        lines += ["", f"Launches, {what}: {where}:", "", *_launches(result)]
    return "\n".join(lines)


def comparisons(result: dict[str, Any]) -> list[str]:
    """Table lines of the whole runs that transformers made too: input, time here, time in transformers, speedup."""
    lines = []
    for model, clips in _models(result):
        captured, eager, theirs = _of_each_way(result, model, clips)
        ours = captured or eager
        if ours and theirs:
            what = f"whole run of {_label(model)}, {clips} clip{'s' * (clips > 1)} of {result['shape']['clip_seconds']} s"
            times = [results.time_text(figures["whole_s"]) for figures in (ours, theirs)]
            lines.append(f"| {what} | {times[0]} | {times[1]} | {theirs['whole_s'] / ours['whole_s']:.2f}x |")
    return lines


def _stages(result: dict[str, Any]) -> list[str]:
    titles = [*STAGES.values(), "seconds of audio per second", "memory above the weights, GB"]
    lines = [f"| model | clips | {' | '.join(titles)} |", "|---" * (2 + len(titles)) + "|"]
    for model, clips in _models(result):
        ways = _of_each_way(result, model, clips)
        cells = [_cell(ways, stage, results.time_text) for stage in STAGES]
        cells += [_cell(ways, "rtfx", _speed), _cell(ways, "peak_extra_GB", lambda size: f"{size:.2f}")]
        lines.append(f"| {_label(model)} | {clips} | {' | '.join(cells)} |")
    return lines


def _cell(ways: list[dict[str, float] | None], name: str, text: Callable[[float], str]) -> str:
    return " / ".join(text(figures[name]) if figures and name in figures else "–" for figures in ways)


def _of_each_way(result: dict[str, Any], model: str, clips: int) -> list[dict[str, float] | None]:
    """The figures of a model and batch for each of WAYS. Files from before the capture call the eager run "ours"."""
    captured, eager, theirs = (_figures(result, f"{way} {model} x{clips}") for way in WAYS)
    return [captured, eager or _figures(result, f"ours {model} x{clips}"), theirs]


def _experiment(result: dict[str, Any]) -> list[str]:
    lines = ["| model | clips | launches | device busy | eager | in a CUDA graph |", "|---|---|---|---|---|---|"]
    for model, clips in _runs(result, "graph"):
        profile = result["profiles"].get(f"{model.removesuffix(' lora')} decode step, batch {clips}")
        busy = [f"{profile['launches']:,}", results.time_text(profile["device_ms"] / 1e3)] if profile else ["–", "–"]
        times = [results.time_text(result[f"graph {model} x{clips}"][name]) for name in ("eager_step_s", "captured_step_s")]
        lines.append(f"| {_label(model)} | {clips} | {' | '.join(busy + times)} |")
    return lines


def _launches(result: dict[str, Any]) -> list[str]:
    lines = ["| model | clips | | work | on the device | device busy | calls by the host |", "|---|---|---|---|---|---|---|"]
    for model, clips in _models(result):
        for way in WAYS:
            for work, found in result["profiles"].get(f"{way} {model} x{clips}", {}).items():
                counts = [f"{round(found[name]):,}" for name in ("launches", "host_calls")]
                lines.append(
                    f"| {_label(model)} | {clips} | {way} | {work} | {counts[0]} | {results.time_text(found['device_s'])} | {counts[1]} |"
                )
    return lines


def _models(result: dict[str, Any]) -> list[tuple[str, int]]:
    """Model and number of clips of our runs, in the file's order, each once."""
    return list(dict.fromkeys(one for way in ("ours", "captured", "eager") for one in _runs(result, way)))


def _runs(result: dict[str, Any], way: str) -> list[tuple[str, int]]:
    """Model and number of clips of the runs named "<way> <model> x<clips>", in the file's order."""
    found = (re.fullmatch(rf"{way} (.+) x(\d+)", name) for name in result if _figures(result, name))
    return [(match[1], int(match[2])) for match in found if match]


def _figures(result: dict[str, Any], name: str) -> dict[str, float] | None:
    """The figures of a run; None if it is missing or failed."""
    run = result.get(name)
    return None if not isinstance(run, dict) or "error" in run else run


def _label(model: str) -> str:
    return model.replace(" lora", " with adapter")


def _speed(rtfx: float) -> str:
    return f"{rtfx:.0f}" if rtfx >= 100 else f"{rtfx:.1f}"
