"""The released encoder's shape beside transformers', on one clip and on a batch of unequal clips.

The two take turns in one process with the same weights and threads, and a result counts only if the outputs agree. The matrix
products' share of the time is what they would take at the machine's own rate: on a CPU that of the feed-forward's product, measured
in the same rounds; on a GPU that of a large product in a CUDA graph, as in `bench.kernels`.
"""

import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from bench import graphs, results
from granite_speech import GraniteSpeechCTCEncoder, GraniteSpeechEncoderConfig

__all__ = ["run", "table"]

FRAMES_A_SECOND = 50
CLIP_SECONDS = (3, 6, 9, 12, 18, 21, 27, 30)
# Largest difference over largest value, by dtype: in the narrow ones both round at every operation.
TOLERANCE = {"float32": 1e-4, "float16": 2e-2, "bfloat16": 1e-1}


def run(*, layers: int, rounds: int, threads: int | None, device: str = "cpu", dtype: str = "float32", out: Path) -> str:
    """Measure, write the result file, and return its table."""
    if threads is not None:
        torch.set_num_threads(threads)
    ours, reference = (one.to(device, getattr(torch, dtype)) for one in _encoders(layers))
    lengths = [seconds * FRAMES_A_SECOND for seconds in CLIP_SECONDS]
    batch = torch.randn(len(lengths), max(lengths), ours.config.input_dim).to(device, getattr(torch, dtype))
    lone = batch[-1:]
    with torch.inference_mode():
        _check_agreement(ours, reference, batch, lengths, TOLERANCE[dtype])
        measurements = [
            _measure(f"one clip of {CLIP_SECONDS[-1]} s", ours, reference, lone, [lengths[-1]], rounds),
            _measure(f"{len(lengths)} clips of {CLIP_SECONDS[0]} to {CLIP_SECONDS[-1]} s", ours, reference, batch, lengths, rounds),
        ]
    if device != "cpu":
        with graphs.side_stream():
            rate = graphs.matmul_rate(getattr(torch, dtype))
        measurements = [one | _share(one, rate) for one in measurements]
    shape = {"layers": layers, "hidden_dim": ours.config.hidden_dim, "clip_seconds": list(CLIP_SECONDS), "dtype": dtype}
    described = results.describe_run()
    if device != "cpu":
        described["machine"] = torch.cuda.get_device_name(device)
    result = {"kind": "encoder", "run": described, "shape": shape, "rounds": rounds, "measurements": measurements}
    file = results.write(out, "encoder", result)
    return f"{table(result)}\n\n{file}"


def _encoders(layers: int) -> tuple[torch.nn.Module, torch.nn.Module]:
    from transformers import GraniteSpeechEncoderConfig as ReferenceConfig
    from transformers.models.granite_speech.modeling_granite_speech import GraniteSpeechCTCEncoder as Reference

    torch.manual_seed(0)
    shape = {"num_layers": layers, "output_dim": 348}
    reference = Reference(ReferenceConfig(**shape)).eval()
    ours = GraniteSpeechCTCEncoder(GraniteSpeechEncoderConfig(**shape)).eval()
    ours.load_state_dict(reference.state_dict())
    return ours, reference


def _check_agreement(ours: torch.nn.Module, reference: torch.nn.Module, batch: torch.Tensor, lengths: list[int], allowed: float) -> None:
    """Each clip of the packed batch against transformers' encoder on that clip alone: two short clips and the longest."""
    packed = ours(batch, lengths).last_hidden_state
    for clip in (0, 1, len(lengths) - 1):
        alone = reference(batch[clip : clip + 1, : lengths[clip]]).last_hidden_state
        error = float((packed[clip, : lengths[clip]] - alone[0]).abs().max() / alone.abs().max())
        if not error <= allowed:
            raise SystemExit(f"clip {clip} differs from transformers by {error:.1e} (allowed {allowed:.0e}): nothing is measured")


def _measure(
    what: str, ours: torch.nn.Module, reference: torch.nn.Module, batch: torch.Tensor, lengths: list[int], rounds: int
) -> dict[str, Any]:
    seconds, reference_seconds, multiply_seconds = [], [], []
    turns = [(seconds, lambda: ours(batch, lengths)), (reference_seconds, lambda: reference(batch))]
    weight = ours.layers[0].ff1.up_proj.weight
    if batch.device.type == "cpu":
        frames = torch.randn(sum(lengths), weight.shape[1]).to(weight.dtype)
        turns.append((multiply_seconds, lambda: torch.nn.functional.linear(frames, weight)))
    for number in range(rounds + 1):
        # In alternating order, so that neither always finds what the other has left in the caches and the allocator.
        for series, call in turns if number % 2 else reversed(turns):
            one = _time(call)
            if number > 0:  # the first round finds memory and code cold
                series.append(one)
    ratios = [theirs / mine for mine, theirs in zip(seconds, reference_seconds, strict=True)]
    measured = {
        "what": what,
        "audio_seconds": sum(lengths) / FRAMES_A_SECOND,
        "seconds": statistics.median(seconds),
        "reference_seconds": statistics.median(reference_seconds),
        "ratio": statistics.median(ratios),
        "ratios": [round(one, 4) for one in ratios],
        "matmul_flops": _matmul_flops(ours, sum(lengths)),
    }
    if multiply_seconds:
        measured |= _share(measured, 2 * sum(lengths) * weight.numel() / statistics.median(multiply_seconds))
    return measured


def _share(measured: dict[str, Any], rate: float) -> dict[str, float]:
    """Which part of the measured time the matrix products would take at this rate."""
    return {"machine_matmul_flops_a_second": rate, "matmul_share": measured["matmul_flops"] / measured["seconds"] / rate}


def _matmul_flops(encoder: torch.nn.Module, frames: int) -> float:
    """Floating-point operations of the projections, two for each multiply and add; attention and convolution not counted."""
    weights = sum(one.numel() for name, one in encoder.named_parameters() if one.dim() > 1 and not name.endswith("rel_pos_emb.weight"))
    depthwise = sum(one.numel() for name, one in encoder.named_parameters() if "depth_conv" in name)
    return 2.0 * frames * (weights - depthwise)


def _time(call: Callable[[], object]) -> float:
    _wait()
    start = time.perf_counter()
    call()
    _wait()
    return time.perf_counter() - start


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def table(result: dict[str, Any]) -> str:
    """Markdown of one run."""
    run, shape = result["run"], result["shape"]
    versions = ", ".join(f"{name} {run['versions'][name]}" for name in ("torch", "transformers"))
    head = (
        f"Encoder, {shape['layers']} x {shape['hidden_dim']}, {shape['dtype']}: {run['machine']}, {run['threads']} threads, {versions}, "
        f"commit {run['commit'][:8]}, median of {result['rounds']}:"
    )
    rows = ["| what | here | transformers | ratio | share of the matmul rate |", "|---|---|---|---|---|"]
    for one in result["measurements"]:
        share = f"{one['matmul_share']:.0%}" if "matmul_share" in one else "–"
        times = [results.time_text(one[name]) for name in ("seconds", "reference_seconds")]
        rows.append(f"| {one['what']} | {times[0]} | {times[1]} | {one['ratio']:.2f}x | {share} |")
    return "\n".join([head, "", *rows])
