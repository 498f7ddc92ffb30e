"""`python -m bench model --part accelerated`: both parts in small sizes, and what they refuse to time."""

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from bench import accelerated, accelerated_gpu, shapes
from bench.accelerated import JOBS, time_in_turns
from granite_speech import AccelerationWarning
from granite_speech.engine import runtime
from granite_speech.interop.accelerate import Acceleration
from granite_speech.interop.speech import SpeechAcceleration
from tests.bench.test_model import SMALL

SYSTEMS = {"transformers", "accelerated", "ours"}


def test_every_order_is_timed_equally_often(monkeypatch):
    order, seconds = [], {"transformers": [3.0] * 11 + [4.0], "accelerated": [1.0] * 12, "ours": [6.0] * 12}

    def timed(call):
        order.append(name := call())
        return seconds[name].pop()

    monkeypatch.setattr(accelerated, "seconds_of", timed)
    found = time_in_turns("it", {name: lambda name=name: name for name in seconds}, rounds=2)
    turns = [tuple(order[start : start + 3]) for start in range(0, 36, 3)]
    assert len(order) == 36 and len(set(turns)) == 6 and turns[:6] == turns[6:]
    assert found["what"] == "it" and found["timings"] == 12
    assert found["seconds"] == {"transformers": 3, "accelerated": 1, "ours": 6}
    assert found["ratio"] == {"accelerated": 3, "ours": 0.5}
    assert found["ratios"]["accelerated"] == [4, *[3] * 11] and len(found["ratios"]["ours"]) == 12


# --- the bundled checkpoint ------------------------------------------------------------------------------------------------------


@pytest.fixture
def few(monkeypatch):
    """Two short clips, in batches of two, each job timed three times in one order."""
    clips, words = accelerated.recorded_clips()
    monkeypatch.setattr(accelerated, "recorded_clips", lambda: ([clips[1], clips[3]], [words[1], words[3]]))
    monkeypatch.setattr(accelerated, "JOBS", tuple(replace(job, clips=min(job.clips, 2)) for job in JOBS))
    monkeypatch.setattr(accelerated, "permutations", lambda names: [tuple(names)] * 3)


def only(monkeypatch, start):
    """Leave the jobs whose names begin like this."""
    monkeypatch.setattr(accelerated, "JOBS", tuple(job for job in accelerated.JOBS if job.what.startswith(start)))


def run(tmp_path):
    text = accelerated.run(rounds=1, threads=None, out=tmp_path)
    (file,) = tmp_path.glob("accelerated-*.json")
    return text, json.loads(file.read_text())


def test_a_run_writes_its_result(few, tmp_path):
    text, result = run(tmp_path)
    assert result["kind"] == "accelerated" and result["shape"]["dtype"] == "float32"
    assert result["shape"]["clip_seconds"] == pytest.approx([0.489, 0.319], abs=1e-3)
    assert [one["what"] for one in result["measurements"]] == [job.what for job in JOBS]
    for one in result["measurements"]:
        assert one["timings"] == 3 and set(one["seconds"]) == SYSTEMS and min(one["seconds"].values()) > 0
        assert set(one["ratio"]) == SYSTEMS - {"transformers"} and all(len(ratios) == 3 for ratios in one["ratios"].values())
    assert "| training step, 8 clips |" in text


def test_all_have_the_same_inputs_and_our_class_the_lengths():
    clips, _ = accelerated.recorded_clips()
    theirs, live, ours = accelerated._inputs(clips[:2]).values()
    assert live is theirs and all(ours[name] is one for name, one in theirs.items())
    assert ours["input_features_lengths"].tolist() == [102, 24] and ours["input_features"].shape[1] == 102


def broken(which):
    """`_models` with a changed weight in one of them."""
    build = accelerated._models

    def models():
        found = build()
        with torch.no_grad():
            next(one for name, one in found[which].named_parameters() if name.endswith("encoder.input_linear.weight")).mul_(-1)
        return found

    return models


