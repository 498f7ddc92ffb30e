"""Handles: answers, tokens as they arrive, and cancelling, from threads and from asyncio."""

import asyncio
import gc
import random
import threading
import weakref

import pytest

from bench.embedded import recorded_clips
from granite_speech import Engine, GraniteSpeechForConditionalGeneration, GraniteSpeechProcessor
from granite_speech.engine import prompt_queue, worker
from granite_speech.engine.decode_rows import DecodeRows
from granite_speech.engine.encoder_queue import EncoderQueue
from granite_speech.inputs.requests import transcript_request
from tests.support.engine_requests import MODEL, TIMEOUT, Gate, answer, in_thread, is_at_rest, length, prompt, spoken_prompt


@pytest.fixture
def engine():
    engine = Engine(MODEL, None, max_rows=4, max_pages=64)
    yield engine
    in_thread(engine.close, True).result(TIMEOUT)


# --- threads ---------------------------------------------------------------------------------------------------------------------


def test_eight_threads_get_the_answers_to_their_own_requests():
    model, processor = (one.from_pretrained("embedded") for one in (GraniteSpeechForConditionalGeneration, GraniteSpeechProcessor))
    clips, _ = recorded_clips()
    inputs = [processor(transcript_request(processor), clip) for clip in clips]
    expected = [model.eval().generate(**one, max_new_tokens=50)[0, one["input_ids"].shape[1] :].tolist() for one in inputs]
    assert len(set(map(tuple, expected))) > 8
    barrier = threading.Barrier(8)

    def ask(thread):
        barrier.wait(TIMEOUT)
        mine = [(thread + 3 * place) % len(clips) for place in range(4)]
        handles = [engine.submit(audio=clips[one], max_new_tokens=50) for one in mine]
        return [(one, handle.result(TIMEOUT)) for one, handle in zip(mine, handles, strict=True)]

    with Engine(model, processor, max_rows=6) as engine:
        asked = [in_thread(ask, thread) for thread in range(8)]
        answers = [one for each in asked for one in each.result(TIMEOUT)]
    assert [given.token_ids for _, given in answers] == [expected[one] for one, _ in answers]
    assert all(given.text == processor.decode(expected[one], skip_special_tokens=True) for one, given in answers)
    assert is_at_rest(engine)


def test_tokens_arrive_before_the_last_one_is_computed(engine):
    expected = answer(prompt(1), **length(9))
    with Gate(DecodeRows, "step", call=6) as gate:
        handle = engine.submit(inputs=prompt(1), **length(9))
        tokens = iter(handle)
        assert [next(tokens) for _ in range(5)] == expected[:5]
        gate.wait()
        assert not handle.done
        with pytest.raises(TimeoutError):
            handle.result(timeout=0)
        gate.open()
        assert list(tokens) == expected[5:]
    assert handle.done
    assert handle.result().token_ids == list(handle) == list(handle) == expected


def test_several_threads_iterate_over_one_handle(engine):
    expected = answer(prompt(2), **length(30))
    with Gate(DecodeRows, "step", call=4) as gate:
        handle = engine.submit(inputs=prompt(2), **length(30))
        lists = [in_thread(list, handle) for _ in range(4)]
        gate.wait()
        lists.append(in_thread(list, handle))
        gate.open()
        assert [one.result(TIMEOUT) for one in lists] == [expected] * 5


def test_no_new_tokens(engine):
    handle = engine.submit(inputs=prompt(1), max_new_tokens=0)
    assert (handle.done, handle.cancel(), list(handle)) == (True, False, [])
    assert handle.result().finish_reason == "length"


# --- asyncio ---------------------------------------------------------------------------------------------------------------------


