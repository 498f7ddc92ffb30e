"""Times of decode steps on a GPU: released shapes with random weights, the layers fused and module by module, in one run.

A graph of the engine's steps is captured for each of both and replayed in turns, after their logits were compared. Every step adds a
token to its answers, as in a real answer; the one in the middle has as many keys as the steps of the rehearsal, which says how many bytes
they move.
"""

import gc
import statistics
import traceback
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from granite_kernels.launch import architecture, precompile, recorded_launches

from bench import graphs, rehearse, results
from bench.steps import CONTEXT, Answers, random_model, unfused
from granite_speech.engine.graphs import CudaCapture
from granite_speech.engine.state import STEPS
from granite_speech.engine.step import DecodeStep

__all__ = ["PLAN", "run", "table"]

# Names of models, and rows of their steps.
PLAN = {"4.1-2b": (1, 8, 16, 128), "3.3-2b": (1, 128), "4.1-2b int8": (1,)}
ROUNDS, REPLAYS = 3, 10
WAYS: dict[str, tuple[Callable[[], AbstractContextManager], str]] = {
    "fused": (nullcontext, rehearse.STEP),
    "module by module": (unfused, rehearse.STEP_OF_MODULES),
}
# Keys of the first step, and tokens that all of them add.
MORE = STEPS * (graphs.WARM_UP + REPLAYS)
FIRST = CONTEXT - STEPS * graphs.WARM_UP - STEPS * REPLAYS // 2
# RMS of the logits' difference over theirs. Both ways round to the model's dtype, at other places.
MOST_DIFFERENCE = {torch.float32: 1e-3, torch.float16: 0.02, torch.bfloat16: 0.05}


def run(*, device: str, dtype: str, out: Path, plan: dict[str, tuple[int, ...]] = PLAN) -> tuple[str, bool]:
    """Measure, write the result file after each step, and return its table and whether every step was measured."""
    on, described = torch.device(device), results.describe_run()
    if on.type == "cuda":
        described["machine"] = torch.cuda.get_device_name(on)
    with graphs.side_stream():
        rates = {"bytes_a_second": graphs.copy_rate()}
    result: dict[str, Any] = {
        "kind": "decode-steps",
        "run": described,
        "shape": {"dtype": dtype, "weights": "random weights", "context": CONTEXT, "steps_in_a_graph": STEPS},
        "rounds": ROUNDS * REPLAYS,
        "rates": rates,
        "measurements": [],
    }
    for name, every in plan.items():
        for measured in _of_model(name, every, on, getattr(torch, dtype)):
            result["measurements"].append(measured)
            file = results.write(out, "decode-steps", result)
    return f"{table(result)}\n\n{file}", not any("error" in one for one in result["measurements"])


def _of_model(name: str, every: tuple[int, ...], device: torch.device, dtype: torch.dtype) -> Any:
    """The measurements of one model. One that fails is an error, and the next one follows."""
    try:
        _compile(name, every, device, dtype)
        torch.manual_seed(0)
        model = random_model(name, device, dtype)
    except Exception as error:
        traceback.print_exc()
        yield {"model": name, "rows": None, "error": repr(error)[:500]}
        return
    for rows in every:
        try:
            with torch.no_grad():
                measured = _Comparison.of(model, rows).measure()
            for way, figures in measured["ways"].items():
                figures["bytes"] = rehearse.count(WAYS[way][1], name, rows).moved
        except Exception as error:
            traceback.print_exc()
            measured = {"error": repr(error)[:500]}
        yield {"model": name, "rows": rows} | measured
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()


def _compile(name: str, every: tuple[int, ...], device: torch.device, dtype: torch.dtype) -> None:
    """Compile the kernels of all steps in parallel. At their first launch they would be compiled one after another."""
    with recorded_launches(architecture(device)) as launches, torch.no_grad():
        model = random_model(name, torch.device("meta"), dtype, layers=2)  # the other layers make the same launches
        for rows in every:
            for context, _ in WAYS.values():
                with context():
                    step = Answers.of(model, rows, FIRST, MORE).step()
                    step.run()
                    step.logits()
    precompile(launches, device)