@pytest.mark.parametrize(
    ("which", "job", "message"),
    [
        ("accelerated", "encoder", "encoder and projector, 8 clips: differs from transformers"),
        ("accelerated", "forward", "forward, 8 clips: differs from transformers"),
        ("accelerated", "generate, 1", "other ids than in transformers"),
        ("ours", "generate, 8", "other ids than in transformers"),
        ("accelerated", "training", "training step, 8 clips: differs from transformers"),
    ],
)
def test_wrong_results_are_not_timed(which, job, message, few, tmp_path, monkeypatch):
    only(monkeypatch, job)
    monkeypatch.setattr(accelerated, "_models", broken(which))
    with pytest.raises(SystemExit, match=message):
        run(tmp_path)
    assert not list(tmp_path.iterdir())


def test_wrong_gradients_are_not_timed(few, tmp_path, monkeypatch):
    build = accelerated._models

    def models():
        found = build()
        weight = next(one for name, one in found["accelerated"].named_parameters() if name.endswith("encoder.input_linear.weight"))
        weight.register_hook(lambda gradient: gradient * 1.5)
        return found

    only(monkeypatch, "training")
    monkeypatch.setattr(accelerated, "_models", models)
    with pytest.raises(SystemExit, match="gradients: differs from transformers"):
        run(tmp_path)


def test_a_model_that_is_not_accelerated_is_not_timed(few, tmp_path, monkeypatch):
    only(monkeypatch, "generate, 1")
    monkeypatch.setattr(accelerated, "accelerate", lambda model: model)
    with pytest.raises(SystemExit, match="generate was not accelerated"):
        run(tmp_path)


def test_a_part_that_runs_as_transformers_wrote_it_is_not_timed(few, tmp_path, monkeypatch):
    def hooked(model):
        model.model.encoder.input_linear.register_forward_hook(lambda *_: None)
        return accelerate(model)

    accelerate = accelerated.accelerate
    only(monkeypatch, "encoder")
    monkeypatch.setattr(accelerated, "accelerate", hooked)
    with pytest.raises(AccelerationWarning, match="the encoder runs as transformers wrote it"):
        run(tmp_path)


# --- a released shape ------------------------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setitem(shapes.RELEASED, "small", SMALL)


def run_small(tmp_path, device="cpu", clips=(1, 2)):
    text = accelerated_gpu.run(device=device, dtype="float32", out=tmp_path, name="small", clips=clips, new_tokens=3)
    (file,) = tmp_path.glob("accelerated-*.json")
    return text, json.loads(file.read_text())


def test_stages_are_measured_before_and_after(tmp_path):
    text, result = run_small(tmp_path)
    stages = ("encoder and projector", "first token", "decode step", "whole run")
    assert [one["what"] for one in result["measurements"]] == [f"{stage}, {clips}" for clips in ("1 clip", "2 clips") for stage in stages]
    for start in (0, 4):
        _, first, step, whole = result["measurements"][start : start + 4]
        assert all(set(one["seconds"]) == SYSTEMS for one in (first, step, whole))
        for name, one in step["seconds"].items():
            assert first["seconds"][name] + 2 * one == pytest.approx(whole["seconds"][name])
        assert whole["equal_ids"] == dict.fromkeys(SYSTEMS, 1.0) and "peak_extra_GB" not in whole
    assert "small with random weights, 3 new tokens" in text and "| 100% / 100% | – |" in text


@pytest.fixture
def gpu(monkeypatch):
    """Device "cpu:0" takes the code path of a GPU, with graphs that run what they would have captured."""
    captured, peaks = [], iter(range(0, 100, 3))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: None)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: 1e9)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: (1 + next(peaks)) * 1e9)
    monkeypatch.setattr(runtime, "_can_be_captured", lambda model: not model.training)
    monkeypatch.setattr(runtime, "_cuda_capture", lambda device: lambda function: captured.append(function) or function)
    return captured


def test_a_gpu_run_has_captured_steps_and_memory(gpu, tmp_path):
    text, result = run_small(tmp_path, device="cpu:0")
    assert result["run"]["machine"] == "a GPU" and gpu
    first, second = (one["peak_extra_GB"] for one in result["measurements"] if "peak_extra_GB" in one)
    assert first == {"transformers": 0, "accelerated": 3, "ours": 6} and second == {"transformers": 9, "accelerated": 12, "ours": 15}
    assert "| 0.00 / 3.00 / 6.00 |" in text


