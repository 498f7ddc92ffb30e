"""Times of the whole model in released shapes with random weights, captured in CUDA graphs, eager, and in transformers, in one process.

Each section (one model, batch and way to run it) gives the times of its stages, the memory and the launches. A section that fails is
recorded with its error, and the next one follows. The result file is written after every section.
"""

import gc
import statistics
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from bench import results, shapes, whole_model

__all__ = ["PLAN", "Planned", "run"]

NEW_TOKENS = 40
ROUNDS = 3
# Calls of the CUDA runtime and driver that send work to the device.
HOST_CALLS = ("cudaLaunchKernel", "cuLaunchKernel", "cudaGraphLaunch", "cudaMemcpyAsync", "cudaMemsetAsync")


@dataclass(frozen=True)
class Planned:
    """One model to measure.

    Args:
        name: of the released shape.
        adapter: attach one.
        clips: numbers of clips to measure.
        compared: those of them to measure in transformers too.
    """

    name: str
    adapter: bool
    clips: tuple[int, ...]
    compared: tuple[int, ...] = ()

    @property
    def label(self) -> str:
        return self.name + " lora" * self.adapter


PLAN = (Planned("4.1-2b", False, (1, 16, 128), (1, 128)), Planned("3.3-2b", True, (1, 128)))


def run(*, device: str, dtype: str, out: Path, plan: tuple[Planned, ...] = PLAN, new_tokens: int = NEW_TOKENS) -> tuple[str, bool]:
    """Measure, write the result file, and return its table and whether every section succeeded."""
    sections = _Sections(device, dtype, new_tokens, out)
    for planned in plan:
        sections.of_model(planned)
    return f"{whole_model.table(sections.result)}\n\n{sections.file}", not sections.failed


class _Sections:
    """The sections of one run and their result file."""

    def __init__(self, device: str, dtype: str, new_tokens: int, out: Path):
        self.device, self.dtype, self.new_tokens, self._out = torch.device(device), getattr(torch, dtype), new_tokens, out
        described = results.describe_run()
        if self.device.type == "cuda":
            described["machine"] = torch.cuda.get_device_name(self.device)
        weights = {"dtype": dtype, "weights": "random weights", "clip_seconds": shapes.CLIP_SECONDS, "new_tokens": new_tokens}
        self.result: dict[str, Any] = {"kind": "whole-model", "run": described, "shape": weights, "rounds": ROUNDS, "profiles": {}}
        self.failed = False
        self._write()

    def of_model(self, planned: Planned) -> None:
        """Our model captured and eager, then transformers'. Only one of the two is in memory at a time."""
        ours = self._built(f"building {planned.label}", partial(_ours, planned, self.device, self.dtype))
        for use_graphs, way in ((True, "captured"), (False, "eager")):
            for clips in () if ours is None else planned.clips:
                self._section(f"{way} {planned.label} x{clips}", partial(self._our_calls, ours, planned, clips, use_graphs), clips)
        del ours
        _free()
        if planned.compared:
            theirs = self._built(f"building transformers {planned.name}", partial(_theirs, planned.name, self.device, self.dtype))
            for clips in () if theirs is None else planned.compared:
                self._section(f"transformers {planned.label} x{clips}", partial(self._their_calls, theirs, planned, clips), clips)
            del theirs
            _free()

    def _built(self, name: str, build: Callable[[], Any]) -> Any:
        try:
            return build()
        except Exception as error:
            self._fail(name, error)
            return None

    def _section(self, name: str, prepare: Callable[[], "_Calls"], clips: int) -> None:
        start = time.perf_counter()
        try:
            with torch.no_grad():
                calls = prepare()
                self.result[name] = self._measure(calls, clips)
                if self.device.type == "cuda":
                    self.result["profiles"][name] = _profiles(calls)
        except Exception as error:
            self._fail(name, error)
        self._write()
        print(f"{name}: {time.perf_counter() - start:.1f} s", flush=True)
        _free()

    def _fail(self, name: str, error: Exception) -> None:
        self.failed = True
        self.result[name] = {"error": repr(error)[:500]}
        traceback.print_exc()
        self._write()

    def _write(self) -> None:
        self.file = results.write(self._out, "whole-model", self.result)

    def _our_calls(self, model: Any, planned: Planned, clips: int, use_graphs: bool) -> "_Calls":
        inputs = self._inputs(planned, clips)
        model.use_graphs = use_graphs
        if use_graphs:
            model.warmup(rows=[clips], seconds=[shapes.CLIP_SECONDS])
        calls = _Calls(
            lambda: model.get_audio_features(inputs["input_features"]).pooler_output,
            lambda count: model.generate(**inputs, max_new_tokens=count, eos_token_id=[]),
        )
        if use_graphs and self.device.type == "cuda":
            calls.generate(self.new_tokens)
            calls.generate(1)  # before this request, the shapes that the warm-up did not have are captured
            if len(model.runtime.decoder_graphs) == 0:
                raise RuntimeError("nothing was captured")
        return calls

    def _their_calls(self, model: Any, planned: Planned, clips: int) -> "_Calls":
        inputs = self._inputs(planned, clips)
        audio = int((inputs["input_ids"][0] == shapes.RELEASED[planned.name]["audio_token_index"]).sum())
        inputs["input_features_mask"] = torch.ones(clips, audio, dtype=torch.bool, device=self.device)
        fixed = {"do_sample": False, "pad_token_id": 0, "eos_token_id": 1}
        return _Calls(
            lambda: model.get_audio_features(inputs["input_features"]),
            lambda count: model.generate(**inputs, max_new_tokens=count, min_new_tokens=count, **fixed),
        )

    def _inputs(self, planned: Planned, clips: int) -> dict[str, torch.Tensor]:
        batch = shapes.request(planned.name, clips)
        return {name: one.to(self.device, self.dtype if one.is_floating_point() else None) for name, one in batch.items()}

    def _measure(self, calls: "_Calls", clips: int) -> dict[str, float]:
        on_gpu = self.device.type == "cuda"
        before = torch.cuda.memory_allocated() if on_gpu else 0
        if on_gpu:
            torch.cuda.reset_peak_memory_stats()
        encoder, first = _median(calls.encode), _median(lambda: calls.generate(1))
        calls.generate(2)  # compiles the decode step's kernels, so that a whole run need not be repeated for that
        whole = _median(lambda: calls.generate(self.new_tokens), warm_up=False)
        found = {
            "encoder_projector_s": encoder,
            "first_token_s": first,
            "decode_step_s": (whole - first) / (self.new_tokens - 1),
            "whole_s": whole,
            "rtfx": clips * shapes.CLIP_SECONDS / whole,
        }
        if on_gpu:
            found |= {"weights_GB": before / 1e9, "peak_extra_GB": (torch.cuda.max_memory_allocated() - before) / 1e9}
        return found


