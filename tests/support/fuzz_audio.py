"""Thousands of damaged sound files: typed errors only, no crash, bounded time, and no memory for what a header claims.

    python -m tests.support.fuzz_audio 5000

Each file is read in a worker process, so that a crash in C code is one file's failure. The seed of a failing file is printed;
`python -m tests.support.fuzz_audio 1 SEED` repeats it.
"""

import io
import queue
import random
import resource
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from pathlib import Path

from tests.support.made_sounds import encoded

__all__ = ["KINDS", "failures"]

MOST_SECONDS = 5.0
MOST_BYTES = 64 << 20
FILES_PER_WORKER = 300  # starting a worker takes as long as reading a hundred files
# Container, codec, rate.
KINDS = {
    "mp3": ("mp3", "libmp3lame", 16000),
    "wav": ("wav", "pcm_s16le", 16000),
    "mp3 in wav": ("wav", "libmp3lame", 16000),
    "flac": ("flac", "flac", 16000),
    "vorbis": ("ogg", "vorbis", 16000),
    "opus": ("ogg", "libopus", 48000),
    "m4a": ("ipod", "aac", 16000),
    "mov": ("mov", "pcm_s16le", 16000),
    "webm": ("webm", "libopus", 48000),
    "adts": ("adts", "aac", 16000),
    "caf": ("caf", "alac", 16000),
    "wma": ("asf", "wmav2", 44100),
}
EXTREMES = (b"\0\0\0\0", b"\xff\xff\xff\xff", b"\x7f\xff\xff\xff", b"\xff\xff\xff\x7f", b"\0\0\0\x80", b"\0\1\0\0", b"\x80\0\0\0")


@cache
def whole(kind: str) -> bytes:
    container, codec, rate = KINDS[kind]
    return encoded(container, codec, rate=rate, channels=2 if codec == "vorbis" else 1, bit_rate=64000 if codec == "wmav2" else None)


def mutated(seed: int) -> tuple[str, bytes]:
    """A kind and a damaged file of that kind, determined by the seed."""
    rng = random.Random(seed)
    kind = list(KINDS)[seed % len(KINDS)]
    content = bytearray(whole(kind))
    for _ in range(rng.randint(1, 6)):
        # At least half of the damage is in the header.
        place = rng.randrange(min(len(content), 400) if rng.random() < 0.5 else max(1, len(content)))
        rng.choice(DAMAGES)(rng, content, place)
        content = content or bytearray(b"\0")
    return kind, bytes(content)


def _flip(rng: random.Random, content: bytearray, place: int) -> None:
    content[place] ^= 1 << rng.randrange(8)


def _extreme(rng: random.Random, content: bytearray, place: int) -> None:
    content[place : place + 4] = rng.choice(EXTREMES)


def _noise(rng: random.Random, content: bytearray, place: int) -> None:
    content[place : place + 64] = rng.randbytes(rng.randint(1, 64))


def _cut(rng: random.Random, content: bytearray, place: int) -> None:
    del content[place:]


def _delete(rng: random.Random, content: bytearray, place: int) -> None:
    del content[place : place + rng.randint(1, 500)]


def _repeat(rng: random.Random, content: bytearray, place: int) -> None:
    content[place:place] = content[place : place + rng.randint(1, 2000)]


def _zero(rng: random.Random, content: bytearray, place: int) -> None:
    end = min(len(content), place + rng.randint(1, 1000))
    content[place:end] = bytes(end - place)


def _graft(rng: random.Random, content: bytearray, place: int) -> None:
    other = whole(rng.choice(list(KINDS)))
    begin = rng.randrange(len(other))
    content[place:place] = other[begin : begin + rng.randint(1, 4000)]


DAMAGES: tuple[Callable[[random.Random, bytearray, int], None], ...] = (_flip, _extreme, _noise, _cut, _delete, _repeat, _zero, _graft)


# --- the worker --------------------------------------------------------------------------------------------------------------------


def _memory(line: str) -> int:
    return next(int(one.split()[1]) * 1024 for one in Path("/proc/self/status").read_text().splitlines() if one.startswith(line))


def _work() -> None:
    """Reads file names, one on each line; answers each with its fault, or an empty line."""
    from granite_speech.inputs.audio import load_audio

    warnings.simplefilter("ignore")
    for kind in KINDS:  # imports and lasting allocations come before memory is measured
        load_audio(io.BytesIO(whole(kind)), 8000)
    print("ready", flush=True)
    for line in sys.stdin:
        print(_fault(Path(line.strip()).read_bytes()), flush=True)


def _fault(content: bytes) -> str:
    from granite_speech.errors import AudioError
    from granite_speech.inputs.audio import load_audio

    with suppress(OSError):  # if this is forbidden, a peak is seen only if it is higher than all earlier ones
        Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM, the peak
    before, started, decoded = _memory("VmHWM"), time.process_time(), 0
    for errors in ("raise", "warn"):
        try:
            decoded += load_audio(io.BytesIO(content), errors=errors).nbytes
        except AudioError as error:
            if len(str(error)) > 1500:
                return "a message too long"
        except Exception as error:
            return f"{type(error).__name__}: {error}".replace("\n", " ")
    seconds, grown = time.process_time() - started, _memory("VmHWM") - before
    if seconds > 2 * MOST_SECONDS:
        return f"{seconds:.1f} s for two calls"
    # The samples are in memory twice while the pieces are joined.
    return f"{grown >> 20} MiB for {decoded >> 20} MiB of sound" if grown > MOST_BYTES + 2 * decoded else ""


# --- the parent --------------------------------------------------------------------------------------------------------------------


class _Worker:
    def __init__(self):
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.support.fuzz_audio", "--worker"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.lines: queue.Queue[str] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()
        assert self.lines.get(timeout=120) == "ready\n"

    def _read(self) -> None:
        for line in self.process.stdout:
            self.lines.put(line)
        self.lines.put("")

    def fault(self, path: Path) -> str:
        self.process.stdin.write(f"{path}\n")
        self.process.stdin.flush()
        try:
            answer = self.lines.get(timeout=60)
        except queue.Empty:
            self.stop()
            return "no answer within a minute"
        return answer.strip() if answer else f"crashed with status {self.process.wait()}"

    def is_alive(self) -> bool:
        return self.process.poll() is None

    def stop(self) -> None:
        self.process.kill()
        self.process.wait()


def failures(seeds: range) -> list[str]:
    """The faults with the files of these seeds: kind, seed, fault."""
    found, worker = [], None
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "damaged"
        for number, seed in enumerate(seeds):
            if worker is None or number % FILES_PER_WORKER == 0 or not worker.is_alive():
                if worker is not None:
                    worker.stop()
                worker = _Worker()
            kind, content = mutated(seed)
            path.write_bytes(content)
            if fault := worker.fault(path):
                found.append(f"{kind}, seed {seed}: {fault}")
        if worker is not None:
            worker.stop()
    return found


def main(arguments: list[str]) -> int:
    if arguments == ["--worker"]:
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        _work()
        return 0
    count, first = int(arguments[0]), int(arguments[1]) if len(arguments) > 1 else 1_000_000
    found = failures(range(first, first + count))
    print("\n".join([*found, f"{count} damaged files of {len(KINDS)} kinds, {len(found)} failures"]))
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
