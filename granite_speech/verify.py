"""Does this package compute what transformers computes, on these weights and this machine? Stage by stage, on one recording.

Both run the bundled recording from end to end, each on its own intermediate results, in float32 and in the checkpoint's dtype.
A stage that is wrong misses, and so may all behind it: the first to miss is where to look. Only one model is in memory at a
time: transformers' runs first, what it computed is kept on the CPU, and it is freed before ours is loaded. A checkpoint of n
parameters thus needs 4 n bytes, for the float32 run, and some hundred MB.

An error is the RMS of the difference over the RMS of transformers' float32 values. float32 may differ by the order of its sums.
In a shorter dtype transformers' own distance from its float32 values is the measure: ours may be little larger.
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
from granite_kernels.launch import architecture
from granite_kernels.launch import precompile as precompile_launches
from torch import Tensor, nn

from granite_speech.checkpoints.folder import Checkpoint, load_json, resolve
from granite_speech.checkpoints.weight_names import EMBEDDING
from granite_speech.config import GraniteSpeechConfig, GraniteSpeechPlusConfig
from granite_speech.errors import CheckpointError, GraniteSpeechError, InputError, MissingDependencyError, UnsupportedError
from granite_speech.generation.loop import launches_of_generate
from granite_speech.inputs.audio import load_audio
from granite_speech.inputs.processor import GraniteSpeechProcessor
from granite_speech.model import GraniteSpeechForConditionalGeneration
from granite_speech.pretrained import choose_device, choose_dtype
from granite_speech.transcription.transcriber import transcript_request

__all__ = ["Comparison", "Stage", "report", "verify"]

RECORDING = Path(__file__).parent / "assets" / "jfk.flac"
WORDS = "And so, my fellow Americans: ask not what your country can do for you, ask what you can do for your country."
FLOAT32_ALLOWED = 1e-4
# Of transformers' own error in a shorter dtype; the floor is for stages where that happens to be next to nothing.
SHORT_RATIO, SHORT_FLOOR = 1.5, 1e-3
# Logits that lie closer than this are a tie, and either token is right; in a shorter dtype its errors of logits decide.
TIE, TIE_IN_ERRORS = 1e-4, 4.0
IDS = "greedy ids"


@dataclass(frozen=True)
class Stage:
    """One line of the comparison: the error, and the one that is allowed."""

    name: str
    error: float
    allowed: float

    @property
    def missed(self) -> bool:
        return not self.error <= self.allowed  # NaN misses


@dataclass(frozen=True)
class Comparison:
    """All stages in one dtype, in the order in which they are computed.

    Attributes:
        seconds: of generating the answer, by side; features and prompt included, loading not.
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
    """A loaded model and how it is used.

    Attributes:
        parts: encoder, projector, decoder (the language model without its head) and head.
        prepare: makes the model's inputs of the recording.
        decode: makes words of token ids.
        scaling: divides what the head puts out, in place of the model's own logits: transformers divides them, as the models
            were trained, up to 5.9 and no more from 5.10 on.
    """

    model: nn.Module
    parts: dict[str, nn.Module]
    prepare: Callable[[], Any]
    decode: Callable[..., str]
    scaling: float | None = None


@dataclass(frozen=True)
class _Run:
    """What one model computed, on the CPU.

    Attributes:
        values: `(rows, width)` float32 by stage, in the order of computation.
        ids: `(tokens,)` of the answer.
        step_logits: `(vocabulary,)` of each of them.
    """

    values: dict[str, Tensor]
    ids: Tensor
    step_logits: list[Tensor]
    seconds: float
    words: str


