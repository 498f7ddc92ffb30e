"""Random requests for an engine, and what `generate` answers to them one by one."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from granite_speech.engine.handle import Answer, Handle
from granite_speech.engine.requests import Prompt, Request, engine_options

__all__ = ["RandomRequest", "assert_as_generate", "assert_own_logprobs", "paused", "random_request"]

# Prompts begin with one of these, so that some of their first pages are equal.
_BEGINNINGS = (0, 7, 16, 45)


@dataclass(frozen=True)
class RandomRequest:
    """Arguments of `Engine.submit`, and what they ask for in terms of `generate`.

    Attributes:
        inputs: of one prompt, as the processor returns them.
        options: of both.
    """

    inputs: dict[str, Any]
    options: dict[str, Any]

    def for_worker(self, model: Any) -> Request:
        """The request as an engine hands it to its worker, for tests that run turns themselves."""
        prompt, seed = Prompt.of(model, self.inputs), self.options.get("seed", 0)
        return Request(prompt, engine_options(self.options, model, len(prompt.ids)), seed, Handle(None, str), None)


def random_request(seed: int, model: Any, *, sample: bool = False, longest: int = 40, on: str = "cpu") -> RandomRequest:
    """One prompt with up to two clips or none, and options; about one in eight prompts ends with audio, and some have one token.

    Args:
        seed: the same one gives the same request.
        model: float32.
        sample: draw tokens.
        longest: most new tokens.
        on: the model's device.
    """
    rng = torch.Generator().manual_seed(seed)

    def integer(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (), generator=rng))

    vocab_size, audio = model.config.text_config.vocab_size, model.config.audio_token_index

    def text(tokens: int, source: torch.Generator) -> Tensor:
        ids = torch.randint(0, vocab_size, (tokens,), generator=source)
        return ids.masked_fill(ids == audio, 1)

    beginning = text(_BEGINNINGS[integer(0, 3)], torch.Generator().manual_seed(integer(0, 1)))
    clips = [integer(1, 120) for _ in range((0, 1, 1, 1, 2)[integer(0, 4)])]
    pieces = [beginning, text(integer(0, 9), rng)]
    for frames in clips:
        pieces += [torch.full((model.projector.tokens(frames),), audio), text(integer(0, 6) if integer(0, 1) else 0, rng)]
    ids = torch.cat(pieces)
    ids = ids if len(ids) else text(1, rng)
    # With a mask, since `generate` takes the padding token for padding without one.
    inputs: dict[str, Any] = {"input_ids": ids.unsqueeze(0), "attention_mask": torch.ones(1, len(ids), dtype=torch.int64)}
    if clips:
        inputs["input_features"] = torch.randn(len(clips), max(clips), model.config.encoder_config.input_dim, generator=rng)
        inputs["input_features_lengths"] = clips
    ends = sorted({integer(0, vocab_size - 1) for _ in range(integer(0, 9))})
    options: dict[str, Any] = {"max_new_tokens": integer(1, longest), "eos_token_id": ends}
    if integer(0, 3) == 0:
        options["repetition_penalty"] = (0.8, 1.2, 1.7)[integer(0, 2)]
    if integer(0, 3) == 0:
        options["min_new_tokens"] = integer(0, 12)
    if sample:
        options |= {"seed": integer(0, 1 << 40), "temperature": (0.7, 1.0, 1.5)[integer(0, 2)], "top_k": (0, 1, 5, 20)[integer(0, 3)]}
        options |= {"top_p": 0.8} if integer(0, 1) else {}
    return RandomRequest({name: one.to(on) if isinstance(one, Tensor) else one for name, one in inputs.items()}, options)


@contextmanager
def paused(engine: Any) -> Iterator[None]:
    """Keep the engine's worker from beginning what is submitted in the block, so that it all comes at once."""
    paused, resume = threading.Event(), threading.Event()

    def wait(worker: Any) -> None:
        paused.set()
        resume.wait(60)

    thread = threading.Thread(target=engine._loop.call, args=(wait,))
    thread.start()
    assert paused.wait(60)
    try:
        yield
    finally:
        resume.set()
        thread.join(60)


def assert_as_generate(model: Any, request: RandomRequest, answer: Answer) -> None:
    """Assert that an answer has the ids of greedy `generate`, or begins with them if it was cancelled.

    Where they part, the two best scores must be within 1e-4: then either token is right, and the rest is not compared. Its
    log-probabilities must be the model's own.
    """
    assert_own_logprobs(model, request.inputs, answer)
    given = {"output_scores": True, "return_dict_in_generate": True}
    output = model.generate(**request.inputs, **request.options, **given)
    expected = output.sequences[0, request.inputs["input_ids"].shape[1] :].tolist()
    got = answer.token_ids
    complete = answer.finish_reason != "cancelled"
    if got == (expected if complete else expected[: len(got)]):
        ends_itself = bool(expected) and expected[-1] in request.options["eos_token_id"]
        assert not complete or answer.finish_reason == ("stop" if ends_itself else "length")
        return
    place = next((number for number, (one, other) in enumerate(zip(got, expected, strict=False)) if one != other), None)
    assert place is not None, f"{len(got)} tokens in place of {len(expected)}: {request.options}"
    best = output.scores[place][0].topk(2).values
    assert best[0] - best[1] < 1e-4, f"{got}\n{expected}\n{request.options}"


@torch.no_grad()
def assert_own_logprobs(model: Any, inputs: dict[str, Any], answer: Answer) -> None:
    """Assert that the log-probabilities of an answer are those of one pass over prompt and answer, before any rule changed the logits.

    An audio token in an answer has its own embedding, but in a prompt a clip's: what follows it is not compared.
    """
    audio, tokens = model.config.audio_token_index, answer.token_ids
    assert len(answer.logprobs) == len(tokens)
    compared = torch.tensor(tokens[: tokens.index(audio) + 1] if audio in tokens else tokens, dtype=torch.int64)
    if len(compared):
        before = inputs["input_ids"]
        ids = torch.cat((before, compared[None, :-1].to(before.device)), dim=1)
        given = {name: one for name, one in inputs.items() if name != "attention_mask"} | {"input_ids": ids}
        logprobs = model(**given, logits_to_keep=len(compared)).logits[0].float().log_softmax(-1).cpu()
        expected = logprobs.gather(1, compared[:, None])[:, 0]
        torch.testing.assert_close(torch.tensor(answer.logprobs[: len(compared)]), expected, rtol=1e-4, atol=1e-4)
