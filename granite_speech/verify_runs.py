"""What a comparison with transformers consists of, for models of any family: runs of both sides, and their errors stage by stage."""

import gc
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from granite_speech.errors import CheckpointError, InputError, MissingDependencyError

__all__ = ["INPUT_IDS", "TIE", "Comparison", "Recorder", "Run", "Stage", "TheirLoader"]
__all__ += ["compare", "relative_rms", "rows", "run", "their_loader"]

FLOAT32_ALLOWED = 1e-4
# Factor of transformers' own error in a shorter dtype; the floor is for stages where that error happens to be very small.
SHORT_RATIO, SHORT_FLOOR = 1.5, 1e-3
# Logits closer than this are a tie, and either token is right. A shorter dtype adds a multiple of its largest logit error.
TIE, TIE_IN_ERRORS = 1e-4, 4.0
IDS, INPUT_IDS = "greedy ids", "input ids"

TheirLoader = Callable[[torch.dtype, torch.device], tuple[nn.Module, Any]]

# Parts of names of weights that transformers may report as missing, because others determine them.
_DERIVED = ("lm_head", "ctc_head", "attention_dists")


@dataclass(frozen=True)
class Stage:
    """One line of the comparison: the error and the largest one allowed."""

    name: str
    error: float
    allowed: float

    @property
    def missed(self) -> bool:
        return not self.error <= self.allowed  # NaN misses


@dataclass(frozen=True)
class Comparison:
    """All stages in one dtype, in order of computation.

    Attributes:
        seconds: time to generate the answer, by side, including features and prompt but not loading.
        words: the answer, by side.
    """

    dtype: torch.dtype
    stages: list[Stage]
    seconds: dict[str, float]
    words: dict[str, str]

    @property
    def first_miss(self) -> Stage | None:
        return next((stage for stage in self.stages if stage.missed), None)


@dataclass(frozen=True)
class Run:
    """The results of one model, on the CPU.

    Attributes:
        values: `(rows, width)` float32 by stage, in order of computation.
        ids: `(tokens,)` of the answer.
        step_logits: `(vocabulary,)` for each of these tokens.
        seconds: time to generate the answer.
        words: the answer.
    """

    values: dict[str, Tensor]
    ids: Tensor
    step_logits: list[Tensor]
    seconds: float
    words: str


def their_loader(folder: Path, kind: str, *, since: str, has_adapter: bool) -> TheirLoader:
    """A function that loads this folder's model and processor with transformers.

    Args:
        folder: of the checkpoint.
        kind: the name of the model's class.
        since: the first version of transformers that has it.
        has_adapter: whether the checkpoint has one.

    Raises:
        MissingDependencyError: no transformers, a version without this model, or no peft for an adapter.
    """
    try:
        import transformers

        model_class, processor_class = getattr(transformers, kind), transformers.AutoProcessor
        if has_adapter:
            import peft  # noqa: F401 (without it transformers loads the model without its adapter)
    except (ImportError, AttributeError, RuntimeError) as error:  # RuntimeError: from transformers, if part of it fails to import
        raise MissingDependencyError(
            got=f"no {kind} to compare with ({error})",
            expected="transformers with Granite Speech, and peft if the checkpoint has an adapter",
            remedy=f'Install them for this comparison: pip install "transformers>={since}" peft torchaudio',
        ) from error

    def load(dtype: torch.dtype, device: torch.device) -> tuple[nn.Module, Any]:
        try:
            # torch_dtype is the older name of dtype, which every version accepts.
            model, info = model_class.from_pretrained(str(folder), torch_dtype=dtype, output_loading_info=True)
            processor = processor_class.from_pretrained(str(folder))
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # transformers, peft and safetensors may raise anything, depending on their versions
            raise CheckpointError(
                got=f"{str(folder)!r}, which transformers {transformers.__version__} cannot load ({type(error).__name__}: {error})",
                expected="a checkpoint that transformers can load",
                remedy="Try another version of transformers; this package may still be able to load it",
            ) from error
        invented = {name for name in info["missing_keys"] if not any(one in name for one in _DERIVED)}
        if has_adapter and not any("lora_A" in name for name, _ in model.named_parameters()):
            invented.add("the adapter")
        if invented:
            raise CheckpointError(
                got=f"{str(folder)!r}, from which transformers {transformers.__version__} did not load {sorted(invented)!r:.200}",
                expected="a checkpoint that it loads completely",
                remedy="Load it here, save it with save_pretrained and compare that folder, or try another version of transformers",
            )
        return model.to(device).eval(), processor

    return load