def verify(
    name_or_path: str | Path, *, device: str | torch.device | None = None, max_new_tokens: int = 100, revision: str | None = None
) -> list[Comparison]:
    """Compare with transformers.

    Args:
        name_or_path: a folder or hub id.
        device: where both run; CUDA where there is one and nothing is said.
        max_new_tokens: of the greedy answer.
        revision: on the hub.

    Returns:
        One comparison in float32 and, where the checkpoint's dtype is another, one in that.

    Raises:
        MissingDependencyError: no transformers, one without this model, or no peft for a checkpoint with an adapter.
        CheckpointError, ConfigError, UnsupportedError: a checkpoint that either side cannot load as it is.
        InputError: a device that does not exist, or whose memory is too small.
    """
    folder = resolve(name_or_path, revision=revision)
    where = choose_device(device if device is not None else "cuda" if torch.cuda.is_available() else "cpu", None)
    config = GraniteSpeechConfig.from_pretrained(folder)
    weights = Checkpoint.open(folder)
    kept = choose_dtype(None, load_json(folder / "config.json")) or weights.entries[EMBEDDING].dtype
    load_theirs = _their_loader(folder, config, has_adapter=weights.adapter_config is not None)
    processor = GraniteSpeechProcessor.from_pretrained(folder)
    samples, prompt = load_audio(RECORDING, processor.audio_processor.sampling_rate), transcript_request(processor)

    def precompile(dtype: torch.dtype) -> None:
        """Compile our kernels. Left to our run, they would be compiled one after another, which takes most of its time."""
        values = load_json(folder / "config.json")
        model = GraniteSpeechForConditionalGeneration.without_weights(GraniteSpeechConfig.from_pretrained(folder), weights, values)
        launches = launches_of_generate(model.to(dtype).eval(), processor(prompt, samples), architecture(where), max_new_tokens)
        precompile_launches(launches, where)

    def ours(dtype: torch.dtype) -> _Side:
        model = GraniteSpeechForConditionalGeneration.from_pretrained(folder, device=where, dtype=dtype)
        parts = {"encoder": model.encoder, "projector": model.projector, "decoder": model.decoder, "head": model.lm_head}
        return _Side(model, parts, lambda: processor(prompt, samples, device=where), processor.decode)

    def theirs(dtype: torch.dtype) -> _Side:
        model, their_processor = load_theirs(dtype, where)
        inner = getattr(model, "model", model)  # transformers up to 5.9 has the parts in the model itself
        decoder = inner.language_model
        parts = {"encoder": inner.encoder, "projector": inner.projector, "decoder": getattr(decoder, "model", decoder)}
        parts["head"] = model.get_output_embeddings()
        prepare = partial(their_processor, prompt, samples[None], device=str(where), return_tensors="pt")
        return _Side(model, parts, prepare, their_processor.tokenizer.decode, scaling=config.text_config.logits_scaling)

    comparisons, truth = [], None
    for dtype in dict.fromkeys((torch.float32, kept)):
        with ThreadPoolExecutor(1) as background:
            compiled = background.submit(precompile, dtype) if where.type == "cuda" else None
            try:
                reference = _run(theirs, dtype, where, max_new_tokens)
            except GraniteSpeechError:
                raise
            except Exception as error:  # an open set, none of which is a result of the comparison
                raise UnsupportedError(
                    got=f"transformers failing on {str(folder)!r} in {dtype} ({type(error).__name__}: {error})",
                    expected="an answer to compare with",
                    remedy="Try another version of transformers",
                ) from error
            if compiled is not None:
                compiled.result()
        truth = truth or reference
        comparisons.append(_compare(dtype, _run(ours, dtype, where, max_new_tokens), reference, truth))
    return comparisons


def report(comparisons: list[Comparison]) -> str:
    """The comparisons as a table, with a verdict at the end of each."""
    lines = [f"{RECORDING.name}: {WORDS}"]
    for one in comparisons:
        width = max(len(stage.name) for stage in one.stages)
        lines += ["", f"{str(one.dtype).removeprefix('torch.')}", f"{'stage':{width}}  {'error':>9}  {'allowed':>9}"]
        lines += [f"{stage.name:{width}}  {stage.error:9.2e}  {stage.allowed:9.2e}{'  MISS' * stage.missed}" for stage in one.stages]
        lines += [f"{side}: {one.seconds[side]:.2f} s, {one.words[side]!r}" for side in one.seconds]
        miss = one.first_miss
        lines.append("all stages within what is allowed" if miss is None else f"the first stage that misses: {miss.name}")
    return "\n".join(lines)


def _their_loader(folder: Path, config: GraniteSpeechConfig, *, has_adapter: bool) -> Callable[[torch.dtype, torch.device], tuple]:
    """transformers' classes for this folder, as a function that loads model and processor."""
    kind = f"{'GraniteSpeechPlus' if isinstance(config, GraniteSpeechPlusConfig) else 'GraniteSpeech'}ForConditionalGeneration"
    try:
        import transformers

        model_class, processor_class = getattr(transformers, kind), transformers.AutoProcessor
        if has_adapter:
            import peft  # noqa: F401 (transformers would load the model without its adapter)
    except (ImportError, AttributeError, RuntimeError) as error:  # RuntimeError: transformers', where a part of it fails to import
        raise MissingDependencyError(
            got=f"no {kind} to compare with ({error})",
            expected="transformers with Granite Speech, and peft where the checkpoint has an adapter",
            remedy='Install them for this comparison: pip install "transformers>=4.56" peft torchaudio',
        ) from error

    def load(dtype: torch.dtype, device: torch.device) -> tuple[nn.Module, Any]:
        try:
            # By its older name, which every version knows.
            model, info = model_class.from_pretrained(str(folder), torch_dtype=dtype, output_loading_info=True)
            processor = processor_class.from_pretrained(str(folder))
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # an open set: transformers', peft's, safetensors', by version of each
            raise CheckpointError(
                got=f"{str(folder)!r}, which transformers {transformers.__version__} does not load ({type(error).__name__}: {error})",
                expected="a checkpoint that transformers loads",
                remedy="Try another version of transformers; this package may load it nevertheless",
            ) from error
        invented = {name for name in info["missing_keys"] if "lm_head" not in name and "attention_dists" not in name}
        if has_adapter and not any("lora_A" in name for name, _ in model.named_parameters()):
            invented.add("the adapter")
        if invented:
            raise CheckpointError(
                got=f"{str(folder)!r}, of which transformers {transformers.__version__} did not load {sorted(invented)!r:.200}",
                expected="a checkpoint that it loads whole",
                remedy="Load it here, save it with save_pretrained and compare that folder, or try another version of transformers",
            )
        return model.to(device).eval(), processor

    return load


