"""How an engine ends: closed, forgotten, at the exit of the interpreter, after a fork; and what it counts and uses until then."""

import gc
import subprocess
import sys
import threading
import time
import weakref

import pytest
import torch

from granite_speech import Engine
from granite_speech.engine import cpu_threads, requests
from granite_speech.engine.decode_rows import DecodeRows
from granite_speech.errors import EngineError, InputError
from tests.support.engine_requests import MODEL, TIMEOUT, Gate, answer, in_thread, is_at_rest, length, prompt, spoken_prompt
from tests.support.paths import ROOT
from tests.support.soak import soak


def new_engine(**sizes):
    return Engine(MODEL, None, **{"max_rows": 2, "max_pages": 64} | sizes)


def submit_several(engine, count=5, tokens=12):
    return [engine.submit(inputs=prompt(seed), **length(tokens)) for seed in range(count)]


def thread_of(engine):
    return engine._loop._thread


def begin_to_close(engine, cancel=False):
    """Close in another thread, and return as soon as the engine's thread will see it."""
    closing = in_thread(engine.close, cancel)
    wait_for_close(engine, cancel)
    return closing


def wait_for_close(engine, cancel):
    while not (engine._loop._cancels if cancel else engine._loop._closing):
        time.sleep(0.001)


# --- close -----------------------------------------------------------------------------------------------------------------------


def test_close_finishes_what_there_is():
    engine = new_engine()
    with Gate(DecodeRows, "step", call=3) as gate:
        handles = submit_several(engine)
        gate.wait()
        closing = begin_to_close(engine)
        gate.open()
        closing.result(TIMEOUT)
    assert all(one.done for one in handles)
    assert [one.result().token_ids for one in handles] == [answer(prompt(seed), **length(12)) for seed in range(5)]
    assert not thread_of(engine).is_alive()
    assert is_at_rest(engine)


def test_close_cancels_if_it_is_asked_to():
    engine = new_engine()
    with Gate(DecodeRows, "step", call=3) as gate:
        handles = submit_several(engine)
        gate.wait()
        closing = begin_to_close(engine, cancel=True)
        gate.open()
        closing.result(TIMEOUT)
    assert [one.result(0).finish_reason for one in handles] == ["cancelled"] * 5
    assert handles[0].result(0).token_ids == answer(prompt(0), **length(3))
    assert [one.result(0).token_ids for one in handles[2:]] == [[]] * 3
    assert not thread_of(engine).is_alive()
    assert is_at_rest(engine)


def test_close_cancels_what_another_thread_waits_to_finish():
    engine = new_engine()
    with Gate(DecodeRows, "step", call=3) as gate:
        handles = submit_several(engine)
        gate.wait()
        closing = [begin_to_close(engine), begin_to_close(engine), begin_to_close(engine, cancel=True)]
        gate.open()
        for one in closing:
            one.result(TIMEOUT)
    assert {one.result(0).finish_reason for one in handles} == {"cancelled"}
    assert is_at_rest(engine)


def test_a_block_closes_its_engine():
    with new_engine() as engine:
        handles = submit_several(engine)
    assert [one.result(0).finish_reason for one in handles] == ["length"] * 5
    assert not thread_of(engine).is_alive()


def test_an_error_in_a_block_cancels():
    with Gate(DecodeRows, "step", call=3) as gate, pytest.raises(ZeroDivisionError), new_engine() as engine:
        handles = submit_several(engine)
        gate.wait()
        in_thread(lambda: (wait_for_close(engine, cancel=True), gate.open()))
        raise ZeroDivisionError
    assert {one.result(0).finish_reason for one in handles} == {"cancelled"}
    assert not thread_of(engine).is_alive()


def test_after_close():
    engine = new_engine()
    handle = engine.submit(inputs=prompt(1), **length(3))
    for cancel in (False, False, True):
        engine.close(cancel)
    for call in (lambda: engine.submit(inputs=prompt(1)), engine.warmup, lambda: engine.submit(inputs=prompt(1), max_new_tokens=0)):
        with pytest.raises(EngineError, match=r"a closed engine.*Make a new Engine"):
            call()
    assert handle.result(0).token_ids == list(handle) == answer(prompt(1), **length(3))
    assert not handle.cancel()
    assert engine.counters().finished == 1


