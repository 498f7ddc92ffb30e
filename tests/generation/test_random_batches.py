"""`generate` against `plain_generate`: random batches with random options, on every checkpoint of the tests."""

from collections import Counter

import pytest
import torch

from granite_speech import GraniteSpeechForConditionalGeneration
from granite_speech.inputs.tokenizer import GraniteSpeechTokenizer
from tests.support.plain_generate import plain_generate
from tests.support.random_batches import Recorder, assert_as_plain, random_batch
from tests.support.random_checkpoint import write_checkpoint
from tests.support.reference_models import SPECS, build_reference, write_released_layout
from tests.support.small_models import attentive, small_model
from tests.support.small_tokenizer import write_tokenizer

SEEDS = range(200)
# Options whose absence must change some answer.
OPTIONS = (
    "min_new_tokens",
    "repetition_penalty",
    "do_sample",
    "temperature",
    "top_k",
    "top_p",
    "stop_strings",
    "pad_token_id",
)


@pytest.fixture(scope="module")
def model() -> GraniteSpeechForConditionalGeneration:
    return attentive(small_model())


@pytest.fixture(scope="module", params=[SPECS[1], SPECS[3], SPECS[4]], ids=lambda spec: spec.name)
def reference_checkpoint(request, tmp_path_factory) -> GraniteSpeechForConditionalGeneration:
    folder = write_released_layout(build_reference(request.param), tmp_path_factory.mktemp("checkpoint"))
    return GraniteSpeechForConditionalGeneration.from_pretrained(folder)


@pytest.mark.parametrize("first", SEEDS[::20])
def test_the_small_model(model, first):
    for seed in range(first, first + 20):
        assert_as_plain(model, *random_batch(seed, model))


def test_rows_that_have_ended_write_no_more_keys(model):
    """Ids do not show it: the host drops what comes after the end."""
    for seed in SEEDS[::5]:
        inputs, options = random_batch(seed, model)
        model.generate(**inputs, **options)
        assert not model.runtime.state.active.any(), options


def test_a_stop_string_begins_before_another_row_has_ended(model, tmp_path):
    """The text of each row stays with its row when another one leaves the batch."""
    write_tokenizer(tmp_path)
    tokenizer = GraniteSpeechTokenizer.from_folder(tmp_path)
    prompts = {"input_ids": torch.arange(15, 24).view(3, 3)}
    free = plain_generate(model, prompts, max_new_tokens=6, eos_token_id=[])[:, 3:]
    strings = [tokenizer.decode([int(free[0, 1])]), "".join(tokenizer.decode([one]) for one in free[1, 1:4].tolist())]
    options = {"max_new_tokens": 6, "eos_token_id": [], "pad_token_id": 95, "stop_strings": strings, "tokenizer": tokenizer}
    assert (assert_as_plain(model, prompts, options) != 95).sum(1).tolist() == [2, 4, 6], strings


def test_reference_checkpoints(reference_checkpoint):
    for seed in range(1000, 1012):
        assert_as_plain(reference_checkpoint, *random_batch(seed, reference_checkpoint))


def test_a_random_checkpoint_with_a_tokenizer(tmp_path):
    model = write_checkpoint(tmp_path)
    for seed in range(2000, 2012):
        assert_as_plain(model, *random_batch(seed, model))


def test_the_embedded_checkpoint():
    model = GraniteSpeechForConditionalGeneration.from_pretrained("embedded")
    for seed in range(3000, 3008):
        assert_as_plain(model, *random_batch(seed, model))


# --- the batches themselves ------------------------------------------------------------------------------------------------------


def steps_until_end(new: torch.Tensor, ends: int | list[int]) -> list[int]:
    """For each row that ended with one of the tokens, after how many."""
    has_end = torch.isin(new, torch.tensor(ends, dtype=torch.int64))
    return [int(row.int().argmax()) + 1 for row in has_end if row.any()]


def test_options_vary_and_rows_end_at_different_steps(model):
    given, steps, rows, kinds, ends_apart = Counter(), Counter(), Counter(), Counter(), 0
    for seed in SEEDS[::2]:
        inputs, options = random_batch(seed, model)
        given.update(list(options))
        rows[len(inputs["input_ids"])] += 1
        audio = (inputs["input_ids"] == model.config.audio_token_index).any(1)
        kinds["mixed" if audio.any() and not audio.all() else "all" if audio.all() else "none"] += 1
        new = model.generate(**inputs, **options)[:, inputs["input_ids"].shape[1] :]
        ended = steps_until_end(new, options["eos_token_id"])
        steps.update(ended)
        ends_apart += len(set(ended)) > 1
        kinds["short"] += new.shape[1] < options["max_new_tokens"]
    assert set(rows) == set(range(1, 7)) and min(rows.values()) >= 5
    assert min(kinds[kind] for kind in ("mixed", "all", "none", "short")) >= 10, kinds
    assert ends_apart >= 20 and len(steps) >= 15 and max(steps) >= 20, (ends_apart, steps)
    wanted = (*OPTIONS, "num_return_sequences", "generator", "tokenizer", "streamer")
    assert min(given[name] for name in wanted) >= 10, given


@pytest.mark.parametrize("name", [*OPTIONS, "attention_mask", "eos_token_id"])
def test_every_option_changes_some_answer(model, name):
    """So a `generate` that ignores it, or applies it wrongly, is found."""
    for seed in SEEDS:
        inputs, options = random_batch(seed, model)
        if name not in (*options, *inputs):
            continue
        expected = plain_generate(model, inputs, **options)
        without = {key: value for key, value in options.items() if key != name}
        if name == "do_sample":
            without = {key: value for key, value in without.items() if key != "num_return_sequences"}
        less = {key: value for key, value in inputs.items() if key != name}
        if not torch.equal(plain_generate(model, less, **without), expected):
            return
    pytest.fail(f"{name} changes nothing")


def test_the_same_seed_gives_the_same_batch(model):
    (inputs, options), (again, same) = (random_batch(5, model) for _ in range(2))
    assert torch.equal(inputs["input_ids"], again["input_ids"])
    assert {key: value for key, value in options.items() if key != "generator"} == {k: v for k, v in same.items() if k != "generator"}
    other, _ = random_batch(6, model)
    assert not torch.equal(inputs["input_ids"][:1, -1:], other["input_ids"][:1, -1:])


class Wrong:
    """A model whose answers or whose streamed tokens have one wrong token."""

    def __init__(self, model, *, streamed: bool):
        self._model, self._streamed = model, streamed

    def __getattr__(self, name):
        return getattr(self._model, name)

    def __call__(self, **inputs):
        return self._model(**inputs)

    def generate(self, streamer=None, **options):
        ids = self._model.generate(streamer=streamer, **options)
        if self._streamed:
            streamer.received[-2] = streamer.received[-2] + 1
        else:
            ids[-1, -1] += 1
        return ids


@pytest.mark.parametrize("streamed", [False, True])
def test_one_wrong_token_is_found(model, streamed):
    seed = next(seed for seed in SEEDS if not streamed or "streamer" in random_batch(seed, model)[1])
    inputs, options = random_batch(seed, model)
    assert_as_plain(model, inputs, options)
    with pytest.raises(AssertionError):
        assert_as_plain(Wrong(model, streamed=streamed), inputs, options)


def test_a_recorder_keeps_what_it_received():
    recorder = Recorder()
    ids = torch.tensor([3])
    recorder.put(ids)
    ids += 1
    recorder.end()
    assert recorder.received == [torch.tensor([3]), "end"]
