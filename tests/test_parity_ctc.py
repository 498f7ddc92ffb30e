"""TurboCTC compared with transformers: blocks, logits, loss, gradients and token ids of dissimilar small models, in float32."""

from pathlib import Path

import pytest
import torch
import transformers

from granite_speech.config_ctc import GraniteSpeech5CTCConfig
from granite_speech.errors import ConfigError, InputError, UnsupportedError
from granite_speech.model_ctc import GraniteSpeech5ForCTC
from granite_speech.modules.ctc_encoder import GraniteSpeech5Encoder
from tests.support.ctc_models import LENGTHS, SPECS, build_ours, build_reference, labels, padded

LOGITS, GRADIENTS = 3e-4, 2e-3


@pytest.fixture(scope="module", params=SPECS, ids=lambda spec: spec.name)
def models(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory):
    reference = build_reference(request.param)
    return reference, build_ours(reference, tmp_path_factory.mktemp("ctc"))


def close(ours: torch.Tensor, theirs: torch.Tensor, mask: torch.Tensor | None = None) -> None:
    assert ours.shape == theirs.shape and ours.dtype == theirs.dtype
    if mask is not None:
        ours, theirs = ours[mask.bool()], theirs[mask.bool()]
    torch.testing.assert_close(ours, theirs, rtol=0, atol=LOGITS)