@dataclass(frozen=True)
class _Calls:
    """What is timed: encoder and projector, and `generate` with a number of new tokens."""

    encode: Callable[[], Any]
    generate: Callable[[int], Any]


def _ours(planned: Planned, device: torch.device, dtype: torch.dtype) -> Any:
    torch.manual_seed(0)
    return shapes.build(planned.name, adapter=planned.adapter, device=device, dtype=dtype)


def _theirs(name: str, device: torch.device, dtype: torch.dtype) -> Any:
    import transformers

    torch.manual_seed(0)
    config = transformers.GraniteSpeechConfig(**shapes.configuration(name), has_lora_adapter=False)
    with shapes.default_dtype(dtype), device:
        return transformers.GraniteSpeechForConditionalGeneration(config).eval()


def _median(call: Callable[[], Any], warm_up: bool = True) -> float:
    """Seconds of a call; with `warm_up`, after one that is not counted."""
    if warm_up:
        call()
    seconds = []
    for _ in range(ROUNDS):
        _synchronize()
        start = time.perf_counter()
        call()
        _synchronize()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def _profiles(calls: _Calls) -> dict[str, dict[str, float]]:
    """Launches of the encoder with the projector, and of one decode step: two new tokens less one."""
    one, two = (_profile(lambda count=count: calls.generate(count)) for count in (1, 2))
    return {"encoder and projector": _profile(calls.encode), "decode step": {name: two[name] - one[name] for name in one}}


def _profile(call: Callable[[], Any]) -> dict[str, float]:
    """Of one call: kernels, copies and fills on the device, its busy time, and the host's calls that launched them."""
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    call()
    _synchronize()
    # The calls of the CUDA runtime are recorded with the device's work. PyTorch's own operations would take seconds to sort.
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        call()
        _synchronize()
    events = profiler.key_averages()
    device = [one for one in events if one.device_type == DeviceType.CUDA and one.self_device_time_total > 0]
    return {
        "launches": sum(one.count for one in device),
        "device_s": sum(one.self_device_time_total for one in device) / 1e6,
        "host_calls": sum(one.count for one in events if one.key.startswith(HOST_CALLS)),
    }


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
