"""The language model in few launches on a real GPU: the same answers as its modules, captured and eager, and weights side by side.

Every test takes its device from a fixture. On a CPU all but the last run too, under Triton's interpreter and without graphs, in two
minutes; so only the quickest do by default.
"""

import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
from granite_kernels import OPERATIONS, launch
from granite_kernels.op import CHOICE
from torch import nn

from bench import shapes
from bench.steps import Answers, unfused
from granite_speech import GraniteSpeechConfig, GraniteSpeechForConditionalGeneration
from granite_speech.engine.graphs import CudaCapture
from granite_speech.engine.state import STEPS
from granite_speech.modules.fused_layers import FusedLayers
from granite_speech.modules.quantized import projections
from granite_speech.modules.side_by_side import arrange, padded_rows, side_by_side
from tests.modules.test_fused_layers import MODELS, texts
from tests.support.small_models import attentive, batch, small_model

on_gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
CUDA = pytest.param("cuda", marks=on_gpu)
# Largest difference of logits, relative to the largest of them. Both ways round to the dtype, at other places.
MOST_DIFFERENCE = {torch.float32: 1e-4, torch.bfloat16: 0.05}


@pytest.fixture(params=[CUDA])
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> torch.device:
    if request.param == "cpu":
        monkeypatch.setenv(CHOICE, "triton")
    return torch.device(request.param)


