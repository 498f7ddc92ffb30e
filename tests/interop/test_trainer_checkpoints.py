"""Checkpoints of transformers' Trainer: saved, resumed from, chosen as the best, with and without adapters."""

import json

import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import TrainerCallback

import granite_speech
from granite_speech.checkpoints.weight_names import HEAD, canonical, canonical_keys, is_lora
from granite_speech.errors import CheckpointError
from tests.support.reference_models import scale_logits
from tests.support.speech_dataset import Collator, speech
from tests.support.trainers import DOORS, build, keep_statistics, losses, make_trainer
from tests.support.two_libraries import library

doors = pytest.mark.parametrize("door", DOORS)
STEPS = 4
EVEN = [one | {"text": "nine"} for one in speech(2, samples=8000)]
EVERY_STEP = {"save_strategy": "steps", "save_steps": 1, "max_steps": STEPS, "learning_rate": 1e-3}


class StopAfter(TrainerCallback):
    """Stops a run, as somebody who interrupts it."""

    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **other):
        control.should_training_stop = state.global_step == self.step


def weights(model):
    """Weights by canonical name. Statistics of BatchNorm are among them, except those of a PeftModel, which saves none."""
    found = dict(model.named_parameters()) if isinstance(model, PeftModel) else model.state_dict()
    return {canonical(name): one.detach().clone() for name, one in found.items() if one.is_floating_point()}


def assert_equal_weights(found, expected):
    assert found.keys() == expected.keys()
    for name, one in expected.items():
        torch.testing.assert_close(found[name], one, rtol=0, atol=1e-6, msg=name)


def with_adapter(door):
    """The checkpoint's own adapter and the projector are trained, as in the released recipe."""
    model = build(door, adapter=True)
    for name, one in model.named_parameters():
        one.requires_grad_("lora" in name or "projector" in name)
    return model


def by_peft(door):
    torch.manual_seed(3)
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    return get_peft_model(keep_statistics(build(door)), config)


MODELS = {"whole": build, "own adapter": with_adapter, "peft": by_peft}
RESUMED = [(door, kind) for door in DOORS for kind in MODELS]
RESUMED += [("theirs", "peft")]  # of others see test_transformers_own_class_forgets_its_weights


@pytest.mark.parametrize(("door", "kind", "newest"), [*((*one, True) for one in RESUMED), ("ours", "whole", False)])
def test_a_resumed_run_goes_on_like_one_that_was_not_stopped(door, kind, newest, tmp_path, monkeypatch):
    warned = []
    monkeypatch.setattr(transformers.trainer.logger, "warning", lambda text, *arguments: warned.append(text))
    unsaved = EVERY_STEP | {"save_strategy": "no"}
    whole = make_trainer(MODELS[kind](door), tmp_path / "whole", **unsaved)
    whole.train()
    stopped = make_trainer(MODELS[kind](door), tmp_path / "stopped", callbacks=[StopAfter(2 if newest else 3)], **EVERY_STEP)
    stopped.train()
    model = MODELS[kind](door)
    resumed = make_trainer(model, tmp_path / "stopped", **unsaved)
    resumed.train(resume_from_checkpoint=True if newest else str(tmp_path / "stopped" / "checkpoint-2"))
    assert losses(resumed) == pytest.approx(losses(whole), abs=1e-5) and len(losses(resumed)) == STEPS
    assert_equal_weights(weights(model), weights(whole.model))
    assert not any("keys in the checkpoint" in one for one in warned)
    before = weights(MODELS[kind](door))
    assert max(float((one - before[name]).abs().max()) for name, one in weights(model).items()) > 1e-3, "it was trained"


def output(model, batch):
    """Logits; the batch has no padding, for which transformers computes some too."""
    with torch.no_grad():
        return model.eval()(**batch).logits


@doors
@pytest.mark.parametrize("kind", ["whole", "own adapter"])
def test_a_saved_model_loads_in_both_packages(door, kind, tmp_path):
    model = MODELS[kind](door)
    trainer = make_trainer(model, tmp_path / "run", learning_rate=1e-2)
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    names = canonical_keys(load_file(tmp_path / "saved" / "model.safetensors")).values()
    if door == "ours" or kind == "whole":  # transformers writes a tied head and the adapter too if there is an adapter
        assert HEAD not in names and not any(map(is_lora, names)), "a tied head is the embedding, an adapter has its own file"
    assert (tmp_path / "saved" / "adapter_model.safetensors").is_file() == (kind == "own adapter")
    assert (tmp_path / "saved" / "training_args.bin").is_file()
    batch, trained = trainer.data_collator(EVEN), weights(model)
    expected = output(model, batch)
    assert not torch.allclose(expected, output(MODELS[kind](door), batch), atol=0.1), "it was trained"
    # transformers 5.17 draws q_proj and v_proj anew when it reads a folder with an adapter that it has written itself.
    readers = (granite_speech, transformers) if door == "ours" or kind == "whole" else (granite_speech,)
    for package in readers:
        loaded = package.GraniteSpeechForConditionalGeneration.from_pretrained(tmp_path / "saved")
        found = weights(loaded)
        assert all(torch.equal(found[name], one) for name, one in trained.items() if name in found)
        assert loaded.lm_head.weight is loaded.get_input_embeddings().weight
        if package is transformers:
            scale_logits(loaded)
        torch.testing.assert_close(output(loaded, batch), expected, rtol=0, atol=3e-4)
    processor = granite_speech.AutoProcessor.from_pretrained(tmp_path / "saved")
    again = Collator(processor, lengths=False)(EVEN)
    assert all(torch.equal(again[name], one) for name, one in batch.items())


