"""`python -m bench model`: which parts run, the whole model in small shapes, the bundled checkpoint, and the counted products."""

import json
import sys

import pytest
import torch

from bench import __main__ as command_line
from bench import accelerated, accelerated_gpu, embedded, encoder, released, serving, serving_gpu, shapes, steps_gpu
from bench.products import Products
from bench.released import Planned
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
        ([], ["encoder cpu float32", "embedded", "accelerated", "serving"]),
        (["--device", "cuda"], ["whole cuda bfloat16", "encoder cuda bfloat16"]),
        (["--part", "encoder", "--dtype", "float16"], ["encoder cpu float16"]),
        (["--part", "steps", "--device", "cuda"], ["steps cuda bfloat16"]),
        (["--part", "serving", "--device", "cuda"], ["serving cuda bfloat16"]),
        (["--part", "accelerated", "--device", "cuda"], ["accelerated cuda bfloat16"]),
        (["--part", "embedded", "--part", "whole", "--device", "cuda"], ["embedded", "whole cuda bfloat16"]),
    ],
)
def test_parts_fit_the_device_unless_they_are_named(arguments, expected, monkeypatch, tmp_path):
    made = []
    monkeypatch.setattr(encoder, "run", lambda *, device, dtype, **_: made.append(f"encoder {device} {dtype}"))
    monkeypatch.setattr(released, "run", lambda *, device, dtype, out: (made.append(f"whole {device} {dtype}"), False))
    monkeypatch.setattr(steps_gpu, "run", lambda *, device, dtype, out: (made.append(f"steps {device} {dtype}"), True))
    monkeypatch.setattr(embedded, "run", lambda **_: made.append("embedded"))
    monkeypatch.setattr(accelerated, "run", lambda **_: made.append("accelerated"))
    monkeypatch.setattr(accelerated_gpu, "run", lambda *, device, dtype, out: made.append(f"accelerated {device} {dtype}"))
    monkeypatch.setattr(serving, "run", lambda **_: made.append("serving"))
    monkeypatch.setattr(serving_gpu, "run", lambda *, device, dtype, out: made.append(f"serving {device} {dtype}"))
    monkeypatch.setattr(sys, "argv", ["bench", "model", "--out", str(tmp_path), *arguments])
    with pytest.raises(SystemExit) as ended:
        command_line.main()
    assert made == expected
    assert ended.value.code == int("whole" in " ".join(expected)), "a failed section gives exit status 1, after the other parts"


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


def test_an_embedded_run_writes_its_result(tmp_path, monkeypatch):
    clips, words = embedded.recorded_clips()
    monkeypatch.setattr(embedded, "recorded_clips", lambda: (clips[:2], words[:2]))
    monkeypatch.setattr(embedded, "profile_of", lambda call: call() or {"Python": 1.0})  # the real one takes ten seconds a clip
    text = embedded.run(rounds=1, threads=None, out=tmp_path)
    (file,) = tmp_path.glob("embedded-cpu-*.json")
    measured = json.loads(file.read_text())["measurements"]
    assert [one["what"] for one in measured] == ["2 clips, one by one", "2 clips in a batch", "8 clips in a batch"]
    for one in measured:
        assert one["seconds"] > 0 and one["reference_seconds"] > 0 and len(one["ratios"]) == 1
        assert one["floor_seconds"] * one["matmul_flops_a_second"] == pytest.approx(one["matmul_flops"])
    assert measured[2]["matmul_flops"] == pytest.approx(4 * measured[1]["matmul_flops"], rel=0.2)
    assert "| 8 clips in a batch |" in text


def test_wrong_words_are_not_timed(tmp_path, monkeypatch):
    clips, words = embedded.recorded_clips()
    monkeypatch.setattr(embedded, "recorded_clips", lambda: (clips[:1], words[1:2]))
    with pytest.raises(SystemExit, match="so nothing was timed"):
        embedded.run(rounds=1, threads=None, out=tmp_path)
    assert not list(tmp_path.iterdir())


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
