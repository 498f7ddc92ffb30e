"""Encoder and projector at fixed shapes, compared with the same clips at their exact shape."""

import random

import pytest
import torch
from granite_kernels.op import CHOICE

from bench.stand_in_gpu import StandInGPU
from granite_speech import GraniteSpeechForConditionalGeneration
from granite_speech.engine.encoding import EncoderBucket, EncoderStage, bucket_of, encode
from granite_speech.engine.graphs import Graphs
from granite_speech.modules.packing import Segments
from tests.support.small_models import small_model

CPU = torch.device("cpu")
NAN = float("nan")
MODEL = small_model()
INPUT_DIM = MODEL.config.encoder_config.input_dim


def clips_of(lengths, seed=0):
    """Packed random frames of clips of these lengths, and where they lie."""
    rng = torch.Generator().manual_seed(seed)
    return torch.randn(sum(lengths), INPUT_DIM, generator=rng), Segments(tuple(lengths), CPU)


def exact(frames, clips, model=MODEL):
    with torch.no_grad():
        states, vectors, tokens = model.encode_packed(frames, clips)
    return states, vectors, tokens.total


def run(stage, frames, clips, poison=NAN):
    """The stage's results for these clips; its padding and its former results hold `poison`."""
    stage.fill(frames, clips.lengths)
    stage.frames[clips.total :] = poison
    stage.states.fill_(poison)
    stage.vectors.fill_(poison)
    stage.run()
    return stage


def check(stage, frames, clips):
    states, vectors, count = exact(frames, clips)
    run(stage, frames, clips)
    torch.testing.assert_close(stage.states[: clips.total], states, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(stage.vectors[:count], vectors, rtol=1e-5, atol=1e-5)


def random_lengths(rng, bucket):
    """Lengths of up to `bucket.clips` clips that fit the bucket; some are empty."""
    cuts = sorted(rng.randint(0, bucket.frames) for _ in range(rng.randint(1, bucket.clips)))
    return [end - start for start, end in zip([0, *cuts], cuts, strict=False)]


# --- buckets ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "lengths, bucket",
    [
        ((1,), (128, 1)),
        ((128,), (128, 1)),
        ((129,), (256, 1)),
        ((500, 0, 525), (1280, 4)),
        ((2048, 1), (2560, 2)),
        ((4097,), (5120, 1)),
        ((8192,), (8192, 1)),
        ((1,) * 33, (128, 64)),
    ],
    ids=str,
)
def test_sizes_are_rounded_up(lengths, bucket):
    assert bucket_of(lengths) == EncoderBucket(*bucket)


@pytest.mark.parametrize("lengths", [(8193,), (4000, 4193), (), (0, 0)], ids=str)
def test_sizes_without_a_bucket(lengths):
    assert bucket_of(lengths) is None


# --- results ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bucket", [EncoderBucket(128, 1), EncoderBucket(128, 4), EncoderBucket(256, 8)], ids=str)
def test_a_stage_computes_what_the_exact_shape_gives(bucket):
    """One stage after another call, with stale contents of every size."""
    rng, stage = random.Random(str(bucket)), EncoderStage(MODEL, bucket)
    for seed in range(12):
        check(stage, *clips_of(random_lengths(rng, bucket), seed))


@pytest.mark.parametrize("lengths", [(128,), (127,), (1,), (64, 64), (45, 60, 15, 8), (1, 1, 1, 125), (0, 0, 7, 0)], ids=str)
def test_full_buckets_whole_windows_and_empty_clips(lengths):
    frames, clips = clips_of(lengths)
    check(EncoderStage(MODEL, bucket_of(lengths)), frames, clips)


def test_the_windows_of_any_clips_fit():
    """Every clip's last window may hold one frame, which takes the most windows."""
    size = MODEL.projector.window_size
    lengths = [size + 1] * 7 + [128 - 7 * (size + 1)]
    check(EncoderStage(MODEL, EncoderBucket(128, 8)), *clips_of(lengths))


def test_padding_does_not_change_a_bit():
    frames, clips = clips_of((50, 23))
    stage = EncoderStage(MODEL, EncoderBucket(128, 2))
    states, vectors = (one.clone() for one in (run(stage, frames, clips, 0.0).states, stage.vectors))
    run(stage, frames, clips, NAN)
    count = sum(map(MODEL.projector.tokens, clips.lengths))
    assert torch.equal(stage.states[:73], states[:73]) and torch.equal(stage.vectors[:count], vectors[:count])


def test_nothing_is_allocated_or_moved_by_a_call():
    stage = EncoderStage(MODEL, EncoderBucket(128, 2))
    names = ("frames", "cu_seqlens", "windows", "states", "vectors")
    addresses = [getattr(stage, name).data_ptr() for name in names]
    run(stage, *clips_of((50, 23)))
    stage.reset()
    stage.run()
    assert addresses == [getattr(stage, name).data_ptr() for name in names]


