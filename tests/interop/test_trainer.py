"""Training by transformers' Trainer: losses, gradients, evaluation and the Trainer's options. Checkpoints are in test_trainer_checkpoints.

Every test takes a door: how users come to the model that is trained.
"""

from functools import cache

import numpy as np
import pytest
import torch
from transformers import Seq2SeqTrainer, TrainerCallback

from granite_speech import GraniteSpeechForConditionalGeneration
from tests.support.speech_dataset import Collator, columns, speech
from tests.support.trainers import DOORS, build, keep_statistics, losses, make_trainer
from tests.support.two_libraries import library

doors = pytest.mark.parametrize("door", DOORS)
# An accelerated model has transformers' own way with these: num_items_in_batch is swallowed, checkpointing of layers is refused, and
# options of the Trainer alone do not depend on the model.
ours = pytest.mark.parametrize("door", ["ours"])


@cache
def plain_losses(door, folder):
    """Losses of a run without options, then of its evaluation."""
    trainer = make_trainer(build(door), folder)
    trainer.train()
    return [*losses(trainer), trainer.evaluate()["eval_loss"]]


@pytest.fixture
def plain(door, tmp_path_factory):
    return plain_losses(door, tmp_path_factory.getbasetemp())


# --- losses ----------------------------------------------------------------------------------------------------------------------


# Adam divides by the size of a gradient. That of a key's bias is rounding alone, which a small epsilon would turn into whole steps.
OPTIMIZERS = {
    "adamw": {"optim": "adamw_torch", "learning_rate": 3e-5, "adam_epsilon": 1e-5, "max_grad_norm": 1.0},
    "sgd": {"optim": "sgd", "learning_rate": 0.03, "max_grad_norm": 0.5, "weight_decay": 0.01, "lr_scheduler_type": "cosine"},
}


def run(model, folder, **options):
    """Losses and gradient norms of twenty steps."""
    trainer = make_trainer(model, folder, train_dataset=speech(8, samples=8000), max_steps=20, **options)
    trainer.train()
    return trainer, losses(trainer), [one["grad_norm"] for one in trainer.state.log_history if "grad_norm" in one]


@cache
def run_of_theirs(optimizer, folder):
    return run(build("theirs"), folder / optimizer, **OPTIMIZERS[optimizer])


@doors
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_twenty_steps_have_the_losses_of_transformers(door, optimizer, tmp_path, tmp_path_factory):
    ours, found, norms = run(build(door), tmp_path, **OPTIMIZERS[optimizer])
    theirs, expected, their_norms = run_of_theirs(optimizer, tmp_path_factory.getbasetemp())
    assert len(found) == 20 and min(found[-4:]) < 0.7 * found[0]
    assert found == pytest.approx(expected, abs=1e-4)
    assert norms == pytest.approx(their_norms, rel=2e-3)
    assert ours.state.total_flos == theirs.state.total_flos


@ours
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_accumulated_batches_train_like_one_batch(door, optimizer, tmp_path):
    rows = speech(8, samples=8000)
    counts = [len(one["text"]) for one in rows]
    assert len(set(counts[:4])) > 2, "examples with different numbers of labels"
    results = []
    for size, accumulated in ((4, 1), (1, 4)):
        sizes = {"per_device_train_batch_size": size, "gradient_accumulation_steps": accumulated}
        model = keep_statistics(build(door))
        trainer = make_trainer(model, tmp_path / str(size), train_dataset=rows, max_steps=2, **OPTIMIZERS[optimizer], **sizes)
        assert trainer.model_accepts_loss_kwargs
        trainer.train()
        norms = [one["grad_norm"] for one in trainer.state.log_history if "grad_norm" in one]
        results.append((losses(trainer), norms, {name: one.detach() for name, one in model.named_parameters()}))
    (whole, whole_norms, weights), (parts, norms, accumulated_weights) = results
    assert parts == pytest.approx(whole, abs=1e-5)
    assert norms == pytest.approx(whole_norms, rel=1e-4)
    before = dict(build(door).named_parameters())
    for name, expected in weights.items():
        moved = float((expected - before[name].detach()).abs().max())
        torch.testing.assert_close(accumulated_weights[name], expected, rtol=0, atol=1e-7 + 2e-2 * moved, msg=name)


