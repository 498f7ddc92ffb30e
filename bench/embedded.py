"""The bundled checkpoint on a CPU, from waveforms to text, here and in transformers in one run.

Twelve clips one by one, as one batch, and as a batch with each clip four times: processor, `generate` and decoding of the tokens. Nothing
is timed unless both give the same words. Next to the times stand the floor (the time that the matrix products of our run take alone) and
what the rest of our time goes into.
"""

import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import soundfile
import torch

from bench import results
from bench.products import Products
from granite_speech import GraniteSpeechForConditionalGeneration, GraniteSpeechProcessor
from granite_speech.checkpoints.hub import EMBEDDED_FOLDER
from granite_speech.inputs.requests import transcript_request

__all__ = ["in_transformers", "profile_of", "recorded_clips", "run", "table"]

SPEECH = Path(__file__).parents[1] / "tests" / "speech"
RATE = 16_000
NEW_TOKENS = 60
# Operations by what they are for. All others count as elementwise and other operations.
GROUPS = {
    "matrix products": ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm"),
    "attention": ("aten::_scaled_dot_product", "aten::_softmax"),
    "convolution": ("aten::mkldnn_convolution", "aten::_slow_conv", "aten::thnn_conv", "aten::_conv_depthwise"),
    "norms": ("aten::native_layer_norm", "aten::mean", "aten::rsqrt"),
    "copies and indexing": ("aten::copy_", "aten::cat", "aten::index", "aten::fill_", "aten::clone", "aten::gather", "aten::scatter"),
    "features": ("aten::_fft", "aten::stft"),
    "views and allocations": ("aten::empty", "aten::as_strided", "aten::view", "aten::slice", "aten::select", "aten::t", "aten::reshape"),
}

Transcribe = Callable[[list[torch.Tensor]], list[str]]


def run(*, rounds: int, threads: int | None, out: Path) -> str:
    """Measure, write the result file, and return its table."""
    if threads is not None:
        torch.set_num_threads(threads)
    clips, words = recorded_clips()
    ours, theirs = _ours(), in_transformers()
    jobs = {
        f"{len(clips)} clips, one by one": [[clip] for clip in clips],
        f"{len(clips)} clips in a batch": [clips],
        f"{4 * len(clips)} clips in a batch": [clips * 4],
    }
    measurements = []
    for what, batches in jobs.items():
        expected = words * (sum(map(len, batches)) // len(clips))
        _check_words(what, batches, expected, ours, theirs)
        measurements.append({"what": what} | _measure(batches, ours, theirs, rounds))
    shape = {"model": "embedded", "dtype": "float32", "clips": len(clips), "audio_seconds": sum(map(len, clips)) / RATE}
    result = {"kind": "embedded-cpu", "run": results.describe_run(), "shape": shape, "rounds": rounds, "measurements": measurements}
    file = results.write(out, "embedded-cpu", result)
    return f"{table(result)}\n\n{file}"


def recorded_clips() -> tuple[list[torch.Tensor], list[str]]:
    """Waveforms `(samples,)` of tests/speech at 16 kHz, and their words."""
    entries = [json.loads(line) for line in (SPEECH / "manifest.jsonl").read_text().splitlines()]
    clips = [soundfile.read(SPEECH / one["audio"], dtype="float32") for one in entries]
    assert {rate for _, rate in clips} == {RATE}
    return [torch.from_numpy(samples) for samples, _ in clips], [one["text"] for one in entries]


def _ours() -> Transcribe:
    model, processor = (one.from_pretrained("embedded") for one in (GraniteSpeechForConditionalGeneration, GraniteSpeechProcessor))
    return _transcriber(model.eval(), processor, transcript_request(processor), {})


def in_transformers() -> Transcribe:
    """Processor, `generate` and decoding of the tokens, in transformers."""
    import transformers

    model = transformers.AutoModelForSpeechSeq2Seq.from_pretrained(str(EMBEDDED_FOLDER)).eval()
    processor = transformers.AutoProcessor.from_pretrained(str(EMBEDDED_FOLDER))
    request = transcript_request(GraniteSpeechProcessor.from_pretrained("embedded"))
    return _transcriber(model, processor, request, {"return_tensors": "pt"})


def _transcriber(model: Any, processor: Any, request: str, options: dict[str, str]) -> Transcribe:
    @torch.no_grad()
    def transcribe(clips: list[torch.Tensor]) -> list[str]:
        inputs = processor([request] * len(clips), clips, **options)
        ids = model.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False)
        return processor.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)

    return transcribe


