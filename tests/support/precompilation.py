"""Counts, without a GPU, the kernels that verifying the bundled checkpoint compiles. Run it without Triton's interpreter.

    python -m tests.support.precompilation float32

prints as JSON the kernels that a run launches although they were not predicted, those compiled in advance, and those compiled
again when the predicted launches follow.
"""

import importlib
import json
import sys
import tempfile
from dataclasses import replace
from itertools import count
from typing import Any

import pytest
import torch
import triton
from granite_kernels import OPERATIONS
from granite_kernels import launch as launching
from granite_kernels.launch import Launch, precompile, recorded_launches
from triton.backends import backends
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import CUDABackend

from bench.audit import specialization
from bench.stand_in_gpu import StandInGPU
from granite_speech import GraniteSpeechConfig, GraniteSpeechForConditionalGeneration, GraniteSpeechProcessor
from granite_speech.checkpoints.folder import Checkpoint, load_json
from granite_speech.checkpoints.hub import EMBEDDED_FOLDER
from granite_speech.inputs.audio import load_audio
from granite_speech.inputs.requests import transcript_request
from granite_speech.verify import RECORDING
from granite_speech.verify_speech import launches_of_run

TOKENS, STEPS = 100, 24  # within so many steps the number of keys becomes a multiple of 16, and a page is full


class Driver:
    """A GPU driver for compiling only."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


class Backend(CUDABackend):
    """Compiles no further than Triton's own language: here it is counted how often, and `bench audit` compiles to the end."""

    def add_stages(self, stages: dict[str, Any], *given: Any) -> None:
        super().add_stages(stages, *given)
        for name in stages.keys() - {"ttir"}:
            stages[name] = self._nothing

    @staticmethod
    def _nothing(module: Any, metadata: dict[str, Any]) -> bytes:
        metadata.update(name="kernel", shared=0)
        return b""


def key(one: Launch) -> tuple:
    return one.kernel.__name__, repr(one.tile), one.early, specialization(one)


class EnoughError(Exception):
    """Ends an answer."""


def launched(model: GraniteSpeechForConditionalGeneration, inputs: dict) -> set[tuple]:
    """The launches of a forward pass and of the first steps of an answer on a GPU. No kernel runs, so no token ends the answer."""
    found, steps = set(), count()

    def record(kernel, grid, tile, **arguments) -> None:
        if kernel.__name__ == "_finish_step_kernel" and next(steps) == STEPS:
            raise EnoughError
        waits = "PDL" in kernel.arg_names
        tile = replace(tile, blocks={**tile.blocks, "PDL": 1}) if waits else tile
        found.add(key(Launch(kernel, grid, tile, arguments, waits and launching._chain.early)))
        for name, value in arguments.items():
            if name in ("out_ptr", "low_ptr"):
                value.zero_()

    for name in OPERATIONS:
        importlib.import_module(f"granite_kernels.{name}_triton").launch = record
    with StandInGPU() as gpu, torch.no_grad(), recorded_launches(90):
        model, inputs = gpu.move(model), gpu.move(inputs)
        model(**inputs)
        with pytest.raises(EnoughError):
            model.generate(**inputs, max_new_tokens=TOKENS, eos_token_id=[])
    return found


def main(dtype: torch.dtype) -> dict:
    processor = GraniteSpeechProcessor.from_pretrained("embedded")
    inputs = dict(processor(transcript_request(processor), load_audio(RECORDING)))
    values = load_json(EMBEDDED_FOLDER / "config.json")
    config, checkpoint = GraniteSpeechConfig.from_pretrained("embedded"), Checkpoint.open(EMBEDDED_FOLDER)
    model = GraniteSpeechForConditionalGeneration.without_weights(config, checkpoint, values).to(dtype).eval()
    predicted = launches_of_run(model, inputs, 90, TOKENS)

    compiled = []
    triton.knobs.compilation.listener = lambda **given: compiled.append(given["src"].name)
    triton.runtime.driver.set_active(Driver())
    backends["nvidia"] = replace(backends["nvidia"], compiler=Backend)
    with tempfile.TemporaryDirectory() as folder:
        triton.knobs.cache.dir = folder
        precompile(predicted, torch.device("cpu"))
        precompiled = sorted(compiled)
        compiled.clear()
        for one in predicted:
            launching.precompile([one], torch.device("cpu"))
    real = launched(GraniteSpeechForConditionalGeneration.from_pretrained("embedded", dtype=dtype), inputs)
    unpredicted = sorted(name for name, *_ in real - set(map(key, predicted)))
    return {"unpredicted": unpredicted, "precompiled": precompiled, "later": compiled}


if __name__ == "__main__":
    print(json.dumps(main(getattr(torch, sys.argv[1]))))
