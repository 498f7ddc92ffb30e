"""Windows: every word is in one, none is longer than the limit, and memory does not grow."""

import jiwer
import numpy as np
import pytest
import torch

from granite_speech import Engine
from granite_speech.errors import InputError
from granite_speech.transcription.overlaps import join
from granite_speech.transcription.windows import Window, Windows, halves
from tests.support.spoken import load, sentences

RATE = 16000


def spoken(number: int) -> np.ndarray:
    return sentences()[number].waveform(RATE).numpy()


def silence(seconds: float) -> np.ndarray:
    return np.zeros(int(seconds * RATE), np.float32)


def recording(*parts: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.concatenate(parts).astype(np.float32))


def windows(samples: torch.Tensor, limit: float = 4.0, block: int = 8000, **options) -> list[Window]:
    return list(Windows(samples.split(block), limit=limit, **options))


def sure(found: list[Window], samples: torch.Tensor, limit: float) -> torch.Tensor:
    """Check what is always true of windows. Returns where no window is, `(samples,)` bool."""
    free, before = torch.ones(len(samples), dtype=torch.bool), 0.0
    for window in found:
        begin, end = round(window.start * RATE), round(window.end * RATE)
        assert 0 <= begin < end <= len(samples) and end - begin == len(window.samples) <= limit * RATE
        assert torch.equal(window.samples, samples[begin:end])
        assert window.samples.untyped_storage().nbytes() == 4 * len(window.samples), "memory of its own"
        assert window.start == pytest.approx(before - window.overlap) or (window.overlap == 0 and window.start > before)
        free[begin:end], before = False, window.end
    return free