def run(load: Callable[[torch.dtype], Any], measure: Callable[[Any], Run], dtype: torch.dtype, device: torch.device) -> Run:
    """Load one model, run it and free it.

    Args:
        load: makes what `measure` takes.
        measure: runs the model.
        dtype, device: of the model.

    Raises:
        InputError: too little memory.
    """
    tf32 = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False  # on by default, which makes transformers' convolutions less accurate than float32
    try:
        side = load(dtype)
        return measure(side)
    except torch.OutOfMemoryError as error:
        raise InputError(
            got=f"a model in {dtype} that does not fit on {device} ({error})",
            expected="memory for the weights in float32",
            remedy="Use a device with more memory, or the CPU",
        ) from error
    finally:
        torch.backends.cudnn.allow_tf32 = tf32
        side = None
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()


class Recorder:
    """Keeps the first inputs and outputs of modules.

    Attributes:
        values: `(rows, width)` float32 on the CPU, by stage, in order of computation.
    """

    def __init__(self) -> None:
        self.values: dict[str, Tensor] = {}
        self._hooks: list[Any] = []

    # Hooks must return None; anything else would replace the module's input or output.
    def output(self, name: str, module: nn.Module) -> None:
        """Keep what a module returns."""

        def hook(module: nn.Module, given: tuple, output: Any) -> None:
            self.values.setdefault(name, rows(output))

        self._hooks.append(module.register_forward_hook(hook))

    def input(self, name: str, module: nn.Module) -> None:
        """Keep what a module is given."""

        def hook(module: nn.Module, given: tuple) -> None:
            self.values.setdefault(name, rows(given[0]))

        self._hooks.append(module.register_forward_pre_hook(hook))

    @contextmanager
    def recording(self) -> Iterator[None]:
        """At the end of the block nothing is on the modules any more."""
        try:
            yield
        finally:
            for hook in self._hooks:
                hook.remove()


def rows(output: Any) -> Tensor:
    """A module's output as `(rows, width)` float32 on the CPU: a tensor, padded or packed, or a tuple or output that starts with one.

    Always a copy, because the model may write into the tensor later.
    """
    tensor = getattr(output, "last_hidden_state", output)
    tensor = tensor[0] if isinstance(tensor, tuple | list) else tensor
    return tensor.detach().to("cpu", torch.float32, copy=True).flatten(0, -2)


def compare(dtype: torch.dtype, ours: Run, theirs: Run, truth: Run, regret: Callable[[Tensor, Run], float]) -> Comparison:
    """The stages of two runs.

    Args:
        dtype: of both.
        ours, theirs: the runs.
        truth: transformers' run in float32.
        regret: the loss of the reference's logits with our ids in place of its own.
    """
    stages = []
    for name, expected in truth.values.items():
        error = relative_rms(ours.values.get(name), expected)
        if name == INPUT_IDS:
            allowed = 0.0
        elif dtype == torch.float32 or name == "features":  # features are float32 for any dtype of the model
            allowed = FLOAT32_ALLOWED
        else:
            allowed = SHORT_RATIO * relative_rms(theirs.values[name], expected) + SHORT_FLOOR
        stages.append(Stage(name, error, allowed))
    noise = float((theirs.values["logits"] - truth.values["logits"]).abs().max())
    stages.append(Stage(IDS, regret(ours.ids, theirs), TIE + TIE_IN_ERRORS * noise))
    sides = {"granite_speech": ours, "transformers": theirs}
    return Comparison(dtype, stages, {name: one.seconds for name, one in sides.items()}, {name: one.words for name, one in sides.items()})


def relative_rms(value: Tensor | None, truth: Tensor) -> float:
    """RMS of the difference over the RMS of the truth; infinite if the shapes differ or there is no value."""
    if value is None or value.shape != truth.shape:
        return math.inf
    difference, size = (value - truth).double().norm().item(), truth.double().norm().item()
    return difference / size if size else math.inf if difference else 0.0
