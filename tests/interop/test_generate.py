"""`generate` of an accelerated model: which calls the captured step serves, and that all others are transformers' own."""

import re
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import transformers
from transformers import DynamicCache, GenerationConfig, LogitsProcessorList

from granite_speech import AccelerationWarning, accelerate, restore
from tests.support.live_models import HAS_INNER_MODEL, LIVE_SPECS, batch, bundled, speech
from tests.support.reference_models import build_reference, clip_inputs, prompt
from tests.support.two_libraries import PROMPT, WORDS, library

SPEC = LIVE_SPECS[0]


@pytest.fixture(scope="module")
def live() -> Iterator[Any]:
    yield build_reference(SPEC)


@pytest.fixture
def loops(monkeypatch) -> list[str]:
    """One item for each token that transformers' own loops chose."""
    calls = []
    prepare = transformers.GenerationMixin._update_model_kwargs_for_generation

    def counted(*arguments: Any, **options: Any) -> Any:
        calls.append("token")
        return prepare(*arguments, **options)

    monkeypatch.setattr(transformers.GenerationMixin, "_update_model_kwargs_for_generation", counted)
    return calls


def answers(live: Any, inputs: dict[str, Any], options: dict[str, Any]) -> Any:
    torch.manual_seed(0)
    limit = {} if options.keys() & {"max_length", "generation_config"} else {"max_new_tokens": 10}
    output = live.generate(**inputs, **limit | options)
    return output if torch.is_tensor(output) else output.sequences


def compared(live: Any, inputs: dict[str, Any], make: Callable[[], dict[str, Any]], loops: list[str]) -> int:
    """Compare a call with and without acceleration. Returns the tokens that transformers' loop chose with it."""
    theirs = answers(live, inputs, make())
    loops.clear()
    with accelerate(live):
        ours = answers(live, inputs, make())
    assert torch.equal(ours, theirs)
    return len(loops)


class Fewer(transformers.LogitsProcessor):
    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        return scores.index_add(1, torch.arange(0, 120, 3), torch.full((len(scores), 40), -2.0))


class Short(transformers.StoppingCriteria):
    def __call__(self, input_ids: torch.Tensor, scores: Any, **options: Any) -> torch.Tensor:
        return input_ids[:, -1] % 5 == 0


def contrastive(model: Any, input_ids: torch.Tensor, generation_config: Any, **options: Any) -> torch.Tensor:
    """A decoding loop of somebody's own: of the four best tokens, the one least like the prompt's embeddings."""
    options = {name: value for name, value in options.items() if name in ("input_features", "input_features_mask", "attention_mask")}
    table = model.get_input_embeddings().weight
    audio = options.pop("input_features"), options.pop("input_features_mask", None)
    for _ in range(generation_config.max_new_tokens):
        mask = torch.ones_like(input_ids)
        logits = model(input_ids=input_ids, attention_mask=mask, input_features=audio[0], input_features_mask=audio[1]).logits[:, -1]
        best = logits.topk(4).indices
        likeness = torch.nn.functional.cosine_similarity(table[best], table[input_ids[:, :4]].mean(1, keepdim=True), dim=-1)
        input_ids = torch.cat((input_ids, best.gather(1, likeness.argmin(1, keepdim=True))), dim=1)
    return input_ids


THEIRS: dict[str, Callable[[Any], dict[str, Any]]] = {
    "custom_generate": lambda live: {"custom_generate": contrastive},
    "assistant_model": lambda live: {"assistant_model": live},
    "prompt_lookup_num_tokens": lambda live: {"prompt_lookup_num_tokens": 3},
    "guidance_scale": lambda live: {"guidance_scale": 1.5},
    "negative_prompt_ids": lambda live: {"guidance_scale": 1.5, "negative_prompt_ids": prompt(0)},
    "watermarking_config": lambda live: {"watermarking_config": transformers.WatermarkingConfig(bias=2.5)},
    "SynthID": lambda live: {
        "watermarking_config": transformers.SynthIDTextWatermarkingConfig(keys=[1, 2, 3], ngram_len=3),
        "do_sample": True,
    },
    "output_attentions": lambda live: {"output_attentions": True, "return_dict_in_generate": True},
    "past_key_values": lambda live: {"past_key_values": DynamicCache()},
    "use_cache=False": lambda live: {"use_cache": False},
    "logits_processor": lambda live: {"logits_processor": LogitsProcessorList([Fewer()])},
    "stopping_criteria": lambda live: {"stopping_criteria": [Short()]},
    "prefix_allowed_tokens_fn": lambda live: {"prefix_allowed_tokens_fn": lambda row, ids: list(range(int(ids[-1]) % 7, 100))},
    "beams": lambda live: {"num_beams": 3, "early_stopping": True, "num_return_sequences": 2},
    "sampled beams": lambda live: {"num_beams": 3, "do_sample": True},
    "output_scores": lambda live: {"output_scores": True, "return_dict_in_generate": True, "do_sample": True},
    "no_repeat_ngram_size": lambda live: {"no_repeat_ngram_size": 2},
    "suppress_tokens": lambda live: {"suppress_tokens": list(range(0, 100, 2))},
    "min_p": lambda live: {"min_p": 0.05, "do_sample": True},
    "prefill_chunk_size": lambda live: {"prefill_chunk_size": 64},
}
if not HAS_INNER_MODEL:  # transformers 5 moved these to repositories on the hub
    THEIRS |= {
        "force_words_ids": lambda live: {"force_words_ids": [[3, 4]], "num_beams": 3},
        "num_beam_groups": lambda live: {"num_beams": 4, "num_beam_groups": 2, "diversity_penalty": 0.5},
    }


