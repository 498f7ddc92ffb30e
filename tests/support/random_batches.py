"""Random prompts and random options for `generate`, and the comparison of its answers with `plain_generate`."""

import functools
import tempfile
import weakref
from typing import Any

import torch
from torch import Tensor

from granite_speech.inputs.tokenizer import GraniteSpeechTokenizer
from tests.support.plain_generate import plain_generate
from tests.support.small_tokenizer import write_tokenizer

__all__ = ["Recorder", "assert_as_plain", "random_batch"]

_LONGEST_PROMPT, _MOST_ROWS, _MOST_NEW_TOKENS = 12, 6, 30
_EMITTED: "weakref.WeakKeyDictionary[Any, list[int]]" = weakref.WeakKeyDictionary()


class Recorder:
    """A streamer that keeps what it received: tensors, then "end"."""

    def __init__(self) -> None:
        self.received: list[Tensor | str] = []

    def put(self, ids: Tensor) -> None:
        self.received.append(ids.clone())

    def end(self) -> None:
        self.received.append("end")


class _Dice:
    """Random choices of one seed."""

    def __init__(self, seed: int):
        self.rng = torch.Generator().manual_seed(seed)

    def integer(self, low: int, high: int) -> int:
        """From low to high, both included."""
        return int(torch.randint(low, high + 1, (), generator=self.rng))

    def happens(self, probability: float) -> bool:
        return bool(torch.rand((), generator=self.rng) < probability)

    def one_of(self, *values: Any) -> Any:
        return values[self.integer(0, len(values) - 1)]


