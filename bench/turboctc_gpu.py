"""TurboCTC in the released size beside transformers on a GPU: from features to the best path of batches of equal clips."""

import statistics
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench import results, shapes
from bench.cpu_ctc import pair
from bench.encoder import TOLERANCE, seconds_of
from bench.turns import error
from granite_speech.engine import ctc_encoding
from granite_speech.engine.graphs import CudaCapture, Graphs
from granite_speech.modules.packing import Segments
from granite_speech.modules.side_by_side import arrange

__all__ = ["run", "table"]

CLIPS, ROUNDS = (1, 16, 128, 512), 9
SYSTEMS = ("captured", "eager", "transformers")


def run(
    *, device: str, dtype: str, out: Path, clips: tuple[int, ...] = CLIPS, rounds: int = ROUNDS, configuration: dict[str, Any] | None = None
) -> str:
    """Measure, write the result file after each number of clips, and return its table.

    Args:
        device, dtype: of both models.
        out: folder for the result file.
        clips: of each batch, 10 s each.
        rounds: of each batch; the median counts.
        configuration: values of `GraniteSpeech5CTCConfig`; None for the released ones.

    Raises:
        SystemExit: the logits differ from transformers'; nothing more is timed.
    """
    ours, theirs = (one.to(device, getattr(torch, dtype)) for one in pair(configuration or {}))
    arrange(ours.encoder)
    described, on_gpu = results.describe_run(), device != "cpu"
    if on_gpu:
        described["machine"] = torch.cuda.get_device_name(device)
    config = ours.config.encoder_config
    shape = {"layers": config.num_hidden_layers, "hidden_dim": config.hidden_size, "dtype": dtype, "clip_seconds": shapes.CLIP_SECONDS}
    result: dict[str, Any] = {"kind": "turboctc", "run": described, "shape": shape, "rounds": rounds, "measurements": []}
    for count in clips:
        features = torch.randn(count, shapes.CLIP_SECONDS * shapes.FRAMES_A_SECOND, 4 * config.num_mel_bins).to(
            device, getattr(torch, dtype)
        )
        with torch.no_grad():
            result["measurements"].append(_measure(ours, theirs, features, rounds, TOLERANCE[dtype], on_gpu))
        file = results.write(out, "turboctc", result)
    return f"{table(result)}\n\n{file}"


def _measure(ours: Any, theirs: Any, features: Tensor, rounds: int, tolerance: float, on_gpu: bool) -> dict[str, Any]:
    found, truth = ours(features[:1]).logits, theirs(features[:1]).logits
    wrong = error(found.float(), truth.float())
    if not wrong <= tolerance:
        raise SystemExit(f"TurboCTC: the logits differ from transformers' by {wrong:.1e} (allowed: {tolerance:.0e}), so nothing was timed")
    calls = _calls(ours, theirs, features, on_gpu)
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(rounds + 1):
        for name, call in calls.items() if number % 2 else reversed(calls.items()):
            elapsed = seconds_of(call)
            if number > 0:
                seconds[name].append(elapsed)
    medians = {name: statistics.median(taken) for name, taken in seconds.items()}
    audio = len(features) * shapes.CLIP_SECONDS
    best, expected = ours.generate(features), theirs.generate(features)
    return {
        "clips": len(features),
        "audio_seconds": audio,
        "seconds": medians,
        "rtfx": {name: audio / taken for name, taken in medians.items()},
        "ratio": {name: medians["transformers"] / taken for name, taken in medians.items() if name != "transformers"},
        "error": wrong,
        "equal_ids": float((best == expected).float().mean()),
    }


def _calls(ours: Any, theirs: Any, features: Tensor, on_gpu: bool) -> dict[str, Callable[[], Any]]:
    """From features to tokens on the host; "captured" is missing where this number of frames has no captured stage."""
    clips, frames = Segments.of_batch(features), features.flatten(0, 1)

    def path(graphs: Graphs) -> Tensor:
        found, _ = ctc_encoding.decode(ours, graphs, frames, clips)
        return found.tokens.cpu()

    calls: dict[str, Callable[[], Any]] = {}
    if on_gpu and ctc_encoding.bucket_of(clips.lengths) is not None:
        captured = Graphs(CudaCapture(features.device))
        path(captured)
        captured.capture_wanted()
        if len(captured) == 0:
            raise SystemExit("TurboCTC: nothing was captured, so nothing was timed")
        calls["captured"] = partial(path, captured)
    return calls | {"eager": partial(path, Graphs(None)), "transformers": lambda: theirs.generate(features).cpu()}


def table(result: dict[str, Any]) -> str:
    """Markdown of one run."""
    run, shape = result["run"], result["shape"]
    versions = ", ".join(f"{name} {run['versions'][name]}" for name in ("torch", "transformers"))
    lines = [
        f"TurboCTC, {shape['layers']} x {shape['hidden_dim']}, {shape['dtype']}, random weights, clips of {shape['clip_seconds']} s from "
        f"features to tokens: {run['machine']}, {versions}, commit {run['commit'][:8]}, median of {result['rounds']}; seconds of audio a "
        "second (time):",
        "",
        "| clips | captured | eager | transformers | speedup |",
        "|---|---|---|---|---|",
    ]
    for one in result["measurements"]:
        cells = [
            f"{one['rtfx'][name]:,.0f} ({results.time_text(one['seconds'][name])})" if name in one["rtfx"] else "–" for name in SYSTEMS
        ]
        lines.append(f"| {one['clips']} | {' | '.join(cells)} | {max(one['ratio'].values()):.2f}x |")
    return "\n".join(lines)