def test_awaited_and_iterated_in_tasks(engine):
    async def tokens_of(handle):
        return [token async for token in handle]

    async def ask(seed):
        handle = engine.submit(inputs=prompt(seed), **length(5 + seed))
        tokens, given, again = await asyncio.gather(tokens_of(handle), handle, tokens_of(handle))
        late, end = await tokens_of(handle), await handle
        assert tokens == again == late == given.token_ids == end.token_ids == handle.result().token_ids
        return tokens

    async def ask_all():
        return await asyncio.wait_for(asyncio.gather(*map(ask, range(12))), TIMEOUT)

    assert asyncio.run(ask_all()) == [answer(prompt(seed), **length(5 + seed)) for seed in range(12)]


def test_a_task_gets_tokens_as_they_arrive(engine):
    async def first(handle, count):
        tokens = []
        async for token in handle:
            tokens.append(token)
            if len(tokens) == count:
                return tokens

    with Gate(DecodeRows, "step", call=4) as gate:
        handle = engine.submit(inputs=prompt(3), **length(8))
        tokens = asyncio.run(asyncio.wait_for(first(handle, 3), TIMEOUT))
        assert not handle.done
        gate.open()
    assert tokens == answer(prompt(3), **length(8))[:3]
    assert handle.result(TIMEOUT).finish_reason == "length"  # leaving the loop cancels nothing


async def _await(handle):
    await handle


async def _iterate(handle):
    async for _ in handle:
        pass


@pytest.mark.parametrize("use", [_await, _iterate])
@pytest.mark.parametrize("how", ["task.cancel", "wait_for"])
def test_a_cancelled_task_cancels_its_request(engine, use, how):
    async def cancel(handle, gate):
        if how == "wait_for":
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(use(handle), 0.05)
            return
        task = asyncio.create_task(use(handle))
        await asyncio.to_thread(gate.wait)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    with Gate(DecodeRows, "step", call=4) as gate:
        handle, other = (engine.submit(inputs=prompt(seed), **length(200)) for seed in (4, 5))
        asyncio.run(cancel(handle, gate))
        gate.open()
        given = handle.result(TIMEOUT)
    expected = answer(prompt(4), **length(200))
    assert given.finish_reason == "cancelled"
    assert len(given.token_ids) < 200
    assert given.token_ids == expected[: len(given.token_ids)]
    assert other.result(TIMEOUT).token_ids == answer(prompt(5), **length(200))
    assert engine.counters().cancelled == 1
    assert is_at_rest(engine)


def test_an_event_loop_that_closes_before_the_answer_does_no_harm(engine):
    loop = asyncio.new_event_loop()
    loop.set_exception_handler(lambda *_: None)  # it complains about tasks that never end
    with Gate(DecodeRows, "step", call=2) as gate:
        handle = engine.submit(inputs=prompt(6), **length(10))
        tasks = [loop.create_task(use(handle)) for use in (_await, _iterate)]
        loop.run_until_complete(asyncio.sleep(0))
        gate.wait()
        loop.run_until_complete(asyncio.sleep(0))
        loop.close()
        gate.open()
        assert handle.result(TIMEOUT).token_ids == answer(prompt(6), **length(10))
    assert not any(task.done() for task in tasks)
    assert engine.submit(inputs=prompt(7), **length(3)).result(TIMEOUT).token_ids == answer(prompt(7), **length(3))


# --- cancelling ------------------------------------------------------------------------------------------------------------------

STAGES = {  # where the engine's thread is when the request is cancelled, and how many tokens the request then has
    "encoding": (EncoderQueue, "encode", 1, 0),
    "encoding a long clip": (EncoderQueue, "advance", 2, 0),
    "prefill": (worker, "prefill_piece", 2, 0),
    "first step": (DecodeRows, "step", 1, 1),
    "decode": (DecodeRows, "step", 5, 5),
}


