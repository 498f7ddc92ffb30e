"""IBM's notebook about fine-tuning: word errors, training of the projector and the adapter by transformers' Trainer, word errors."""

import json
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import jiwer
import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader
from transformers import Trainer, TrainingArguments
from transformers.feature_extraction_utils import BatchFeature

from granite_speech.checkpoints.hub import EMBEDDED_FOLDER
from tests.support.notebook_doors import DOORS, Door, clip
from tests.support.paths import ROOT
from tests.support.reference_models import scale_logits

# No part of an accelerated model may have to run as transformers wrote it.
pytestmark = pytest.mark.filterwarnings("error::granite_speech.interop.accelerate.AccelerationWarning")

# The bundled checkpoint was not trained with this instruction, so it has something to learn.
INSTRUCTION = "Please transcribe the following audio to text<|audio|>"
# With the space that its answers begin with.
TEXTS = [" " + json.loads(line)["text"] for line in (ROOT / "tests/speech/manifest.jsonl").read_text().splitlines()]
TRAINING, VALIDATION, TEST = range(8), (1, 5), (0, 2, 5, 8)
DEVICE = "cpu"


@dataclass(frozen=True)
class Setting:
    """What differs between the notebook as written and a run that can be compared closely.

    Attributes:
        dtype: of the weights; with bfloat16 there is autocast, too.
        accumulation: batches of a step. transformers' class makes losses and gradients too large by it.
        samples: that shorter clips are filled up to with silence, as transformers does in a batch before it computes features.
    """

    dtype: torch.dtype
    accumulation: int
    samples: int


AS_WRITTEN = Setting(torch.bfloat16, accumulation=2, samples=0)
PRECISE = Setting(torch.float32, accumulation=1, samples=48000)


@dataclass
class Results:
    """What the cells print.

    Attributes:
        transcripts: of the test clips, "before" and "after" training.
        errors: their word error rates.
        losses: of training, each of a tenth of the steps.
        validation: losses of the validation clips, as often.
    """

    transcripts: dict[str, list[str]] = field(default_factory=dict)
    errors: dict[str, float] = field(default_factory=dict)
    losses: list[float] = field(default_factory=list)
    validation: list[float] = field(default_factory=list)


class Collator:
    """Makes batches: prompts padded on the left and, for training, answers padded on the right."""

    def __init__(self, processor: Any, training: bool):
        self.processor, self.training = processor, training

    def __call__(self, examples: list[dict[str, Any]]) -> BatchFeature:
        prompts, audios = [one["prompt"] for one in examples], [one["audio"]["array"] for one in examples]
        inputs = self.processor(prompts, audios, return_tensors="pt", padding=True, padding_side="left")
        ids, mask, labels = inputs.input_ids, inputs.attention_mask, None
        if self.training:
            tokenizer = self.processor.tokenizer
            answers = [one["text"] + tokenizer.eos_token for one in examples]
            answers = tokenizer(answers, return_tensors="pt", padding=True, padding_side="right")
            labels = answers.input_ids.clone()
            labels[~(answers.attention_mask.bool())] = -100
            labels = torch.cat([torch.full_like(ids, -100), labels], dim=1)
            ids, mask = torch.cat([ids, answers.input_ids], dim=1), torch.cat([mask, answers.attention_mask], dim=1)
        data = {"input_ids": ids, "attention_mask": mask, "labels": labels, "input_features": inputs.input_features}
        return BatchFeature(data=data | {"input_features_mask": inputs.input_features_mask})


