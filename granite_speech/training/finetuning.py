"""Fine-tuning: a checkpoint and a manifest in, a checkpoint out."""

import hashlib
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from granite_speech.checkpoints.hub import resolve
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
from granite_speech.training.processes import gather, process_group, rank, share_of, shared_errors
from granite_speech.training.trainer import Trainer

__all__ = ["FinetuneReport", "finetune"]


@dataclass(frozen=True)
class FinetuneReport:
    """What came out.

    Attributes:
        folder: the tuned checkpoint.
        steps: steps of the optimizer.
        loss: of the first and of the last step; None for what a resumed training's log no longer says.
        wer: word error rate before and after, with None in the same way; None in all without validation.
    """

    folder: Path
    steps: int
    loss: tuple[float | None, float | None]
    wer: tuple[float | None, float | None] | None

    def __str__(self) -> str:
        wer = "" if self.wer is None else f", word error rate {_course(self.wer, '.1%')}"
        return f"{self.folder}: {self.steps} steps, loss {_course(self.loss, '.3g')}{wer}"


def _course(figures: tuple[float | None, float | None], form: str) -> str:
    return " → ".join("unknown" if one is None else format(one, form) for one in figures)


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

    Manifests, options and the output folder are checked before the model is loaded, and every line before the first step. While it
    runs, `output/training` has the last checkpoint of the training and its log; the model's files are written at the end.

    Under torchrun, or called in every process of an initialised `torch.distributed` group, the processes share each step's
    `options.accumulate` batches, which must be a multiple of their number. Each trains on its own device; process 0 alone validates and
    writes, and all return its report. They must see the same files.

    Args:
        manifest: JSON lines with audio, text and, where wanted, prompt (`read_manifest`).
        model: a checkpoint's folder, "embedded", or hub id.
        output: the folder to write; not the model's.
        options: what trains, how long, how fast.
        validation: a second manifest, whose word error rate is taken.
        augment: as `SpeechData`'s.
        device: CUDA if available and nothing is given. With several processes, "cuda" is the GPU of each one's LOCAL_RANK.
        resume: resume from the checkpoint in `output/training`, or begin if there is none. A finished training writes its model again.
        progress: whether to show a bar on standard error.

    Raises:
        InputError: a bad line, a bad option, an output folder that is taken, a training that cannot be resumed, or processes that cannot
            share the work.
        AudioError: a sound file that cannot be used.
        CheckpointError: a model that cannot be loaded, or a folder that cannot be written.
        MissingDependencyError: validation without jiwer.
    """
    options, output = options or FinetuneOptions(), Path(output)
    with process_group(device) as own_device:
        share_of(options.accumulate)  # refused now rather than after the model is loaded
        with shared_errors():
            utterances = read_manifest(manifest)
            held_out = None if validation is None else read_manifest(validation)
            if held_out:
                word_error_rate(["a"], ["a"])  # a missing jiwer is found out now
            if rank() == 0:
                _check_output(output, model, resume)
                resolve(model)  # one process downloads, the others find it in the cache
        with shared_errors():
            loaded, processor = _load(model, options, own_device)
            source = {"model": str(model), "manifest": _digest(utterances), "augmented": augment is not None}
            data = _data(utterances, loaded, processor, options, augment)
            trainer = _trainer(loaded, processor, data, held_out, options, output, source, progress)
        if resume:
            trainer.resume()
        trainer.run()
        with shared_errors():
            if rank() == 0:
                loaded.eval().save_pretrained(output)
                processor.save_pretrained(output)
        first, last = (_figure(trainer, "loss", step) for step in (1, trainer.steps))
        rates = (_figure(trainer, "wer", 0), _figure(trainer, "wer", trainer.steps)) if held_out else None
        return gather(FinetuneReport(output, trainer.steps, (first, last), rates))[0]


def _data(
    utterances: list[Utterance],
    model: GraniteSpeechForConditionalGeneration,
    processor: GraniteSpeechProcessor,
    options: FinetuneOptions,
    augment: Augment | None,
) -> SpeechData:
    return SpeechData(
        utterances,
        Dialogue(processor, model.config),
        batch_seconds=options.batch_seconds,
        seed=options.seed,
        device=model.device,
        ctc=options.ctc_weight > 0,
        augment=augment,
    )


def _trainer(
    model: GraniteSpeechForConditionalGeneration,
    processor: GraniteSpeechProcessor,
    data: SpeechData,
    held_out: list[Utterance] | None,
    options: FinetuneOptions,
    output: Path,
    source: dict[str, object],
    progress: bool,
) -> Trainer:
    if "adapter" in options.train and not has_adapter(model):
        attach_fresh_adapter(model, rank=options.lora_rank, alpha=options.lora_alpha, targets=options.lora_targets, seed=options.seed)
    trained = prepare(model, options.parts)

    def validate(model: GraniteSpeechForConditionalGeneration) -> dict[str, float]:
        answers = transcripts(model, processor, held_out, batch_seconds=options.batch_seconds)
        return {"wer": word_error_rate([one.text for one in held_out], answers)}

    return Trainer(
        model,
        partial(speech_loss, ctc_weight=options.ctc_weight, ctc_middle=options.ctc_middle),
        data,
        parameter_groups(trained, options.weight_decay),
        options,
        folder=output / "training",
        identity=source | {"computed in": str(model.dtype)},
        validate=validate if held_out else None,
        progress=progress,
    )


def _figure(trainer: Trainer, name: str, step: int) -> float | None:
    """A figure of the training's record of a step; None if its log does not have it."""
    found = (record.get(name) for record in trainer.history if record["step"] == step)
    return next((one for one in found if type(one) in (int, float)), None)


def _check_output(output: Path, model: str | Path, resume: bool) -> None:
    """Refuse to write over something that would be missed."""
    if output.exists() and output.samefile(resolve(model)):
        raise InputError(got=f"{str(output)!r}, the model's own folder", expected="another one", remedy="Name a new folder as output")
    taken = [name for name in ("training", "config.json") if (output / name).exists()]
    if taken and not (resume and "training" in taken):
        raise InputError(
            got=f"{str(output)!r} with {' and '.join(taken)} in it",
            expected="a new folder" + (", or leave to go on with the training there" if "training" in taken else ""),
            remedy="Name another folder" + (", or resume" if "training" in taken else ""),
        )


def _load(
    model: str | Path, options: FinetuneOptions, device: str | torch.device
) -> tuple[GraniteSpeechForConditionalGeneration, GraniteSpeechProcessor]:
    dtype = options.dtype or ("bfloat16" if str(device).startswith("cuda") else "float32")
    processor = GraniteSpeechProcessor.from_pretrained(model)
    return GraniteSpeechForConditionalGeneration.from_pretrained(model, device=device, dtype=dtype), processor


def _digest(utterances: list[Utterance]) -> str:
    """What the manifest says, without where it lies."""
    lines = "\n".join(repr((one.audio.name, one.text, one.prompt)) for one in utterances)
    return hashlib.sha256(lines.encode()).hexdigest()
