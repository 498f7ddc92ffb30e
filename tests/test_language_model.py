"""The language model on its own: forward, cache, loss and `generate`, against the whole model and the rows alone."""

import copy

import pytest
import torch
from torch import Tensor

from granite_speech.errors import InputError
from granite_speech.modules.outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from tests.support.small_models import attentive, small_model

CLOSE = 1e-5


def same(ours: Tensor, expected: Tensor) -> None:
    assert ours.shape == expected.shape
    assert float((ours - expected).abs().max()) <= CLOSE * float(expected.abs().max())


@pytest.fixture
def model():
    whole = attentive(small_model())
    whole.config.audio_token_index = 500  # in the whole model, a chosen audio token has the embedding of token 0
    return whole


def ids(rows: int = 2, width: int = 9) -> Tensor:
    return torch.randint(0, 90, (rows, width), generator=torch.Generator().manual_seed(3))


MASK = torch.tensor([[0, 0, 1, 1, 1, 1, 1, 1, 1], [1] * 9])


@torch.no_grad()
def test_token_ids_are_as_in_the_whole_model(model):
    for mask in (None, MASK, MASK.flip(1)):
        expected = model(input_ids=ids(), attention_mask=mask, output_hidden_states=True, output_attentions=True)
        output = model.language_model(ids(), attention_mask=mask, output_hidden_states=True, output_attentions=True)
        assert isinstance(output, CausalLMOutputWithPast) and torch.equal(output.logits, expected.logits)
        for name in ("hidden_states", "attentions"):
            assert all(map(torch.equal, getattr(output, name), getattr(expected, name)))
        headless = model.decoder(ids(), mask)
        assert isinstance(headless, BaseModelOutputWithPast)
        assert torch.equal(headless.last_hidden_state, expected.hidden_states[-1])


@torch.no_grad()
def test_the_adapter_is_on_for_embeddings_and_off_for_ids(model):
    embedded = model.get_input_embeddings()(ids())
    on, off = model.language_model(inputs_embeds=embedded).logits, model.language_model(input_ids=ids()).logits
    same(on, model(inputs_embeds=embedded).logits)
    assert float((on - off).abs().max()) > 1e-3 * float(on.abs().max())
    merged = copy.deepcopy(model)
    merged.language_model.merge_adapter()
    same(merged.language_model(input_ids=ids()).logits, on)


