"""What an accelerated model does on a GPU, seen on stand-ins: steps are captured, launches are fewer, and the host waits no more often."""

import copy
from collections.abc import Callable
from typing import Any

import torch
from peft import LoraConfig

from bench.stand_in_gpu import StandInGPU
from granite_speech import accelerate
from granite_speech.engine import runtime
from granite_speech.interop.accelerate import acceleration_of
from tests.support.live_models import LIVE_SPECS, batch, language_model, speech
from tests.support.reference_models import build_reference, clip_inputs, features, prompt

SPEC = LIVE_SPECS[-1]
QV = LoraConfig(r=3, lora_alpha=7, target_modules=["q_proj", "v_proj"], init_lora_weights=False)


def test_repeated_steps_are_captured_and_follow_the_live_weights(monkeypatch):
    live = build_reference(SPEC)
    prompts = [{"input_ids": prompt(0)}, {"input_ids": prompt(0, seed=5)}]

    def answers(model: Any, inputs: dict[str, Any]) -> torch.Tensor:
        torch.manual_seed(0)
        return model.generate(**inputs, max_new_tokens=3, eos_token_id=None)

    def expected() -> list[torch.Tensor]:
        plain = copy.deepcopy(live)
        return [answers(plain, one) for one in prompts]

    theirs = expected()
    accelerate(live)
    # A replay runs the same function again; what a real capture allows is tested in tests/engine.
    monkeypatch.setattr(runtime, "_can_be_captured", lambda model: True)
    captured, replays = [], []

    def capture(function: Callable[[], None]) -> Callable[[], None]:
        captured.append(function)
        return lambda: (replays.append(1), function())

    acceleration_of(live).twin.runtime.make_capture = lambda device: capture
    for inputs, one in zip(prompts, theirs, strict=True):
        for _ in range(2):
            assert torch.equal(answers(live, inputs), one)
    assert captured and replays
    # In place: the same graphs read the new values.
    count = len(captured)
    with torch.no_grad():
        language_model(live).norm.weight.neg_()
    changed = expected()
    assert not torch.equal(changed[0], theirs[0])
    assert torch.equal(answers(live, prompts[0]), changed[0]) and len(captured) == count
    # An adapter drops them.
    live.add_adapter(QV)
    live.set_adapter("default")
    inputs = clip_inputs(SPEC, 45)
    with_adapter = answers(live, inputs)
    assert torch.equal(answers(live, inputs), with_adapter)
    assert len(captured) > count


def test_captured_prompts_after_another_vocabulary(monkeypatch):
    live = accelerate(build_reference(SPEC))
    monkeypatch.setattr(runtime, "_can_be_captured", lambda model: True)
    acceleration_of(live).twin.runtime.make_capture = lambda device: lambda function: function

    def answers() -> list[torch.Tensor]:
        return [live.generate(input_ids=prompt(0), max_new_tokens=3, eos_token_id=None) for _ in range(3)]

    before = answers()
    live.resize_token_embeddings(140, mean_resizing=False)
    head = live.get_output_embeddings().weight
    with torch.no_grad():
        head[120:] = 0
    assert all(map(torch.equal, answers(), before))


def test_host_waits():
    """The host waits for the prompt once, and reads each token one step late, as with a model of this package."""
    spec = LIVE_SPECS[2]  # one encoder layer: the interpreter is slow
    live = accelerate(build_reference(spec))
    with StandInGPU() as gpu, torch.no_grad():
        inputs = gpu.move(batch(spec, frames=(9, 4)))
        gpu.move(live)
        for steps in (1, 4):
            gpu.waits.clear()
            gpu.late_reads = 0
            live.generate(**inputs, max_new_tokens=steps, eos_token_id=[118], pad_token_id=117)
            assert (len(gpu.waits), gpu.late_reads) == (1, steps), gpu.waits
        gpu.waits.clear()
        speech(live).encoder(gpu.move(features(9)))
        assert not gpu.waits
