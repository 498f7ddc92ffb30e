"""Hooks make a model run on padded tensors: what they see, and that results are those of the packed layout."""

import copy

import peft
import pytest
import torch
from torch import Tensor, nn

from granite_speech import Engine
from granite_speech.errors import InputError, UnsupportedError
from granite_speech.modules.hooks import have_hooks, require_gradient
from granite_speech.modules.packing import Segments
from granite_speech.modules.rows import Rows
from tests.support.engine_requests import TIMEOUT, length, prompt, spoken_prompt
from tests.support.small_models import attentive, batch, small_model

CLOSE = 1e-5  # relative


def nothing(*arguments) -> None:
    """A hook that changes nothing."""


def same(ours: Tensor, expected: Tensor) -> None:
    assert ours.shape == expected.shape
    assert float((ours - expected).abs().max()) <= CLOSE * float(expected.abs().max())


PLACES = {
    "a block": lambda model: model.encoder.layers[1],
    "the middle block": lambda model: model.encoder.layers[0],  # of two
    "a convolution": lambda model: model.encoder.layers[0].conv.depth_conv.conv,
    "the encoder": lambda model: model.encoder,
    "embeddings of distances": lambda model: model.encoder.layers[0].attn.rel_pos_emb,
    "a window": lambda model: model.projector.qformer.encoder.layer[0].crossattention.attention.key,
    "the projector": lambda model: model.projector,
    "a layer": lambda model: model.decoder.layers[1],
    "a projection with an adapter": lambda model: model.decoder.layers[0].self_attn.q_proj,
    "the language model": lambda model: model.decoder,
    "the embedding": lambda model: model.get_input_embeddings(),
    "the head": lambda model: model.lm_head,
}


def hooked(place: str) -> nn.Module:
    model = attentive(small_model())
    PLACES[place](model).register_forward_hook(nothing)
    return model


@pytest.mark.parametrize("place", PLACES)
@torch.no_grad()
def test_a_hook_changes_no_result(place):
    """Clips of different lengths, rows with and without the adapter, left padding, padding that holds NaN."""
    plain, model = attentive(small_model()), hooked(place)
    inputs = batch(plain)
    inputs["input_features"][1, 23:] = torch.nan
    expected, output = (one(**inputs, output_hidden_states=True) for one in (plain, model))
    same(output.logits, expected.logits)
    same(output.audio_hidden_states, expected.audio_hidden_states)
    for one, other in zip(output.hidden_states, expected.hidden_states, strict=True):
        same(one, other)
    states, other = (one.get_audio_features(inputs["input_features"], [50, 23], output_hidden_states=True) for one in (model, plain))
    same(states.last_hidden_state, other.last_hidden_state)
    same(torch.stack(states.hidden_states), torch.stack(other.hidden_states))
    following = torch.tensor([[3], [4], [5]])
    steps = (one(input_ids=following, past_key_values=made.past_key_values) for one, made in ((model, output), (plain, expected)))
    same(*(step.logits for step in steps))
    for options in ({}, {"num_beams": 2}, {"repetition_penalty": 1.3}):
        ids = (one.generate(**inputs, max_new_tokens=8, min_new_tokens=8, **options) for one in (model, plain))
        assert torch.equal(*ids)


GRADIENTS = ("a block", "the middle block", "a convolution", "embeddings of distances", "a window", "a layer", "the head")


@pytest.mark.parametrize("place", GRADIENTS)
def test_a_hook_changes_no_gradient_and_no_statistics(place):
    plain, model = small_model().train(), hooked(place).train()
    plain = attentive(plain)
    inputs = batch(plain)
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    for one in (plain, model):
        one(**inputs, labels=labels).loss.backward()
    for (name, ours), expected in zip(model.named_parameters(), plain.parameters(), strict=True):
        assert (ours.grad is None) == (expected.grad is None), name
        if ours.grad is not None:
            assert float((ours.grad - expected.grad).abs().max()) <= 1e-4 * float(expected.grad.abs().max()) + 1e-7, name
    for ours, expected in zip(model.buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(ours, expected)


@pytest.mark.parametrize("kind", ["full_backward_hook", "full_backward_pre_hook"])
def test_a_backward_hook_sees_the_middle_block(kind):
    """Its output is then a view, which autograd lets nobody change in place."""
    model, seen = small_model(), []
    getattr(model.encoder.layers[0], f"register_{kind}")(lambda module, *gradients: seen.append(gradients[-1][0]))
    states = model.encoder(torch.randn(1, 20, model.config.encoder_config.input_dim)).last_hidden_state
    states.square().sum().backward()
    assert seen[0].shape == states.shape and float(seen[0].abs().max()) > 0


@torch.no_grad()
def test_padded_frames_are_not_attended_to_by_a_block():
    block, clips = small_model().encoder.layers[0], Segments((33, 7), torch.device("cpu"))
    packed = torch.randn(40, 32)
    padded = clips.pad(packed, 35)
    padded[1, 7:] = 5.0
    expected = block(packed, clips=clips)
    same(clips.pack(block(padded, clips=clips)), expected)
    block.conv.depth_conv.register_forward_hook(nothing)
    same(clips.pack(block(padded, clips=clips)), expected)


@torch.no_grad()
def test_a_layer_called_alone_counts_positions_from_the_first_kept_token():
    layer, states = small_model().decoder.layers[0], torch.randn(2, 6, 32)
    mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]])
    expected = layer(states[:1, 2:])
    same(layer(states, attention_mask=mask)[:1, 2:], expected)
    same(layer(states[:1, 2:], position_ids=torch.arange(4)[None]), expected)
    assert not torch.allclose(layer(states[:1, 2:], position_ids=3 * torch.arange(4)[None]), expected)
    _, weights = layer.self_attn(states, attention_mask=mask, output_attentions=True)
    assert weights.shape == (2, 4, 6, 6) and torch.allclose(weights.sum(-1)[1], torch.ones(4, 6)) and not weights[0, :, :2].any()


