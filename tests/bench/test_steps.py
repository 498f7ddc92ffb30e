"""`python -m bench model --part steps` on a CPU: what is compared, timed and written. A capture runs the step again."""

import contextlib
import json

import pytest
import torch

from bench import graphs, shapes, steps, steps_gpu
from granite_speech.modules.fused_layers import FusedLayers
from tests.bench.test_model import SMALL

WIDER = SMALL["text_config"] | {"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 64}


@pytest.fixture
def replays(monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """Two small models, of which one has an adapter; the numbers of keys before each timed replay."""
    seen: list[list[int]] = []

    class Capture:
        def __init__(self, device: torch.device):
            pass

        def __call__(self, function):
            function()
            return function

    def replay_seconds(replay, count):
        state = replay.__self__._state
        for _ in range(graphs.WARM_UP + count):
            seen.append(state.kv_lens.tolist())
            replay()
        return [8e-3 if replay.__self__._fused else 24e-3] * count

    for name, has_adapter in (("small", False), ("adapted", True)):
        monkeypatch.setitem(shapes.RELEASED, name, SMALL | {"text_config": WIDER})
        monkeypatch.setitem(steps.MODELS, name, has_adapter)
    monkeypatch.setattr(steps_gpu, "CudaCapture", Capture)
    monkeypatch.setattr(steps_gpu, "precompile", lambda launches, device: None)
    for name, value in {"ROUNDS": 1, "REPLAYS": 2, "FIRST": 20, "MORE": 8 * (graphs.WARM_UP + 2)}.items():
        monkeypatch.setattr(steps_gpu, name, value)
    monkeypatch.setattr(graphs, "replay_seconds", replay_seconds)
    monkeypatch.setattr(graphs, "side_stream", contextlib.nullcontext)
    monkeypatch.setattr(graphs, "copy_rate", lambda: 4e12)
    return seen


def run(tmp_path, plan):
    text, succeeded = steps_gpu.run(device="cpu", dtype="float32", out=tmp_path, plan=plan)
    (file,) = tmp_path.glob("decode-steps-*.json")
    return text, succeeded, json.loads(file.read_text())


def test_both_ways_are_compared_timed_in_turns_and_written(replays, tmp_path):
    text, succeeded, result = run(tmp_path, {"small": (1, 9), "adapted": (2,), "small int8": (1,)})
    assert succeeded
    assert [(one["model"], one["rows"]) for one in result["measurements"]] == [
        ("small", 1),
        ("small", 9),
        ("adapted", 2),
        ("small int8", 1),
    ]
    for one in result["measurements"]:
        assert 0 <= one["difference"] < 1e-4
        fused, modules = one["ways"]["fused"], one["ways"]["module by module"]
        assert fused["seconds"] == pytest.approx(1e-3) and modules["seconds"] == pytest.approx(3e-3), "of one step of eight"
        assert fused["same_rows"] == modules["same_rows"] == one["rows"]
        assert 0 < fused["bytes"] < modules["bytes"]
    assert replays[0] == [20] and replays[1] == [28], "each replay adds a token in every step"
    assert "| small | 9 | 1.00 ms (0.00 GB, 0%) | 3.00 ms (0.00 GB, 0%) | 3.00x |" in text
    assert steps_gpu.table(result) in text


def test_the_middle_replay_has_the_keys_of_the_rehearsal():
    timed = [steps_gpu.FIRST + 8 * (graphs.WARM_UP + number) for number in range(steps_gpu.REPLAYS + 1)]
    assert sum(timed) / len(timed) == steps.CONTEXT
    assert timed[-1] == steps_gpu.FIRST + steps_gpu.MORE


def test_steps_that_differ_are_not_timed(replays, tmp_path, monkeypatch):
    own = FusedLayers.scores
    monkeypatch.setattr(FusedLayers, "scores", lambda self, states: own(self, states) * 1.01)
    text, succeeded, result = run(tmp_path, {"small": (9,)})
    assert not succeeded and not replays
    assert "nothing was timed" in result["measurements"][0]["error"]
    assert "| small | 9 | – | – | – |" in text and "- small, 9 rows: AssertionError" in text


def test_a_captured_step_with_other_tokens_is_noted(replays, tmp_path, monkeypatch):
    class Wrong(steps_gpu.CudaCapture):
        def __call__(self, function):
            step = function.__self__

            class Replay:
                __self__ = step

                def __call__(self):
                    function()
                    step._history[0, 1] += 1

            return Replay()

    monkeypatch.setattr(steps_gpu, "CudaCapture", Wrong)
    text, succeeded, result = run(tmp_path, {"small": (3,)})
    assert succeeded and result["measurements"][0]["ways"]["fused"]["same_rows"] == 2
    assert "- small, fused: captured and eager steps chose different tokens in 1 of 3 rows" in text


def test_a_model_that_cannot_be_built_is_an_error(replays, tmp_path, monkeypatch):
    monkeypatch.setattr(steps_gpu, "random_model", lambda *arguments, **options: 1 / 0)
    text, succeeded, _ = run(tmp_path, {"small": (3,)})
    assert not succeeded and "- small, any rows: ZeroDivisionError" in text


def test_the_kernels_of_every_step_are_compiled_before_the_first(replays, monkeypatch):
    found = []
    monkeypatch.setattr(steps_gpu, "precompile", lambda launches, device: found.extend(launches))
    monkeypatch.setattr(steps_gpu, "architecture", lambda device: 90)
    steps_gpu._compile("adapted", (1, 9), torch.device("cuda"), torch.bfloat16)
    names = {(one.kernel.__name__.strip("_"), one.early) for one in found}
    few = {("begin_step_kernel", False), ("fused_linear_kernel", False), ("fused_linear_kernel", True), ("decode_attention_kernel", True)}
    few |= {("head_argmax_kernel", True), ("finish_step_kernel", True)}
    assert few | {("add_rms_norm_kernel", False), ("silu_product_kernel", False), ("split_linear_kernel", False)} <= names
    by_modules = {name for name, _ in names}
    assert "paged_attention_decode_kernel" in by_modules and any(name.startswith("lora_linear") for name in by_modules)
