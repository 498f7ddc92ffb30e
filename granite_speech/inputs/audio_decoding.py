"""From a file's bytes to samples, with FFmpeg through PyAV.

FFmpeg gets an open file, a list of formats, and no way to open anything else. Playlists, which name other files or addresses, are
not among the formats.
"""

import importlib
from collections.abc import Generator
from typing import TYPE_CHECKING, NamedTuple

from granite_speech.errors import AudioError, MissingDependencyError
from granite_speech.inputs.audio_headers import Header, Source
from granite_speech.inputs.audio_mpeg import StreamLength, find_stream_length, whole_frame

if TYPE_CHECKING:
    import numpy as np

__all__ = ["HIGHEST_RATE", "LOWEST_RATE", "REMEDY_CONVERT", "Piece", "check_claims", "container_seconds", "decode"]

REMEDY_CONVERT = "Check that it plays, or convert it: ffmpeg -i IN -ac 1 -ar 16000 OUT.wav"
# A rate in Hz outside of this range is damage in a header.
LOWEST_RATE, HIGHEST_RATE = 1_000, 768_000
# 250 channels at 16 kHz, 83 at 48 kHz, 5 at 768 kHz.
MOST_VALUES_A_SECOND = 4_000_000
# What is done with a piece takes several times its memory. Larger pieces are not faster.
VALUES_PER_PIECE = 1 << 14
# Names of FFmpeg's demuxers. None of these opens a second file; hls, concat, dash, sdp, image2 and their like do.
FORMATS = (
    "aac,ac3,aiff,amr,amrnb,amrwb,ape,asf,au,avi,caf,dts,eac3,flac,flv,gsm,loas,matroska,mov,mp3,mpc,mpc8,mpeg,mpegts,nistsphere,ogg,"
    "tta,voc,w64,wav,wv"
)
# No protocol is called "none". The file itself is read through Python.
OPTIONS = {"format_whitelist": FORMATS, "protocol_whitelist": "none", "enable_drefs": "0"}
# From FFmpeg's packed sample formats to numpy's dtypes.
DTYPES = {"u8": "u1", "s16": "i2", "s32": "i4", "s64": "i8", "flt": "f4", "dbl": "f8"}
BYTES_BEFORE_FIRST_FRAME = 4096
# Two of Vorbis's longest blocks.
LONGEST_OGG_SURPLUS = 2 * 8192
# Retries after a demuxer fails: what follows the damage may be intact.
MOST_FAILURES = 100


class Piece(NamedTuple):
    """Consecutive samples: `(channels, samples)` float32, PCM scaled to [-1, 1), and their rate in Hz."""

    rate: int
    samples: "np.ndarray"


def check_claims(name: str, channels: int, rate: int) -> None:
    """Refuses an impossible rate or number of channels, before a decoder is created."""
    if not LOWEST_RATE <= rate <= HIGHEST_RATE:
        raise AudioError(
            got=f"{name!r} with a sampling rate of {rate} Hz", expected=f"{LOWEST_RATE} to {HIGHEST_RATE} Hz", remedy=REMEDY_CONVERT
        )
    if channels < 1 or channels * rate > MOST_VALUES_A_SECOND:
        raise AudioError(
            got=f"{name!r}, which does not decode: it claims {channels} channels at {rate} Hz",
            expected=f"at least one channel and at most {MOST_VALUES_A_SECOND} values a second in all",
            remedy=REMEDY_CONVERT,
        )


def decode(source: Source, header: Header, name: str) -> Generator[Piece, None, str | None]:
    """Yields a file's samples as they are decoded. A bad packet followed by good ones is skipped.

    The rate and the number of channels may change from one piece to the next.

    Args:
        source: the file.
        header: from `read_header`.
        name: for messages.

    Returns:
        How the end of the file is missing or damaged, in words; None if it is whole, or does not say how long it should be.

    Raises:
        AudioError: an unknown format, no audio track, no packet that decodes, or an impossible rate or number of channels.
        MissingDependencyError: PyAV is not installed.
    """
    if header.channels is not None and header.rate is not None:
        check_claims(name, header.channels, header.rate)
    if header.empty:
        return None
    av = _import_av()
    try:
        with av.open(source, options=OPTIONS, metadata_errors="ignore") as container:
            stream = container.streams.best("audio")
            _check_stream(stream, container, name)
            packets = _Packets(container, stream, source)
            seen = 0
            for piece in _pieces(packets, name):
                seen += piece.samples.shape[1]
                yield piece
    except AudioError:
        raise
    except (av.error.FFmpegError, OSError, ValueError) as error:  # ValueError: PyAV raises it for values that it cannot express
        raise _undecodable(name, error, header) from error
    if not seen and packets.failed_since_good:
        raise _undecodable(name, packets.last_error, header)
    return header.missing or _samples_short(header, max(seen, packets.end)) or packets.shortfall()


