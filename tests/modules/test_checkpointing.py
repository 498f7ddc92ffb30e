"""Gradient checkpointing: the same gradients and statistics from fewer saved tensors."""

import copy
import pickle

import pytest
import torch
from torch import nn

from granite_speech.errors import InputError
from tests.support.small_models import batch, small_model


def training(model: nn.Module, dropout: float = 0.0) -> nn.Module:
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = dropout
    return model.requires_grad_(True).train()


def passed(model: nn.Module) -> tuple[float, int]:
    """The loss after a backward pass, and the bytes that the forward pass kept for it, without weights."""
    inputs = batch(model)
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    kept, owned = {}, {one.data_ptr() for one in (*model.parameters(), *model.buffers())}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in owned:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    torch.manual_seed(5)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = model(**inputs, labels=labels).loss
    size = sum(kept.values())
    loss.backward()
    return float(loss), size


@pytest.mark.parametrize("hook", [False, True], ids=["packed", "padded"])
@pytest.mark.parametrize("options", [{}, {"gradient_checkpointing_kwargs": {"use_reentrant": True}}, {"every_n_layers": 2}], ids=str)
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_gradients_and_running_statistics_are_the_same(options, dropout, hook):
    plain, model = training(small_model(), dropout), training(small_model(), dropout)
    model.gradient_checkpointing_enable(**options)
    if hook:
        for one in (plain, model):
            one.encoder.layers[0].conv.batch_norm.register_forward_hook(lambda *_: None)
            one.decoder.layers[0].register_forward_hook(lambda *_: None)
    (expected, _), (loss, _) = passed(plain), passed(model)
    assert loss == pytest.approx(expected, rel=1e-6)
    for (name, ours), theirs in zip(model.named_parameters(), plain.parameters(), strict=True):
        assert (ours.grad is None) == (theirs.grad is None), name
        if ours.grad is not None:
            torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-6, msg=name)
    for (name, ours), theirs in zip(model.named_buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5, msg=name)


def test_it_keeps_less_and_can_be_switched_off():
    model = training(small_model())
    _, all_kept = passed(model)
    assert model.supports_gradient_checkpointing and not model.is_gradient_checkpointing
    model.gradient_checkpointing_enable()
    assert model.is_gradient_checkpointing and model.encoder.is_gradient_checkpointing and model.decoder.is_gradient_checkpointing
    _, kept = passed(model)
    model.gradient_checkpointing_enable(every_n_layers=2)
    _, half = passed(model)
    assert kept < 0.5 * all_kept and kept < half < all_kept
    model.eval()
    assert passed(model)[1] >= 0.5 * all_kept, "evaluation keeps everything"
    model.train()
    model.gradient_checkpointing_disable()
    assert not model.is_gradient_checkpointing and passed(model)[1] == all_kept


def test_the_names_of_newer_versions_switch_the_same():
    model = training(small_model())
    _, all_kept = passed(model)
    model.activation_checkpointing_enable({"use_reentrant": False}, every_n_layers=2)
    _, half = passed(model)
    assert half < all_kept and model.is_activation_checkpointing and model.is_gradient_checkpointing
    model.activation_checkpointing_disable()
    assert not model.is_activation_checkpointing and passed(model)[1] == all_kept


@pytest.mark.parametrize("part", ["encoder", "decoder", "model"])
def test_parts_switch_their_own_layers(part):
    model = small_model()
    getattr(model, part).gradient_checkpointing_enable()
    switched = {name: getattr(model, name).is_gradient_checkpointing for name in ("encoder", "decoder")}
    assert switched == {"encoder": part != "decoder", "decoder": part != "encoder"}


def test_no_cache_is_returned_while_layers_run_again():
    model = small_model()
    model.gradient_checkpointing_enable()
    inputs = batch(model)
    assert model(**inputs, use_cache=True).past_key_values is not None, "evaluation"
    model.train()
    with pytest.warns(UserWarning, match="use_cache=True is ignored"):
        assert model(**inputs, use_cache=True).past_key_values is None
    assert model(**inputs).past_key_values is None


def test_attention_weights_are_not_doubled_by_the_second_run():
    model = training(small_model())
    model.gradient_checkpointing_enable()
    output = model(**batch(model), output_attentions=True)
    output.logits.sum().backward()
    assert len(output.attentions) == 2


def test_frozen_weights_before_an_adapter():
    """What fine-tuning scripts do: only the adapter is trained, so that nothing before it needs gradients."""
    model = small_model()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora" in name)
    model.train()
    model.gradient_checkpointing_enable({"use_reentrant": True})
    passed(model)
    assert all(one.grad is not None for name, one in model.named_parameters() if "lora" in name)


def test_inputs_that_require_gradients():
    model = small_model().requires_grad_(False)
    ids = torch.tensor([[3, 4]])
    for _ in range(2):
        model.enable_input_require_grads()
    assert model.get_input_embeddings()(ids).requires_grad and model(input_ids=ids).logits.requires_grad
    model.disable_input_require_grads()
    assert not model(input_ids=ids).logits.requires_grad
    model.disable_input_require_grads()


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_an_adapter_of_the_encoder_alone_gets_gradients(use_reentrant):
    model = small_model().requires_grad_(False).train()
    query = model.encoder.layers[0].attn.to_q
    query.attach(2, 1.0)
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    passed(model)
    assert query.lora_B.weight.grad.any()


@pytest.mark.parametrize("way", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["deepcopy", "pickle"])
def test_copies_keep_the_switch(way):
    model = training(small_model())
    model.gradient_checkpointing_enable()
    copied = way(model)
    assert copied.is_gradient_checkpointing and passed(copied)[0] == pytest.approx(passed(model)[0])


@pytest.mark.parametrize("options", [{"gradient_checkpointing_kwargs": {"use_reentrent": False}}, {"every_n_layers": 0}], ids=str)
def test_wrong_options_are_refused(options):
    model = small_model()
    with pytest.raises(InputError, match=r"use_reentrent|every_n_layers=0"):
        model.gradient_checkpointing_enable(**options)
    assert not model.is_gradient_checkpointing
