"""Whatever somebody changes in an accelerated model, it computes what transformers computes after the same change."""

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from torch import nn
from torch.nn.utils import parametrizations, prune

from granite_speech import AccelerationWarning, accelerate, restore
from tests.support.live_models import HAS_INNER_MODEL, LIVE_SPECS, batch, language_model, speech
from tests.support.reference_models import Spec, build_reference, clip_inputs

SPEC = LIVE_SPECS[0]
HOT = 8.0 if HAS_INNER_MODEL else 1.0  # a temperature for these logits, which transformers 5.10 does not scale


def layers(live: Any) -> nn.ModuleList:
    return speech(live).encoder.layers


def decoder_layers(live: Any) -> nn.ModuleList:
    return language_model(live).layers


def head(live: Any) -> nn.Linear:
    return live.lm_head if HAS_INNER_MODEL else live.language_model.lm_head


def assign(modules: Any, **values: Any) -> None:
    for module in modules:
        for name, value in values.items():
            setattr(module, name, value)


def norms(live: Any) -> list[nn.Module]:
    return [one.conv.batch_norm for one in layers(live)]


def in_training(*modules: nn.Module) -> None:
    for module in modules:
        module.train()
        assign([one for one in module.modules() if isinstance(one, nn.Dropout)], p=0.0)


def other_multipliers(live: Any) -> None:
    assign(decoder_layers(live), residual_multiplier=0.8)
    assign([language_model(live)], embedding_multiplier=3.0)


def swapped_places(live: Any) -> None:
    for number, layer in enumerate(decoder_layers(live)):
        layer.self_attn.layer_idx = 1 - number


def louder_audio(live: Any) -> None:
    def features(*arguments: Any, **options: Any) -> Any:
        output = type(live.model).get_audio_features(live.model, *arguments, **options)
        output.pooler_output = -20 * output.pooler_output
        return output

    live.model.get_audio_features = features


def narrower(live: Any) -> None:
    config = speech(live).encoder.config.to_dict() | {"context_size": 7}
    torch.manual_seed(4)
    speech(live).encoder = type(speech(live).encoder)(type(speech(live).encoder.config)(**config)).eval()


def reversed_layers(live: Any) -> None:
    language_model(live).layers = nn.ModuleList(list(decoder_layers(live))[::-1])
    for number, layer in enumerate(decoder_layers(live)):
        layer.self_attn.layer_idx = number


def untied(live: Any) -> None:
    head(live).weight = nn.Parameter(head(live).weight.flip(0))


CHANGES: dict[str, Callable[[Any], Any]] = {
    # Served, with the changes.
    "encoder layers reversed": lambda live: setattr(speech(live).encoder, "layers", nn.ModuleList(list(layers(live))[::-1])),
    "decoder layers reversed": reversed_layers,
    "another encoder": lambda live: setattr(speech(live), "encoder", speech(build_reference(SPEC, seed=7)).encoder),
    "logits_scaling": lambda live: setattr(live.config.text_config, "logits_scaling", 3.0),
    "multipliers": other_multipliers,
    "frequencies in place": lambda live: language_model(live).rotary_emb.inv_freq.mul_(0.5),
    "no biases": lambda live: setattr(speech(live).encoder.input_linear, "bias", None),
    "a bias of the head": lambda live: setattr(head(live), "bias", nn.Parameter(torch.linspace(-9, 9, 120))),
    "an untied head": untied,
    "frozen": lambda live: live.requires_grad_(False),
    "statistics of BatchNorm alone": lambda live: in_training(*norms(live)),
    "a frozen BatchNorm": lambda live: (in_training(speech(live).encoder), [one.eval() for one in norms(live)]),
    "encoder in training mode": lambda live: in_training(speech(live).encoder),
    "an end": lambda live: setattr(live.generation_config, "eos_token_id", list(range(60))),
    # Left to transformers.
    "the last encoder layer": lambda live: layers(live).__delitem__(-1),
    "the last decoder layer": lambda live: setattr(language_model(live), "layers", decoder_layers(live)[:1]),
    "the middle of the encoder": lambda live: setattr(speech(live).encoder, "num_layers", 2),
    "a shorter context": narrower,
    "scale of the encoder's attention": lambda live: assign([one.attn for one in layers(live)], scale=0.5),
    "padding of the convolution": lambda live: assign([one.conv.depth_conv for one in layers(live)], padding=(3, 0)),
    "attention to later tokens": lambda live: assign([one.self_attn for one in decoder_layers(live)], is_causal=False),
    "the decoder's places in the cache": swapped_places,
    "no statistics of BatchNorm": lambda live: assign(norms(live), running_mean=None, running_var=None),
    "max_norm": lambda live: setattr(language_model(live).embed_tokens, "max_norm", 1.0),
    "pruned": lambda live: prune.l1_unstructured(layers(live)[0].ff1.up_proj, "weight", 0.5),
    "weight norm": lambda live: parametrizations.weight_norm(speech(live).projector.linear).parametrizations.weight.original0.data.mul_(2),
    "no parameter any more": lambda live: (
        setattr(live, "kept", speech(live).encoder.out.weight.detach() * 2),
        delattr(speech(live).encoder.out, "weight"),
        setattr(speech(live).encoder.out, "weight", live.kept),
    ),
    "projector in training mode": lambda live: in_training(speech(live).projector),
}
if HAS_INNER_MODEL:
    CHANGES["get_audio_features of the inner model"] = louder_audio


