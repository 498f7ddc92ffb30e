"""Builds sound files whose headers claim whatever a test needs."""

import struct

__all__ = ["au_header", "rf64_header", "wav_header"]


def wav_header(channels=1, rate=16000, bits=16, data=b"\0\0", claimed=None) -> bytes:
    claimed = len(data) if claimed is None else claimed
    block = channels * bits // 8
    form = struct.pack("<HHIIHH", 3 if bits == 32 else 1, channels, rate, min(rate * block, 2**32 - 1), block % 65536, bits)
    return (
        b"RIFF"
        + struct.pack("<I", 36 + len(data))
        + b"WAVEfmt "
        + struct.pack("<I", 16)
        + form
        + b"data"
        + struct.pack("<I", claimed)
        + data
    )


def au_header(channels=1, rate=16000, claimed=2, data=b"\0\0") -> bytes:
    """Sun's format, whose header has room for 2**32 channels."""
    return b".snd" + struct.pack(">IIIII", 24, claimed, 3, rate, channels) + data


def rf64_header(frames: int) -> bytes:
    """A WAV with lengths of 64 bits."""
    form = struct.pack("<HHIIHH", 1, 1, 16000, 32000, 2, 16)
    sizes = struct.pack("<QQQI", 2 * frames + 72, 2 * frames, frames, 0)
    head = b"RF64" + struct.pack("<I", 2**32 - 1) + b"WAVEds64" + struct.pack("<I", 28) + sizes
    return head + b"fmt " + struct.pack("<I", 16) + form + b"data" + struct.pack("<I", 2**32 - 1) + b"\1\2" * 100