def test_hooks_in_an_engine_see_padded_batches_and_change_no_answer():
    plain, model = attentive(small_model()), attentive(small_model())
    seen = []
    for module in (*model.encoder.layers, *model.decoder.layers, model.projector, model.lm_head):
        module.register_forward_hook(lambda module, given, output: seen.append((type(module).__name__, output.dim())))
    requests = [spoken_prompt(1, 40), prompt(2), spoken_prompt(3, 3000), prompt(4, 30)]
    answers = []
    for one in (plain, model):
        with Engine(one, None) as engine:
            handles = [engine.submit(inputs=inputs, **length(5)) for inputs in requests]
            answers.append([handle.result(TIMEOUT).token_ids for handle in handles])
    assert answers[0] == answers[1]
    assert {rank for _, rank in seen} == {3} and len({name for name, _ in seen}) == 4


@torch.no_grad()
def test_a_hook_of_the_head_sees_rows_of_the_kept_columns():
    model, seen = small_model(), []
    model.lm_head.register_forward_hook(lambda module, given, output: seen.append(tuple(given[0].shape)))
    inputs = batch(model)
    model(**inputs)
    model(**inputs, logits_to_keep=2)
    model.generate(**inputs, max_new_tokens=2, min_new_tokens=2)
    assert seen == [(*inputs["input_ids"].shape, 32), (3, 2, 32), (3, 1, 32), (3, 1, 32)]


# --- logits of the CTC head ------------------------------------------------------------------------------------------------------


def ctc_logits(model: nn.Module, clips: Tensor, lengths: list[int] | None = None) -> tuple[Tensor, ...]:
    return model.encoder(clips, lengths, output_ctc_logits=True).ctc_logits


@pytest.mark.parametrize("place", [None, "a block", "the middle block", "the encoder"], ids=str)
@torch.no_grad()
def test_ctc_logits_of_a_batch_are_those_of_its_clips_alone(place):
    """Those of the middle, whose softmax is fed back, and those of the last block."""
    plain, model = small_model(), small_model() if place is None else hooked(place)
    clips = batch(plain)["input_features"]
    clips[1, 23:] = torch.nan
    found = ctc_logits(model, clips, [50, 23])
    assert [one.shape for one in found] == [(2, 50, plain.config.encoder_config.output_dim)] * 2
    for row, frames in enumerate((50, 23)):
        for ours, expected in zip(found, ctc_logits(plain, clips[row : row + 1, :frames]), strict=True):
            same(ours[row, :frames], expected[0])
            assert not ours[row, frames:].any()


@torch.no_grad()
def test_ctc_logits_are_what_the_head_makes_of_the_middle_and_of_the_last_block():
    model, fed_back = small_model(), []
    model.encoder.out_mid.register_forward_hook(lambda module, given, output: fed_back.append(given[0]))
    clips = batch(model)["input_features"]
    output = model.encoder(clips, output_ctc_logits=True, output_hidden_states=True)
    middle, last = output.ctc_logits
    same(middle.softmax(-1), fed_back[0])
    same(last, model.encoder.out(output.last_hidden_state))
    in_order = model.encoder(clips, output_ctc_logits=True, output_hidden_states=True, return_dict=False)
    assert len(in_order) == 3 and torch.equal(in_order[0], output.last_hidden_state)
    same(torch.stack(in_order[1]), torch.stack(output.hidden_states))
    same(torch.stack(in_order[2]), torch.stack(output.ctc_logits))
    assert model.encoder(clips).ctc_logits is None and len(model.encoder(clips, return_dict=False)) == 1


# --- when there are hooks --------------------------------------------------------------------------------------------------------


def test_every_kind_of_hook_is_noticed_and_so_is_its_end():
    model = small_model()
    layer = model.decoder.layers[1].mlp
    assert not have_hooks(model)
    for kind in ("forward_hook", "forward_pre_hook", "full_backward_hook", "full_backward_pre_hook"):
        handle = getattr(layer, f"register_{kind}")(nothing)
        assert have_hooks(model.decoder) and not have_hooks(model.encoder)
        handle.remove()
        assert not have_hooks(model)
    handle = nn.modules.module.register_module_forward_hook(nothing)
    assert have_hooks(model.encoder)
    handle.remove()
    layer.forward = layer.forward
    assert have_hooks(model)
    del layer.forward
    model.get_input_embeddings().register_forward_hook(require_gradient)
    assert not have_hooks(model)


