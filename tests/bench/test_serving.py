"""`python -m bench model --part serving`: arrivals, completions and figures, both parts in small sizes, and what prefixes save."""

import json
import time
from concurrent.futures import Future
from threading import Timer

import pytest
import torch

from bench import embedded, load, prefix_sharing, serving, serving_gpu, shapes
from bench.load import Load, Served
from granite_speech.engine.counters import Counters

FIGURES = {"audio_a_second", "p50_s", "p95_s", "short_p50_s", "short_p95_s"}


# --- arrivals, completions and figures -------------------------------------------------------------------------------------------


def test_requests_arrive_at_random_times_at_the_rate():
    seconds = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]
    over_time = Load.over_time(seconds, rate=7.0)
    assert over_time.arrivals[0] == 0 and over_time.arrivals[-1] == pytest.approx(21 / 7)
    gaps = [after - before for before, after in zip(over_time.arrivals, over_time.arrivals[1:], strict=False)]
    assert min(gaps) > 0 and max(gaps) > 2 * min(gaps)
    assert over_time == Load.over_time(seconds, rate=7.0), "always the same times"
    assert Load.at_once(seconds).arrivals == (0,) * 6


class Clock:
    """In place of the module `time`: passes only by sleeping."""

    def __init__(self):
        self.now = 100.0

    def perf_counter(self):
        return self.now

    def sleep(self, seconds):
        self.now += seconds


def test_a_batch_begins_when_its_last_request_has_arrived(monkeypatch):
    clock, began = Clock(), []
    monkeypatch.setattr(load, "time", clock)

    def answer(batch):
        began.append(clock.now - 100)
        clock.sleep(2)
        return [f"answer {number}" for number in batch]

    served = load.serve_in_batches(Load((1,) * 5, (0, 1, 1.5, 8, 9)), answer, size=2)
    assert served.answers == [f"answer {number}" for number in range(5)]
    assert began == [1, 8, 10]
    assert served.completions == [3, 3, 10, 10, 12]


def test_every_answer_of_an_engine_has_its_own_completion():
    """The first request is complete last."""
    submitted = []

    def submit(number):
        submitted.append(time.perf_counter() - start)
        handle = Future()
        Timer(0.6 if number == 0 else 0.0, handle.set_result, [f"answer {number}"]).start()
        return handle

    start = time.perf_counter()
    served = load.serve_in_engine(Load((1, 1), (0, 0.2)), submit)
    assert served.answers == ["answer 0", "answer 1"]
    assert submitted[1] >= 0.2 and served.completions[1] >= 0.2
    assert served.completions[0] >= 0.6 and served.completions[1] < served.completions[0] - 0.1


def test_figures_are_those_of_all_and_of_short_requests():
    found = load.figures(Load((1, 2, 3, 4), (0, 1, 2, 3)), Served([], [5, 2, 4, 10]))
    assert found["audio_a_second"] == 10 / 10
    assert found["p50_s"] == 3.5 and found["p95_s"] == pytest.approx(5 + 0.85 * 2)  # of 5, 1, 2 and 7
    assert found["short_p50_s"] == 3 and found["short_p95_s"] == pytest.approx(1 + 0.95 * 4)  # of 5 and 1


def test_systems_are_compared_round_by_round_in_alternating_order():
    order, ends = [], {"ours": [9.0, 2.0, 1.0, 5.0], "reference": [9.0, 4.0, 4.0, 5.0]}

    def system(name):
        def serve(_):
            order.append(name)
            end = ends[name][order.count(name) - 1]
            return Served([], [end / 2, end, end, end / 2], {"end": end} if name == "ours" else {})

        return serve

    # The first round is a warm-up.
    found = load.compare(Load.at_once([1, 2, 3, 4]), {name: system(name) for name in ends}, rounds=3)
    assert order == ["reference", "ours", "ours", "reference", "reference", "ours", "ours", "reference"]
    assert found["ours"]["audio_a_second"] == 5 and found["reference"]["audio_a_second"] == 2.5
    assert found["ours"]["counters"] == {"end": 2.0} and "counters" not in found["reference"]
    assert found["ratios"] == [2, 4, 1] and found["ratio"] == 2


