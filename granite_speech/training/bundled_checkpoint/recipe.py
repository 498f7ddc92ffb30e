"""The recipe of the bundled checkpoint: trains a small but complete Granite Speech model on synthetic speech.

Like the parts of the real model (arXiv 2505.08699), its parts are trained one after another:

1. the encoder, by CTC over characters at the middle and last layers, on speech that gets harder (`Lessons`);
2. the language model, on text tasks: digits to words, words to digits, repeating words, clearing up stutters;
3. the projector, to produce the embeddings of the letters that the encoder predicts, which look like a stutter;
4. projector and adapter, on speech. The rest is frozen, so without the adapter the language model is that of stage 2;
5. the same two parts, for less time, on the request of the 3.x model cards too, which stage 4 does not have.

Each stage has its own training checkpoint, so the recipe can be stopped at any time and run again. On other hardware the data is the same
and results differ by rounding.

`make embedded` runs it.
"""

import argparse
import json
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path

import numpy as np
import torch

from granite_speech.inputs.features import GraniteSpeechFeatureExtractor
from granite_speech.inputs.processor import GraniteSpeechProcessor
from granite_speech.model import GraniteSpeechForConditionalGeneration
from granite_speech.training.batches import BatchSource
from granite_speech.training.bundled_checkpoint.lessons import Lessons
from granite_speech.training.bundled_checkpoint.small_model import PROMPTS, PROMPTS_OF_CARDS, make_model, make_tokenizer
from granite_speech.training.bundled_checkpoint.synthesis import synthesize
from granite_speech.training.bundled_checkpoint.vocabulary import BLANK, make_text_task
from granite_speech.training.data import TextData
from granite_speech.training.dialogue import Dialogue
from granite_speech.training.evaluation import ctc_transcripts, transcripts, word_error_rate
from granite_speech.training.losses import LossFunction, ctc_loss, label_loss, speech_loss, text_loss
from granite_speech.training.manifest import Utterance, read_manifest
from granite_speech.training.optimizer import parameter_groups
from granite_speech.training.options import TrainerOptions
from granite_speech.training.preparation import attach_fresh_adapter, prepare
from granite_speech.training.processes import process_group, rank, shared_errors
from granite_speech.training.trainer import Trainer, Validation

STAGES = ("encoder", "language_model", "projector", "adapter", "requests")


@dataclass(frozen=True)
class Recipe:
    """Sizes of the data and the stages. The defaults make the bundled checkpoint.

    Attributes:
        clips, unseen: number of training clips, and of test clips in held-out voices.
        lessons, lesson: number of lessons in the encoder's stage, and of clips in each lesson of any stage.
        texts, text_epochs: number of texts and epochs in the language model's stage.
        projector_lessons, adapter_lessons, request_lessons: number of lessons in the last three stages.
        seed: of the data, the weights and the order.
    """

    clips: int = 48_000
    unseen: int = 1_500
    lessons: int = 72
    lesson: int = 1_500
    texts: int = 120_000
    text_epochs: int = 4
    projector_lessons: int = 4
    adapter_lessons: int = 36
    request_lessons: int = 24
    seed: int = 1


