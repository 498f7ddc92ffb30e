"""Resizing, replacing and tying token embeddings, as users write it, here and in transformers."""

import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from granite_speech.errors import InputError
from tests.support.reference_models import scale_logits
from tests.support.two_libraries import Call, comparison

SHORT = {"max_new_tokens": 6}


def logits(lib, model, ids=None):
    inputs = lib.inputs
    if ids is not None:
        inputs = {"input_ids": torch.tensor([ids])}
    with torch.no_grad():
        return scaled(lib, model)(**inputs).logits


def scaled(lib, model):
    """transformers may have replaced the head, to which the harness attaches the division by `logits_scaling`."""
    if lib.name == "transformers" and not model.get_output_embeddings()._forward_hooks:
        scale_logits(model)
    return model


def words(lib, model):
    return lib.words(model.generate(**lib.inputs, **SHORT))


def sizes(model):
    """Rows of embeddings, head and configuration, and what the modules say."""
    embeddings, head = model.get_input_embeddings(), model.get_output_embeddings()
    return (
        *(tuple(one.weight.shape) for one in (embeddings, head)),
        (embeddings.num_embeddings, head.out_features, model.config.text_config.vocab_size, embeddings.padding_idx),
        head.weight is embeddings.weight,
    )


def untied(lib):
    model = lib.new_bare_model()
    model.config.tie_word_embeddings = model.config.text_config.tie_word_embeddings = False
    head = model.get_output_embeddings()
    head.weight = nn.Parameter(head.weight.detach() * torch.linspace(0.9, 1.1, head.weight.shape[1]))
    return model


def resized(lib, model, *arguments, **options):
    """Sizes, old logits, new rows' mean, words and whether the embeddings are still the same module."""
    old = model.get_input_embeddings()
    rows = old.weight.shape[0]
    returned = model.resize_token_embeddings(*arguments, **options)
    new = [one.weight[rows:].mean(0) for one in (returned, model.get_output_embeddings())]
    shown = logits(lib, model)[..., :rows]
    return sizes(model), shown, new, words(lib, model), returned is old


def grown_and_saved(lib, model):
    model.resize_token_embeddings(330)
    folder = str(lib.new_folder())
    model.save_pretrained(folder)
    again = lib.GraniteSpeechForConditionalGeneration.from_pretrained(folder)
    return sizes(again)[:3], again.get_input_embeddings().weight


def new_token(lib):
    """A new token in a prompt, and as a label in training."""
    model = lib.new_bare_model()
    model.resize_token_embeddings(325)
    ids = torch.tensor([[5, 324, 7, 8, 324]])
    for one in model.parameters():
        one.requires_grad_(False)
    model.get_input_embeddings().weight.requires_grad_(True)
    loss = scaled(lib, model)(input_ids=ids, labels=ids).loss
    loss.backward()
    return float(loss), model.get_input_embeddings().weight.grad


def replaced(lib):
    model = lib.new_bare_model()
    embeddings, head = nn.Embedding(400, 128), nn.Linear(128, 400, bias=False)
    for one in (embeddings, head):
        one.weight.data = torch.sin(torch.arange(400 * 128.0)).view(400, 128) * 0.02
    model.set_input_embeddings(embeddings)
    model.set_output_embeddings(head)
    return logits(lib, model, [5, 399, 7]), model.get_input_embeddings() is embeddings, model.get_output_embeddings() is head


def tied_again(lib):
    model = lib.new_bare_model()
    embeddings = nn.Embedding(323, 128)
    embeddings.weight.data = torch.cos(torch.arange(323 * 128.0)).view(323, 128) * 0.02
    model.set_input_embeddings(embeddings)
    before = logits(lib, model, [5, 6, 7])
    model.tie_weights()
    return before, logits(lib, model, [5, 6, 7]), model.lm_head.weight is embeddings.weight


def tied_twice(lib):
    model = lib.new_bare_model()
    model.tie_weights()
    return sizes(model), logits(lib, model, [5, 6])


def without_head(lib):
    model = lib.new_model().model
    returned = model.resize_token_embeddings(326)
    return tuple(returned.weight.shape), model.get_output_embeddings(), model.config.text_config.vocab_size


def trained_with_peft(lib):
    """The recipe for new tokens: resize, then train the embeddings along with the adapter."""
    model = untied(lib)
    model.resize_token_embeddings(330, mean_resizing=True)
    torch.manual_seed(3)
    config = LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["embed_tokens", "lm_head"], init_lora_weights=False)
    wrapped = get_peft_model(scaled(lib, model), config)
    ids = torch.tensor([[5, 329, 7, 8, 329]])
    loss = wrapped(input_ids=ids, labels=ids).loss
    loss.backward()
    kept = [one.modules_to_save["default"].weight for one in (model.get_input_embeddings(), model.get_output_embeddings())]
    return float(loss), [one.grad for one in kept], wrapped.get_nb_trainable_parameters()


def trainable_tokens(lib):
    model = untied(lib)
    model.resize_token_embeddings(326)
    torch.manual_seed(3)
    config = LoraConfig(r=2, target_modules=["q_proj"], trainable_token_indices=[323, 324], init_lora_weights=False)
    wrapped = get_peft_model(scaled(lib, model), config)
    ids = torch.tensor([[5, 323, 7]])
    return wrapped(input_ids=ids).logits.detach(), wrapped.get_nb_trainable_parameters(), words(lib, wrapped)


CALLS = {
    "nothing": Call(lambda lib: resized(lib, lib.new_model())),
    "more tokens": Call(lambda lib: resized(lib, lib.new_model(), 330)),
    "more tokens, untied": Call(lambda lib: resized(lib, untied(lib), 330)),
    "by name, a multiple": Call(lambda lib: resized(lib, lib.new_model(), new_num_tokens=325, pad_to_multiple_of=64)),
    "only a multiple": Call(lambda lib: resized(lib, lib.new_model(), pad_to_multiple_of=8)),
    "the same number": Call(lambda lib: resized(lib, lib.new_model(), 323)),
    "around zero": Call(lambda lib: sizes((model := lib.new_model(), model.resize_token_embeddings(340, mean_resizing=False))[0])),
    "not an integer": Call(
        lambda lib: lib.new_model().resize_token_embeddings(330, pad_to_multiple_of=2.5),
        refused=InputError, differs="a typed error here, a ValueError there",
    ),
    "zero tokens": Call(
        lambda lib: lib.new_model().resize_token_embeddings(0), refused=InputError, differs="a model without tokens can do nothing",
    ),
    "saved and loaded": Call(lambda lib: grown_and_saved(lib, lib.new_bare_model())),
    "saved and loaded, untied": Call(lambda lib: grown_and_saved(lib, untied(lib))),
    "a new token": Call(new_token),
    "replaced": Call(replaced),
    "tied again": Call(tied_again),
    "tie_weights": Call(tied_twice),
    "without a head": Call(without_head),
    "modules_to_save": Call(trained_with_peft, tolerance=1e-3),
    "trainable_token_indices": Call(trainable_tokens),
    "in training mode": Call(lambda lib: (lib.new_bare_model().train().resize_token_embeddings(325).weight.requires_grad)),
}  # fmt: skip

test_embeddings = comparison(CALLS)
