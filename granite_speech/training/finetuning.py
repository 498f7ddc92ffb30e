"""Fine-tuning: a checkpoint and a manifest in, a checkpoint out."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import nn

from granite_speech.auto import AutoProcessor
from granite_speech.checkpoints.hub import resolve
from granite_speech.errors import InputError
from granite_speech.inputs.ctc_processor import GraniteSpeech5Processor
from granite_speech.inputs.processor import GraniteSpeechProcessor
from granite_speech.model import GraniteSpeechForConditionalGeneration
from granite_speech.model_ctc import GraniteSpeech5ForCTC
from granite_speech.training.ctc_data import CTCData, refuse_prompts
from granite_speech.training.data import Augment, SpeechData
from granite_speech.training.dialogue import Dialogue
from granite_speech.training.evaluation import best_path_transcripts, transcripts, word_error_rate
from granite_speech.training.losses import ctc_head_loss, speech_loss
from granite_speech.training.manifest import Utterance, read_manifest
from granite_speech.training.optimizer import parameter_groups
from granite_speech.training.options import FinetuneOptions
from granite_speech.training.preparation import Model, attach_fresh_adapter, has_adapter, prepare
from granite_speech.training.processes import gather, process_group, rank, share_of, shared_errors
from granite_speech.training.trainer import Trainer

__all__ = ["FinetuneReport", "finetune"]

Processor = GraniteSpeechProcessor | GraniteSpeech5Processor


@dataclass(frozen=True)
class FinetuneReport:
    """The result of `finetune`.

    Attributes:
        folder: the tuned checkpoint.
        steps: number of optimizer steps.
        loss: of the first and last step. Either is None if the log of a resumed run lacks it.
        wer: word error rates before and after, either None in the same case; None without validation.
    """

    folder: Path
    steps: int
    loss: tuple[float | None, float | None]
    wer: tuple[float | None, float | None] | None

    def __str__(self) -> str:
        wer = "" if self.wer is None else f", word error rate {_course(self.wer, '.1%')}"
        return f"{self.folder}: {self.steps} steps, loss {_course(self.loss, '.3g')}{wer}"


def _course(figures: tuple[float | None, float | None], spec: str) -> str:
    return " → ".join("unknown" if one is None else format(one, spec) for one in figures)


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

    A checkpoint without a language model, `GraniteSpeech5ForCTC`, learns its tokenizer's ids of each text with CTC. It takes no prompts.
    Its adapter is merged when the folder is written: it is never off, and transformers cannot load one for a model with tied heads.

    Manifests and the output folder are checked before the model is loaded, and every line before the first step. During training,
    `output/training` has the log and the last training checkpoint; the model's files are written at the end.

    Under torchrun, or if called in every process of an initialized `torch.distributed` group, the processes divide each step's
    `options.accumulate` batches, which must be a multiple of their number. Each trains on its own device. Only process 0 validates and
    writes, and all return its report. They must see the same files.

    Args:
        manifest: JSON lines with audio, text and an optional prompt (`read_manifest`).
        model: a checkpoint's folder, "embedded", or a hub id.
        output: the folder to write; not the model's.
        options: which parts train, how long, and at what rate.
        validation: a second manifest, whose word error rate is measured.
        augment: as for `SpeechData`.
        device: CUDA by default if available. With several processes, "cuda" is the GPU with each one's LOCAL_RANK.
        resume: resume from the checkpoint in `output/training`, or start if there is none. A finished run writes its model again.
        progress: whether to show a progress bar on standard error.

    Raises:
        InputError: a bad line or option, an output folder that is in use, a run that cannot be resumed, or processes that cannot
            share the work.
        AudioError: a sound file that cannot be used.
        CheckpointError: a model that cannot be loaded, or a folder that cannot be written.
        MissingDependencyError: validation without jiwer.
    """
    options, output = options or FinetuneOptions(), Path(output)
    with process_group(device) as own_device:
        share_of(options.accumulate)  # fails now rather than after the model is loaded
        with shared_errors():
            utterances, held_out = read_manifest(manifest), _read_validation(validation)
            if rank() == 0:
                _check_output(output, model, resume)
                resolve(model)  # process 0 downloads, and the others find the files in the cache
        with shared_errors():
            processor = AutoProcessor.from_pretrained(model)
            parts = options.parts
            if isinstance(processor, GraniteSpeech5Processor):
                parts = options.ctc_parts
                refuse_prompts([*utterances, *(held_out or [])])
            loaded = _load(model, processor, options, own_device)
            source = {"model": str(model), "manifest": _digest(utterances), "augmented": augment is not None}
            data = _data(utterances, loaded, processor, options, augment)
            trained = _trained(loaded, parts, options)
            trainer = _trainer(loaded, processor, data, trained, held_out, options, output, source, progress)
        if resume:
            trainer.resume()
        trainer.run()
        with shared_errors():
            if rank() == 0:
                if isinstance(loaded, GraniteSpeech5ForCTC) and has_adapter(loaded):
                    loaded.merge_adapter()
                loaded.eval().save_pretrained(output)
                processor.save_pretrained(output)
        return gather(_report(output, trainer, validated=held_out is not None))[0]


