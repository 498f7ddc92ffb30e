"""Requests under load on a GPU: one `Engine` on a released shape with random weights, and our own `generate` in batches, in one run.

All requests arrive at once in both; then, for the engine's latency, at random times at a rate that it can hold. Features are on the
device before anything is timed. Random weights have no useful end token, so each answer has the length that was asked for, and `generate`
goes on to the longest one of its batch.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bench import results, shapes
from bench.load import Load, Served, compare, counted, serve_in_batches, serve_in_engine
from bench.serving import table
from granite_speech import Engine

__all__ = ["PLAN", "Plan", "Requests", "run"]

FRAMES_A_SECOND = shapes.FRAMES_A_SECOND
ROUNDS = 3
# Tokens before the audio, the same in all requests, and tokens after it.
BEFORE, AFTER = 45, 16
# Part of the engine's own throughput that is offered when requests arrive over time.
SUSTAINED = 0.8


@dataclass(frozen=True)
class Plan:
    """What to measure.

    Attributes:
        name: of the released shape.
        requests: how many.
        seconds: the shortest and the longest clip.
        new_tokens: the shortest and the longest answer.
        batch: requests of one call of `generate`.
    """

    name: str
    requests: int
    seconds: tuple[int, int]
    new_tokens: tuple[int, int]
    batch: int


PLAN = Plan("4.1-2b", requests=256, seconds=(3, 30), new_tokens=(40, 120), batch=128)


class Requests:
    """Requests of random content, and answers to them.

    Args:
        plan: how many, and of which sizes.
        model: whose prompts they are; on its device.
    """

    def __init__(self, plan: Plan, model: Any):
        self._model = model
        rng, tokens = random.Random(0), torch.Generator().manual_seed(0)
        width, index = model.config.encoder_config.input_dim, model.config.audio_token_index
        highest = min(index, model.config.text_config.vocab_size)
        shared = torch.randint(0, highest, (BEFORE,), generator=tokens)
        self.frames = [rng.randint(*(one * FRAMES_A_SECOND for one in plan.seconds)) for _ in range(plan.requests)]
        self.new_tokens = [rng.randint(*plan.new_tokens) for _ in range(plan.requests)]
        self._prompts = [
            torch.cat((shared, torch.full((model.projector.tokens(frames),), index), torch.randint(0, highest, (AFTER,), generator=tokens)))
            for frames in self.frames
        ]
        features = (torch.randn(frames, width, generator=tokens) for frames in self.frames)
        self._features = [one.to(model.device, model.dtype) for one in features]

    @property
    def seconds(self) -> list[float]:
        """Of audio, by request."""
        return [frames / FRAMES_A_SECOND for frames in self.frames]

    def submit(self, engine: Engine, number: int) -> Any:
        """Give one request to an engine."""
        inputs = {"input_ids": self._prompts[number].unsqueeze(0), "input_features": self._features[number].unsqueeze(0)}
        return engine.submit(inputs=inputs, max_new_tokens=self.new_tokens[number], eos_token_id=[])

    def generate(self, batch: Sequence[int]) -> list[list[int]]:
        """New tokens of these requests, each cut to its own length."""
        width = max(len(self._prompts[number]) for number in batch)
        pads = [width - len(self._prompts[number]) for number in batch]
        pad = torch.nn.functional.pad
        ids = torch.stack([pad(self._prompts[number], (left, 0)) for number, left in zip(batch, pads, strict=True)])
        kept = torch.stack([pad(torch.ones(width - left, dtype=torch.int64), (left, 0)) for left in pads])
        answers = self._model.generate(
            input_ids=ids.to(self._model.device),
            attention_mask=kept.to(self._model.device),
            input_features=torch.nn.utils.rnn.pad_sequence([self._features[number] for number in batch], batch_first=True),
            input_features_lengths=[self.frames[number] for number in batch],
            max_new_tokens=max(self.new_tokens[number] for number in batch),
            eos_token_id=[],
        )[:, width:]
        return [one[: self.new_tokens[number]] for one, number in zip(answers.tolist(), batch, strict=True)]


def run(*, device: str, dtype: str, out: Path, plan: Plan = PLAN) -> str:
    """Measure, write the result file after each load, and return its table."""
    torch.manual_seed(0)
    model = shapes.build(plan.name, adapter=False, device=torch.device(device), dtype=getattr(torch, dtype))
    requests = Requests(plan, model)
    described = results.describe_run()
    if torch.device(device).type == "cuda":
        described["machine"] = torch.cuda.get_device_name(device)
    result: dict[str, Any] = {
        "kind": "serving",
        "run": described,
        "shape": {
            "model": f"{plan.name} with random weights, answers of {plan.new_tokens[0]} to {plan.new_tokens[1]} tokens",
            "dtype": dtype,
            "requests": plan.requests,
            "audio_seconds": requests.seconds,
            "reference": f"`generate` in batches of {plan.batch}",
        },
        "rounds": ROUNDS,
        "measurements": [],
    }
    with Engine(model, None) as engine, torch.no_grad():
        engine.warmup()
        ours, reference = _ours(engine, requests), _reference(requests, plan.batch)

        def measure(what: str, load: Load, systems: dict[str, Callable[[Load], Served]]) -> dict[str, Any]:
            found = compare(load, systems, ROUNDS)  # its warm-up round has stages of new shapes captured
            result["measurements"].append({"what": what} | found)
            results.write(out, "serving", result)
            return found

        at_once = Load.at_once(requests.seconds)
        for serve in (ours, reference):
            serve(at_once)  # compiles the kernels
        rate = SUSTAINED * measure("all at once", at_once, {"ours": ours, "reference": reference})["ours"]["audio_a_second"]
        measure(f"{SUSTAINED:.0%} of that, over time", Load.over_time(requests.seconds, rate), {"ours": ours})
    file = results.write(out, "serving", result)
    return f"{table(result)}\n\n{file}"


def _ours(engine: Engine, requests: Requests) -> Callable[[Load], Served]:
    def serve(load: Load) -> Served:
        before = engine.counters()
        served = serve_in_engine(load, lambda number: requests.submit(engine, number))
        _check_lengths([len(answer.token_ids) for answer in served.answers], requests.new_tokens)
        return Served(served.answers, served.completions, counted(before, engine.counters()))

    return serve


def _reference(requests: Requests, size: int) -> Callable[[Load], Served]:
    def serve(load: Load) -> Served:
        served = serve_in_batches(load, requests.generate, size)
        _check_lengths([len(tokens) for tokens in served.answers], requests.new_tokens)
        return served

    return serve


def _check_lengths(lengths: list[int], expected: list[int]) -> None:
    if lengths != expected:
        raise SystemExit(f"answers of {lengths!r:.80} tokens in place of {expected!r:.80}, so nothing was written")