@ours
def test_a_rows_first_label_is_not_counted(door, tmp_path):
    """Nothing predicts it, so a loss that counts it would be too small."""
    rows = columns(library("granite_speech").processor, 2)
    for one in rows:
        one["labels"] = one["input_ids"]  # of the prompt too
    options = {"train_dataset": rows, "remove_unused_columns": True, "data_collator": None}
    model = build(door)
    trainer = make_trainer(model, tmp_path, max_steps=1, **options)
    batch = next(iter(trainer.get_train_dataloader()))
    assert "speaker" not in batch
    expected = float(model.train()(**batch).loss)
    trainer.train()
    assert losses(trainer) == pytest.approx([expected], rel=1e-5)


@ours
def test_label_smoothing_and_a_loss_of_the_users(door, tmp_path):
    def loss(outputs, labels, num_items_in_batch=None):
        assert isinstance(outputs, dict) and num_items_in_batch == (labels[:, 1:] != -100).sum()
        return outputs["logits"].square().mean()

    for name, option in {"smoothed": {"label_smoothing_factor": 0.1}, "own": {"compute_loss_func": loss}}.items():
        found = []
        for one in (door, "theirs"):
            trainer = make_trainer(build(one), tmp_path / name / one, max_steps=2, adam_epsilon=1e-4, data_collator=even(), **option)
            trainer.train()
            found.append(losses(trainer))
        assert found[0] == pytest.approx(found[1], rel=1e-4), name


def even():
    """A collator whose batches have no padding, for which transformers computes logits too."""
    collate = Collator(library("granite_speech").processor, lengths=False)
    return lambda rows: collate([one | {"text": "nine"} for one in rows])


# --- evaluation ------------------------------------------------------------------------------------------------------------------


class Metrics:
    """Keeps what `compute_metrics` is given."""

    def __call__(self, prediction):
        self.predictions, self.labels = prediction.predictions, prediction.label_ids
        return {"rows": len(prediction.label_ids)}


@doors
def test_evaluation_while_training(door, tmp_path):
    metrics = Metrics()
    options = {"eval_strategy": "steps", "eval_steps": 1, "compute_metrics": metrics, "include_num_input_tokens_seen": "all"}
    choose = {"preprocess_logits_for_metrics": lambda logits, labels: logits[0].argmax(-1)}
    trainer = make_trainer(build(door), tmp_path, max_steps=2, **options, **choose)
    trainer.train()
    history = [one for one in trainer.state.log_history if "eval_loss" in one]
    assert [one["step"] for one in history] == [1, 2] and all(one["eval_rows"] == 4 for one in history)
    assert metrics.predictions.shape == metrics.labels.shape and metrics.predictions.dtype == np.int64
    assert trainer.state.num_input_tokens_seen == sum(one["input_ids"].numel() for one in trainer.get_train_dataloader())
    assert trainer.evaluate()["eval_loss"] == pytest.approx(history[-1]["eval_loss"], rel=1e-6)


@doors
def test_the_evaluation_loss_is_that_of_transformers(door, tmp_path):
    options = {"prediction_loss_only": True, "per_device_eval_batch_size": 3}
    found, expected = (make_trainer(build(one), tmp_path / one, **options).evaluate()["eval_loss"] for one in (door, "theirs"))
    assert found == pytest.approx(expected, rel=1e-5)