def test_close_while_others_submit():
    """A request is either answered or refused."""
    engine, begun = new_engine(max_rows=4), threading.Event()

    def ask(thread):
        for seed in range(10_000):
            try:
                handle = engine.submit(inputs=prompt(seed % 3), **length(4))
            except EngineError:
                return True
            begun.set()
            if seed % 4 == thread:
                assert handle.result(TIMEOUT).token_ids == expected[seed % 3]
            handles.append((seed % 3, handle))
        return False

    expected, handles = [answer(prompt(seed), **length(4)) for seed in range(3)], []
    asked = [in_thread(ask, thread) for thread in range(4)]
    assert begun.wait(TIMEOUT)
    in_thread(engine.close).result(TIMEOUT)
    assert all(one.result(TIMEOUT) for one in asked)
    assert all(one.result(0).token_ids == expected[seed] for seed, one in handles)
    assert engine.counters().submitted == engine.counters().finished == len(handles)


# --- without close ---------------------------------------------------------------------------------------------------------------


def test_an_engine_that_nobody_holds_ends_its_thread():
    engine = new_engine()
    handle = engine.submit(inputs=prompt(1), **length(3))
    expected = handle.result(TIMEOUT).token_ids
    thread, gone = thread_of(engine), weakref.ref(engine)
    del engine
    gc.collect()
    thread.join(TIMEOUT)
    assert gone() is None
    assert not thread.is_alive()
    assert handle.result().token_ids == expected  # kept all along


def test_an_engine_lives_while_a_handle_is_waited_for():
    engine = new_engine()
    thread, gone = thread_of(engine), weakref.ref(engine)
    with Gate(DecodeRows, "step", call=3) as gate:
        handles = submit_several(engine, count=3)
        gate.wait()
        del engine
        gc.collect()
        assert gone() is not None
        gate.open()
        assert [one.result(TIMEOUT).token_ids for one in handles] == [answer(prompt(seed), **length(12)) for seed in range(3)]
    thread.join(TIMEOUT)
    assert gone() is None
    assert not thread.is_alive()


def run_python(program):
    """Run a program in the repository's root; its output, and what it wrote to stderr."""
    start = (
        "import atexit; atexit.register(lambda: at_exit())\n"  # before the imports, to be called last
        "import sys; sys.path[:0] = ['kernels']\nimport asyncio, os, threading, torch\ntorch.set_num_threads(1)\nat_exit = lambda: None\n"
        "from granite_speech import Engine\nfrom granite_speech.errors import EngineError\n"
        "from granite_speech.engine.decode_rows import DecodeRows\n"
        "from tests.support.engine_requests import MODEL, Gate, answer, length, prompt\n"
    )
    ended = subprocess.run([sys.executable, "-c", start + program], cwd=ROOT, capture_output=True, text=True, timeout=TIMEOUT)
    assert (ended.returncode, ended.stderr) == (0, "")
    return ended.stdout


def test_the_interpreter_exits_with_work_in_progress():
    """There is an answer of 100,000 tokens, another request, and a thread that waits for it."""
    program = """
engine = Engine(MODEL, None, max_rows=1, max_pages=7000)
first, second = (engine.submit(inputs=prompt(seed), **length(100_000)) for seed in range(2))
threading.Thread(target=second.result, daemon=True).start()
tokens = iter(first)
print([next(tokens) for _ in range(3)] == answer(prompt(0), **length(3)))
at_exit = lambda: print([one.result(0).finish_reason for one in (first, second)], engine._loop._thread.is_alive())
"""
    assert run_python(program).splitlines() == ["True", "['cancelled', 'cancelled'] False"]


