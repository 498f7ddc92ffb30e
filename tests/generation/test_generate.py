"""`generate` without transformers: sources of options, refused options, distributions, beams, streamers and independent rows."""

from itertools import product
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from granite_speech import GraniteSpeechForConditionalGeneration, InputError
from granite_speech.config import GraniteConfig
from granite_speech.generation.sampling import draw, keep_top_k, keep_top_p, penalize
from granite_speech.generation.stop_strings import StopStrings
from granite_speech.inputs.tokenizer import GraniteSpeechTokenizer
from granite_speech.modules.cache import PagedCache
from granite_speech.modules.packing import Segments
from tests.support.reference_models import SPECS, build_reference, clip_inputs, features, prompt, write_released_layout
from tests.support.small_tokenizer import write_tokenizer

SPEC = SPECS[3]  # the parity checkpoint whose answers repeat themselves least
TEXT = {"input_ids": prompt(0, before=9, seed=12)}
SAMPLES = 4000


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> GraniteSpeechForConditionalGeneration:
    return GraniteSpeechForConditionalGeneration.from_pretrained(
        write_released_layout(build_reference(SPEC), tmp_path_factory.mktemp("checkpoint"))
    )


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> GraniteSpeechTokenizer:
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(folder)
    return GraniteSpeechTokenizer.from_folder(folder)


def new_tokens(model, inputs, **options) -> torch.Tensor:
    return model.generate(**inputs, **options)[:, inputs["input_ids"].shape[1] :]


def batch_of(lengths: list[int | None]) -> tuple[dict, list[dict]]:
    """A batch of prompts padded on the left, and each row alone. A length is the frames of the row's clip, or None for no clip."""
    alone = []
    for row, frames in enumerate(lengths):
        ids = prompt(0 if frames is None else SPEC.audio_tokens(frames), before=3 + row, seed=row)
        alone.append({"input_ids": ids} | ({} if frames is None else {"input_features": features(frames, seed=row)}))
    width = max(one["input_ids"].shape[1] for one in alone)
    ids, mask = torch.full((len(alone), width), 117), torch.zeros(len(alone), width, dtype=torch.int64)
    for row, one in enumerate(alone):
        length = one["input_ids"].shape[1]
        ids[row, width - length :], mask[row, width - length :] = one["input_ids"][0], 1
    clips = [one["input_features"][0] for one in alone if "input_features" in one]
    padded = torch.nn.utils.rnn.pad_sequence(clips, batch_first=True)
    return {"input_ids": ids, "attention_mask": mask, "input_features": padded, "input_features_lengths": list(map(len, clips))}, alone


# --- sources of options ----------------------------------------------------------------------------------------------------------


def test_the_call_overrides_its_configuration_which_overrides_the_checkpoints(model, monkeypatch):
    monkeypatch.setattr(model, "generation_config", {"max_new_tokens": 3, "eos_token_id": [], "bos_token_id": 1, "no_repeat_ngram_size": 0})
    assert new_tokens(model, TEXT).shape[1] == 3
    as_dict = {"max_new_tokens": 5, "transformers_version": "5.17.0", "is_assistant": False, "constraints": None, "assistant_model": None}
    as_object = SimpleNamespace(max_new_tokens=5, anything="else")
    for config in (as_dict, as_object):
        assert new_tokens(model, TEXT, generation_config=config).shape[1] == 5
        assert new_tokens(model, TEXT, generation_config=config, max_new_tokens=7).shape[1] == 7
        assert new_tokens(model, TEXT, generation_config=config, max_new_tokens=None).shape[1] == 20  # undoes the configuration's
    assert new_tokens(model, TEXT, max_length=TEXT["input_ids"].shape[1] + 4, max_new_tokens=None).shape[1] == 4
    with pytest.warns(UserWarning, match="max_length=18.*max_new_tokens=3"):
        assert new_tokens(model, TEXT, max_length=18).shape[1] == 3
    sampling = {"do_sample": True, "temperature": 2.0, "eos_token_id": [], "max_new_tokens": 8}
    drawn = new_tokens(model, TEXT, **sampling, generator=torch.Generator().manual_seed(1))
    monkeypatch.setattr(model, "generation_config", sampling)
    assert torch.equal(new_tokens(model, TEXT, generator=torch.Generator().manual_seed(1)), drawn)
    assert not torch.equal(new_tokens(model, TEXT, do_sample=False), drawn)
    monkeypatch.setattr(model, "generation_config", {"guidance_scale": 3})
    with pytest.raises(InputError, match="guidance_scale=3"):
        model.generate(**TEXT)


