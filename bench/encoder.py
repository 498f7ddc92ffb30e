"""Times of the encoder in the released shape and of transformers', on one clip and on a batch of unequal clips, on a GPU.

Both run in one process, in alternating order, with the same weights, and only if their outputs agree. The matmul share is the time the
matrix products would take at the machine's own rate, over the measured time; that rate is of a large product in a CUDA graph, as in
`bench.kernels`. The part for a CPU is in `bench/cpu_encoder.py`.
"""

import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from bench import graphs, results
from granite_speech import GraniteSpeechCTCEncoder, GraniteSpeechEncoderConfig

__all__ = [
    "CLIP_SECONDS",
    "FRAMES_A_SECOND",
    "TOLERANCE",
    "check_agreement",
    "comparisons",
    "encoders",
    "matmul_flops",
    "run",
    "seconds_of",
    "table",
]

FRAMES_A_SECOND = 50
CLIP_SECONDS = (3, 6, 9, 12, 18, 21, 27, 30)
# Largest difference over largest value. In float16 and bfloat16 both encoders round at every operation.
TOLERANCE = {"float32": 1e-4, "float16": 2e-2, "bfloat16": 1e-1}


def run(*, layers: int, rounds: int, device: str, dtype: str, out: Path) -> str:
    """Measure, write the result file, and return its table."""
    ours, reference = (encoder.to(device, getattr(torch, dtype)) for encoder in encoders(layers))
    lengths = [seconds * FRAMES_A_SECOND for seconds in CLIP_SECONDS]
    batch = torch.randn(len(lengths), max(lengths), ours.config.input_dim).to(device, getattr(torch, dtype))
    with torch.inference_mode():
        check_agreement(ours, reference, batch, lengths, TOLERANCE[dtype])
        measurements = [
            _measure(f"one clip of {CLIP_SECONDS[-1]} s", ours, reference, batch[-1:], [lengths[-1]], rounds),
            _measure(f"{len(lengths)} clips of {CLIP_SECONDS[0]} to {CLIP_SECONDS[-1]} s", ours, reference, batch, lengths, rounds),
        ]
    with graphs.side_stream():
        rate = graphs.matmul_rate(getattr(torch, dtype))
    measurements = [measured | _share(measured, rate) for measured in measurements]
    described = results.describe_run() | {"machine": torch.cuda.get_device_name(device)}
    shape = {"layers": layers, "hidden_dim": ours.config.hidden_dim, "clip_seconds": list(CLIP_SECONDS), "dtype": dtype}
    result = {"kind": "encoder", "run": described, "shape": shape, "rounds": rounds, "measurements": measurements}
    file = results.write(out, "encoder", result)
    return f"{table(result)}\n\n{file}"


def encoders(layers: int) -> tuple[torch.nn.Module, torch.nn.Module]:
    """Ours and transformers' in the released shape, with the same random weights, in float32."""
    from transformers import GraniteSpeechEncoderConfig as ReferenceConfig
    from transformers.models.granite_speech.modeling_granite_speech import GraniteSpeechCTCEncoder as Reference

    torch.manual_seed(0)
    shape = {"num_layers": layers, "output_dim": 348}
    reference = Reference(ReferenceConfig(**shape)).eval()
    ours = GraniteSpeechCTCEncoder(GraniteSpeechEncoderConfig(**shape)).eval()
    ours.load_state_dict(reference.state_dict())
    return ours, reference


def check_agreement(
    ours: torch.nn.Module, reference: torch.nn.Module, batch: torch.Tensor, lengths: list[int], allowed: float
) -> torch.Tensor:
    """Compare clips of the packed batch with transformers' encoder on each clip alone: the two shortest and the longest.

    Args:
        ours: the encoder.
        reference: transformers'.
        batch: `(clips, frames, input_dim)`.
        lengths: frames of each clip.
        allowed: the largest difference over the largest value.

    Returns:
        Our states of the batch.

    Raises:
        SystemExit: they differ.
    """
    packed = ours(batch, lengths).last_hidden_state
    for clip in sorted({0, 1, len(lengths) - 1}):
        alone = reference(batch[clip : clip + 1, : lengths[clip]]).last_hidden_state
        error = float((packed[clip, : lengths[clip]] - alone[0]).abs().max() / alone.abs().max())
        if not error <= allowed:
            raise SystemExit(f"clip {clip} differs from transformers by {error:.1e} (allowed: {allowed:.0e}), so nothing was timed")
    return packed