def container_seconds(source: Source) -> float | None:
    """The length that the container gives, in seconds; None if it gives none or cannot be opened."""
    av = _import_av()
    try:
        with av.open(source, options=OPTIONS, metadata_errors="ignore") as container:
            return container.duration / av.time_base if container.duration else None
    except (av.error.FFmpegError, OSError, ValueError):
        return None


def _import_av():
    try:
        return importlib.import_module("av")
    except (ImportError, OSError) as error:  # OSError: a shared library is missing
        raise MissingDependencyError(
            got=f"no working PyAV ({error})", expected="PyAV, to read sound files", remedy="pip install av"
        ) from error


def _undecodable(name: str, error: Exception, header: Header) -> AudioError:
    short = f"; it is cut off: {header.missing}" if header.missing else ""
    return AudioError(
        got=f"{name!r}, which does not decode ({_reason(error)}{short})",
        expected="a sound file of a common format",
        remedy=REMEDY_CONVERT,
    )


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error)


def _check_stream(stream, container, name: str) -> None:
    if stream is None:
        kinds = sorted({other.type for other in container.streams})
        raise AudioError(
            got=f"{name!r}, which has no audio track (only {', '.join(kinds) or 'nothing'})",
            expected="a file with sound",
            remedy="Check that this is the right file, and that the microphone was on",
        )
    if stream.codec_context is None:
        raise AudioError(got=f"{name!r}, whose sound is in an unknown codec", expected="a common codec", remedy=REMEDY_CONVERT)
    if stream.codec_context.sample_rate:  # 0: some codecs give it only in their packets
        check_claims(name, max(1, stream.codec_context.channels), stream.codec_context.sample_rate)


def _decoder(stream):
    """The stream's decoder; libopus for Opus, because FFmpeg's own adds bursts of noise to some files of low bit rates."""
    context = stream.codec_context
    if context.name != "opus" or not context.extradata:
        return context
    from av import CodecContext

    decoder = CodecContext.create("libopus", "r")
    decoder.extradata = context.extradata
    decoder.options = {"request_sample_fmt": "flt"}
    return decoder


def _samples_short(header: Header, end: int) -> str | None:
    return f"{end} of {header.samples} samples" if header.samples is not None and end < header.samples else None


