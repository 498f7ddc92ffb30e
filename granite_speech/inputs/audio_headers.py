"""What a sound file's header claims: how long it is, how many channels, at what rate.

Decoders trust the header and stop silently at the end of the file. So the few fields that reveal a cut-off file or an impossible
header are read here first, from a few hundred bytes and without allocating what they claim.

Sources: RIFF (Microsoft, 1991), RF64 (EBU Tech 3306), Sony Wave64, AIFF (Apple, 1989), Sun .au, CAF (Apple), FLAC (RFC 9639), Ogg (RFC
3533), ISO base media (ISO/IEC 14496-12), Matroska (RFC 9559), ASF (Microsoft).
"""

import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import BinaryIO

__all__ = ["Header", "Source", "read_header"]

# Programs that write to a pipe put a length of this much or more for "unknown".
UNKNOWN_32, UNKNOWN_64 = 0x7FFF0000, 1 << 62
LARGEST_OGG_HEADER = 27 + 255
BYTES_PER_SEARCH = 1 << 20
# Chunks before the sound, in any format. More of them are damage.
MOST_CHUNKS = 10_000


class Source:
    """A seekable binary file as the decoder sees it: from `start` to `end`, with some bytes of its header replaced.

    It keeps its own position, so several readers can share one file.
    """

    def __init__(self, file: BinaryIO, start: int = 0, end: int | None = None, patches: Sequence[tuple[int, bytes]] = ()):
        self.file, self.start, self.patches, self.position = file, start, patches, 0
        self.size = max(0, (file.seek(0, 2) if end is None else end) - start)

    def seek(self, offset: int, whence: int = 0) -> int:
        self.position = max(0, offset + (0, self.position, self.size)[whence])
        return self.position

    def tell(self) -> int:
        return self.position

    def read(self, count: int = -1) -> bytes:
        left = max(0, self.size - self.position)
        data = self.at(self.position, left if count < 0 else min(count, left))
        self.position += len(data)
        return data

    def at(self, offset: int, count: int) -> bytes:
        """Up to `count` bytes at `offset`; leaves the position as it is."""
        if offset < 0 or count <= 0 or offset >= self.size:
            return b""
        self.file.seek(self.start + offset)
        data = self.file.read(min(count, self.size - offset))
        for place, new in self.patches:
            begin, end = max(offset, place), min(offset + len(data), place + len(new))
            if begin < end:
                data = data[: begin - offset] + new[begin - place : end - place] + data[end - offset :]
        return data

    def find(self, mark: bytes, position: int) -> int | None:
        """The first place of `mark` at `position` or later."""
        while position + len(mark) <= self.size:
            found = (block := self.at(position, BYTES_PER_SEARCH)).find(mark)
            if found >= 0:
                return position + found
            position += max(1, len(block) - len(mark) + 1)
        return None


@dataclass(frozen=True)
class Header:
    """What is known before anything is decoded; None if the format does not say.

    Args:
        kind: the format; "" if it is not one of those read here.
        channels, rate: of uncompressed formats and FLAC.
        samples: of each channel, in FLAC.
        samples_of_wav: of each channel, in PCM WAV whose lengths are filled in.
        missing: how much of the file is missing, in words.
        unfilled: the header's lengths were never filled in; the sound extends to the end of the file.
        empty: there are no samples, but other chunks follow. FFmpeg would decode those as sound.
        patches: positions and bytes to replace, so that a decoder reads an unfilled file to its end.
        next: where another file begins that was appended to this one.
    """

    kind: str = ""
    channels: int | None = None
    rate: int | None = None
    samples: int | None = None
    samples_of_wav: int | None = None
    missing: str | None = None
    unfilled: bool = False
    empty: bool = False
    patches: tuple[tuple[int, bytes], ...] = ()
    next: int | None = None