@pytest.mark.parametrize("name", THEIRS)
def test_transformers_loop_serves(live: Any, loops: list[str], name: str):
    inputs = clip_inputs(SPEC, 45) | {"attention_mask": torch.ones_like(clip_inputs(SPEC, 45)["input_ids"])}
    tokens = compared(live, inputs, lambda: THEIRS[name](live), loops)
    assert tokens > 0 or name == "custom_generate"


def test_a_prompt_in_pieces_is_answered_or_refused_as_transformers_does(live: Any, loops: list[str]):
    inputs = clip_inputs(SPEC, 45)
    try:
        answers(live, inputs, {"prefill_chunk_size": 4})
    except ValueError as refusal:  # from 5.23 on, of prompts with audio
        with accelerate(live), pytest.raises(ValueError, match=re.escape(str(refusal))):
            answers(live, inputs, {"prefill_chunk_size": 4})
    else:
        assert compared(live, inputs, lambda: {"prefill_chunk_size": 4}, loops) > 0


OURS: dict[str, dict[str, Any]] = {
    "nothing": {},
    "max_length": {"max_length": 40},
    "min_new_tokens": {"min_new_tokens": 10, "eos_token_id": [3, 5, 8]},
    "min_length": {"min_length": 30},
    "top_k, top_p, temperature": {"do_sample": True, "top_k": 20, "top_p": 0.8, "temperature": 1.3},
    "all tokens": {"do_sample": True, "top_k": 0},
    "num_return_sequences": {"do_sample": True, "num_return_sequences": 3},
    "eos_token_id": {"eos_token_id": list(range(60))},
    "pad_token_id": {"eos_token_id": list(range(60)), "pad_token_id": 99},
    "generation_config": {"generation_config": GenerationConfig(max_new_tokens=4, do_sample=True, top_k=3)},
    "static cache": {"cache_implementation": "static"},
    "neutral values": {"num_beams": 1, "logits_processor": [], "synced_gpus": False, "assistant_model": None, "labels": None},
    "greedy with a temperature": {"do_sample": False, "temperature": 0.2, "top_p": 0.3},
    "output_scores without a record": {"output_scores": True},
}


@pytest.mark.parametrize("name", OURS)
def test_the_captured_step_serves(live: Any, loops: list[str], name: str):
    assert compared(live, batch(SPEC), lambda: OURS[name], loops) == 0


def test_a_repetition_penalty_is_served_without_padding_alone(live: Any, loops: list[str]):
    options = {"repetition_penalty": 1.7}
    assert compared(live, clip_inputs(SPEC, 45), lambda: options, loops) == 0
    # transformers 4.56 and 5.17 punish the padding too.
    assert compared(live, batch(SPEC), lambda: options, loops) > 0


def test_padding_without_a_mask_counts_for_a_repetition_penalty(live: Any, loops: list[str]):
    inputs = batch(SPEC)
    del inputs["attention_mask"]
    assert compared(live, inputs, lambda: {"repetition_penalty": 0.5}, loops) > 0
    assert compared(live, inputs, dict, loops) == 0


@pytest.mark.parametrize("is_given", [True, False])
def test_masked_columns_inside_a_prompt(live: Any, loops: list[str], is_given: bool):
    inputs = batch(SPEC)
    inputs["input_ids"][:, -2] = 117
    inputs["attention_mask"] = (inputs["input_ids"] != 117).long()
    if not is_given:
        del inputs["attention_mask"]
    hot = {"do_sample": True, "top_k": 0, "temperature": 8.0 if HAS_INNER_MODEL else 1.0, "max_new_tokens": 40, "eos_token_id": 118}
    assert compared(live, inputs, lambda: hot, loops) == 0


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_the_type_of_the_ids(live: Any, dtype: torch.dtype):
    ids = prompt(0).to(dtype)
    theirs = live.generate(input_ids=ids, max_new_tokens=3)
    with accelerate(live):
        assert live.generate(input_ids=ids, max_new_tokens=3).dtype == theirs.dtype