@pytest.fixture
def fused_steps(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Rows of the steps that ran in few launches."""
    seen: list[int] = []
    own = FusedLayers._few_rows
    monkeypatch.setattr(FusedLayers, "_few_rows", lambda self, x, *given: seen.append(len(x)) or own(self, x, *given))
    return seen


def model_on(device: torch.device, dtype: torch.dtype = torch.float32, kind: str = "adapters on q and v", int8: bool = False) -> Any:
    model = MODELS[kind](attentive(small_model()))
    for module in projections(model.decoder) if int8 else ():
        module.store_int8(module.weight.detach())
    return model.to(device, dtype)


def moved(inputs: dict[str, Any], device: torch.device, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    def one(value: Any) -> Any:
        return value.to(device, dtype if value.is_floating_point() else None) if isinstance(value, torch.Tensor) else value

    return {name: one(value) for name, value in inputs.items()}


def assert_same_answers(model: Any, inputs: dict[str, Any], dtype: torch.dtype) -> None:
    """Ids are equal in float32; in bfloat16 only the first logits have the same tokens before them for sure."""
    options = {"max_new_tokens": 4, "eos_token_id": [], "return_dict_in_generate": True, "output_logits": True}
    fused = model.generate(**inputs, **options)
    with unfused():
        modules = model.generate(**inputs, **options)
    compared = len(fused.logits) if torch.equal(fused.sequences, modules.sequences) else 2
    assert dtype != torch.float32 or compared == len(fused.logits)
    for step, (one, other) in enumerate(zip(fused.logits[:compared], modules.logits[:compared], strict=True)):
        before = inputs["input_ids"].shape[1] + step
        alike = (fused.sequences[:, :before] == modules.sequences[:, :before]).all(dim=1)
        assert float((one - other)[alike].abs().max()) <= MOST_DIFFERENCE[dtype] * float(other.abs().max())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("int8", [False, True], ids=["", "int8"])
@pytest.mark.parametrize("kind", ["adapters on q and v", "no adapter"])
def test_mixed_rows_get_the_answers_of_the_modules(kind: str, int8: bool, dtype: torch.dtype, device: torch.device, fused_steps: list[int]):
    model = model_on(device, dtype, kind, int8)
    assert_same_answers(model, moved(batch(model), device, dtype), dtype)  # rows with and without audio
    assert set(fused_steps) == {3}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rows", [1, 8, 9, 40])
def test_any_number_of_rows_gets_the_answers_of_the_modules(rows: int, dtype: torch.dtype, device: torch.device, fused_steps: list[int]):
    assert_same_answers(model_on(device, dtype), moved(texts(rows), device), dtype)
    assert set(fused_steps) == ({rows} if rows <= 8 else set())


def captured_by(device: torch.device) -> Callable[[Callable[[], None]], Callable[[], None]]:
    return CudaCapture(device) if device.type == "cuda" else lambda function: function


def steps_of(model: Any, rows: int, context: int = 9) -> tuple[Answers, Any]:
    arrange(model.decoder, model.lm_head)
    answers = Answers.of(model, rows, context, 3 * STEPS)
    rng = torch.Generator().manual_seed(1)
    for one in (*answers.state.pool.keys, *answers.state.pool.values):
        one.copy_(torch.randn(one.shape, generator=rng))
    return answers, answers.step(STEPS)


def tokens(answers: Answers, run: Callable[[], None]) -> list[list[int]]:
    answers.restart()
    run()
    return answers.state.history[:, : len(answers.rows)].tolist()


@pytest.mark.parametrize("rows", [1, 8, 9])
def test_captured_and_eager_steps_with_and_without_early_launches_choose_the_same(
    rows: int, device: torch.device, fused_steps: list[int], monkeypatch: pytest.MonkeyPatch
):
    with torch.no_grad():
        answers, step = steps_of(model_on(device), rows)
        eager = tokens(answers, step.run)
        step.reset()
        replay = captured_by(device)(step.run)
        assert [tokens(answers, replay) for _ in range(3)] == [eager] * 3
        assert not answers.state.counters.any(), "counters stay zero"
        asked = []
        own = launch._options
        monkeypatch.setattr(launch, "_options", lambda tile, early: asked.append(early) or own(tile, False))
        assert tokens(answers, step.run) == eager
    assert bool(fused_steps) == (rows <= 8)
    if device.type == "cuda" and torch.cuda.get_device_capability()[0] >= 9:
        assert any(asked) == (rows <= 8), "early launches were not asked for"


def test_a_replayed_step_sees_weights_that_change_in_place(device: torch.device):
    with torch.no_grad():
        model = model_on(device)
        answers, step = steps_of(model, 3)
        replay = captured_by(device)(step.run)
        before = tokens(answers, replay)
        attention, mlp = model.decoder.layers[0].self_attn, model.decoder.layers[1].mlp
        for weight in (attention.v_proj.weight, attention.v_proj.lora_A.weight, mlp.up_proj.weight, model.lm_head.weight):
            weight.neg_()
            changed = tokens(answers, replay)
            assert changed == tokens(answers, answers.step(step._steps).run)
        assert changed != before, "the head's weights are those that the step reads"


@pytest.mark.parametrize("device", [CUDA, pytest.param("cpu", id="interpreter")], indirect=True)
def test_weights_lie_side_by_side_on_every_device(device: torch.device):
    model = model_on(device)
    expected = {name: one.cpu().clone() for name, one in model.state_dict().items()}
    for where in (device, torch.device("cpu"), device):
        model.to(where)
        arrange(model.decoder, model.lm_head)
        for layer in model.decoder.layers:
            q, k, v = (getattr(layer.self_attn, f"{one}_proj").weight for one in "qkv")
            together = side_by_side(q, k, v)
            assert together.data_ptr() == q.data_ptr() and together.device == q.device
            assert torch.equal(together, torch.cat((q, k, v)))
            assert q.untyped_storage().nbytes() == q.nbytes, "a window of the parameter's own size"
            together[len(q)] = 7
            assert bool((k[0] == 7).all()), "the same memory"
            k.data[0] = expected[next(name for name, one in model.named_parameters() if one is k)][0].to(k)
            assert torch.equal(side_by_side(layer.mlp.gate_proj.weight, layer.mlp.up_proj.weight)[-1], layer.mlp.up_proj.weight[-1])
        padded = padded_rows(model.lm_head.weight)
        assert len(padded) % 64 == 0 and not padded[len(model.lm_head.weight) :].any()
        assert all(torch.equal(one.cpu(), expected[name]) for name, one in model.state_dict().items())


@pytest.mark.parametrize("device", [CUDA, pytest.param("cpu", id="interpreter")], indirect=True)
@pytest.mark.parametrize("slots", [[0, 1, 2], [2, 0, 1]], ids=str)
def test_the_logits_of_an_answer_do_not_depend_on_its_slot(slots: list[int], device: torch.device):
    with torch.no_grad():
        model = model_on(device)
        answers, _ = steps_of(model, 4)
        answers.restart()
        expected = answers.step().logits()
        answers.restart()
        answers.state.keep(slots)
        rows = Answers(model, answers.state, [answers.rows[slot] for slot in slots])
        torch.testing.assert_close(rows.step().logits(), expected[slots], rtol=1e-4, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.parametrize("device", [CUDA, pytest.param("cpu", id="interpreter")], indirect=True)
def test_the_bits_of_attention_do_not_depend_on_the_slot(device: torch.device):
    operation = OPERATIONS["decode_attention"]
    case = next(one for one in operation.cases if not one.released and len(one.shape["kv_lens"]) > 1)
    inputs = case.inputs(torch.float32, device)
    order = list(reversed(range(len(inputs["kv_lens"]))))
    again = reordered(case.inputs(torch.float32, device), order)
    assert torch.equal(operation.call(**again, impl="triton"), operation.call(**inputs, impl="triton")[order])


def reordered(inputs: dict[str, Any], order: list[int]) -> dict[str, Any]:
    """The same rows in other slots."""
    by_row = ("qkv", "cos", "sin", "block_table", "kv_lens", "low", "adapter_index")
    return inputs | {name: inputs[name][order] for name in by_row if inputs.get(name) is not None}


# --- memory: only a GPU says how much is allocated ---------------------------------------------------------------------------------


def wide_model() -> nn.Module:
    """Weights of 40 MB or so, so that the allocator's blocks do not matter."""
    values = shapes.configuration("4.1-2b", 2)
    values["text_config"] |= {"hidden_size": 512, "intermediate_size": 1024, "vocab_size": 5001, "num_hidden_layers": 8}
    values["projector_config"] |= {"hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 2, "encoder_hidden_size": 64}
    values["encoder_config"] |= {"hidden_dim": 64, "num_heads": 2, "dim_head": 32}
    values["audio_token_index"] = 5000
    return GraniteSpeechForConditionalGeneration(GraniteSpeechConfig(**values)).eval()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_weights_side_by_side_take_no_more_memory(tmp_path):
    wide_model().save_pretrained(tmp_path)
    gc.collect()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    model = GraniteSpeechForConditionalGeneration.from_pretrained(tmp_path, device="cuda")
    weights = sum(one.nbytes for one in {id(one): one for one in (*model.parameters(), *model.buffers())}.values())
    assert torch.cuda.max_memory_allocated() - before <= 1.02 * weights, "loading"
    assert torch.cuda.memory_allocated() - before <= 1.02 * weights
    moved_in = wide_model().cuda()
    held = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    arrange(moved_in.decoder, moved_in.lm_head)
    gc.collect()
    assert torch.cuda.memory_allocated() - held <= 0.02 * weights
    assert torch.cuda.max_memory_allocated() - held <= 0.3 * weights, "one layer or the head at a time"
