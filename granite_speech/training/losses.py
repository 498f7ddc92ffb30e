"""Losses on a packed batch: CTC for the encoder, cross entropy on answers to speech and to text, and a warm-up loss for the projector.

Each takes the model, a batch, and the counts of the whole step. It returns the batch's share of the step's mean: the sum over the
batch's labels divided by the number of labels in the step. So several batches give the same gradient as one large batch, even if their
sizes differ.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from granite_kernels.op import accumulator
from torch import Tensor

from granite_speech.model import GraniteSpeechForConditionalGeneration
from granite_speech.model_ctc import GraniteSpeech5ForCTC
from granite_speech.modules.ctc_loss import blank_of
from granite_speech.modules.packing import Segments
from granite_speech.modules.tokens import Tokens
from granite_speech.training.batches import Batch

__all__ = ["LossFunction", "LossValue", "ctc_head_loss", "ctc_loss", "label_loss", "speech_loss", "text_loss"]

Model = GraniteSpeechForConditionalGeneration


class LossValue(NamedTuple):
    """A batch's share of the step's loss.

    Attributes:
        total: a scalar with a gradient.
        parts: unweighted losses by name, for the log.
    """

    total: Tensor
    parts: dict[str, Tensor]


LossFunction = Callable[[Any, Batch, Mapping[str, int]], LossValue]


def ctc_loss(model: Model, batch: Batch, counts: Mapping[str, int], *, middle: float = 0.5) -> LossValue:
    """Connectionist temporal classification (Graves et al., ICML 2006) of the encoder's frames, in nats per character.

    The encoder feeds the prediction of its middle layer into the next layers, so that prediction is trained too (Nozaki and Komatsu,
    arXiv 2104.02724).

    Args:
        model: only its encoder is run.
        batch: made with `ctc=True`.
        counts: sums of `Batch.counts` over the step.
        middle: weight of the middle prediction; the last one has weight 1 - middle.
    """
    _, heads = _encode(model, batch)
    return _ctc_value(heads, batch, counts, middle)


def ctc_head_loss(model: GraniteSpeech5ForCTC, batch: Batch, counts: Mapping[str, int]) -> LossValue:
    """CTC of a model without a language model, in nats per label. As in transformers, only the last layer's prediction is trained.

    Args:
        model: TurboCTC.
        batch: of `CTCData`.
        counts: sums of `Batch.counts` over the step.
    """
    states, left = model.encode_packed(batch.frames.to(model.dtype), batch.clips)
    loss = _ctc_sum(model.ctc_head(states), left, batch, blank_of(model.config)) / counts["characters"]
    return LossValue(loss, {"ctc": loss})


def speech_loss(model: Model, batch: Batch, counts: Mapping[str, int], *, ctc_weight: float = 0.0, ctc_middle: float = 0.5) -> LossValue:
    """Cross entropy of the answers' tokens given prompt and audio, in nats per token, with the adapter on.

    Args:
        model: the whole model is run.
        batch: of speech; made with `ctc=True` if `ctc_weight` is not 0.
        counts: sums of `Batch.counts` over the step.
        ctc_weight: weight of `ctc_loss`, which is added.
        ctc_middle: the `middle` of `ctc_loss`.
    """
    states, heads = _encode(model, batch, heads=ctc_weight > 0)
    vectors, _ = model.project_packed(states, batch.clips)
    language = _answer_loss(model, batch, counts, vectors)
    if not ctc_weight:
        return LossValue(language, {"lm": language})
    ctc = _ctc_value(heads, batch, counts, ctc_middle)
    return LossValue(language + ctc_weight * ctc.total, {"lm": language, **ctc.parts})


def label_loss(model: Model, batch: Batch, counts: Mapping[str, int], *, tokens: Tensor) -> LossValue:
    """Distance of the projector's vectors from the embeddings of the letters that the encoder predicts for the same frames.

    A new projector's vectors mean nothing to the language model, so the language model's loss says little about how to improve them. The
    encoder's CTC head already knows the letter of each frame. Each vector's target is the embedding of the letter in its part of the
    window, or of the blank's token. The loss is the mean squared distance divided by the targets' mean square.

    Args:
        model: its encoder is run without gradients.
        batch: of speech.
        counts: sums of `Batch.counts` over the step.
        tokens: `(output_dim,)` int64, the language model's token for each label of the CTC head.
    """
    queries = model.config.window_size // model.config.downsample_rate
    with torch.no_grad():
        states, heads = _encode(model, batch)
        windows = tuple(-(-length // model.config.window_size) for length in batch.clips.lengths)
        labels = batch.clips.pad_to_multiple(heads[-1].argmax(1), model.config.window_size, windows)
        # The blank is 0, so the maximum picks a letter if a vector's frames have one.
        wanted = model.embed_tokens(tokens[labels.unflatten(1, (queries, -1)).amax(2).flatten()]).float()
    vectors, _ = model.project_packed(states, batch.clips)
    distance = F.mse_loss(vectors.float(), wanted) / wanted.square().mean()
    return LossValue(distance * (batch.counts["answer_tokens"] / counts["answer_tokens"]), {"distance": distance})


def text_loss(model: Model, batch: Batch, counts: Mapping[str, int]) -> LossValue:
    """Cross entropy of the answers' tokens given prompts without audio, in nats per token, with the adapter off."""
    language = _answer_loss(model, batch, counts, None)
    return LossValue(language, {"lm": language})