@pytest.mark.parametrize("where", ["call", "generation_config", "model"])
@pytest.mark.parametrize("option", [{"prefill_chunk_size": 4}, {"use_cache": False}], ids=lambda one: next(iter(one)))
def test_an_option_wherever_it_is_set(live: Any, loops: list[str], option: dict[str, Any], where: str):
    before, call = live.generation_config, dict(option)
    if where == "generation_config":
        call = {"generation_config": GenerationConfig(**option)}
    if where == "model":
        live.generation_config, call = GenerationConfig(**option), {}
    try:
        assert compared(live, {"input_ids": prompt(0)}, lambda: call, loops) > 0
    finally:
        live.generation_config = before


def test_no_warning_about_options_that_do_nothing(live: Any):
    with accelerate(live), warnings.catch_warnings():
        warnings.simplefilter("error")
        live.generate(input_ids=prompt(0), max_new_tokens=3, max_length=40, temperature=0.5, output_scores=True)


def test_prompts_in_other_forms(live: Any, loops: list[str]):
    text = prompt(0)
    assert compared(live, {"inputs": text}, dict, loops) == 0
    assert torch.equal(accelerate(live).generate(text, GenerationConfig(max_new_tokens=4)), restore(live).generate(text, max_new_tokens=4))
    states = torch.randn(2, 7, 48, generator=torch.Generator().manual_seed(1))
    mask = torch.tensor([[0, 0, 1, 1, 1, 1, 1], [1] * 7])
    assert compared(live, {"inputs_embeds": states, "attention_mask": mask}, dict, loops) == 0


@pytest.mark.skipif(not HAS_INNER_MODEL, reason="transformers 4 takes a clip for every row")
def test_a_row_without_audio_next_to_rows_with_audio(live: Any, loops: list[str]):
    inputs = batch(SPEC)
    inputs["input_ids"][1] = inputs["input_ids"][1].masked_fill(inputs["input_ids"][1] == 119, 5)
    inputs["input_features"], inputs["input_features_mask"] = (inputs[name][[0, 2]] for name in ("input_features", "input_features_mask"))
    assert compared(live, inputs, dict, loops) == 0  # with the adapter on in every row


def test_a_hook_in_the_encoder_leaves_the_decode_step_captured(live: Any, loops: list[str]):
    seen = []
    handle = speech(live).encoder.layers[1].register_forward_hook(lambda module, arguments, output: seen.append(output * 1) or output * 1.5)
    try:
        with pytest.warns(AccelerationWarning, match="the encoder runs as transformers wrote it"):
            assert compared(live, batch(SPEC), dict, loops) == 0
    finally:
        handle.remove()
    assert len(seen) == 2 and torch.allclose(*seen, atol=1e-5)


def test_the_models_own_generation_config(live: Any, loops: list[str]):
    before = live.generation_config
    live.generation_config = GenerationConfig(do_sample=True, top_k=5, eos_token_id=118, pad_token_id=117)
    try:
        assert compared(live, batch(SPEC), dict, loops) == 0
        assert compared(live, batch(SPEC), lambda: {"do_sample": False}, loops) == 0
        assert compared(live, batch(SPEC), lambda: {"generation_config": GenerationConfig(max_new_tokens=6, top_k=2)}, loops) == 0
        live.generation_config.no_repeat_ngram_size = 2
        assert compared(live, batch(SPEC), dict, loops) > 0
    finally:
        live.generation_config = before


class Recorder:
    """A streamer that keeps what it gets."""

    def __init__(self) -> None:
        self.got: list[Any] = []

    def put(self, value: torch.Tensor) -> None:
        self.got.append(value.tolist())

    def end(self) -> None:
        self.got.append("end")


def test_streamers(live: Any, loops: list[str]):
    inputs, streams = clip_inputs(SPEC, 45), []
    for accelerated in (False, True):
        streams.append(Recorder())
        accelerate(live) if accelerated else None
        loops.clear()
        live.generate(**inputs, max_new_tokens=6, streamer=streams[-1])
    assert streams[0].got == streams[1].got and streams[0].got[-1] == "end" and not loops
    # transformers' loop ends the stream itself: once.
    streams = [Recorder(), Recorder()]
    for stream in streams:
        live.generate(**inputs, max_new_tokens=6, streamer=stream, no_repeat_ngram_size=2)
        restore(live)
    assert streams[0].got == streams[1].got and streams[0].got.count("end") == 1


