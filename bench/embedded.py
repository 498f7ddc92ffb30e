"""The bundled checkpoint on a CPU, from waveforms to text, in every dtype here and in transformers, in turns.

Twelve clips one by one, as one batch, and as a batch with each clip four times: processor, `generate` and decoding of the tokens. Nothing
is timed unless all give the same words. Next to the times stand the floors (the time that the matrix products of our runs take alone) and
what the rest of our time in the fastest dtype goes into.
"""

import json
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import soundfile
import torch

from bench.products import Products
from bench.turns import REFERENCES, SYSTEMS, compared, fastest, seconds_in_turns, torch_dtype
from granite_speech import GraniteSpeechForConditionalGeneration, GraniteSpeechProcessor
from granite_speech.checkpoints.hub import EMBEDDED_FOLDER
from granite_speech.inputs.requests import transcript_request

__all__ = ["in_transformers", "measure", "ours", "profile_of", "recorded_clips"]

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


def measure(rounds: int, systems: tuple[str, ...] = SYSTEMS) -> dict[str, Any]:
    """Seconds of each system, and the floors of ours.

    Raises:
        SystemExit: a system gives other words; nothing more is timed.
    """
    clips, words = recorded_clips()
    transcribers = {system: _transcriber_of(system) for system in systems}
    jobs = {
        f"{len(clips)} clips, one by one": [[clip] for clip in clips],
        f"{len(clips)} clips in a batch": [clips],
        f"{4 * len(clips)} clips in a batch": [clips * 4],
    }
    measurements = []
    for what, batches in jobs.items():
        expected = words * (sum(map(len, batches)) // len(clips))
        for system, transcribe in transcribers.items():
            _check_words(f"{what}: {system}", _transcribe_all(transcribe, batches), expected)
        measurements.append({"what": what} | _measure(batches, transcribers, rounds))
    return {"clips": len(clips), "audio_seconds": sum(map(len, clips)) / RATE, "measurements": measurements}


def recorded_clips() -> tuple[list[torch.Tensor], list[str]]:
    """Waveforms `(samples,)` of tests/speech at 16 kHz, and their words."""
    entries = [json.loads(line) for line in (SPEECH / "manifest.jsonl").read_text().splitlines()]
    clips = [soundfile.read(SPEECH / one["audio"], dtype="float32") for one in entries]
    assert {rate for _, rate in clips} == {RATE}
    return [torch.from_numpy(samples) for samples, _ in clips], [one["text"] for one in entries]


def _transcriber_of(system: str) -> Transcribe:
    if system in REFERENCES:
        return in_transformers(torch_dtype(system))
    model, processor = ours(system), GraniteSpeechProcessor.from_pretrained("embedded")
    return _transcriber(model, processor, transcript_request(processor), {})


def ours(system: str) -> GraniteSpeechForConditionalGeneration:
    """The bundled checkpoint in the dtype of a system of `bench.turns`."""
    quantize = "int8" if system == "ours int8" else None
    return GraniteSpeechForConditionalGeneration.from_pretrained("embedded", dtype=torch_dtype(system), quantize=quantize).eval()


def in_transformers(dtype: torch.dtype = torch.float32) -> Transcribe:
    """Processor, `generate` and decoding of the tokens, in transformers."""
    import transformers

    model = transformers.AutoModelForSpeechSeq2Seq.from_pretrained(str(EMBEDDED_FOLDER), dtype=dtype).eval()
    processor = transformers.AutoProcessor.from_pretrained(str(EMBEDDED_FOLDER))
    request = transcript_request(GraniteSpeechProcessor.from_pretrained("embedded"))
    return _transcriber(model, processor, request, {"return_tensors": "pt"})


def _transcriber(model: Any, processor: Any, request: str, options: dict[str, str]) -> Transcribe:
    @torch.no_grad()
    def transcribe(clips: list[torch.Tensor]) -> list[str]:
        inputs = processor([request] * len(clips), clips, **options).to(model.dtype)
        ids = model.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False)
        return processor.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)

    return transcribe


def _check_words(what: str, texts: list[str], expected: list[str]) -> None:
    wrong = [(right, text) for right, text in zip(expected, texts, strict=True) if right != text]
    if wrong:
        raise SystemExit(f"{what}: {wrong[0][0]!r} became {wrong[0][1]!r}, so nothing was timed")


def _measure(batches: list[list[torch.Tensor]], transcribers: dict[str, Transcribe], rounds: int) -> dict[str, Any]:
    calls = {system: partial(_transcribe_all, transcribe, batches) for system, transcribe in transcribers.items()}
    taken = seconds_in_turns(calls, rounds)
    floors = {system: _floor(call) for system, call in calls.items() if system not in REFERENCES}
    # One batch is enough, and the profiler takes seconds to sort the events of each clip.
    profiled = partial(_transcribe_all, transcribers[f"ours {fastest()}"], batches[:1])
    return compared(taken, [one for one in REFERENCES if one in calls]) | {"floors": floors, "profile": profile_of(profiled)}


def _floor(call: Callable[[], Any]) -> dict[str, float]:
    with Products() as products:
        call()
    seconds = products.seconds()
    return {"matmul_flops": products.flops, "matmul_flops_a_second": products.flops / seconds, "seconds": seconds}


def _transcribe_all(transcribe: Transcribe, batches: list[list[torch.Tensor]]) -> list[str]:
    return [text.strip() for batch in batches for text in transcribe(batch)]


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