def test_layers_that_are_concatenated_for_the_projector():
    config = small_model().config
    config.encoder_config.cat_hidden_layers = [1]
    config.projector_config.encoder_hidden_size *= 2
    model = GraniteSpeechForConditionalGeneration(config).eval()
    frames, clips = clips_of((50, 23))
    states, vectors, count = exact(frames, clips, model)
    stage = run(EncoderStage(model, EncoderBucket(128, 2)), frames, clips)
    torch.testing.assert_close(stage.states[: clips.total], states, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(stage.vectors[:count], vectors, rtol=1e-5, atol=1e-5)


def test_a_stage_made_in_inference_mode_runs_outside_it():
    with torch.inference_mode():
        stage = EncoderStage(MODEL, EncoderBucket(128, 1))
        stage.run()
    check(stage, *clips_of((40,)))


def test_interpreted_kernels(monkeypatch):
    frames, clips = clips_of((16, 0, 7))
    states, vectors, count = exact(frames, clips)
    monkeypatch.setenv(CHOICE, "triton")
    stage = EncoderStage(MODEL, EncoderBucket(32, 4))
    run(stage, *clips_of((32,)))
    run(stage, frames, clips)
    torch.testing.assert_close(stage.states[: clips.total], states, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(stage.vectors[:count], vectors, rtol=1e-4, atol=1e-5)


def test_filling_and_running_wait_for_nothing():
    frames, clips = clips_of((10, 6))
    states, _, _ = exact(frames, clips)
    with StandInGPU() as gpu, torch.no_grad():
        model, frames = gpu.move(small_model()), gpu.move(frames)
        stage = EncoderStage(model, EncoderBucket(24, 2))
        gpu.waits.clear()
        stage.fill(frames, clips.lengths)
        stage.run()
        assert gpu.waits == []
    torch.testing.assert_close(stage.states.values[: clips.total], states, rtol=1e-4, atol=1e-5)


# --- the projector ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lengths", [(50, 23), (15, 30), (0, 1, 15), (), (0,)], ids=str)
def test_gathered_windows_are_the_padded_frames(lengths):
    """To the bit, against windows made by padding every clip."""
    projector, clips = MODEL.projector, Segments(lengths, CPU)
    frames = torch.randn(clips.total, projector.qformer.encoder.layer[0].crossattention.attention.key.in_features)
    with torch.no_grad():
        vectors, tokens = projector.project(frames, projector.windows(clips)), projector.token_segments(clips)
        windows = clips.pad_to_multiple(frames, projector.window_size, tuple(-(-one // projector.window_size) for one in lengths))
        expected = projector.linear(projector.qformer(projector.query, encoder_hidden_states=windows).last_hidden_state).flatten(0, 1)
    assert torch.equal(vectors, expected)
    assert tokens.lengths == tuple(map(projector.tokens, lengths))


def test_a_zero_vector_is_zero_whatever_the_frames_hold():
    frames = torch.full((4, 32), NAN)
    frames[0] = 1
    index = torch.full((1, MODEL.projector.window_size), 4)
    index[0, 0] = 0
    only = torch.zeros(1, MODEL.projector.window_size, 32)
    only[0, 0] = 1
    with torch.no_grad():
        expected = MODEL.projector.project(only.flatten(0, 1), None)
        assert torch.equal(MODEL.projector.project(frames, index), expected)


# --- encode ----------------------------------------------------------------------------------------------------------------------


class CountingGraphs(Graphs):
    """Captures by keeping the function, and counts replays."""

    def __init__(self):
        super().__init__(lambda function: function)
        self.replays = 0

    def replay(self, key):
        self.replays += 1
        super().replay(key)


def call(graphs, lengths, seed=0, model=MODEL):
    frames, clips = clips_of(lengths, seed)
    states, vectors, count = exact(frames, clips, model)
    got_states, got_vectors, tokens = encode(model, graphs, frames, clips)
    torch.testing.assert_close(got_states, states, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(got_vectors, vectors, rtol=1e-5, atol=1e-5)
    assert tokens.total == count
    return got_states, got_vectors


@torch.no_grad()
def test_a_size_is_captured_after_it_was_seen():
    graphs = CountingGraphs()
    call(graphs, (50, 23))
    assert (graphs.replays, len(graphs)) == (0, 0)
    graphs.capture_wanted()
    call(graphs, (60, 3), seed=1)
    assert (graphs.replays, len(graphs)) == (1, 1)
    call(graphs, (60,), seed=1)  # another size
    assert graphs.replays == 1


@torch.no_grad()
def test_a_result_belongs_to_the_caller():
    graphs = CountingGraphs()
    call(graphs, (50, 23))
    graphs.capture_wanted()
    first = call(graphs, (50, 23), seed=1)
    kept = [one.clone() for one in first]
    call(graphs, (60, 60), seed=2)
    assert graphs.replays == 2 and all(map(torch.equal, first, kept))


@torch.no_grad()
def test_long_audio_is_not_captured():
    graphs = CountingGraphs()
    frames, clips = clips_of((8200,))
    encode(MODEL, graphs, frames, clips)
    graphs.capture_wanted()
    assert len(graphs) == 0


def test_training_and_gradients_need_the_exact_shape():
    graphs, model = CountingGraphs(), small_model()
    with torch.no_grad():
        call(graphs, (50,), model=model)
    graphs.capture_wanted()
    frames, clips = clips_of((50,))
    vectors = encode(model, graphs, frames, clips)[1]
    vectors.sum().backward()
    assert model.encoder.input_linear.weight.grad is not None
    model.train()
    with torch.no_grad():
        encode(model, graphs, frames, clips)
    assert graphs.replays == 0
