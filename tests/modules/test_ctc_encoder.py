"""TurboCTC's encoder: blocks chained from norm to norm, both layouts, rows of padding, and what it costs."""

import copy
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from granite_kernels.op import CHOICE
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from granite_speech.config_ctc import GraniteSpeech5EncoderConfig
from granite_speech.errors import UnsupportedError
from granite_speech.modules import conformer_stack, row_parts
from granite_speech.modules.add_norm import mean_of_pairs
from granite_speech.modules.ctc_encoder import GraniteSpeech5Encoder
from granite_speech.modules.packing import Bucket, Segments
from granite_speech.modules.side_by_side import arrange
from tests.support.ctc_models import SPECS, CTCSpec

CPU = torch.device("cpu")
CLIPS = Segments((23, 0, 9, 1, 30), CPU)
BY_NAME = {spec.name: spec for spec in SPECS}
LENGTHS = st.lists(st.integers(0, 9), max_size=6).map(tuple)


def encoder(spec: CTCSpec = SPECS[0], **changes: Any) -> GraniteSpeech5Encoder:
    torch.manual_seed(3)
    model = GraniteSpeech5Encoder(GraniteSpeech5EncoderConfig(**spec.config()["encoder_config"] | changes))
    for name, buffer in model.named_buffers():
        if name.endswith("running_mean"):
            buffer.normal_(std=0.3)
        elif name.endswith("running_var"):
            buffer.uniform_(0.5, 1.5)
    for norm in (one for one in model.modules() if isinstance(one, nn.LayerNorm)):
        nn.init.normal_(norm.weight, 1.0, 0.2)
        nn.init.normal_(norm.bias, 0.0, 0.2)
    return model.eval()