def _encode(model: Model, batch: Batch, *, heads: bool = True) -> tuple[Tensor, list[Tensor]]:
    """Encoder states `(total_frames, width)`, and the CTC head's logits at the middle and last layers."""
    logits: list[Tensor] = []
    states = model.encoder.encode(batch.frames.to(model.dtype), batch.clips, ctc=logits if heads else None)
    return states, logits


def _ctc_value(heads: list[Tensor], batch: Batch, counts: Mapping[str, int], middle: float) -> LossValue:
    sums = [_ctc_sum(logits, batch.clips, batch, 0) / counts["characters"] for logits in heads]
    if len(sums) == 1:  # an encoder with one layer has no middle
        return LossValue(sums[0], {"ctc": sums[0]})
    inner, last = sums
    return LossValue((1 - middle) * last + middle * inner, {"ctc": last, "ctc_middle": inner})


def _ctc_sum(logits: Tensor, clips: Segments, batch: Batch, blank: int) -> Tensor:
    """Negative log probability of all clips' characters: a scalar, in float32 or wider.

    Args:
        logits: packed.
        clips: where each clip's lie.
        batch: has the characters.
        blank: CTC's.
    """
    log_probabilities = F.log_softmax(logits, dim=-1, dtype=accumulator(logits.dtype))
    padded = clips.pad(log_probabilities, clips.longest).transpose(0, 1)
    # Augmentation may leave a clip too short for its text. Its loss would be infinite, and counts as 0.
    options = {"blank": blank, "reduction": "sum", "zero_infinity": True}
    return F.ctc_loss(padded, batch.characters, clips.lengths, batch.character_lengths, **options)


def _answer_loss(model: Model, batch: Batch, counts: Mapping[str, int], vectors: Tensor | None) -> Tensor:
    """Cross entropy of the answers' tokens. Only the logits that predict them are computed."""
    embeddings = model.embed_tokens(batch.ids)
    if vectors is not None:
        embeddings = embeddings.index_copy(0, batch.audio_places, vectors.to(embeddings.dtype))
    has_audio = [vectors is not None] * len(batch.rows.lengths)
    tokens = Tokens(segments=batch.rows, positions=batch.positions, adapter_index=model.adapter_index(has_audio, batch.rows))
    states = model.language_states(embeddings, tokens)
    logits = model.language_model.logits(states.index_select(0, batch.answer_places))
    return F.cross_entropy(logits.to(accumulator(logits.dtype)), batch.answers, reduction="sum") / counts["answer_tokens"]
