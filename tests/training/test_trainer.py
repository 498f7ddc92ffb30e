"""The training loop: which weights a step changes, and that a resumed run equals an uninterrupted one."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from granite_speech import GraniteSpeechForConditionalGeneration, GraniteSpeechProcessor
from granite_speech.errors import CheckpointError, InputError
from granite_speech.training import (
    Dialogue,
    SpeechData,
    TextData,
    Trainer,
    TrainerOptions,
    Utterance,
    attach_fresh_adapter,
    ctc_loss,
    parameter_groups,
    prepare,
    read_manifest,
    speech_loss,
    text_loss,
)
from tests.support.paths import ROOT
from tests.support.tiny_speech import PARTS, TEXTS, make_trainer, write_manifest, write_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("everything")
    write_model(folder / "model", dropout=0.2)
    write_manifest(folder, (*TEXTS, "one", "two", "three one"))
    return folder


def losses(trainer):
    return [(one["step"], one["loss"], one["gradient_norm"]) for one in trainer.history]


@pytest.fixture(scope="module")
def uninterrupted(folder):
    trainer = make_trainer(folder)
    trainer.run()
    return trainer


# --- resuming ----------------------------------------------------------------------------------------------------------------------------


def test_losses_are_reproducible_and_depend_on_the_seed(folder, uninterrupted):
    torch.manual_seed(123)  # the caller's generator has no effect and is not changed
    again = make_trainer(folder)
    again.run()
    assert torch.initial_seed() == 123
    assert losses(again) == losses(uninterrupted)
    other = make_trainer(folder, seed=1, steps=2)
    other.run()
    assert losses(other)[:2] != losses(uninterrupted)[:2]


@pytest.mark.parametrize("dtype, accumulate", [("float32", 1), ("bfloat16", 2)])
def test_a_resumed_run_equals_an_uninterrupted_one(folder, tmp_path, uninterrupted, dtype, accumulate):
    whole = uninterrupted
    if dtype != "float32":
        whole = make_trainer(folder, dtype=dtype, accumulate=accumulate)
        whole.run()
    begun = make_trainer(folder, tmp_path, dtype=dtype, accumulate=accumulate)
    begun.run(seconds=0)
    assert (begun.step, begun.is_done) == (0, False)
    for _ in range(3):
        begun = make_trainer(folder, tmp_path, dtype=dtype, accumulate=accumulate)
        assert begun.resume()
        before = begun.step
        begun.run(seconds=0.01 if begun.step < 2 else None)
        assert begun.step > before or before == 6
    assert begun.is_done and losses(begun) == losses(whole)
    for name, one in whole.model.state_dict().items():
        assert torch.equal(begun.model.state_dict()[name], one), name
    assert [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()] == begun.history == whole.history


KILLED = """
import sys
from pathlib import Path
from tests.support.tiny_speech import make_trainer
import torch
torch.set_num_threads(1)
trainer = make_trainer(Path(sys.argv[1]), Path(sys.argv[2]))
trainer.run()
"""


def test_a_killed_run_resumes_with_the_same_losses(folder, tmp_path, uninterrupted):
    """The process is killed at some point after its second step."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")]), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen([sys.executable, "-c", KILLED, str(folder), str(tmp_path)], env=environment)
    log = tmp_path / "log.jsonl"
    while process.poll() is None and (not log.exists() or log.read_bytes().count(b"\n") < 3):
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, "the process finished before it was killed"
    with open(log, "a") as file:
        file.write('{"step": 4, "lo')  # as if killed while writing
    trainer = make_trainer(folder, tmp_path)
    assert trainer.resume() and 2 <= trainer.step < 6
    trainer.run()
    assert losses(trainer) == losses(uninterrupted)


