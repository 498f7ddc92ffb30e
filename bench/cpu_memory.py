"""Peak memory on a CPU: a part of a released model, 1 GB in float32, is loaded and answers one batch, in a new process for each system.

    python -m bench.cpu_memory SYSTEM FOLDER THREADS SECONDS ...

measures one system in this process, and prints it as JSON.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from bench import checkpoints_cpu
from bench.encoder import CLIP_SECONDS, FRAMES_A_SECOND
from bench.resident import status
from bench.shapes import AFTER, BEFORE
from bench.turns import REFERENCES, SYSTEMS

__all__ = ["PART", "batch", "measure", "peak"]

ROOT = Path(__file__).parents[1]
PART = ("3.3-2b", 12)
NEW_TOKENS = 8


def measure(
    configuration: dict[str, Any] | None = None, clip_seconds: tuple[int, ...] = CLIP_SECONDS, systems: tuple[str, ...] = SYSTEMS
) -> dict[str, Any]:
    """Peaks above the imports, in bytes, and each relative to that of transformers in float32.

    Args:
        configuration: of the model; None for a part of a released one.
        clip_seconds: of the batch.
        systems: some of SYSTEMS, "transformers float32" among them.
    """
    configuration = checkpoints_cpu.whole(*PART) if configuration is None else configuration
    with tempfile.TemporaryDirectory() as folder:
        size = checkpoints_cpu.write(Path(folder), configuration)
        peaks = {system: _in_new_process(system, folder, clip_seconds) for system in systems}
    theirs = peaks["transformers float32"]["batch"]
    return {
        "what": checkpoints_cpu.title(*PART),
        "float32_bytes": size,
        "clip_seconds": list(clip_seconds),
        "new_tokens": NEW_TOKENS,
        "peaks": peaks,
        "relative": {system: one["batch"] / theirs for system, one in peaks.items()},
    }


def _in_new_process(system: str, folder: str, clip_seconds: tuple[int, ...]) -> dict[str, int]:
    command = [sys.executable, "-m", "bench.cpu_memory", system, folder, str(torch.get_num_threads()), *map(str, clip_seconds)]
    return json.loads(subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True).stdout)


def peak(system: str, folder: Path, clip_seconds: tuple[int, ...]) -> dict[str, int]:
    """Peaks of this process in bytes, above that of its imports: after loading, and after a batch."""
    _import(system)
    imports = status("VmHWM")
    model = checkpoints_cpu.load(system, folder)
    loaded = status("VmHWM")
    with torch.inference_mode():
        model.generate(**batch(system, model.config, clip_seconds), max_new_tokens=NEW_TOKENS, do_sample=False, pad_token_id=0)
    return {"imports": imports, "loaded": loaded - imports, "batch": status("VmHWM") - imports}


def _import(system: str) -> None:
    """All that the system imports for the first time when a model is loaded or called."""
    if system in REFERENCES:
        from transformers.models.granite import modeling_granite  # noqa: F401
        from transformers.models.granite_speech import modeling_granite_speech  # noqa: F401
    else:
        from granite_speech import GraniteSpeechForConditionalGeneration  # noqa: F401


def batch(system: str, config: Any, clip_seconds: tuple[int, ...]) -> dict[str, torch.Tensor]:
    """Inputs of `generate`: random features of clips of these lengths, padded, each in a prompt that is padded on its left."""
    frames = torch.tensor([seconds * FRAMES_A_SECOND for seconds in clip_seconds])
    tokens = -(-frames // config.window_size) * (config.window_size // config.downsample_rate)
    columns = BEFORE + int(tokens.max()) + AFTER
    ids, mask = torch.zeros(len(frames), columns, dtype=torch.long), torch.zeros(len(frames), columns, dtype=torch.long)
    for row, count in enumerate(tokens.tolist()):
        ids[row, columns - AFTER - count : columns - AFTER] = config.audio_token_index
        mask[row, columns - AFTER - count - BEFORE :] = 1
    features = torch.randn(len(frames), int(frames.max()), config.encoder_config.input_dim, generator=torch.Generator().manual_seed(0))
    inputs = {"input_ids": ids, "attention_mask": mask, "input_features": features}
    if system in REFERENCES:
        return inputs | {"input_features_mask": torch.arange(int(tokens.max())) < tokens[:, None]}
    return inputs | {"input_features_lengths": frames}


if __name__ == "__main__":
    torch.set_num_threads(int(sys.argv[3]))
    print(json.dumps(peak(sys.argv[1], Path(sys.argv[2]), tuple(map(int, sys.argv[4:])))))