def results(live: Any, spec: Spec = SPEC) -> list[torch.Tensor]:
    inputs = batch(spec)
    torch.manual_seed(0)
    with torch.no_grad():
        # So hot that a small change of the logits changes some id.
        hot = {"do_sample": True, "top_k": 0, "temperature": HOT}
        ids = live.generate(**inputs, max_new_tokens=20, **hot)
        return [live(**inputs).logits, ids]


def assert_equal(ours: list[torch.Tensor], theirs: list[torch.Tensor], tolerance: float = 2e-5) -> None:
    torch.testing.assert_close(ours[0], theirs[0], rtol=0, atol=tolerance * float(theirs[0].abs().max()))
    assert torch.equal(ours[1], theirs[1])


@pytest.mark.filterwarnings("ignore::granite_speech.AccelerationWarning")
@pytest.mark.parametrize("name", CHANGES)
def test_a_change(name: str):
    plain, live = build_reference(SPEC), accelerate(build_reference(SPEC))
    before = results(live)
    for one in (plain, live):
        CHANGES[name](one)
    theirs = results(plain)
    # Statistics of a batch divide by small numbers.
    assert_equal(results(live), theirs, 5e-4 if "training" in name or "BatchNorm" in name else 2e-5)
    if name not in ("frozen", "encoder layers reversed"):
        assert not torch.equal(before[1], theirs[1]) or not torch.allclose(before[0], theirs[0]), "the change changes something"


@pytest.mark.filterwarnings("ignore::granite_speech.AccelerationWarning")
def test_a_function_of_somebody_elses_in_a_class_of_transformers(monkeypatch):
    kinds = [type(layers(build_reference(SPEC))[0].ff1), type(decoder_layers(build_reference(SPEC))[0].mlp), nn.LayerNorm]
    for kind in kinds:
        live = accelerate(build_reference(SPEC))
        with monkeypatch.context() as patch:
            own = kind.forward
            patch.setattr(kind, "forward", lambda self, x, own=own: 1.5 * own(self, x))
            ours = results(live)
            assert_equal(ours, results(restore(live)))
        assert not torch.allclose(ours[0], results(live)[0])


def test_a_function_of_somebody_elses_for_attention():
    from transformers import AttentionInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    def softer(module: nn.Module, *arguments: Any, scaling: float | None = None, **options: Any) -> Any:
        return sdpa_attention_forward(module, *arguments, scaling=scaling and scaling / 2, **options)

    AttentionInterface.register("softer", softer)
    live = accelerate(build_reference(SPEC))
    before = results(live)
    language_model(live).config._attn_implementation = "softer"
    with pytest.warns(AccelerationWarning, match="computes attention with 'softer'"):
        ours = results(live)
    assert_equal(ours, results(restore(live)))
    assert not torch.equal(ours[1], before[1])


def test_an_encoder_that_was_replaced_still_computes_its_own_states():
    live, x = build_reference(SPEC), batch(SPEC)["input_features"]
    old = speech(live).encoder
    with torch.no_grad():
        expected = old(x)[0]
        accelerate(live)
        speech(live).encoder = speech(build_reference(SPEC, seed=7)).encoder
        with pytest.warns(AccelerationWarning, match="another encoder has taken its place"):
            torch.testing.assert_close(old(x)[0], expected)


ROPES = {
    "dynamic": {"factor": 2.0, "original_max_position_embeddings": 16},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 16},
    "llama3": {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 16},
}


@pytest.mark.parametrize("kind", ROPES)
def test_rotary_embeddings_of_other_kinds(kind: str):
    rope = {"rope_type": kind, **ROPES[kind]}
    text = {"rope_parameters": rope | {"rope_theta": 10000.0}} if HAS_INNER_MODEL else {"rope_scaling": rope}
    spec = Spec(kind, text=text | {"max_position_embeddings": 16})
    live, theirs = build_reference(spec), results(build_reference(spec), spec)  # "dynamic" remembers the longest prompt
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", AccelerationWarning)
        accelerate(live)
        assert_equal(results(live, spec), theirs)
    said = [str(one.message).partition("because ")[2] for one in caught if one.category is AccelerationWarning]
    assert said == ([] if kind == "llama3" else [f"language_model.rotary_emb is of type '{kind}'."])


def test_audio_tokens_that_the_model_itself_emits():
    """They count as token 0, after prompts that are given as embeddings too."""
    live, inputs = build_reference(SPEC), clip_inputs(SPEC, 30)
    head(live).bias = nn.Parameter(torch.zeros(120).index_fill(0, torch.tensor([119]), 32.0))
    states = live.get_input_embeddings()(inputs["input_ids"].clamp(max=116))
    layers(live)[0].ff1.register_forward_hook(lambda module, arguments, output: None)  # audio becomes embeddings too

    def answers() -> list[torch.Tensor]:
        torch.manual_seed(0)
        hot = {"do_sample": True, "top_k": 0, "temperature": HOT, "max_new_tokens": 20, "eos_token_id": None}
        return [live.generate(**inputs, **hot), live.generate(inputs_embeds=states, **hot)]

    theirs = answers()
    assert all(bool((one[:, -20:-5] == 119).any()) for one in theirs)
    accelerate(live)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", AccelerationWarning)
        for ours, one in zip(answers(), theirs, strict=True):
            assert torch.equal(ours, one)


def test_a_method_of_a_subclass_that_the_loop_calls():
    class Mine(transformers.GraniteSpeechForConditionalGeneration):
        def _update_model_kwargs_for_generation(self, *arguments: Any, **options: Any) -> Any:
            calls.append(1)
            return super()._update_model_kwargs_for_generation(*arguments, **options)

    live, calls = build_reference(SPEC), []
    live.__class__ = Mine
    accelerate(live).generate(**clip_inputs(SPEC, 30), max_new_tokens=3)
    assert calls