def test_a_failed_checkpoint_write_keeps_the_previous_checkpoint(folder, tmp_path, monkeypatch):
    import safetensors.torch

    trainer = make_trainer(folder, tmp_path, steps=2, checkpoint_every=1)
    trainer.run()
    before = (tmp_path / "state.safetensors").read_bytes()

    def fail(tensors, file, metadata):
        Path(file).write_bytes(b"the first part")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(safetensors.torch, "save_file", fail)
    with pytest.raises(CheckpointError, match="No space left"):
        trainer.checkpoint()
    assert (tmp_path / "state.safetensors").read_bytes() == before
    monkeypatch.undo()
    assert make_trainer(folder, tmp_path, steps=2, checkpoint_every=1).resume()


def test_a_checkpoint_of_a_different_run_is_refused(folder, tmp_path):
    make_trainer(folder, tmp_path, identity={"model": "a"}).run(seconds=0)
    cases = (
        ({"learning_rate": 1e-4}, "learning_rate = 0.0001 (was 0.003)"),
        ({"identity": {"model": "b"}}, "model = 'b' (was 'a')"),
        ({"seed": 2, "steps": 9}, "seed = 2 (was 0), steps = 9 (was 6)"),
    )
    for change, message in cases:
        with pytest.raises(InputError) as caught:
            make_trainer(folder, tmp_path, **{"identity": {"model": "a"}} | change).resume()
        assert message in caught.value.got
    with pytest.raises(CheckpointError, match=r"differs in .* parameters"):
        make_trainer(folder, tmp_path, identity={"model": "a"}, parts=("projector",)).resume()
    assert make_trainer(folder, tmp_path, identity={"model": "a"}, checkpoint_every=5, validate_every=3).resume()
    (tmp_path / "state.safetensors").write_bytes(b"x" * 100)
    with pytest.raises(CheckpointError, match="not a training checkpoint"):
        make_trainer(folder, tmp_path, identity={"model": "a"}).resume()
    assert not make_trainer(folder, tmp_path / "empty").resume()


# --- trainable and frozen parts ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("parts", [("projector", "adapter"), ("encoder",), ("language_model",), PARTS])
def test_trainable_parts_change_and_frozen_parts_do_not(folder, parts):
    trainer = make_trainer(folder, parts=parts, steps=3, loss=ctc_loss if parts == ("encoder",) else None)
    model = trainer.model
    before = {name: one.clone() for name, one in model.state_dict().items()}
    trainer.run()
    changed = {name for name, one in model.state_dict().items() if not torch.equal(one, before[name])}
    by_part = {part: {name for name in before if ("adapter" if "lora" in name else name.partition(".")[0]) == part} for part in PARTS}
    for part, names in by_part.items():
        if part not in parts:
            assert not names & changed, part
            assert not any(one.requires_grad or one.grad is not None for name, one in model.named_parameters() if name in names)
        else:
            assert {name for name, one in model.named_parameters() if name in names} <= changed, part
    statistics = {name for name in before if "running" in name or "num_batches" in name}
    assert statistics & changed == (statistics if "encoder" in parts else set())
    assert [model.encoder.training, model.projector.training] == ["encoder" in parts, "projector" in parts]


def test_batch_norm_statistics_exclude_padding(folder):
    """They are those of the packed frames of all clips."""
    trainer = make_trainer(folder, parts=("encoder",))
    batch = trainer.source.load(0, [0, 1, 2])
    seen = []
    norm = trainer.model.encoder.layers[0].conv.batch_norm
    norm.register_forward_hook(lambda module, arguments, output: seen.append(arguments[0]))
    before = norm.running_mean.clone()
    ctc_loss(trainer.model, batch, batch.counts)
    assert len(seen[0]) == sum(batch.clips.lengths)
    assert torch.allclose(norm.running_mean, 0.9 * before + 0.1 * seen[0].mean(0), atol=1e-6)


def test_training_an_absent_adapter_is_refused(tmp_path):
    model = write_model(tmp_path, adapter=False)
    with pytest.raises(InputError, match="without an adapter"):
        prepare(model, ("adapter",))


