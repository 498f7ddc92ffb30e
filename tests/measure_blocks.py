"""Time and memory of an hour of mp3 and of Opus through the block reader.

python -m tests.measure_blocks [SECONDS]
"""

import gc
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from granite_speech.audio import read_blocks
from tests.made_sounds import encoded, voice

FORMATS = {
    "mp3, 44.1 kHz, mono": ("mp3", "libmp3lame", 44100, 1),
    "mp3, 44.1 kHz, stereo": ("mp3", "libmp3lame", 44100, 2),
    "opus, 48 kHz, mono": ("ogg", "libopus", 48000, 1),
    "opus, 48 kHz, stereo": ("ogg", "libopus", 48000, 2),
}


def memory(line: str) -> int:
    return next(int(one.split()[1]) * 1024 for one in Path("/proc/self/status").read_text().splitlines() if one.startswith(line))


def main(seconds: float) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path, short = Path(folder) / "recording", Path(folder) / "short"
        for name, (container, codec, rate, channels) in FORMATS.items():
            sound = np.tile(voice(rate), int(seconds / 2) + 1)[: int(seconds * rate)]
            encoded(container, codec, sound, rate, channels=channels, path=path)
            del sound
            voice.cache_clear()
            encoded(container, codec, voice(rate), rate, channels=channels, path=short)
            sum(map(len, read_blocks(short)))  # what is imported and allocated once
            gc.collect()
            Path("/proc/self/clear_refs").write_text("5")  # the peak begins at what is held now
            before, started = memory("VmRSS"), time.perf_counter()
            samples = sum(map(len, read_blocks(path)))
            print(
                f"{name}: {path.stat().st_size / 1e6:.1f} MB, {samples / 16000:.1f} s of sound in {time.perf_counter() - started:.1f} s, "
                f"peak {(memory('VmHWM') - before) / 2**20:.1f} MiB above what was held before"
            )


if __name__ == "__main__":
    main(float(sys.argv[1]) if len(sys.argv) > 1 else 3600.0)