@doors
@pytest.mark.parametrize("labelled", [True, False])
def test_predictions_of_batches_of_different_widths(door, labelled, tmp_path):
    model = build(door)
    collate = Collator(library("granite_speech").processor, answers=labelled, lengths=False)
    rows = [speech(3)[index] for index in (1, 0, 2)]
    trainer = make_trainer(model, tmp_path, data_collator=collate)
    result = trainer.predict(rows)
    logits, audio = result.predictions
    batches = [collate(rows[:2]), collate(rows[2:])]
    assert batches[0]["input_ids"].shape[1] != batches[1]["input_ids"].shape[1]
    assert logits.shape[:2] == (3, max(one["input_ids"].shape[1] for one in batches)) and audio.shape[0] == 3
    start = 0
    for batch in batches:
        with torch.no_grad():
            expected = model.eval()(**batch)["logits"].numpy()
        end = start + len(expected)
        np.testing.assert_allclose(logits[start:end, : expected.shape[1]], expected, atol=1e-4)
        assert (logits[start:end, expected.shape[1] :] == -100).all()
        if labelled:
            np.testing.assert_array_equal(result.label_ids[start:end, : expected.shape[1]], batch["labels"])
        start = end
    assert labelled or (result.label_ids is None and "test_loss" not in result.metrics)
    only = trainer.predict(rows, ignore_keys=["past_key_values", "audio_hidden_states"]).predictions
    np.testing.assert_allclose(only, logits, atol=1e-5)


@doors
def test_answers_by_generate(door, tmp_path):
    collate = Collator(library("granite_speech").processor, answers=False, lengths=False)
    options = {"kind": Seq2SeqTrainer, "predict_with_generate": True, "data_collator": collate}
    results = []
    for one in (door, "theirs"):
        trainer = make_trainer(build(one), tmp_path / one, **options)
        rows = speech(4, samples=8000)
        results.append([trainer.predict(rows, max_new_tokens=5).predictions, trainer.predict(rows, max_length=52, num_beams=2).predictions])
    for found, expected in zip(*results, strict=True):
        np.testing.assert_array_equal(found, expected)
    words = library("granite_speech").processor.batch_decode(results[0][0], skip_special_tokens=True)
    assert len(words) == 4 and all("ASSISTANT:" in one for one in words)


# --- options ---------------------------------------------------------------------------------------------------------------------


UNCHANGED = {
    "workers": {"dataloader_num_workers": 1, "dataloader_persistent_workers": True},
    "one device's tokens": {"average_tokens_across_devices": False},
    "counted tokens": {"include_num_input_tokens_seen": True},
    "batch size found": {"auto_find_batch_size": True},
    "names of labels": {"label_names": ["labels"]},
    "transformers' defaults": {"torch_compile": False, "push_to_hub": False, "dataloader_pin_memory": False},
    "checkpointing": {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}},
    "reentrant checkpointing": {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
}


@ours
@pytest.mark.parametrize("name", UNCHANGED)
def test_options_that_do_not_change_the_losses(door, name, plain, tmp_path):
    model = build(door)
    trainer = make_trainer(model, tmp_path, **UNCHANGED[name])
    trainer.train()
    assert trainer.model is model
    # After the evaluation too, which uses the statistics of BatchNorm: a layer that runs again must not count a batch twice.
    assert [*losses(trainer), trainer.evaluate()["eval_loss"]] == pytest.approx(plain, rel=1e-5)
    if "checkpointing" in name:
        assert model.is_gradient_checkpointing