class Notebook:
    """The notebook's model and what its cells do with it.

    Args:
        door: of the run.
        setting: of the run.
        scaled: divide the logits of transformers' model, which does so only up to 5.9.
        folder: of the checkpoint.
    """

    def __init__(self, door: Door, setting: Setting, *, scaled: bool = False, folder: str = str(EMBEDDED_FOLDER)):
        self.setting, self.autocast = setting, setting.dtype == torch.bfloat16
        self.processor = door.GraniteSpeechProcessor.from_pretrained(folder)
        self.model = door.loaded(door.GraniteSpeechForConditionalGeneration.from_pretrained(folder, dtype=setting.dtype))
        if scaled:
            scale_logits(self.model)

    def run(self) -> Results:
        results = Results()
        self.measure(results, "before")
        self.train(results)
        self.measure(results, "after")
        return results

    def examples(self, numbers: Iterable[int]) -> list[dict[str, Any]]:
        chat = [{"role": "user", "content": INSTRUCTION}]
        prompt = self.processor.tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
        rate, rows = self.processor.audio_processor.sampling_rate, []
        for number in numbers:
            samples = clip(number)
            samples = np.pad(samples, (0, max(0, self.setting.samples - len(samples))))
            rows.append({"audio": {"array": samples, "sampling_rate": rate}, "text": TEXTS[number], "prompt": prompt})
        return rows

    def transcripts(self) -> list[str]:
        """Texts of the test clips, by beam search."""
        loader = DataLoader(self.examples(TEST), batch_size=16, collate_fn=Collator(self.processor, training=False), num_workers=1)
        model, texts = self.model.eval().to(DEVICE), []
        for batch in loader:
            batch = batch.to(DEVICE)
            with torch.inference_mode(), torch.amp.autocast(DEVICE, dtype=torch.bfloat16, enabled=self.autocast):
                ids = model.generate(**batch, max_new_tokens=400, num_beams=4, early_stopping=True)
            ids = ids[:, batch.input_ids.shape[1] :].cpu()
            texts.extend(self.processor.tokenizer.decode(one, skip_special_tokens=True) for one in ids)
        return texts

    def measure(self, results: Results, when: str) -> None:
        results.transcripts[when] = self.transcripts()
        results.errors[when] = jiwer.wer([TEXTS[number] for number in TEST], results.transcripts[when])

    def train(self, results: Results) -> None:
        for name, one in self.model.named_parameters():
            one.requires_grad = "projector" in name or "lora" in name
        with tempfile.TemporaryDirectory() as folder:
            trainer = Trainer(
                model=self.model,
                args=self.arguments(folder),
                train_dataset=self.examples(TRAINING),
                eval_dataset=self.examples(VALIDATION),
                data_collator=Collator(self.processor, training=True),
                processing_class=self.processor,
            )
            trainer.train()
        results.losses = [one["loss"] for one in trainer.state.log_history if "loss" in one]
        results.validation = [one["eval_loss"] for one in trainer.state.log_history if "eval_loss" in one]

    def arguments(self, folder: str) -> TrainingArguments:
        return TrainingArguments(
            output_dir=folder,
            remove_unused_columns=False,
            report_to="none",
            bf16=self.autocast,
            use_cpu=True,  # needed for bf16 without a GPU
            eval_strategy="steps",
            save_strategy="no",
            eval_steps=0.1,
            dataloader_num_workers=1,
            per_device_train_batch_size=2,
            per_device_eval_batch_size=16,
            gradient_accumulation_steps=self.setting.accumulation,
            num_train_epochs=3.0,
            warmup_steps=0.2,  # a share of the steps, which was called warmup_ratio before transformers 5
            logging_steps=0.1,
            learning_rate=2e-3,
            data_seed=42,
            disable_tqdm=True,
        )


@cache
def finished(door: str, setting: Setting) -> tuple[Notebook, Results]:
    """Logits have the same scale in all runs, which therefore have one reference."""
    notebook = Notebook(Door(door), setting, scaled=door != "import changed")
    return notebook, notebook.run()


def results_of(door: str, setting: Setting) -> tuple[Results, Results]:
    """Of a door, and of transformers."""
    return finished(door, setting)[1], finished("transformers", setting)[1]


@pytest.mark.parametrize("door", DOORS[1:])
def test_losses_and_words_are_those_of_transformers(door: str):
    ours, theirs = results_of(door, PRECISE)
    assert len(ours.losses) == len(ours.validation) == 6
    assert ours.losses == pytest.approx(theirs.losses, rel=1e-4, abs=1e-5)
    assert ours.validation == pytest.approx(theirs.validation, rel=1e-4, abs=1e-5)
    assert ours.transcripts == theirs.transcripts
    assert ours.errors == theirs.errors


def test_training_halves_the_word_errors():
    errors = finished("import changed", PRECISE)[1].errors
    assert errors["after"] <= errors["before"] / 2


@pytest.mark.parametrize("door", DOORS[1:])
def test_the_notebook_as_written_learns_as_much_as_with_transformers(door: str):
    ours, theirs = results_of(door, AS_WRITTEN)
    assert ours.validation[0] == pytest.approx(theirs.validation[0], rel=0.02)
    assert ours.validation == pytest.approx(theirs.validation, rel=0.15)  # differences of rounding grow from step to step
    assert ours.errors == pytest.approx(theirs.errors, abs=0.2)
    assert ours.validation[-1] < ours.validation[0]


@pytest.mark.parametrize("door", DOORS[1:])
def test_a_saved_model_writes_the_words_of_the_trained_one(door: str, tmp_path: Path):
    (notebook, results), folder = finished(door, PRECISE), str(tmp_path)
    notebook.model.save_pretrained(folder)
    notebook.processor.save_pretrained(folder)
    assert Notebook(Door("import changed"), PRECISE, folder=folder).transcripts() == results.transcripts["after"]
    if door == "import changed":
        assert Notebook(Door("transformers"), PRECISE, scaled=True, folder=folder).transcripts() == results.transcripts["after"]