@pytest.mark.parametrize("is_ragged", [False, True])
@torch.no_grad()
def test_states_of_every_block_logits_and_mask(models, is_ragged: bool):
    reference, ours = models
    inputs = padded(reference)
    if not is_ragged:
        del inputs["attention_mask"]
    theirs, mine = (one.encoder(**inputs, output_hidden_states=True) for one in models)
    mask = inputs.get("attention_mask")
    if is_ragged:
        assert torch.equal(mine.attention_mask, theirs.attention_mask) and mine.attention_mask.dtype == theirs.attention_mask.dtype
    for number, state in enumerate(theirs.hidden_states):
        if is_ragged and number and number - 1 in ours.config.encoder_config.subsample_layers:
            mask = mask[:, : mask.shape[1] // 2 * 2].unflatten(1, (-1, 2)).all(2)
        close(mine.hidden_states[number], state, mask)
        assert mask is None or not mine.hidden_states[number][~mask.bool()].any()
    assert mine.keys() == list(theirs.keys())
    close(mine.last_hidden_state, theirs.last_hidden_state, mask)
    logits = ours(**inputs).logits
    close(logits, reference(**inputs).logits, mask)
    assert mask is None or not logits[~mask.bool()].any()


@torch.no_grad()
def test_every_block_and_its_parts_called_by_themselves(models):
    reference, ours = models
    mask = padded(reference)["attention_mask"].bool()
    x = torch.randn(*mask.shape, ours.config.encoder_config.hidden_size, generator=torch.Generator().manual_seed(3))
    for theirs, mine in zip(reference.encoder.layers, ours.encoder.layers, strict=True):
        options = {"attention_mask": mask, "position_embeddings": reference.encoder.attention_dists}
        frames = mask if mine.stride == 1 else mask[:, : mask.shape[1] // 2 * 2].unflatten(1, (-1, 2)).all(2)
        close(mine(x, **options), theirs(x, **options), frames)
        close(mine(x), theirs(x, position_embeddings=reference.encoder.attention_dists))
        close(mine.self_attn(x, **options)[0], theirs.self_attn(x, **options)[0], mask)
        close(mine.conv(x, mask), theirs.conv(x, mask)[:, : frames.shape[1]], frames)
        close(mine.feed_forward2(x), theirs.feed_forward2(x))


def test_loss_and_every_gradient(models):
    inputs = padded(models[0]) | {"labels": labels(models[0])}
    losses = []
    for one in models:
        one.zero_grad()
        losses.append(one(**inputs).loss)
        losses[-1].backward()
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-5, atol=1e-5)
    theirs, mine = ({name: p.grad for name, p in one.named_parameters()} for one in models)
    assert theirs.keys() == mine.keys()
    for name, gradient in theirs.items():
        assert (gradient is None) == (mine[name] is None), name
        if gradient is not None:
            torch.testing.assert_close(mine[name], gradient, rtol=0, atol=GRADIENTS * float(gradient.abs().max()) + 1e-7, msg=name)


def test_gradients_in_training_mode_and_the_statistics_without_padding(models):
    reference, ours = models
    inputs = padded(reference, (40, 40)) | {"labels": torch.tensor([[3, 5, 6], [8, 8, 2]])}
    del inputs["attention_mask"]
    theirs_first = inputs | {"attention_mask": torch.ones(2, 40)}  # without a mask transformers has no lengths for the loss
    before = [{name: buffer.clone() for name, buffer in one.named_buffers()} for one in models]
    try:
        gradients = []
        for one, given in ((reference, theirs_first), (ours, inputs)):
            one.train().zero_grad()
            one(**given).loss.backward()
            gradients.append({name: p.grad.clone() for name, p in one.named_parameters() if p.grad is not None})
        for name, gradient in gradients[0].items():
            largest = max(float(gradient.abs().max()), 1e-4)
            torch.testing.assert_close(gradients[1][name], gradient, rtol=0, atol=GRADIENTS * largest, msg=name)
        mine = dict(ours.named_buffers())
        for name, buffer in reference.named_buffers():
            if name in mine:
                torch.testing.assert_close(mine[name], buffer, rtol=1e-5, atol=1e-5, msg=name)
    finally:
        for one, buffers in zip(models, before, strict=True):
            one.eval().load_state_dict(buffers, strict=False)


@pytest.mark.parametrize("is_ragged", [False, True])
def test_token_ids(models, is_ragged: bool):
    inputs = padded(models[0])
    if not is_ragged:
        del inputs["attention_mask"]
    theirs, mine = (one.generate(**inputs) for one in models)
    assert torch.equal(mine, theirs) and mine.dtype == theirs.dtype
    theirs, mine = (one.generate(**inputs, return_dict_in_generate=True, output_hidden_states=True) for one in models)
    assert torch.equal(mine.sequences, theirs.sequences) and mine.keys() == list(theirs.keys())
    assert len(mine.hidden_states) == len(theirs.hidden_states)


@torch.no_grad()
def test_a_clip_in_a_batch_equals_the_clip_alone(models):
    _, ours = models
    inputs = padded(ours)
    together = ours(**inputs).logits
    for number, length in enumerate(LENGTHS):
        alone = ours(inputs["input_features"][number : number + 1, :length]).logits[0]
        torch.testing.assert_close(together[number, : len(alone)], alone, rtol=0, atol=1e-5)


def test_state_dicts_have_the_same_names_and_shapes_in_the_same_order(models):
    theirs, mine = ({name: (one.shape, one.dtype) for name, one in model.state_dict().items()} for model in models)
    assert list(theirs.items()) == list(mine.items())


def test_the_released_model_has_transformers_names_and_shapes():
    with torch.device("meta"):
        theirs = transformers.GraniteSpeech5ForCTC(transformers.GraniteSpeech5CTCConfig())
        ours = GraniteSpeech5ForCTC(GraniteSpeech5CTCConfig())
    assert [(name, one.shape) for name, one in theirs.state_dict().items()] == [
        (name, one.shape) for name, one in ours.state_dict().items()
    ]
    assert ours.num_parameters() == theirs.num_parameters()
    assert ours.encoder.out.weight is ours.ctc_head.weight


def test_folders_go_both_ways(models, tmp_path: Path):
    reference, ours = models
    ours.save_pretrained(tmp_path / "ours")
    loaded, info = transformers.GraniteSpeech5ForCTC.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    for name, tensor in reference.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    assert (loaded.ctc_head.weight is loaded.encoder.out.weight) == reference.config.tie_word_embeddings
    encoder = GraniteSpeech5Encoder.from_pretrained(tmp_path / "ours")
    encoder.save_pretrained(tmp_path / "encoder")
    again = transformers.GraniteSpeech5Encoder.from_pretrained(tmp_path / "encoder")
    for name, tensor in reference.encoder.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor) and torch.equal(encoder.state_dict()[name], tensor), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64, "auto", None], ids=str)
