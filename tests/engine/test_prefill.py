"""Prefill at fixed shapes, compared with the same prompts at their exact shape."""

import random

import pytest
import torch
from granite_kernels.op import CHOICE

from bench.stand_in_gpu import StandInGPU
from granite_speech.engine.graphs import Graphs
from granite_speech.engine.packed_tokens import PackedTokens
from granite_speech.engine.prefill import PrefillStage, PromptBucket, bucket_of, prefill
from granite_speech.modules.cache import PagedCache, PagePool
from granite_speech.modules.prompts import ModelInputs
from tests.support.small_models import AUDIO, small_model, text

CPU = torch.device("cpu")
NAN = float("nan")
MODEL = small_model()
PAGE_SIZE = 8


def new_pool(model=MODEL, device=CPU):
    """Small pages, so that a prompt has several; NaN wherever nothing was stored."""
    pool = PagePool(model.config.text_config, dtype=torch.float32, device=device, page_size=PAGE_SIZE)
    pool.require(80)
    for tensor in (*pool.keys, *pool.values):
        tensor.fill_(NAN)
    return pool


def arguments(rows, seed=0, model=MODEL):
    """Left-padded prompts; each row is (frames of its clip or 0, text tokens)."""
    rng = torch.Generator().manual_seed(seed)
    ids = [torch.cat((torch.full((model.projector.tokens(frames),), AUDIO), text(count, rng))) for frames, count in rows]
    lengths = [frames for frames, _ in rows if frames]
    width = max(map(len, ids))
    padded, mask = torch.full((len(ids), width), 94), torch.zeros(len(ids), width, dtype=torch.int64)
    for row, one in enumerate(ids):
        padded[row, width - len(one) :], mask[row, width - len(one) :] = one, 1
    given = {"input_ids": padded, "attention_mask": mask}
    if lengths:
        clips = torch.randn(len(lengths), max(lengths), model.config.encoder_config.input_dim, generator=rng)
        given |= {"input_features": clips, "input_features_lengths": lengths}
    return given


def packed(given, pool, model=MODEL):
    """The prompt, on a cache that has pages for its tokens and some more, and what it was packed from."""
    cache = PagedCache(model.config.text_config, len(given["input_ids"]), dtype=torch.float32, device=pool.keys[0].device, pool=pool)
    inputs = ModelInputs(**given, past_key_values=cache, use_cache=True)
    prompt = model.pack_prompt(inputs, inputs.on_host())
    cache.reserve([length + PAGE_SIZE for length in prompt.rows.segments.lengths])
    return prompt, inputs


@torch.no_grad()
def exact(given, model=MODEL):
    """Logits of each prompt's next token, and every layer's keys and values of each prompt."""
    output = model.states(ModelInputs(**given, use_cache=True))
    last = output.rows.segments.cu_seqlens[1:] - 1
    return model.language_model.logits(output.packed_states[last]), stored(output.past_key_values, output.past_key_values.lengths)


def stored(cache, lengths):
    table = cache.block_table().long()
    return [
        pool[pages].flatten(0, 1)[:length] for pool in (*cache.keys, *cache.values) for pages, length in zip(table, lengths, strict=True)
    ]


@torch.no_grad()
def run(stage, prompt):
    """A run whose padding and former results are NaN."""
    stage.fill(PackedTokens.of(prompt, prompt.cache.block_table()))
    stage.vectors[0 if prompt.vectors is None else len(prompt.vectors) :] = NAN
    stage.logits.fill_(NAN)
    stage.run()
    return stage.logits[: len(prompt.has_audio)]


def check(stage, pool, given):
    logits, keys = exact(given)
    prompt, _ = packed(given, pool)
    got = run(stage, prompt)
    torch.testing.assert_close(got, logits, rtol=1e-5, atol=1e-5)
    assert torch.equal(got.argmax(-1), logits.argmax(-1))
    for mine, expected in zip(stored(prompt.cache, prompt.rows.segments.lengths), keys, strict=True):
        torch.testing.assert_close(mine, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))
    prompt.cache.release()


def stage_for(bucket, pool, model=MODEL):
    return PrefillStage(model, bucket, pool)