def _run(load: Callable[[torch.dtype], _Side], dtype: torch.dtype, device: torch.device, max_new_tokens: int) -> _Run:
    """One model from loading to its answer. It is gone afterwards."""
    tf32 = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False  # on by default, and then transformers' convolutions are no float32
    try:
        side = load(dtype)
        values = _stage_values(side, device)
        return _Run(values, *_answer(side, device, max_new_tokens))
    except torch.OutOfMemoryError as error:
        raise InputError(
            got=f"a model in {dtype} that does not fit on {device} ({error})",
            expected="memory for the weights in float32",
            remedy="Run it on a larger device, or on the CPU",
        ) from error
    finally:
        torch.backends.cudnn.allow_tf32 = tf32
        side = None
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()


@torch.no_grad()
def _stage_values(side: _Side, device: torch.device) -> dict[str, Tensor]:
    """One forward pass with a listener at every stage; what they heard is in the order of computation."""
    inputs = side.prepare()
    values = {"input ids": _rows(inputs["input_ids"][..., None]), "features": _rows(inputs["input_features"])}
    parts, hooks = side.parts, []

    # The listeners return None: what a hook returns would take the place of what it heard.
    def listen(name: str, module: nn.Module) -> None:
        def hear(module: nn.Module, given: tuple, output: Any) -> None:
            values.setdefault(name, _rows(output))

        hooks.append(module.register_forward_hook(hear))

    def listen_before(name: str, module: nn.Module) -> None:
        def hear(module: nn.Module, given: tuple) -> None:
            values.setdefault(name, _rows(given[0]))

        hooks.append(module.register_forward_pre_hook(hear))

    listen("encoder.input_linear", parts["encoder"].input_linear)
    listen("encoder.out_mid", parts["encoder"].out_mid)
    for number, layer in enumerate(parts["encoder"].layers):
        listen(f"encoder.layers.{number}", layer)
    listen_before("encoder", parts["projector"])  # which sees several layers' outputs, in some models
    listen("projector", parts["projector"])
    listen_before("embeddings", parts["decoder"].layers[0])
    for number, layer in enumerate(parts["decoder"].layers):
        listen(f"language_model.model.layers.{number}", layer)
    listen("language_model.model.norm", parts["decoder"].norm)
    listen("logits", parts["head"])
    try:
        output = side.model(**inputs.to(device))
    finally:
        for hook in hooks:
            hook.remove()
    values["logits"] = _rows(output.logits) if side.scaling is None else values["logits"] / side.scaling
    return values


def _answer(side: _Side, device: torch.device, max_new_tokens: int) -> tuple[Tensor, list[Tensor], float, str]:
    """Ids, the logits of each, seconds and words of a greedy answer."""
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
    """`(rows, width)` float32 on the CPU of a module's output: a tensor, padded or packed, or what holds one first.

    Always a copy: a model may write into the tensor later.
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
        elif dtype == torch.float32 or name == "features":  # which are float32 whatever the model's dtype
            allowed = FLOAT32_ALLOWED
        else:
            allowed = SHORT_RATIO * _relative_rms(theirs.values[name], expected) + SHORT_FLOOR
        stages.append(Stage(name, error, allowed))
    noise = float((theirs.values["logits"] - truth.values["logits"]).abs().max())
    stages.append(Stage(IDS, _regret(ours.ids, theirs), TIE + TIE_IN_ERRORS * noise))
    sides = {"granite_speech": ours, "transformers": theirs}
    return Comparison(dtype, stages, {name: one.seconds for name, one in sides.items()}, {name: one.words for name, one in sides.items()})


def _relative_rms(value: Tensor | None, truth: Tensor) -> float:
    """RMS of the difference over the truth's; infinite where the shapes differ or nothing was heard."""
    if value is None or value.shape != truth.shape:
        return math.inf
    difference, size = (value - truth).double().norm().item(), truth.double().norm().item()
    return difference / size if size else math.inf if difference else 0.0


def _regret(ids: Tensor, theirs: _Run) -> float:
    """At the first token that differs: how much higher the reference's own logit is than the one it gave to ours. 0 where none does.

    What follows that token is another text, and no matter of errors.
    """
    length = min(len(ids), len(theirs.ids))
    different = (ids[:length] != theirs.ids[:length]).nonzero()
    if not len(different):
        return 0.0 if len(ids) == len(theirs.ids) else math.inf
    step = int(different[0])
    return float(theirs.step_logits[step][theirs.ids[step]] - theirs.step_logits[step][ids[step]])