class Training:
    """Runs the recipe in a folder, one stage after another.

    Args:
        folder: for the data and the stages' checkpoints; created if needed.
        recipe: sizes of the data and the stages.
        device: to train on.
        dtype: of the computation.
        seconds: stop after this time, at a checkpoint to resume from; None: no limit.
        progress: whether to show progress bars on standard error.
    """

    def __init__(
        self,
        folder: str | Path,
        recipe: Recipe | None = None,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        seconds: float | None = None,
        progress: bool = True,
    ):
        self.folder, self.recipe, self.progress = Path(folder), recipe or Recipe(), progress
        self.device, self.dtype, self.rank = torch.device(device), dtype, rank()
        self.until = None if seconds is None else time.monotonic() + seconds
        self.tokenizer = make_tokenizer()
        self.model = make_model(self.tokenizer, self.recipe.seed).to(self.device, self.dtype)
        sizes = {"projector_window_size": self.model.config.window_size, "projector_downsample_rate": self.model.config.downsample_rate}
        extractor = GraniteSpeechFeatureExtractor(**sizes)
        self.processor = GraniteSpeechProcessor(extractor, self.tokenizer)
        self.dialogue = Dialogue(self.processor, self.model.config)

    def run(self) -> bool:
        """Run the stages that are not finished. Returns whether all are."""
        with shared_errors():  # the other processes wait for the data
            if self.rank == 0:
                self.manifest("speech", self.recipe.clips, self.recipe.seed, held_out=False)
                self.manifest("unseen", self.recipe.unseen, self.recipe.seed + 1, held_out=True)
        return self.encoder() and self.language_model() and self.projector() and self.adapter() and self.requests()

    def manifest(self, name: str, clips: int, seed: int, *, held_out: bool) -> Path:
        """The manifest of the clips under `name`, which are synthesized if needed."""
        file = self.folder / name / "manifest.jsonl"
        return file if file.is_file() else synthesize(file.parent, clips, seed, held_out=held_out, workers=os.cpu_count() or 2)

    def encoder(self) -> bool:
        """Run stage 1. Returns whether it is finished."""
        options = self._options(epochs=self.recipe.lessons, learning_rate=1.5e-3, warmup=0.01, clip_norm=2.0)
        source = self._lessons(self.recipe.lessons, ctc=True)
        return self._train("encoder", ("encoder",), ctc_loss, source, options, self._ctc_errors, ("clips", "lesson"))

    def language_model(self) -> bool:
        """Run stage 2. Returns whether it is finished."""
        rng = np.random.default_rng(self.recipe.seed)
        tasks = [make_text_task(rng) for _ in range(self.recipe.texts + 100)]
        texts = [Utterance(answer, prompt, None, Path("text tasks"), line) for line, (prompt, answer) in enumerate(tasks, 1)]
        self._held_out_tasks = texts[self.recipe.texts :]
        source = TextData(texts[: self.recipe.texts], self.dialogue, batch_tokens=1_500, seed=self.recipe.seed, device=self.device)
        options = self._options(epochs=self.recipe.text_epochs, learning_rate=3e-3, warmup=0.05)
        return self._train("language_model", ("language_model",), text_loss, source, options, self._task_errors, ("texts",))

    def projector(self) -> bool:
        """Run stage 3. Returns whether it is finished."""
        size = self.model.config.encoder_config.output_dim
        letters = [self.tokenizer.encode(chr(label) if label else BLANK, add_special_tokens=False)[0] for label in range(size)]
        loss = partial(label_loss, tokens=torch.tensor(letters, device=self.device))
        options = self._options(epochs=self.recipe.projector_lessons, learning_rate=3e-3, warmup=0.05)
        source = self._lessons(self.recipe.projector_lessons)
        return self._train(
            "projector", ("projector",), loss, source, options, self._word_errors, ("clips", "lesson", "lessons", "texts", "text_epochs")
        )

    def adapter(self) -> bool:
        """Run stage 4. Returns whether it is finished."""
        attach_fresh_adapter(self.model, rank=16, alpha=32, targets=("q_proj", "v_proj"), seed=self.recipe.seed)
        options = self._options(epochs=self.recipe.adapter_lessons, learning_rate=3e-3, warmup=0.03)
        source = self._lessons(self.recipe.adapter_lessons)
        sizes = ("clips", "lesson", "lessons", "texts", "text_epochs", "projector_lessons")
        return self._train("adapter", ("projector", "adapter"), speech_loss, source, options, self._word_errors, sizes)

    def requests(self) -> bool:
        """Run stage 5. Returns whether it is finished."""
        options = self._options(epochs=self.recipe.request_lessons, learning_rate=1e-3, warmup=0.03)
        source = self._lessons(self.recipe.request_lessons, prompts=PROMPTS_OF_CARDS)
        sizes = ("clips", "lesson", "lessons", "texts", "text_epochs", "projector_lessons", "adapter_lessons")
        return self._train("requests", ("projector", "adapter"), speech_loss, source, options, self._word_errors, sizes)

    def _options(self, **options) -> TrainerOptions:
        return TrainerOptions(beta2=0.98, accumulate=2, seed=self.recipe.seed, checkpoint_every=250, validate_every=1000, **options)

    def _lessons(self, lessons: int, *, ctc: bool = False, prompts: Sequence[str | None] = PROMPTS) -> Lessons:
        rng = np.random.default_rng(self.recipe.seed)
        utterances = [
            replace(one, prompt=prompts[rng.integers(len(prompts))]) for one in read_manifest(self.folder / "speech" / "manifest.jsonl")
        ]
        return Lessons(
            utterances, self.dialogue, lessons=lessons, lesson=self.recipe.lesson, seed=self.recipe.seed, device=self.device, ctc=ctc
        )

    @cached_property
    def unseen(self) -> list[Utterance]:
        return read_manifest(self.folder / "unseen" / "manifest.jsonl")

    def _ctc_errors(self, model: GraniteSpeechForConditionalGeneration) -> dict[str, float]:
        some = self.unseen[:200]
        return {"ctc_wer": word_error_rate([one.text for one in some], ctc_transcripts(model, self.processor, some))}

    def _word_errors(self, model: GraniteSpeechForConditionalGeneration) -> dict[str, float]:
        some = self.unseen[:200]
        return {"wer": word_error_rate([one.text for one in some], transcripts(model, self.processor, some))}

    def _task_errors(self, model: GraniteSpeechForConditionalGeneration) -> dict[str, float]:
        chats = [[{"role": "user", "content": one.prompt}] for one in self._held_out_tasks]
        requests = [self.processor.apply_chat_template(chat, add_generation_prompt=True) for chat in chats]
        inputs = self.processor(requests, device=self.device).to(self.device)
        ids = model.generate(**inputs, max_new_tokens=80)
        answers = self.processor.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        right = [one.text == answer.strip() for one, answer in zip(self._held_out_tasks, answers, strict=True)]
        return {"tasks_failed": 1 - sum(right) / len(right)}

    def _train(
        self,
        stage: str,
        parts: Sequence[str],
        loss: LossFunction,
        source: BatchSource,
        options: TrainerOptions,
        validate: Validation,
        sizes: Sequence[str],
    ) -> bool:
        """Train a stage, or resume it. Returns whether it is finished. It depends on these `sizes` of the recipe."""
        trainer = Trainer(
            self.model,
            loss,
            source,
            parameter_groups(prepare(self.model, parts), options.weight_decay),
            options,
            folder=self.folder / stage,
            identity={"computed in": str(self.dtype)} | {name: getattr(self.recipe, name) for name in sizes},
            validate=validate,
            progress=self.progress,
        )
        trainer.resume()
        if not trainer.is_done:
            trainer.run(seconds=None if self.until is None else self.until - time.monotonic())
        return trainer.is_done

    def write(self, target: str | Path) -> None:
        """Write the checkpoint. Weights are stored in bfloat16 to save space, and loaded in float32 for the same words on every machine."""
        self.model.eval().to(torch.bfloat16).save_pretrained(target)
        self.processor.save_pretrained(target)
        file = Path(target) / "config.json"
        config = json.loads(file.read_text()) | {"dtype": "float32", "torch_dtype": "float32"}
        unfinished = file.with_suffix(".unfinished")
        unfinished.write_text(json.dumps(config, indent=2) + "\n")
        unfinished.replace(file)

    def plot(self, file: str | Path) -> None:
        """Plot the stages' losses and error rates by step, as an SVG."""
        plot_curves({stage: read_curve(self.folder / stage / "log.jsonl") for stage in STAGES}, Path(file))


