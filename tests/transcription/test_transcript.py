"""`Transcript` is a `str`, and knows its segments and what went wrong."""

import copy
import json
import pickle

import pytest

from granite_speech import AudioError, Segment, Transcript, TranscriptNote, Word

SEGMENTS = (Segment(0, 0.5, 1.25, "turn"), Segment(1, 2.0, 3.0, "left"), Segment(2, 4.0, 5.0, "", error="no memory"))
NOTES = (TranscriptNote("audio", "not closed"), TranscriptNote("window_error", "no memory", 4.0, 5.0))
WHOLE = Transcript("turn left", segments=SEGMENTS, warnings=NOTES, language="en", duration=6.0)


def test_it_is_its_text():
    assert WHOLE == "turn left" and isinstance(WHOLE, str) and f"{WHOLE}" == "turn left" and WHOLE[:4] == "turn" and WHOLE[0] == "t"
    assert type(WHOLE.text) is str and WHOLE["text"] == WHOLE.text == "turn left"
    assert not Transcript("") and Transcript("").segments == () and Transcript("").error is None


def test_parts_by_attribute_and_by_key():
    assert WHOLE["segments"] is WHOLE.segments and WHOLE["segments"][1]["text"] == "left" and WHOLE.segments[1].end == 3.0
    assert WHOLE["warnings"][0]["type"] == "audio" and WHOLE["language"] == "en"
    assert WHOLE["words"] is None and WHOLE.segments[0]["words"] is None and WHOLE["speakers"] is None
    for wrong in (lambda: WHOLE["seek"], lambda: WHOLE.segments[0]["seek"], lambda: WHOLE["upper"], lambda: WHOLE.segments[0]["_x"]):
        with pytest.raises(KeyError):
            wrong()


def test_segments_and_notes_are_read_like_dictionaries():
    whole, failed = SEGMENTS[0], SEGMENTS[2]
    assert "text" in whole and "words" not in whole and "error" not in whole and "error" in failed
    assert dict(whole) == whole.to_dict() and dict(failed) == failed.to_dict() and dict(NOTES[0]) == NOTES[0].to_dict()
    assert whole.get("text") == "turn" and whole.get("words") is None and whole.get("seek", []) == [] and whole["error"] is None
    assert WHOLE.get("segments") == SEGMENTS and WHOLE.get("seek", []) == [] and "turn" in WHOLE and "segments" not in WHOLE
    assert dict(WHOLE)["text"] == WHOLE.text and dict(WHOLE)["duration"] == 6.0


def test_json_has_the_keys_of_ibms_package():
    values = json.loads(json.dumps(WHOLE.to_dict()))
    ibms, ours = ["text", "segments", "language", "target_language", "warnings"], ["duration", "confidence", "compression_ratio"]
    assert sorted(values) == sorted(ibms + ours)
    plain = {"id": 0, "start": 0.5, "end": 1.25, "text": "turn", "temperature": 0.0}
    assert values["segments"][0] == plain | {"compression_ratio": WHOLE.segments[0].compression_ratio}
    assert values["segments"][2]["error"] == "no memory"
    assert values["warnings"] == [
        {"type": "audio", "message": "not closed"},
        {"type": "window_error", "message": "no memory", "start": 4.0, "end": 5.0},
    ]
    error = AudioError(got="noise", expected="speech", remedy="Speak up")
    assert Transcript("", error=error).to_dict()["error"] == str(error)


def test_what_is_complete():
    assert Transcript("a").is_complete and Transcript("a", warnings=NOTES[:1]).is_complete and not WHOLE.is_complete
    assert not Transcript("a", error=AudioError(got="a", expected="b", remedy="c")).is_complete
    assert Transcript("a", warnings=[TranscriptNote("truncated", "cut off")]).truncated == "cut off"
    assert WHOLE.audio_warning == "not closed" and WHOLE.truncated is None
    assert [str(one) for one in NOTES] == ["not closed", "4.00 to 5.00 s: no memory"]


@pytest.mark.parametrize(
    "again", [copy.copy, copy.deepcopy, lambda one: pickle.loads(pickle.dumps(one))], ids=["copy", "deepcopy", "pickle"]
)
def test_a_copy_has_everything(again):
    other = again(WHOLE)
    assert other == WHOLE and other.to_dict() == WHOLE.to_dict() and other.segments == SEGMENTS


HEARD = Word("turn", 0.5, 0.9, confidence=0.6, ctc_confidence=0.9, lm_confidence=0.4, speaker="Speaker 1")
GUESSED = Word("7", 0.9, 1.25, confidence=0.5, lm_confidence=0.5, bridged=True)
SPOKEN = Segment(
    0, 0.5, 1.25, "turn 7", words=(HEARD, GUESSED), confidence=0.7, speakers=({"speaker": "Speaker 1", "text": "turn 7"},), raw_text="x"
)


def test_words_and_speakers():
    assert HEARD["start"] == HEARD.start == 0.5 and HEARD["probability"] == 0.4, "as whisper calls it"
    assert HEARD.to_dict() == {
        **{"word": "turn", "start": 0.5, "end": 0.9, "confidence": 0.6, "ctc_confidence": 0.9, "lm_confidence": 0.4},
        "speaker": "Speaker 1",
    }
    assert GUESSED.to_dict()["bridged"] is True and "speaker" not in GUESSED.to_dict() and "bridged" not in HEARD.to_dict()
    whole = Transcript("turn 7", segments=[SPOKEN, SEGMENTS[1]], words=[HEARD, GUESSED], confidence=0.7)
    values = json.loads(json.dumps(whole.to_dict()))
    assert values["words"] == values["segments"][0]["words"] == [HEARD.to_dict(), GUESSED.to_dict()]
    assert values["speakers"] == values["segments"][0]["speakers"] == [{"speaker": "Speaker 1", "text": "turn 7"}]
    assert values["segments"][0]["raw_text"] == "x" and values["confidence"] == 0.7 and whole["speakers"] == whole.speakers
    assert "words" not in values["segments"][1] and "speakers" not in values["segments"][1]


def test_a_text_that_repeats_itself_has_a_high_compression_ratio():
    assert Transcript("").compression_ratio == 0 and Segment(0, 0, 1, "one two").compression_ratio < 1
    assert Transcript("no " * 40)["compression_ratio"] == Segment(0, 0, 1, "no " * 40)["compression_ratio"] > 2.4