@pytest.mark.parametrize("door", ["ours"])
@pytest.mark.parametrize("kind", MODELS)
def test_the_best_checkpoint_is_loaded_at_the_end(door, kind, tmp_path):
    scores = iter([1.0, 3.0, 2.0, 0.0])
    seen = {}

    class Keep(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **other):
            seen[state.global_step] = weights(model)

    best = {"load_best_model_at_end": True, "metric_for_best_model": "score", "greater_is_better": True, "save_total_limit": 2}
    evaluation = {"eval_strategy": "steps", "eval_steps": 1, "compute_metrics": lambda prediction: {"score": next(scores)}}
    model = MODELS[kind](door)
    trainer = make_trainer(model, tmp_path, callbacks=[Keep()], **EVERY_STEP, **best, **evaluation)
    trainer.train()
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-2")
    assert sorted(one.name for one in tmp_path.glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-4"]
    assert_equal_weights(weights(model), seen[2])
    changed = [name for name, one in seen[4].items() if not torch.equal(one, seen[2][name])]
    assert changed and (kind == "whole" or any(map(is_lora, changed)))


@doors
def test_a_checkpoint_of_peft_has_the_adapter_alone(door, tmp_path):
    found = []
    for one in (door, "theirs"):
        model = by_peft(one)
        trainer = make_trainer(model, tmp_path / one, **EVERY_STEP | {"adam_epsilon": 1e-5})
        trainer.train()
        found.append(losses(trainer))
        folder = tmp_path / one / "checkpoint-4"
        files = {file.name for file in folder.iterdir()}
        assert "model.safetensors" not in files and {"adapter_model.safetensors", "adapter_config.json", "optimizer.pt"} <= files
        batch = trainer.data_collator(EVEN)
        loaded = PeftModel.from_pretrained(build(door), folder)
        torch.testing.assert_close(output(loaded, batch), output(model, batch), rtol=0, atol=1e-3)
    assert found[0] == pytest.approx(found[1], abs=1e-4)


@pytest.mark.parametrize("door", ["ours"])
def test_a_model_card_can_be_written(door, tmp_path):
    trainer = make_trainer(build(door), tmp_path, max_steps=1)
    trainer.train()
    trainer.create_model_card(model_name="a tuned model")
    assert "a tuned model" in (tmp_path / "README.md").read_text()


# --- only of our class -----------------------------------------------------------------------------------------------------------


def test_resuming_with_another_adapter_is_refused(tmp_path):
    trainer = make_trainer(with_adapter("ours"), tmp_path, **EVERY_STEP | {"max_steps": 1})
    trainer.train()
    model = build("ours")
    model.add_adapter({"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["o_proj"]}, "other")
    model.requires_grad_(True)
    with pytest.raises(CheckpointError, match="active adapter"):
        make_trainer(model, tmp_path, **EVERY_STEP).train(resume_from_checkpoint=True)


def test_transformers_own_class_forgets_its_weights(tmp_path):
    """A recorded difference: its files have names that its state dict does not, so a resumed run starts from the first weights."""
    make_trainer(build("theirs"), tmp_path, **EVERY_STEP | {"max_steps": 1}).train()
    model = build("theirs")
    make_trainer(model, tmp_path, **EVERY_STEP | {"max_steps": 1}).train(resume_from_checkpoint=True)
    first = dict(build("theirs").named_parameters())
    assert all(torch.equal(one, first[name]) for name, one in model.named_parameters()), "it resumes now: add it to RESUMED"


def test_transformers_own_models_are_saved_as_before(tmp_path):
    """The Trainer is changed for our models; others do not notice."""
    make_trainer(build("ours"), tmp_path / "ours")
    trainer = make_trainer(build("theirs"), tmp_path / "theirs", processing_class=None)
    trainer.save_model(str(tmp_path / "saved"))
    assert json.loads((tmp_path / "saved" / "config.json").read_text())["architectures"] == ["GraniteSpeechForConditionalGeneration"]
    plain = torch.nn.Linear(2, 2)
    make_trainer(plain, tmp_path / "plain", processing_class=None).save_model(str(tmp_path / "linear"))
    assert set(load_file(tmp_path / "linear" / "model.safetensors")) == {"weight", "bias"}
    assert not isinstance(library("granite_speech").model, transformers.PreTrainedModel)