def test_a_new_adapter_changes_nothing_until_it_is_trained(tmp_path):
    model = write_model(tmp_path, adapter=False)
    ids = torch.tensor([[1, 2, 3]])
    embeddings = model.embed_tokens(ids)
    before = model(inputs_embeds=embeddings).logits
    attach_fresh_adapter(model, rank=3, alpha=6, targets=("q_proj", "up_proj"), seed=1)
    assert torch.equal(model(inputs_embeds=embeddings).logits, before)
    trained = prepare(model, ("adapter",))
    assert {name.split(".")[-3] for name in trained} == {"q_proj", "up_proj"} and all("language_model" in name for name in trained)
    assert len(trained) == 8 and trained["language_model.model.layers.0.mlp.up_proj.lora_A.weight"].shape == (3, 48)
    assert model.language_model.model.layers[0].mlp.up_proj.scaling == 2.0
    with pytest.raises(InputError, match="a model with an adapter"):
        attach_fresh_adapter(model, rank=3, alpha=6, targets=("q_proj",))


def test_one_model_trains_in_three_stages(tmp_path):
    """The encoder by CTC, the language model on text, then projector and adapter on speech with the rest frozen."""
    model = write_model(tmp_path / "model")
    dialogue = Dialogue(GraniteSpeechProcessor.from_pretrained(tmp_path / "model"), model.config)
    utterances = read_manifest(write_manifest(tmp_path))
    texts = [Utterance(text=one.text, prompt=one.text[::-1], audio=None, manifest=one.manifest, line=one.line) for one in utterances]
    speech, text = SpeechData(utterances, dialogue, batch_seconds=9.0, ctc=True), TextData(texts, dialogue, batch_tokens=200)
    stages = ((("encoder",), ctc_loss, speech), (("language_model",), text_loss, text), (("projector", "adapter"), speech_loss, speech))
    for parts, loss, source in stages:
        groups = parameter_groups(prepare(model, parts), 0.0)
        trainer = Trainer(model, loss, source, groups, TrainerOptions(steps=12, learning_rate=1e-2), progress=False)
        trainer.run()
        history = [one["loss"] for one in trainer.history]
        assert history[-1] < 0.995 * history[0], (parts, history)
        assert [one["audio_seconds"] for one in trainer.history[:1]] == [0 if source is text else 1.5]


# --- steps -------------------------------------------------------------------------------------------------------------------------------


def test_accumulated_batches_equal_one_large_batch(folder):
    """The encoder is frozen, because BatchNorm's statistics would depend on the batch."""
    parts, options = ("projector", "adapter"), {"steps": 1, "learning_rate": 1e-3}
    model = write_model(folder / "plain")
    results = []
    for accumulate, seconds in ((2, 1.5), (1, 100.0)):
        model = GraniteSpeechForConditionalGeneration.from_pretrained(folder / "plain")
        trainer = make_trainer(folder, model=model, parts=parts, accumulate=accumulate, seconds=seconds, **options)
        assert len(trainer.source.plan(0)) == accumulate
        trainer.run()
        results.append(trainer.history[0])
    assert results[0]["loss"] == pytest.approx(results[1]["loss"], rel=1e-5)
    assert results[0]["gradient_norm"] == pytest.approx(results[1]["gradient_norm"], rel=1e-4)
    assert results[0]["audio_seconds"] == results[1]["audio_seconds"] == 2.5


def test_each_epoch_uses_each_utterance_once(folder):
    trainer = make_trainer(folder, steps=None, epochs=3, accumulate=4)
    assert trainer.steps == math.ceil(sum(len(trainer.source.plan(epoch)) for epoch in range(3)) / 4) == 2
    trainer = make_trainer(folder, steps=None, epochs=2, parts=("projector",))
    loaded = []
    load = trainer.source.load
    trainer.source.load = lambda epoch, indices: loaded.append((epoch, *sorted(indices))) or load(epoch, indices)
    trainer.run()
    for epoch in range(2):
        assert sorted(index for one in loaded for index in one[1:] if one[0] == epoch) == list(range(6))