def frames(model: GraniteSpeech5Encoder, rows: int = CLIPS.total, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(rows, model.input_linear.in_features, generator=torch.Generator().manual_seed(4)).to(dtype)


def in_modules(model: GraniteSpeech5Encoder, x: Tensor) -> list[Tensor]:
    """Every state and the result, from calls of one module after another: padded, as for hooks."""
    collected = []
    states, left = model.encode(CLIPS.pad(x, CLIPS.longest), CLIPS, collected)
    return [where.pack(one) for one, where in (*collected, (states, left))]


def packed(model: GraniteSpeech5Encoder, x: Tensor) -> list[Tensor]:
    collected = []
    states, left = model.encode(x, CLIPS, collected)
    assert left == model.clips_left(CLIPS)
    return [*(one for one, _ in collected), states]


class Calls(TorchDispatchMode):
    """Counts operations by name."""

    def __init__(self) -> None:
        super().__init__()
        self.names: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        self.names[func._schema.name.split("::")[1].strip("_")] += 1
        return func(*args, **kwargs or {})


@pytest.fixture(params=["torch", "triton"])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setenv(CHOICE, request.param)
    return request.param


@pytest.mark.parametrize("name", BY_NAME)
@torch.no_grad()
def test_every_state_is_that_of_one_module_after_another(name: str, monkeypatch: pytest.MonkeyPatch):
    model = encoder(BY_NAME[name])
    x = frames(model)
    expected = in_modules(model, x)
    for chosen in ("torch", "triton"):
        monkeypatch.setenv(CHOICE, chosen)
        for ours, modules in zip(packed(model, x), expected, strict=True):
            torch.testing.assert_close(ours, modules, rtol=0, atol=2e-5)


@pytest.mark.parametrize("name", BY_NAME)
@torch.no_grad()
def test_a_step_of_fixed_shape_gives_the_same_and_ignores_the_padding(name: str, backend: str):
    model = encoder(BY_NAME[name])
    x = frames(model)
    expected, left = model.encode(x, CLIPS)
    rows = 2 * CLIPS.total + 7
    padding = frames(model, rows)
    padding[: CLIPS.total], padding[CLIPS.total :] = x, torch.nan
    starts = torch.tensor((*CLIPS.starts, CLIPS.total, CLIPS.total), dtype=torch.int32)
    states, where = model.encode(padding, Bucket(starts, rows, rows))
    assert states.shape[0] == where.total == model.frames_left(rows)
    assert where.cu_seqlens.tolist() == [*left.starts, left.total, left.total]
    torch.testing.assert_close(states[: left.total], expected, rtol=0, atol=1e-5)


@torch.no_grad()
def test_bfloat16_with_kernels_is_as_close_as_with_modules(monkeypatch: pytest.MonkeyPatch):
    model = encoder().bfloat16()
    truth, x = copy.deepcopy(model).double(), frames(model, dtype=torch.bfloat16)
    expected = in_modules(truth, x.double())[-1]
    eager = (in_modules(model, x)[-1] - expected).square().mean().sqrt()
    monkeypatch.setenv(CHOICE, "triton")
    ours = (packed(model, x)[-1] - expected).square().mean().sqrt()
    assert ours <= 1.25 * eager


@torch.no_grad()
def test_operations_of_a_block_and_of_one_that_halves(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv(CHOICE, "triton")
    counts = {}
    for layers, halves in ((4, [0]), (5, [0]), (5, [0, 4])):
        model = encoder(num_hidden_layers=layers, subsample_layers=halves)
        arrange(model)
        x = frames(model)
        with Calls() as calls:
            model.encode(x, CLIPS)
        counts[layers, len(halves)] = calls.names
    block = counts[5, 1] - counts[4, 1]
    assert block["add_layer_norm"] == 4
    assert block["native_layer_norm"] == block["add"] == block["rsqrt"] == block["softmax"] == block["to_copy"] == 0
    assert block["mm"] + block["addmm"] == 6, "q|k|v, o, the second product of each feed-forward, and the two of the convolution"
    assert block["silu_linear"] == 2
    assert block["block_attention"] == block["depthwise_conv"] == 1
    halving = counts[5, 2] - counts[5, 1]
    assert halving["attention_blocks"] == 1, "for the clips as they are afterwards"
    assert not halving.keys() & {"add_layer_norm", "mean", "index_select", "mm", "addmm", "depthwise_conv", "native_layer_norm"}


def test_gradients_are_those_of_one_module_after_another(backend: str):
    model = encoder()
    x = frames(model)
    gradients = []
    for run in (in_modules, packed):
        model.zero_grad()
        states = run(model, x)[-1]
        (states * torch.linspace(-1, 1, states.numel()).view_as(states)).sum().backward()
        gradients.append({name: one.grad.clone() for name, one in model.named_parameters() if one.grad is not None})
    expected, ours = gradients
    assert ours.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(ours[name], expected[name], rtol=0, atol=1e-4 * float(expected[name].abs().max()), msg=name)


@torch.no_grad()
def test_a_clip_has_the_same_states_whatever_comes_with_it(backend: str):
    model = encoder()
    x = frames(model)
    states, left = model.encode(x, CLIPS)
    for number, length in enumerate(CLIPS.lengths):
        alone, _ = model.encode(x[CLIPS.starts[number] :][:length], Segments((length,), CPU))
        torch.testing.assert_close(states[left.starts[number] : left.starts[number + 1]], alone, rtol=0, atol=1e-5)


@torch.no_grad()
def test_hooks_see_padded_tensors_and_change_the_result():
    model, shapes = encoder(), {}
    mask = torch.arange(CLIPS.longest) < torch.tensor(CLIPS.lengths)[:, None]
    features = CLIPS.pad(frames(model), CLIPS.longest)
    expected = model(features, mask).last_hidden_state
    for name in ("layers.0", "layers.1.conv.depthwise_conv", "layers.1.conv.norm", "layers.2.self_attn", "layers.3.feed_forward1.linear1"):
        module = model.get_submodule(name)
        module.register_forward_hook(lambda _, given, out, name=name: shapes.__setitem__(name, getattr(out, "shape", None) or out[0].shape))
    torch.testing.assert_close(model(features, mask).last_hidden_state, expected, rtol=0, atol=1e-5)
    assert shapes == {
        "layers.0": (5, 15, 32),
        "layers.1.conv.depthwise_conv": (5, 64, 8),
        "layers.1.conv.norm": (5, 64, 8),
        "layers.2.self_attn": (5, 7, 32),
        "layers.3.feed_forward1.linear1": (5, 7, 48),
    }
    model.layers[3].feed_forward1.register_forward_hook(lambda _, given, out: out * 9)
    assert not torch.allclose(model(features, mask).last_hidden_state, expected, atol=1e-2)


@torch.no_grad()
def test_the_probabilities_of_the_middle_are_computed_a_few_rows_at_a_time(monkeypatch: pytest.MonkeyPatch):
    model, rows = encoder(), []
    x = frames(model)
    whole, _ = model.encode(x, CLIPS)
    softmax = conformer_stack.F.softmax
    monkeypatch.setattr(conformer_stack.F, "softmax", lambda one, dim: rows.append(len(one)) or softmax(one, dim=dim))
    monkeypatch.setattr(row_parts, "_CPU_BYTES", 5 * model.config.vocab_size * 4)
    states, left = model.encode(x, CLIPS)
    torch.testing.assert_close(states, whole, rtol=0, atol=1e-6)
    assert sum(rows) == left.total and max(rows) <= 5


def test_attention_dropout_is_refused_while_training():
    model = encoder(attention_dropout=0.1)
    model.encode(frames(model), CLIPS)
    with pytest.raises(UnsupportedError, match=r"attention_dropout=0\.1"):
        model.train().encode(frames(model), CLIPS)


def test_activation_dropout_has_an_effect_while_training_alone():
    model, plain = encoder(activation_dropout=0.9), encoder()
    x = frames(model)
    assert torch.equal(model.encode(x, CLIPS)[0], plain.encode(x, CLIPS)[0])
    for one in (model, plain):
        one.train()
    assert not torch.allclose(model.encode(x, CLIPS)[0], plain.encode(x, CLIPS)[0], atol=1e-2)


@given(LENGTHS, st.integers(0, 5))
@settings(deadline=None)
def test_pairs_are_the_frames_that_a_clip_has_by_itself(lengths: tuple[int, ...], padding: int):
    clips = Segments(lengths, CPU)
    x = torch.arange(clips.total + padding, dtype=torch.float32)[:, None]
    means = [x[start : start + length // 2 * 2, 0].view(-1, 2).mean(1) for start, length in zip(clips.starts, lengths, strict=False)]
    expected = torch.cat([x[:0, 0], *means])
    halved = clips.halved()
    assert halved.lengths == tuple(length // 2 for length in lengths)
    assert torch.equal(mean_of_pairs(x, clips.pairs(halved))[:, 0], expected)
    bucket = Bucket(clips.cu_seqlens, len(x), len(x))
    fewer = bucket.halved()
    assert torch.equal(fewer.cu_seqlens, halved.cu_seqlens) and fewer.total == len(x) // 2
    if lengths:  # a step of fixed shape has at least one clip
        pairs = bucket.pairs(fewer)
        assert pairs.dtype == torch.int32 and pairs[: halved.total].tolist() == clips.pairs(halved).tolist()
        assert (pairs[halved.total :] == -1).all()