def random_batch(seed: int, model: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """Inputs and options of a call `model.generate(**inputs, **options)`, or `plain_generate(model, inputs, **options)`.

    Args:
        seed: the same one gives the same batch. A generator and a streamer in the options are new ones each time.
        model: float32, on the CPU.

    Returns:
        Inputs: 1 to 6 rows of different lengths, padded on the left; each row with one clip or without. Options: always
        max_new_tokens and eos_token_id, and some of the others.
    """
    dice = _Dice(seed)
    rows = 1 if dice.happens(0.3) else dice.integer(2, _MOST_ROWS)
    inputs = _inputs(dice, model, rows)
    options = _options(dice, model, inputs["input_ids"][:, -1].tolist())
    if options.get("pad_token_id", model.config.text_config.pad_token_id) == int(inputs["input_ids"][0, -1]):
        # Without a mask this prompt would look padded on the right.
        inputs.setdefault("attention_mask", torch.ones_like(inputs["input_ids"]))
    return inputs, options


def assert_as_plain(model: Any, inputs: dict[str, Any], options: dict[str, Any]) -> Tensor:
    """Assert that `model.generate` gives the ids that `plain_generate` gives, and a streamer the same ones.

    Returns:
        `(answers, longest)` new tokens.
    """
    expected = plain_generate(model, inputs, **options)
    generator, streamer = options.get("generator"), options.get("streamer")
    state = None if generator is None else generator.get_state()
    if streamer is not None:
        streamer.received.clear()
    ids = model.generate(**inputs, **options)
    if generator is not None:
        generator.set_state(state)
    assert torch.equal(ids, expected), f"{options}\n{ids}\n{expected}"
    columns = inputs["input_ids"].shape[1]
    if streamer is not None:
        prompt, *tokens, end = streamer.received
        assert torch.equal(prompt, inputs["input_ids"]) and end == "end"
        assert torch.equal(torch.cat(tokens), ids[0, columns:]), options
    return ids[:, columns:]


def _inputs(dice: _Dice, model: Any, rows: int) -> dict[str, Any]:
    audio_token, vocab_size = model.config.audio_token_index, model.config.text_config.vocab_size

    def text(tokens: int) -> Tensor:
        ids = torch.randint(0, vocab_size, (tokens,), generator=dice.rng)
        return ids.masked_fill(ids == audio_token, 1)

    prompts, lengths = [], []
    share_with_audio = dice.one_of(0.0, 0.5, 0.5, 1.0)
    for _ in range(rows):
        audio_tokens = 0
        if dice.happens(share_with_audio):
            lengths.append(dice.integer(1, 80))
            audio_tokens = model.projector.tokens(lengths[-1])
        before, after = text(dice.integer(0, _LONGEST_PROMPT)), text(dice.integer(1, _LONGEST_PROMPT))
        prompts.append(torch.cat((before, torch.full((audio_tokens,), audio_token), after)))
    width = max(map(len, prompts)) + dice.one_of(0, 0, 3)
    # What the mask hides must not matter, so it is not only the padding token.
    inputs = {"input_ids": text(rows * width).view(rows, width), "attention_mask": torch.zeros(rows, width, dtype=torch.int64)}
    for row, prompt in enumerate(prompts):
        inputs["input_ids"][row, width - len(prompt) :] = prompt
        inputs["attention_mask"][row, width - len(prompt) :] = 1
    if rows == 1 and len(prompts[0]) == width and dice.happens(0.5):
        del inputs["attention_mask"]
    if lengths:
        inputs["input_features"] = torch.randn(len(lengths), max(lengths), model.config.encoder_config.input_dim, generator=dice.rng)
        inputs["input_features_lengths"] = lengths
    return inputs


def _options(dice: _Dice, model: Any, last_tokens: list[int]) -> dict[str, Any]:
    vocab_size, emitted = model.config.text_config.vocab_size, _emitted(model)
    ends = {dice.one_of(*emitted) for _ in range(dice.integer(0, 6))}
    if dice.happens(0.2):
        ends |= {dice.integer(0, vocab_size + 5) for _ in range(vocab_size // 8)}  # some of them outside the vocabulary
    options: dict[str, Any] = {"max_new_tokens": dice.integer(1, _MOST_NEW_TOKENS), "eos_token_id": sorted(ends)}
    if len(ends) == 1 and dice.happens(0.5):
        options["eos_token_id"] = ends.pop()
    if dice.happens(0.5):
        options["pad_token_id"] = dice.integer(0, vocab_size - 1)
    if dice.happens(0.4):
        options["min_new_tokens"] = dice.integer(0, 12)
    if dice.happens(0.4):
        options["repetition_penalty"] = dice.one_of(0.8, 1.1, 1.3, 2.0)
    if dice.happens(0.5):
        options |= _sampling(dice, vocab_size)
    if dice.happens(0.25):
        options |= {"tokenizer": _tokenizer(), "stop_strings": _stop_strings(dice, emitted, last_tokens)}
    if len(last_tokens) == 1 and options.get("num_return_sequences", 1) == 1 and dice.happens(0.8):
        options["streamer"] = Recorder()
    return options


def _sampling(dice: _Dice, vocab_size: int) -> dict[str, Any]:
    options = {"do_sample": True, "generator": torch.Generator().manual_seed(dice.integer(0, 1 << 30))}
    if dice.happens(0.5):
        options["temperature"] = dice.one_of(0.3, 0.7, 1.5)
    if dice.happens(0.6):
        options["top_k"] = dice.one_of(0, 0, 1, 5, 20, vocab_size + 3)
    if dice.happens(0.5):
        options["top_p"] = dice.one_of(1e-8, 0.2, 0.6, 0.9)
    if dice.happens(0.4):
        options["num_return_sequences"] = dice.integer(2, 3)
    return options


def _stop_strings(dice: _Dice, emitted: list[int], last_tokens: list[int]) -> list[str]:
    """ASCII text of one or two tokens that the model emitted in turn; sometimes of a prompt's last token, which must not end its row."""
    places = [dice.integer(0, len(emitted) - 2) for _ in range(dice.integer(1, 3))]
    choices = [emitted[place : place + dice.integer(1, 2)] for place in places]
    if dice.happens(0.5):
        choices.append([dice.one_of(*last_tokens)])
    texts = ["".join(_tokenizer().decode([one]) for one in choice) for choice in choices]
    return [one if one and one.isascii() else "e" for one in texts]


def _emitted(model: Any) -> list[int]:
    """Tokens that the model emits after random prompts, as often as it does: ends to choose from."""
    if model not in _EMITTED:
        dice = _Dice(10**6)
        inputs = _inputs(dice, model, 12)
        columns = inputs["input_ids"].shape[1]
        sampling = {"do_sample": True, "generator": dice.rng}
        runs = [plain_generate(model, inputs, max_new_tokens=12, eos_token_id=[], **options) for options in ({}, sampling)]
        _EMITTED[model] = torch.cat([ids[:, columns:].flatten() for ids in runs]).tolist()
    return _EMITTED[model]


@functools.cache
def _tokenizer() -> GraniteSpeechTokenizer:
    with tempfile.TemporaryDirectory() as folder:
        write_tokenizer(folder)
        return GraniteSpeechTokenizer.from_folder(folder)