def test_a_step_uses_the_clipped_gradient_and_the_scheduled_rate(folder):
    trainer = make_trainer(folder, parts=("projector",), steps=4, warmup=0.5, clip_norm=0.01, learning_rate=0.5)
    trainer.run(seconds=0)
    trainer._step([next(trainer._batches())])
    moments = [value for name, value in trainer.optimizer.state().items() if name.startswith("exp_avg/")]
    assert torch.stack([one.norm() for one in moments]).norm() == pytest.approx(0.1 * 0.01, rel=1e-3)  # AdamW's momentum
    assert {group["lr"] for group in trainer.optimizer.optimizer.param_groups} == {0.25}


def test_bfloat16_losses_are_close_to_those_of_float32(folder):
    """BatchNorm stays in float32; the rest of the model is in bfloat16."""
    results = {}
    for dtype in ("float32", "bfloat16"):
        trainer = make_trainer(folder, dtype=dtype, steps=6)
        trainer.run()
        results[dtype] = [one["loss"] for one in trainer.history]
    norms = {name for name, one in trainer.model.state_dict().items() if one.dtype == torch.float32}
    assert norms and all(".batch_norm." in name for name in norms)
    assert {one.dtype for name, one in trainer.model.named_parameters() if "batch_norm" not in name} == {torch.bfloat16}
    assert results["float32"] != results["bfloat16"]
    assert results["bfloat16"] == pytest.approx(results["float32"], rel=0.05)


def test_a_loss_that_is_not_finite_stops_training_without_a_step(folder, tmp_path):
    def broken(model, batch, counts):
        value = ctc_loss(model, batch, counts)
        return value._replace(total=value.total * (torch.nan if broken.calls == 2 else 1.0))

    broken.calls = 0
    trainer = make_trainer(folder, tmp_path, parts=("encoder",), loss=broken)
    step = trainer._step

    def count(batches):
        broken.calls += 1
        return step(batches)

    trainer._step = count
    with pytest.raises(InputError) as caught:
        trainer.run()
    assert "in step 2, on " in caught.value.got and "train.jsonl, line " in caught.value.got and "learning_rate" in caught.value.remedy
    assert trainer.step == 1
    assert all(one.isfinite().all() for one in trainer.model.state_dict().values())


def test_validation_runs_in_evaluation_mode_and_restores_the_modes(folder):
    seen = []

    def validate(model):
        seen.append((trainer.step, any(module.training for module in model.modules())))
        return {"wer": 0.5}

    trainer = make_trainer(folder, parts=("projector", "adapter"), steps=5, validate_every=2)
    trainer.validate = validate
    trainer.run()
    assert seen == [(0, False), (2, False), (4, False), (5, False)]
    assert [trainer.model.encoder.training, trainer.model.projector.training] == [False, True]
    assert [one["step"] for one in trainer.history if "wer" in one] == [0, 2, 4, 5]


def test_starting_again_clears_the_log(folder, tmp_path):
    for _ in range(2):
        trainer = make_trainer(folder, tmp_path, parts=("projector",))
        trainer.validate = lambda model: {"wer": 1.0}
        trainer.resume()
        trainer.run(seconds=0)
    assert trainer.history == [{"step": 0, "wer": 1.0}] == [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]


def test_the_progress_bar_shows_loss_and_speed(folder, capfd):
    trainer = make_trainer(folder, steps=2)
    trainer.progress = True
    trainer.run()
    out, err = capfd.readouterr()
    assert out == "" and "2/2" in err and "audio-s/s" in err and f"loss {trainer.history[-1]['loss']:.4g}" in err


def test_batches_that_cannot_be_divided_among_processes_are_refused(folder, monkeypatch):
    for name, value in {"is_initialized": True, "get_rank": 0, "get_world_size": 2}.items():
        monkeypatch.setattr(torch.distributed, name, lambda value=value: value)
    with pytest.raises(InputError, match="accumulate = 3 for 2 processes"):
        make_trainer(folder, accumulate=3)


def test_beta2_reaches_adam(folder):
    low, default = (make_trainer(folder, beta2=beta2).optimizer.optimizer.param_groups[0]["betas"] for beta2 in (0.98, 0.999))
    assert (low, default) == ((0.9, 0.98), (0.9, 0.999))