@pytest.mark.parametrize("stage", STAGES)
def test_cancelled_in(monkeypatch, stage):
    owner, name, call, tokens = STAGES[stage]
    monkeypatch.setitem(prompt_queue._TOKENS, "cpu", 8)
    inputs, options = spoken_prompt(1, frames=300), length(12)
    expected = answer(inputs, **options)
    with Engine(MODEL, None, max_rows=2, max_pages=64) as engine:
        if stage == "encoding a long clip":
            engine._loop.worker._encoder._frames = 100
        with Gate(owner, name, call) as gate:
            handle = engine.submit(inputs=inputs, **options)
            gate.wait()
            assert handle.cancel()
            assert handle.cancel()  # not ended yet
            gate.open()
            given = handle.result(TIMEOUT)
        assert (given.finish_reason, given.token_ids) == ("cancelled", expected[:tokens])
        assert list(handle) == given.token_ids
        assert not handle.cancel()
        assert (engine.counters().submitted, engine.counters().cancelled) == (1, 1)
        assert is_at_rest(engine)
        again = [engine.submit(inputs=inputs, **options) for _ in range(3)]
        assert [one.result(TIMEOUT).token_ids for one in again] == [expected] * 3
    assert is_at_rest(engine)


def test_cancelled_while_it_waits_for_a_row():
    with Engine(MODEL, None, max_rows=1, max_pages=64) as engine, Gate(DecodeRows, "step", call=3) as gate:
        first, second, third = (engine.submit(inputs=prompt(seed), **length(8)) for seed in (1, 2, 3))
        gate.wait()
        assert second.cancel()
        gate.open()
        assert second.result(TIMEOUT).token_ids == []
        assert [one.result(TIMEOUT).token_ids for one in (first, third)] == [answer(prompt(seed), **length(8)) for seed in (1, 3)]
        assert is_at_rest(engine)


def test_cancelled_after_the_end(engine):
    handle = engine.submit(inputs=prompt(1), **length(3))
    given = handle.result(TIMEOUT)
    assert not handle.cancel()
    assert handle.result() == given
    assert given.finish_reason == "length"
    assert engine.counters().cancelled == 0


def test_cancelled_at_any_moment_from_several_threads(engine):
    kinds = [(prompt(1), 6), (prompt(2, tokens=40), 9), (spoken_prompt(3, frames=60), 5), (prompt(4), 20)]
    expected = [answer(inputs, **length(tokens)) for inputs, tokens in kinds]

    def ask(thread):
        chance, reasons = random.Random(thread), []
        for _ in range(30):
            kind = chance.randrange(len(kinds))
            handle = engine.submit(inputs=kinds[kind][0], **length(kinds[kind][1]))
            stop, tokens = chance.randrange(12), iter(handle)
            for _ in range(stop):
                next(tokens, None)
            if stop < 10:
                handle.cancel()
            given = handle.result(TIMEOUT)
            assert given.token_ids == expected[kind][: len(given.token_ids)]
            assert given.finish_reason == "cancelled" or given.token_ids == expected[kind]
            reasons.append(given.finish_reason)
        return reasons

    asked = [in_thread(ask, thread) for thread in range(4)]
    reasons = [one for each in asked for one in each.result(TIMEOUT)]
    assert is_at_rest(engine)
    assert set(reasons) == {"cancelled", "length"}
    assert (engine.counters().cancelled, engine.counters().finished) == (reasons.count("cancelled"), reasons.count("length"))


def test_an_ended_request_is_forgotten_even_if_its_handle_is_not(engine):
    """Handles may be kept for their answers; features and vectors of audio must not be."""
    inputs = spoken_prompt(1, frames=60)
    with Gate(DecodeRows, "step") as gate:
        handles = [engine.submit(inputs=inputs, **length(3))]
        gate.wait()
        handles += [engine.submit(inputs=inputs, **length(3)) for _ in range(2)]
        requests = [weakref.ref(one) for one in (*engine._loop.worker.requests(), *engine._loop._new)]
        handles[1].cancel()
    for handle in handles:
        handle.result(TIMEOUT)
    engine.submit(inputs=prompt(1), **length(1)).result(TIMEOUT)  # so that the worker's variables refer to another one
    gc.collect()
    assert len(requests) == 3
    assert [one() for one in requests] == [None] * 3
