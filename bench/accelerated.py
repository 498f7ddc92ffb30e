"""What `granite_speech.accelerate` gains: transformers' model as it is, accelerated, and our own class, in turns in one run.

The bundled checkpoint on a CPU, on one clip and on a batch of unequal clips. All get the same features and prompts; our own class also
gets the clips' lengths, so it alone leaves padding out. Nothing is timed unless all give the same ids, and the accelerated model what
transformers' gives. The part for a GPU is in `bench/accelerated_gpu.py`.
"""

import statistics
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import permutations
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from bench import results
from bench.embedded import NEW_TOKENS, RATE, recorded_clips
from bench.encoder import seconds_of
from granite_speech import AccelerationWarning, GraniteSpeechForConditionalGeneration, GraniteSpeechProcessor, accelerate
from granite_speech.checkpoints.hub import EMBEDDED_FOLDER
from granite_speech.inputs.requests import transcript_request

__all__ = ["check_close", "run", "runs_here", "table", "time_in_turns", "without_their_loop"]

BATCH = 8
# Relative to the largest value, in float32.
TOLERANCE = 1e-4

Inputs = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Job:
    """What is timed.

    Attributes:
        what: as the table names it.
        call: takes a model and its inputs; what it returns is checked.
        clips: how many.
        trains: whether it is a training step.
    """

    what: str
    call: Callable[[Any, Inputs], torch.Tensor]
    clips: int
    trains: bool = False


def run(*, rounds: int, threads: int | None, out: Path) -> str:
    """Measure, write the result file, and return its table."""
    if threads is not None:
        torch.set_num_threads(threads)
    clips, models = recorded_clips()[0][:BATCH], _models()
    inputs = {count: _inputs(clips[:count]) for count in {job.clips for job in JOBS}}
    measurements = []
    for job in JOBS:
        for model in models.values():
            model.train(job.trains)
        calls = {name: partial(_call, job, model, inputs[job.clips][name]) for name, model in models.items()}
        with runs_here():
            _check(job, models, calls)
            measurements.append(time_in_turns(job.what, calls, rounds))
    shape = {"model": "bundled checkpoint", "dtype": "float32", "clip_seconds": [len(clip) / RATE for clip in clips]}
    result = {"kind": "accelerated", "run": results.describe_run(), "shape": shape, "rounds": rounds, "measurements": measurements}
    file = results.write(out, "accelerated", result)
    return f"{table(result)}\n\n{file}"


def _models() -> dict[str, Any]:
    import transformers

    theirs, live = (transformers.AutoModelForSpeechSeq2Seq.from_pretrained(str(EMBEDDED_FOLDER)) for _ in range(2))
    ours = GraniteSpeechForConditionalGeneration.from_pretrained("embedded")
    # In training everything is trained: transformers freezes a checkpoint with an adapter.
    return {
        name: model.requires_grad_(True) for name, model in (("transformers", theirs), ("accelerated", accelerate(live)), ("ours", ours))
    }


def _inputs(clips: list[torch.Tensor]) -> dict[str, Inputs]:
    """Of each model: transformers' features and prompts."""
    import transformers

    processor, own = transformers.AutoProcessor.from_pretrained(str(EMBEDDED_FOLDER)), GraniteSpeechProcessor.from_pretrained("embedded")
    request = [transcript_request(own)] * len(clips)
    theirs, lengths = dict(processor(request, clips, return_tensors="pt")), own(request, clips)["input_features_lengths"]
    return {"transformers": theirs, "accelerated": theirs, "ours": theirs | {"input_features_lengths": lengths}}


def _encode(model: Any, inputs: Inputs) -> torch.Tensor:
    features = {name: one for name, one in inputs.items() if name in ("input_features", "input_features_lengths")}
    return model.get_audio_features(**features).pooler_output


def _forward(model: Any, inputs: Inputs) -> torch.Tensor:
    return model(**inputs).logits


def _generate(model: Any, inputs: Inputs) -> torch.Tensor:
    return model.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False)


def _training_step(model: Any, inputs: Inputs) -> torch.Tensor:
    """Loss of all text, and its gradients."""
    model.zero_grad()
    ids = inputs["input_ids"]
    is_text = inputs["attention_mask"].bool() & (ids != model.config.audio_token_index)
    loss = model(**inputs, labels=ids.masked_fill(~is_text, -100)).loss
    loss.backward()
    return loss.detach()


JOBS = (
    Job(f"encoder and projector, {BATCH} clips", _encode, BATCH),
    Job(f"forward, {BATCH} clips", _forward, BATCH),
    Job("generate, 1 clip", _generate, 1),
    Job(f"generate, {BATCH} clips", _generate, BATCH),
    # The last one: it changes the running statistics of the encoder's norms.
    Job(f"training step, {BATCH} clips", _training_step, BATCH, trains=True),
)


def _call(job: Job, model: Any, inputs: Inputs) -> torch.Tensor:
    with torch.set_grad_enabled(job.trains):
        return job.call(model, inputs)


