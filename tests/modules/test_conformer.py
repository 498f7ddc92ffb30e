"""The encoder's blocks, chained from norm to norm: the same values as one module after another, and few operations."""

import copy
from collections import Counter
from collections.abc import Iterator
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F
from granite_kernels.op import CHOICE
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.utils._python_dispatch import TorchDispatchMode

from granite_speech.config import GraniteSpeechEncoderConfig
from granite_speech.modules.add_norm import add_norm
from granite_speech.modules.conformer_parts import fold_batch_norms
from granite_speech.modules.encoder import GraniteSpeechCTCEncoder
from granite_speech.modules.packing import Segments
from granite_speech.modules.projector import GraniteSpeechEncoderProjector
from granite_speech.modules.side_by_side import arrange
from tests.support.small_models import small_model

CLIPS = Segments((23, 0, 9), torch.device("cpu"))
# The CTC feedback is after block layers // 2: none, after the first of two, in the middle, before the last.
ENCODERS = {"1 block": (1, None), "2 blocks": (2, None), "3 blocks, two states kept": (3, [1, 2])}


def encoder(layers: int = 2, kept: list[int] | None = None) -> GraniteSpeechCTCEncoder:
    config = small_model().config.encoder_config.to_dict() | {"num_layers": layers, "cat_hidden_layers": kept}
    config = GraniteSpeechEncoderConfig(**{name: value for name, value in config.items() if name != "model_type"})
    torch.manual_seed(layers)
    made = GraniteSpeechCTCEncoder(config)
    for name, buffer in made.named_buffers():
        if name.endswith("running_mean"):
            buffer.normal_(std=0.3)
        elif name.endswith("running_var"):
            buffer.uniform_(0.5, 1.5)
    for norm in (one for one in made.modules() if isinstance(one, nn.LayerNorm)):
        nn.init.normal_(norm.weight, 1.0, 0.2)
        nn.init.normal_(norm.bias, 0.0, 0.2)
    return made.eval()


