"""TurboCTC at fixed shapes: the same paths as at the exact shape, without a wait, and one graph for each bucket of frames."""

from pathlib import Path

import pytest
import torch
from granite_kernels.ctc_greedy import CtcGreedy
from granite_kernels.op import CHOICE
from hypothesis import given, settings
from hypothesis import strategies as st

from bench.counting_gpu import CountingGPU
from granite_speech.engine.ctc_encoding import CTCStage, bucket_of, decode
from granite_speech.engine.encoding import EncoderBucket
from granite_speech.engine.graphs import Graphs
from granite_speech.model_ctc import GraniteSpeech5ForCTC
from granite_speech.modules.packing import Segments
from tests.support.ctc_models import SPECS, build_ours, build_reference
from tests.support.fake_graph import FakeCapture

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> GraniteSpeech5ForCTC:
    folder: Path = tmp_path_factory.mktemp("ctc")
    return build_ours(build_reference(SPECS[0]), folder)


def clips_of(model: GraniteSpeech5ForCTC, lengths: tuple[int, ...]) -> tuple[torch.Tensor, Segments]:
    width = model.encoder.input_linear.in_features
    return torch.randn(sum(lengths), width, generator=torch.Generator().manual_seed(sum(lengths))), Segments(lengths, CPU)


def exact(model: GraniteSpeech5ForCTC, frames: torch.Tensor, clips: Segments) -> tuple[CtcGreedy, Segments]:
    with torch.no_grad():
        states, left = model.encode_packed(frames, clips)
        return model.greedy_packed(states, left), left


def check(stage: CTCStage, model: GraniteSpeech5ForCTC, lengths: tuple[int, ...]) -> None:
    frames, clips = clips_of(model, lengths)
    expected, left = exact(model, frames, clips)
    stage.frames.fill_(torch.nan)
    stage.fill(frames, lengths)
    stage.run()
    for name, one in expected._asdict().items():
        rows = len(lengths) if name == "counts" else left.total
        torch.testing.assert_close(getattr(stage.path, name)[:rows], one, rtol=1e-4, atol=1e-5, msg=name)
    assert not stage.path.counts[len(lengths) :].any()


@pytest.mark.parametrize(
    "lengths, bucket",
    [((1,), (256, 1)), ((256,), (256, 1)), ((257, 0, 3), (512, 4)), ((2049,), (2560, 1)), ((16384,), (16384, 1))],
    ids=str,
)
def test_sizes_are_rounded_up(lengths, bucket):
    assert bucket_of(lengths) == EncoderBucket(*bucket)


@pytest.mark.parametrize("lengths", [(16385,), (), (0, 0)], ids=str)
def test_sizes_without_a_bucket(lengths):
    assert bucket_of(lengths) is None


@given(st.lists(st.integers(0, 60), min_size=1, max_size=4).filter(any))
@settings(max_examples=20, deadline=None)
def test_a_stage_computes_what_the_exact_shape_gives(model: GraniteSpeech5ForCTC, lengths: list[int]):
    check(CTCStage(model, EncoderBucket(256, 4)), model, tuple(lengths))


def test_interpreted_kernels_and_stale_contents(model: GraniteSpeech5ForCTC, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv(CHOICE, "triton")
    stage = CTCStage(model, EncoderBucket(64, 4))
    for lengths in ((64,), (13, 0, 30), (5, 6, 7, 8)):
        check(stage, model, lengths)


def test_a_shape_is_captured_after_the_first_call_and_replayed_then(model: GraniteSpeech5ForCTC, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv(CHOICE, "triton")
    capture = FakeCapture()
    graphs = Graphs(capture)
    with torch.no_grad():
        for lengths in ((40, 21), (30, 30), (61, 2)):
            frames, clips = clips_of(model, lengths)
            expected, left = exact(model, frames, clips)
            path, where = decode(model, graphs, frames, clips)
            assert where == left
            for ours, one in zip(path, expected, strict=True):
                torch.testing.assert_close(ours, one, rtol=1e-4, atol=1e-5)
            graphs.capture_wanted()
    assert graphs.keys() == [EncoderBucket(256, 2)] and capture.replays == 2


def test_filling_and_running_wait_for_nothing_and_launch_as_much_whatever_the_clips(tmp_path: Path):
    counts = []
    with CountingGPU() as gpu, torch.no_grad():
        with torch.device("cuda"):
            model = GraniteSpeech5ForCTC(build_reference(SPECS[0]).config).eval()
        stage = CTCStage(model, EncoderBucket(256, 4))
        for lengths in ((200,), (1, 2, 3), (0, 64, 64, 64)):
            frames = torch.zeros(sum(lengths), model.encoder.input_linear.in_features, device="cuda")
            with gpu.counting() as found:
                stage.fill(frames, lengths)
                stage.run()
            counts.append(found.launches.total())
            assert not found.waits
    assert len(set(counts)) == 1