def test_counters_are_differences():
    before = Counters(steps=5, rows=10, new_tokens=7, seconds={"encode": 1.0, "decode": 2.0})
    found = load.counted(before, Counters(steps=9, rows=20, new_tokens=8, seconds={"encode": 1.5, "decode": 2.25}))
    assert found["steps"] == 4 and found["rows_a_step"] == 2.5 and found["new_tokens"] == 1
    assert found["seconds"] == {"encode": 0.5, "decode": 0.25}


# --- the bundled checkpoint ------------------------------------------------------------------------------------------------------


def test_the_requests_are_unequal_and_as_long_as_the_checkpoint_has_learnt():
    clips, words = serving.requests()
    seconds = [len(clip) / embedded.RATE for clip in clips]
    assert len(clips) == 48 == 4 * serving.BATCH and len(set(serving.PAIRS)) == 36
    assert min(seconds) < 0.5 and max(seconds) <= 4
    recorded, texts = embedded.recorded_clips()
    assert set(texts) < set(words) and f"{texts[0]} {texts[7]}" in words
    assert len(clips[words.index(f"{texts[0]} {texts[7]}")]) == len(recorded[0]) + len(recorded[7])


@pytest.fixture
def few(monkeypatch):
    """Six requests, in batches of 3."""
    clips, words = serving.requests()
    monkeypatch.setattr(serving, "requests", lambda: (clips[:6], words[:6]))
    monkeypatch.setattr(serving, "BATCH", 3)
    monkeypatch.setattr(prefix_sharing, "measure", lambda: {"tokens": dict.fromkeys(TOKENS, 1), "models": {}})
    return words


TOKENS = ("before", "audio", "after", "shared", "prefill", "page")


def test_a_run_under_load_writes_its_result(few, tmp_path):
    text = serving.run(rounds=1, threads=None, out=tmp_path)
    (file,) = tmp_path.glob("serving-*.json")
    result = json.loads(file.read_text())
    overload, light = result["measurements"]
    assert overload["offered_a_second"] == pytest.approx(6 * result["shape"]["reference_capacity"])
    assert light["offered_a_second"] == pytest.approx(overload["ours"]["audio_a_second"] / 2)
    assert set(overload["reference"]) == FIGURES and "reference" not in light
    for ours in (overload["ours"], light["ours"]):
        assert set(ours) == FIGURES | {"counters"} and all(ours[name] > 0 for name in FIGURES)
        assert ours["counters"]["seconds"]["encode"] > 0 and ours["counters"]["steps"] > 0
        assert ours["counters"]["new_tokens"] >= 6, "what came before the timed requests is not counted"
    assert overload["ratio"] == pytest.approx(overload["ratios"][0], abs=1e-4)
    lines = [line for line in text.splitlines() if line.startswith("| ")][1:]
    assert [line.split(" | ")[1] for line in lines[:3]] == ["`Engine`", "transformers in batches of 3", "`Engine`"]
    assert f"| {overload['ratio']:.2f}x |" in lines[0] and "Prefix sharing" in text


@pytest.mark.parametrize("system", ["here", "in transformers"])
def test_wrong_words_are_not_timed(system, few, tmp_path, monkeypatch):
    if system == "in transformers":
        monkeypatch.setattr(embedded, "in_transformers", lambda: lambda clips: ["wrong"] * len(clips))
    else:
        few[4] = "wrong"
        monkeypatch.setattr(serving, "requests", lambda: (serving.recorded_clips()[0][:6], few[:6]))
    with pytest.raises(SystemExit, match=f"{system} .* so nothing was written"):
        serving.run(rounds=1, threads=None, out=tmp_path)
    assert not list(tmp_path.iterdir())


# --- a released shape ------------------------------------------------------------------------------------------------------------

