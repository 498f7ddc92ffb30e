"""`accelerate` for TurboCTC: what transformers computes, and transformers' own code for what this package does not have."""

import copy
import pickle
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import nullcontext, suppress
from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from torch import nn

from granite_speech import AccelerationWarning, GraniteSpeech5ForCTC, accelerate, restore
from granite_speech.errors import InputError, UnsupportedError
from granite_speech.interop.accelerate import acceleration_of
from granite_speech.modules.ctc_encoder import GraniteSpeech5Encoder
from granite_speech.transcription.live_models import ACCELERATION
from tests.interop.test_accelerate import close, trace
from tests.support.ctc_models import LENGTHS, SPECS, CTCSpec, build_ours, build_reference, labels, padded

RELEASED = SPECS[0]


@pytest.fixture(params=SPECS, ids=lambda spec: spec.name)
def spec(request) -> CTCSpec:
    return request.param


@pytest.fixture
def live() -> Any:
    return build_reference(RELEASED)


@pytest.fixture(autouse=True)
def _warnings_are_errors() -> Iterator[None]:
    """Unless a test expects it, no part runs as transformers wrote it."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", AccelerationWarning)
        yield


@cache
def reference(number: int) -> Any:
    return build_reference(SPECS[number])


@pytest.fixture
def packed(monkeypatch) -> list[int]:
    """The frames of each batch that this package encodes."""
    counts, encode = [], GraniteSpeech5Encoder.encode

    def counted(self, x, *others):
        counts.append(len(x))
        return encode(self, x, *others)

    monkeypatch.setattr(GraniteSpeech5Encoder, "encode", counted)
    return counts


@torch.no_grad()
def computed(model: Any) -> dict[str, Any]:
    """What a model computes, zero beyond each clip's end."""
    inputs = padded(model)
    encoded, output = model.encoder(**inputs), model(**inputs, labels=labels(model))
    mask = encoded.attention_mask
    alone = {"input_features": inputs["input_features"][:1]}
    return {
        "states": encoded.last_hidden_state * mask[..., None],
        "mask": mask,
        "logits": output.logits * mask[..., None],
        "loss": output.loss,
        "ids": model.generate(**inputs),
        "ids of one clip": model.generate(**alone),
        "logits of one clip": model(**alone).logits,
    }


def assert_equal(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    for name, one in theirs.items():
        if one.is_floating_point():
            assert ours[name].dtype == one.dtype and close(ours[name], one, 2e-4), name
        else:
            assert ours[name].dtype == one.dtype and torch.equal(ours[name], one), name


def test_nothing_changes_before_during_and_after(spec: CTCSpec, packed: list[int]):
    live = build_reference(spec)
    before, was = computed(live), trace(live)
    assert not packed
    assert accelerate(live) is live
    assert_equal(computed(live), before)
    assert packed == [sum(LENGTHS)] * 3 + [max(LENGTHS)] * 2, "frames without padding, once for each call"
    assert restore(live) is live
    assert trace(live) == was
    assert_equal(computed(live), before)
    assert len(packed) == 5


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(0, 40), min_size=1, max_size=4), st.integers(4, 40), st.integers(0, len(SPECS) - 1))
@torch.no_grad()
def test_any_batch_gives_what_transformers_gives(lengths: list[int], longest: int, number: int):
    """Clips without frames, too. (transformers fails on batches of fewer frames than it halves.)"""
    live = reference(number)
    inputs = padded(live, (*(min(one, longest) for one in lengths), longest))
    kept = live.encoder(**inputs).attention_mask
    theirs, path = live(**inputs).logits * kept[..., None], live.generate(**inputs)
    with accelerate(live):
        ours, our_path = live(**inputs).logits, live.generate(**inputs)
    assert torch.allclose(ours, theirs, rtol=0, atol=2e-4 * float(theirs.abs().max()))
    assert torch.equal(our_path, path) and not ours[kept == 0].any()


