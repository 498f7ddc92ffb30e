"""A transcript as the content of a file: txt, srt, vtt, tsv or json, in whisper's forms."""

import html
import json
import re
from collections.abc import Callable
from functools import partial

from granite_speech.errors import InputError
from granite_speech.transcription.subtitles import Cue, SubtitleOptions, cues, spoken
from granite_speech.transcription.transcript import Segment, Transcript

__all__ = ["FORMATS", "write_text"]

FORMATS = ("txt", "srt", "vtt", "tsv", "json")

_ARROW = re.compile("-+->")


def write_text(transcript: Transcript, format: str, options: SubtitleOptions) -> str:
    """The content of one file, to be written in UTF-8 with "\\n" at the end of each line.

    Segments that failed or have no text are left out, except in json.

    Args:
        transcript: of one recording.
        format: "txt": a line for each segment. "srt", "vtt": subtitles, with the times of words if segments have words. "tsv": start and
            end of each segment in milliseconds, and text, after a line of headings. "json": `transcript.to_dict()`.
        options: the layout of subtitles.

    Raises:
        InputError: an unknown format, a time that is not finite, or words that are to be highlighted and have no times.
    """
    if format not in _CONTENTS:
        raise InputError(got=f"the output format {format!r}", expected=f"one of {', '.join(FORMATS)}", remedy="Choose one of these")
    return _CONTENTS[format](transcript, options)


def _txt(transcript: Transcript, options: SubtitleOptions) -> str:
    return "".join(f"{segment.text}\n" for segment in spoken(transcript))


def _srt(transcript: Transcript, options: SubtitleOptions) -> str:
    content = ""
    for number, cue in enumerate(cues(transcript, options), 1):
        # An arrow may stand only between two times, and srt has no way to escape it.
        text = _ARROW.sub("->", _underlined(cue, lambda text: text))
        content += f"{number}\n{_timestamp(cue.start, ',')} --> {_timestamp(cue.end, ',')}\n{text}\n\n"
    return content


def _vtt(transcript: Transcript, options: SubtitleOptions) -> str:
    content = "WEBVTT\n\n"
    for cue in cues(transcript, options):
        text = _underlined(cue, partial(html.escape, quote=False))
        content += f"{_timestamp(cue.start, '.')} --> {_timestamp(cue.end, '.')}\n{text}\n\n"
    return content


def _underlined(cue: Cue, escape: Callable[[str], str]) -> str:
    """The lines of a cue, escaped, with the tags <u> and </u> around the word that is being spoken."""
    lines = list(map(escape, cue.lines))
    if cue.underlined is not None:
        number, begin, end = cue.underlined
        line = cue.lines[number]
        lines[number] = f"{escape(line[:begin])}<u>{escape(line[begin:end])}</u>{escape(line[end:])}"
    return "\n".join(lines)


def _tsv(transcript: Transcript, options: SubtitleOptions) -> str:
    return "start\tend\ttext\n" + "".join(_row(segment) for segment in spoken(transcript))


def _row(segment: Segment) -> str:
    text = segment.text
    if text.startswith('"'):
        # Spreadsheets and csv readers would take it for a quoted field, which may continue in the next line.
        text = '"' + text.replace('"', '""') + '"'
    return f"{round(1000 * segment.start)}\t{round(1000 * segment.end)}\t{text}\n"


def _json(transcript: Transcript, options: SubtitleOptions) -> str:
    try:
        content = json.dumps(transcript.to_dict(), ensure_ascii=False, indent=2, allow_nan=False)
    except ValueError as error:
        raise InputError(
            got="a transcript with a time or a confidence that is not finite",
            expected="finite numbers",
            remedy="Give each segment and each word its times",
        ) from error
    # UTF-8 has no form of half a surrogate pair, which is in the name of a file that is not in UTF-8; JSON has one.
    return re.sub("[\ud800-\udfff]", lambda half: f"\\u{ord(half[0]):04x}", content) + "\n"


def _timestamp(milliseconds: int, decimal_mark: str) -> str:
    seconds, milliseconds = divmod(milliseconds, 1000)
    minutes, seconds = divmod(seconds, 60)
    return f"{minutes // 60:02d}:{minutes % 60:02d}:{seconds:02d}{decimal_mark}{milliseconds:03d}"


_CONTENTS = {"txt": _txt, "srt": _srt, "vtt": _vtt, "tsv": _tsv, "json": _json}
