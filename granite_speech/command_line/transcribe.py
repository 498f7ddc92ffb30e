"""`granite-speech FILE …`: the texts of recordings to standard output or to files, and messages to standard error."""

import argparse
import sys
from contextlib import closing
from typing import TYPE_CHECKING

from granite_speech.command_line.output import message, write_line
from granite_speech.command_line.plots import Plots
from granite_speech.command_line.progress import Progress
from granite_speech.command_line.threads import Load, available_cores, no_slower, set_threads, thread_count
from granite_speech.errors import GraniteSpeechError
from granite_speech.transcription.options import TranscribeOptions
from granite_speech.transcription.output_files import OutputFiles
from granite_speech.transcription.subtitles import SubtitleOptions, one_line
from granite_speech.transcription.transcript import Segment, Transcript

if TYPE_CHECKING:
    from granite_speech.transcription.transcriber import Transcriber

__all__ = ["transcribe"]

_NO_MODEL = (
    "no --model given: using the small model inside the package, which knows only 70 English words: digits, numbers, commands. "
    "For any speech, use --model ibm-granite/granite-speech-3.3-2b"
)

# Options of `SubtitleOptions`, and formats with times of words.
_LAYOUT = ("max_line_width", "max_line_count", "max_words_per_line", "highlight_words")
_WITH_WORDS = {"json", "srt", "vtt", "tsv"}

# Where a line on standard output ends: before a pause of so many seconds, after a sentence, or if it is long.
_PAUSE, _LONG_LINE = 1.0, 300
_SENTENCE_ENDS = (".", "!", "?", "…", "。", "！", "？")


def transcribe(options: argparse.Namespace) -> int:
    """Transcribe all files.

    Args:
        options: from `parse_transcription`.

    Returns:
        The exit status: 1 if something failed or was cut off, otherwise 0.

    Raises:
        GraniteSpeechError: an option, the output folder or the model cannot be used, so nothing can be done.
        OutputClosedError: standard output takes no more lines.
    """
    TranscribeOptions.of(options.call)  # its errors need not wait for the model
    results = _Files(options) if options.writes_files else _Lines(options.audio)
    if not results.names:
        if results.skipped:
            message(results.skipped)
        return 0
    plots = None if options.plot is None else Plots(results.names, options.plot, options.quiet)
    shown = not options.quiet and sys.stderr.isatty()
    transcriber, description = _load(options)
    if not options.quiet:
        message(description)
    for note in _notes(options, results.skipped):
        message(note)
    with Progress(results.names, shown) as progress:
        events = transcriber.stream_segments(results.names, on_progress=progress.advance, **options.call)
        try:
            with closing(events):
                for index, event in events:
                    if isinstance(event, Transcript):
                        progress.finish(index, event.duration)
                    with progress.aside():
                        results.take(index, event)
                        if plots is not None and isinstance(event, Transcript):
                            plots.take(results.names[index], event)
        finally:
            results.flush()
    return 1 if results.failed or (plots is not None and plots.failed) else 0


def _notes(options: argparse.Namespace, skipped: str) -> list[str]:
    """What to say before the first text."""
    notes = [_NO_MODEL] if options.model is None else []
    if options.ignored:
        notes.append(f"{', '.join(options.ignored)} ignored: llama.cpp is not used")
    formats = set(options.output_format or ())
    layout = [f"--{name.replace('_', '-')}" for name in _LAYOUT if getattr(options, name)]
    if layout and not {"srt", "vtt"} & formats:
        notes.append(f"{', '.join(layout)} ignored: neither srt nor vtt is written")
    if options.call.get("word_timestamps") and options.plot is None and not _WITH_WORDS & formats:
        notes.append(f"--word-timestamps shows no times: none of {', '.join(sorted(_WITH_WORDS))} is written")
    return [*notes, skipped] if skipped else notes


