"""A stand-in for `Transcriber`, with results that a test writes down, so that tests of the command line need no model."""

from types import SimpleNamespace

import torch

from granite_speech import AudioError
from granite_speech.transcription.transcript import Segment, Transcript

FIRST_LINE = "granite-speech: m, bfloat16 on cpu, 1 thread\n"


def transcript(*texts: str, seconds: float = 2.0, **settings) -> Transcript:
    """A recording of a segment for each text, which takes the first half of so many seconds."""
    segments = [Segment(place, place * seconds, (place + 0.5) * seconds, text) for place, text in enumerate(texts)]
    return Transcript(" ".join(filter(None, texts)), segments=segments, duration=seconds * len(texts), **settings)


class ScriptedTranscriber:
    """Gives each recording the transcript that `results` has for its name; an `AudioError` if there is none.

    Attributes:
        model: what the command line says of it is `FIRST_LINE`, if it is asked for "m" with one thread.
        loaded: the arguments of `from_pretrained`, of each call.
        calls: the options of `stream_segments`, of each call.
        taken: the names of the recordings.
        before_event: called with each event before it is given out.
    """

    def __init__(self, results: dict[str, Transcript]):
        self.results, self.loaded, self.calls, self.taken = results, [], [], []
        self.before_event = lambda event: None
        self.model = SimpleNamespace(dtype=torch.bfloat16, device=torch.device("cpu"))

    def from_pretrained(self, name_or_path, **settings) -> "ScriptedTranscriber":
        self.loaded.append((name_or_path, settings))
        return self

    def stream_segments(self, recordings, on_progress=None, **options):
        self.calls.append(options)
        for index, name in enumerate(recordings):
            self.taken.append(name)
            result = self.results.get(name)
            if result is None:
                error = AudioError(got=f"{name!r}, which does not exist", expected="a sound file", remedy="Check the path")
                result = Transcript(error=error)
            for segment in result.segments:
                if on_progress is not None:
                    on_progress(index, segment.end)
                self.before_event(segment)
                yield index, segment
            self.before_event(result)
            yield index, result
