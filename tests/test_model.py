"""The model's behaviour beyond parity: independent rows, the adapter per row, the cache, and refused arguments."""

import copy

import pytest
import torch

from granite_speech import GraniteSpeechConfig, GraniteSpeechForConditionalGeneration, GraniteSpeechModel, InputError, UnsupportedError
from granite_speech.errors import ConfigError
from tests.support.reference_models import SPECS, build_reference, clip_inputs, features, prompt, write_released_layout

SPEC = SPECS[0]
ALONE = 1e-5  # relative error between a row in a batch and the row alone


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> GraniteSpeechForConditionalGeneration:
    """The first parity checkpoint: an adapter, CTC feedback in the middle, an even kernel size."""
    return GraniteSpeechForConditionalGeneration.from_pretrained(
        write_released_layout(build_reference(SPEC), tmp_path_factory.mktemp("checkpoint"))
    )


def left_padded(rows: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    """Token ids `(batch, longest)` and their mask."""
    width = max(map(len, rows))
    ids, mask = torch.full((len(rows), width), 117), torch.zeros(len(rows), width, dtype=torch.int64)
    for row, one in enumerate(rows):
        ids[row, width - len(one) :], mask[row, width - len(one) :] = one, 1
    return {"input_ids": ids, "attention_mask": mask}


def batch_of(lengths: list[int | None]) -> tuple[dict, list[dict]]:
    """A padded batch of prompts, and each row alone. A length is the number of frames of the row's clip, or None for no clip."""
    alone, clips = [], []
    for row, frames in enumerate(lengths):
        tokens = SPEC.audio_tokens(frames) if frames is not None else 0
        one = {"input_ids": prompt(tokens, before=3 + row, after=6 - row % 3, seed=row)}
        if frames is not None:
            one["input_features"] = features(frames, seed=row)
            clips.append(one["input_features"][0])
        alone.append(one)
    batch = left_padded([one["input_ids"][0] for one in alone])
    if clips:
        batch["input_features"] = torch.nn.utils.rnn.pad_sequence(clips, batch_first=True, padding_value=float("nan"))
        batch["input_features_lengths"] = [len(one) for one in clips]
    return batch, alone


@pytest.mark.parametrize("lengths", [[61, 13, 1, 40], [26, 26], [5], [13, 14, 12, 39, 27, 2]])
def test_a_clip_in_a_batch_gives_the_same_result_as_alone(model, lengths):
    clips = [features(frames, seed=frames)[0] for frames in lengths]
    padded = torch.nn.utils.rnn.pad_sequence(clips, batch_first=True, padding_value=float("nan"))
    with torch.no_grad():
        states = model.encoder(padded, lengths).last_hidden_state
        audio = model.get_audio_features(padded, lengths).pooler_output
        for row, clip in enumerate(clips):
            lone = model.encoder(clip[None]).last_hidden_state[0]
            assert float((states[row, : len(clip)] - lone).abs().max()) <= ALONE * float(lone.abs().max())
            assert not states[row, len(clip) :].any()
            vectors = model.get_audio_features(clip[None]).pooler_output[0]
            assert float((audio[row, : len(vectors)] - vectors).abs().max()) <= ALONE * float(vectors.abs().max())
            assert not audio[row, len(vectors) :].any()


@pytest.mark.parametrize("lengths", [[30, None], [None, 7, None, 55], [None, None], [44, 1, 13]])
def test_rows_of_a_batch_give_the_same_results_as_alone(model, lengths):
    """Rows with and without audio, and therefore with and without the adapter, in one batch."""
    batch, alone = batch_of(lengths)
    with torch.no_grad():
        together = model(**batch).logits
        for row, one in enumerate(alone):
            lone = model(**one).logits[0]
            assert float((together[row, -len(lone) :] - lone).abs().max()) <= ALONE * float(lone.abs().max())
    new = model.generate(**batch, max_new_tokens=12, eos_token_id=[])[:, batch["input_ids"].shape[1] :]
    for row, one in enumerate(alone):
        assert torch.equal(new[row], model.generate(**one, max_new_tokens=12, eos_token_id=[])[0, one["input_ids"].shape[1] :])


def test_the_adapter_is_on_for_audio_and_off_for_text(model):
    """Compared with the merged adapter and with no adapter, which give clearly different logits."""
    merged, plain = copy.deepcopy(model), copy.deepcopy(model)
    merged.merge_adapter()
    for layer in plain.language_model.model.layers:
        for projection in (layer.self_attn.q_proj, layer.self_attn.v_proj):
            projection.lora_A = projection.lora_B = None
    audio, text = clip_inputs(SPEC, 25), {"input_ids": prompt(0, before=8)}
    with torch.no_grad():
        for inputs, right, wrong in ((audio, merged, plain), (text, plain, merged)):
            logits = model(**inputs).logits
            scale = float(logits.abs().max())
            assert float((logits - right(**inputs).logits).abs().max()) <= ALONE * scale
            assert float((logits - wrong(**inputs).logits).abs().max()) > 1e-2 * scale


def test_the_adapter_stays_on_through_cached_steps(model):
    batch, _ = batch_of([30, None])
    with torch.no_grad():
        whole = model(**batch)
        following = torch.tensor([[5, 6], [7, 8]])
        mask = torch.cat((batch["attention_mask"], torch.ones_like(following)), dim=1)
        step = model(input_ids=following, attention_mask=mask, past_key_values=whole.past_key_values)
        longer = batch | {"input_ids": torch.cat((batch["input_ids"], following), dim=1), "attention_mask": mask}
        expected = model(**longer).logits[:, -2:]
    assert step.past_key_values is whole.past_key_values
    assert float((step.logits - expected).abs().max()) <= ALONE * float(expected.abs().max())


@pytest.mark.parametrize("pieces", [(1,) * 9, (4, 1, 4), (70, 1, 1)])
def test_text_in_pieces_through_the_cache_gives_the_same_logits(model, pieces):
    ids = prompt(0, before=sum(pieces), after=0)
    cache, logits = None, []
    with torch.no_grad():
        whole = model(input_ids=ids, use_cache=False)
        for piece in ids.split(pieces, dim=1):
            output = model(input_ids=piece, past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            logits.append(output.logits)
    assert whole.past_key_values is None
    assert cache.get_seq_length() == sum(pieces)
    assert float((torch.cat(logits, dim=1) - whole.logits).abs().max()) <= ALONE * float(whole.logits.abs().max())


def test_right_padding_masked_columns_and_explicit_positions(model):
    ids = prompt(0, before=10, after=0)
    with torch.no_grad():
        plain = model(input_ids=ids).logits
        right = model(input_ids=torch.cat((ids, ids[:, :3]), 1), attention_mask=torch.tensor([[1] * 10 + [0] * 3])).logits
        assert float((right[:, :10] - plain).abs().max()) <= ALONE * float(plain.abs().max())
        shifted = model(input_ids=ids, position_ids=torch.arange(7, 17)[None]).logits
        assert float((shifted - plain).abs().max()) <= 1e-4 * float(plain.abs().max())
        stretched = model(input_ids=ids, position_ids=2 * torch.arange(10)[None]).logits
        assert float((stretched - plain).abs().max()) > 1e-3 * float(plain.abs().max())
        mask = torch.ones(1, 10, dtype=torch.int64)
        mask[0, 4] = 0
        hole = model(input_ids=ids, attention_mask=mask).logits[mask.bool()]
        without = torch.arange(10) != 4
        same = model(input_ids=ids[:, without], position_ids=torch.arange(10)[without][None]).logits[0]
        assert float((hole - same).abs().max()) <= ALONE * float(plain.abs().max())


def test_two_clips_in_one_prompt(model):
    first, second = features(20, seed=1)[0], features(35, seed=2)[0]
    ids = torch.cat((prompt(SPEC.audio_tokens(20)), prompt(SPEC.audio_tokens(35))), dim=1)
    padded = torch.nn.utils.rnn.pad_sequence([first, second], batch_first=True)
    with torch.no_grad():
        output = model(input_ids=ids, input_features=padded, input_features_lengths=torch.tensor([20, 35]))
        embeddings = model.embed_tokens(ids)
        vectors = torch.cat([model.get_audio_features(one[None]).pooler_output[0] for one in (first, second)])
        embeddings[ids == 119] = vectors
        merged = model(inputs_embeds=embeddings).logits
    assert float((output.logits - merged).abs().max()) <= ALONE * float(merged.abs().max())


def test_the_output_can_be_requested_in_several_ways(model):
    inputs = clip_inputs(SPEC, 25)
    with torch.no_grad():
        full = model(**inputs, output_hidden_states=True)
        assert list(full) == ["logits", "past_key_values", "hidden_states", "audio_hidden_states"]
        assert full["logits"] is full.logits is full[0] is full.to_tuple()[0]
        assert full.loss is None and "loss" not in full
        as_tuple = model(**inputs, return_dict=False, use_cache=False)
        assert isinstance(as_tuple, tuple) and torch.equal(as_tuple[0], full.logits)
        places = torch.tensor([0, 4, 5])
        for kept, expected in ((3, full.logits[:, -3:]), (places, full.logits[:, places])):
            few = model(**inputs, logits_to_keep=kept).logits
            assert float((few - expected).abs().max()) <= ALONE * float(expected.abs().max())
        width = inputs["input_ids"].shape[1]
        assert torch.equal(model(**inputs, cache_position=torch.arange(width)).logits, full.logits)
        headless = model.model(**inputs)
        assert torch.equal(model.lm_head(headless.last_hidden_state) / 8.0, full.logits)


def test_both_attribute_paths_lead_to_the_same_modules(model):
    assert model.model.encoder is model.encoder and model.model.projector is model.projector
    assert model.model.language_model is model.language_model.model
    assert model.lm_head is model.language_model.lm_head
    assert isinstance(model.model, GraniteSpeechModel)
    assert {name.split(".")[0] for name in model.state_dict()} == {"encoder", "projector", "language_model"}
    assert model.num_parameters() == sum(one.numel() for one in model.parameters())


def test_state_dicts_of_other_layouts_load(model):
    other = copy.deepcopy(model)
    torch.nn.init.zeros_(other.encoder.out.weight)
    newer = {
        f"model.{name}".replace("model.language_model.model.", "model.language_model."): one for name, one in model.state_dict().items()
    }
    newer["lm_head.weight"] = newer.pop("model.language_model.lm_head.weight")
    other.load_state_dict(newer)
    assert all(torch.equal(a, b) for a, b in zip(other.state_dict().values(), model.state_dict().values(), strict=True))


def test_results_in_other_dtypes_are_close_to_float64(model):
    inputs = clip_inputs(SPEC, 25)
    wide = copy.deepcopy(model).to(torch.float64)
    with torch.no_grad():
        truth, logits = wide(**inputs).logits, model(**inputs).logits
        assert truth.dtype == torch.float64
        assert float((logits - truth).abs().max() / truth.abs().max()) < 1e-5
        for dtype in (torch.bfloat16, torch.float16):
            narrow = copy.deepcopy(model).to(dtype)(**inputs).logits
            assert narrow.dtype == dtype and bool(narrow.isfinite().all())
            assert float((narrow - truth).abs().mean() / truth.abs().mean()) < 0.1


def test_training_mode_uses_dropout_and_updates_running_statistics(model):
    trained = copy.deepcopy(model).train()
    before = trained.encoder.layers[0].conv.batch_norm.running_mean.clone()
    inputs = clip_inputs(SPEC, 25)
    labels = inputs["input_ids"].masked_fill(inputs["input_ids"] == 119, -100)
    losses = {trained(**inputs, labels=labels).loss.item() for _ in range(3)}
    assert len(losses) == 3
    assert trained(**inputs).past_key_values is None and trained(**inputs, use_cache=True).past_key_values is not None
    assert not torch.equal(trained.encoder.layers[0].conv.batch_norm.running_mean, before)
    trained(**inputs, labels=labels).loss.backward()
    assert all(one.grad is not None for name, one in trained.named_parameters() if "lora" in name)


def test_the_loss_of_a_batch_is_the_mean_over_all_predictions(model):
    batch, alone = batch_of([30, None, 44])
    labels = batch["input_ids"].masked_fill((batch["input_ids"] == 119) | (batch["attention_mask"] == 0), -100)
    with torch.no_grad():
        together = model(**batch, labels=labels).loss
        total, count = 0.0, 0
        for one in alone:
            targets = one["input_ids"].masked_fill(one["input_ids"] == 119, -100)
            predictions = int((targets[:, 1:] != -100).sum())
            total, count = total + float(model(**one, labels=targets).loss) * predictions, count + predictions
    assert abs(float(together) - total / count) < 1e-5


def test_batch_norm_in_training_ignores_padding(model):
    """Its statistics are those of the packed frames."""
    conv = copy.deepcopy(model.encoder.layers[0].conv).train()
    conv.dropout.p = 0.0
    from granite_speech.modules.packing import Segments

    frames = torch.randn(23, 32)
    packed = conv(frames, clips=Segments((9, 14), frames.device))
    hidden = torch.nn.functional.glu(torch.nn.functional.linear(conv.norm(frames), conv.up_conv.weight[:, :, 0], conv.up_conv.bias))
    k = conv.depth_conv.conv.weight.shape[-1]
    rows = [
        torch.nn.functional.conv1d(torch.nn.functional.pad(one.T, (k // 2, k // 2 - (k + 1) % 2)), conv.depth_conv.conv.weight, groups=96).T
        for one in hidden.split((9, 14))
    ]
    normed = torch.nn.functional.batch_norm(torch.cat(rows), None, None, conv.batch_norm.weight, conv.batch_norm.bias, training=True)
    expected = torch.nn.functional.linear(torch.nn.functional.silu(normed), conv.down_conv.weight[:, :, 0], conv.down_conv.bias)
    assert torch.allclose(packed, expected, atol=1e-5)


class ForeignCache:
    def get_seq_length(self):
        return 0


def inputs_with(**changes):
    return {**clip_inputs(SPEC, 25), **changes}


REFUSED = {
    "nothing": ({}, "neither"),
    "ids and embeddings": ({"input_ids": prompt(0), "inputs_embeds": torch.zeros(1, 9, 48)}, "both"),
    "embeddings and features": ({"inputs_embeds": torch.zeros(1, 9, 48), "input_features": features(9)}, "input_ids"),
    "unknown argument": (inputs_with(encoder_outputs=None, token_type_ids=1), "unknown arguments token_type_ids"),
    "ids in lists": ({"input_ids": [[1, 2]]}, "input_ids of type list"),
    "rank of ids": ({"input_ids": prompt(0)[0]}, r"\(9,\)"),
    "dtype of ids": ({"input_ids": prompt(0).float()}, "float32"),
    "token outside": ({"input_ids": torch.tensor([[3, 500]])}, "500"),
    "negative token": ({"input_ids": torch.tensor([[3, -1]])}, "-1"),
    "audio token without audio": ({"input_ids": prompt(6)}, "6 audio tokens in input_ids and 0 audio vectors"),
    "too many audio tokens": ({"input_ids": prompt(9), "input_features": features(25)}, "9 audio tokens in input_ids and 6 audio vectors"),
    "audio without a place": ({"input_ids": prompt(0), "input_features": features(25)}, "0 audio tokens"),
    "rank of features": (inputs_with(input_features=features(25)[0]), r"\(25, 160\)"),
    "width of features": (inputs_with(input_features=torch.zeros(1, 25, 80)), "80 features per frame"),
    "features of another kind": (inputs_with(input_features=[1.0]), "list"),
    "number of lengths": (inputs_with(input_features_lengths=[25, 25]), r"\[25, 25\]"),
    "length too large": (inputs_with(input_features_lengths=[26]), r"\[26\]"),
    "length no integer": (inputs_with(input_features_lengths=torch.tensor([2.5])), r"2\.5"),
    "shape of feature mask": (inputs_with(input_features_mask=torch.ones(1, 5, dtype=torch.bool)), r"\(1, 5\)"),
    "mask against lengths": (
        inputs_with(input_features_lengths=[25], input_features_mask=torch.tensor([[True] * 5 + [False]])),
        r"\[5\] true values",
    ),
    "rank of mask": (inputs_with(attention_mask=torch.ones(1, 1, 15, 15)), r"\(1, 1, 15, 15\)"),
    "narrow mask": (inputs_with(attention_mask=torch.ones(1, 3)), r"\(1, 3\)"),
    "additive mask": (inputs_with(attention_mask=torch.full((1, 15), -1e9)), "0 .masked. and 1"),
    "shape of positions": (inputs_with(position_ids=torch.arange(4)[None]), "position_ids"),
    "foreign cache": (inputs_with(past_key_values=ForeignCache()), "ForeignCache"),
    "legacy cache": (inputs_with(past_key_values=((torch.zeros(1), torch.zeros(1)),)), "tuple"),
    "cache position": (inputs_with(cache_position=torch.arange(1, 16)), "cache_position"),
    "labels of another shape": (inputs_with(labels=torch.zeros(1, 4, dtype=torch.int64)), r"\(1, 4\)"),
    "labels and logits_to_keep": (inputs_with(labels=torch.zeros(1, 15, dtype=torch.int64), logits_to_keep=1), "logits_to_keep"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_forward_refuses_bad_arguments(model, kind):
    arguments, message = REFUSED[kind]
    with pytest.raises(InputError, match=message):
        model(**arguments)


def test_a_cache_that_does_not_fit_the_call_is_refused(model):
    cache = model(input_ids=prompt(0)).past_key_values
    with pytest.raises(InputError, match="2 rows for past_key_values of 1"):
        model(input_ids=prompt(0).expand(2, -1), past_key_values=cache)
    with pytest.raises(UnsupportedError, match="output_attentions"), torch.no_grad():
        model(input_ids=prompt(0), past_key_values=cache, output_attentions=True)


def test_a_continued_cache_records_no_gradient(model):
    ids = prompt(0, before=8, after=0)
    with torch.no_grad():
        expected = model(input_ids=ids[:, 5:], past_key_values=model(input_ids=ids[:, :5]).past_key_values).logits
    cache = model(input_ids=ids[:, :5]).past_key_values
    with pytest.warns(UserWarning, match="No gradient flows"):
        output = model(input_ids=ids[:, 5:], past_key_values=cache, labels=ids[:, 5:])
    assert torch.equal(output.logits, expected)
    # Not even a part of it: the head alone would have one.
    assert not output.logits.requires_grad and not output.loss.requires_grad
    model.train()
    try:
        with pytest.raises(InputError, match="past_key_values in training mode"):
            model(input_ids=ids[:, :1], past_key_values=cache)
    finally:
        model.eval()


@torch.no_grad()
def test_a_refused_call_does_not_change_the_cache(model):
    ids = prompt(0, before=8, after=0)
    cache = model(input_ids=ids[:, :5]).past_key_values
    expected = model(input_ids=ids).logits[:, 5:]
    for wrong in ({"input_ids": torch.tensor([[500]])}, {"input_ids": ids[:, 5:], "input_features": features(9)}):
        with pytest.raises(InputError):
            model(**wrong, past_key_values=cache)
    assert (cache.lengths, cache.columns) == ([5], 5)
    logits = model(input_ids=ids[:, 5:], past_key_values=cache).logits
    assert float((logits - expected).abs().max()) <= ALONE * float(expected.abs().max())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -0.5}, "temperature=-0.5"),
        ({"max_new_tokens": -1}, "max_new_tokens=-1"),
        ({"max_new_tokens": 10**12}, "max_new_tokens=1000000000000"),
        ({"input_ids": torch.zeros(1, 0, dtype=torch.int64)}, "empty prompts"),
        ({"max_length": 3}, "max_length=3"),
        ({"attention_mask": torch.tensor([[1] * 14 + [0]])}, "padded on the right"),
    ],
)
def test_generate_refuses_bad_arguments(model, options, message):
    with pytest.raises(InputError, match=message):
        model.generate(**inputs_with(**options))


def test_each_row_ends_separately_and_is_padded(model):
    batch, alone = batch_of([30, 44, None])
    start = batch["input_ids"].shape[1]
    free = model.generate(**batch, max_new_tokens=12, eos_token_id=[])[:, start:]
    end = int(free[0, 3])
    ended = model.generate(**batch, max_new_tokens=12, eos_token_id=[end, 116], pad_token_id=7)[:, start:]
    for row in range(3):
        stops = ((free[row] == end) | (free[row] == 116)).nonzero().flatten()
        length = int(stops[0]) + 1 if len(stops) else 12
        assert torch.equal(ended[row, :length], free[row, :length])
        assert bool((ended[row, length:] == 7).all())
    one = model.generate(**alone[0], max_new_tokens=12, eos_token_id=end)
    assert int(one[0, -1]) == end and one.shape[1] <= alone[0]["input_ids"].shape[1] + 4


def test_a_plain_configuration_ignores_keys_of_plus():
    """As in transformers, a key of another model's configuration is kept and has no effect."""
    values = SPEC.config()
    values["encoder_config"] = values["encoder_config"] | {"cat_hidden_layers": [1, 2]}
    config = GraniteSpeechConfig(**values)
    assert config.encoder_config.to_dict()["cat_hidden_layers"] == [1, 2]
    assert GraniteSpeechForConditionalGeneration(config).encoder(features(9)).last_hidden_state.shape == (1, 9, 32)


def test_the_default_configuration_builds_and_refuses_audio_of_another_width():
    """transformers' defaults do not match: a projector of width 1408 and an encoder of width 1024."""
    with torch.device("meta"):
        model = GraniteSpeechForConditionalGeneration(GraniteSpeechConfig())
    assert model.config.projector_config.encoder_hidden_size == 1408
    with pytest.raises(ConfigError, match="1408"):
        model.get_audio_features(torch.zeros(1, 20, 160, device="meta"))


def test_new_models_have_random_weights_of_the_configured_deviation():
    torch.manual_seed(0)
    model = GraniteSpeechForConditionalGeneration(GraniteSpeechConfig(**SPEC.config(), initializer_range=0.03))
    weight = model.language_model.model.layers[0].mlp.gate_proj.weight
    assert abs(float(weight.std()) - 0.03) < 3e-3 and not model.encoder.out.bias.any()
    assert abs(float(model.projector.query.std()) - 1.0) < 0.3
