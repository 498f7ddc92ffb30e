"""`accelerate` changes how fast a live model of transformers is, and nothing else."""

import copy
import functools
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import nn

import granite_speech
from granite_speech import AccelerationWarning, InputError, accelerate, restore
from tests.support.live_models import HAS_INNER_MODEL, LIVE_SPECS, batch, language_model, speech
from tests.support.reference_models import Spec, build_reference, clip_inputs, features, prompt, set_adapter

CLOSE = 5e-5  # of the largest value: how far two orders of summation in float32 may differ, by processor


@pytest.fixture(params=LIVE_SPECS, ids=lambda spec: spec.name)
def spec(request) -> Spec:
    return request.param


@pytest.fixture
def live(spec: Spec) -> Any:
    return build_reference(spec)


@pytest.fixture(autouse=True)
def _warnings_are_errors() -> Iterator[None]:
    """Unless a test expects it, no part runs as transformers wrote it."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", AccelerationWarning)
        yield


@pytest.fixture
def loops(monkeypatch) -> list[str]:
    """One item for each answer that transformers' own loop computed."""
    calls = []
    loop = transformers.GenerationMixin.generate

    def counted(*arguments, **options):
        calls.append("loop")
        return loop(*arguments, **options)

    monkeypatch.setattr(transformers.GenerationMixin, "generate", counted)
    return calls


def close(ours: torch.Tensor, theirs: torch.Tensor, tolerance: float = CLOSE) -> bool:
    return ours.shape == theirs.shape and float((ours - theirs).abs().max() / theirs.abs().max()) < tolerance


def trace(model: nn.Module) -> list[Any]:
    """Everything of a model that `accelerate` might touch."""
    found: list[Any] = [
        type(model),
        sorted(vars(model)),
        list(model.state_dict()),
        [id(one) for one in model.state_dict(keep_vars=True).values()],
    ]
    for name, module in model.named_modules():
        hooks = [len(getattr(module, kind)) for kind in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks")]
        found.append((name, id(module), type(module), module.forward, hooks, sorted(vars(module))))
    return found


def computed(model: Any, spec: Spec) -> dict[str, Any]:
    """What a model computes for a batch of unequal clips."""
    inputs = batch(spec)
    labels = inputs["input_ids"].masked_fill(inputs["input_ids"] == 119, -100)
    set_adapter(model, True)  # transformers' `generate` leaves it as the last request needed it
    with torch.no_grad():
        output = model(**inputs, labels=labels)
        audio = model.get_audio_features(inputs["input_features"])
        alone = clip_inputs(spec, 45)
        torch.manual_seed(0)
        sampled = model.generate(**inputs, max_new_tokens=7, do_sample=True, temperature=0.8, top_k=30, num_return_sequences=2)
        scores = model.generate(**inputs, max_new_tokens=5, do_sample=False, output_scores=True, return_dict_in_generate=True)
        return {
            "logits": output.logits,
            "loss": output.loss,
            "audio": audio.pooler_output if HAS_INNER_MODEL else audio,
            "scores": torch.stack(scores.scores),
            "greedy ids": model.generate(**inputs, max_new_tokens=9, do_sample=False),
            "greedy ids of one clip": model.generate(**alone, max_new_tokens=9, min_new_tokens=9),
            "greedy ids of text": model.generate(input_ids=prompt(0), max_new_tokens=9),
            "sampled ids": sampled,
        }


def assert_equal(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    for name, one in theirs.items():
        if one.is_floating_point():
            assert close(ours[name], one), name
        else:
            assert torch.equal(ours[name], one), name


def test_nothing_changes_before_during_and_after(spec: Spec, live: Any, loops: list[str]):
    before, was = computed(live, spec), trace(live)
    assert len(loops) == 5
    assert accelerate(live) is live
    during = computed(live, spec)
    assert len(loops) == 6, "only the answer with scores needs transformers' loop"
    assert restore(live) is live
    assert trace(live) == was
    assert_equal(during, before)
    assert_equal(computed(live, spec), before)
    assert len(loops) == 11


def test_gradients_are_those_of_transformers(spec: Spec, live: Any):
    inputs = batch(spec)
    labels = inputs["input_ids"].masked_fill(inputs["input_ids"] == 119, -100)
    gradients = []
    for step in ("theirs", "ours"):
        accelerate(live) if step == "ours" else None
        live.zero_grad()
        live(**inputs, labels=labels).loss.backward()
        gradients.append({name: one.grad.clone() for name, one in live.named_parameters() if one.grad is not None})
    theirs, ours = gradients
    assert ours.keys() == theirs.keys()
    for name, one in theirs.items():
        assert float((ours[name] - one).abs().max()) <= 1e-3 * float(one.abs().max()) + 1e-7, name


def test_training_updates_batch_norm_as_transformers_does(spec: Spec, live: Any):
    other = copy.deepcopy(live)
    accelerate(live)
    for model in (live, other):
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        model.train()
        model(**batch(spec))
    ours, theirs = live.state_dict(), other.state_dict()
    statistics = [name for name in theirs if "running" in name or "num_batches" in name]
    assert statistics
    for name in statistics:
        assert torch.allclose(ours[name].float(), theirs[name].float(), rtol=1e-4, atol=1e-5), name


def test_the_encoders_own_call_returns_what_transformers_returns(live: Any):
    encoder, x = speech(live).encoder, features(33)
    with torch.no_grad():
        theirs, calls = encoder(x), [{}]
        if HAS_INNER_MODEL:
            calls += [{"return_dict": False}, {"output_hidden_states": True}, {"output_attentions": True}]
        expected = [encoder(x, **options) for options in calls]
        accelerate(live)
        for options, one in zip(calls, expected, strict=True):
            ours = encoder(x, **options)
            assert type(ours) is type(one), options
            first, second = (one if torch.is_tensor(one) else one[0] for one in (ours, one))
            assert close(first, second)
            assert torch.is_tensor(one) or len(ours) == len(one)
    assert type(encoder(x)) is type(theirs)


def test_errors_of_encoder_and_projector_are_those_of_transformers(live: Any):
    x = features(33)
    calls = [((), {}), ((None,), {}), ((x.tolist(),), {}), ((x[0, 0],), {}), ((x.double(),), {}), ((x, x, x), {}), ((x[..., :7],), {})]
    calls += [((x[:, :0],), {}), ((), {"input_features": x}), ((x,), {"unknown": 1})]

    def outcomes() -> list[str]:
        found = []
        for module in (speech(live).encoder, speech(live).projector):
            for arguments, options in calls:
                try:
                    found.append(type(module(*arguments, **options)).__name__)
                except Exception as error:
                    found.append(f"{type(error).__name__}: {error}")
        return found

    theirs = outcomes()
    accelerate(live)
    assert outcomes() == theirs


def test_a_with_block_undoes_itself(live: Any):
    was = trace(live)
    with accelerate(live) as same:
        assert same is live and isinstance(vars(speech(live).encoder)["forward"], granite_speech.interop.follow.Replacement)
    assert trace(live) == was
    with pytest.raises(ZeroDivisionError), accelerate(live):
        raise ZeroDivisionError
    assert trace(live) == was


def test_a_with_block_inside_leaves_an_accelerated_model_accelerated():
    live = build_reference(LIVE_SPECS[0])
    was = trace(live)
    accelerate(live)
    now = trace(live)
    with accelerate(live):
        pass
    assert trace(live) == now != was
    accelerate(accelerate(live))
    restore(live)
    assert trace(live) == was
    restore(live)
    assert trace(live) == was


def test_loading_the_names_of_saved_files(spec: Spec, live: Any, tmp_path):
    inputs = clip_inputs(spec, 45)
    with torch.no_grad():
        expected = live(**inputs).logits
    live.save_pretrained(str(tmp_path))
    tensors = {name: one for file in tmp_path.glob("model*.safetensors") for name, one in load_file(file).items()}
    other = accelerate(build_reference(spec, seed=5))
    other.load_state_dict({name: one for name, one in live.state_dict().items() if "lora" in name}, strict=False)
    assert not other.load_state_dict(tensors, strict=False).unexpected_keys
    with torch.no_grad():
        assert close(other(**inputs).logits, expected)
    assert other.load_state_dict(live.state_dict()).missing_keys == []
    with pytest.raises(RuntimeError, match="Unexpected key"):
        other.load_state_dict({"no.such.weight": torch.ones(1)})


def test_weights_may_change_in_place_and_be_replaced(spec: Spec, live: Any):
    inputs = clip_inputs(spec, 45)
    accelerate(live).generate(**inputs, max_new_tokens=2)
    with torch.no_grad():
        speech(live).encoder.layers[0].ff1.up_proj.weight.mul_(-2)
        norm = language_model(live).layers[0].input_layernorm
        norm.weight = nn.Parameter(-2 * norm.weight)
    check_against_restored(live, inputs)
    live.resize_token_embeddings(140)
    check_against_restored(live, inputs)


def check_against_restored(live: Any, inputs: dict[str, torch.Tensor], **options: Any) -> None:
    """An accelerated model computes what it does once it is restored; it is accelerated again afterwards."""
    with torch.no_grad():
        ours = live(**inputs).logits, live.generate(**inputs, max_new_tokens=6, **options)
        restore(live)
        theirs = live(**inputs).logits, live.generate(**inputs, max_new_tokens=6, **options)
    assert close(ours[0].float(), theirs[0].float(), 2e-2 if live.dtype == torch.bfloat16 else CLOSE)
    assert torch.equal(ours[1], theirs[1])
    accelerate(live)


def test_another_dtype():
    spec = LIVE_SPECS[-1]
    live = accelerate(build_reference(spec))
    live.generate(**clip_inputs(spec, 45), max_new_tokens=2)
    live.double()
    inputs = clip_inputs(spec, 45)
    check_against_restored(live, inputs | {"input_features": inputs["input_features"].double()})


def test_hooks_run_and_may_change_what_they_see(live: Any, spec: Spec):
    inputs, seen = clip_inputs(spec, 45), []
    accelerate(live)
    place = speech(live).encoder.layers[0].ff1.up_proj

    def double(module: nn.Module, arguments: tuple[Any, ...], output: torch.Tensor) -> torch.Tensor:
        seen.append(output.shape)
        return output * 2

    handle = place.register_forward_hook(double)
    with (
        torch.no_grad(),
        pytest.warns(AccelerationWarning, match="encoder runs as transformers wrote it, because there is a hook on encoder"),
    ):
        hooked = live(**inputs).logits
    assert seen == [(1, 45, place.out_features)]
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore", AccelerationWarning)
        live.generate(**inputs, max_new_tokens=2)
        assert len(seen) == 2
        restore(live)
        assert close(live(**inputs).logits, hooked)
        accelerate(live)
        handle.remove()
        warnings.simplefilter("error", AccelerationWarning)
        assert not close(live(**inputs).logits, hooked)


def test_hooks_on_whole_parts_run_too():
    spec = LIVE_SPECS[0]
    live, seen = accelerate(build_reference(spec)), []
    handles = [
        one.register_forward_hook(lambda module, arguments, output: seen.append(type(module).__name__))
        for one in (speech(live).encoder, speech(live).projector, language_model(live).norm, live)
    ]
    with torch.no_grad():
        live(**clip_inputs(spec, 30))
    assert len(seen) == 4
    with torch.no_grad(), pytest.warns(AccelerationWarning, match="generate runs as transformers wrote it"):
        live.generate(**clip_inputs(spec, 30), max_new_tokens=2)
    assert len(seen) == 4 + 6  # two passes, the encoder in the first
    for one in handles:
        one.remove()


def test_a_replaced_forward_runs(monkeypatch):
    spec = LIVE_SPECS[0]
    live = accelerate(build_reference(spec))
    inputs, calls = clip_inputs(spec, 30), []
    own = live.forward

    @functools.wraps(own)
    def forward(*arguments: Any, **options: Any) -> Any:
        calls.append(1)
        return own(*arguments, **options)

    live.forward = forward
    live.generate(**inputs, max_new_tokens=3)
    assert len(calls) == 3
    del live.forward
    live.generate(**inputs, max_new_tokens=3)
    assert len(calls) == 3


def test_a_subclass_with_its_own_method_keeps_it():
    spec, calls = LIVE_SPECS[0], []

    class Mine(transformers.GraniteSpeechForConditionalGeneration):
        @functools.wraps(transformers.GraniteSpeechForConditionalGeneration.prepare_inputs_for_generation)
        def prepare_inputs_for_generation(self, *arguments: Any, **options: Any) -> Any:
            calls.append(1)
            return super().prepare_inputs_for_generation(*arguments, **options)

    live = build_reference(spec)
    live.__class__ = Mine
    accelerate(live).generate(**clip_inputs(spec, 30), max_new_tokens=3)
    assert len(calls) == 3


def test_modules_in_the_place_of_transformers_own():
    spec = LIVE_SPECS[0]
    live = accelerate(build_reference(spec))
    language_model(live).layers[0].mlp.act_fn = nn.ReLU()
    speech(live).encoder.layers[0].ff1.silu = nn.GELU()
    with pytest.warns(AccelerationWarning) as caught:
        check_against_restored(live, clip_inputs(spec, 45))
    assert {str(one.message).partition(" runs")[0] for one in caught} == {"accelerate: the encoder", "accelerate: generate"}


def test_gradient_checkpointing_is_left_to_transformers():
    spec = LIVE_SPECS[0]
    live = accelerate(build_reference(spec)).train()
    speech(live).projector.qformer.gradient_checkpointing_enable()
    inputs = clip_inputs(spec, 45)
    with pytest.warns(AccelerationWarning, match="the projector runs as transformers wrote it, because .* uses gradient checkpointing"):
        live(**inputs, labels=inputs["input_ids"].masked_fill(inputs["input_ids"] == 119, -100)).loss.backward()
    assert all(one.grad is not None for name, one in live.named_parameters() if "encoder.layers" in name)


def test_under_autocast():
    spec = LIVE_SPECS[0]
    live, inputs = build_reference(spec), clip_inputs(spec, 45)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        theirs = live(**inputs).logits.float(), live.generate(**inputs, max_new_tokens=3, num_beams=2)
        accelerate(live)
        assert close(live(**inputs).logits.float(), theirs[0], 5e-2)
        assert live.generate(**inputs, max_new_tokens=3, num_beams=2).shape == theirs[1].shape


def test_compiled():
    spec = LIVE_SPECS[2]  # one encoder layer: compiling takes long
    live, inputs = accelerate(build_reference(spec)), clip_inputs(spec, 45)
    with torch.no_grad():
        expected = live(**inputs).logits
        assert close(torch.compile(live, backend="eager")(**inputs).logits, expected)
        encoder = torch.compile(speech(live).encoder, backend="eager", fullgraph=True)
        assert close(encoder(inputs["input_features"])[0], speech(live).encoder(inputs["input_features"])[0])


@pytest.mark.parametrize("other", [nn.Linear(2, 2), None, "ibm-granite/granite-speech-3.3-2b"], ids=["module", "None", "name"])
def test_other_objects_are_refused(other: Any):
    for function in (accelerate, restore):
        with pytest.raises(InputError, match="expected transformers' GraniteSpeechForConditionalGeneration"):
            function(other)


def test_a_model_of_this_package_is_refused():
    with pytest.raises(InputError, match="is fast already"):
        accelerate(granite_speech.GraniteSpeechForConditionalGeneration.from_pretrained("embedded"))


def test_signatures_stay():
    import inspect

    live = build_reference(LIVE_SPECS[0])
    before = [inspect.signature(one) for one in (live.generate, live.forward, speech(live).encoder.forward)]
    accelerate(live)
    assert [inspect.signature(one) for one in (live.generate, live.forward, speech(live).encoder.forward)] == before