def test_defaults_are_those_of_transformers(model):
    assert new_tokens(model, TEXT, eos_token_id=[]).shape[1] == 20
    words = new_tokens(model, TEXT, eos_token_id=[], max_new_tokens=4)
    ended = new_tokens(model, TEXT, eos_token_id=torch.tensor(int(words[0, 1])), max_new_tokens=4)
    assert ended.tolist() == words[:, :2].tolist()
    assert torch.equal(model.generate(**TEXT, max_new_tokens=0), TEXT["input_ids"])


def test_options_without_effect_are_accepted(model):
    """Such as those on the model cards."""
    options = {"num_beams": 1, "do_sample": False, "min_length": 1, "top_p": 1.0, "repetition_penalty": 1.0, "length_penalty": 1.0}
    options |= {"temperature": 1.0, "bos_token_id": 0, "pad_token_id": 0, "eos_token_id": 118, "use_cache": True, "top_k": None}
    assert torch.equal(model.generate(**TEXT, **options, max_new_tokens=6), model.generate(**TEXT, max_new_tokens=6))


class Silent:
    def put(self, ids):
        pass

    def end(self):
        pass


REFUSED = [
    ({"temperature": -0.5, "do_sample": True}, "temperature=-0.5"),
    ({"temperature": float("nan"), "do_sample": True}, "temperature=nan"),
    ({"top_k": -1, "do_sample": True}, "top_k=-1"),
    ({"top_k": 2.5, "do_sample": True}, "top_k=2.5"),
    ({"top_p": 1.1, "do_sample": True}, "top_p=1.1"),
    ({"do_sample": 1}, "do_sample=1"),
    ({"repetition_penalty": 0}, "repetition_penalty=0"),
    ({"num_beams": 0}, "num_beams=0"),
    ({"num_beams": True}, "num_beams=True"),
    ({"num_beams": 2, "length_penalty": "long"}, "length_penalty='long'"),
    ({"num_beams": 2, "early_stopping": "soon"}, "early_stopping='soon'"),
    ({"num_return_sequences": 0}, "num_return_sequences=0"),
    ({"num_return_sequences": 2}, "num_return_sequences=2.*do_sample=True"),
    ({"num_return_sequences": 3, "num_beams": 2}, "num_return_sequences=3, num_beams=2"),
    ({"max_new_tokens": -1}, "max_new_tokens=-1"),
    ({"max_new_tokens": 2.0}, "max_new_tokens=2.0"),
    ({"max_length": 3}, "max_length=3 for prompts of 14 columns"),
    ({"min_new_tokens": -1}, "min_new_tokens=-1"),
    ({"eos_token_id": "x"}, "eos_token_id='x'"),
    ({"eos_token_id": [1, 2.5]}, "eos_token_id"),
    ({"pad_token_id": [1]}, "pad_token_id"),
    ({"stop_strings": "a"}, "stop_strings=.'a'. without a tokenizer"),
    ({"stop_strings": [""], "tokenizer": 1}, "none of them empty"),
    ({"stop_strings": ["a"], "tokenizer": 1}, "tokenizer of type int"),
    ({"streamer": Silent(), "num_beams": 2}, "streamer for num_beams=2"),
    ({"streamer": print}, "put"),
    ({"generator": 7, "do_sample": True}, "generator of type int"),
    ({"logits_processor": [], "beams": 3, "assistant_model": None}, "unknown options beams;"),
    ({"generation_config": {"beams": 3}}, "beams"),
    ({"generation_config": "greedy"}, "generation_config of type str"),
    ({"generation_config": SimpleNamespace(guidance_scale=0.1)}, "guidance_scale=0.1"),
]