def random_rows(rng, bucket):
    """Prompts that fit the bucket, with and without audio."""
    rows, left = [], bucket.tokens
    for _ in range(rng.randint(1, bucket.rows)):
        frames = rng.choice((0, 0, rng.randint(1, 60)))
        audio = MODEL.projector.tokens(frames)
        if audio >= left:
            break
        count = rng.randint(1, min(left - audio, 30))
        rows.append((frames, count))
        left -= audio + count
        if left == 0:
            break
    return rows or [(0, 3)]


# --- buckets ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "lengths, bucket",
    [((1,), (64, 1)), ((64,), (64, 1)), ((60, 5), (128, 2)), ((513,), (640, 1)), ((1000, 25), (1280, 2)), ((128,) * 16, (2048, 16))],
    ids=str,
)
def test_sizes_are_rounded_up(lengths, bucket):
    assert bucket_of(lengths) == PromptBucket(*bucket)


@pytest.mark.parametrize("lengths", [(2049,), (1,) * 17, (), (5, 0)], ids=str)
def test_sizes_without_a_bucket(lengths):
    assert bucket_of(lengths) is None


# --- results ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bucket", [PromptBucket(64, 1), PromptBucket(64, 4), PromptBucket(128, 8)], ids=str)
def test_a_stage_computes_what_the_exact_shape_gives(bucket):
    """One call after another on the same pages, with stale contents of every size."""
    rng, pool = random.Random(str(bucket)), new_pool()
    stage = stage_for(bucket, pool)
    for seed in range(12):
        check(stage, pool, arguments(random_rows(rng, bucket), seed))


@pytest.mark.parametrize(
    "rows",
    [[(0, 64)], [(50, 52)], [(0, 1)], [(50, 10), (23, 10), (0, 20), (15, 3)], [(0, 16)] * 4, [(15, 1), (0, 60)]],
    ids=["full, text", "full, audio", "one token", "mixed, with room", "full, four rows", "full, mixed"],
)
def test_full_buckets_and_mixed_rows(rows):
    pool, given = new_pool(), arguments(rows)
    bucket = bucket_of(given["attention_mask"].sum(1).tolist())
    assert bucket.tokens == 64
    check(stage_for(bucket, pool), pool, given)


def test_padding_does_not_change_a_bit():
    pool, given = new_pool(), arguments([(50, 10), (0, 7)])
    stage = stage_for(PromptBucket(64, 2), pool)
    prompt, _ = packed(given, pool)
    logits = run(stage, prompt).clone()
    large, _ = packed(arguments([(60, 20), (23, 20)], seed=3), pool)
    run(stage, large)
    assert torch.equal(run(stage, prompt), logits)


def test_other_sequences_keep_their_pages():
    pool = new_pool()
    other, _ = packed(arguments([(0, 20), (0, 9)]), pool)
    stage = stage_for(PromptBucket(64, 2), pool)
    run(stage, other)
    before = [one.clone() for one in stored(other.cache, other.rows.segments.lengths)]
    run(stage, packed(arguments([(23, 5)], seed=1), pool)[0])
    assert all(map(torch.equal, before, stored(other.cache, other.rows.segments.lengths)))


def test_a_run_after_reset_writes_to_page_0_alone():
    pool = new_pool()
    stage = stage_for(PromptBucket(64, 2), pool)
    run(stage, packed(arguments([(50, 10), (0, 7)]), pool)[0])
    before = [one.clone() for one in (*pool.keys, *pool.values)]
    stage.reset()
    stage.run()
    for old, new in zip(before, (*pool.keys, *pool.values), strict=True):
        assert torch.equal(old[1:].nan_to_num(7), new[1:].nan_to_num(7))


def test_the_first_slot_of_page_0_takes_all_padding():
    pool = new_pool()
    run(stage_for(PromptBucket(64, 1), pool), packed(arguments([(0, 5)]), pool)[0])
    for tensor in (*pool.keys, *pool.values):
        assert tensor[0, 0].isfinite().all() and tensor[0, 1:].isnan().all()
        assert int(tensor[1:].isfinite().all(-1).all(-1).sum()) == 5


def test_ids_may_be_int32():
    pool, given = new_pool(), arguments([(23, 9)])
    check(stage_for(PromptBucket(64, 1), pool), pool, given | {"input_ids": given["input_ids"].int()})