def test_nothing_is_captured_while_it_is_timed(gpu, tmp_path, monkeypatch):
    counts, warm_up = [], accelerated_gpu._warm_up

    def counted(*arguments):
        peak = warm_up(*arguments)
        counts.append(len(gpu))
        return peak

    monkeypatch.setattr(accelerated_gpu, "_warm_up", counted)
    run_small(tmp_path, device="cpu:0", clips=(2,))
    assert 0 == counts[0] < counts[1] < counts[2] == len(gpu), "by the accelerated model and our own class, as they warm up"


def test_a_batch_begins_without_pages_and_graphs_of_another(gpu, tmp_path, monkeypatch):
    found, measure = [], accelerated_gpu._measure

    def measured(label, models, *others):
        acceleration = next(one for one in vars(models["accelerated"]).values() if isinstance(one, Acceleration))
        found.extend((one.pool, len(one.decoder_graphs)) for one in (acceleration.twin.runtime, models["ours"].runtime))
        return measure(label, models, *others)

    monkeypatch.setattr(accelerated_gpu, "_measure", measured)
    run_small(tmp_path, device="cpu:0")
    assert found == [(None, 0)] * 4


def test_a_step_that_was_not_captured_is_not_timed(gpu, tmp_path, monkeypatch):
    monkeypatch.setattr(runtime, "_can_be_captured", lambda model: False)
    with pytest.raises(SystemExit, match="captured nothing"):
        run_small(tmp_path, device="cpu:0")
    assert not list(tmp_path.iterdir())


def test_a_step_of_transformers_loop_is_not_timed(tmp_path, monkeypatch):
    monkeypatch.setattr(SpeechAcceleration, "generates", lambda self: False)
    with pytest.raises(SystemExit, match="generate was not accelerated"):
        run_small(tmp_path)


@pytest.mark.parametrize("which", ["accelerated", "ours"])
@pytest.mark.parametrize(("part", "message"), [("encoder.input_linear.weight", "audio vectors"), ("lm_head.weight", "ids")])
def test_wrong_models_are_not_timed(which, part, message, tmp_path, monkeypatch):
    build = accelerated_gpu._models

    def models(*arguments):
        found = build(*arguments)
        with torch.no_grad():
            next(one for name, one in found[which].named_parameters(remove_duplicate=False) if name.endswith(part)).mul_(-1)
        return found

    monkeypatch.setitem(shapes.RELEASED, "small", SMALL | {"tie_word_embeddings": False})
    monkeypatch.setattr(accelerated_gpu, "_models", models)
    with pytest.raises(SystemExit, match=f"{message}, {which}: differs from transformers"):
        run_small(tmp_path)


def test_an_id_may_be_within_rounding_of_the_best_but_never_of_a_forbidden_end():
    """Scores of two new tokens, and of a third that nobody asked for; token 1 is the end token."""
    scores = torch.tensor([[[0.0, 9.0, 4.0, 3.99], [0.0, -1.0, 2.0, 5.0], [9.0, 0.0, 0.0, 0.0]]])

    def theirs(*, input_ids, attention_mask, logits_to_keep):
        assert attention_mask.tolist() == [[1] * 5] and logits_to_keep == 3
        return SimpleNamespace(logits=scores.clone())

    inputs = {"input_ids": torch.tensor([[7, 7, 7]]), "attention_mask": torch.ones(1, 3)}
    for best in (2, 3):
        accelerated_gpu._check_ids("ids", theirs, inputs, torch.tensor([[7, 7, 7, best, 3]]), 1e-2)
    for wrong in ([0, 3], [2, 2], [1, 3]):
        with pytest.raises(SystemExit, match="ids: differs"):
            accelerated_gpu._check_ids("ids", theirs, inputs, torch.tensor([[7, 7, 7, *wrong]]), 1e-2)