def _check_words(what: str, batches: list[list[torch.Tensor]], expected: list[str], ours: Transcribe, theirs: Transcribe) -> None:
    for name, transcribe in (("here", ours), ("in transformers", theirs)):
        heard = [text.strip() for batch in batches for text in transcribe(batch)]
        wrong = [(right, text) for right, text in zip(expected, heard, strict=True) if right != text]
        if wrong:
            raise SystemExit(f"{what}: {name} {wrong[0][0]!r} became {wrong[0][1]!r}, so nothing was timed")


def _measure(batches: list[list[torch.Tensor]], ours: Transcribe, theirs: Transcribe, rounds: int) -> dict[str, Any]:
    seconds: dict[str, list[float]] = {"ours": [], "reference": []}
    for number in range(rounds):
        # In alternating order, so that neither always finds the caches as the other left them.
        both = (("ours", ours), ("reference", theirs))
        for name, transcribe in both if number % 2 else reversed(both):
            start = time.perf_counter()
            _transcribe_all(transcribe, batches)
            seconds[name].append(time.perf_counter() - start)
    with Products() as products:
        _transcribe_all(ours, batches)
    mine, floor = statistics.median(seconds["ours"]), products.seconds()
    ratios = [reference / own for own, reference in zip(*seconds.values(), strict=True)]
    return {
        "seconds": mine,
        "reference_seconds": statistics.median(seconds["reference"]),
        "ratio": statistics.median(ratios),
        "ratios": [round(ratio, 4) for ratio in ratios],
        "matmul_flops": products.flops,
        "matmul_flops_a_second": products.flops / floor,
        "floor_seconds": floor,
        # One batch is enough, and the profiler takes seconds to sort the events of each clip.
        "profile": profile_of(lambda: _transcribe_all(ours, batches[:1])),
    }


def _transcribe_all(transcribe: Transcribe, batches: list[list[torch.Tensor]]) -> None:
    for batch in batches:
        transcribe(batch)


def profile_of(call: Callable[[], None]) -> dict[str, float]:
    """Share of the profiled time in each group of operations; "Python" is the time outside all operations."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], acc_events=True) as profiler:
        start = time.perf_counter()
        call()
        whole = time.perf_counter() - start
    seconds = dict.fromkeys([*GROUPS, "elementwise and other operations"], 0.0)
    for one in profiler.key_averages():
        if one.key.startswith("aten::"):
            group = next((name for name, starts in GROUPS.items() if one.key.startswith(starts)), "elementwise and other operations")
            seconds[group] += one.self_cpu_time_total / 1e6
    seconds["Python"] = max(0.0, whole - sum(seconds.values()))
    return {name: round(value / whole, 4) for name, value in sorted(seconds.items(), key=lambda item: -item[1])}


def table(result: dict[str, Any]) -> str:
    """Markdown of one run."""
    run, shape = result["run"], result["shape"]
    versions = ", ".join(f"{name} {run['versions'][name]}" for name in ("torch", "transformers"))
    lines = [
        f"Bundled checkpoint, {shape['clips']} clips ({shape['audio_seconds']:.0f} s) from waveform to text, {shape['dtype']}: "
        f"{run['machine']}, {run['threads']} thread{'s' * (run['threads'] > 1)}, {versions}, commit {run['commit'][:8]}, median of "
        f"{result['rounds']}; floor: our matrix products alone:",
        "",
        "| input | here | transformers | speedup | floor | where our time goes |",
        "|---|---|---|---|---|---|",
    ]
    for one in result["measurements"]:
        times = [results.time_text(one[name]) for name in ("seconds", "reference_seconds")]
        shares = ", ".join(f"{name} {share:.0%}" for name, share in list(one["profile"].items())[:4])
        lines.append(
            f"| {one['what']} | {times[0]} | {times[1]} | {one['ratio']:.2f}x | {results.time_text(one['floor_seconds'])} | {shares} |"
        )
    return "\n".join(lines)