def read_header(source: Source) -> Header:
    """The claims of a file of any format; an empty `Header` if the format makes none, or the header makes no sense."""
    start = source.at(0, 64)
    try:
        for matches, read in READERS:
            if matches(start):
                return read(source)
    except struct.error:  # the header itself is cut off; the decoder reports that
        pass
    return Header()


def _with_length(source: Source, header: Header, field: tuple[int, str], claimed: int, begin: int, unknown: int, outer_end: int) -> Header:
    """`header`, completed from the claimed length of the sound.

    Args:
        field: where that length is stored, and its struct format.
        claimed: that length, in bytes.
        begin: where the sound begins.
        unknown: this length or more means that the writer did not know it.
        outer_end: where the outermost chunk ends according to its own length.
    """
    actual = source.size - begin
    if claimed >= unknown:
        return header
    if claimed > actual:
        return replace(header, missing=f"{max(0, actual)} of {claimed} bytes of sound")
    # Other chunks may follow a recording without samples. Then the outer length is filled in and includes them.
    if claimed == 0 and actual > 0:
        if abs(outer_end - source.size) <= 1:
            return replace(header, empty=True)
        return replace(header, unfilled=True, patches=(*header.patches, (field[0], struct.pack(field[1], min(actual, unknown - 1)))))
    return header


def _patched(header: Header, form: str, *lengths: tuple[int, int]) -> Header:
    """`header` with these positions and lengths as its patches, if it is unfilled."""
    patches = tuple((position, struct.pack(form, min(length, UNKNOWN_32) if form[1] == "I" else length)) for position, length in lengths)
    return replace(header, patches=patches) if header.unfilled else header


def _appended(source: Source, end: int, mark: bytes) -> int | None:
    """Where another outermost chunk follows the first, perhaps after a byte of padding."""
    return next((position for position in (end, end + 1) if position > 12 and source.at(position, 4) == mark), None)


