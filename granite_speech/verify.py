"""A stage-by-stage comparison with transformers on one recording, with the user's own weights and machine.

Both models run the bundled recording from end to end, each on its own intermediate results, in float32 and in the checkpoint's
dtype. If a stage is wrong, it misses and so may all later ones, so look at the first miss. Only one model is in memory at a
time: transformers' runs first, its results are kept on the CPU, and it is freed before ours is loaded. A checkpoint of n
parameters thus needs 4 n bytes, for the float32 run, and a few hundred MB.

An error is the RMS of the difference, divided by the RMS of transformers' float32 values. float32 results may differ by the
order of summation. In a shorter dtype our error may be only slightly larger than transformers' own error in that dtype.
"""

import gc
import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from granite_kernels import OPERATIONS
from granite_kernels.launch import Launch, architecture
from granite_kernels.launch import precompile as precompile_launches
from torch import Tensor, nn

from granite_speech.checkpoints.folder import Checkpoint, load_json, resolve
from granite_speech.checkpoints.placement import choose_device, choose_dtype
from granite_speech.checkpoints.weight_names import EMBEDDING
from granite_speech.config import GraniteSpeechConfig, GraniteSpeechPlusConfig
from granite_speech.engine.generate import launches_of_generate
from granite_speech.errors import CheckpointError, GraniteSpeechError, InputError, MissingDependencyError, UnsupportedError
from granite_speech.inputs.audio import load_audio
from granite_speech.inputs.processor import GraniteSpeechProcessor
from granite_speech.inputs.requests import transcript_request
from granite_speech.model import GraniteSpeechForConditionalGeneration

__all__ = ["Comparison", "Stage", "report", "verify"]

RECORDING = Path(__file__).parent / "assets" / "jfk.flac"
WORDS = "And so, my fellow Americans: ask not what your country can do for you, ask what you can do for your country."
FLOAT32_ALLOWED = 1e-4
# Factor of transformers' own error in a shorter dtype; the floor is for stages where that error happens to be very small.
SHORT_RATIO, SHORT_FLOOR = 1.5, 1e-3
# Logits closer than this are a tie, and either token is right. A shorter dtype adds a multiple of its largest logit error.
TIE, TIE_IN_ERRORS = 1e-4, 4.0
IDS = "greedy ids"


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
class _Side:
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
class _Run:
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


@dataclass(frozen=True)
class _Task:
    """One checkpoint and recording, for both models."""

    folder: Path
    device: torch.device
    config: GraniteSpeechConfig
    weights: Checkpoint
    processor: GraniteSpeechProcessor
    samples: Tensor
    prompt: str
    max_new_tokens: int

    def precompile(self, dtype: torch.dtype) -> None:
        """Compile our kernels in parallel. During our run they would be compiled one after another, which takes most of its time."""
        values = load_json(self.folder / "config.json")
        config = GraniteSpeechConfig.from_pretrained(self.folder)
        model = GraniteSpeechForConditionalGeneration.without_weights(config, self.weights, values).to(dtype).eval()
        inputs = self.processor(self.prompt, self.samples)
        precompile_launches(_launches(model, inputs, architecture(self.device), self.max_new_tokens), self.device)

    def ours(self, dtype: torch.dtype) -> _Side:
        model = GraniteSpeechForConditionalGeneration.from_pretrained(self.folder, device=self.device, dtype=dtype)
        parts = {"encoder": model.encoder, "projector": model.projector, "decoder": model.decoder, "head": model.lm_head}
        prepare = partial(self.processor, self.prompt, self.samples, device=self.device)
        return _Side(model, parts, prepare, self.processor.decode)

    def theirs(self, load: Callable[[torch.dtype, torch.device], tuple], dtype: torch.dtype) -> _Side:
        model, processor = load(dtype, self.device)
        inner = getattr(model, "model", model)  # up to transformers 5.9 the model itself has the parts
        decoder = inner.language_model
        parts = {"encoder": inner.encoder, "projector": inner.projector, "decoder": getattr(decoder, "model", decoder)}
        parts["head"] = model.get_output_embeddings()
        prepare = partial(processor, self.prompt, self.samples[None], device=str(self.device), return_tensors="pt")
        return _Side(model, parts, prepare, processor.tokenizer.decode, scaling=self.config.text_config.logits_scaling)


