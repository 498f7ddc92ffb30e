"""Every stage of the model against transformers, on checkpoints that differ in whatever a configuration can differ in."""

import pytest
import torch

from granite_speech import GraniteSpeechForConditionalGeneration
from granite_speech.checkpoints.weight_names import canonical_keys
from granite_speech.modules.packing import Segments
from tests.support.reference_models import (
    SPECS,
    Spec,
    build_reference,
    clip_inputs,
    features,
    prompt,
    scale_logits,
    set_adapter,
    write_released_layout,
)

Pair = tuple[Spec, torch.nn.Module, GraniteSpeechForConditionalGeneration]
CLOSE = 3e-5  # logits and states, relative to the largest
GRADIENT = 1e-3
LENGTHS = (1, 2, 12, 13, 14, 40, 45, 61)


@pytest.fixture(scope="module", params=SPECS, ids=lambda spec: spec.name)
def pair(request, tmp_path_factory) -> Pair:
    """One checkpoint in both packages; ours comes through a folder."""
    spec = request.param
    reference = build_reference(spec)
    folder = write_released_layout(reference, tmp_path_factory.mktemp("checkpoint"))
    scale_logits(reference)
    return spec, reference, GraniteSpeechForConditionalGeneration.from_pretrained(folder)


def error(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """Largest difference, relative to the largest value."""
    assert ours.shape == theirs.shape
    return float((ours - theirs).abs().max() / theirs.abs().max())


def test_weights_are_the_files(pair: Pair):
    spec, reference, ours = pair
    assert sum(one.numel() for one in ours.parameters()) == sum(one.numel() for one in reference.parameters())
    assert (ours.lm_head.weight is ours.get_input_embeddings().weight) == spec.top.get("tie_word_embeddings", True)


@pytest.mark.parametrize("frames", LENGTHS)
def test_encoder(pair: Pair, frames: int):
    _, reference, ours = pair
    with torch.no_grad():
        theirs = reference.model.encoder(features(frames), output_hidden_states=True)
        mine = ours.encoder(features(frames), output_hidden_states=True)
    assert error(mine.last_hidden_state, theirs.last_hidden_state) < CLOSE
    # transformers puts the encoder's whole output, which for `plus` is wider, in the place of the last block's.
    count = len(theirs.hidden_states) - 1
    assert len(mine.hidden_states) == count + 1
    for layer in range(count):
        assert error(mine.hidden_states[layer], theirs.hidden_states[layer]) < CLOSE, layer


@pytest.mark.parametrize("frames", LENGTHS)
def test_projector(pair: Pair, frames: int):
    spec, reference, ours = pair
    width = ours.config.projector_config.encoder_hidden_size
    states = torch.randn(frames, width, generator=torch.Generator().manual_seed(frames))
    with torch.no_grad():
        theirs = reference.model.projector(states[None])
        mine = ours.projector(states[None])
        packed, tokens = ours.project_packed(states, Segments((frames,), states.device))
    assert tokens.lengths == (spec.audio_tokens(frames),)
    assert error(mine, theirs) < CLOSE and error(packed, theirs[0]) < CLOSE


def test_language_model(pair: Pair):
    _, reference, ours = pair
    ids = prompt(0, before=19)
    set_adapter(reference, False)
    with torch.no_grad():
        theirs = reference(input_ids=ids, output_hidden_states=True)
        mine = ours(input_ids=ids, output_hidden_states=True)
    set_adapter(reference, True)
    assert error(mine.logits, theirs.logits) < CLOSE
    assert len(mine.hidden_states) == len(theirs.hidden_states)
    for layer, (a, b) in enumerate(zip(mine.hidden_states, theirs.hidden_states, strict=True)):
        assert error(a, b) < CLOSE, layer


@pytest.mark.parametrize("frames", LENGTHS)
def test_logits_of_a_lone_clip(pair: Pair, frames: int):
    spec, reference, ours = pair
    inputs = clip_inputs(spec, frames)
    with torch.no_grad():
        theirs, mine = reference(**inputs), ours(**inputs)
    assert error(mine.logits, theirs.logits) < CLOSE
    assert error(mine.audio_hidden_states, theirs.audio_hidden_states) < CLOSE
    assert torch.equal(mine.logits.argmax(-1), theirs.logits.argmax(-1))


def test_loss_and_every_gradient(pair: Pair):
    spec, reference, ours = pair
    inputs = clip_inputs(spec, 33)
    labels = inputs["input_ids"].masked_fill(inputs["input_ids"] == 119, -100)
    for model in (reference, ours):
        model.zero_grad()
    theirs, mine = reference(**inputs, labels=labels), ours(**inputs, labels=labels)
    theirs.loss.backward()
    mine.loss.backward()
    assert abs(float((mine.loss / theirs.loss).detach()) - 1) < CLOSE

    expected = {canonical_keys([name])[name]: one for name, one in reference.named_parameters()}
    # Gradients of key biases are zero but for rounding, since a softmax does not see them: hence the floor.
    floor = 1e-7 * max(float(one.grad.abs().max()) for one in expected.values() if one.grad is not None)
    compared = 0
    for name, parameter in ours.named_parameters():
        gradient, truth = parameter.grad, expected[name].grad
        assert (gradient is None) == (truth is None), name
        if truth is not None:
            assert float((gradient - truth).abs().max()) <= GRADIENT * float(truth.abs().max()) + floor, name
            compared += 1
    assert compared > 50


def test_a_padded_batch_is_computed_as_transformers_computes_it(pair: Pair):
    """Without lengths every clip counts at its padded length: pad frames leak into a clip there, and so here."""
    spec, reference, ours = pair
    short, long = 17, 52
    batch = torch.zeros(2, long, 160)
    batch[0, :short], batch[1] = features(short, seed=5)[0], features(long, seed=6)[0]
    tokens = [spec.audio_tokens(short), spec.audio_tokens(long)]
    mask = torch.arange(max(tokens)) < torch.tensor(tokens)[:, None]
    rows = [prompt(count, seed=7 + row)[0] for row, count in enumerate(tokens)]
    width = max(map(len, rows))
    ids, attention = torch.full((2, width), 117), torch.zeros(2, width, dtype=torch.int64)
    for row, one in enumerate(rows):
        ids[row, width - len(one) :], attention[row, width - len(one) :] = one, 1
    inputs = {"input_ids": ids, "attention_mask": attention, "input_features": batch, "input_features_mask": mask}
    # transformers predicts a row's first token from the padding before it; here nothing does.
    labels = ids.masked_fill((ids == 119) | (attention.cumsum(1) < 2), -100)
    with torch.no_grad():
        theirs, mine = reference(**inputs, labels=labels), ours(**inputs, labels=labels)
    kept = attention.bool()
    assert error(mine.logits[kept], theirs.logits[kept]) < CLOSE
    assert not mine.logits[~kept].any()
    assert abs(float((mine.loss / theirs.loss).detach()) - 1) < CLOSE


def test_greedy_ids(pair: Pair):
    spec, reference, ours = pair
    for frames in (21, 44):
        inputs = clip_inputs(spec, frames, seed=frames)
        theirs = reference.generate(**inputs, max_new_tokens=24, do_sample=False)
        mine = ours.generate(**inputs, max_new_tokens=24)
        assert torch.equal(mine, theirs)


def test_greedy_ids_of_text_alone(pair: Pair):
    """The adapter is off for a request without audio."""
    _, reference, ours = pair
    ids = prompt(0, before=9, seed=12)
    theirs = reference.generate(input_ids=ids, max_new_tokens=16, do_sample=False)
    assert torch.equal(ours.generate(input_ids=ids, max_new_tokens=16), theirs)
    set_adapter(reference, True)


def test_attention_weights(pair: Pair):
    spec, reference, ours = pair
    inputs = clip_inputs(spec, 30)
    reference.set_attn_implementation("eager")
    with torch.no_grad():
        theirs, mine = reference(**inputs, output_attentions=True), ours(**inputs, output_attentions=True)
    reference.set_attn_implementation("sdpa")
    assert len(mine.attentions) == len(theirs.attentions) > 0
    for a, b in zip(mine.attentions, theirs.attentions, strict=True):
        assert error(a, b) < CLOSE


def test_the_scaled_head_is_the_language_models_own():
    """`GraniteForCausalLM` divides the logits, in every version of transformers: what `scale_logits` restores is that."""
    import transformers

    spec = SPECS[3]
    reference = build_reference(spec)
    alone = transformers.GraniteForCausalLM(reference.config.text_config).eval()
    alone.model, alone.lm_head = reference.model.language_model, reference.lm_head
    ids = prompt(0, before=9)
    with torch.no_grad():
        whole = alone(input_ids=ids).logits
        scale_logits(reference)
        assert torch.equal(reference(input_ids=ids).logits, whole)