def _read_riff(source: Source) -> Header:
    start = source.at(0, 12)
    order = ">" if start[:4] == b"RIFX" else "<"
    (outer,) = struct.unpack(order + "I", start[4:8])
    appended = _appended(source, 8 + outer, start[:4])
    if start[8:12] == b"AVI ":
        short = source.size < outer + 8 and outer < UNKNOWN_32
        return Header("avi", missing=f"{source.size} of {outer + 8} bytes" if short else None)
    header, position, size_of_data, block = Header("wav", next=appended), 12, None, None
    for _ in range(MOST_CHUNKS):
        chunk = source.at(position, 64)
        if len(chunk) < 8:
            break
        name, (length,) = chunk[:4], struct.unpack(order + "I", chunk[4:8])
        if name == b"ds64":
            outer, size_of_data = struct.unpack("<QQ", chunk[8:24])
            ds64 = position
        elif name == b"fmt ":
            channels, rate = struct.unpack(order + "HI", chunk[10:16])
            header, block = replace(header, channels=channels, rate=rate), _pcm_block(chunk, order)
        elif name == b"data":
            field, unknown = (position + 4, order + "I"), UNKNOWN_32
            if size_of_data is not None and length == 0xFFFFFFFF:
                field, unknown, length = (ds64 + 16, "<Q"), UNKNOWN_64, size_of_data
            if block and length < unknown:
                header = replace(header, samples_of_wav=length // block)
            return _with_length(source, header, field, length, position + 8, unknown, outer + 8)
        elif name == b"LIST":
            # Names and dates. FFmpeg allocates as much for them as the length claims, past the end of the file.
            header = replace(header, patches=(*header.patches, (position, b"JUNK")))
        position += 8 + length + length % 2
    return header


def _pcm_block(chunk: bytes, order: str) -> int | None:
    """Bytes of one sample of all channels, from a WAV's fmt chunk; None if it is not PCM or contradicts itself."""
    form, channels, _, _, block, bits = struct.unpack(order + "HHIIHH", chunk[8:24])
    if form == 0xFFFE:  # extensible: the format is in the GUID
        (form,) = struct.unpack(order + "H", chunk[32:34])
    return block if form in (1, 3) and bits % 8 == 0 and block == channels * bits // 8 else None


def _read_w64(source: Source) -> Header:
    (outer,) = struct.unpack("<Q", source.at(16, 8))
    header, position = Header("w64"), 40
    for _ in range(MOST_CHUNKS):
        chunk = source.at(position, 64)
        name, (length,) = chunk[:4], struct.unpack("<Q", chunk[16:24])
        if name == b"fmt ":
            channels, rate = struct.unpack("<HI", chunk[26:32])
            header = replace(header, channels=channels, rate=rate)
        elif name == b"data":  # the length includes its own 24 bytes
            found = _with_length(source, header, (position + 16, "<Q"), max(0, length - 24), position + 24, UNKNOWN_64 - 24, outer)
            lengths = ((16, source.size), (position + 16, source.size - position))
            return _patched(found, "<Q", *lengths)
        if length < 24:
            break
        position += -(-length // 8) * 8
    return header


def _read_aiff(source: Source) -> Header:
    (outer,) = struct.unpack(">I", source.at(4, 4))
    header, position = Header("aiff", next=_appended(source, 8 + outer, b"FORM")), 12
    for _ in range(MOST_CHUNKS):
        chunk = source.at(position, 64)
        name, (length,) = chunk[:4], struct.unpack(">I", chunk[4:8])
        if name == b"COMM":
            (channels,) = struct.unpack(">H", chunk[8:10])
            exponent, mantissa = struct.unpack(">HQ", chunk[16:26])
            shift = 16383 + 63 - (exponent & 0x7FFF)
            header = replace(header, channels=channels, rate=mantissa >> shift if 0 <= shift < 64 else 0)
        elif name == b"SSND":  # the length includes an offset and a block size, 8 bytes
            found = _with_length(source, header, (position + 4, ">I"), max(0, length - 8), position + 16, UNKNOWN_32, outer + 8)
            lengths = ((4, source.size - 8), (position + 4, source.size - position - 8))
            return _patched(found, ">I", *lengths)
        position += 8 + length + length % 2
    return header


def _read_au(source: Source) -> Header:
    begin, length, _, rate, channels = struct.unpack(">5I", source.at(4, 20))
    return _with_length(source, Header("au", channels, rate), (8, ">I"), length, begin, UNKNOWN_32, 0)


def _read_caf(source: Source) -> Header:
    header, position = Header("caf"), 8
    for _ in range(MOST_CHUNKS):
        chunk = source.at(position, 64)
        name, (length,) = chunk[:4], struct.unpack(">q", chunk[4:12])
        if name == b"desc":
            (rate,) = struct.unpack(">d", chunk[12:20])
            (channels,) = struct.unpack(">I", chunk[36:40])
            header = replace(header, channels=channels, rate=int(rate) if 0 <= rate < 1e12 else 0)
        elif name == b"data":  # -1 means: to the end of the file
            return header if length < 0 else _with_length(source, header, (position + 4, ">q"), length, position + 12, UNKNOWN_64, 0)
        if length < 0:
            break
        position += 12 + length
    return header


def _read_flac(source: Source) -> Header:
    (packed,) = struct.unpack(">Q", source.at(18, 8))
    rate, channels, samples = packed >> 44, (packed >> 41 & 7) + 1, packed & (1 << 36) - 1
    return Header("flac", channels, rate, samples=samples or None, next=source.find(FLAC_START, 8))


def _read_ogg(source: Source) -> Header:
    """Streams of different codecs may follow one another: a first page that comes after other pages begins the next stream.

    The last page of the last stream must be whole and marked as the last.
    """
    position, has_sound, last = 0, False, "within its last page"
    while position is not None and position < source.size:
        page = source.at(position, LARGEST_OGG_HEADER)
        if page[:5] != b"OggS\0":
            position = source.find(b"OggS\0", position + 1)
            continue
        lengths = page[27 : 27 + page[26]] if len(page) > 26 else b""
        end = position + 27 + len(lengths) + sum(lengths)
        if len(page) < 27 or len(lengths) < page[26] or end > source.size:
            return Header("ogg", missing="within its last page")
        begins = bool(page[5] & 2)
        if begins and has_sound:
            return Header("ogg", next=position)
        has_sound, last = not begins, None if page[5] & 4 else "after a page that is not the stream's last"
        position = end
    return Header("ogg", missing=last)


def _read_iso(source: Source) -> Header:
    position = 0
    for _ in range(MOST_CHUNKS):
        box = source.at(position, 16)
        if len(box) < 8 or box[4:8] not in ISO_BOXES:
            break
        if position and box[4:8] == b"ftyp":
            return Header("iso", next=position)
        (length,) = struct.unpack(">I", box[:4])
        if length == 1:
            (length,) = struct.unpack(">Q", box[8:16])
        if length < 8:  # 0 means: to the end of the file
            break
        position += length
        if position > source.size:
            return Header("iso", missing=f"{source.size} of at least {position} bytes")
    return Header("iso")


def _read_matroska(source: Source) -> Header:
    position = 4
    for segment in (False, True):
        first = source.at(position, 8)
        width = 9 - first[0].bit_length() if first else 9
        if len(first) < width or width > 8:
            return Header("matroska")
        length = int.from_bytes(first[:width], "big") & (1 << 7 * width) - 1
        unknown = length == (1 << 7 * width) - 1
        position += width + length
        if segment and position > source.size and not unknown:
            return Header("matroska", missing=f"{source.size} of {position} bytes")
        if segment:
            return Header("matroska", next=position if source.at(position, 4) == EBML else None)
        if source.at(position, 4) != b"\x18\x53\x80\x67":
            break
        position += 4
    return Header("matroska")


def _read_asf(source: Source) -> Header:
    position = 30
    for _ in range(struct.unpack("<I", source.at(24, 4))[0] % MOST_CHUNKS):
        item = source.at(position, 104)
        (length,) = struct.unpack("<Q", item[16:24])
        if item[:16] == ASF_FILE_PROPERTIES:
            (size,) = struct.unpack("<Q", item[40:48])
            is_broadcast = item[88] & 1 if len(item) > 88 else 1
            short = source.size < size < UNKNOWN_64 and not is_broadcast
            return Header("asf", missing=f"{source.size} of {size} bytes" if short else None)
        position += max(length, 24)
    return Header("asf")


EBML = b"\x1a\x45\xdf\xa3"
# With the header of STREAMINFO, which must come first.
FLAC_START = b"fLaC\0\0\0\x22"
ISO_BOXES = {b"ftyp", b"moov", b"mdat", b"moof", b"free", b"skip", b"wide", b"styp", b"sidx", b"uuid", b"mfra", b"udta", b"meta", b"pnot"}
ASF_FILE_PROPERTIES = bytes.fromhex("a1dcab8c47a9cf118ee400c00c205365")
READERS: tuple[tuple[Callable[[bytes], bool], Callable[[Source], Header]], ...] = (
    (lambda start: start[:4] in (b"RIFF", b"RIFX", b"RF64") and start[8:12] in (b"WAVE", b"AVI "), _read_riff),
    (lambda start: start[:4] == b"riff" and start[24:28] == b"wave", _read_w64),
    (lambda start: start[:4] == b"FORM" and start[8:12] in (b"AIFF", b"AIFC"), _read_aiff),
    (lambda start: start[:4] == b".snd", _read_au),
    (lambda start: start[:4] == b"caff", _read_caf),
    (lambda start: start[:4] == b"fLaC", _read_flac),
    (lambda start: start[:4] == b"OggS", _read_ogg),
    (lambda start: start[4:8] in ISO_BOXES, _read_iso),
    (lambda start: start[:4] == EBML, _read_matroska),
    (lambda start: start[:16] == bytes.fromhex("3026b2758e66cf11a6d900aa0062ce6c"), _read_asf),
)
