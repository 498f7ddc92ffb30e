"""Weights of modules that peft has wrapped, read without calling the module."""

import peft
import pytest
import torch
from torch import nn

from granite_speech.errors import UnsupportedError
from granite_speech.modules.wrapped_weights import weight_of


def wrapped(**options):
    model = nn.Sequential(nn.Conv1d(6, 4, 1))
    config = peft.LoraConfig(**{"r": 2, "target_modules": ["0"], "init_lora_weights": False} | options)
    return peft.get_peft_model(model, config).eval().base_model.model[0]


def by_calling(layer):
    """The weight that a call of a pointwise convolution uses."""
    return (layer(torch.eye(6)[:, :, None])[:, :, 0] - layer.bias).T


def test_of_a_plain_module():
    layer = nn.Conv1d(6, 4, 1)
    assert weight_of(layer) is layer.weight


def test_follows_pefts_switches():
    layer = wrapped()
    layer.update_layer("other", r=3, lora_alpha=6, config=peft.LoraConfig(init_lora_weights=False))
    for change in (
        lambda: None,
        lambda: layer.set_adapter("other"),
        lambda: layer.set_adapter(["default", "other"]),
        lambda: layer.enable_adapters(False),
        lambda: layer.enable_adapters(True),
        lambda: layer.merge(),
    ):
        change()
        torch.testing.assert_close(weight_of(layer)[:, :, 0], by_calling(layer), rtol=1e-5, atol=1e-5)


def test_dropout_is_refused_in_training_only():
    layer = wrapped(lora_dropout=0.1)
    weight_of(layer)
    layer.train()
    with pytest.raises(UnsupportedError, match="'default' of a Conv1d of the encoder"):
        weight_of(layer)


def test_other_adapters_are_refused():
    with pytest.raises(UnsupportedError, match="plain LoRA"):
        weight_of(wrapped(use_dora=True))
    model = peft.get_peft_model(nn.Sequential(nn.Conv1d(6, 4, 1)), peft.LoHaConfig(target_modules=["0"], init_weights=False))
    with pytest.raises(UnsupportedError, match="plain LoRA"):
        weight_of(model.base_model.model[0])
