"""The comparison with transformers for TurboCTC: its stages, the loss of the recording's words, and each frame's best token."""

import math
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any, Self

import torch
from granite_kernels.launch import Launch, recorded_launches
from torch import Tensor, nn

from granite_speech.checkpoints.folder import Checkpoint, load_json
from granite_speech.config_ctc import GraniteSpeech5CTCConfig
from granite_speech.inputs.audio import load_audio
from granite_speech.inputs.ctc_processor import GraniteSpeech5Processor
from granite_speech.model_ctc import GraniteSpeech5ForCTC
from granite_speech.verify_runs import Recorder, Run, TheirLoader, rows, their_loader

__all__ = ["CTCTask"]


@dataclass(frozen=True)
class CTCSide:
    """A loaded model and its processor, both of this package or both of transformers."""

    model: nn.Module
    processor: Any


@dataclass(frozen=True)
class CTCTask:
    """One checkpoint and recording, for both models.

    Attributes:
        folder: of the checkpoint.
        device: where both models run.
        config, weights: of the folder.
        processor: ours, which makes the labels for both sides.
        samples: `(samples,)` of the recording.
        words: of the recording.
    """

    folder: Path
    device: torch.device
    config: GraniteSpeech5CTCConfig
    weights: Checkpoint
    processor: GraniteSpeech5Processor
    samples: Tensor
    words: str

    @classmethod
    def of(cls, folder: Path, device: torch.device, config: GraniteSpeech5CTCConfig, weights: Checkpoint, sound: Path, words: str) -> Self:
        """The task of a folder: a sound file with these words."""
        processor = GraniteSpeech5Processor.from_pretrained(folder)
        samples = load_audio(sound, processor.feature_extractor.sampling_rate)
        return cls(folder, device, config, weights, processor, samples, words)

    @property
    def stored_dtype(self) -> torch.dtype:
        return self.weights.entries["encoder.out.weight"].dtype

    def their_loader(self) -> TheirLoader:
        return their_loader(self.folder, "GraniteSpeech5ForCTC", since="5.23", has_adapter=self.weights.adapter_config is not None)

    def launches(self, dtype: torch.dtype, architecture: int) -> list[Launch]:
        """Launches of our run on a GPU: module by module for the stages, then packed."""
        values = load_json(self.folder / "config.json")
        model = GraniteSpeech5ForCTC.without_weights(GraniteSpeech5CTCConfig.from_pretrained(self.folder), self.weights, values)
        model = model.to(dtype).eval()
        features = self.processor(self.samples)["input_features"].to("meta")
        with recorded_launches(architecture) as launches, torch.no_grad():
            model(features).to_tuple()
            for layer in model.encoder.layers:
                layer.register_forward_pre_hook(lambda *given: None)
            model(features).to_tuple()
        return launches

    def ours(self, dtype: torch.dtype) -> CTCSide:
        return CTCSide(GraniteSpeech5ForCTC.from_pretrained(self.folder, device=self.device, dtype=dtype), self.processor)

    def theirs(self, load: TheirLoader, dtype: torch.dtype) -> CTCSide:
        return CTCSide(*load(dtype, self.device))

    @torch.no_grad()
    def measure(self, side: CTCSide) -> Run:
        """Run one model: once with every module's output, once as its users do, and once for the tokens."""
        inputs = self._prepare(side)
        recorder, encoder = Recorder(), side.model.encoder
        recorder.values["features"] = rows(inputs["input_features"])
        recorder.output("encoder.input_linear", encoder.input_linear)
        recorder.output("encoder.out_mid", encoder.out_mid)
        for number, layer in enumerate(encoder.layers):
            recorder.output(f"encoder.layers.{number}", layer)
        recorder.output("encoder", encoder)
        with recorder.recording():
            side.model(**inputs)
        output = side.model(**inputs, labels=self._labels(inputs["input_features"].shape[1]))
        values = recorder.values | {"logits": rows(output.logits), "loss": rows(output.loss.reshape(1, 1))}
        started = perf_counter()
        ids = side.model.generate(**self._prepare(side))[0].cpu()
        seconds = perf_counter() - started
        return Run(values, ids, list(values["logits"]), seconds, self.processor.decode(ids, skip_special_tokens=True).strip())

    def _prepare(self, side: CTCSide) -> dict[str, Tensor]:
        rate = self.processor.feature_extractor.sampling_rate
        return side.processor(self.samples.numpy(), sampling_rate=rate, device=str(self.device), return_tensors="pt").to(self.device)

    def _labels(self, frames: int) -> Tensor:
        """Of as many words as certainly fit, with a blank after each."""
        room = (frames >> self.config.encoder_config.subsamplings) // 2
        return torch.tensor([self.processor(text=self.words)["labels"][:room]], device=self.device)

    @staticmethod
    def regret(ids: Tensor, theirs: Run) -> float:
        """The largest difference, at any frame, of the reference's logits of its own token and of ours."""
        if ids.shape != theirs.ids.shape:
            return math.inf
        logits = theirs.values["logits"]
        chosen = (logits.gather(1, one[:, None]) for one in (theirs.ids, ids))
        return float((next(chosen) - next(chosen)).clamp(min=0).max()) if len(ids) else 0.0
