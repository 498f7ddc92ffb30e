"""`python -m bench model`: which parts run, the whole model in small shapes, the bundled checkpoint, and the counted products."""

import json
import sys

import pytest
import torch
from granite_kernels.cpu import has_int8

from bench import __main__ as command_line
from bench import accelerated, accelerated_gpu, cpu, embedded, encoder, released, serving, serving_gpu, shapes, steps_gpu
from bench.products import Products
from bench.released import Planned
from bench.turns import OURS, SYSTEMS
from granite_speech import GraniteSpeechForConditionalGeneration
from tests.support.spoken import sentences

SMALL = {
    "encoder_config": {"num_layers": 2, "hidden_dim": 32, "num_heads": 2, "dim_head": 16, "output_dim": 20},
    "projector_config": {
        "hidden_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 32,
        "encoder_hidden_size": 32,
    },
    "text_config": {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "intermediate_size": 32,
        "vocab_size": 100,
    },
    "tie_word_embeddings": True,
    "audio_token_index": 99,
}
STAGES = {"encoder_projector_s", "first_token_s", "decode_step_s", "whole_s", "rtfx"}


# --- which parts run -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], ["cpu", "accelerated", "serving"]),
        (["--device", "cuda"], ["whole cuda bfloat16", "encoder cuda bfloat16"]),
        (["--part", "encoder", "--dtype", "float16", "--device", "cuda"], ["encoder cuda float16"]),
        (["--part", "steps", "--device", "cuda"], ["steps cuda bfloat16"]),
        (["--part", "serving", "--device", "cuda"], ["serving cuda bfloat16"]),
        (["--part", "accelerated", "--device", "cuda"], ["accelerated cuda bfloat16"]),
        (["--part", "serving", "--part", "whole", "--device", "cuda"], ["serving cuda bfloat16", "whole cuda bfloat16"]),
    ],
)
def test_parts_fit_the_device_unless_they_are_named(arguments, expected, monkeypatch, tmp_path):
    made = []
    monkeypatch.setattr(encoder, "run", lambda *, device, dtype, **_: made.append(f"encoder {device} {dtype}"))
    monkeypatch.setattr(released, "run", lambda *, device, dtype, out: (made.append(f"whole {device} {dtype}"), False))
    monkeypatch.setattr(steps_gpu, "run", lambda *, device, dtype, out: (made.append(f"steps {device} {dtype}"), True))
    monkeypatch.setattr(cpu, "run", lambda **_: made.append("cpu"))
    monkeypatch.setattr(accelerated, "run", lambda **_: made.append("accelerated"))
    monkeypatch.setattr(accelerated_gpu, "run", lambda *, device, dtype, out: made.append(f"accelerated {device} {dtype}"))
    monkeypatch.setattr(serving, "run", lambda **_: made.append("serving"))
    monkeypatch.setattr(serving_gpu, "run", lambda *, device, dtype, out: made.append(f"serving {device} {dtype}"))
    monkeypatch.setattr(sys, "argv", ["bench", "model", "--out", str(tmp_path), *arguments])
    with pytest.raises(SystemExit) as ended:
        command_line.main()
    assert made == expected
    assert ended.value.code == int("whole" in " ".join(expected)), "a failed section gives exit status 1, after the other parts"


@pytest.mark.parametrize(("part", "device"), [("encoder", "cpu"), ("whole", "cpu"), ("cpu", "cuda")])
def test_a_part_that_does_not_run_on_the_device_is_refused(part, device, monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "argv", ["bench", "model", "--out", str(tmp_path), "--part", part, "--device", device])
    with pytest.raises(SystemExit, match=f"--part {part} does not run on {device}: choose from"):
        command_line.main()


# --- the whole model -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def small(monkeypatch):
    """A small shape, and what the model was asked to capture."""
    warmed = []
    monkeypatch.setitem(shapes.RELEASED, "small", SMALL)
    monkeypatch.setattr(released, "ROUNDS", 1)
    monkeypatch.setattr(
        GraniteSpeechForConditionalGeneration, "warmup", lambda self, *, rows, seconds: warmed.append((rows, seconds)), raising=False
    )
    return warmed


def whole(tmp_path, *plan):
    text, succeeded = released.run(device="cpu", dtype="float32", out=tmp_path, plan=plan, new_tokens=3)
    (file,) = tmp_path.glob("whole-model-*.json")
    return text, succeeded, json.loads(file.read_text())


def test_every_section_is_measured_and_written(small, tmp_path):
    text, succeeded, result = whole(tmp_path, Planned("small", False, (1, 2), (2,)), Planned("small", True, (1,)))
    assert succeeded
    names = ["captured small x1", "captured small x2", "eager small x1", "eager small x2", "transformers small x2"]
    names += ["captured small lora x1", "eager small lora x1"]
    assert [name for name in result if name.rsplit(" x")[-1].isdigit()] == names
    for name in names:
        assert set(result[name]) == STAGES
        assert result[name]["whole_s"] > 0 and result[name]["rtfx"] == pytest.approx(int(name[-1]) * 10 / result[name]["whole_s"])
    assert small == [([1], [10]), ([2], [10]), ([1], [10])]
    assert result["shape"] == {"dtype": "float32", "weights": "random weights", "clip_seconds": 10, "new_tokens": 3}
    assert "| small with adapter | 1 |" in text


