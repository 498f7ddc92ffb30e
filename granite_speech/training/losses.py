"""Three losses on a packed batch: the encoder's CTC, the language model's on answers to speech, and its own on answers to text.

Each is a function of the model, a batch, and the counts of the whole step, and returns what the batch adds to the step's mean: the sum
over its own labels, divided by how many the step has. So a step of several batches has the gradient of one batch of their size,
however unequal they are.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import NamedTuple

import torch
import torch.nn.functional as F
from granite_kernels.op import accumulator
from torch import Tensor

from granite_speech.model import GraniteSpeechForConditionalGeneration
from granite_speech.modules.encoder import GraniteSpeechCTCEncoder
from granite_speech.modules.language_model import Tokens
from granite_speech.training.batches import Batch

__all__ = ["LossFunction", "LossValue", "ctc_logits", "ctc_loss", "label_loss", "speech_loss", "text_loss"]

Model = GraniteSpeechForConditionalGeneration


class LossValue(NamedTuple):
    """What a batch adds to the step's loss.

    Attributes:
        total: a scalar with a gradient.
        parts: by name, without weights: for looking at.
    """

    total: Tensor
    parts: dict[str, Tensor]


LossFunction = Callable[[Model, Batch, Mapping[str, int]], LossValue]


def ctc_loss(model: Model, batch: Batch, counts: Mapping[str, int], *, middle: float = 0.5) -> LossValue:
    """Connectionist temporal classification of the encoder's frames, the nats of a character.

    Graves et al. (ICML 2006); the middle's prediction, which the encoder goes on from, is trained too, as Nozaki and Komatsu do
    (arXiv 2104.02724).

    Args:
        model: whose encoder is run; the rest is not.
        batch: made with `ctc=True`.
        counts: of the step.
        middle: the share of the loss that the middle's prediction has.
    """
    _, heads = _encode(model, batch)
    return _ctc_value(heads, batch, counts, middle)


def speech_loss(model: Model, batch: Batch, counts: Mapping[str, int], *, ctc_weight: float = 0.0, ctc_middle: float = 0.5) -> LossValue:
    """Cross entropy of the answers' tokens, given prompt and audio, in nats a token; adapters on.

    Args:
        model: run whole.
        batch: of speech; made with `ctc=True` where the CTC loss has a weight.
        counts: of the step.
        ctc_weight: of `ctc_loss`, which is added.
        ctc_middle: as `ctc_loss`'s `middle`.
    """
    states, heads = _encode(model, batch, heads=ctc_weight > 0)
    vectors, _ = model.projector(states, batch.clips)
    language = _answer_loss(model, batch, counts, vectors)
    if not ctc_weight:
        return LossValue(language, {"lm": language})
    ctc = _ctc_value(heads, batch, counts, ctc_middle)
    return LossValue(language + ctc_weight * ctc.total, {"lm": language, **ctc.parts})


def label_loss(model: Model, batch: Batch, counts: Mapping[str, int], *, tokens: Tensor) -> LossValue:
    """How far the projector's vectors are from the embeddings of what the encoder reads in the same frames.

    A projector begins with vectors that mean nothing to the language model, which then tells it little of what they should be. The
    encoder's CTC head already knows which letter a frame has: a vector is to be the embedding of the letter in its share of the window,
    or of the blank's token. Mean squared distance over the embeddings' mean square.

    Args:
        model: whose encoder reads, without a gradient.
        batch: of speech.
        counts: of the step.
        tokens: `(output_dim,)` int64, the language model's token for each label of the CTC head.
    """
    queries = model.config.window_size // model.config.downsample_rate
    with torch.no_grad():
        states, heads = _encode(model, batch)
        windows = tuple(-(-length // model.config.window_size) for length in batch.clips.lengths)
        labels = batch.clips.pad_to_multiple(heads[-1].argmax(1), model.config.window_size, windows)
        # Of two labels in a share, the one that is not the blank, which is 0.
        wanted = model.embed_tokens(tokens[labels.unflatten(1, (queries, -1)).amax(2).flatten()]).float()
    vectors, _ = model.projector(states, batch.clips)
    distance = F.mse_loss(vectors.float(), wanted) / wanted.square().mean()
    return LossValue(distance * (batch.counts["answer_tokens"] / counts["answer_tokens"]), {"distance": distance})


def text_loss(model: Model, batch: Batch, counts: Mapping[str, int]) -> LossValue:
    """Cross entropy of the answers' tokens, given prompts without audio; adapters off."""
    language = _answer_loss(model, batch, counts, None)
    return LossValue(language, {"lm": language})


def _encode(model: Model, batch: Batch, *, heads: bool = True) -> tuple[Tensor, list[Tensor]]:
    """Encoder states `(total_frames, width)`, and the CTC head's logits in the middle and at the end."""
    encoder = model.encoder
    with _outputs_of_head(encoder) as logits:
        states = encoder.encode(batch.frames.to(model.dtype), batch.clips)
        if heads:
            ctc_logits(encoder, states)
    return states, logits


def ctc_logits(encoder: GraniteSpeechCTCEncoder, states: Tensor) -> Tensor:
    """The CTC head on the last block's output, which stands last in what `encode` returns; `(total_frames, output_dim)`."""
    return encoder.out(states[:, -encoder.config.hidden_dim :])


@contextmanager
def _outputs_of_head(encoder: GraniteSpeechCTCEncoder) -> Iterator[list[Tensor]]:
    # The encoder applies its head in the middle and goes on from the softmax; what it goes on from is what must be judged.
    logits: list[Tensor] = []
    handle = encoder.out.register_forward_hook(lambda module, arguments, output: logits.append(output))
    try:
        yield logits
    finally:
        handle.remove()


def _ctc_value(heads: list[Tensor], batch: Batch, counts: Mapping[str, int], middle: float) -> LossValue:
    sums = [_ctc_sum(logits, batch) / counts["characters"] for logits in heads]
    if len(sums) == 1:  # an encoder of one layer has no middle
        return LossValue(sums[0], {"ctc": sums[0]})
    inner, last = sums
    return LossValue((1 - middle) * last + middle * inner, {"ctc": last, "ctc_middle": inner})


def _ctc_sum(logits: Tensor, batch: Batch) -> Tensor:
    """Negative log probability of the characters of all clips, a scalar in float32 at least."""
    clips = batch.clips
    log_probabilities = F.log_softmax(logits, dim=-1, dtype=accumulator(logits.dtype))
    padded = clips.pad(log_probabilities, clips.longest).transpose(0, 1)
    # A clip that augmentation has made too short for its text has no alignment: it adds nothing, in place of infinity.
    options = {"blank": 0, "reduction": "sum", "zero_infinity": True}
    return F.ctc_loss(padded, batch.characters, clips.lengths, batch.character_lengths, **options)


def _answer_loss(model: Model, batch: Batch, counts: Mapping[str, int], vectors: Tensor | None) -> Tensor:
    """Cross entropy of the answers' tokens; logits are computed where an answer's token comes next and nowhere else."""
    embeddings = model.embed_tokens(batch.ids)
    if vectors is not None:
        embeddings = embeddings.index_copy(0, batch.audio_places, vectors.to(embeddings.dtype))
    has_audio = [vectors is not None] * len(batch.rows.lengths)
    tokens = Tokens(segments=batch.rows, positions=batch.positions, adapter_index=model.adapter_index(has_audio, batch.rows))
    states = model.decoder(embeddings, tokens)
    logits = model.language_model.logits(states.index_select(0, batch.answer_places))
    return F.cross_entropy(logits.to(accumulator(logits.dtype)), batch.answers, reduction="sum") / counts["answer_tokens"]