@pytest.mark.parametrize(("options", "message"), REFUSED, ids=[", ".join(f"{k}" for k in options) for options, _ in REFUSED])
def test_bad_options_are_refused(model, options, message):
    with pytest.raises(InputError, match=message):
        model.generate(**TEXT, **options)


@pytest.mark.parametrize("ids", [[[1, 2]], torch.tensor([1, 2])])
def test_prompts_of_a_wrong_type_are_refused(model, ids):
    with pytest.raises(InputError, match="input_ids of type"):
        model.generate(ids)


# --- sampling --------------------------------------------------------------------------------------------------------------------


def probabilities(model, inputs, temperature=1.0) -> torch.Tensor:
    with torch.no_grad():
        return (model(**inputs).logits[0, -1].double() / temperature).softmax(-1)


def chi_square(counts: torch.Tensor, expected: torch.Tensor) -> float:
    """Chi-square per degree of freedom, with rare tokens pooled: about 1 if the distributions are equal."""
    often = expected * counts.sum() >= 8
    observed = torch.cat((counts[often], counts[~often].sum()[None])).double()
    wanted = torch.cat((expected[often], expected[~often].sum()[None])) * counts.sum()
    terms = (observed - wanted).square() / wanted.clamp(min=1e-9)
    return float(terms[wanted > 0].sum() / (int((wanted > 0).sum()) - 1))


@pytest.mark.parametrize("options", [{"top_k": 0}, {"top_k": 0, "temperature": 0.5}, {"top_k": 9}, {"top_k": 0, "top_p": 0.7}])
def test_tokens_are_drawn_from_the_softmax_of_the_logits(model, options):
    inputs = clip_inputs(SPEC, 25)
    expected = probabilities(model, inputs, options.get("temperature", 1.0))
    order = expected.argsort(descending=True)
    if options["top_k"]:
        expected[order[options["top_k"] :]] = 0
    if "top_p" in options:  # the fewest best tokens whose probabilities add up to p
        before = expected[order].cumsum(0) - expected[order]
        expected[order[before >= options["top_p"]]] = 0
    expected /= expected.sum()
    rng = torch.Generator().manual_seed(1)
    drawn = new_tokens(model, inputs, max_new_tokens=1, do_sample=True, num_return_sequences=SAMPLES, generator=rng, **options)
    counts = torch.bincount(drawn.flatten(), minlength=120)
    assert not counts[expected == 0].any()
    assert chi_square(counts, expected) < 1.7
    assert chi_square(counts, expected.roll(1)) > 3  # another distribution gives a large value


def test_a_row_of_a_batch_is_sampled_as_if_alone(model):
    batch, alone = batch_of([25, None, 40])
    rng = torch.Generator().manual_seed(2)
    drawn = new_tokens(
        model, batch, max_new_tokens=1, do_sample=True, top_k=0, num_return_sequences=SAMPLES, generator=rng, repetition_penalty=1.3
    )
    for row, one in enumerate(alone):
        with torch.no_grad():
            logits = model(**one).logits[0, -1].double()
        seen = torch.zeros(120, dtype=torch.bool).index_fill(0, one["input_ids"][0], True)
        expected = penalize(logits, seen, 1.3).softmax(-1)
        assert chi_square(torch.bincount(drawn[row * SAMPLES : (row + 1) * SAMPLES, 0], minlength=120), expected) < 1.7


def test_the_same_seed_repeats_a_sample_and_another_does_not(model):
    options = {"do_sample": True, "max_new_tokens": 12, "num_return_sequences": 3, "eos_token_id": []}
    first, same, other = (new_tokens(model, TEXT, generator=torch.Generator().manual_seed(seed), **options) for seed in (5, 5, 6))
    assert torch.equal(first, same) and not torch.equal(first, other)
    assert len({tuple(row) for row in first.tolist()}) == 3


def test_sampling_from_one_token_is_greedy(model):
    batch, _ = batch_of([25, None, 40])
    greedy = new_tokens(model, batch, max_new_tokens=8)
    assert torch.equal(new_tokens(model, batch, max_new_tokens=8, do_sample=True, top_k=1), greedy)
    assert torch.equal(new_tokens(model, batch, max_new_tokens=8, do_sample=True, top_p=1e-6), greedy)