@dataclass(frozen=True)
class _Comparison:
    """Steps of the same answers, made in each way."""

    answers: Answers
    steps: dict[str, DecodeStep]

    @classmethod
    def of(cls, model: Any, rows: int) -> "_Comparison":
        answers = Answers.of(model, rows, FIRST, MORE)
        for one in (*answers.state.pool.keys, *answers.state.pool.values):
            one.normal_()
        steps = {}
        for way, (context, _) in WAYS.items():
            with context():
                steps[way] = answers.step(STEPS)
        return cls(answers, steps)

    def measure(self) -> dict[str, Any]:
        """The logits' difference, and for each way seconds of a step and rows whose captured steps choose the tokens of eager ones."""
        difference = self._difference()
        limit = MOST_DIFFERENCE[self.answers.model.dtype]
        if not difference <= limit:  # NaN is no less
            raise AssertionError(f"the logits differ by {difference:.2g} of their RMS, at most {limit} was expected; so nothing was timed")
        capture, replays, same_rows = CudaCapture(self.answers.model.device), {}, {}
        for way, step in self.steps.items():
            with WAYS[way][0]():
                eager = self._tokens(step.run)
                step.reset()
                replays[way] = capture(step.run)
            same_rows[way] = int((self._tokens(replays[way]) == eager).all(dim=0).sum())
        seconds: dict[str, list[float]] = {way: [] for way in WAYS}
        for _ in range(ROUNDS):
            for way, replay in replays.items():
                self.answers.restart()
                seconds[way] += [one / STEPS for one in graphs.replay_seconds(replay, REPLAYS)]
        ways = {way: _spread(found) | {"same_rows": same_rows[way]} for way, found in seconds.items()}
        return {"difference": difference, "ways": ways}

    def _difference(self) -> float:
        found = []
        for way, step in self.steps.items():
            self.answers.restart()
            with WAYS[way][0]():
                found.append(step.logits().float())
        fused, modules = found
        return ((fused - modules).square().mean() / modules.square().mean()).sqrt().item()

    def _tokens(self, run: Callable[[], None]) -> torch.Tensor:
        """`(steps, rows)` that the answers get next."""
        self.answers.restart()
        run()
        return self.answers.state.history[:, : len(self.answers.rows)].clone()


def _spread(seconds: list[float]) -> dict[str, float]:
    ordered = sorted(seconds)
    p20, p80 = (ordered[round(share * (len(ordered) - 1))] for share in (0.2, 0.8))
    return {"seconds": statistics.median(ordered), "p20": p20, "p80": p80}


def table(result: dict[str, Any]) -> str:
    """Markdown of one run."""
    run, shape, rate = result["run"], result["shape"], result["rates"]["bytes_a_second"]
    versions = ", ".join(f"{name} {run['versions'][name]}" for name in ("torch", "triton"))
    lines = [
        f"One decode step, captured in a CUDA graph, {shape['dtype']}, {shape['weights']}, {shape['context']} keys for each row: "
        f"{run['machine']}, {versions}, commit {run['commit'][:8]}; median of {result['rounds']} replays of {shape['steps_in_a_graph']} "
        f"steps; in brackets: bytes that the launches move, and these bytes a second as a share of the measured {rate / 1e12:.2f} TB/s:",
        "",
        f"| model | rows | {' | '.join(WAYS)} | speedup |",
        "|---" * (3 + len(WAYS)) + "|",
    ]
    notes = []
    for one in result["measurements"]:
        ways = one.get("ways", {})
        cells = [_cell(ways[way], rate) if way in ways else "–" for way in WAYS]
        speedup = f"{ways['module by module']['seconds'] / ways['fused']['seconds']:.2f}x" if ways else "–"
        lines.append(f"| {one['model']} | {one['rows'] or '–'} | {' | '.join(cells)} | {speedup} |")
        notes += [f"- {one['model']}, {one['rows'] or 'any'} rows: {one['error']}" for _ in range("error" in one)]
        for way, figures in ways.items():
            if figures["same_rows"] < one["rows"]:
                rows = f"{one['rows'] - figures['same_rows']} of {one['rows']} rows"
                notes.append(f"- {one['model']}, {way}: captured and eager steps chose different tokens in {rows}")
    return "\n".join([*lines, *([""] if notes else []), *notes])


def _cell(figures: dict[str, float], rate: float) -> str:
    share = figures["bytes"] / figures["seconds"] / rate
    return f"{results.time_text(figures['seconds'])} ({figures['bytes'] / 1e9:.2f} GB, {share:.0%})"