class _Packets:
    """The packets of one stream, decoded one by one, and a count of failures."""

    def __init__(self, container, stream, source: Source):
        self.container, self.stream, self.source = container, stream, source
        self.decoder = _decoder(stream)
        self.is_mp3, self.is_ogg = container.format.name == "mp3", container.format.name == "ogg"
        self.failed_since_good, self.last_error = 0, None
        self.good, self.last_is_whole = 0, True
        self.end = 0  # position in samples after the last frame, by its timestamp; includes skipped packets
        self.stated = StreamLength(0, 0, 0)
        self.ogg_start, self.ogg_samples = None, 0

    def frames(self):
        """Every frame that decodes, with 0; for Ogg also None with the number of samples to drop from the end."""
        from av.error import FFmpegError

        for packet in self._demux():
            is_sound = packet.size > 0
            if not is_sound and packet.dts is not None:
                continue  # an empty sample of a container; a decoder would take it for the end
            if self.is_mp3 and is_sound:
                is_sound = not self._add_stream_length(packet)
            try:
                # None at the end of the stream: the decoder returns the frames that it still holds.
                frames = self.decoder.decode(packet if packet.size else None)
            except FFmpegError as error:
                self.failed_since_good, self.last_error = self.failed_since_good + 1, error
                continue
            if is_sound:
                self.failed_since_good = 0
                self.good += 1
            for frame in frames:
                yield frame, 0
                if frame.pts is not None and frame.time_base is not None:
                    self.end = int(frame.pts * frame.time_base * frame.sample_rate) + frame.samples
            if self.is_ogg:
                yield None, self._ogg_surplus(packet, frames)

    def _ogg_surplus(self, packet, frames) -> int:
        """How many of the samples so far lie after the end that the last page of an Ogg stream gives.

        FFmpeg trims the last packet. If the sound ends before that packet begins, FFmpeg keeps the packet and gives it a negative
        duration.
        """
        if self.ogg_start is None and packet.pts is not None:
            self.ogg_start = max(0, packet.pts)
        self.ogg_samples += sum(frame.samples for frame in frames)
        duration = packet.duration or 0
        if packet.pts is None or duration < 1 << 31:
            return 0
        length = (packet.pts + duration - (1 << 32) - self.ogg_start) * packet.time_base * self.stream.rate
        surplus = self.ogg_samples - round(length)
        return surplus if 0 < surplus <= LONGEST_OGG_SURPLUS else 0

    def _demux(self):
        from av.error import FFmpegError

        for _ in range(MOST_FAILURES):
            progress = False
            try:
                for packet in self.container.demux(self.stream):
                    progress = True
                    yield packet
                return
            except FFmpegError as error:
                self.failed_since_good, self.last_error = self.failed_since_good + 1, error
                if not progress:
                    return

    def _add_stream_length(self, packet) -> bool:
        """Adds up the lengths in Xing frames: the one before the first packet, and those of appended files.

        Returns:
            Whether the packet is such a frame.
        """
        data = bytes(packet)
        self.last_is_whole = whole_frame(data)
        inside = find_stream_length(data)
        found = inside
        if found is None and not self.good and not self.failed_since_good and packet.pos is not None:
            begin = max(0, packet.pos - BYTES_BEFORE_FIRST_FRAME)
            found = find_stream_length(self.source.at(begin, packet.pos - begin))
            found = found and found._replace(begin=begin + found.begin)
        elif found is not None and packet.pos is not None:
            found = found._replace(begin=packet.pos + found.begin)
        if found is not None:
            self.stated = StreamLength(self.stated.frames + found.frames, found.size, found.begin)
        return inside is not None

    def shortfall(self) -> str | None:
        """How much is missing at the end, in words, if that is known. Anything may follow the last frame of an mp3."""
        if not self.is_mp3:
            return f"its end does not decode: {_reason(self.last_error)}" if self.failed_since_good else None
        frames, size, begin = self.stated
        whole = self.good - (not self.last_is_whole)
        # The size in bytes tells missing frames from frames in the middle that were damaged and skipped. If it is not given, allow one
        # frame less: some encoders count the Xing frame too.
        is_cut = self.source.size - begin < size if size else whole < frames - 1
        return f"{whole} of {frames} frames" if is_cut and whole < frames else None


def _pieces(packets: _Packets, name: str):
    """Frames of equal rate and channels, joined into pieces of up to VALUES_PER_PIECE values."""
    import numpy as np

    arrays, key, count = [], None, 0
    for frame, surplus in packets.frames():
        if frame is None:
            while surplus and arrays:
                last = arrays.pop()
                arrays += [last[:, :-surplus]] if last.shape[1] > surplus else []
                surplus -= min(surplus, last.shape[1])
            continue
        array = _as_float32(frame)
        now = frame.sample_rate, array.shape[0]
        if now != key or count + array.size > VALUES_PER_PIECE:
            if arrays:
                yield Piece(key[0], np.concatenate(arrays, axis=1))
            if now != key:
                check_claims(name, now[1], now[0])
            arrays, key, count = [], now, 0
        arrays.append(array)
        count += array.size
    if arrays:
        yield Piece(key[0], np.concatenate(arrays, axis=1))


def _as_float32(frame) -> "np.ndarray":
    """`(channels, samples)` float32; integers are scaled by their type's range."""
    import numpy as np

    # Not frame.to_ndarray: PyAV counts planes up to the first null pointer, and finds too many from 8 channels on.
    dtype, channels, planes = np.dtype(DTYPES[frame.format.packed.name]), frame.layout.nb_channels, frame.planes
    if frame.format.is_planar:
        array = np.stack([np.frombuffer(plane, dtype, frame.samples) for plane in planes[:channels]])
    else:
        array = np.frombuffer(planes[0], dtype, frame.samples * channels).reshape(-1, channels).T
    array = array.astype(np.float32)
    if dtype.kind == "u":
        return (array - 128) / 128
    return array if dtype.kind == "f" else array / 2 ** (8 * dtype.itemsize - 1)