def test_top_k_and_top_p_keep_the_right_tokens():
    scores = torch.tensor([[0.5, 0.2, 0.2, 0.1], [0.1, 0.2, 0.3, 0.4]]).log()
    assert keep_top_k(scores, 2).isfinite().tolist() == [[True, True, True, False], [False, False, True, True]]
    assert torch.equal(keep_top_k(scores, 9), scores)
    assert keep_top_p(scores, 1 - 0.45).isfinite().tolist() == [[True, False, False, False], [False, False, True, True]]
    assert keep_top_p(scores, 1 - 0.01, at_least=2).isfinite().sum(1).tolist() == [2, 2]
    drawn = draw(torch.zeros(50, 4), 3, torch.Generator().manual_seed(0))
    assert all(len(set(row)) == 3 for row in drawn.tolist())


def test_a_repetition_penalty_counts_prompt_and_answer_but_not_padding(model):
    batch, alone = batch_of([25, 44])
    options = {"max_new_tokens": 10, "repetition_penalty": 2.5, "eos_token_id": []}
    together = new_tokens(model, batch | {"input_ids": batch["input_ids"].masked_fill(batch["attention_mask"] == 0, 80)}, **options)
    assert torch.equal(together, new_tokens(model, batch, **options))
    for row, one in enumerate(alone):
        assert torch.equal(together[row : row + 1], new_tokens(model, one, **options))
    assert not torch.equal(together, new_tokens(model, batch, max_new_tokens=10, eos_token_id=[]))


# --- beams -----------------------------------------------------------------------------------------------------------------------


