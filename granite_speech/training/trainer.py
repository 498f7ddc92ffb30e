"""The training loop, with checkpoints from which a run resumes exactly."""

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from tqdm import tqdm

from granite_speech.errors import CheckpointError, InputError
from granite_speech.model import GraniteSpeechForConditionalGeneration
from granite_speech.training.batches import Batch, BatchSource
from granite_speech.training.losses import LossFunction
from granite_speech.training.optimizer import MasterAdamW, ParameterGroup, learning_rate
from granite_speech.training.options import TrainerOptions
from granite_speech.training.processes import gather, process_count, rank, share_of, shared_errors
from granite_speech.training.seeds import seeded
from granite_speech.training.state import TrainingFolder

__all__ = ["Trainer"]

Validation = Callable[[GraniteSpeechForConditionalGeneration], Mapping[str, float]]


class Trainer:
    """Trains parameters of a model on a source of batches.

    A step depends only on the weights, the options and its number: order, augmentation and dropout follow from the seed. A checkpoint
    therefore holds the trained parameters, the optimizer's moments and the step number. On a CPU, a resumed run has exactly the losses
    of an uninterrupted one (on a GPU, some backward passes sum in no fixed order).

    If `torch.distributed` is initialized, the processes divide each step's `accumulate` batches and sum their gradients. The steps equal
    those of one process, except for rounding, dropout and BatchNorm's running statistics, which are those of process 0. Only process 0
    writes and validates. An error in loading, validating or writing stops all processes.

    Args:
        model: on its device, with its modules in the modes that `prepare` sets.
        loss: `ctc_loss`, `speech_loss`, `text_loss`, or another function with the same arguments.
        source: supplies batches on the model's device.
        groups: the trainable parameters (`parameter_groups`).
        options: of the loop.
        folder: for checkpoints and the log; None: neither is written.
        identity: what the losses depend on besides the options, such as manifest and model, as JSON values. Must match when resuming.
        validate: called with the model in evaluation mode before and after training, and every `validate_every` steps. Its results are
            logged.
        progress: whether to show a progress bar on standard error.

    Attributes:
        step: number of steps done.
        steps: number of steps in the whole run.
        history: the log's records. A step has `step`, `epoch`, `loss`, its parts, `learning_rate`, `gradient_norm` and `audio_seconds`;
            a validation has `step` and its results.

    Raises:
        CheckpointError: a folder that cannot be written.
        InputError: a source without batches, or batches that cannot be divided among the processes.
    """

    def __init__(
        self,
        model: GraniteSpeechForConditionalGeneration,
        loss: LossFunction,
        source: BatchSource,
        groups: Sequence[ParameterGroup],
        options: TrainerOptions,
        *,
        folder: str | Path | None = None,
        identity: Mapping[str, Any] | None = None,
        validate: Validation | None = None,
        progress: bool = True,
    ):
        self.model, self.loss, self.source, self.options = model, loss, source, options
        self.optimizer = MasterAdamW(groups, beta2=options.beta2)
        self.identity = {**options.identity(), **(identity or {})}
        self.rank, self.processes, self.share = rank(), process_count(), share_of(options.accumulate)
        self.folder = None if folder is None else TrainingFolder(folder)
        if self.folder is not None and self.rank == 0:
            self.folder.create()
        self.validate, self.progress = validate, progress and self.rank == 0
        self.step = 0
        self.history: list[dict[str, Any]] = []
        if not source.plan(0):
            raise InputError(got="a source without batches", expected="at least one", remedy="Give it utterances")
        self.steps = options.steps or -(-sum(len(source.plan(epoch)) for epoch in range(options.epochs)) // options.accumulate)

    @property
    def is_done(self) -> bool:
        return self.step >= self.steps

    def resume(self) -> bool:
        """Load the folder's checkpoint, if there is one. Returns whether there is.

        Raises:
            CheckpointError: a damaged checkpoint, or one with different parameters.
            InputError: a checkpoint with different options, manifest or model (names what differs), or processes that see different
                checkpoints.
        """
        with shared_errors():
            found = self.folder is not None and self.folder.has_state
            if found:
                self._load()
        steps = gather(self.step if found else None)
        if len(set(steps)) > 1:
            raise InputError(
                got=f"checkpoints of steps {', '.join(map(str, steps))} in {str(self.folder.folder)!r}, as seen by {len(steps)} processes",
                expected="the same checkpoint for all processes",
                remedy="Use a folder that all machines share",
            )
        return found

    def _load(self) -> None:
        tensors, facts = self.folder.read()
        self.folder.check_identity(facts["identity"], self.identity)
        self.optimizer.load(tensors)
        with torch.no_grad():
            for name, buffer in self._buffers().items():
                stored = tensors.get(f"buffer/{name}")
                if stored is None or stored.shape != buffer.shape:
                    raise CheckpointError(
                        got=f"a training checkpoint without the buffer {name}",
                        expected="the parameters and buffers that train now",
                        remedy="Resume with the model and options it was written with",
                    )
                buffer.copy_(stored)
        self.step, self.history = facts["step"], self.folder.cut_log(facts["step"]) if self.rank == 0 else []

    def checkpoint(self) -> None:
        """Write a checkpoint for `resume`."""
        with shared_errors():
            if self.folder is not None and self.rank == 0:
                buffers = {f"buffer/{name}": buffer for name, buffer in self._buffers().items()}
                self.folder.write(self.optimizer.state() | buffers, {"step": self.step, "identity": self.identity})

    def _buffers(self) -> dict[str, Tensor]:
        """The buffers that training changes: the statistics of each BatchNorm in training mode."""
        owners = {name: module for name, module in self.model.named_modules() if module.training}
        return {f"{owner}.{name}": one for owner, module in owners.items() for name, one in module.named_buffers(recurse=False)}

    def run(self, *, seconds: float | None = None) -> None:
        """Train to the last step, or for this many seconds, then write a checkpoint.

        Unless `resume` was called, training starts from the beginning, even if the folder has a checkpoint.

        Raises:
            InputError: a loss or gradient that is not finite; names the step and lines. That step does not change the weights.
            GraniteSpeechError: the source cannot load a batch.
        """
        if self.step == 0:
            self._start()
        begin = time.perf_counter()
        bar = tqdm(total=self.steps, initial=self.step, unit="step", disable=not self.progress)
        audio, busy = 0.0, 0.0
        with bar, closing(self._batches()) as batches:
            while not self.is_done and not self._any(seconds is not None and time.perf_counter() - begin >= seconds):
                started = time.perf_counter()
                with shared_errors():
                    share = [next(batches) for _ in range(self.share)]
                record = self._step(share)
                busy, audio = busy + time.perf_counter() - started, audio + record["audio_seconds"]
                self._remember(record)
                bar.set_postfix_str(f"loss {record['loss']:.4g}" + (f", {audio / busy:.3g} audio-s/s" if audio else ""), refresh=False)
                bar.update()
                if self.is_done or self._is_due(self.options.validate_every):
                    self._validate()
                if not self.is_done and self._is_due(self.options.checkpoint_every):
                    self.checkpoint()
        self.checkpoint()

    def _start(self) -> None:
        self.history = []
        if self.folder is not None and self.rank == 0:
            self.folder.cut_log(-1)
        self._validate()
        self.checkpoint()

    def _is_due(self, every: int) -> bool:
        return every > 0 and self.step % every == 0

    def _batches(self) -> Iterator[tuple[int, Batch]]:
        """This process's (epoch, batch) pairs from the current step on, without end. Each is loaded while the previous one is used."""
        with ThreadPoolExecutor(1, thread_name_prefix="batches") as pool:
            plan = islice(self._plan(self.step * self.options.accumulate), self.rank, None, self.processes)
            epoch, indices = next(plan)
            pending = pool.submit(self.source.load, epoch, indices)
            while True:
                following, indices = next(plan)
                ahead = pool.submit(self.source.load, following, indices)
                yield epoch, pending.result()
                epoch, pending = following, ahead

    def _plan(self, passed: int) -> Iterator[tuple[int, list[int]]]:
        epoch = 0
        while True:
            batches = self.source.plan(epoch)
            for indices in batches[passed:]:
                yield epoch, indices
            passed = max(0, passed - len(batches))
            epoch += 1

    def _step(self, batches: Sequence[tuple[int, Batch]]) -> dict[str, Any]:
        """Take one step of the optimizer. Returns its record."""
        counts, seconds = self._totals(batches)
        sums = self._backward(batches, counts)
        sums["gradient_norm"] = self.optimizer.clip(self.options.clip_norm)
        figures = dict(zip(sums, torch.stack([one.float() for one in sums.values()]).tolist(), strict=True))
        if not math.isfinite(figures["loss"]) or not math.isfinite(figures["gradient_norm"]):
            raise self._not_finite(figures, batches)
        rate = learning_rate(self.step, self.steps, peak=self.options.learning_rate, warmup=self.options.warmup)
        self.optimizer.step(rate)
        self.step += 1
        return {"step": self.step, "epoch": batches[0][0], **figures, "learning_rate": rate, "audio_seconds": seconds}

    def _totals(self, batches: Sequence[tuple[int, Batch]]) -> tuple[dict[str, int], float]:
        """Counts and seconds of audio of the step, over all processes."""
        counts: dict[str, int] = {}
        for _, batch in batches:
            counts = {name: counts.get(name, 0) + count for name, count in batch.counts.items()}
        seconds = sum(batch.audio_seconds for _, batch in batches)
        *totals, seconds = self._summed(torch.tensor([*counts.values(), seconds], dtype=torch.float64, device=self.model.device)).tolist()
        return {name: int(total) for name, total in zip(counts, totals, strict=True)}, seconds

    def _backward(self, batches: Sequence[tuple[int, Batch]], counts: dict[str, int]) -> dict[str, Tensor]:
        """Collect the gradients of the step. Returns its losses by name. Both are summed over all processes."""
        sums: dict[str, Tensor] = {}
        with seeded(self.model.device, "step", self.options.seed, self.step, *([self.rank] if self.rank else [])):
            for _, batch in batches:
                value = self.loss(self.model, batch, counts)
                value.total.backward()
                self.optimizer.collect()
                for name, part in {"loss": value.total, **value.parts}.items():
                    sums[name] = sums.get(name, 0.0) + part.detach()
        if self.processes > 1:
            self.optimizer.all_reduce(self._summed)
            sums = dict(zip(sums, self._summed(torch.stack([one.float() for one in sums.values()])), strict=True))
        return sums

    def _not_finite(self, figures: dict[str, float], batches: Sequence[tuple[int, Batch]]) -> InputError:
        names = [name for _, batch in batches for name in batch.names]
        return InputError(
            got=f"a loss of {figures['loss']:g} with a gradient of norm {figures['gradient_norm']:g} in step {self.step + 1}, on "
            + ", ".join(names[:5])
            + (f" and {len(names) - 5} more" if len(names) > 5 else ""),
            expected="finite values",
            remedy="Lower learning_rate, lengthen warmup, or check these recordings",
        )

    def _any(self, value: bool) -> bool:
        """True if it is true in any process. All must take the same branch, or they deadlock."""
        return self._summed(torch.tensor(float(value), device=self.model.device)).item() > 0

    def _summed(self, tensor: Tensor) -> Tensor:
        """The sum over all processes, in place."""
        if self.processes > 1:
            dist.all_reduce(tensor)
        return tensor

    def _validate(self) -> None:
        with shared_errors():
            if self.validate is not None and self.rank == 0:
                with _evaluation_mode(self.model):
                    self._remember({"step": self.step, **self.validate(self.model)})

    def _remember(self, record: dict[str, Any]) -> None:
        self.history.append(record)
        if self.folder is not None and self.rank == 0:
            self.folder.log(record)


@contextmanager
def _evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Put every module in evaluation mode for the block, then restore each one's mode: frozen and trainable parts differ."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode
