"""Modules called on their own, hooks, the language model without the rest, and gradient checkpointing, here and in transformers."""

from typing import Any

import torch
from torch import Tensor, nn

from granite_speech.errors import InputError, UnsupportedError
from tests.support.two_libraries import Call, Library, comparison, library

# transformers 5.10 and later name the parts like this; these paths work in both packages.


def encoder(lib: Library) -> Any:
    return lib.model.model.encoder


def projector(lib: Library) -> Any:
    return lib.model.model.projector


def decoder(lib: Library) -> Any:
    return lib.model.model.language_model


def language_model(lib: Library) -> Any:
    """The language model with its head, which transformers' model of speech does not have as a module."""
    if lib.name == "granite_speech":
        return lib.model.language_model
    whole = lib.GraniteForCausalLM(lib.model.config.text_config).eval()
    whole.model, whole.lm_head = lib.model.model.language_model, plain_head(lib)
    return whole


def plain_head(lib: Library) -> nn.Linear:
    """The head without the division of the logits, which the language model makes itself."""
    head = nn.Linear(*lib.model.lm_head.weight.T.shape, bias=False)
    head.weight = lib.model.lm_head.weight
    return head


def random(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(7))


def frames(count: int = 37, clips: int = 2) -> Tensor:
    return random(clips, count, 160)


def embeddings(width: int = 11, rows: int = 2) -> Tensor:
    return random(rows, width, 128) / 12


LEFT = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1], [1] * 11])
RIGHT = LEFT.flip(1)
LABELS = torch.arange(22).view(2, 11).masked_fill(LEFT == 0, -100)


def sampled(lib: Library) -> Tensor:
    whole = language_model(lib)
    torch.manual_seed(0)  # building the module in transformers draws random numbers
    return whole.generate(inputs_embeds=embeddings(), max_new_tokens=6, do_sample=True, top_k=5)


@torch.no_grad()
def layer_loop(lib: Library) -> Tensor:
    """What notebooks write to look at, or to leave out, single layers."""
    model, states = decoder(lib), embeddings() * 12.0
    rotary = model.rotary_emb(states, torch.arange(11)[None])
    for layer in model.layers:
        states = layer(states, position_embeddings=rotary)
    return model.norm(states)


def speculative(lib: Library) -> list[Tensor]:
    """Encoder, projector and language model one by one, and then the answer's tokens through the cache."""
    model, inputs = lib.model.model, lib.inputs
    with torch.no_grad():
        audio = model.projector(model.encoder(inputs["input_features"]).last_hidden_state)
        embedded = model.get_merged_audio_embeddings(inputs["input_ids"], audio)
        output = model.language_model(inputs_embeds=embedded, use_cache=True)
        states = [output.last_hidden_state]
        for token in (5, 6):
            following = model.get_input_embeddings()(torch.tensor([[token]]))
            output = model.language_model(inputs_embeds=following, past_key_values=output.past_key_values, use_cache=True)
            states.append(output.last_hidden_state)
    return states


@torch.no_grad()
def cropped(lib: Library, *crop: int, **named: int) -> list:
    """A step that checks a draft, and forgets the tokens that it refuses."""
    model, states = decoder(lib), embeddings(14)
    cache = model(inputs_embeds=states[:, :6], use_cache=True).past_key_values
    model(inputs_embeds=states[:, 6:11], past_key_values=cache)
    cache.crop(*crop, **named)
    return [cache.get_seq_length(), model(inputs_embeds=states[:, 11:], past_key_values=cache).last_hidden_state]