def test_dtypes_of_a_folder_are_those_that_transformers_gives(tmp_path: Path, dtype):
    build_reference(SPECS[0]).save_pretrained(tmp_path / "float32")
    transformers.GraniteSpeech5ForCTC.from_pretrained(tmp_path / "float32", dtype=torch.bfloat16).save_pretrained(tmp_path / "bfloat16")
    for folder in ("float32", "bfloat16"):
        theirs = transformers.GraniteSpeech5ForCTC.from_pretrained(tmp_path / folder, **{"dtype": dtype} if dtype else {})
        ours = GraniteSpeech5ForCTC.from_pretrained(tmp_path / folder, dtype=dtype)
        counters = [name for name, one in ours.named_buffers() if one.dtype == torch.int64]
        assert all(name.endswith("num_batches_tracked") for name in counters) and len(counters) == 4
        for name, tensor in theirs.state_dict().items():
            assert name in counters or ours.state_dict()[name].dtype == tensor.dtype, name
        ours.save_pretrained(tmp_path / "again")
        again = transformers.GraniteSpeech5ForCTC.from_pretrained(tmp_path / "again", **{"dtype": dtype} if dtype else {})
        assert all(torch.equal(again.state_dict()[name], tensor) for name, tensor in ours.state_dict().items() if name not in counters)


def test_two_different_heads_in_a_folder_are_not_tied(tmp_path: Path):
    reference = build_reference(SPECS[1])
    reference.config.tie_word_embeddings = True  # says the file, and its weights say otherwise
    ours = build_ours(reference, tmp_path)
    assert ours.ctc_head.weight is not ours.encoder.out.weight and not ours.config.tie_word_embeddings
    inputs = padded(ours)
    torch.testing.assert_close(ours(**inputs).logits[0], reference(**inputs).logits[0], rtol=0, atol=LOGITS)


@pytest.mark.parametrize("wanted", [0, -1, [1, -2], [7], True, False])
@torch.no_grad()
def test_chosen_hidden_states(models, wanted):
    inputs = padded(models[0], (21,))
    theirs, mine = (one(**inputs, output_hidden_states=wanted).hidden_states for one in models)
    assert (theirs is None) == (mine is None)
    for one, other in zip(mine or (), theirs or (), strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            close(one, other)


@torch.no_grad()
def test_outputs_are_tuples_without_return_dict(models):
    inputs = padded(models[0], (21,))
    theirs, mine = (one(**inputs, return_dict=False) for one in models)
    assert isinstance(mine, tuple) and len(mine) == len(theirs) == 1
    close(mine[0], theirs[0])


def test_a_clip_too_short_for_its_labels(models):
    reference, ours = models
    inputs = padded(ours, (16, 4)) | {"labels": torch.tensor([[2, 3, -100, -100, -100], [5, 5, 5, 5, 5]])}
    torch.testing.assert_close(ours(**inputs).loss, reference(**inputs).loss, rtol=1e-5, atol=1e-5)
    ours.config.ctc_zero_infinity = False
    try:
        with pytest.raises(InputError, match="labels of clip 1 that need 9 frames"):
            ours(**inputs)
    finally:
        ours.config.ctc_zero_infinity = True


WRONG = {
    "features of another width": (lambda one: {"input_features": one["input_features"][..., :-1]}, InputError, "floats"),
    "one clip without its dimension": (lambda one: {"input_features": one["input_features"][0]}, InputError, "clips, frames"),
    "a mask of another shape": (lambda one: {"attention_mask": one["attention_mask"][:, 1:]}, InputError, "one value for each frame"),
    "padding on the left": (lambda one: {"attention_mask": one["attention_mask"].flip(1)}, UnsupportedError, "on the right"),
    "labels of another batch": (lambda one: {"labels": torch.ones(1, 2, dtype=torch.long)}, InputError, "one row for each clip"),
    "labels that are no ids": (lambda one: {"labels": torch.full((4, 1), 23)}, InputError, "ids from 0 to 22"),
    "negative labels": (lambda one: {"labels": torch.full((4, 1), -1)}, InputError, "ids from 0 to 22"),
    "an unknown argument": (lambda one: {"input_ids": torch.ones(1, 1)}, InputError, "input_ids"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_wrong_input_is_refused_by_name(models, kind: str):
    change, error, message = WRONG[kind]
    inputs = padded(models[1])
    with pytest.raises(error, match=message):
        models[1](**inputs | change(inputs))


def test_a_model_without_a_blank_says_so(tmp_path: Path):
    ours = build_ours(build_reference(SPECS[0]), tmp_path)
    ours.config.pad_token_id = None
    with pytest.raises(ConfigError, match="blank"):
        ours.generate(**padded(ours))