@pytest.mark.parametrize("given", ["input_ids", "inputs_embeds"])
@torch.no_grad()
def test_pieces_through_the_cache(model, given):
    language = model.language_model
    whole = ids(width=12) if given == "input_ids" else model.get_input_embeddings()(ids(width=12))
    mask = torch.cat((MASK, torch.ones(2, 3, dtype=torch.int64)), dim=1)
    expected = language(**{given: whole}, attention_mask=mask)
    cache, logits = None, []
    for begin, end in ((0, 9), (9, 10), (10, 12)):
        output = language(**{given: whole[:, begin:end]}, attention_mask=mask[:, :end], past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        logits.append(output.logits)
    same(torch.cat(logits, dim=1)[:, 2:], expected.logits[:, 2:])
    assert cache.get_seq_length() == 12
    headless = model.decoder(**{given: whole[:, :1]}, past_key_values=cache)
    assert headless.past_key_values is cache and cache.get_seq_length() == 13


@pytest.mark.parametrize(("crop", "kept"), [(11, 11), (-4, 11), (9, 9), (2, 2), (-15, 0), (-99, 0), (0, 15), (15, 15), (99, 15)])
@torch.no_grad()
def test_a_cropped_cache_goes_on_as_if_the_columns_had_never_been(model, crop, kept):
    language, everything = model.language_model, ids(width=15)
    mask = torch.cat((MASK, torch.ones(2, 6, dtype=torch.int64)), dim=1)
    cache = language(everything[:, :10], attention_mask=mask[:, :10]).past_key_values
    language(everything[:, 10:], attention_mask=mask, past_key_values=cache)
    cache.crop(crop)
    assert cache.get_seq_length() == kept
    new = torch.full((2, 3), 7)
    seen = torch.cat((mask[:, :kept], torch.ones_like(new)), dim=1)
    output = language(new, attention_mask=seen, past_key_values=cache)
    expected = language(torch.cat((everything[:, :kept], new), dim=1), attention_mask=seen).logits[:, kept:]
    same(output.logits, expected)


@torch.no_grad()
def test_crops_that_are_refused(model):
    cache = model.language_model(ids(width=70)).past_key_values
    for arguments, names in (((2.5,), {}), ((True,), {}), ((), {}), ((-1,), {"tokens_to_remove": -1}), ((), {"tokens_to_remove": 1})):
        with pytest.raises(InputError, match="crop"):
            cache.crop(*arguments, **names)
    assert cache.get_seq_length() == 70
    cache.reorder([0, 0, 1])
    cache.crop(66)  # in the last page, of which each row has its own
    with pytest.raises(InputError, match="reorder"):
        cache.crop(5)
    assert cache.get_seq_length() == 66


def test_loss_and_kept_logits(model):
    labels = ids().masked_fill(MASK == 0, -100)
    expected = model(input_ids=ids(), attention_mask=MASK, labels=labels)
    output = model.language_model(ids(), attention_mask=MASK, labels=labels)
    assert float(output.loss) == pytest.approx(float(expected.loss))
    output.loss.backward()
    assert model.lm_head.weight.grad is not None
    with torch.no_grad():
        kept = model.language_model(ids(), attention_mask=MASK, logits_to_keep=3, return_dict=False)
    same(kept[0], expected.logits[:, -3:].detach())
    assert len(kept) == 2
    with pytest.raises(InputError, match="logits_to_keep"):
        model.language_model(ids(), labels=labels, logits_to_keep=2)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_beams": 3},
        {"do_sample": True, "num_return_sequences": 2},
        {"repetition_penalty": 1.5},
        {"return_dict_in_generate": True, "output_scores": True},
    ],
    ids=str,
)
def test_generate_is_as_in_the_whole_model(model, options):
    answers = []
    for one in (model.language_model, model):
        torch.manual_seed(1)
        answers.append(one.generate(ids(), attention_mask=MASK, max_new_tokens=8, **options))
    ours, expected = (one.sequences if options.get("return_dict_in_generate") else one for one in answers)
    assert torch.equal(ours, expected) and ours.shape[1] > 9


def test_it_has_a_runtime_of_its_own_which_ends_with_its_weights(model):
    language = model.language_model
    language.generate(ids(), max_new_tokens=2)
    assert language.runtime is not model.runtime and language.runtime.pool.total > 1
    model.to(torch.float64)
    assert language.runtime.pool is None
    assert language.generate(ids(), max_new_tokens=2).shape == (2, 11)
    model.train()
    assert language.runtime.pool is None


def test_warming_up_makes_a_request_of_text(model):
    model.language_model.warmup(rows=[2], max_new_tokens=3)
    assert model.language_model.runtime.state is not None


def test_every_path_leads_to_the_same_modules(model):
    assert model.get_decoder() is model.model.language_model is model.language_model.model is model.language_model.get_decoder()
    assert model.get_encoder() is model.model.get_encoder() is model.encoder
    assert model.base_model is model.model and model.model.base_model is model.model
    assert model.language_model.base_model is model.decoder and model.decoder.base_model is model.decoder
    assert model.language_model.get_input_embeddings() is model.get_input_embeddings()


@pytest.mark.parametrize("way", ["model", "model.model", "set_decoder", "language_model.set_decoder"])
def test_another_decoder(model, way):
    other = small_model(seed=4)
    with torch.no_grad():
        expected = model.lm_head(other.decoder(ids()).last_hidden_state) / 8.0
    if way == "model":
        model.language_model.model = other.decoder
    elif way == "model.model":
        model.model.language_model = other.decoder
    else:
        (model if way == "set_decoder" else model.language_model).set_decoder(other.decoder)
    assert model.decoder is model.model.language_model is other.decoder
    with torch.no_grad():
        same(model(input_ids=ids()).logits, expected)