def test_after_a_fork_the_engine_is_the_parents_alone():
    program = """
engine = Engine(MODEL, None, max_rows=2, max_pages=64)
locked, unlock = threading.Event(), threading.Event()
def lock():
    with engine._loop._changed:  # in the child, nobody will ever release it
        locked.set()
        unlock.wait(30)
with Gate(DecodeRows, "step", call=3) as gate:
    handles = [engine.submit(inputs=prompt(seed), **length(9)) for seed in range(3)]
    ended = engine.submit(inputs=prompt(1), max_new_tokens=0)
    tokens = iter(handles[0])
    next(tokens)
    gate.wait()
    threading.Thread(target=lock).start()
    locked.wait(30)
    child = os.fork()
    if child == 0:
        async def use(handle):
            await handle
        async def iterate(handle):
            async for _ in handle:
                pass
        def leave():
            with engine:
                pass
        calls = [
            lambda: engine.submit(inputs=prompt(1)), engine.warmup, engine.close, lambda: engine.close(cancel=True), leave,
            handles[0].result, handles[0].cancel, lambda: next(tokens), lambda: list(handles[1]), ended.result, ended.cancel,
            lambda: asyncio.run(use(handles[2])), lambda: asyncio.run(iterate(handles[2])),
        ]
        for place, call in enumerate(calls):
            try:
                print("child: no error", place, call())
            except EngineError as error:
                assert "Make a new Engine after the fork" in str(error)
                print("child: refused", place)
        del engine, handles, ended, tokens, calls, call
        print("child: ends", flush=True)
        sys.exit(7)
    _, status = os.waitpid(child, 0)
    print("parent: child ended with", os.waitstatus_to_exitcode(status))
    unlock.set()
    gate.open()
    print("parent:", [one.result(30).token_ids for one in handles] == [answer(prompt(seed), **length(9)) for seed in range(3)])
    print("parent:", engine.submit(inputs=prompt(5), **length(3)).result(30).token_ids == answer(prompt(5), **length(3)))
    engine.close()
"""
    refused = [f"child: refused {place}" for place in range(13)]
    assert run_python(program).splitlines() == [*refused, "child: ends", "parent: child ended with 7", "parent: True", "parent: True"]


# --- what it counts and uses -----------------------------------------------------------------------------------------------------


def test_counters_add_up():
    engine = new_engine(max_rows=4)
    before = engine.counters()
    with engine:
        spoken = [engine.submit(inputs=spoken_prompt(seed, frames), **length(6)) for seed, frames in enumerate((50, 100, 23))]
        texts = [engine.submit(inputs=prompt(seed, tokens=20), **length(4)) for seed in range(5)]
        for handle in (*spoken, *texts):
            handle.result(TIMEOUT)
        with Gate(DecodeRows, "step") as gate:
            cancelled = engine.submit(inputs=prompt(9), **length(50))
            gate.wait()
            during = engine.counters()
            cancelled.cancel()
    now = engine.counters()
    assert (before.submitted, before.pages, before.pages_used, before.steps) == (0, 64, 0, 0)
    assert (during.submitted, during.finished, during.decoding, during.pages_used) == (9, 8, 1, 1)
    assert (now.submitted, now.finished, now.cancelled, now.failed) == (9, 8, 1, 0)
    assert is_at_rest(engine)
    assert now.audio_seconds == pytest.approx((50 + 100 + 23) / 50)
    assert now.new_tokens == 3 * 6 + 5 * 4 + len(cancelled.result(0).token_ids)
    assert now.rows == now.new_tokens
    assert now.rows / 4 <= now.steps < now.rows
    prompts = [spoken_prompt(seed, frames) for seed, frames in enumerate((50, 100, 23))] + [prompt(9)]
    # The last token of a prompt is the first decode step's.
    computed = sum(one["input_ids"].shape[1] - 1 for one in prompts) + 5 * 19
    assert now.prompt_tokens + now.shared_tokens == computed
    assert now.seconds.keys() == {"encode", "prefill", "decode", "capture"}
    assert all(now.seconds[stage] > 0 for stage in ("encode", "prefill", "decode"))
    assert now.seconds["capture"] == 0
    assert during.finished == 8  # a snapshot
    assert during.seconds["decode"] < now.seconds["decode"]


def test_many_requests_leave_nothing():
    """`make soak` runs more of them."""
    report = soak(requests=2000)
    assert (report.wrong, report.pages_used, report.living_handles) == (0, 0, 0)
    assert report.growth < 0.01


def test_a_caller_keeps_its_number_of_threads(monkeypatch):
    """Requests are prepared by one thread; afterwards the caller has as many as before, also if its request was refused."""
    in_submit, before, big = [], torch.get_num_threads(), torch.ones(2000, 2000)
    check = requests._check_names
    monkeypatch.setattr(requests, "_check_names", lambda inputs: (in_submit.append(torch.get_num_threads()), check(inputs)))
    with new_engine() as engine:
        try:
            torch.set_num_threads(2)
            for _ in range(2):
                handle = engine.submit(inputs=prompt(1), **length(3))
                assert torch.get_num_threads() == 2
                assert float((big + 1).sum()) == 8e6
                with pytest.raises(InputError):
                    engine.submit(inputs={"input_ids": torch.full((1, 3), 1000)})
                assert torch.get_num_threads() == 2
                assert float((big @ big)[0, 0]) == 2000
                assert handle.result(TIMEOUT).finish_reason == "length"
        finally:
            torch.set_num_threads(before)
    assert in_submit == [2 if cpu_threads._gnu_openmp() is None else 1] * 4