MODULES = {
    "encoder": Call(lambda lib: encoder(lib)(frames()).last_hidden_state),
    "encoder by name": Call(lambda lib: encoder(lib)(hidden_states=frames(), return_dict=True)[0]),
    "encoder as a tuple": Call(lambda lib: encoder(lib)(frames(), return_dict=False)),
    "encoder with hidden states": Call(lambda lib: encoder(lib)(frames(), output_hidden_states=True).hidden_states),
    "encoder with attentions": Call(
        lambda lib: encoder(lib)(frames(), output_attentions=True).attentions,
        refused=UnsupportedError,
        differs="the kernel has no weights; transformers returns attention outputs in their place",
    ),
    "block": Call(lambda lib: encoder(lib).layers[0](frames(150), encoder(lib).attention_dists)),
    "block by name": Call(lambda lib: encoder(lib).layers[5](hidden_states=frames(), attention_dists=encoder(lib).attention_dists)),
    "block with other distances": Call(
        lambda lib: encoder(lib).layers[0](frames(), encoder(lib).attention_dists * 0),
        refused=UnsupportedError,
        differs="the kernel computes the distances",
    ),
    "feed-forward": Call(lambda lib: encoder(lib).layers[1].ff1(frames())),
    "block attention": Call(lambda lib: encoder(lib).layers[1].attn(frames(128), encoder(lib).attention_dists)),
    "attention of short clips": Call(lambda lib: encoder(lib).layers[1].attn(frames(3, 4), attention_dists=encoder(lib).attention_dists)),
    "convolution": Call(lambda lib: encoder(lib).layers[1].conv(frames())),
    "depthwise convolution": Call(lambda lib: encoder(lib).layers[1].conv.depth_conv(random(2, 320, 9))),
    "the distances": Call(lambda lib: encoder(lib).attention_dists),
    "projector": Call(lambda lib: projector(lib)(frames(40))),
    "projector with a partial window": Call(lambda lib: projector(lib)(hidden_states=frames(37))),
    "Q-Former": Call(lambda lib: projector(lib).qformer(query_embeds=projector(lib).query, encoder_hidden_states=frames(8, 5))),
    "Q-Former with a mask": Call(
        lambda lib: projector(lib).qformer(
            query_embeds=projector(lib).query.expand(2, -1, -1),
            encoder_hidden_states=frames(8),
            encoder_attention_mask=torch.tensor([[1] * 8, [1] * 5 + [0] * 3]),
        )
    ),
    "Q-Former layer": Call(
        lambda lib: projector(lib).qformer.encoder.layer[0](random(3, 4, 128), encoder_hidden_states=frames(8, 3), query_length=4)
    ),
    "Q-Former attention": Call(lambda lib: projector(lib).qformer.encoder.layer[1].attention(random(3, 4, 128))),
    "get_audio_features": Call(lambda lib: lib.model.get_audio_features(lib.inputs["input_features"]).pooler_output),
    "get_audio_features by name": Call(lambda lib: lib.model.model.get_audio_features(input_features=frames(), return_dict=False)),
    "get_audio_features with states": Call(lambda lib: lib.model.get_audio_features(frames(), output_hidden_states=True).hidden_states),
    "get_merged_audio_embeddings": Call(lambda lib: lib.model.model.get_merged_audio_embeddings(lib.inputs["input_ids"], *vectors(lib))),
    "get_merged_audio_embeddings with a mask": Call(
        lambda lib: lib.model.model.get_merged_audio_embeddings(
            lib.inputs["input_ids"],
            audio_features=torch.cat((*vectors(lib), random(1, 4, 128)), dim=1),
            input_features_mask=torch.arange(vectors(lib)[0].shape[1] + 4)[None] < vectors(lib)[0].shape[1],
        )
    ),
    "get_placeholder_mask": Call(
        lambda lib: lib.model.model.get_placeholder_mask(
            torch.tensor([[3, 322, 322, 4]]), inputs_embeds=random(1, 4, 128), audio_features=random(2, 128)
        )
    ),
    "too few audio vectors": Call(
        lambda lib: lib.model.model.get_merged_audio_embeddings(lib.inputs["input_ids"], random(1, 2, 128)),
        refused=InputError,
        differs="both refuse it, each with its own error",
    ),
    "names": Call(
        lambda lib: [
            type(part).__name__
            for part in (lib.model.get_encoder(), lib.model.get_decoder(), lib.model.base_model, decoder(lib).base_model)
        ]
    ),
    "attributes": Call(lambda lib: [lib.model.base_model_prefix, lib.model.main_input_name, encoder(lib).num_layers]),
    "set_decoder": Call(lambda lib: exchanged(lib, "decoder")),
    "set_encoder": Call(lambda lib: exchanged(lib, "encoder")),
    "a module assigned to the headless model": Call(lambda lib: exchanged(lib, None)),
}


def vectors(lib: Library) -> tuple[Tensor]:
    return (random(1, int((lib.inputs["input_ids"] == 322).sum()), 128),)


@torch.no_grad()
def exchanged(lib: Library, part: str | None) -> Tensor:
    """The logits after one part has been replaced by another with zero weights."""
    model = lib.new_model()
    new = type(encoder(lib))(encoder(lib).config) if part != "decoder" else type(decoder(lib))(decoder(lib).config)
    for parameter in new.parameters():
        parameter.fill_(0.01)
    new.eval()
    if part is None:
        model.model.encoder = new
    else:
        getattr(model, f"set_{part}")(new)
    return model(**lib.inputs).logits


LANGUAGE_MODEL = {
    "embeddings": Call(lambda lib: decoder(lib)(inputs_embeds=embeddings()).last_hidden_state),
    "as a tuple": Call(lambda lib: decoder(lib)(inputs_embeds=embeddings(), use_cache=False, return_dict=False)),
    "hidden states": Call(lambda lib: decoder(lib)(inputs_embeds=embeddings(), output_hidden_states=True).hidden_states),
    "left padding": Call(lambda lib: decoder(lib)(inputs_embeds=embeddings(), attention_mask=LEFT)[0][LEFT.bool()]),
    "right padding": Call(lambda lib: decoder(lib)(inputs_embeds=embeddings(), attention_mask=RIGHT)[0][RIGHT.bool()]),
    "positions": Call(lambda lib: decoder(lib)(inputs_embeds=embeddings(), position_ids=2 * torch.arange(11)[None]).last_hidden_state),
    "the notebook of speculative decoding": Call(speculative),
    "a draft that is refused": Call(lambda lib: cropped(lib, -3)),
    "a draft that is refused, by name": Call(lambda lib: cropped(lib, tokens_to_remove=-3)),
    "a draft that is accepted": Call(lambda lib: cropped(lib, 0)),
    "columns to keep": Call(lambda lib: cropped(lib, 8), differs="5.23 refuses the number of columns to keep, which 4.56 and 5.17 take"),
    "a causal mask of rank 4": Call(
        lambda lib: decoder(lib)(inputs_embeds=embeddings(), attention_mask=torch.ones(2, 1, 11, 11).tril()),
        refused=InputError,
        differs="masks are of rank 2 here: a kernel masks by position",
    ),
    "logits": Call(lambda lib: language_model(lib)(inputs_embeds=embeddings()).logits),
    "loss": Call(lambda lib: language_model(lib)(inputs_embeds=embeddings(), labels=torch.arange(22).view(2, 11)).loss),
    "loss with padding": Call(
        lambda lib: (
            language_model(lib)(inputs_embeds=embeddings(), attention_mask=LEFT, labels=LABELS.scatter(1, torch.full((2, 1), 3), -100)).loss
        )
    ),
    "logits_to_keep": Call(lambda lib: language_model(lib)(inputs_embeds=embeddings(), logits_to_keep=2).logits),
    "generate from embeddings": Call(lambda lib: language_model(lib).generate(inputs_embeds=embeddings(), max_new_tokens=6)),
    "generate from padded embeddings": Call(
        lambda lib: language_model(lib).generate(inputs_embeds=embeddings(), attention_mask=LEFT, max_new_tokens=6)
    ),
    "beams from padded embeddings": Call(
        lambda lib: language_model(lib).generate(inputs_embeds=embeddings(), attention_mask=LEFT, max_new_tokens=6, num_beams=3)
    ),
    "generate by sampling from embeddings": Call(sampled),
    "generate with scores from embeddings": Call(
        lambda lib: (
            language_model(lib)
            .generate(inputs_embeds=embeddings(), max_new_tokens=3, return_dict_in_generate=True, output_scores=True)
            .scores
        )
    ),
    "chosen logits": Call(lambda lib: language_model(lib)(inputs_embeds=embeddings(), logits_to_keep=torch.tensor([3, 0])).logits),
    "logits as a tuple": Call(lambda lib: language_model(lib)(inputs_embeds=embeddings(), use_cache=False, return_dict=False)),
    "a layer loop": Call(layer_loop),
    "layer": Call(lambda lib: decoder(lib).layers[2](embeddings(), position_embeddings=rotary(lib), position_ids=None, use_cache=False)),
    "attention": Call(lambda lib: decoder(lib).layers[2].self_attn(embeddings(), position_embeddings=rotary(lib), attention_mask=None)[0]),
    "attention at other positions": Call(lambda lib: decoder(lib).layers[0].self_attn(embeddings(), position_embeddings=rotary(lib, 3))[0]),
    "MLP": Call(lambda lib: decoder(lib).layers[2].mlp(embeddings())),
    "activation": Call(lambda lib: decoder(lib).layers[2].mlp.act_fn(embeddings())),
    "norm": Call(lambda lib: decoder(lib).layers[2].input_layernorm(hidden_states=embeddings())),
    "rotary embedding": Call(lambda lib: decoder(lib).rotary_emb(embeddings(), torch.arange(33).view(3, 11))),
    "frequencies": Call(lambda lib: decoder(lib).rotary_emb.inv_freq),
}


def rotary(lib: Library, step: int = 1) -> tuple[Tensor, Tensor]:
    return decoder(lib).rotary_emb(embeddings(), torch.arange(0, 11 * step, step)[None])


# --- hooks -----------------------------------------------------------------------------------------------------------------------


def tensors(value: Any) -> list[Tensor]:
    """The tensors of a hook's argument or output."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, tuple | list):
        return [one for part in value for one in tensors(part)]
    return [value.last_hidden_state] if hasattr(value, "last_hidden_state") else []


def every_module(lib: Library, run: Any) -> dict[str, list[Tensor]]:
    """What hooks on the parts of the model and on all modules in them see: the first tensor out."""
    model, seen, handles = lib.new_model(), {}, []
    for name, module in model.named_modules():
        name = name.removeprefix("model.").replace("language_model.model", "language_model")
        name = name.replace("language_model.lm_head", "lm_head")
        if name in ("", "model") or "lora" in name or "base_layer" in name:
            continue

        def hook(module: nn.Module, given: tuple, output: Any, name: str = name) -> None:
            seen.setdefault(name, []).extend(one.detach().clone() for one in tensors(output)[:1])

        handles.append(module.register_forward_hook(hook))
    with torch.no_grad():
        run(model)
    if lib.name == "transformers":
        del seen["language_model.embed_tokens"][0]  # it embeds the prompt twice, once without and once with audio
    return seen


def shapes(seen: dict[str, list[Tensor]]) -> dict[str, Any]:
    return {name: [tuple(one.shape) for one in values] for name, values in seen.items()}


def values_in_forward(lib: Library) -> dict[str, list[Tensor]]:
    seen = every_module(lib, lambda model: model(**lib.inputs))
    del seen["lm_head"]  # transformers' does not divide the logits, so the test does it, in the head
    return seen


def batch_shapes(lib: Library) -> dict[str, Any]:
    seen = shapes(every_module(lib, lambda model: model(**whole_clips(lib))))
    del seen["language_model.rotary_emb"]  # here each row has positions of its own
    return seen


def with_hook(lib: Library, path: str, hook: Any, run: Any = None, kind: str = "register_forward_hook", **options: Any) -> Any:
    """The logits of the first clip, or another result, while a hook is on one module."""
    model = lib.new_model()
    handle = getattr(model.get_submodule(path) if lib.name == "transformers" else ours(model, path), kind)(hook, **options)
    result = (lambda: model(**lib.inputs).logits if run is None else run(model))()
    handle.remove()
    return result


def ours(model: Any, path: str) -> nn.Module:
    """A module by the path that it has in transformers."""
    for name in path.split("."):
        model = getattr(model, name) if not name.isdigit() else model[int(name)]
    return model


LAYER, BLOCK = "model.language_model.layers.1", "model.encoder.layers.1"


def steered(lib: Library, path: str) -> Tensor:
    return with_hook(lib, path, lambda module, given, output: first(output, lambda one: one + one.mean()))


def first(output: Any, change: Any) -> Any:
    return (change(output[0]), *output[1:]) if isinstance(output, tuple) else change(output)


def tokens(lib: Library, path: str, **options: Any) -> list:
    """Answer and shapes that a hook sees in `generate`."""
    seen = []
    hook = lambda module, given, output: seen.append(tuple(tensors(output)[0].shape))  # noqa: E731
    ids = with_hook(lib, path, hook, lambda model: model.generate(**whole_clips(lib), max_new_tokens=4, min_new_tokens=4, **options))
    # Prompts run once here, before there are beams. A step whose tokens nobody needs may run, or not.
    return [ids, seen["num_beams" in options : 4]]


def steered_tokens(lib: Library) -> Tensor:
    return with_hook(
        lib, LAYER, lambda module, given, output: output * 1.5 - 0.1, lambda model: model.generate(**whole_clips(lib), max_new_tokens=6)
    )


def backward(lib: Library) -> list[Tensor]:
    seen = []

    def run(model: Any) -> None:
        model.requires_grad_(True)(
            **lib.inputs, labels=lib.inputs["input_ids"].masked_fill(lib.inputs["input_ids"] == 322, -100)
        ).loss.backward()

    with_hook(lib, BLOCK, lambda module, given, out: seen.extend((given[0], out[0])), run, kind="register_full_backward_hook")
    return seen


class Wrapper(nn.Module):
    """A layer with something after it, as activation steering writes it."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.layer = layer

    def forward(self, hidden_states: Tensor, *arguments: Any, **options: Any) -> Tensor:
        output = self.layer(hidden_states, *arguments, **options)
        return output + 0.5 * torch.arange(output.shape[1])[None, :, None]


def wrapped(lib: Library) -> Tensor:
    model = lib.new_model()
    layers = model.model.language_model.layers
    layers[2] = Wrapper(layers[2])
    return model(**lib.inputs).logits


def replaced(lib: Library) -> Tensor:
    model = lib.new_model()
    block = model.model.encoder.layers[3]
    forward = block.forward
    block.forward = lambda hidden_states, *arguments, **options: forward(hidden_states.roll(1, dims=1), *arguments, **options)
    return model(**lib.inputs).logits


def everywhere(lib: Library) -> list:
    seen, linear = [], lib.model.model.encoder.input_linear
    handle = nn.modules.module.register_module_forward_hook(
        lambda module, given, output: (
            seen.append(tuple(output.shape)) if isinstance(module, nn.Linear) and module.weight is linear.weight else None
        )
    )
    try:
        lib.model(**lib.inputs)
    finally:
        handle.remove()
    return [one for one in seen if one[-1] == 160][:1]


def named_arguments(lib: Library) -> list:
    seen = []

    def hook(module: nn.Module, given: tuple, options: dict) -> None:
        seen.append([tuple(one.shape) for one in (*given, options.get("hidden_states")) if one is not None])

    with_hook(lib, f"{LAYER}.self_attn", hook, kind="register_forward_pre_hook", with_kwargs=True)
    return seen