def test_outputs_are_of_transformers_classes_and_zero_beyond_the_end(live: Any):
    inputs = padded(live)
    expected = [type(live.encoder(**inputs)), type(live(**inputs)), type(live(**inputs, return_dict=False))]
    tuples = live.encoder(**inputs, return_dict=False)
    with accelerate(live), torch.no_grad():
        assert [type(live.encoder(**inputs)), type(live(**inputs)), type(live(**inputs, return_dict=False))] == expected
        logits = live(**inputs).logits
        assert len(live.encoder(**inputs, return_dict=False)) == len(tuples) == 2
        assert live.encoder(**inputs, output_attention_mask=False).attention_mask is None
        assert live.encoder(inputs["input_features"]).attention_mask is None
    assert not logits[2].any() and not logits[1, LENGTHS[1] // 4 :].any()


def test_the_configuration_is_read_in_each_call(live: Any):
    inputs, targets = padded(live), labels(live)
    with accelerate(live):
        for name, value in (("ctc_loss_reduction", "none"), ("ctc_zero_infinity", False), ("pad_token_id", 5), ("return_dict", False)):
            setattr(live.config, name, value)
            ours = live(**inputs, labels=targets)
            restore(live)
            theirs = live(**inputs, labels=targets)
            accelerate(live)
            assert type(ours) is type(theirs) and torch.allclose(ours[0], theirs[0], rtol=1e-4), name


def test_a_loss_of_the_users_own_is_called(live: Any):
    live.loss_function = lambda logits, labels, **options: logits.sum() * 0 + options["num_items_in_batch"]
    with accelerate(live):
        assert live(**padded(live), labels=labels(live), num_items_in_batch=7).loss == 7


def test_gradients_are_those_of_transformers(spec: CTCSpec, packed: list[int]):
    live, gradients = build_reference(spec), []
    for step in ("theirs", "ours"):
        accelerate(live) if step == "ours" else None
        live.zero_grad()
        live(**padded(live), labels=labels(live)).loss.sum().backward()
        gradients.append({name: one.grad.clone() for name, one in live.named_parameters() if one.grad is not None})
    theirs, ours = gradients
    assert packed and ours.keys() == theirs.keys()
    for name, one in theirs.items():
        assert float((ours[name] - one).abs().max()) <= 2e-3 * float(one.abs().max()) + 1e-6, name


def test_batch_norm_in_training_mode_counts_what_transformers_counts(live: Any, packed: list[int]):
    """Padding, and the odd frames that a subsampling block drops."""
    other = copy.deepcopy(live)
    accelerate(live)
    for model in (live, other):
        model.train()
    with pytest.warns(AccelerationWarning, match="BatchNorm is in training mode"):
        ours = live(**padded(live)).logits
    assert not packed and torch.equal(ours, other(**padded(live)).logits)
    assert all(torch.equal(one, other.state_dict()[name]) for name, one in live.state_dict().items())
    for module in live.modules():
        if isinstance(module, nn.BatchNorm1d):
            module.eval()
    live(**padded(live))
    assert packed, "with fixed statistics it runs here, in training too"


OTHERS: dict[str, Callable[[Any], Any]] = {
    "hidden states": lambda live: live(**padded(live), output_hidden_states=True),
    "hidden states of the encoder": lambda live: live.encoder(**padded(live), output_hidden_states=True),
    "padding on the left": lambda live: live(padded(live)["input_features"], padded(live)["attention_mask"].flip(1)),
}


@pytest.mark.parametrize("name", OTHERS)
@torch.no_grad()
def test_transformers_own_code_serves_other_calls(live: Any, packed: list[int], name: str):
    theirs = OTHERS[name](live)
    with accelerate(live):
        ours = OTHERS[name](live)
    assert not packed and type(ours) is type(theirs) and ours.keys() == theirs.keys()
    for one, other in zip(ours.to_tuple(), theirs.to_tuple(), strict=True):
        assert all(map(torch.equal, one, other)) if isinstance(one, tuple) else torch.equal(one, other)


def test_generate_returns_logits_that_are_packed_on_the_way(live: Any, packed: list[int]):
    theirs = live.generate(**padded(live), return_dict_in_generate=True)
    with accelerate(live):
        ours = live.generate(**padded(live), return_dict_in_generate=True)
    assert len(packed) == 1 and type(ours) is type(theirs) and torch.equal(ours.sequences, theirs.sequences)
    assert close(ours.logits[0], theirs.logits[0], 2e-4)


def test_wrong_calls_fail_as_in_transformers(live: Any):
    inputs = padded(live)
    calls = (
        lambda: live(),
        lambda: live(inputs["input_features"], labels=labels(live)),
        lambda: live(inputs["input_features"], inputs["attention_mask"][:, :3]),
        lambda: live(inputs["input_features"], input_features=inputs["input_features"]),
        lambda: live.encoder(inputs["input_features"][0, :, :3]),
        lambda: live.generate(None),
    )
    for call in calls:
        with pytest.raises(Exception) as theirs:
            call()
        with accelerate(live), pytest.raises(type(theirs.value)):
            call()


CHANGES: dict[str, Callable[[Any], Any]] = {
    "a value": lambda live: live.encoder.layers[1].conv.depthwise_conv.weight.data.mul_(1.3),
    "a parameter": lambda live: setattr(live.encoder.layers[0].self_attn.q_proj, "weight", nn.Parameter(torch.randn(32, 32))),
    "statistics": lambda live: live.encoder.layers[0].conv.norm.running_var.mul_(3.0),
    "eps": lambda live: setattr(live.encoder.layers[2].norm_conv, "eps", 0.5),
    "the head": lambda live: setattr(live, "ctc_head", nn.Linear(32, 23)),
    "a layer": lambda live: live.encoder.layers.__setitem__(3, copy.deepcopy(live.encoder.layers[2])),
    "float64": lambda live: live.double(),
}


@pytest.mark.parametrize("name", CHANGES)
@torch.no_grad()
def test_changes_of_the_live_model_are_taken_over(live: Any, packed: list[int], name: str):
    accelerate(live)
    first = computed(live)
    packed.clear()
    CHANGES[name](live)
    ours = computed(live)
    assert len(packed) == 5
    restore(live)
    theirs = computed(live)
    assert_equal(ours, theirs)
    assert not torch.allclose(first["logits"].double(), theirs["logits"].double(), atol=1e-7)


def test_bfloat16_is_as_close_as_transformers(live: Any):
    inputs = padded(live)
    mask = live.encoder(**inputs).attention_mask[..., None]
    with torch.no_grad():
        truth = live(**inputs).logits * mask
        live.bfloat16()
        errors = []
        for _ in ("theirs", "ours"):
            logits = live(**inputs).logits
            assert logits.dtype == torch.bfloat16
            errors.append(float((logits.float() * mask - truth).norm()))
            accelerate(live)
    assert errors[1] <= 1.5 * errors[0]


def doubled(module: nn.Module) -> None:
    own = module.forward
    module.forward = lambda x: 2 * own(x)


UNUSUAL: dict[str, tuple[Callable[[Any], Any], str]] = {
    "a hook on a layer": (lambda live: live.encoder.layers[1].register_forward_hook(lambda *_: None), "hook on encoder.layers.1"),
    "another forward": (lambda live: doubled(live.encoder.out_mid), "forward of encoder.out_mid was replaced"),
    "another padding": (lambda live: setattr(live.encoder.layers[2].conv.depthwise_conv, "padding_mode", "circular"), "padding_mode"),
    "another context": (lambda live: setattr(live.encoder.layers[3].self_attn, "context_size", 4), "context_size"),
    "another scale": (lambda live: setattr(live.encoder.layers[3].self_attn, "scaling", 0.5), "scaling"),
    "fewer layers": (lambda live: setattr(live.encoder, "layers", live.encoder.layers[:3]), "has no 3"),
    "another middle": (lambda live: setattr(live.encoder.config, "num_hidden_layers", 2), "num_hidden_layers"),
    "another activation": (lambda live: setattr(live.encoder.layers[0].feed_forward1, "activation", nn.ReLU()), "ReLU"),
    "another norm": (lambda live: setattr(live.encoder.layers[0], "norm_out", nn.Identity()), "Identity"),
}


@pytest.mark.parametrize("name", UNUSUAL)
@torch.no_grad()
def test_an_unusual_encoder_runs_as_transformers_wrote_it(live: Any, packed: list[int], name: str):
    change, reason = UNUSUAL[name]
    accelerate(live)
    change(live)
    results = []
    for expected in (pytest.warns(AccelerationWarning, match=re.escape(reason)), nullcontext()):
        with expected, suppress(RuntimeError):  # another context does not go with the distances
            results.append(live(torch.randn(1, 40, 20, generator=torch.Generator().manual_seed(0))).logits)
        restore(live)
    assert not packed
    assert torch.equal(*results) if name != "another context" else not results


def test_hooks_on_the_whole_parts_run(live: Any, packed: list[int]):
    called = []
    for module in (live, live.encoder, live.ctc_head):
        module.register_forward_hook(lambda module, given, output: called.append(type(module).__name__))
    accelerate(live)
    live(**padded(live))
    live.generate(**padded(live))
    assert called == ["GraniteSpeech5Encoder", "Linear", "GraniteSpeech5ForCTC"] * 2 and len(packed) == 2


def test_adapters_of_peft_are_followed(packed: list[int]):
    live = build_reference(SPECS[1])  # of two heads: peft replaces none that is tied
    config = LoraConfig(r=3, target_modules=["q_proj", "linear1", "pointwise_lin2"], modules_to_save=["ctc_head"], init_lora_weights=False)
    model = get_peft_model(live, config)
    with torch.no_grad():
        live.ctc_head.modules_to_save["default"].weight.mul_(1.5)
        for change in (lambda: None, model.disable_adapter_layers, model.enable_adapter_layers, model.merge_adapter):
            change()
            theirs = model(**padded(live)).logits
            accelerate(model)
            packed.clear()
            ours = model(**padded(live)).logits
            restore(model)
            kept = ours != 0
            assert len(packed) == 1 and close(ours[kept], theirs[kept], 2e-4)


def test_copies_and_pickles_are_not_accelerated(live: Any, packed: list[int]):
    accelerate(live)
    expected = computed(live)
    for other in (copy.deepcopy(live), pickle.loads(pickle.dumps(live))):
        packed.clear()
        assert type(other).__name__ == "GraniteSpeech5ForCTC" and acceleration_of(other) is None
        assert_equal(computed(other), expected)
        assert not packed


def test_the_model_of_a_transcriber_follows_the_live_one(live: Any, tmp_path):
    accelerate(live)
    with torch.no_grad():
        live.encoder.layers[0].conv.norm.weight.mul_(1.2)
    live.config.pad_token_id = 3
    twin, own = getattr(live, ACCELERATION).transcribing(), build_ours(live, tmp_path)
    assert isinstance(twin, GraniteSpeech5ForCTC) and twin.config.pad_token_id == 3 and twin.config.vocab_size == 23
    assert torch.allclose(twin(**padded(live)).logits, own(**padded(live)).logits, atol=1e-5)
    assert getattr(live, ACCELERATION).transcribing() is twin
    live.train()
    with pytest.raises(InputError, match="training mode"):
        getattr(live, ACCELERATION).transcribing()
    live.eval().encoder.layers[0].register_forward_hook(lambda *_: None)
    with pytest.raises(UnsupportedError, match=r"hook on encoder\.layers\.0"):
        getattr(live, ACCELERATION).transcribing()


def test_a_model_of_this_package_is_refused(live: Any, tmp_path):
    with pytest.raises(InputError, match="is fast already"):
        accelerate(build_ours(live, tmp_path))