def test_enough_beams_find_the_best_of_all_answers(model):
    inputs = clip_inputs(SPEC, 25)
    with torch.no_grad():
        first = model(**inputs).logits[0, -1].log_softmax(-1)
        longer = torch.cat((inputs["input_ids"].expand(119, -1), torch.arange(119)[:, None]), 1)
        rest = {"input_features": inputs["input_features"].expand(119, -1, -1)}
        second = model(input_ids=longer, **rest).logits[:, -1].log_softmax(-1)
    scores = first[:119, None] + second
    best = int(scores.argmax())
    output = model.generate(
        **inputs, num_beams=120, max_new_tokens=2, eos_token_id=[], length_penalty=0.0, return_dict_in_generate=True, output_scores=True
    )
    assert output.sequences[0, -2:].tolist() == [best // 120, best % 120]
    assert abs(float(output.sequences_scores[0]) - float(scores.max())) < 1e-4


@pytest.mark.parametrize("early_stopping", [True, False, "never"])
def test_beams_of_a_row_in_a_batch_are_those_of_the_row_alone(model, early_stopping):
    """With and without audio in one batch, so that every beam must keep its row's adapter, positions and keys."""
    batch, alone = batch_of([25, None, 60])
    options = {"num_beams": 3, "num_return_sequences": 3, "max_new_tokens": 9, "early_stopping": early_stopping, "pad_token_id": 7}
    options |= {"eos_token_id": list(range(0, 117, 5)), "repetition_penalty": 1.2, "min_new_tokens": 2}
    together = new_tokens(model, batch, **options)
    for row, one in enumerate(alone):
        own = new_tokens(model, one, **options)
        rows = together[3 * row : 3 * row + 3]
        assert torch.equal(rows[:, : own.shape[1]], own) and bool((rows[:, own.shape[1] :] == 7).all())


def test_beam_scores_are_the_models_log_probabilities(model):
    output = model.generate(
        **TEXT, num_beams=4, max_new_tokens=6, eos_token_id=[], num_return_sequences=4, return_dict_in_generate=True, output_scores=True
    )
    start = TEXT["input_ids"].shape[1]
    with torch.no_grad():
        as_read = output.sequences.masked_fill(output.sequences == 119, 0)  # an emitted audio token counts as token 0
        log_probabilities = model(input_ids=as_read).logits[:, start - 1 : -1].log_softmax(-1)
    own = log_probabilities.gather(2, output.sequences[:, start:, None]).sum((1, 2)) / 6
    assert torch.allclose(own, output.sequences_scores, atol=1e-4)
    assert len({tuple(row) for row in output.sequences.tolist()}) == 4 and own.tolist() == sorted(own.tolist(), reverse=True)
    # The scores of each step, summed along the beams, are the same.
    followed = [sum(float(output.scores[step][beam, token]) for step, (beam, token) in enumerate(zip(beams, tokens, strict=True)))
                for beams, tokens in zip(output.beam_indices.tolist(), output.sequences[:, start:].tolist(), strict=True)]  # fmt: skip
    assert torch.allclose(torch.tensor(followed) / 6, output.sequences_scores, atol=1e-4)


# --- outputs and streamers -------------------------------------------------------------------------------------------------------


def test_return_dict_in_generate_and_output_scores(model):
    ends = new_tokens(model, TEXT, max_new_tokens=9, eos_token_id=[])[0, 4].tolist()
    options = {"max_new_tokens": 9, "eos_token_id": ends, "return_dict_in_generate": True}
    plain = model.generate(**TEXT, **options)
    assert list(plain) == ["sequences"]
    output = model.generate(**TEXT, **options, output_scores=True)
    start = TEXT["input_ids"].shape[1]
    assert list(output) == ["sequences", "scores"] and torch.equal(output.sequences, plain.sequences)
    assert len(output.scores) == output.sequences.shape[1] - start < 9
    with torch.no_grad():
        logits = model(input_ids=output.sequences).logits[0, start - 1 : -1]
    assert torch.allclose(torch.cat(output.scores), logits, atol=1e-4)
    assert list(model.generate(**TEXT, max_new_tokens=2, num_beams=2, return_dict_in_generate=True)) == ["sequences", "beam_indices"]


@pytest.mark.parametrize("beams", [1, 3])
def test_min_new_tokens_delays_the_end(model, beams):
    ends = list(range(119))
    for least in (0, 1, 4):
        new = new_tokens(model, TEXT, max_new_tokens=6, min_new_tokens=least, eos_token_id=ends, num_beams=beams, early_stopping=True)
        assert new[0, :least].tolist() == [119] * least  # the only token that does not end the row
        assert new.shape[1] == least + 1


class Recorder:
    def __init__(self):
        self.received = []

    def put(self, ids):
        assert ids.device.type == "cpu"
        self.received.append(ids.clone())

    def end(self):
        self.received.append("end")


@pytest.mark.parametrize("options", [{"eos_token_id": []}, {}, {"do_sample": True}, {"max_new_tokens": 0}])
def test_a_streamer_gets_the_prompt_and_each_token(model, options):
    recorder = Recorder()
    options = {"max_new_tokens": 12, "eos_token_id": list(range(0, 117, 4))} | options
    ids = model.generate(**TEXT, **options, streamer=recorder)
    assert torch.equal(recorder.received[0], TEXT["input_ids"]) and recorder.received[-1] == "end"
    tokens = recorder.received[1:-1]
    assert all(one.shape == (1,) for one in tokens)
    assert [int(one) for one in tokens] == ids[0, TEXT["input_ids"].shape[1] :].tolist()


# --- stop strings ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompt_text", "text", "strings", "expected"),
    [
        ("", "abcabd", ["abd"], 6),
        ("", "abcabd", ["d", "ca"], 4),
        ("", "a\u00e9b", ["\u00e9"], 3),  # two bytes and two tokens; the second completes it
        ("", "a\u00e9b", ["\u00e8"], None),
        ("xy", "zxyz", ["xyz"], 1),  # begins in the prompt
        ("xyz", "abc", ["xyz"], None),  # the newest token is not part of it
        ("", "abc", ["abcd"], None),
    ],
)
def test_the_token_that_completes_a_string_ends_the_row(tokenizer, prompt_text, text, strings, expected):
    """Byte by byte, without the tokenizer's merges."""
    alone = {byte: ids[0] for byte in range(128) if len(ids := tokenizer.encode(chr(byte))) == 1}
    alone |= dict(zip("\u00e9".encode(), tokenizer.encode("\u00e9"), strict=True))
    stops = StopStrings(tuple(strings), tokenizer, [[], [alone[byte] for byte in prompt_text.encode()]])
    ended_after = None
    for count, byte in enumerate(text.encode(), start=1):
        other, ended = stops.ends([0, 1], [alone[ord("q")], alone[byte]])
        assert not other
        if ended:
            ended_after = count
            break
        stops.extend([0, 1], [alone[ord("q")], alone[byte]])
    assert ended_after == expected