def verify(
    name_or_path: str | Path, *, device: str | torch.device | None = None, max_new_tokens: int = 100, revision: str | None = None
) -> list[Comparison]:
    """Compare with transformers.

    Args:
        name_or_path: a folder or hub id.
        device: where both models run; if omitted, CUDA if available, else the CPU.
        max_new_tokens: of the greedy answer.
        revision: on the hub.

    Returns:
        One comparison in float32, and if the checkpoint has another dtype one in that.

    Raises:
        MissingDependencyError: no transformers, a version without this model, or no peft for a checkpoint with an adapter.
        CheckpointError, ConfigError, UnsupportedError: a checkpoint that either side cannot load as it is.
        InputError: a device that does not exist or has too little memory.
    """
    folder = resolve(name_or_path, revision=revision)
    target = choose_device(device if device is not None else "cuda" if torch.cuda.is_available() else "cpu", None)
    config, weights = GraniteSpeechConfig.from_pretrained(folder), Checkpoint.open(folder)
    stored = choose_dtype(None, load_json(folder / "config.json")) or weights.entries[EMBEDDING].dtype
    load_theirs = _their_loader(folder, config, has_adapter=weights.adapter_config is not None)
    processor = GraniteSpeechProcessor.from_pretrained(folder)
    samples = load_audio(RECORDING, processor.audio_processor.sampling_rate)
    prompt = transcript_request(processor, model_type=config.model_type)
    task = _Task(folder, target, config, weights, processor, samples, prompt, max_new_tokens)

    comparisons, truth = [], None
    for dtype in dict.fromkeys((torch.float32, stored)):
        with ThreadPoolExecutor(1) as background:
            uses_kernels = target.type == "cuda" and all(one.resolve(None, target, dtype) == "triton" for one in OPERATIONS.values())
            compiled = background.submit(task.precompile, dtype) if uses_kernels else None
            reference = _run_theirs(task, load_theirs, dtype)
            if compiled is not None:
                compiled.result()
        truth = truth or reference
        comparisons.append(_compare(dtype, _run(task.ours, dtype, target, max_new_tokens), reference, truth))
    return comparisons


def _run_theirs(task: _Task, load: Callable[[torch.dtype, torch.device], tuple], dtype: torch.dtype) -> _Run:
    try:
        return _run(partial(task.theirs, load), dtype, task.device, task.max_new_tokens)
    except GraniteSpeechError:
        raise
    except Exception as error:  # transformers may raise anything, and no error of its own is a result of the comparison
        raise UnsupportedError(
            got=f"transformers failing on {str(task.folder)!r} in {dtype} ({type(error).__name__}: {error})",
            expected="an answer to compare with",
            remedy="Try another version of transformers",
        ) from error


def report(comparisons: list[Comparison]) -> str:
    """The comparisons as a table, with a verdict at the end of each."""
    lines = [f"{RECORDING.name}: {WORDS}"]
    for one in comparisons:
        width = max(len(stage.name) for stage in one.stages)
        lines += ["", f"{str(one.dtype).removeprefix('torch.')}", f"{'stage':{width}}  {'error':>9}  {'allowed':>9}"]
        lines += [f"{stage.name:{width}}  {stage.error:9.2e}  {stage.allowed:9.2e}{'  MISS' * stage.missed}" for stage in one.stages]
        lines += [f"{side}: {one.seconds[side]:.2f} s, {one.words[side]!r}" for side in one.seconds]
        miss = one.first_miss
        lines.append("all stages within the allowed error" if miss is None else f"first stage that misses: {miss.name}")
    return "\n".join(lines)