def test_a_section_that_fails_is_recorded_and_the_next_one_runs(small, tmp_path, monkeypatch):
    def broken(*arguments, **options):
        raise RuntimeError("no memory")

    monkeypatch.setattr(released, "_theirs", broken)
    monkeypatch.setattr(GraniteSpeechForConditionalGeneration, "warmup", broken, raising=False)
    text, succeeded, result = whole(tmp_path, Planned("small", False, (1,), (1,)))
    assert not succeeded
    assert "no memory" in result["captured small x1"]["error"]
    assert "no memory" in result["building transformers small"]["error"]
    assert set(result["eager small x1"]) == STAGES
    assert "| small | 1 | – / " in text


def test_models_are_built_in_their_dtype(monkeypatch):
    monkeypatch.setitem(shapes.RELEASED, "small", SMALL)
    model = shapes.build("small", adapter=True, device=torch.device("meta"), layers=3)
    assert {one.dtype for one in model.parameters()} == {torch.bfloat16} and torch.get_default_dtype() == torch.float32
    adapted = [name for name, _ in model.named_parameters() if "lora_A" in name]
    assert len(adapted) == 6 and all("q_proj" in name or "v_proj" in name for name in adapted)


# --- the bundled checkpoint ------------------------------------------------------------------------------------------------------


def test_the_recorded_clips_are_those_of_the_tests():
    clips, words = embedded.recorded_clips()
    assert words == [one.text for one in sentences()]
    for clip, one in zip(clips, sentences(), strict=True):
        torch.testing.assert_close(clip, one.waveform(16_000), rtol=0, atol=1e-4)


def test_the_bundled_checkpoint_is_timed_in_every_dtype(monkeypatch):
    clips, words = embedded.recorded_clips()
    monkeypatch.setattr(embedded, "recorded_clips", lambda: (clips[:2], words[:2]))
    monkeypatch.setattr(embedded, "profile_of", lambda call: call() and {"Python": 1.0})  # the real one takes seconds a clip
    found = embedded.measure(1)
    assert found["clips"] == 2
    assert [one["what"] for one in found["measurements"]] == ["2 clips, one by one", "2 clips in a batch", "8 clips in a batch"]
    for one in found["measurements"]:
        assert list(one["seconds"]) == list(SYSTEMS) and all(seconds > 0 for seconds in one["seconds"].values())
        assert set(one["floors"]) == set(OURS) and one["profile"] == {"Python": 1.0}
        for floor in one["floors"].values():
            assert floor["seconds"] * floor["matmul_flops_a_second"] == pytest.approx(floor["matmul_flops"])
    counted = [one["floors"]["ours float32"]["matmul_flops"] for one in found["measurements"]]
    assert counted[2] == pytest.approx(4 * counted[1], rel=0.2)


def test_wrong_words_are_not_timed(monkeypatch):
    clips, words = embedded.recorded_clips()
    monkeypatch.setattr(embedded, "recorded_clips", lambda: (clips[:1], words[1:2]))
    with pytest.raises(SystemExit, match="ours float32: 'seven' became 'nine one five seven', so nothing was timed"):
        embedded.measure(1, ("ours float32",))


def test_a_profile_has_the_share_of_each_group():
    a = torch.randn(400, 400)
    shares = embedded.profile_of(lambda: [torch.mm(a, a) for _ in range(50)])
    assert sum(shares.values()) == pytest.approx(1, abs=0.01)
    assert max(shares, key=shares.get) == "matrix products" and shares["norms"] == 0


def test_products_are_counted_and_timed():
    with Products() as products:
        a, b = torch.randn(3, 4), torch.randn(4, 5)
        a @ b
        torch.nn.functional.linear(a, torch.randn(6, 4), torch.randn(6))
        torch.bmm(torch.randn(2, 3, 4), torch.randn(2, 4, 5))
        a + 1
    assert products.flops == 2 * (3 * 4 * 5 + 3 * 4 * 6 + 2 * 3 * 4 * 5)
    assert products.seconds() > 0


@pytest.mark.skipif(not has_int8(), reason="no library packs int8 weights for this processor")
def test_products_with_packed_int8_weights_are_counted_and_timed():
    weight = torch.quantize_per_channel(torch.randn(6, 4), torch.full((6,), 0.1), torch.zeros(6), 0, torch.qint8)
    packed = torch.ops.quantized.linear_prepack(weight, None)
    with torch.no_grad(), Products() as products:
        for _ in range(2):
            torch.ops.quantized.linear_dynamic(torch.randn(3, 4), packed, False)
    assert products.flops == 2 * 2 * (3 * 4 * 6)
    assert products.seconds() > 0