PLAN = serving_gpu.Plan("small", requests=5, seconds=(1, 3), new_tokens=(2, 6), batch=3)


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setitem(shapes.RELEASED, "small", prefix_sharing.SMALL)
    monkeypatch.setattr(serving_gpu, "ROUNDS", 1)


def test_a_run_of_a_released_shape_writes_its_result(small, tmp_path):
    text = serving_gpu.run(device="cpu", dtype="float32", out=tmp_path, plan=PLAN)
    (file,) = tmp_path.glob("serving-*.json")
    result = json.loads(file.read_text())
    at_once, over_time = result["measurements"]
    assert all(1 <= one <= 3 for one in result["shape"]["audio_seconds"]) and len(set(result["shape"]["audio_seconds"])) == 5
    assert set(at_once["reference"]) == FIGURES and "reference" not in over_time
    assert at_once["ours"]["counters"]["new_tokens"] == over_time["ours"]["counters"]["new_tokens"]
    assert at_once["ours"]["counters"]["shared_tokens"] == 5 * 32, "all but the engine's first request find the shared pages"
    assert "| all at once | `generate` in batches of 3 |" in text and "| 80% of that, over time | `Engine` |" in text


def test_engine_and_generate_give_the_same_tokens(small):
    """So padding, masks and lengths of the batch are those of the requests."""
    model = shapes.build("small", adapter=False, device=torch.device("cpu"), dtype=torch.float32)
    with torch.no_grad():  # with the usual small weights, a token depends on little but the one before it
        for weight in model.language_model.parameters():
            weight.normal_(std=0.3)
    requests = serving_gpu.Requests(PLAN, model)
    with serving_gpu.Engine(model, None) as engine:
        ours = [requests.submit(engine, number).result().token_ids for number in range(5)]
    assert requests.generate(range(3)) + requests.generate(range(3, 5)) == ours
    assert [len(one) for one in ours] == requests.new_tokens and len(set(requests.new_tokens)) > 1


def test_answers_of_a_wrong_length_are_not_timed(small, tmp_path, monkeypatch):
    monkeypatch.setattr(serving_gpu.Requests, "generate", lambda self, batch: [[1]] * len(batch))
    with pytest.raises(SystemExit, match="in place of"):
        serving_gpu.run(device="cpu", dtype="float32", out=tmp_path, plan=PLAN)
    assert not list(tmp_path.iterdir())


# --- prefixes --------------------------------------------------------------------------------------------------------------------


def test_whole_pages_of_a_prefix_are_saved():
    found = prefix_sharing.measure()
    assert found["tokens"] == {"before": 45, "audio": 102, "after": 16, "shared": 32, "prefill": 162, "page": 16}
    # 4.1-2b by hand: 40 layers; q and o 2048 x 2048, k and v 2048 x 512, and three of 2048 x 4096; keys of 4 heads, 128 wide.
    weights = 40 * (2 * 2048 * 2048 + 2 * 2048 * 512 + 3 * 2048 * 4096)
    flops = [2 * weights * tokens + sum(40 * 4 * 2048 * (position + 1) for position in range(tokens)) for tokens in (32, 162)]
    saved = found["models"]["4.1-2b"]
    assert saved == {"bytes": 32 * 2 * 40 * 4 * 128 * 2, "flops": flops[0], "share_of_prefill": pytest.approx(flops[0] / flops[1])}
    # 3.3-2b has the same keys, wider products, and an adapter of rank 64 on q and v.
    wide = 40 * (2 * 2048 * 2048 + 2 * 2048 * 512 + 3 * 2048 * 8192 + 64 * (2048 + 2048 + 2048 + 512))
    saved = found["models"]["3.3-2b"]
    assert saved["bytes"] == found["models"]["4.1-2b"]["bytes"]
    assert saved["flops"] == 2 * wide * 32 + 40 * 4 * 2048 * 32 * 33 // 2
    assert "so 32 of 45" in prefix_sharing.table(found) and "| 4.1-2b | 2.62 MB |" in prefix_sharing.table(found)