def _measure(
    what: str, ours: torch.nn.Module, reference: torch.nn.Module, batch: torch.Tensor, lengths: list[int], rounds: int
) -> dict[str, Any]:
    calls = {"ours": lambda: ours(batch, lengths), "reference": lambda: reference(batch)}
    seconds = _time_rounds(calls, rounds)
    ratios = [theirs / mine for mine, theirs in zip(seconds["ours"], seconds["reference"], strict=True)]
    return {
        "what": what,
        "audio_seconds": sum(lengths) / FRAMES_A_SECOND,
        "seconds": statistics.median(seconds["ours"]),
        "reference_seconds": statistics.median(seconds["reference"]),
        "ratio": statistics.median(ratios),
        "ratios": [round(ratio, 4) for ratio in ratios],
        "matmul_flops": matmul_flops(ours, sum(lengths)),
    }


def _time_rounds(calls: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each call in each round, after one warm-up round."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(rounds + 1):
        # In alternating order, so that no call always finds the caches and the allocator as the same other call left them.
        for name, call in calls.items() if number % 2 else reversed(calls.items()):
            elapsed = seconds_of(call)
            if number > 0:
                seconds[name].append(elapsed)
    return seconds


def _share(measured: dict[str, Any], rate: float) -> dict[str, float]:
    """The machine's matmul rate, and the share of the measured time that the matrix products would take at that rate."""
    return {"machine_matmul_flops_a_second": rate, "matmul_share": measured["matmul_flops"] / measured["seconds"] / rate}


def matmul_flops(encoder: torch.nn.Module, frames: int) -> float:
    """FLOPs of the projections, two per multiply-add; attention and the depthwise convolution are not counted."""
    weights = {name: weight for name, weight in encoder.named_parameters() if weight.dim() > 1}
    return (
        2.0
        * frames
        * sum(weight.numel() for name, weight in weights.items() if "depth_conv" not in name and not name.endswith("rel_pos_emb.weight"))
    )


def seconds_of(call: Callable[[], object]) -> float:
    """Of one call, its work on a GPU included."""
    _synchronize()
    start = time.perf_counter()
    call()
    _synchronize()
    return time.perf_counter() - start


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def table(result: dict[str, Any]) -> str:
    """Markdown of one run."""
    run, shape = result["run"], result["shape"]
    versions = ", ".join(f"{name} {run['versions'][name]}" for name in ("torch", "transformers"))
    lines = [
        f"Encoder, {shape['layers']} x {shape['hidden_dim']}, {shape['dtype']}: {run['machine']}, {run['threads']} threads, {versions}, "
        f"commit {run['commit'][:8]}, median of {result['rounds']}:",
        "",
        "| input | here | transformers | speedup | matmul share |",
        "|---|---|---|---|---|",
    ]
    for measured in result["measurements"]:
        share = f"{measured['matmul_share']:.0%}" if "matmul_share" in measured else "–"
        lines.append(f"| {_comparison(measured)} | {share} |")
    return "\n".join(lines)


def comparisons(result: dict[str, Any]) -> list[str]:
    """Table lines of one run: input, seconds here, seconds in transformers, speedup."""
    return [f"| encoder, {_comparison(measured)} |" for measured in result["measurements"]]


def _comparison(measured: dict[str, Any]) -> str:
    times = [results.time_text(measured[name]) for name in ("seconds", "reference_seconds")]
    return f"{measured['what']} | {times[0]} | {times[1]} | {measured['ratio']:.2f}x"