def _check(job: Job, models: dict[str, Any], calls: dict[str, Callable[[], torch.Tensor]]) -> None:
    """Compare the results, and the gradients of a training step.

    Vectors, logits and losses of our own class are not compared: those of transformers depend on padding, and its logits are not divided
    by `logits_scaling`.
    """
    found = {"transformers": calls["transformers"](), "ours": calls["ours"]()}
    with without_their_loop():
        found["accelerated"] = calls["accelerated"]()
    theirs = found["transformers"]
    if theirs.is_floating_point():
        check_close(job.what, found["accelerated"], theirs, TOLERANCE)
    elif not torch.equal(found["ours"], theirs) or not torch.equal(found["accelerated"], theirs):
        raise SystemExit(f"{job.what}: other ids than in transformers, so nothing was timed")
    if job.trains:
        live = dict(models["accelerated"].named_parameters())
        gradients = [(live[name].grad, one.grad) for name, one in models["transformers"].named_parameters() if one.grad is not None]
        check_close(f"{job.what}: gradients", *(torch.cat([one.flatten() for one in side]) for side in zip(*gradients, strict=True)), 1e-3)


def check_close(what: str, ours: torch.Tensor, theirs: torch.Tensor, tolerance: float) -> None:
    """Raises SystemExit if the largest difference over the largest value is more than the tolerance."""
    error = float((ours.float() - theirs.float()).abs().max() / theirs.float().abs().max())
    if not error <= tolerance:
        raise SystemExit(f"{what}: differs from transformers by {error:.1e} (allowed: {tolerance:.0e}), so nothing was timed")


@contextmanager
def runs_here() -> Iterator[None]:
    """An accelerated model raises if a part of it runs as transformers wrote it."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", AccelerationWarning)
        yield


@contextmanager
def without_their_loop() -> Iterator[None]:
    """`generate` of an accelerated model ends the run if it calls transformers' loop, which it does without a warning."""
    refusal = SystemExit("generate was not accelerated, so nothing was timed")
    with patch("transformers.GenerationMixin.generate", side_effect=refusal):
        yield


def time_in_turns(what: str, calls: dict[str, Callable[[], Any]], rounds: int) -> dict[str, Any]:
    """Median seconds of each call, and how many times as fast as transformers it is.

    Args:
        what: is timed.
        calls: by system, "transformers" among them; called before, so that none is slow the first time.
        rounds: in each, the calls are made in every order, so that each follows each other one equally often.
    """
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for order in permutations(calls):
            for name in order:
                seconds[name].append(seconds_of(calls[name]))
    theirs = seconds["transformers"]
    ratios = {
        name: [reference / own for own, reference in zip(one, theirs, strict=True)]
        for name, one in seconds.items()
        if name != "transformers"
    }
    return {
        "what": what,
        "timings": len(theirs),
        "seconds": {name: statistics.median(one) for name, one in seconds.items()},
        "ratio": {name: statistics.median(one) for name, one in ratios.items()},
        "ratios": {name: [round(ratio, 4) for ratio in one] for name, one in ratios.items()},
    }


def table(result: dict[str, Any]) -> str:
    """Markdown of one run, on a CPU or a GPU."""
    run, shape, measurements = result["run"], result["shape"], result["measurements"]
    versions = ", ".join(f"{name} {run['versions'][name]}" for name in ("torch", "transformers"))
    seconds = shape["clip_seconds"]
    titles = ["input", "transformers", "accelerated", "speedup", "our class", "speedup"]
    is_gpu = any("peak_extra_GB" in one or "equal_ids" in one for one in measurements)
    titles += ["equal ids", "memory above the weights, GB"] if is_gpu else []
    lines = [
        f"`accelerate`, {shape['model']}, {shape['dtype']}, clips of "
        f"{'' if min(seconds) == max(seconds) else f'{min(seconds):.1f} to '}{max(seconds):.1f} s: {run['machine']}, {run['threads']} "
        f"thread{'s' * (run['threads'] > 1)}, {versions}, commit {run['commit'][:8]}, median of {measurements[0]['timings']} in turns:",
        "",
        f"| {' | '.join(titles)} |",
        "|---" * len(titles) + "|",
    ]
    return "\n".join([*lines, *(f"| {' | '.join(_cells(one, is_gpu))} |" for one in measurements)])


def _cells(measured: dict[str, Any], is_gpu: bool) -> list[str]:
    cells = [measured["what"], results.time_text(measured["seconds"]["transformers"])]
    for name in ("accelerated", "ours"):
        cells += [results.time_text(measured["seconds"][name]), f"{measured['ratio'][name]:.2f}x"]
    if is_gpu:
        equal, memory = measured.get("equal_ids"), measured.get("peak_extra_GB")
        cells.append(" / ".join(f"{equal[name]:.0%}" for name in ("accelerated", "ours")) if equal else "–")
        cells.append(" / ".join(f"{memory[name]:.2f}" for name in ("transformers", "accelerated", "ours")) if memory else "–")
    return cells
