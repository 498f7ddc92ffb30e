"""MPEG audio frames: whether one is whole, and the length that an encoder noted in an mp3 stream's first frame.

Sources: ISO/IEC 11172-3 and 13818-3 for the frame header; the Xing, Info and VBRI frames as encoders write them.
"""

import struct
from typing import NamedTuple

__all__ = ["StreamLength", "find_stream_length", "whole_frame"]

# kbit/s by index 1 to 14: for MPEG 1 layers 1, 2, 3; for MPEG 2 layer 1 and layers 2 and 3.
BITRATES = {
    (1, 1): (32, 64, 96, 128, 160, 192, 224, 256, 288, 320, 352, 384, 416, 448),
    (1, 2): (32, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320, 384),
    (1, 3): (32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320),
    (2, 1): (32, 48, 56, 64, 80, 96, 112, 128, 144, 160, 176, 192, 224, 256),
    (2, 2): (8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),
}
# From a frame's first byte to the mark: 4 bytes of header, 0 or 2 of checksum, and 9, 17 or 32 of side information.
DISTANCES_TO_MARK = (13, 15, 21, 23, 36, 38)
RATES = {3: (44100, 48000, 32000), 2: (22050, 24000, 16000), 0: (11025, 12000, 8000)}


def whole_frame(packet: bytes) -> bool:
    """Whether a packet of MPEG audio is as long as the header of its frame says."""
    if len(packet) < 4 or packet[0] != 0xFF or packet[1] < 0xE0:
        return False
    version, layer = packet[1] >> 3 & 3, 4 - (packet[1] >> 1 & 3)
    bitrate, rate, padding = packet[2] >> 4, packet[2] >> 2 & 3, packet[2] >> 1 & 1
    if version == 1 or layer == 4 or rate == 3 or bitrate == 15:
        return False
    if bitrate == 0:  # free format: the header does not give the frame's length
        return True
    generation = 1 if version == 3 else 2
    bits = 1000 * BITRATES[generation, layer if generation == 1 else min(layer, 2)][bitrate - 1]
    if layer == 1:
        return len(packet) >= (12 * bits // RATES[version][rate] + padding) * 4
    return len(packet) >= (72 if generation == 2 and layer == 3 else 144) * bits // RATES[version][rate] + padding


class StreamLength(NamedTuple):
    """The length of an mp3 stream that its encoder noted in the first frame, which holds no sound.

    Args:
        frames: number of frames that follow; 0 if not given.
        size: bytes from this frame to the end of the stream; 0 if not given.
        begin: where the frame begins in the data that was searched.
    """

    frames: int
    size: int
    begin: int


def find_stream_length(data: bytes) -> StreamLength | None:
    """The first Xing, Info or VBRI frame in `data`."""
    for mark in (b"Xing", b"Info", b"VBRI"):
        found = data.find(mark)
        while found >= 0:
            fields = data[found + 4 : found + 18]
            for back in DISTANCES_TO_MARK:
                begin = found - back
                if begin < 0 or data[begin] != 0xFF or data[begin + 1] < 0xE0 or len(fields) < 14:
                    continue
                if mark == b"VBRI":
                    size, frames = struct.unpack(">II", fields[6:14])
                    return StreamLength(frames, size, begin)
                flags, *numbers = struct.unpack(">III", fields[:12])
                frames = numbers.pop(0) if flags & 1 else 0
                return StreamLength(frames, numbers[0] if flags & 2 else 0, begin)
            found = data.find(mark, found + 1)
    return None