def _their_loader(folder: Path, config: GraniteSpeechConfig, *, has_adapter: bool) -> Callable[[torch.dtype, torch.device], tuple]:
    """A function that loads this folder's model and processor with transformers."""
    kind = f"{'GraniteSpeechPlus' if isinstance(config, GraniteSpeechPlusConfig) else 'GraniteSpeech'}ForConditionalGeneration"
    try:
        import transformers

        model_class, processor_class = getattr(transformers, kind), transformers.AutoProcessor
        if has_adapter:
            import peft  # noqa: F401 (without it transformers loads the model without its adapter)
    except (ImportError, AttributeError, RuntimeError) as error:  # RuntimeError: from transformers, if part of it fails to import
        raise MissingDependencyError(
            got=f"no {kind} to compare with ({error})",
            expected="transformers with Granite Speech, and peft if the checkpoint has an adapter",
            remedy='Install them for this comparison: pip install "transformers>=4.56" peft torchaudio',
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
        invented = {name for name in info["missing_keys"] if "lm_head" not in name and "attention_dists" not in name}
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


def _run(load: Callable[[torch.dtype], _Side], dtype: torch.dtype, device: torch.device, max_new_tokens: int) -> _Run:
    """Load one model, run it and free it."""
    tf32 = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False  # on by default, which makes transformers' convolutions less accurate than float32
    try:
        side = load(dtype)
        values = _stage_values(side, device)
        return _Run(values, *_answer(side, device, max_new_tokens))
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


def _launches(model: Any, inputs: dict[str, Any], architecture: int, max_new_tokens: int) -> list[Launch]:
    """Launches of our run, given our model on the meta device. Its hooks decide which layers run module by module."""
    launches = []
    for watched in (model.decoder, model.lm_head):  # as `_stage_values` and `_answer` do
        with watched.register_forward_hook(lambda *_: None):
            launches += launches_of_generate(model, inputs, architecture, max_new_tokens)
    return launches


@torch.no_grad()
def _stage_values(side: _Side, device: torch.device) -> dict[str, Tensor]:
    """The output of every stage in one forward pass, in order of computation."""
    inputs = side.prepare()
    values = {"input ids": _rows(inputs["input_ids"][..., None]), "features": _rows(inputs["input_features"])}
    parts, hooks = side.parts, []

    # Hooks must return None; anything else would replace the module's input or output.
    def record_output(name: str, module: nn.Module) -> None:
        def hook(module: nn.Module, given: tuple, output: Any) -> None:
            values.setdefault(name, _rows(output))

        hooks.append(module.register_forward_hook(hook))

    def record_input(name: str, module: nn.Module) -> None:
        def hook(module: nn.Module, given: tuple) -> None:
            values.setdefault(name, _rows(given[0]))

        hooks.append(module.register_forward_pre_hook(hook))

    record_output("encoder.input_linear", parts["encoder"].input_linear)
    record_output("encoder.out_mid", parts["encoder"].out_mid)
    for number, layer in enumerate(parts["encoder"].layers):
        record_output(f"encoder.layers.{number}", layer)
    record_input("encoder", parts["projector"])  # in some models the outputs of several layers
    record_output("projector", parts["projector"])
    record_input("embeddings", parts["decoder"].layers[0])
    for number, layer in enumerate(parts["decoder"].layers):
        record_output(f"language_model.model.layers.{number}", layer)
    record_output("language_model.model.norm", parts["decoder"].norm)
    record_output("logits", parts["head"])
    try:
        output = side.model(**inputs.to(device))
    finally:
        for hook in hooks:
            hook.remove()
    values["logits"] = _rows(output.logits) if side.scaling is None else values["logits"] / side.scaling
    return values


def _answer(side: _Side, device: torch.device, max_new_tokens: int) -> tuple[Tensor, list[Tensor], float, str]:
    """Ids, logits of each id, seconds and words of a greedy answer."""
    logits = []
    hook = side.parts["head"].register_forward_hook(lambda module, given, output: logits.append(_rows(output)[-1]))
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


def _rows(output: Any) -> Tensor:
    """A module's output as `(rows, width)` float32 on the CPU: a tensor, padded or packed, or a tuple or output that starts with one.

    Always a copy, because the model may write into the tensor later.
    """
    tensor = getattr(output, "last_hidden_state", output)
    tensor = tensor[0] if isinstance(tensor, tuple | list) else tensor
    return tensor.detach().to("cpu", torch.float32, copy=True).flatten(0, -2)


def _compare(dtype: torch.dtype, ours: _Run, theirs: _Run, truth: _Run) -> Comparison:
    stages = []
    for name, expected in truth.values.items():
        error = _relative_rms(ours.values.get(name), expected)
        if name == "input ids":
            allowed = 0.0
        elif dtype == torch.float32 or name == "features":  # features are float32 for any dtype of the model
            allowed = FLOAT32_ALLOWED
        else:
            allowed = SHORT_RATIO * _relative_rms(theirs.values[name], expected) + SHORT_FLOOR
        stages.append(Stage(name, error, allowed))
    noise = float((theirs.values["logits"] - truth.values["logits"]).abs().max())
    stages.append(Stage(IDS, _regret(ours.ids, theirs), TIE + TIE_IN_ERRORS * noise))
    sides = {"granite_speech": ours, "transformers": theirs}
    return Comparison(dtype, stages, {name: one.seconds for name, one in sides.items()}, {name: one.words for name, one in sides.items()})


def _relative_rms(value: Tensor | None, truth: Tensor) -> float:
    """RMS of the difference over the RMS of the truth; infinite if the shapes differ or there is no value."""
    if value is None or value.shape != truth.shape:
        return math.inf
    difference, size = (value - truth).double().norm().item(), truth.double().norm().item()
    return difference / size if size else math.inf if difference else 0.0


def _regret(ids: Tensor, theirs: _Run) -> float:
    """The reference's logit of its own token minus that of ours, at the first token that differs; 0 if none does.

    Later tokens follow a different text, so they are not compared.
    """
    length = min(len(ids), len(theirs.ids))
    different = (ids[:length] != theirs.ids[:length]).nonzero()
    if not len(different):
        return 0.0 if len(ids) == len(theirs.ids) else math.inf
    step = int(different[0])
    return float(theirs.step_logits[step][theirs.ids[step]] - theirs.step_logits[step][ids[step]])