def read_curve(log: Path) -> list[dict[str, float]]:
    """A stage's log with its losses averaged over fifty steps at a time, and all its validations."""
    records = [json.loads(line) for line in log.read_text().splitlines()]
    steps = [record for record in records if "loss" in record]
    means = [
        {"step": some[-1]["step"], "loss": round(sum(one["loss"] for one in some) / len(some), 4)}
        for some in (steps[at : at + 50] for at in range(0, len(steps), 50))
    ]
    return sorted(means + [record for record in records if "loss" not in record], key=lambda record: record["step"])


def plot_curves(curves: Mapping[str, Sequence[Mapping[str, float]]], file: Path) -> None:
    """Plot the loss and error rate of each stage by step."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 3), layout="constrained")
    names = {"ctc_wer": "CTC word error rate", "tasks_failed": "tasks not answered exactly", "wer": "word error rate"}
    for axes, (stage, records) in zip(figure.subplots(1, len(curves), squeeze=False)[0], curves.items(), strict=True):
        axes.set(title=stage, xlabel="step", ylim=(0, 1.5))
        for name, label in {"loss": "loss", **names}.items():
            points = [(record["step"], record[name]) for record in records if name in record]
            if points:
                axes.plot(*zip(*points, strict=True), label=label, marker=None if name == "loss" else "o", markersize=3)
        axes.legend()
    figure.savefig(file)


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the checkpoint bundled with the package.")
    parser.add_argument("folder", type=Path, help="folder of the data and the stages, which is resumed if it exists")
    parser.add_argument("--checkpoint", type=Path, required=True, help="the folder to write at the end")
    parser.add_argument("--curve", type=Path, required=True, help="the plot to write at the end, an SVG")
    parser.add_argument("--seconds", type=float, help="stop after this many seconds; the same command then resumes")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    options = parser.parse_args()
    with process_group(options.device) as device:
        training = Training(options.folder, device=device, dtype=getattr(torch, options.dtype), seconds=options.seconds)
        if training.run() and training.rank == 0:
            training.write(options.checkpoint)
            training.plot(options.curve)


if __name__ == "__main__":
    main()