def test_stop_strings_inside_a_long_token_and_in_reordered_rows(tokenizer):
    speech, t, e = (tokenizer.encode(text) for text in (" speech", "t", "e"))
    assert len(speech) == 1, "a token of several characters"
    stops = StopStrings(("eec", "te"), tokenizer, [[], []])
    assert stops.ends([0, 1], [speech[0], t[0]]) == [True, False]
    stops.extend([1, 0], [t[0], e[0]])
    assert stops.ends([0, 1], e * 2) == [True, False]
    stops.extend([1, 0], e * 2)
    assert stops.ends([1], [10**6]) == [False], "a token without text"


# --- the cache, reordered --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page_size", [1, 3, 64])
@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_reordered_sequences_stay_independent(page_size, data):
    config = GraniteConfig(hidden_size=12, num_attention_heads=3, num_key_value_heads=1, num_hidden_layers=2)
    sequences = data.draw(st.integers(1, 3))
    cache = PagedCache(config, sequences, dtype=torch.float32, device=torch.device("cpu"), page_size=page_size)
    truth: list[list[float]] = [[] for _ in range(sequences)]
    number = 1.0
    for _ in range(data.draw(st.integers(1, 6))):
        if data.draw(st.booleans()):
            cache.reserve([length + data.draw(st.integers(0, 7)) for length in cache.lengths])
        new = tuple(data.draw(st.lists(st.integers(0, 5), min_size=len(cache), max_size=len(cache))))
        step = cache.begin(Segments(new, torch.device("cpu")))
        assert len(set(step.slots.tolist())) == len(step.slots)
        keys = number + torch.arange(float(sum(new)))[:, None, None].expand(-1, 1, 4)
        number += sum(new)
        for layer in range(2):
            step.write(layer, keys + layer, -keys - layer)
        for row, own in enumerate(keys[:, 0, 0].split(new)):
            truth[row] += own.tolist()
        for layer, (row, count) in product(range(2), enumerate(step.kv_lens.tolist())):
            slots = [int(step.block_table[row, place // page_size]) * page_size + place % page_size for place in range(count)]
            for pools, sign in ((cache.keys, 1), (cache.values, -1)):
                assert pools[layer].flatten(0, 1)[slots, 0, 0].tolist() == [sign * (one + layer) for one in truth[row]]
        cache.next_positions, cache.has_audio = [100 + int(one[-1]) if one else 0 for one in truth], [bool(one) for one in truth]
        rows = data.draw(st.lists(st.integers(0, len(cache) - 1), min_size=1, max_size=5))
        cache.reorder(rows)
        truth = [list(truth[row]) for row in rows]
        assert cache.lengths == [len(one) for one in truth]
        assert cache.next_positions == [100 + int(one[-1]) if one else 0 for one in truth]
        assert cache.has_audio == [bool(one) for one in truth]


def test_many_reorders_need_no_extra_pages():
    config = GraniteConfig(hidden_size=12, num_attention_heads=3, num_key_value_heads=1, num_hidden_layers=1)
    cache = PagedCache(config, 1, dtype=torch.float32, device=torch.device("cpu"), page_size=4)
    cache.begin(Segments((10,), torch.device("cpu")))
    cache.reorder([0, 0, 0])
    cache.reserve([10 + 30] * 3)
    pool = cache.keys[0]
    for step in range(30):
        cache.begin(Segments((1, 1, 1), torch.device("cpu")))
        cache.reorder([step % 3, (step + 1) % 3, step % 3])
    assert cache.keys[0] is pool and pool.shape[0] <= 3 * 10 + 3
