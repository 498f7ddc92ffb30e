"""One process that transcribes a recording with the bundled checkpoint: its words, time and memory, as JSON on standard output.

    python -m bench.hours_process ROUNDS FILE

There is a new process for each recording, because memory that an earlier one has used is not given back.
"""

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch

import granite_speech
from bench.resident import restart_peak, status
from granite_speech import Transcriber
from granite_speech.inputs import audio, audio_decoding  # noqa: F401  what the import of the package leaves for the first recording

__all__ = ["measure"]

_SAMPLE = Path(granite_speech.__file__).parent / "assets" / "sample.flac"


def measure(file: str, rounds: int) -> dict[str, Any]:
    """Transcribe `file` several times: the peak of the first time, and the seconds of each, reading included."""
    after_import, seconds = restart_peak(), []
    with Transcriber.from_pretrained("embedded", dtype="float32") as transcriber:
        transcriber.transcribe(_SAMPLE)
        loaded = status("VmRSS")
        for number in range(rounds):
            begin = time.perf_counter()
            transcript = transcriber.transcribe(file)
            seconds.append(time.perf_counter() - begin)
            if number == 0:
                peak = status("VmHWM")
    return {
        "transcript": transcript.to_dict(),
        "seconds": seconds,
        "threads": torch.get_num_threads(),
        "memory": {"after import": after_import, "with model": loaded, "peak": peak, "peak above import": peak - after_import},
    }


if __name__ == "__main__":
    print(json.dumps(measure(sys.argv[2], int(sys.argv[1]))))
