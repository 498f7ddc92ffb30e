"""`generate` in the obvious way, as an oracle: only the public forward, one full batch a step until every row has ended.

Rules, their order and their arithmetic are those of transformers 5.17, written out for one row at a time. Nothing here is shared
with `granite_speech.generation`.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = ["plain_generate"]


@torch.no_grad()
def plain_generate(
    model: Any,
    inputs: dict[str, Any],
    *,
    max_new_tokens: int = 20,
    min_new_tokens: int = 0,
    do_sample: bool = False,
    temperature: float = 1.0,
    top_k: int = 50,
    top_p: float = 1.0,
    repetition_penalty: float = 1.0,
    num_return_sequences: int = 1,
    eos_token_id: int | Sequence[int] | None = None,
    pad_token_id: int | None = None,
    stop_strings: str | Sequence[str] = (),
    tokenizer: Any = None,
    generator: torch.Generator | None = None,
    streamer: Any = None,
) -> Tensor:
    """Greedy decoding or sampling.

    Args:
        model: with the public forward.
        inputs: input_ids `(rows, columns)`, padded on the left, and optionally attention_mask, input_features and
            input_features_lengths.
        eos_token_id, pad_token_id: those of the text configuration if None.
        generator: left in the state in which it was given, so that it can be given to `generate` next.
        streamer: not called.
        The others are as in `GenerationOptions`.

    Returns:
        `(rows * num_return_sequences, columns + longest answer)` int64.
    """
    text_config = model.config.text_config
    ends = text_config.eos_token_id if eos_token_id is None else eos_token_id
    ends = [ends] if isinstance(ends, int) else list(ends or ())
    pad = text_config.pad_token_id if pad_token_id is None else pad_token_id
    pad = (ends[0] if ends else 0) if pad is None else pad
    strings = [stop_strings] if isinstance(stop_strings, str) else list(stop_strings or ())
    before = None if generator is None else generator.get_state()

    inputs = _repeated(model, inputs, num_return_sequences)
    prompts = inputs["input_ids"]
    mask = inputs.pop("attention_mask", None)
    if mask is None:  # as in transformers, padding shows by its token, unless that can also end a row
        mask = (prompts != pad).long() if pad not in ends else torch.ones_like(prompts)
    rows = [prompt[kept != 0].tolist() for prompt, kept in zip(prompts, mask, strict=True)]
    answers: list[list[int]] = [[] for _ in rows]
    has_ended = [False] * len(rows)
    output = model(**inputs, attention_mask=mask, use_cache=True)
    for step in range(max_new_tokens):
        logits = output.logits[:, -1].float()
        scores = []
        for row, one in enumerate(logits):
            one = _penalized(one, rows[row] + answers[row], repetition_penalty)
            if step < min_new_tokens:
                one = _without(one, ends)
            scores.append(_warped(one, temperature, top_k, top_p) if do_sample else one)
        chosen = _drawn(torch.stack(scores), generator) if do_sample else torch.stack(scores).argmax(-1)
        for row, token in enumerate(chosen.tolist()):
            if has_ended[row]:
                answers[row].append(pad)
                continue
            answers[row].append(token)
            has_ended[row] = token in ends or _completes(strings, tokenizer, rows[row] + answers[row])
        if all(has_ended):
            break
        mask = torch.cat((mask, mask.new_ones(len(rows), 1)), dim=1)
        newest = torch.tensor([[answer[-1]] for answer in answers])
        # An audio token without audio counts as token 0, and does not switch the adapter on.
        newest[newest == model.config.audio_token_index] = 0
        output = model(input_ids=newest, attention_mask=mask, past_key_values=output.past_key_values, use_cache=True)
    if generator is not None:
        generator.set_state(before)
    return torch.cat((prompts, torch.tensor(answers, dtype=prompts.dtype).view(len(rows), -1)), dim=1)


def _repeated(model: Any, inputs: dict[str, Any], times: int) -> dict[str, Any]:
    """The inputs with every row, and the clips that belong to it, repeated."""
    repeated = dict(inputs)
    for name in ("input_ids", "attention_mask"):
        if name in inputs:
            repeated[name] = inputs[name].repeat_interleave(times, 0)
    if "input_features" in inputs and times > 1:
        lengths = torch.as_tensor(inputs["input_features_lengths"]).tolist()
        clips, order = iter(range(len(lengths))), []
        for ids in inputs["input_ids"]:
            missing, own = int((ids == model.config.audio_token_index).sum()), []
            while missing > 0:
                own.append(next(clips))
                missing -= model.projector.tokens(lengths[own[-1]])
            order += own * times
        repeated["input_features"] = inputs["input_features"][order]
        repeated["input_features_lengths"] = [lengths[clip] for clip in order]
    return repeated


def _penalized(scores: Tensor, own_tokens: list[int], penalty: float) -> Tensor:
    scores = scores.clone()
    for token in {one for one in own_tokens if one < len(scores)}:
        scores[token] = scores[token] * penalty if scores[token] < 0 else scores[token] / penalty
    return scores


def _without(scores: Tensor, tokens: list[int]) -> Tensor:
    scores = scores.clone()
    for token in tokens:
        if token < len(scores):
            scores[token] = float("-inf")
    return scores


def _warped(scores: Tensor, temperature: float, top_k: int, top_p: float) -> Tensor:
    """Temperature, then the k best tokens, then the fewest best ones whose probabilities add up to p; the others get −inf."""
    scores = scores / temperature
    if top_k:
        kth_best = scores.sort(descending=True).values[min(top_k, len(scores)) - 1]
        scores[scores < kth_best] = float("-inf")
    if top_p < 1:
        ascending = scores.sort()
        worst_up_to_here = ascending.values.softmax(-1).cumsum(-1)
        dropped = ascending.indices[:-1][worst_up_to_here[:-1] <= 1 - top_p]
        scores[dropped] = float("-inf")
    return scores


def _drawn(scores: Tensor, generator: torch.Generator | None) -> Tensor:
    """One token of each row, from the softmax of its scores: the numbers that `torch.multinomial` gives."""
    probabilities = scores.softmax(-1)
    return (probabilities / torch.empty_like(probabilities).exponential_(1.0, generator=generator)).argmax(-1)


def _completes(strings: list[str], tokenizer: Any, ids: list[int]) -> bool:
    """Whether the newest token completes one of the (ASCII) strings in the row's text. Tokens are decoded one by one, since part of
    a character then cannot change the text before it."""
    if not strings:
        return False
    texts = [tokenizer.decode([one]) for one in ids]
    before, text = "".join(texts[:-1]), "".join(texts)
    return any(text.find(one, max(0, len(before) - len(one) + 1)) >= 0 for one in strings)