def faintness(samples: torch.Tensor, free: torch.Tensor) -> float:
    """How loud the loudest 10 ms outside of all windows are, in dB of the loudest of all."""
    power = samples[: len(samples) // 160 * 160].reshape(-1, 160).square().mean(1)
    outside = (samples * free)[: len(samples) // 160 * 160].reshape(-1, 160).square().mean(1)
    return float(10 * torch.log10(outside.max() / power.max() + 1e-12))


@pytest.mark.parametrize("block", [100, 5000, 10**6])
def test_a_recording_within_the_limit_is_passed_whole(block):
    samples = recording(silence(0.7), spoken(3), silence(1.2), spoken(5), silence(0.313))
    (window,) = windows(samples, 30, block)
    assert torch.equal(window.samples, samples) and (window.start, window.end, window.overlap) == (0.0, len(samples) / RATE, 0.0)
    (window,) = windows(samples, len(samples) / RATE, block)
    assert torch.equal(window.samples, samples)


def test_long_silence_is_omitted_from_a_short_recording():
    samples = recording(silence(3), spoken(3), silence(3))
    (window,) = windows(samples, 30)
    assert len(window.samples) < len(spoken(3)) + 0.5 * RATE
    sure([window], samples, 30)


@pytest.mark.parametrize("limit", [0.5, 1.0, 4.0, 10.0])
@pytest.mark.parametrize("pause", [0.0, 0.05, 0.3, 2.0])
def test_every_word_is_in_a_window_and_none_is_longer_than_the_limit(limit, pause):
    samples = recording(*(part for number in range(12) for part in (spoken(number), silence(pause))))
    found = windows(samples, limit)
    assert faintness(samples, sure(found, samples, limit)) < -45
    if limit < 10:
        assert len(found) >= 12 or pause < 0.3
    assert len(found) <= 3.5 * len(samples) / RATE / limit + 12 * (pause > 0.2)


def test_utterances_with_pauses_are_windows_of_their_own_where_the_limit_is_short():
    samples = recording(*(part for number in range(12) for part in (silence(0.5), spoken(number))))
    found, begin = windows(samples, 4), 0
    for number in range(12):
        begin += RATE // 2
        near = [window for window in found if begin - 800 < window.start * RATE < begin + len(spoken(number))]
        assert near and near[0].start * RATE < begin + 800 and near[-1].end * RATE < begin + len(spoken(number)) + 1600
        begin += len(spoken(number))


def test_sentences_belong_together_where_the_limit_is_long():
    samples = recording(*(part for number in range(12) for part in (silence(0.8), spoken(number))), *([silence(4), spoken(0)]))
    found = windows(samples, 20)
    assert len(found) == 1 + -(-(len(samples) - len(silence(4)) - len(spoken(0))) // (20 * RATE))
    assert found[-1].end - found[-1].start < len(spoken(0)) / RATE + 0.5


def test_a_cut_without_a_pause_is_in_a_dip_or_in_both_windows():
    """A steady voice with one dip of 60 ms, then one without any."""
    time = np.arange(7 * RATE) / RATE
    phase = 2 * np.pi * 150 * time + 8 * np.sin(2 * np.pi * 3 * time)
    voice = sum(np.sin(number * phase) / number for number in range(1, 25)) * (0.2 + 0.1 * np.sin(2 * np.pi * 5 * time))
    dip = voice.copy()
    dip[int(3.1 * RATE) : int(3.17 * RATE)] *= 0.0001
    edge = silence(3)
    found = windows(recording(edge, dip, edge), 4)
    assert found[0].end == pytest.approx(6.13, abs=0.04) and found[1].overlap == 0
    assert found[1].start == found[0].end
    samples = recording(edge, voice, edge)
    found = windows(samples, 4)
    assert all(0.4 <= window.overlap <= 1.0 for window in found[1:])
    sure(found, samples, 4)


def test_fixed_windows_are_at_equal_distances_and_silent_ones_are_omitted():
    samples = recording(*(spoken(number) for number in range(12)), silence(12), spoken(0), spoken(1))
    found = windows(samples, 4, segmentation="fixed", overlap=0.5)
    for before, window in zip([None, *found], found, strict=False):
        assert window.start % 3.5 == pytest.approx(0) and (window.end - window.start == 4 or window is found[-1])
        assert window.overlap == (0.5 if before is not None and before.end > window.start else 0)
    assert 0 < len(found) < len(samples) / RATE / 3.5 - 1
    assert faintness(samples, sure(found, samples, 4)) < -45


def test_only_spans_are_read():
    samples = recording(*(part for number in range(12) for part in (spoken(number), silence(0.5))))
    reader = Windows(samples.split(7000), limit=4, spans=[(1.0, 2.5), (4.0, 4.5), (6.0, 9.0)])
    found = list(reader)
    assert found and all(any(begin <= one.start < one.end <= end for begin, end in ((1, 2.5), (4, 4.5), (6, 9))) for one in found)
    assert all(torch.equal(one.samples, samples[round(one.start * RATE) : round(one.end * RATE)]) for one in found)
    assert reader.duration == 9.0
    rest = windows(samples, 4, spans=[(6.0, None)])
    assert rest[-1].end > len(samples) / RATE - 2 and not windows(samples, spans=[(1000.0, None)])


def test_memory_does_not_grow():
    """Windows come soon after their last sample was read."""
    part = [part for number in range(12) for part in (spoken(number), silence(0.4))]
    block = recording(*part, silence(25), *part)
    reader = Windows((block for _ in range(12)), limit=4)
    assert max(reader.duration - window.end for window in reader) < 25
    assert reader.duration == 12 * len(block) / RATE


def test_windows_from_before_a_fault_come_before_its_error():
    samples = recording(*(part for number in range(8) for part in (spoken(number), silence(0.5))))

    def damaged():
        yield samples
        raise OSError("the end is missing")

    reader, found = Windows(damaged(), limit=4), []
    with pytest.raises(OSError, match="the end is missing"):
        for window in reader:
            found.append(window)
    assert [(one.start, one.end) for one in found] == [(one.start, one.end) for one in windows(samples)]


def test_a_window_in_two():
    quiet = recording(spoken(3), silence(0.3), spoken(5))
    window = Window(10.0, 10.0 + len(quiet) / RATE, quiet, 0.25)
    first, second = halves(window)
    assert torch.equal(torch.cat([first.samples, second.samples]), quiet)
    assert (first.start, first.end, second.end, first.overlap, second.overlap) == (10.0, second.start, window.end, 0.25, 0.0)
    assert 10 + len(spoken(3)) / RATE < first.end < 10.3 + len(spoken(3)) / RATE
    assert halves(Window(0.0, 0.4, torch.zeros(6400))) is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"limit": 0.1}, "limit=0.1"),
        ({"limit": float("nan")}, "limit=nan"),
        ({"limit": True}, "limit=True"),
        ({"segmentation": "words"}, "segmentation='words'"),
        ({"segmentation": ["fixed"]}, "segmentation="),
        ({"overlap": 0.5}, "segmentation='fixed'"),
        ({"overlap": 4.0, "segmentation": "fixed"}, "overlap=4.0"),
        ({"overlap": -1, "segmentation": "fixed"}, "overlap=-1"),
        ({"spans": [(2.0, 1.0)]}, "from 2.0 to 1.0"),
        ({"spans": [(0.0, 2.0), (1.0, 3.0)]}, "from 1.0 to 3.0 s after one that ends at 2.0"),
        ({"spans": [(0.0, None), (1.0, 3.0)]}, "from 1.0 to 3.0"),
        ({"spans": [("0", 1.0)]}, "from '0'"),
    ],
)
def test_options_that_cannot_be_used(options, message):
    with pytest.raises(InputError) as caught:
        Windows([], **{"limit": 4.0} | options)
    assert message in str(caught.value)


def test_the_words_of_a_long_recording_are_those_of_its_utterances():
    """With the bundled checkpoint, pauses of any length, and noise 40 dB below the speech."""
    rng, parts = np.random.default_rng(0), []
    for number in [*range(12), *range(11, -1, -1)]:
        parts += [silence(rng.uniform(0.3, 3)), spoken(number)]
    samples = recording(*parts)
    noisy = samples + 1e-3 * torch.randn(len(samples), generator=torch.Generator().manual_seed(0))
    expected = [one.text for one in sentences()]
    expected = " ".join([*expected, *expected[::-1]])
    with Engine(*load()) as engine:
        for sound, most in ((samples, 0), (noisy, 0.03)):
            found = windows(sound)
            handles = [engine.submit(audio=window.samples) for window in found]
            texts = [handle.result().text.strip() for handle in handles]
            for number, window in enumerate(found):
                if window.overlap:
                    pair = found[number - 1], window
                    lengths = {f"{name}_seconds": one.end - one.start for name, one in zip(("before", "after"), pair, strict=True)}
                    texts[number - 1 : number + 1] = join(*texts[number - 1 : number + 1], overlap=window.overlap, **lengths)
            assert jiwer.wer(expected, " ".join(texts)) <= most