@ours
@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_of_frozen_layers(door, reentrant, tmp_path):
    """No input of the first layers needs a gradient, which reentrant checkpointing would take for the end of the graph."""
    found, options = [], {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": reentrant}}
    for one in ({}, options):
        model = build(door, adapter=True)
        for name, weight in model.named_parameters():
            weight.requires_grad_("lora" in name or "encoder.layers.0" in name)
        trainer = make_trainer(model, tmp_path, learning_rate=1e-3, adam_epsilon=1e-5, max_steps=3, **one)
        trainer.train()
        found.append(losses(trainer))
    assert found[1] == pytest.approx(found[0], rel=1e-5) and found[0][2] < found[0][0]


@ours
def test_a_model_made_by_the_trainer(door, plain, tmp_path):
    trainer = make_trainer(None, tmp_path, model_init=lambda: build(door))
    trainer.train()
    assert losses(trainer) == pytest.approx(plain[:2], rel=1e-5)


@ours
def test_full_determinism(door, plain, tmp_path):
    try:
        trainer = make_trainer(build(door), tmp_path, full_determinism=True, seed=42)
        trainer.train()
    finally:
        torch.use_deterministic_algorithms(False)
    assert losses(trainer) == pytest.approx(plain[:2], rel=1e-5)


@doors
def test_bfloat16(door, plain, tmp_path):
    model = build(door)
    trainer = make_trainer(model, tmp_path, bf16=True)
    trainer.train()
    assert losses(trainer) == pytest.approx(plain[:2], rel=0.1) and losses(trainer) != plain[:2]
    assert {one.dtype for one in model.parameters()} == {torch.float32}
    with torch.no_grad():
        output = model(**next(iter(trainer.get_eval_dataloader())))
    assert isinstance(output, dict) and output.loss.dtype == output["logits"].dtype == torch.float32, "accelerate converts them"
    assert trainer.predict(trainer.eval_dataset).predictions[0].dtype == np.float32
    assert make_trainer(model, tmp_path, bf16_full_eval=True).evaluate()["eval_loss"] < 20 and model.dtype == torch.bfloat16


@ours
def test_the_gradient_is_clipped(door, tmp_path):
    model = build(door)
    trainer = make_trainer(model, tmp_path, max_steps=1, optim="sgd", learning_rate=1.0, max_grad_norm=1e-3, weight_decay=0.0)
    trainer.train()
    before = dict(build(door).named_parameters())
    moved = sum(float((one.detach() - before[name]).square().sum()) for name, one in model.named_parameters()) ** 0.5
    assert moved == pytest.approx(1e-3, rel=1e-2)


@ours
def test_noise_on_the_embeddings(door, plain, tmp_path):
    model = build(door)
    trainer = make_trainer(model, tmp_path, neftune_noise_alpha=20.0)
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert losses(trainer)[0] != pytest.approx(plain[0], rel=1e-3)
    assert not model.get_input_embeddings()._forward_hooks, "removed after training"
    assert make_trainer(build(door), tmp_path).evaluate()["eval_loss"] == pytest.approx(before, rel=1e-6)


class Watcher(TrainerCallback):
    def __init__(self):
        self.events = []

    def on_train_begin(self, args, state, control, model=None, **other):
        self.model = model
        self.events.append("begin")

    def on_step_end(self, args, state, control, **other):
        self.events.append(state.global_step)
        control.should_training_stop = state.global_step == 2

    def on_train_end(self, args, state, control, **other):
        self.events.append("end")


@doors
def test_a_callback_sees_the_model_and_stops_the_run(door, tmp_path):
    watcher, model = Watcher(), build(door)
    make_trainer(model, tmp_path, max_steps=5, callbacks=[watcher]).train()
    assert watcher.events == ["begin", 1, 2, "end"] and watcher.model is model


def test_a_column_of_lengths_reaches_our_model(tmp_path):
    """With them, nothing is computed for padded frames; transformers' model does not know them."""
    collate = Collator(library("granite_speech").processor)
    rows = [{name: one[0] for name, one in collate([row]).items()} | {"speaker": "A"} for row in speech(2, samples=8000)[:1] * 2]
    model = build("ours")
    trainer = make_trainer(model, tmp_path, train_dataset=rows, remove_unused_columns=True, data_collator=None, max_steps=1)
    assert "input_features_lengths" in next(iter(trainer.get_train_dataloader()))
    trainer.train()
    assert isinstance(model, GraniteSpeechForConditionalGeneration) and len(losses(trainer)) == 1
