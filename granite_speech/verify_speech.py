"""The comparison with transformers for a model with a language model: its stages, and a greedy answer to the recording."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any, Self

import torch
from granite_kernels.launch import Launch
from torch import Tensor, nn

from granite_speech.checkpoints.folder import Checkpoint, load_json
from granite_speech.checkpoints.weight_names import EMBEDDING
from granite_speech.config import GraniteSpeechConfig, GraniteSpeechPlusConfig
from granite_speech.engine.generate import launches_of_generate
from granite_speech.inputs.audio import load_audio
from granite_speech.inputs.processor import GraniteSpeechProcessor
from granite_speech.inputs.requests import transcript_request
from granite_speech.model import GraniteSpeechForConditionalGeneration
from granite_speech.verify_runs import INPUT_IDS, Recorder, Run, TheirLoader, rows, their_loader

__all__ = ["SpeechTask", "launches_of_run", "regret"]


@dataclass(frozen=True)
class Side:
    """A loaded model and how to use it.

    Attributes:
        parts: encoder, projector, decoder (the language model without its head) and head.
        prepare: makes the model's inputs from the recording.
        decode: turns token ids into words.
        scaling: divisor of the head's output, used in place of the model's own logits: the models were trained with this
            division, which transformers 5.10 and later omit.
    """

    model: nn.Module
    parts: dict[str, nn.Module]
    prepare: Callable[[], Any]
    decode: Callable[..., str]
    scaling: float | None = None


@dataclass(frozen=True)
class SpeechTask:
    """One checkpoint and recording, for both models."""

    folder: Path
    device: torch.device
    config: GraniteSpeechConfig
    weights: Checkpoint
    processor: GraniteSpeechProcessor
    samples: Tensor
    prompt: str
    max_new_tokens: int

    def launches(self, dtype: torch.dtype, architecture: int) -> list[Launch]:
        """Launches of our run on a GPU."""
        values = load_json(self.folder / "config.json")
        config = GraniteSpeechConfig.from_pretrained(self.folder)
        model = GraniteSpeechForConditionalGeneration.without_weights(config, self.weights, values).to(dtype).eval()
        return launches_of_run(model, self.processor(self.prompt, self.samples), architecture, self.max_new_tokens)

    def ours(self, dtype: torch.dtype) -> Side:
        model = GraniteSpeechForConditionalGeneration.from_pretrained(self.folder, device=self.device, dtype=dtype)
        parts = {"encoder": model.encoder, "projector": model.projector, "decoder": model.decoder, "head": model.lm_head}
        prepare = partial(self.processor, self.prompt, self.samples, device=self.device)
        return Side(model, parts, prepare, self.processor.decode)

    def theirs(self, load: TheirLoader, dtype: torch.dtype) -> Side:
        model, processor = load(dtype, self.device)
        inner = getattr(model, "model", model)  # up to transformers 5.9 the model itself has the parts
        decoder = inner.language_model
        parts = {"encoder": inner.encoder, "projector": inner.projector, "decoder": getattr(decoder, "model", decoder)}
        parts["head"] = model.get_output_embeddings()
        prepare = partial(processor, self.prompt, self.samples[None], device=str(self.device), return_tensors="pt")
        return Side(model, parts, prepare, processor.tokenizer.decode, scaling=self.config.text_config.logits_scaling)

    def measure(self, side: Side) -> Run:
        """Run one model."""
        return Run(_stage_values(side, self.device), *_answer(side, self.device, self.max_new_tokens))

    @staticmethod
    def regret(ids: Tensor, theirs: Run) -> float:
        return regret(ids, theirs)

    @classmethod
    def of(cls, folder: Path, device: torch.device, config: GraniteSpeechConfig, weights: Checkpoint, sound: Path, tokens: int) -> Self:
        """The task of a folder: the transcript of a sound file, in at most so many tokens."""
        processor = GraniteSpeechProcessor.from_pretrained(folder)
        samples = load_audio(sound, processor.audio_processor.sampling_rate)
        prompt = transcript_request(processor, model_type=config.model_type)
        return cls(folder, device, config, weights, processor, samples, prompt, tokens)

    @property
    def stored_dtype(self) -> torch.dtype:
        return self.weights.entries[EMBEDDING].dtype

    def their_loader(self) -> TheirLoader:
        is_plus = isinstance(self.config, GraniteSpeechPlusConfig)
        kind = f"{'GraniteSpeechPlus' if is_plus else 'GraniteSpeech'}ForConditionalGeneration"
        return their_loader(self.folder, kind, since="4.56", has_adapter=self.weights.adapter_config is not None)


def launches_of_run(model: Any, inputs: dict[str, Any], architecture: int, max_new_tokens: int) -> list[Launch]:
    """Launches of our run, given our model on the meta device. Its hooks decide which layers run module by module."""
    launches = []
    for watched in (model.decoder, model.lm_head):  # as `_stage_values` and `_answer` do
        with watched.register_forward_hook(lambda *_: None):
            launches += launches_of_generate(model, inputs, architecture, max_new_tokens)
    return launches


@torch.no_grad()
def _stage_values(side: Side, device: torch.device) -> dict[str, Tensor]:
    """The output of every stage in one forward pass, in order of computation."""
    inputs = side.prepare()
    values = {INPUT_IDS: rows(inputs["input_ids"][..., None]), "features": rows(inputs["input_features"])}
    parts = side.parts
    recorder = Recorder()
    recorder.values |= values
    recorder.output("encoder.input_linear", parts["encoder"].input_linear)
    recorder.output("encoder.out_mid", parts["encoder"].out_mid)
    for number, layer in enumerate(parts["encoder"].layers):
        recorder.output(f"encoder.layers.{number}", layer)
    recorder.input("encoder", parts["projector"])  # in some models the outputs of several layers
    recorder.output("projector", parts["projector"])
    recorder.input("embeddings", parts["decoder"].layers[0])
    for number, layer in enumerate(parts["decoder"].layers):
        recorder.output(f"language_model.model.layers.{number}", layer)
    recorder.output("language_model.model.norm", parts["decoder"].norm)
    recorder.output("logits", parts["head"])
    with recorder.recording():
        output = side.model(**inputs.to(device))
    values = recorder.values
    values["logits"] = rows(output.logits) if side.scaling is None else values["logits"] / side.scaling
    return values


def _answer(side: Side, device: torch.device, max_new_tokens: int) -> tuple[Tensor, list[Tensor], float, str]:
    """Ids, logits of each id, seconds and words of a greedy answer."""
    logits = []
    hook = side.parts["head"].register_forward_hook(lambda module, given, output: logits.append(rows(output)[-1]))
    try:
        started = perf_counter()
        inputs = side.prepare().to(device)
        ids = side.model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False, num_beams=1)
        ids = ids[0, inputs["input_ids"].shape[1] :].cpu()
        seconds = perf_counter() - started
    finally:
        hook.remove()
    logits = [one / side.scaling for one in logits] if side.scaling else logits
    return ids, logits, seconds, side.decode(ids, skip_special_tokens=True).strip()


def regret(ids: Tensor, theirs: Run) -> float:
    """The reference's logit of its own token minus that of ours, at the first token that differs; 0 if none does.

    Later tokens follow a different text, so they are not compared.
    """
    length = min(len(ids), len(theirs.ids))
    different = (ids[:length] != theirs.ids[:length]).nonzero()
    if not len(different):
        return 0.0 if len(ids) == len(theirs.ids) else math.inf
    step = int(different[0])
    return float(theirs.step_logits[step][theirs.ids[step]] - theirs.step_logits[step][ids[step]])
