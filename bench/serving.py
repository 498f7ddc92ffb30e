"""Requests under load: one `Engine` on the bundled checkpoint and a CPU, and transformers in batches, from waveforms to text, in one run.

The twelve recorded clips and pairs of them arrive at random times, faster than either can answer them, so that throughput is measured
and not the schedule. Then they arrive at half of what the engine can answer, for its latency. Nothing is timed unless both give the
right words, and every timed answer is checked too. The part for a GPU is in `bench/serving_gpu.py`.
"""

import random
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from bench import embedded, prefix_sharing, results
from bench.embedded import RATE, recorded_clips
from bench.load import Load, Served, compare, counted, figures, serve_in_batches, serve_in_engine
from granite_speech import Engine, GraniteSpeechForConditionalGeneration, GraniteSpeechProcessor

__all__ = ["run", "table"]

# Clips of tests/speech joined in pairs, up to 3.6 s: a sample of those whose words both transcribe. The checkpoint has learnt from
# clips of up to 4 s.
PAIRS = (
    *((0, 7), (0, 8), (1, 0), (1, 2), (1, 3), (1, 4), (2, 3), (2, 5), (2, 7), (2, 8), (3, 0), (3, 1)),
    *((3, 5), (3, 7), (4, 0), (4, 2), (4, 3), (4, 5), (4, 6), (4, 8), (5, 0), (5, 1), (5, 3), (6, 5)),
    *((7, 0), (7, 1), (7, 3), (7, 4), (7, 5), (8, 0), (8, 1), (8, 4), (10, 1), (10, 2), (10, 7), (10, 8)),
)
BATCH = 12
# Offered load: this many times what transformers can answer, and this part of what the engine can.
OVERLOAD, LIGHT = 6, 0.5
NEW_TOKENS = embedded.NEW_TOKENS

Serve = Callable[[Load], Served]


def run(*, rounds: int, threads: int | None, out: Path) -> str:
    """Measure, write the result file, and return its table."""
    if threads is not None:
        torch.set_num_threads(threads)
    clips, words = requests()
    model, processor = (one.from_pretrained("embedded") for one in (GraniteSpeechForConditionalGeneration, GraniteSpeechProcessor))
    ours, reference = _ours(model.eval(), processor, clips, words), _reference(clips, words)
    seconds = [len(clip) / RATE for clip in clips]
    at_once = Load.at_once(seconds)
    for serve in (ours, reference):
        serve(at_once)  # checks the words
    capacity = statistics.median(figures(at_once, reference(at_once))["audio_a_second"] for _ in range(3))
    measurements = []

    def measure(what: str, rate: float, systems: dict[str, Serve]) -> dict[str, Any]:
        measurements.append({"what": what, "offered_a_second": rate} | compare(Load.over_time(seconds, rate), systems, rounds))
        return measurements[-1]

    loaded = measure(f"{OVERLOAD} times what transformers can do", OVERLOAD * capacity, {"ours": ours, "reference": reference})
    measure("half of what the engine can do", LIGHT * loaded["ours"]["audio_a_second"], {"ours": ours})
    result = {
        "kind": "serving",
        "run": results.describe_run(),
        "shape": {
            "model": "bundled checkpoint, from waveform to text",
            "dtype": "float32",
            "requests": len(clips),
            "audio_seconds": seconds,
            "reference": f"transformers in batches of {BATCH}",
            "reference_capacity": capacity,
        },
        "rounds": rounds,
        "measurements": measurements,
        "prefix_sharing": prefix_sharing.measure(),
    }
    file = results.write(out, "serving", result)
    return f"{table(result)}\n\n{file}"


def requests() -> tuple[list[torch.Tensor], list[str]]:
    """Waveforms `(samples,)` at 16 kHz, and their words, in a random order that is always the same."""
    clips, words = recorded_clips()
    both = [*zip(clips, words, strict=True)]
    both += [(torch.cat((clips[first], clips[second])), f"{words[first]} {words[second]}") for first, second in PAIRS]
    random.Random(0).shuffle(both)
    return [clip for clip, _ in both], [text for _, text in both]


def _ours(model: Any, processor: Any, clips: list[torch.Tensor], words: list[str]) -> Serve:
    def serve(load: Load) -> Served:
        # A new engine each time: the OpenMP threads of one that exists would slow transformers down.
        with Engine(model, processor) as engine:

            def submit(number: int) -> Any:
                return engine.submit(audio=clips[number], max_new_tokens=NEW_TOKENS)

            serve_in_engine(Load.at_once(load.audio_seconds[:BATCH]), submit)  # makes what a running engine has
            before = engine.counters()
            served = serve_in_engine(load, submit)
        check_words("here", words, [answer.text for answer in served.answers])
        return Served(served.answers, served.completions, counted(before, engine.counters()))

    return serve


def _reference(clips: list[torch.Tensor], words: list[str]) -> Serve:
    transcribe = embedded.in_transformers()

    def serve(load: Load) -> Served:
        served = serve_in_batches(load, lambda batch: transcribe([clips[number] for number in batch]), BATCH)
        check_words("in transformers", words, served.answers)
        return served

    return serve


def check_words(where: str, expected: list[str], heard: list[str]) -> None:
    """Raises SystemExit for the first wrong text."""
    for right, text in zip(expected, heard, strict=True):
        if text.strip() != right:
            raise SystemExit(f"{where} {right!r} became {text.strip()!r}, so nothing was written")


def table(result: dict[str, Any]) -> str:
    """Markdown of one run, on a CPU or a GPU."""
    run, shape = result["run"], result["shape"]
    versions = ", ".join(f"{name} {run['versions'][name]}" for name in ("torch", "transformers"))
    seconds = shape["audio_seconds"]
    lines = [
        f"Serving, {shape['model']}, {shape['dtype']}: {shape['requests']} requests of {min(seconds):.1f} to {max(seconds):.1f} s "
        f"({sum(seconds):,.0f} s); {run['machine']}, {run['threads']} thread{'s' * (run['threads'] > 1)}, "
        f"{versions}, commit {run['commit'][:8]}, median of {result['rounds']}; latency from arrival to completion, short: below the "
        "median length:",
        "",
        "| offered load | | seconds of audio per second | speedup | latency p50 / p95 | of short requests | rows per step "
        "| encode / prefill / decode |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for one in result["measurements"]:
        for name, title in (("ours", "`Engine`"), ("reference", shape["reference"])):
            if name in one:
                lines.append(f"| {one['what']} | {title} | {_cells(one[name], one.get('ratio') if name == 'ours' else None)} |")
    if "prefix_sharing" in result:
        lines += ["", prefix_sharing.table(result["prefix_sharing"])]
    return "\n".join(lines)


def _cells(found: dict[str, Any], ratio: float | None) -> str:
    latencies = [f"{results.time_text(found[f'{of}p50_s'])} / {results.time_text(found[f'{of}p95_s'])}" for of in ("", "short_")]
    rows = stages = "–"
    if "counters" in found:
        counters = found["counters"]
        rows = f"{counters['rows_a_step']:.1f}"
        stages = " / ".join(results.time_text(counters["seconds"][stage]) for stage in ("encode", "prefill", "decode"))
    speed, speedup = f"{found['audio_a_second']:,.0f}", "–" if ratio is None else f"{ratio:.2f}x"
    return " | ".join([speed, speedup, *latencies, rows, stages])