HOOKS = {
    "every module in forward": Call(lambda lib: values_in_forward(lib), tolerance=2e-4),
    "the modules that are called": Call(lambda lib: sorted(every_module(lib, lambda model: model(**lib.inputs)))),
    "every module in a batch": Call(lambda lib: batch_shapes(lib)),
    "every module in generate": Call(
        lambda lib: {
            name: values[:2]
            for name, values in shapes(every_module(lib, lambda model: model.generate(**lib.inputs, max_new_tokens=3))).items()
        }
    ),
    "a changed layer": Call(lambda lib: steered(lib, LAYER)),
    "a changed attention": Call(lambda lib: steered(lib, f"{LAYER}.self_attn")),
    "a changed projection": Call(lambda lib: steered(lib, f"{LAYER}.mlp.down_proj")),
    "a changed block": Call(lambda lib: steered(lib, BLOCK)),
    "a changed depthwise convolution": Call(lambda lib: steered(lib, f"{BLOCK}.conv.depth_conv")),
    "a changed activation": Call(lambda lib: steered(lib, f"{BLOCK}.ff1.silu")),
    "changed embeddings of distances": Call(lambda lib: steered(lib, f"{BLOCK}.attn.rel_pos_emb")),
    "a changed projector": Call(lambda lib: steered(lib, "model.projector")),
    "a changed Q-Former layer": Call(lambda lib: steered(lib, "model.projector.qformer.encoder.layer.0")),
    "changed embeddings": Call(lambda lib: steered(lib, "model.language_model.embed_tokens")),
    "a changed head": Call(lambda lib: with_hook(lib, "model.language_model.norm", lambda module, given, output: output * 2)),
    "a changed input": Call(
        lambda lib: with_hook(lib, LAYER, lambda module, given: (given[0] * 0.5, *given[1:]), kind="register_forward_pre_hook")
    ),
    "a changed input of a projection": Call(
        lambda lib: with_hook(lib, f"{LAYER}.self_attn.q_proj", lambda module, given: given[0] * 0.5, kind="register_forward_pre_hook")
    ),
    "named arguments": Call(named_arguments),
    "layers in generate": Call(lambda lib: tokens(lib, LAYER)),
    "layers in beam search": Call(lambda lib: tokens(lib, LAYER, num_beams=2)),
    "blocks in generate": Call(lambda lib: tokens(lib, BLOCK)),
    "a changed layer in generate": Call(steered_tokens),
    "gradients": Call(backward, tolerance=1e-3),
    "a wrapped layer": Call(wrapped),
    "a replaced forward": Call(replaced),
    "a global hook": Call(everywhere),
}


def whole_clips(lib: Library) -> dict[str, Any]:
    """Two prompts whose clips have the same length, for which both packages compute the same."""
    texts, clip = ["USER: <|audio|>can you transcribe it?\n ASSISTANT:", "<|audio|>transcribe"], lib.clips[0]
    return dict(lib.processor(texts, [clip, clip[::-1].copy()], return_tensors="pt", padding=True))


# --- training --------------------------------------------------------------------------------------------------------------------


def gradients(lib: Library, **options: Any) -> list[Tensor]:
    """Of the language model's first layer, with gradient checkpointing."""
    model = lib.new_model()
    language = model.model.language_model.requires_grad_(True)
    language.gradient_checkpointing_enable(**options)
    language.train()
    language(inputs_embeds=embeddings().requires_grad_()).last_hidden_state.square().sum().backward()
    weights = (language.layers[0].mlp.up_proj.weight, language.norm.weight)
    return [language.is_gradient_checkpointing, *(one.grad for one in weights)]


def inputs_that_require_gradients(lib: Library) -> list[bool]:
    model = lib.new_model().requires_grad_(False)
    model.enable_input_require_grads()
    on = model.get_input_embeddings()(torch.tensor([[3]])).requires_grad
    model.disable_input_require_grads()
    return [on, model.get_input_embeddings()(torch.tensor([[3]])).requires_grad]


TRAINING = {
    "checkpointing": Call(gradients),
    "reentrant checkpointing": Call(lambda lib: gradients(lib, gradient_checkpointing_kwargs={"use_reentrant": True})),
    "checkpointing of every second layer": Call(lambda lib: gradients(lib, every_n_layers=2)),
    "inputs that require gradients": Call(inputs_that_require_gradients),
}

test_modules = comparison(MODULES)
test_language_model = comparison(LANGUAGE_MODEL)
test_hooks = comparison(HOOKS)
test_training = comparison(TRAINING)


def test_hooks_on_the_matrices_of_an_adapter():
    lib = library("granite_speech")
    model, inputs = lib.new_model(), lib.inputs
    layer = model.get_submodule("language_model.model.layers.1.self_attn.q_proj")
    before, seen = model(**inputs).logits, []
    handle = layer.lora_A.register_forward_hook(lambda module, arguments, output: seen.append(output.shape) or output * 2)
    assert not torch.allclose(model(**inputs).logits, before, atol=1e-3)
    assert seen == [(1, inputs["input_ids"].shape[1], 16)]
    handle.remove()
    assert torch.equal(model(**inputs).logits, before)
