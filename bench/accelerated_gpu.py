"""What `granite_speech.accelerate` gains on a GPU: a released shape with random weights, the same in all three models.

With random weights two ids may score nearly the same, so answers may differ in float16 and bfloat16. Nothing is timed unless every id
of every answer is within rounding of the best by transformers' own forward pass; the share of equal ids is in the result.
"""

import copy
import gc
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bench import results, shapes
from bench.accelerated import check_close, runs_here, table, time_in_turns, without_their_loop
from bench.encoder import TOLERANCE
from granite_speech import accelerate
from granite_speech.interop.accelerate import Acceleration

__all__ = ["run"]

NAME, CLIPS, NEW_TOKENS = "4.1-2b", (1, 16), 40
ROUNDS = 1  # of six orders
PAD, END = 0, 1

Models = dict[str, Any]
Inputs = dict[str, torch.Tensor]


@dataclass(frozen=True)
class _Calls:
    """What is timed: encoder and projector, and `generate` with a number of new tokens."""

    encode: Callable[[], torch.Tensor]
    generate: Callable[[int], torch.Tensor]


def run(*, device: str, dtype: str, out: Path, name: str = NAME, clips: tuple[int, ...] = CLIPS, new_tokens: int = NEW_TOKENS) -> str:
    """Measure, write the result file after each number of clips, and return its table."""
    models = _models(name, torch.device(device), getattr(torch, dtype))
    described, on_gpu = results.describe_run(), device != "cpu"
    if on_gpu:
        described["machine"] = torch.cuda.get_device_name(device)
    what = f"{name} with random weights, {new_tokens} new tokens"
    shape = {"model": what, "dtype": dtype, "clip_seconds": [float(shapes.CLIP_SECONDS)], "new_tokens": new_tokens}
    result: dict[str, Any] = {"kind": "accelerated", "run": described, "shape": shape, "rounds": ROUNDS, "measurements": []}
    for count in clips:
        inputs = _inputs(name, count, device, getattr(torch, dtype))
        label = f"{count} clip{'s' * (count > 1)}"
        # Accelerated for each number of clips, so that the graphs and pages of another one are not in its memory.
        with accelerate(models["accelerated"]), runs_here(), torch.no_grad():
            result["measurements"] += _measure(label, models, inputs, new_tokens, TOLERANCE[dtype], on_gpu)
        models["ours"].runtime.clear()
        file = results.write(out, "accelerated", result)
    return f"{table(result)}\n\n{file}"


def _models(name: str, device: torch.device, dtype: torch.dtype) -> Models:
    import transformers

    torch.manual_seed(0)
    config = transformers.GraniteSpeechConfig(**shapes.configuration(name), has_lora_adapter=False)
    with shapes.default_dtype(dtype), device:
        theirs = transformers.GraniteSpeechForConditionalGeneration(config).eval()
    ours = shapes.build(name, adapter=False, device=device, dtype=dtype)
    ours.load_state_dict(theirs.state_dict())
    return {"transformers": theirs, "accelerated": copy.deepcopy(theirs), "ours": ours}


def _inputs(name: str, clips: int, device: str, dtype: torch.dtype) -> Inputs:
    batch = shapes.request(name, clips)
    audio = int((batch["input_ids"][0] == shapes.RELEASED[name]["audio_token_index"]).sum())
    batch["input_features_mask"] = torch.ones(clips, audio, dtype=torch.bool)
    return {name: one.to(device, dtype if one.is_floating_point() else None) for name, one in batch.items()}


def _calls(model: Any, inputs: Inputs) -> _Calls:
    def generate(count: int) -> torch.Tensor:
        # An end token is never chosen, so that all answers have the same length.
        options = {"do_sample": False, "pad_token_id": PAD, "eos_token_id": END}
        return model.generate(**inputs, max_new_tokens=count, min_new_tokens=count, **options)

    return _Calls(lambda: model.get_audio_features(inputs["input_features"]).pooler_output, generate)


def _measure(label: str, models: Models, inputs: Inputs, new_tokens: int, tolerance: float, on_gpu: bool) -> list[dict[str, Any]]:
    """Encoder and projector, first token, decode step and whole run of one batch."""
    calls = {name: _calls(model, inputs) for name, model in models.items()}
    peaks = {name: _warm_up(one, new_tokens, on_gpu) for name, one in calls.items()}
    if on_gpu:
        _check_captured(models["accelerated"])
    with without_their_loop():
        answers = {"accelerated": calls["accelerated"].generate(new_tokens)}
    answers |= {name: calls[name].generate(new_tokens) for name in ("transformers", "ours")}
    vectors = calls["transformers"].encode()
    for name in ("accelerated", "ours"):
        check_close(f"audio vectors, {name}", calls[name].encode(), vectors, tolerance)
        _check_ids(f"ids, {name}", models["transformers"], inputs, answers[name], tolerance)

    def timed(what: str, call: Callable[[_Calls], Any]) -> dict[str, Any]:
        return time_in_turns(f"{what}, {label}", {name: lambda one=one: call(one) for name, one in calls.items()}, ROUNDS)

    encoder = timed("encoder and projector", lambda one: one.encode())
    first, whole = (timed(what, lambda one, n=n: one.generate(n)) for what, n in (("first token", 1), ("whole run", new_tokens)))
    whole["equal_ids"] = {name: float((answers[name] == answers["transformers"])[:, -new_tokens:].float().mean()) for name in answers}
    if on_gpu:
        whole["peak_extra_GB"] = peaks
    return [encoder, first, _decode_step(label, first, whole, new_tokens), whole]


def _warm_up(calls: _Calls, new_tokens: int, on_gpu: bool) -> float:
    """Call everything until nothing more is compiled or captured; returns the peak memory above what was in use, in GB."""
    gc.collect()  # graphs of another batch
    before = torch.cuda.memory_allocated() if on_gpu else 0
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    calls.encode()
    # What the first call of a size asks for is captured at the start of the next one.
    for count in (new_tokens, new_tokens, 1, 1):
        calls.generate(count)
    return (torch.cuda.max_memory_allocated() - before) / 1e9 if on_gpu else 0.0


def _check_captured(live: Any) -> None:
    acceleration = next(one for one in vars(live).values() if isinstance(one, Acceleration))
    if len(acceleration.twin.runtime.decoder_graphs) == 0:
        raise SystemExit("the accelerated model captured nothing, so nothing was timed")


def _check_ids(what: str, theirs: Any, inputs: Inputs, answers: torch.Tensor, tolerance: float) -> None:
    """Compare the score of each new id with the best one in transformers' forward pass over the whole answer."""
    new_tokens = answers.shape[1] - inputs["input_ids"].shape[1]
    mask = torch.ones_like(answers)
    logits = theirs(**inputs | {"input_ids": answers, "attention_mask": mask}, logits_to_keep=new_tokens + 1).logits[:, :-1].float()
    logits[..., END] = logits.amin()
    chosen = logits.gather(-1, answers[:, -new_tokens:, None])
    check_close(what, chosen, logits.amax(-1, keepdim=True), tolerance)


def _decode_step(label: str, first: dict[str, Any], whole: dict[str, Any], new_tokens: int) -> dict[str, Any]:
    """What a whole run takes after its first token, by step."""
    seconds = {name: (one - first["seconds"][name]) / (new_tokens - 1) for name, one in whole["seconds"].items()}
    ratio = {name: seconds["transformers"] / one for name, one in seconds.items() if name != "transformers"}
    return {"what": f"decode step, {label}", "timings": whole["timings"], "seconds": seconds, "ratio": ratio}
