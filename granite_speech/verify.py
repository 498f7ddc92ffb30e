"""A stage-by-stage comparison with transformers on one recording, with the user's own weights and machine.

Both models run the bundled recording from end to end, each on its own intermediate results, in float32 and in the checkpoint's
dtype. If a stage is wrong, it misses and so may all later ones, so look at the first miss. Only one model is in memory at a
time: transformers' runs first, its results are kept on the CPU, and it is freed before ours is loaded. A checkpoint of n
parameters thus needs 4 n bytes, for the float32 run, and a few hundred MB.

An error is the RMS of the difference, divided by the RMS of transformers' float32 values. float32 results may differ by the
order of summation. In a shorter dtype our error may be only slightly larger than transformers' own error in that dtype.
"""

from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import torch
from granite_kernels import OPERATIONS
from granite_kernels.launch import architecture
from granite_kernels.launch import precompile as precompile_launches

from granite_speech.checkpoints.folder import Checkpoint, load_json, resolve
from granite_speech.checkpoints.placement import choose_device, choose_dtype
from granite_speech.config_base import Config
from granite_speech.config_ctc import GraniteSpeech5CTCConfig
from granite_speech.errors import GraniteSpeechError, UnsupportedError
from granite_speech.verify_ctc import CTCTask
from granite_speech.verify_runs import Comparison, Run, Stage, TheirLoader, compare, run
from granite_speech.verify_speech import SpeechTask

__all__ = ["Comparison", "Stage", "report", "verify"]

RECORDING = Path(__file__).parent / "assets" / "jfk.flac"
WORDS = "And so, my fellow Americans: ask not what your country can do for you, ask what you can do for your country."


def verify(
    name_or_path: str | Path, *, device: str | torch.device | None = None, max_new_tokens: int = 100, revision: str | None = None
) -> list[Comparison]:
    """Compare with transformers.

    Args:
        name_or_path: a folder or hub id.
        device: where both models run; if omitted, CUDA if available, else the CPU.
        max_new_tokens: of the greedy answer; of a model without a language model, the answer is one token for each frame.
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
    config, weights = Config.from_pretrained(folder), Checkpoint.open(folder)
    kind = CTCTask if isinstance(config, GraniteSpeech5CTCConfig) else SpeechTask
    task = kind.of(folder, target, config, weights, RECORDING, max_new_tokens if kind is SpeechTask else WORDS)
    stored = choose_dtype(None, load_json(folder / "config.json")) or task.stored_dtype
    load_theirs = task.their_loader()

    comparisons, truth = [], None
    for dtype in dict.fromkeys((torch.float32, stored)):
        with ThreadPoolExecutor(1) as background:
            uses_kernels = target.type == "cuda" and all(one.resolve(None, target, dtype) == "triton" for one in OPERATIONS.values())
            compiled = background.submit(_precompile, task, dtype) if uses_kernels else None
            reference = _run_theirs(task, load_theirs, dtype)
            if compiled is not None:
                compiled.result()
        truth = truth or reference
        comparisons.append(compare(dtype, run(task.ours, task.measure, dtype, target), reference, truth, task.regret))
    return comparisons


def _precompile(task: SpeechTask | CTCTask, dtype: torch.dtype) -> None:
    """Compile our kernels in parallel. During our run they would be compiled one after another, which takes most of its time."""
    precompile_launches(task.launches(dtype, architecture(task.device)), task.device)


def _run_theirs(task: SpeechTask | CTCTask, load: TheirLoader, dtype: torch.dtype) -> Run:
    try:
        return run(partial(task.theirs, load), task.measure, dtype, task.device)
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
