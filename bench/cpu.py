"""This package and transformers side by side on a CPU, in float32, bfloat16 and int8, in one run.

The encoder and TurboCTC in the released size, decode steps at batch 1, the bundled checkpoint from waveforms to text, word error rates,
peak memory, and the command line on a busy machine. Results are checked before anything is timed. The result file is written after every
section, so a failure costs only the sections after it.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from bench import cpu_busy, cpu_ctc, cpu_decode, cpu_encoder, cpu_memory, cpu_table, cpu_words, embedded, results
from bench.turns import fastest

__all__ = ["run"]


def run(*, rounds: int, layers: int, threads: int | None, unseen: Path, out: Path) -> str:
    """Measure, write the result file, and return its tables.

    Args:
        rounds: of the timings, most of which are made in each; for the longest, half as many.
        layers: of the encoder.
        threads: of PyTorch; None for its own choice.
        unseen: manifest of the held-out voices; synthesized if it does not exist.
        out: folder for the result file.
    """
    if threads is not None:
        torch.set_num_threads(threads)
    sections: dict[str, Callable[[], Any]] = {
        "encoder": partial(cpu_encoder.measure, layers, rounds),
        "turboctc": partial(cpu_ctc.measure, rounds),
        "decode": partial(cpu_decode.measure, rounds),
        "embedded": partial(embedded.measure, rounds),
        "words": lambda: cpu_words.measure(cpu_words.held_out(unseen)),
        "memory": cpu_memory.measure,
        "busy": partial(cpu_busy.measure, (rounds + 1) // 2),
    }
    result: dict[str, Any] = {"kind": "cpu", "run": results.describe_run(), "rounds": rounds, "fastest": fastest()}
    for name, measure in sections.items():
        result[name] = measure()
        file = results.write(out, "cpu", result)
    return f"{cpu_table.table(result)}\n\n{file}"
