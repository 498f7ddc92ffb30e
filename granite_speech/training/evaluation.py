"""Transcripts of recordings with known text, and their word error rate."""

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from granite_speech.errors import MissingDependencyError
from granite_speech.inputs.ctc_processor import GraniteSpeech5Processor
from granite_speech.inputs.processor import GraniteSpeechProcessor
from granite_speech.inputs.requests import transcript_request
from granite_speech.model import GraniteSpeechForConditionalGeneration
from granite_speech.model_ctc import GraniteSpeech5ForCTC
from granite_speech.modules.packing import Segments
from granite_speech.training.manifest import Utterance

__all__ = ["Change", "best_path_transcripts", "ctc_transcripts", "transcripts", "word_error_rate"]

Change = Callable[[Tensor, int], Tensor]


def word_error_rate(references: Sequence[str], hypotheses: Sequence[str]) -> float:
    """Substitutions, deletions and insertions divided by the number of reference words: 0.05 is 5 %.

    Words are separated by spaces. Case and punctuation count.

    Raises:
        MissingDependencyError: jiwer is not installed.
    """
    return float(_jiwer().wer(list(references), list(hypotheses)))


def _jiwer():
    try:
        import jiwer
    except ImportError as error:
        raise MissingDependencyError(
            got="no jiwer", expected="the package jiwer, which counts word errors", remedy="pip install jiwer, or omit validation"
        ) from error
    return jiwer


@torch.no_grad()
def transcripts(
    model: GraniteSpeechForConditionalGeneration,
    processor: GraniteSpeechProcessor,
    utterances: Sequence[Utterance],
    *,
    batch_seconds: float = 60.0,
    change: Change | None = None,
) -> list[str]:
    """The model's greedy answers, in the order of the utterances.

    An answer is cut off at ten tokens more than twice the longest reference in its batch, because a barely trained model may never stop.

    Args:
        model: in evaluation mode.
        processor: from the same checkpoint.
        utterances: with sound files, prompts and reference texts.
        batch_seconds: most seconds of audio in a batch; a longer recording is its own batch.
        change: `(waveform, index) → waveform`, applied to each recording first. Waveforms are `(samples,)`.

    Raises:
        AudioError: a sound file that cannot be used; names the line.
    """
    answers: dict[int, str] = {}
    rate = processor.audio_processor.sampling_rate
    for indices, waveforms in _by_length(rate, utterances, batch_seconds, change):
        chosen = [utterances[index] for index in indices]
        requests = [transcript_request(processor, one.prompt, model.config.model_type) for one in chosen]
        inputs = processor(requests, waveforms, device=model.device).to(model.device)
        longest = max(len(processor.tokenizer.encode(one.text)) for one in chosen)
        ids = model.generate(**inputs, max_new_tokens=2 * longest + 10, do_sample=False, num_beams=1)
        texts = processor.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        answers |= dict(zip(indices, (text.strip() for text in texts), strict=True))
    return [answers[index] for index in range(len(utterances))]


@torch.no_grad()
def ctc_transcripts(
    model: GraniteSpeechForConditionalGeneration,
    processor: GraniteSpeechProcessor,
    utterances: Sequence[Utterance],
    *,
    batch_seconds: float = 60.0,
    change: Change | None = None,
) -> list[str]:
    """The encoder's own text: each frame's best CTC label, a code point, without repeats and blanks.

    Arguments and errors are those of `transcripts`.
    """
    answers: dict[int, str] = {}
    rate = processor.audio_processor.sampling_rate
    for indices, waveforms in _by_length(rate, utterances, batch_seconds, change):
        frames, lengths = processor.audio_processor.extract_packed(waveforms, model.device)
        states = model.encoder.encode(frames.to(model.dtype), Segments(tuple(lengths), model.device))
        labels = model.encoder.ctc_logits(states).argmax(1).cpu()
        answers |= dict(zip(indices, map(_collapsed, labels.split(lengths)), strict=True))
    return [answers[index] for index in range(len(utterances))]


@torch.no_grad()
def best_path_transcripts(
    model: GraniteSpeech5ForCTC,
    processor: GraniteSpeech5Processor,
    utterances: Sequence[Utterance],
    *,
    batch_seconds: float = 60.0,
    change: Change | None = None,
) -> list[str]:
    """The text of TurboCTC: each frame's best token, without repeats and blanks.

    Arguments and errors are those of `transcripts`.
    """
    answers: dict[int, str] = {}
    for indices, waveforms in _by_length(processor.feature_extractor.sampling_rate, utterances, batch_seconds, change):
        frames, lengths = processor.feature_extractor.extract_packed(waveforms, model.device)
        states, left = model.encode_packed(frames.to(model.dtype), Segments(tuple(lengths), model.device))
        path = model.greedy_packed(states, left)
        for index, tokens, count in zip(indices, path.tokens.cpu().split(left.lengths), path.counts.tolist(), strict=True):
            answers[index] = processor.tokenizer.decode(tokens[:count].tolist(), skip_special_tokens=True, group_tokens=False).strip()
    return [answers[index] for index in range(len(utterances))]


def _collapsed(labels: Tensor) -> str:
    return "".join(chr(one) for one in labels.unique_consecutive().tolist() if one).strip()


def _by_length(
    rate: int, utterances: Sequence[Utterance], batch_seconds: float, change: Change | None
) -> Iterator[tuple[list[int], list[Tensor]]]:
    """Batches of similar length, as indices and waveforms."""
    samples = [one.count_samples(rate) for one in utterances]

    def load(indices: list[int]) -> tuple[list[int], list[Tensor]]:
        waveforms = [utterances[index].waveform(rate) for index in indices]
        return indices, waveforms if change is None else [change(*pair) for pair in zip(waveforms, indices, strict=True)]

    batch: list[int] = []
    for index in sorted(range(len(utterances)), key=samples.__getitem__):
        if batch and sum(samples[one] for one in batch) + samples[index] > batch_seconds * rate:
            yield load(batch)
            batch = []
        batch.append(index)
    if batch:
        yield load(batch)
