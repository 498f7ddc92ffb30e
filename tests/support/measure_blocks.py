"""Time and memory of an hour of mp3 and of Opus through the block reader.

python -m tests.support.measure_blocks [SECONDS]
"""

import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from granite_speech.inputs.audio import read_blocks
from tests.support.made_sounds import encoded, voice

FORMATS = {
    "mp3, 44.1 kHz, mono": ("mp3", "libmp3lame", 44100, 1),
    "opus, 48 kHz, mono": ("ogg", "libopus", 48000, 1),
    "mp3, 44.1 kHz, stereo": ("mp3", "libmp3lame", 44100, 2),
    "opus, 48 kHz, stereo": ("ogg", "libopus", 48000, 2),
}


def memory(line: str) -> int:
    return next(int(one.split()[1]) * 1024 for one in Path("/proc/self/status").read_text().splitlines() if one.startswith(line))


def read(path: Path, short: Path) -> None:
    """Runs in a process of its own, so that its memory is measured alone."""
    sum(map(len, read_blocks(short)))  # imports and lasting allocations come before memory is measured
    before, started = memory("VmHWM"), time.perf_counter()
    samples = sum(map(len, read_blocks(path)))
    seconds, grown = time.perf_counter() - started, (memory("VmHWM") - before) / 2**20
    print(f"{samples / 16000:.1f} s in {seconds:.1f} s, peak {grown:.1f} MiB above a short file's")


def main(seconds: float) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path, short = Path(folder) / "recording", Path(folder) / "short"
        for name, (container, codec, rate, channels) in FORMATS.items():
            sound = np.tile(voice(rate), int(seconds / 2) + 1)[: int(seconds * rate)]
            encoded(container, codec, sound, rate, channels=channels, path=path)
            encoded(container, codec, voice(rate), rate, channels=channels, path=short)
            print(f"{name}, {path.stat().st_size / 1e6:.1f} MB: ", end="", flush=True)
            subprocess.run([sys.executable, "-m", "tests.support.measure_blocks", "--read", path, short], check=True)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--read"]:
        read(Path(sys.argv[2]), Path(sys.argv[3]))
    else:
        main(float(sys.argv[1]) if len(sys.argv) > 1 else 3600.0)