@pytest.mark.parametrize(
    "wrong",
    [
        {"max_new_token": 3},
        {"temperature": -1.0, "do_sample": True},
        {"temperature": 0.0, "do_sample": True},
        {"num_beams": 0},
        {"logits_to_keep": None},
        {"temperature": torch.tensor(0.7), "do_sample": True},
        {"eos_token_id": {3}},
        {"input_features_mask": torch.ones(1, 12, dtype=torch.int64)},
        {"input_ids": torch.zeros(0, 5, dtype=torch.long), "input_features": None},
        {"max_cache_len": 99},
        {"generator": torch.Generator()},
        {"input_ids": torch.zeros(1, 0, dtype=torch.long)},
        {"input_ids": torch.tensor([1, 2, 3])},
        {"generation_config": {"max_new_tokens": 3}},
        {"input_features_lengths": [45]},
        {"input_ids": torch.tensor([[1, 119, 119]])},
        {"max_new_tokens": 0},
        {"num_return_sequences": 2},
        {"inputs_embeds": torch.zeros(1, 5, 48)},
        {"inputs_embeds": torch.zeros(5, 48), "input_ids": None, "input_features": None},
        {"inputs_embeds": torch.zeros(1, 5, 48), "input_ids": None},
    ],
    ids=lambda one: next(iter(one)),
)
def test_errors_are_those_of_transformers(live: Any, wrong: dict[str, Any]):
    def outcome() -> str:
        try:
            return str(live.generate(**clip_inputs(SPEC, 45) | {"max_new_tokens": 3} | wrong).tolist())
        except Exception as error:
            assert "granite_speech" not in type(error.__context__).__module__, "no trace of the attempt here"
            return f"{type(error).__name__}: {error}"

    theirs = outcome()
    with accelerate(live):
        assert outcome() == theirs


class Failing(Recorder):
    """A streamer of somebody else's that fails in the middle."""

    def put(self, value: torch.Tensor) -> None:
        super().put(value)
        if len(self.got) == 3:
            raise KeyError("mine")


def test_a_streamer_that_fails(live: Any):
    streams = [Failing(), Failing()]
    for stream in streams:
        with pytest.raises(KeyError, match="mine"):
            live.generate(**clip_inputs(SPEC, 45), max_new_tokens=6, streamer=stream)
        accelerate(live)
    restore(live)
    assert streams[0].got == streams[1].got


def test_training_mode_is_left_to_transformers(live: Any, loops: list[str]):
    live.train()
    try:
        accelerate(live).generate(**clip_inputs(SPEC, 45), max_new_tokens=3)
    finally:
        restore(live).eval()
    assert loops


def test_an_encoder_in_training_mode_runs_once_as_transformers_wrote_it(loops: list[str]):
    live = build_reference(SPEC)
    speech(live).encoder.train()
    with pytest.warns(AccelerationWarning, match="a module of the encoder is in training mode"):
        accelerate(live).generate(**clip_inputs(SPEC, 45), max_new_tokens=3)
    assert not loops and {int(one.conv.batch_norm.num_batches_tracked) for one in speech(live).encoder.layers} == {1}


@pytest.mark.skipif(HAS_INNER_MODEL, reason="from transformers 5.10 on, the language model has no `generate`")
def test_the_language_models_own_generate(live: Any, loops: list[str]):
    inner = live.language_model
    states = torch.randn(2, 7, 48, generator=torch.Generator().manual_seed(1))
    mask = torch.tensor([[0, 0, 1, 1, 1, 1, 1], [1] * 7])
    for options in ({"inputs_embeds": states, "attention_mask": mask}, {"input_ids": prompt(0)}):
        theirs = inner.generate(**options, max_new_tokens=5)
        loops.clear()
        with accelerate(live):
            assert torch.equal(inner.generate(**options, max_new_tokens=5), theirs)
        assert not loops


def test_the_bundled_checkpoint_gives_its_words(loops: list[str]):
    lib = library("granite_speech")
    processor = transformers.AutoProcessor.from_pretrained(lib.folder)
    live = accelerate(bundled())
    inputs = processor([PROMPT, PROMPT], lib.clips, return_tensors="pt", padding=True, padding_side="left")
    ids = live.generate(**inputs, max_new_tokens=20)
    assert processor.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)[0].strip() == WORDS
    assert not loops
    stops = {"stop_strings": ["five"], "tokenizer": processor.tokenizer}
    one = processor(PROMPT, lib.clips[0], return_tensors="pt")
    assert compared(restore(live), dict(one), lambda: stops, loops) == 0