def _load(options: argparse.Namespace) -> tuple["Transcriber", str]:
    """The model, and a line that says what runs and where."""
    load = Load()  # while the imports take their seconds
    import torch

    from granite_speech.checkpoints.hub import EMBEDDED_FOLDER
    from granite_speech.transcription.transcriber import Transcriber

    count = thread_count(options.threads, load)
    set_threads(torch.get_num_threads() if count is None else count)
    if options.call.get("segmentation") == "silero":
        from granite_speech.transcription.silero import SileroDetector

        SileroDetector()  # an error now, if its package is missing, rather than one for each recording
    names = ("device", "dtype", "quantize", "cache_dir", "revision", "local_files_only")
    settings = {name: getattr(options, name) for name in names}
    transcriber = Transcriber.from_pretrained(EMBEDDED_FOLDER if options.model is None else options.model, **settings)
    dtype, device = str(transcriber.model.dtype).removeprefix("torch."), transcriber.model.device
    parts = [options.model or "embedded", f"{dtype} on {device}"]
    if options.quantize is not None:
        parts[1] = f"{dtype} and {options.quantize} on {device}"
    if device.type == "cpu":
        if is_chosen := options.threads is None and count is not None:
            torch.set_num_threads(no_slower(count, transcriber.model))
        threads = torch.get_num_threads()
        parts.append(f"{threads} thread{'s' * (threads > 1)}")
        if is_chosen and threads < (cores := available_cores()):
            parts.append(f"because more would be slower now (--threads {cores} uses all cores)")
    return transcriber, ", ".join(parts)


class _Lines:
    """Texts to standard output. Several recordings have their names before their texts.

    A line is a sentence, or what was said between two pauses. It is printed as soon as it has ended.

    Attributes:
        names: of the recordings to transcribe.
        failed: whether something failed or was cut off.
        skipped: nothing; as that of `_Files`.
    """

    def __init__(self, names: list[str]):
        self.names, self.failed, self.skipped = names, False, ""
        self._begun = -1
        self._line, self._end = "", 0.0

    def take(self, index: int, event: Segment | Transcript) -> None:
        """Print what is new about a recording."""
        if len(self.names) > 1 and index > self._begun:
            self._begun = index
            write_line(f"\n{self.names[index]}:" if index else f"{self.names[index]}:")
        if isinstance(event, Segment):
            self._add(event)
            return
        self.flush()
        if event.error is not None and len(self.names) > 1:
            write_line(f"[failed: {one_line(event.error.got)}]")
        self.failed |= _report(self.names[index], event)

    def flush(self) -> None:
        """Print the line that has begun."""
        line, self._line = self._line, ""
        if line:
            write_line(line)

    def _add(self, segment: Segment) -> None:
        if segment.start - self._end >= _PAUSE:
            self.flush()
        self._line, self._end = f"{self._line} {one_line(segment.text)}".strip(), segment.end
        if self._line.endswith(_SENTENCE_ENDS) or len(self._line) >= _LONG_LINE:
            self.flush()


class _Files:
    """Texts to files, and a message for each recording.

    Attributes:
        names: of the recordings to transcribe; without those that `--resume` skips.
        failed: whether something failed or was cut off.
        skipped: what to say of those that `--resume` skips; nothing with `--quiet`.

    Raises:
        GraniteSpeechError: the folder cannot be created, or the layout of subtitles makes no sense.
    """

    def __init__(self, options: argparse.Namespace):
        recordings = list(dict.fromkeys(options.audio))
        layout = {name: getattr(options, name) for name in _LAYOUT}
        self._files = OutputFiles(recordings, options.output_dir, options.output_format or ["txt"], SubtitleOptions(**layout))
        self._quiet, self.failed = options.quiet, False
        self._places = [place for place in range(len(recordings)) if not (options.resume and self._files.is_complete(place))]
        self.names = [recordings[place] for place in self._places]
        count = len(recordings) - len(self.names)
        says_it = options.resume and not self._quiet
        self.skipped = f"complete, and skipped: {count} of {len(recordings)} files" if says_it else ""

    def flush(self) -> None:
        """Nothing is held back."""

    def take(self, index: int, event: Segment | Transcript) -> None:
        """Write the files of a recording that is done."""
        if isinstance(event, Segment):
            return
        name = self.names[index]
        self.failed |= _report(name, event)
        try:
            written = self._files.write(self._places[index], event)
        except GraniteSpeechError as error:
            self.failed = True
            message(f"{name}: {error}")
            return
        if not self._quiet:
            message(f"{name}: written to {', '.join(map(str, written))}")


def _report(name: str, transcript: Transcript) -> bool:
    """Print what went wrong with a recording. Returns whether its text is incomplete."""
    errors = [] if transcript.error is None else [transcript.error]
    for one in (*errors, *transcript.warnings):
        message(f"{name}: {one}")
    return not transcript.is_complete