def _read_validation(manifest: str | Path | None) -> list[Utterance] | None:
    if manifest is None:
        return None
    utterances = read_manifest(manifest)
    word_error_rate(["a"], ["a"])  # fails now if jiwer is missing
    return utterances


def _data(
    utterances: list[Utterance], model: Model, processor: Processor, options: FinetuneOptions, augment: Augment | None
) -> SpeechData | CTCData:
    common = {"batch_seconds": options.batch_seconds, "seed": options.seed, "device": model.device, "augment": augment}
    if isinstance(model, GraniteSpeech5ForCTC):
        return CTCData(utterances, processor, model.config, **common)
    return SpeechData(utterances, Dialogue(processor, model.config), ctc=options.ctc_weight > 0, **common)


def _trained(model: Model, parts: Sequence[str], options: FinetuneOptions) -> dict[str, nn.Parameter]:
    """The parameters that train; an adapter that was asked for by name is added if there is none."""
    if "adapter" in parts and "all" not in (options.train or ()) and not has_adapter(model):
        attach_fresh_adapter(model, rank=options.lora_rank, alpha=options.lora_alpha, targets=options.lora_targets, seed=options.seed)
    return prepare(model, parts)


def _trainer(
    model: Model,
    processor: Processor,
    data: SpeechData | CTCData,
    trained: dict[str, nn.Parameter],
    held_out: list[Utterance] | None,
    options: FinetuneOptions,
    output: Path,
    source: dict[str, object],
    progress: bool,
) -> Trainer:
    is_ctc = isinstance(model, GraniteSpeech5ForCTC)
    answers_of = best_path_transcripts if is_ctc else transcripts
    middle = 0.5 if options.ctc_middle is None else options.ctc_middle

    def validate(model: Model) -> dict[str, float]:
        answers = answers_of(model, processor, held_out, batch_seconds=options.batch_seconds)
        return {"wer": word_error_rate([one.text for one in held_out], answers)}

    return Trainer(
        model,
        ctc_head_loss if is_ctc else partial(speech_loss, ctc_weight=options.ctc_weight, ctc_middle=middle),
        data,
        parameter_groups(trained, options.weight_decay),
        options,
        folder=output / "training",
        identity=source | {"computed in": str(model.dtype)},
        validate=validate if held_out else None,
        progress=progress,
    )


def _report(output: Path, trainer: Trainer, *, validated: bool) -> FinetuneReport:
    loss = _figure(trainer, "loss", 1), _figure(trainer, "loss", trainer.steps)
    wer = (_figure(trainer, "wer", 0), _figure(trainer, "wer", trainer.steps)) if validated else None
    return FinetuneReport(output, trainer.steps, loss, wer)


def _figure(trainer: Trainer, name: str, step: int) -> float | None:
    """A number from the log's record of a step; None if the log lacks it."""
    found = (record.get(name) for record in trainer.history if record["step"] == step)
    return next((one for one in found if type(one) in (int, float)), None)


def _check_output(output: Path, model: str | Path, resume: bool) -> None:
    """Refuse to overwrite the model, another checkpoint, or a run that is not being resumed."""
    if output.exists() and output.samefile(resolve(model)):
        raise InputError(got=f"{str(output)!r}, the model's own folder", expected="another folder", remedy="Choose a new output folder")
    taken = [name for name in ("training", "config.json") if (output / name).exists()]
    if taken and not (resume and "training" in taken):
        raise InputError(
            got=f"{str(output)!r} with {' and '.join(taken)} in it",
            expected="a new folder" + (", or permission to resume the run there" if "training" in taken else ""),
            remedy="Choose another folder" + (", or resume" if "training" in taken else ""),
        )


def _load(model: str | Path, processor: Processor, options: FinetuneOptions, device: str | torch.device) -> Model:
    dtype = options.dtype or ("bfloat16" if str(device).startswith("cuda") else "float32")
    kind = GraniteSpeech5ForCTC if isinstance(processor, GraniteSpeech5Processor) else GraniteSpeechForConditionalGeneration
    return kind.from_pretrained(model, device=device, dtype=dtype)


def _digest(utterances: list[Utterance]) -> str:
    """A hash of the manifest's contents that does not depend on its folder."""
    lines = "\n".join(repr((one.audio.name, one.text, one.prompt)) for one in utterances)
    return hashlib.sha256(lines.encode()).hexdigest()