def frames(model: GraniteSpeechCTCEncoder, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(CLIPS.total, model.config.input_dim, generator=torch.Generator().manual_seed(3)).to(dtype)


def in_modules(model: GraniteSpeechCTCEncoder, x: Tensor) -> list[Tensor]:
    """Every state, the CTC logits and the result of blocks that call one module after another: padded, as for hooks."""
    collected, ctc = [], []
    out = model.encode(CLIPS.pad(x, CLIPS.longest), CLIPS, collected, ctc)
    return [CLIPS.pack(one) for one in (*collected, *ctc, out)]


def chained(model: GraniteSpeechCTCEncoder, x: Tensor) -> list[Tensor]:
    collected, ctc = [], []
    out = model.encode(x, CLIPS, collected, ctc)
    assert [one.shape for one in ctc] == [(CLIPS.total, model.config.output_dim)] * min(2, model.num_layers)
    return [*collected, *ctc, out]


@pytest.fixture(params=["torch", "triton"])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setenv(CHOICE, request.param)
    return request.param


class Calls(TorchDispatchMode):
    """Counts operations by name."""

    def __init__(self) -> None:
        super().__init__()
        self.names: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        self.names[func._schema.name.split("::")[1].strip("_")] += 1
        return func(*args, **kwargs or {})


@pytest.mark.parametrize("name", ENCODERS)
@torch.no_grad()
def test_every_state_is_that_of_one_module_after_another(name: str, monkeypatch: pytest.MonkeyPatch):
    model = encoder(*ENCODERS[name])
    x = frames(model)
    expected = in_modules(model, x)
    for backend in ("torch", "triton"):
        monkeypatch.setenv(CHOICE, backend)
        for ours, modules in zip(chained(model, x), expected, strict=True):
            torch.testing.assert_close(ours, modules, rtol=0, atol=2e-5)


@torch.no_grad()
def test_the_same_in_bfloat16(monkeypatch: pytest.MonkeyPatch):
    model = encoder().bfloat16()
    truth, x = copy.deepcopy(model).double(), frames(model, torch.bfloat16)
    expected = in_modules(truth, x.double())[-1]
    eager = (in_modules(model, x)[-1] - expected).square().mean().sqrt()
    monkeypatch.setenv(CHOICE, "triton")
    ours = (chained(model, x)[-1] - expected).square().mean().sqrt()
    assert ours <= 1.25 * eager


@torch.no_grad()
def test_a_block_adds_and_norms_four_times_and_the_table_of_blocks_is_made_once(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv(CHOICE, "triton")
    counts = {}
    for layers in (2, 3):
        model = encoder(layers)
        arrange(model)
        x = frames(model)
        with Calls() as calls:
            chained(model, x)
        counts[layers] = calls.names
    assert counts[2]["attention_blocks"] == counts[3]["attention_blocks"] == 1
    assert counts[2]["add_layer_norm"] == 2 * 4 + 1, "one after the feedback"
    block = counts[3] - counts[2]
    assert block["add_layer_norm"] == 4
    assert block["native_layer_norm"] == block["add"] == block["rsqrt"] == block["softmax"] == block["to_copy"] == 0
    assert block["mm"] + block["addmm"] == 6, "q|k|v, out, down twice, and the two of the convolution"
    assert block["silu_linear"] == 2
    assert block["block_attention"] == block["depthwise_conv"] == 1


def test_gradients_are_those_of_one_module_after_another(backend: str):
    model = encoder(3)
    x = frames(model)
    incoming = torch.randn(CLIPS.total, model.config.hidden_dim, generator=torch.Generator().manual_seed(4))
    gradients = []
    for run in (in_modules, chained):
        model.zero_grad()
        (run(model, x)[-1] * incoming).sum().backward()
        gradients.append({name: one.grad.clone() for name, one in model.named_parameters() if one.grad is not None})
    expected, ours = gradients
    assert ours.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(ours[name], expected[name], rtol=0, atol=1e-4 * float(expected[name].abs().max()), msg=name)


@torch.no_grad()
def test_weights_side_by_side_give_the_same_result_and_an_adapter_on_them_is_not_lost(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv(CHOICE, "triton")
    model = encoder()
    x = frames(model)
    with Calls() as calls:
        before = chained(model, x)[-1]
    apart = calls.names["mm"]
    arrange(model)
    with Calls() as calls:
        torch.testing.assert_close(chained(model, x)[-1], before, rtol=0, atol=1e-5)
    assert calls.names["mm"] == apart - model.num_layers
    model.layers[0].attn.to_q.attach(2, 1.0, initial=False)
    expected = in_modules(model, x)[-1]
    assert float((expected - before).abs().max()) > 1e-3
    with Calls() as calls:
        torch.testing.assert_close(chained(model, x)[-1], expected, rtol=0, atol=2e-5)
    assert calls.names["lora_linear"] == 1, "q of that block, and k and v without it"
    assert calls.names["mm"] == apart - model.num_layers


@pytest.mark.parametrize("name", ["1", "1.ff1", "0.attn", "0.conv", "1.ff2"])
def test_a_wrapped_block_or_part_of_one_is_called(name: str, monkeypatch: pytest.MonkeyPatch):
    """As FSDP, activation checkpointing and torch.compile wrap modules: a method of what is inside would find parameters in shards."""
    monkeypatch.setenv(CHOICE, "triton")
    model = encoder()
    x = frames(model)
    expected = chained(model, x)[-1]
    parent, _, last = f"layers.{name}".rpartition(".")
    wrapped = checkpoint_wrapper(model.get_submodule(f"layers.{name}"))
    setattr(model.get_submodule(parent), last, wrapped)
    with patch.object(wrapped, "checkpoint_fn", side_effect=wrapped.checkpoint_fn) as checkpoint:
        torch.testing.assert_close(chained(model, x)[-1], expected, rtol=0, atol=2e-5)
    checkpoint.assert_called_once()
    module = wrapped._checkpoint_wrapped_module
    setattr(model.get_submodule(parent), last, module)
    with patch.object(module, "_compiled_call_impl", side_effect=module._call_impl) as compiled:  # as `module.compile()` sets it
        torch.testing.assert_close(chained(model, x)[-1], expected, rtol=0, atol=2e-5)
    compiled.assert_called_once()


class Halved(Tensor):
    """As tensors that are quantized or distributed: only PyTorch's own functions find the values, which here are twice those in memory."""

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, arguments: tuple = (), options: dict | None = None) -> Any:
        if function in (F.linear, F.layer_norm):
            with torch._C.DisableTorchFunctionSubclass():
                arguments = [2 * one if isinstance(one, cls) else one for one in arguments]
                return function(*arguments, **{name: 2 * one if isinstance(one, cls) else one for name, one in (options or {}).items()})
        return super().__torch_function__(function, types, arguments, options)


@torch.no_grad()
def test_weights_that_are_more_than_memory_are_left_to_pytorch(backend: str):
    model = encoder()
    x = frames(model)
    expected = chained(model, x)[-1]
    block = model.layers[1]
    for module in (block.ff1.up_proj, block.attn.to_q, block.attn.pre_norm, block.post_norm):
        module.weight = nn.Parameter((module.weight / 2).as_subclass(Halved))
    torch.testing.assert_close(chained(model, x)[-1], expected, rtol=0, atol=2e-5)


@torch.no_grad()
def test_norms_of_another_kind_are_called(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv(CHOICE, "triton")

    class Doubled(nn.LayerNorm):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    x, delta = torch.randn(2, 5, 8).unbind()
    usual, doubled, plain = nn.LayerNorm(8), Doubled(8), nn.LayerNorm(8, elementwise_affine=False)
    total = x + 0.5 * delta
    for norm in (usual, doubled, plain):
        found = add_norm(x, delta, norm, multiplier=0.5)
        for ours, expected in zip(found, (total, norm(total)), strict=True):
            torch.testing.assert_close(ours, expected)
        for following in (usual, doubled):
            found = add_norm(x, delta, norm, following, multiplier=0.5)
            for ours, expected in zip(found, (norm(total), following(norm(total))), strict=True):
                torch.testing.assert_close(ours, expected)


@torch.no_grad()
def test_autocast_computes_norms_in_float32(backend: str):
    model = encoder()
    x = frames(model)
    with torch.autocast("cpu", torch.bfloat16):
        ours, expected = chained(model, x), in_modules(model, x)
    assert [one.dtype for one in ours] == [one.dtype for one in expected]
    scale = float(expected[-1].float().abs().max())
    torch.testing.assert_close(ours[-1].float(), expected[-1].float(), rtol=0, atol=0.05 * scale)


def test_batch_norms_are_folded_together_as_each_alone():
    norms = [nn.BatchNorm1d(6, eps=eps).eval() for eps in (1e-5, 1e-5, 1e-3)]
    x = torch.randn(9, 6)
    for norm in norms:
        nn.init.normal_(norm.weight), nn.init.normal_(norm.bias), norm.running_mean.normal_(), norm.running_var.uniform_(0.1, 2)
    for some in (norms[:2], norms):
        for norm, (scale, shift) in zip(some, fold_batch_norms(some), strict=True):
            torch.testing.assert_close(scale * x + shift, norm(x))
    assert fold_batch_norms([norms[0].bfloat16()])[0][0].dtype == torch.float32


@torch.no_grad()
def test_batch_norm_in_training_mode_of_one_block_alone(backend: str):
    model = encoder()
    model.layers[1].conv.batch_norm.train()
    state = copy.deepcopy(model.state_dict())
    x = frames(model)
    expected = in_modules(model, x)[-1]
    model.load_state_dict(state)
    torch.testing.assert_close(chained(model, x)[-1], expected, rtol=0, atol=2e-5)
    assert not torch.equal(model.layers[1].conv.batch_norm.running_mean, state["layers.1.conv.batch_norm.running_mean"])


def test_the_projector_gives_the_same_with_kernels_and_its_hooks_fire(monkeypatch: pytest.MonkeyPatch):
    projector: GraniteSpeechEncoderProjector = small_model().projector
    windows = torch.randn(4 * projector.window_size, 32, generator=torch.Generator().manual_seed(5))
    expected = projector.project(windows, None)
    monkeypatch.setenv(CHOICE, "triton")
    with Calls() as calls:
        torch.testing.assert_close(projector.project(windows, None), expected, rtol=0, atol=2e-5)
    assert calls.names["window_attention"] == 2
    assert calls.names["add_layer_norm"] == 2, "the first cross-attention adds the same queries to all windows"
    seen = []
    norm = projector.qformer.encoder.layer[0].output_query.LayerNorm
    norm.register_forward_hook(lambda module, arguments, output: seen.append(arguments[0].shape))
    projector.project(windows, None)
    assert len(seen) == 1


@torch.no_grad()
@pytest.mark.parametrize("name", ["query", "key", "value", "dense"])
def test_a_hook_in_the_projector_may_return_columns(name: str, monkeypatch: pytest.MonkeyPatch):
    """A kernel reads rows."""
    projector: GraniteSpeechEncoderProjector = small_model().projector
    windows = torch.randn(projector.window_size, 32, generator=torch.Generator().manual_seed(5))
    expected = projector.project(windows, None)
    for path, module in projector.named_modules():
        if path.endswith(f".{name}"):
            module.register_forward_hook(lambda module, arguments, output: output.mT.contiguous().mT)
    monkeypatch.setenv(CHOICE, "triton")
    torch.testing.assert_close(projector.project(windows, None), expected, rtol=0, atol=2e-5)


def test_sums_in_place_change_neither_the_result_nor_the_input():
    model = encoder()
    block, x = model.layers[0], torch.randn(CLIPS.total, model.config.hidden_dim)
    before, with_gradients = x.clone(), block(x, clips=CLIPS).detach()
    with torch.no_grad(), patch("torch.add", wraps=torch.add) as added:
        torch.testing.assert_close(block(x, clips=CLIPS), with_gradients, rtol=0, atol=1e-5)
    assert added.call_count == 1  # the first sum alone is a new tensor
    assert torch.equal(x, before)
