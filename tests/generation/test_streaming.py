"""A streamer's `end` is always called, because a thread that reads from it must not wait forever."""

from queue import Queue
from threading import Thread

import pytest
import torch

from granite_speech.errors import InputError
from tests.support.small_models import small_model

PROMPT = torch.tensor([[3, 4, 5]])


class Recorder:
    """Counts a streamer's calls, and raises in the given `put` call."""

    def __init__(self, raises_at: int | None = None):
        self.raises_at, self.put_calls, self.ends = raises_at, 0, 0

    def put(self, ids: torch.Tensor) -> None:
        self.put_calls += 1
        if self.put_calls == self.raises_at:
            raise BrokenPipeError("the reader has left")

    def end(self) -> None:
        self.ends += 1


def test_end_is_called_once():
    streamer = Recorder()
    small_model().generate(PROMPT, streamer=streamer, max_new_tokens=4, eos_token_id=[])
    assert (streamer.put_calls, streamer.ends) == (5, 1)


def test_end_is_called_after_an_error_in_a_step(monkeypatch):
    model, streamer = small_model(), Recorder()
    head, calls = model.lm_head.forward, []

    def failing(hidden: torch.Tensor) -> torch.Tensor:
        calls.append(hidden)
        if len(calls) == 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return head(hidden)

    monkeypatch.setattr(model.lm_head, "forward", failing)
    with pytest.raises(torch.OutOfMemoryError):
        model.generate(PROMPT, streamer=streamer, max_new_tokens=9, eos_token_id=[])
    assert (streamer.put_calls, streamer.ends) == (3, 1)


@pytest.mark.parametrize("raises_at", [1, 3])
def test_end_is_called_after_an_error_in_the_streamer(raises_at):
    streamer = Recorder(raises_at)
    with pytest.raises(BrokenPipeError):
        small_model().generate(PROMPT, streamer=streamer, max_new_tokens=9, eos_token_id=[])
    assert (streamer.put_calls, streamer.ends) == (raises_at, 1)


@pytest.mark.parametrize(
    "call",
    [
        {"input_ids": PROMPT, "no_such_option": 1},
        {"input_ids": PROMPT, "max_new_tokens": -1},
        {"input_ids": torch.tensor([[3, 200]])},
        {"input_ids": PROMPT, "num_beams": 2},
        {"input_ids": [[3, 4, 5]]},
        {"input_ids": PROMPT, "attention_mask": torch.tensor([[1, 1, 0]])},
    ],
    ids=["unknown option", "bad option", "bad id", "beams", "a list", "padding on the right"],
)
def test_end_is_called_after_refused_arguments(call):
    streamer = Recorder()
    with pytest.raises(InputError):
        small_model().generate(**call, streamer=streamer)
    assert streamer.ends == 1


def test_a_reader_in_another_thread_is_not_left_waiting():
    from transformers import TextIteratorStreamer

    class Tokenizer:
        def decode(self, ids, **options) -> str:
            return "".join(f"{int(one)} " for one in ids)

    model, errors = small_model(), Queue()
    streamer = TextIteratorStreamer(Tokenizer(), timeout=10)

    def answer() -> None:
        try:
            model.generate(torch.tensor([[3, 200]]), streamer=streamer)
        except InputError as error:
            errors.put(error)

    thread = Thread(target=answer)
    thread.start()
    assert "".join(streamer).strip() in ("", "3 200")
    thread.join()
    assert "token id 200" in str(errors.get())