def test_nothing_is_allocated_or_moved_by_a_call():
    pool = new_pool()
    stage = stage_for(PromptBucket(64, 2), pool)
    names = (
        "ids",
        "audio_rows",
        "vectors",
        "positions",
        "adapter_index",
        "slots",
        "cu_seqlens",
        "kv_lens",
        "block_table",
        "last",
        "logits",
    )
    addresses = [getattr(stage, name).data_ptr() for name in names]
    run(stage, packed(arguments([(50, 10), (0, 7)]), pool)[0])
    assert addresses == [getattr(stage, name).data_ptr() for name in names]


def test_interpreted_kernels(monkeypatch):
    pool, given = new_pool(), arguments([(16, 3), (0, 4)])
    expected, _ = exact(given)
    stage = stage_for(PromptBucket(24, 2), pool)
    prompt, _ = packed(given, pool)
    larger, _ = packed(arguments([(16, 6), (15, 6)], seed=2), pool)
    monkeypatch.setenv(CHOICE, "triton")
    run(stage, larger)
    torch.testing.assert_close(run(stage, prompt), expected, rtol=1e-4, atol=1e-5)


def test_filling_and_running_wait_for_nothing():
    given = arguments([(16, 3), (0, 4)])
    expected, _ = exact(given)
    with StandInGPU() as gpu, torch.no_grad():
        model, moved = gpu.move(small_model()), gpu.move(given)
        pool = new_pool(model, torch.device("cuda"))
        prompt, _ = packed(moved, pool, model)
        stage = stage_for(PromptBucket(24, 2), pool, model)
        gpu.waits.clear()
        logits = run(stage, prompt)
        assert gpu.waits == []
    torch.testing.assert_close(logits.values, expected, rtol=1e-4, atol=1e-5)


# --- prefill ---------------------------------------------------------------------------------------------------------------------


class CountingGraphs(Graphs):
    """Captures by keeping the function, and counts replays."""

    def __init__(self):
        super().__init__(lambda function: function)
        self.replays = 0

    def replay(self, key):
        self.replays += 1
        super().replay(key)


@torch.no_grad()
def test_a_size_is_captured_after_it_was_seen():
    pool, graphs = new_pool(), CountingGraphs()
    for seed, replays in ((0, 0), (1, 1), (2, 2)):
        given = arguments([(50, 10), (0, 7 + seed)], seed)
        prompt, inputs = packed(given, pool)
        logits = prefill(MODEL, graphs, prompt, inputs)
        torch.testing.assert_close(logits, exact(given)[0], rtol=1e-5, atol=1e-5)
        assert graphs.replays == replays
        graphs.capture_wanted()
    assert len(graphs) == 1


@torch.no_grad()
def test_a_replayed_prefill_can_be_continued():
    """The cache is as after an eager call: its keys, counts, positions and which rows have audio."""
    pool, graphs, given = new_pool(), CountingGraphs(), arguments([(50, 10), (0, 7)])
    expected = MODEL(**given, use_cache=True).past_key_values
    for _ in range(2):
        prompt, inputs = packed(given, pool)
        prefill(MODEL, graphs, prompt, inputs)
        graphs.capture_wanted()
    cache, more = prompt.cache, {"input_ids": torch.tensor([[3], [4]])}
    assert graphs.replays == 1
    for name in ("lengths", "has_audio", "next_positions", "columns"):
        assert getattr(cache, name) == getattr(expected, name), name
    logits = MODEL(**more, past_key_values=expected).logits.clone()
    torch.testing.assert_close(MODEL(**more, past_key_values=cache).logits.clone(), logits, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_a_result_belongs_to_the_caller():
    pool, graphs, results, kept = new_pool(), CountingGraphs(), [], []
    for seed in range(3):
        results.append(prefill(MODEL, graphs, *packed(arguments([(0, 9)], seed), pool)))
        kept.append(results[-1].clone())
        graphs.capture_wanted()
    assert graphs.replays == 2 and torch.equal(results[1], kept[1]) and not torch.equal(results[1], results[2])


@torch.no_grad()
def test_prompts_without_a_bucket_are_not_captured():
    pool, graphs = new_pool(), CountingGraphs()
    pool.require(300)
    prompt, inputs = packed(arguments([(0, 1)] * 17), pool)
    prefill(MODEL, graphs, prompt, inputs)
    graphs.capture_wanted()
    assert len(graphs) == 0
