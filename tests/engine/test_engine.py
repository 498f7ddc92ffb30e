"""An engine's tokens: those of `generate`, whatever else the engine does, and however few pages it has."""

import random

import pytest
import torch

from bench.embedded import recorded_clips
from granite_speech import Engine, GraniteSpeechForConditionalGeneration, GraniteSpeechProcessor
from granite_speech.engine.worker import Worker
from granite_speech.inputs.requests import transcript_request
from tests.support.random_requests import RandomRequest, assert_as_generate, assert_own_logprobs, paused, random_request
from tests.support.small_models import attentive, small_model

MODEL = attentive(small_model())
PAGE = 16


def pages_of(request) -> int:
    """Pages that a request needs on its own."""
    return -(-(request.inputs["input_ids"].shape[1] + request.options["max_new_tokens"] - 1) // PAGE)


def submit(engine, request):
    return engine.submit(inputs=request.inputs, **request.options)


def answers(engine, requests):
    """Of requests that come at once."""
    with paused(engine):
        handles = [submit(engine, one) for one in requests]
    return [handle.result(60) for handle in handles]


def assert_at_rest(engine):
    """Nothing is left of any request."""
    counters = engine.counters()
    assert (counters.waiting, counters.prefilling, counters.decoding, counters.pages_used) == (0, 0, 0, 0)
    assert counters.submitted == counters.finished + counters.cancelled + counters.failed


@pytest.mark.parametrize(("seed", "max_rows", "max_pages"), [(0, 32, 2000), (1, 5, 60), (2, 9, 14), (3, 1, 2000), (4, 64, 14)])
def test_random_requests_in_random_order_with_random_cancellations_get_the_tokens_of_generate(seed, max_rows, max_pages):
    dice = random.Random(seed)
    requests = [random_request(1000 * seed + number, MODEL) for number in range(60)]
    dice.shuffle(requests)
    assert max(map(pages_of, requests)) <= max_pages
    with Engine(MODEL, None, max_rows=max_rows, max_pages=max_pages) as engine:
        handles = []
        for request in requests:
            handles.append(submit(engine, request))
            if dice.random() < 0.3:
                dice.choice(handles).cancel()
            if dice.random() < 0.05:
                dice.choice(handles).result(60)
        got = [handle.result(60) for handle in handles]
        assert_at_rest(engine)
    for request, answer in zip(requests, got, strict=True):
        assert_as_generate(MODEL, request, answer)
    assert sum(answer.finish_reason != "cancelled" for answer in got) > 30


@pytest.mark.parametrize("sample", [False, True], ids=["greedy", "with a seed"])
def test_a_request_gets_the_same_tokens_alongside_any_others(sample):
    wanted = [random_request(number, MODEL, sample=sample) for number in range(5)]
    with Engine(MODEL, None, max_rows=8, max_pages=200) as engine:
        alone = [submit(engine, one).result(60).token_ids for one in wanted]
        for number in range(20):
            dice = random.Random(number)
            others = [random_request(100 * number + one, MODEL, sample=dice.random() < 0.5) for one in range(12)]
            mixture = [*wanted, *others]
            dice.shuffle(mixture)
            got = dict(zip(map(id, mixture), answers(engine, mixture), strict=True))
            assert [got[id(one)].token_ids for one in wanted] == alone


def test_a_seed_decides_what_is_drawn():
    request = random_request(3, MODEL, sample=True)
    options = request.options | {"max_new_tokens": 30, "eos_token_id": [], "temperature": 1.5, "top_k": 0}
    with Engine(MODEL, None) as engine:

        def drawn(**changes):
            return engine.submit(inputs=request.inputs, **options | changes).result(60).token_ids

        assert drawn(seed=1) == drawn(seed=1)
        assert len({tuple(drawn(seed=seed)) for seed in (1, 2, -1, (1 << 64) - 2, 1 << 32)}) == 5
        torch.manual_seed(0)
        first = drawn(seed=None)
        assert drawn(seed=None) != first
        torch.manual_seed(0)
        assert drawn(seed=None) == first


def test_drawn_tokens_have_the_probabilities_of_the_model():
    """The first token of many seeds, against the softmax of the logits."""
    request = random_request(0, MODEL)
    logits = MODEL(**request.inputs).logits[0, -1]
    with Engine(MODEL, None, max_rows=64) as engine:
        handles = [engine.submit(inputs=request.inputs, seed=seed, temperature=2.0, top_k=0, max_new_tokens=1) for seed in range(2000)]
        drawn = torch.tensor([handle.result(60).token_ids[0] for handle in handles])
    expected = (logits / 2).softmax(-1)
    counts = torch.bincount(drawn, minlength=len(expected)) / len(drawn)
    # Each count has a standard deviation of sqrt(p (1 − p) / n).
    assert ((counts - expected).abs() <= 5 * (expected * (1 - expected) / len(drawn)).sqrt() + 1e-3).all()


def test_sampling_options_are_those_of_generate():
    request = random_request(5, MODEL)
    greedy = request.options | {"max_new_tokens": 12, "eos_token_id": []}
    with Engine(MODEL, None) as engine:

        def ids(**options):
            return engine.submit(inputs=request.inputs, **greedy | options).result(60).token_ids

        assert ids() == ids(temperature=0) == ids(temperature=0.0, top_p=0.5, seed=3) == ids(top_k=1, seed=4) == ids(do_sample=False)
        assert ids(seed=1, top_k=0, temperature=3.0) != ids()
        assert ids(seed=1, do_sample=False) == ids()


def test_a_pool_with_room_for_one_request_still_finishes_all():
    requests = [random_request(number, MODEL) for number in range(40)]
    with Engine(MODEL, None, max_rows=16, max_pages=max(map(pages_of, requests))) as engine:
        got = answers(engine, requests)
        assert engine.counters().preempted > 0
        assert_at_rest(engine)
    for request, answer in zip(requests, got, strict=True):
        assert_as_generate(MODEL, request, answer)


def test_requests_that_lose_their_pages_draw_the_same_tokens():
    requests = [random_request(number, MODEL, sample=True) for number in range(30)]
    with Engine(MODEL, None, max_pages=2000) as roomy, Engine(MODEL, None, max_pages=max(map(pages_of, requests))) as tight:
        expected, got = answers(roomy, requests), answers(tight, requests)
        assert tight.counters().preempted > 0 == roomy.counters().preempted
    assert [one.token_ids for one in expected] == [one.token_ids for one in got]
    for request, answer in zip(requests, got, strict=True):
        assert_own_logprobs(MODEL, request.inputs, answer)


def test_an_answer_that_the_pages_cannot_hold_ends_with_length():
    inputs = {"input_ids": torch.arange(20).unsqueeze(0)}
    with Engine(MODEL, None, max_pages=2) as engine:
        answer = engine.submit(inputs=inputs, max_new_tokens=1000, eos_token_id=[]).result(60)
        assert (len(answer.token_ids), answer.finish_reason) == (2 * PAGE - 20 + 1, "length")


def with_beginning(beginning, number, *, audio=True):
    """A prompt of these tokens, a clip or none, and three more tokens."""
    rng = torch.Generator().manual_seed(number)
    clip = torch.full((MODEL.projector.tokens(30),), MODEL.config.audio_token_index) if audio else torch.empty(0, dtype=torch.int64)
    ids = torch.cat((beginning, clip, torch.randint(0, 80, (3,), generator=rng)))
    inputs = {"input_ids": ids.unsqueeze(0)}
    if audio:
        inputs["input_features"] = torch.randn(1, 30, MODEL.config.encoder_config.input_dim, generator=rng)
    return RandomRequest(inputs, {"max_new_tokens": 10, "eos_token_id": []})


def test_the_pages_of_a_common_beginning_are_computed_once_and_shared():
    """45 tokens fill two pages of 16."""
    beginning = torch.arange(45)
    requests = [with_beginning(beginning, number) for number in range(10)]
    with Engine(MODEL, None, max_rows=8) as engine:
        got = answers(engine, requests)
        counters = engine.counters()
        assert counters.shared_tokens == 9 * 2 * PAGE
        # All tokens but the last of each prompt, which the decode step runs.
        assert counters.prompt_tokens == sum(one.inputs["input_ids"].shape[1] - 1 for one in requests) - counters.shared_tokens
        text = MODEL.config.text_config
        assert counters.shared_bytes == counters.shared_tokens * 2 * 4 * text.num_hidden_layers * text.num_key_value_heads * 8
        assert counters.pages_remembered == 2
        assert_at_rest(engine)
    for request, answer in zip(requests, got, strict=True):
        assert_as_generate(MODEL, request, answer)


def test_a_prompt_without_audio_shares_nothing_with_one_that_has_the_adapter():
    beginning = torch.arange(45)
    mixture = [with_beginning(beginning, 0), with_beginning(beginning, 1, audio=False), with_beginning(beginning + 1, 2)]
    with Engine(MODEL, None) as engine:
        got = answers(engine, mixture)
        assert engine.counters().shared_tokens == 0
        assert [one.token_ids for one in answers(engine, mixture)] == [one.token_ids for one in got]
        assert engine.counters().shared_tokens == 6 * PAGE
    for request, answer in zip(mixture, got, strict=True):
        assert_as_generate(MODEL, request, answer)


def test_beginnings_are_forgotten_when_pages_run_short_and_computed_again():
    requests = [with_beginning(torch.arange(45) + 3 * (number % 4), number) for number in range(12)]
    with Engine(MODEL, None, max_rows=2, max_pages=10) as engine:
        for request, answer in zip(requests, answers(engine, requests), strict=True):
            assert_as_generate(MODEL, request, answer)
        assert_at_rest(engine)


@torch.no_grad()
def test_a_cancelled_request_does_not_leave_others_waiting_for_its_beginning(monkeypatch):
    monkeypatch.setattr("granite_speech.engine.prompt_queue._TOKENS", {"cpu": 8, "cuda": 8})
    worker = Worker(MODEL, 4, 100)
    first, second = (with_beginning(torch.arange(64), number).for_worker(MODEL) for number in range(2))
    worker.add(first)
    worker.turn()
    worker.add(second)
    worker.turn()
    assert worker.snapshot().prefilling == 1, "the second waits for what the first computes"
    worker.cancel(first)
    for _ in range(40):
        worker.turn()
    assert second.handle.done and worker.snapshot().pages_used == 0


@torch.no_grad()
def test_a_prompt_waits_while_answers_in_progress_may_need_the_pages():
    worker = Worker(MODEL, 4, 6)
    requests = [RandomRequest({"input_ids": torch.arange(30).unsqueeze(0) + number}, {"max_new_tokens": 4}) for number in range(3)]
    for one in requests:
        worker.add(one.for_worker(MODEL))
    worker.turn()
    assert (worker.snapshot().decoding, worker.snapshot().waiting) == (2, 1), "two pages each, and one more for each in progress"
    while worker.busy:
        worker.turn()
    assert worker.snapshot().preempted == 0


def test_a_long_clip_does_not_hold_up_a_short_request(monkeypatch):
    """The long clip needs many turns; an answer that came with it is complete before its first token."""
    monkeypatch.setattr("granite_speech.engine.encoder_queue._FRAMES", {"cpu": 64, "cuda": 64})
    monkeypatch.setattr("granite_speech.engine.prompt_queue._TOKENS", {"cpu": 8, "cuda": 8})
    tokens = MODEL.projector.tokens(2000)
    ids = torch.cat((torch.full((tokens,), MODEL.config.audio_token_index), torch.arange(4))).unsqueeze(0)
    long = {"input_ids": ids, "input_features": torch.randn(1, 2000, MODEL.config.encoder_config.input_dim)}
    with Engine(MODEL, None) as engine:
        slow = engine.submit(inputs=long, max_new_tokens=5, eos_token_id=[])
        short = [engine.submit(inputs={"input_ids": torch.arange(5).unsqueeze(0)}, max_new_tokens=3, eos_token_id=[]) for _ in range(4)]
        for one in short:
            one.result(60)
        assert not slow.done
        expected = MODEL.generate(**long, max_new_tokens=5, eos_token_id=[])[0, ids.shape[1] :].tolist()
        assert slow.result(60).token_ids == expected


def of_text(tokens, new_tokens=3):
    ids = torch.arange(tokens).remainder(80).unsqueeze(0)
    return RandomRequest({"input_ids": ids}, {"max_new_tokens": new_tokens, "eos_token_id": []}).for_worker(MODEL)


@torch.no_grad()
def test_short_requests_overtake_long_ones_that_came_just_before():
    worker = Worker(MODEL, 1, 100)
    first, long, short = of_text(5), of_text(500), of_text(6)
    worker.add(first)
    worker.turn()
    worker.add(long)
    worker.add(short)
    while not short.handle.done:
        assert not long.pages
        worker.turn()


@torch.no_grad()
def test_a_long_request_is_not_overtaken_for_ever():
    """Short requests keep coming. The long one begins after about as much work as it needs itself."""
    worker, long, overtaken = Worker(MODEL, 1, 100), of_text(300), 0
    worker.add(of_text(20))
    worker.turn()
    worker.add(long)
    while not long.pages:
        assert overtaken < 40
        if worker.snapshot().waiting < 3:
            worker.add(of_text(20))
            overtaken += 1
        worker.turn()
    assert overtaken > 5


def test_the_bundled_checkpoint_answers_alike_alongside_any_others():
    """Clips, greedily and with a seed, each alone and together with 20 sets of others; greedily also as `generate` answers."""
    model, processor = (one.from_pretrained("embedded") for one in (GraniteSpeechForConditionalGeneration, GraniteSpeechProcessor))
    clips, _ = recorded_clips()
    wanted = [(clip, options) for clip in clips[:4] for options in ({}, {"seed": 7, "temperature": 1.2})]
    request = transcript_request(processor)

    def ids(engine, several):
        with paused(engine):
            handles = [engine.submit(audio=clip, **options) for clip, options in several]
        return [handle.result(60).token_ids for handle in handles]

    with Engine(model, processor, max_rows=12) as engine:
        alone = [ids(engine, [one])[0] for one in wanted]
        for (clip, options), answer in zip(wanted, alone, strict=True):
            inputs = processor(request, clip)
            assert options or model.generate(**inputs, max_new_tokens=60)[0, inputs["input_ids"].shape[1] :].tolist() == answer
        for number in range(20):
            dice = random.Random(number)
            others = [(dice.choice(clips), {"seed": number} if dice.random() < 0.5 else {}) for _ in range(dice.randint(1, 10))]
            order = list(range(len(wanted) + len(others)))
            dice.shuffle(order)
            together = dict(zip(order, ids(engine, [[*wanted, *others][place] for place in order]), strict=True))
            assert [together[place] for place in range(len(wanted))] == alone


def test_stop_strings_and_repetitions_end_an_answer():
    model, processor = (one.from_pretrained("embedded") for one in (GraniteSpeechForConditionalGeneration, GraniteSpeechProcessor))
    ids = processor.tokenizer("seven two five")["input_ids"]
    inputs = {"input_ids": torch.as_tensor(ids).reshape(1, -1)}
    options = {"max_new_tokens": 150, "eos_token_id": []}
    columns = inputs["input_ids"].shape[1]
    free = model.generate(**inputs, **options)[0, columns:].tolist()
    stop = processor.decode(free[4:6])
    expected = model.generate(**inputs, **options, stop_strings=[stop], tokenizer=processor.tokenizer)[0, columns:].tolist()
    with Engine(model, processor) as engine:
        answer = engine.submit(inputs=inputs, stop=stop, **options).result(60)
        assert (answer.token_ids, answer.finish_reason) == (expected, "stop")
        assert len(expected) < len(free)
        assert answer.text == processor.decode(expected, skip_special_tokens=True)
        repeated = engine.submit(inputs=inputs, repetition_penalty=0.5, stop_on_repetition=True, **options).result(60)
        assert repeated.finish_reason == "repeated"
        assert 32 <= len(repeated.token_ids) < 150
        assert engine.submit(inputs=inputs, repetition_penalty=0.5, **options).result(60).finish_reason == "length"
