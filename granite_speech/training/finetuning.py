"""Fine-tuning: a checkpoint and a manifest in, a checkpoint out."""

import hashlib
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from granite_speech.errors import InputError
from granite_speech.inputs.processor import GraniteSpeechProcessor
from granite_speech.model import GraniteSpeechForConditionalGeneration
from granite_speech.training.data import Augment, SpeechData
from granite_speech.training.dialogue import Dialogue
from granite_speech.training.evaluation import transcripts, word_error_rate
from granite_speech.training.losses import speech_loss
from granite_speech.training.manifest import Utterance, read_manifest
from granite_speech.training.optimizer import parameter_groups
from granite_speech.training.options import FinetuneOptions
from granite_speech.training.preparation import attach_fresh_adapter, has_adapter, prepare
from granite_speech.training.trainer import Trainer

__all__ = ["FinetuneReport", "finetune"]


@dataclass(frozen=True)
class FinetuneReport:
    """What came out.

    Attributes:
        folder: the tuned checkpoint.
        steps: steps of the optimizer.
        loss: of the first and of the last step.
        wer: word error rate before and after; None without validation.
    """

    folder: Path
    steps: int
    loss: tuple[float, float]
    wer: tuple[float, float] | None

    def __str__(self) -> str:
        wer = "" if self.wer is None else f", word error rate {self.wer[0]:.1%} → {self.wer[1]:.1%}"
        return f"{self.folder}: {self.steps} steps, loss {self.loss[0]:.3g} → {self.loss[1]:.3g}{wer}"


def finetune(
    manifest: str | Path,
    model: str | Path,
    output: str | Path,
    options: FinetuneOptions | None = None,
    *,
    validation: str | Path | None = None,
    augment: Augment | None = None,
    device: str | torch.device | None = None,
    resume: bool = False,
    progress: bool = True,
) -> FinetuneReport:
    """Tune a checkpoint on a manifest and write the result as a folder that `from_pretrained` and transformers load.

    Manifests, options and the output folder are checked before the model is loaded, and every line before the first step. While it goes
    on, `output/training` has the last checkpoint of the training and its log; the model's files are written at the end.

    Args:
        manifest: JSON lines with audio, text and, where wanted, prompt (`read_manifest`).
        model: a checkpoint's folder or hub id.
        output: the folder to write; not the model's.
        options: what trains, how long, how fast.
        validation: a second manifest, whose word error rate is taken.
        augment: as `SpeechData`'s.
        device: CUDA where there is one and nothing is said.
        resume: go on from the checkpoint in `output/training`, or begin where there is none.
        progress: whether to show a bar on standard error.

    Raises:
        InputError: a bad line, a bad option, an output folder that is taken, or a training that cannot be gone on with.
        AudioError: a sound file that cannot be used.
        CheckpointError: a model that cannot be loaded, or a folder that cannot be written.
        MissingDependencyError: validation without jiwer.
    """
    options = options or FinetuneOptions()
    output = Path(output)
    utterances = read_manifest(manifest)
    held_out = None if validation is None else read_manifest(validation)
    if held_out:
        word_error_rate(["a"], ["a"])  # a missing jiwer is found out now
    _check_output(output, model, resume)
    loaded, processor = _load(model, options, device)
    if "adapter" in options.train and not has_adapter(loaded):
        attach_fresh_adapter(loaded, rank=options.lora_rank, alpha=options.lora_alpha, targets=options.lora_targets, seed=options.seed)
    trained = prepare(loaded, options.parts)
    data = SpeechData(
        utterances,
        Dialogue(processor, loaded.config),
        batch_seconds=options.batch_seconds,
        seed=options.seed,
        device=loaded.device,
        ctc=options.ctc_weight > 0,
        augment=augment,
    )

    def validate(model: GraniteSpeechForConditionalGeneration) -> dict[str, float]:
        answers = transcripts(model, processor, held_out, batch_seconds=options.batch_seconds)
        return {"wer": word_error_rate([one.text for one in held_out], answers)}

    trainer = Trainer(
        loaded,
        partial(speech_loss, ctc_weight=options.ctc_weight, ctc_middle=options.ctc_middle),
        data,
        parameter_groups(trained, options.weight_decay),
        options,
        folder=output / "training",
        identity={"model": str(model), "manifest": _digest(utterances), "augmented": augment is not None, "computed in": str(loaded.dtype)},
        validate=validate if held_out else None,
        progress=progress,
    )
    if resume:
        trainer.resume()
    trainer.run()
    loaded.eval().save_pretrained(output)
    processor.save_pretrained(output)
    losses = [record["loss"] for record in trainer.history if "loss" in record]
    rates = [record["wer"] for record in trainer.history if "wer" in record]
    return FinetuneReport(output, trainer.steps, (losses[0], losses[-1]), (rates[0], rates[-1]) if rates else None)


def _check_output(output: Path, model: str | Path, resume: bool) -> None:
    """Refuse to write over something that would be missed."""
    if Path(model).is_dir() and output.exists() and output.samefile(model):
        raise InputError(got=f"{str(output)!r}, the model's own folder", expected="another one", remedy="Name a new folder as output")
    taken = [name for name in ("training", "config.json") if (output / name).exists()]
    if taken and not (resume and "training" in taken):
        raise InputError(
            got=f"{str(output)!r} with {' and '.join(taken)} in it",
            expected="a new folder" + (", or leave to go on with the training there" if "training" in taken else ""),
            remedy="Name another folder" + (", or resume" if "training" in taken else ""),
        )


def _load(
    model: str | Path, options: FinetuneOptions, device: str | torch.device | None
) -> tuple[GraniteSpeechForConditionalGeneration, GraniteSpeechProcessor]:
    chosen = device if device is not None else "cuda" if torch.cuda.is_available() else "cpu"
    dtype = options.dtype or ("bfloat16" if str(chosen).startswith("cuda") else "float32")
    processor = GraniteSpeechProcessor.from_pretrained(model)
    return GraniteSpeechForConditionalGeneration.from_pretrained(model, device=chosen, dtype=dtype), processor


def _digest(utterances: list[Utterance]) -> str:
    """What the manifest says, without where it lies."""
    lines = "\n".join(repr((one.audio.name, one.text, one.prompt)) for one in utterances)
    return hashlib.sha256(lines.encode()).hexdigest()