def test_a_module_of_somebody_else_is_noticed():
    model = small_model()

    class Steered(nn.Module):
        def __init__(self, layer: nn.Module):
            super().__init__()
            self.layer = layer

        def forward(self, *given, **options):
            return self.layer(*given, **options)

    model.encoder.layers[0] = Steered(model.encoder.layers[0])
    assert have_hooks(model.encoder) and not have_hooks(model.projector, model.decoder)


def test_peft_is_not_a_reason_to_pad_but_a_hook_inside_it_is(monkeypatch):
    model = small_model()
    wrapped = peft.get_peft_model(model, peft.LoraConfig(target_modules=["o_proj"]))
    assert not have_hooks(wrapped)
    handle = model.decoder.layers[0].self_attn.o_proj.base_layer.register_forward_hook(nothing)
    assert have_hooks(model.decoder)
    handle.remove()


def test_a_model_without_hooks_never_pads_its_layers(monkeypatch):
    model, padded, pad = small_model(), [], Rows.pad
    inputs = batch(model)
    monkeypatch.setattr(Rows, "pad", lambda rows, packed: padded.append(packed.shape) or pad(rows, packed))
    monkeypatch.setattr(Segments, "pad", lambda clips, packed, width: padded.append(packed.shape) or packed)
    with torch.no_grad():
        model(**inputs)
    model.generate(**inputs, max_new_tokens=3)
    assert padded == []
    model.decoder.layers[0].register_forward_hook(nothing)
    model.generate(**inputs, max_new_tokens=3)
    assert padded


def test_a_copy_has_no_hooks_of_its_own_to_notice_later():
    model = small_model()
    copied = copy.deepcopy(model)
    copied.encoder.register_forward_hook(nothing)
    assert have_hooks(copied) and not have_hooks(model)


def test_a_hook_that_no_table_of_distances_can_follow_is_refused():
    model = small_model()
    model.encoder.layers[0].attn.rel_pos_emb.register_forward_hook(lambda module, given, output: output + torch.rand(output.shape))
    with pytest.raises(UnsupportedError, match="rel_pos_emb"):
        model(**batch(model))


# --- refused ---------------------------------------------------------------------------------------------------------------------

REFUSED = {
    "block of one clip": (lambda model: model.encoder.layers[0](torch.zeros(9, 32)), InputError, r"\(9, 32\)"),
    "convolution of one clip": (lambda model: model.encoder.layers[0].conv(torch.zeros(9, 32)), InputError, r"\(9, 32\)"),
    "projector of one clip": (lambda model: model.projector(torch.zeros(9, 32)), InputError, r"\(9, 32\)"),
    "layer of one row": (lambda model: model.decoder.layers[0](torch.zeros(9, 32)), InputError, r"\(9, 32\)"),
    "mask of rank 4": (
        lambda model: model.decoder.layers[0](torch.zeros(1, 9, 32), attention_mask=torch.zeros(1, 1, 9, 9)),
        InputError,
        r"attention_mask of shape \(1, 1, 9, 9\)",
    ),
    "cache of a layer": (
        lambda model: model.decoder.layers[0](torch.zeros(1, 9, 32), past_key_values=object()),
        UnsupportedError,
        "past_key_values",
    ),
    "unknown argument of a layer": (lambda model: model.decoder.layers[0](torch.zeros(1, 9, 32), scale=2), InputError, "scale"),
    "unknown argument of the encoder": (lambda model: model.encoder(torch.zeros(1, 9, 160), masks=2), InputError, "masks"),
    "unknown argument of the language model": (lambda model: model.decoder(torch.zeros(1, 9).long(), seed=2), InputError, "seed"),
    "unknown argument of its head": (lambda model: model.language_model(torch.zeros(1, 9).long(), seed=2), InputError, "seed"),
    "unknown argument of the features": (lambda model: model.get_audio_features(torch.zeros(1, 9, 160), seed=2), InputError, "seed"),
    "text in the Q-Former": (
        lambda model: model.projector.qformer(torch.zeros(1, 4, 32), query_length=3, encoder_hidden_states=torch.zeros(1, 9, 32)),
        UnsupportedError,
        "query_length=3",
    ),
    "Q-Former without frames": (lambda model: model.projector.qformer(torch.zeros(1, 4, 32)), InputError, "encoder_hidden_states"),
    "modality": (lambda model: model.get_encoder("image"), InputError, "image"),
    "an id outside": (lambda model: model.decoder(torch.full((1, 3), 96)), InputError, "96"),
    "audio tokens in text": (lambda model: model.language_model(torch.full((1, 3), -1)), InputError, "-1"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_calls_of_modules_that_are_refused(kind):
    call, error, message = REFUSED[kind]
    with pytest.raises(error, match=message):
        call(small_model())
