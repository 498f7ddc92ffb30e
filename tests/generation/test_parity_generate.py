"""`generate` against transformers: the same options must give the same ids, on checkpoints that differ in many ways."""

from itertools import product

import pytest
import torch
import transformers

from granite_speech import GraniteSpeechForConditionalGeneration, GraniteSpeechProcessor
from tests.support.random_checkpoint import write_checkpoint
from tests.support.reference_models import SPECS, Spec, build_reference, features, prompt, scale_logits, set_adapter, write_released_layout

Pair = tuple[Spec, torch.nn.Module, GraniteSpeechForConditionalGeneration]
SCORES = 1e-4
ONE_END, MANY_ENDS, MOST_ENDS = 118, list(range(1, 117, 5)), list(range(0, 117, 2))


@pytest.fixture(scope="module", params=SPECS, ids=lambda spec: spec.name)
def pair(request, tmp_path_factory) -> Pair:
    """One checkpoint in both packages; the reference divides its logits as in training."""
    spec = request.param
    reference = build_reference(spec)
    folder = write_released_layout(reference, tmp_path_factory.mktemp("checkpoint"))
    scale_logits(reference)
    return spec, reference, GraniteSpeechForConditionalGeneration.from_pretrained(folder)


def batch_of(spec: Spec, lengths: list[int]) -> dict[str, torch.Tensor]:
    """Prompts of different lengths with one clip each, padded on the left; the clips have their padded length."""
    clips = torch.zeros(len(lengths), max(lengths), 160)
    for row, frames in enumerate(lengths):
        clips[row, :frames] = features(frames, seed=5 + row)[0]
    tokens = [spec.audio_tokens(frames) for frames in lengths]
    rows = [prompt(count, before=3 + 2 * row, seed=7 + row)[0] for row, count in enumerate(tokens)]
    width = max(map(len, rows))
    ids, mask = torch.full((len(rows), width), 117), torch.zeros(len(rows), width, dtype=torch.int64)
    for row, one in enumerate(rows):
        ids[row, width - len(one) :], mask[row, width - len(one) :] = one, 1
    kept = torch.arange(max(tokens)) < torch.tensor(tokens)[:, None]
    return {"input_ids": ids, "attention_mask": mask, "input_features": clips, "input_features_mask": kept}


def both(pair: Pair, inputs: dict, options: dict) -> tuple:
    """Both outputs, after asserting that ids, beams, final scores and number of steps are equal."""
    _, reference, ours = pair
    answers = []
    for model in (reference, ours):
        torch.manual_seed(3)
        answers.append(model.generate(**inputs, **options, return_dict_in_generate=True, output_scores=True))
    theirs, mine = answers
    assert torch.equal(mine.sequences, theirs.sequences), options
    assert len(mine.scores) == len(theirs.scores)
    if options.get("num_beams", 1) > 1:
        assert torch.equal(mine.beam_indices, theirs.beam_indices) and mine.beam_indices.dtype == theirs.beam_indices.dtype
        assert torch.allclose(mine.sequences_scores, theirs.sequences_scores, atol=SCORES)
    return theirs, mine


def test_beams(pair: Pair):
    inputs = batch_of(pair[0], [17, 33])
    kinds_of_end = ((ONE_END, 1), (MANY_ENDS, 2), (MOST_ENDS, 2))
    lengths = set()
    for place, (beams, length_penalty, early_stopping) in enumerate(product((2, 3, 4, 5), (0.5, 1.0, 2.0), (True, False, "never"))):
        # The kind of end shifts by one after every nine options, so that all combinations occur.
        ends, several = kinds_of_end[(place + place // 9) % 3]
        options = {"num_beams": beams, "length_penalty": length_penalty, "early_stopping": early_stopping, "num_return_sequences": several}
        theirs, _ = both(pair, inputs, options | {"eos_token_id": ends, "max_new_tokens": 9})
        lengths |= {int((one >= 0).sum()) for one in theirs.beam_indices}
    assert len(lengths) >= 3  # some beams end early, some late, some not at all


PROCESSED = (
    {"repetition_penalty": 1.4},
    {"repetition_penalty": 0.7, "min_new_tokens": 3},
    {"min_new_tokens": 4},
    {"do_sample": True, "num_return_sequences": 2},
    {"do_sample": True, "temperature": 0.3, "top_k": 7, "repetition_penalty": 1.2},
    {"do_sample": True, "temperature": 1.7, "top_k": 0, "top_p": 0.6, "min_new_tokens": 2},
)


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("ends", [ONE_END, MOST_ENDS], ids=["one end", "most tokens end"])
def test_processors_and_sampling(pair: Pair, beams: int, ends):
    """Penalties and sampling, with and without beams, from the same state of torch's generator."""
    inputs = batch_of(pair[0], [33])
    width = inputs["input_ids"].shape[1]
    answers = set()
    for options in PROCESSED:
        theirs, mine = both(pair, inputs, options | {"num_beams": beams, "eos_token_id": ends, "max_new_tokens": 8})
        answers |= {tuple(one[width:].tolist()) for one in theirs.sequences}
        if beams == 1 and options.get("num_return_sequences", 1) == 1:
            assert all(torch.allclose(a, b, atol=SCORES) for a, b in zip(mine.scores, theirs.scores, strict=True))
    assert len(answers) >= 2


RULES = (
    {"no_repeat_ngram_size": 2, "repetition_penalty": 1.2},
    {"encoder_no_repeat_ngram_size": 1, "suppress_tokens": list(range(60, 90))},
    {"bad_words_ids": [[3], [118], [7, 9]], "sequence_bias": {(5,): 2.5, (8, 9): -4.0}, "begin_suppress_tokens": list(range(0, 60))},
    {"exponential_decay_length_penalty": (1, 1.5), "forced_eos_token_id": 118, "remove_invalid_values": True},
    {"renormalize_logits": True, "min_new_tokens": 3, "no_repeat_ngram_size": 3},
    {"do_sample": True, "min_p": 0.05, "typical_p": 0.9, "no_repeat_ngram_size": 2, "top_k": 0},
    {"do_sample": True, "eta_cutoff": 0.02, "epsilon_cutoff": 0.003, "top_h": 0.8, "temperature": 1.4, "suppress_tokens": [4, 5, 118]},
    {"do_sample": True, "min_p": 0.9, "eos_token_id": MANY_ENDS},
    {"do_sample": True, "epsilon_cutoff": 0.5, "eta_cutoff": 0.6, "typical_p": 0.1, "eos_token_id": MANY_ENDS},
)


@pytest.mark.parametrize("beams", [1, 3])
def test_rules(pair: Pair, beams: int):
    """One prompt, because to transformers padding is among the tokens that a row has."""
    inputs = batch_of(pair[0], [33])
    answers = {tuple(pair[2].generate(**inputs, num_beams=beams, max_new_tokens=8)[0].tolist())}
    for options in RULES:
        theirs, mine = both(pair, inputs, options | {"num_beams": beams, "max_new_tokens": 8})
        answers.add(tuple(theirs.sequences[0].tolist()))
        if beams == 1:
            assert all(torch.allclose(a, b, atol=SCORES) for a, b in zip(mine.scores, theirs.scores, strict=True))
    assert len(answers) >= 5


def test_rules_for_the_prompt(pair: Pair):
    """transformers applies this rule to the first beam of each prompt alone, so only without beams."""
    both(pair, batch_of(pair[0], [17, 33]), {"encoder_repetition_penalty": 3.0, "max_new_tokens": 8})


def test_embeddings(pair: Pair):
    """Padded on the left, greedily, by sampling and with beams. The adapter is off."""
    ids = batch_of(pair[0], [17, 33])
    embeddings = pair[2].get_input_embeddings()(ids["input_ids"].masked_fill(ids["input_ids"] == 119, 3)).detach()
    inputs = {"inputs_embeds": embeddings, "attention_mask": ids["attention_mask"]}
    # transformers 5.23 takes as many tokens of an answer for padding as the prompt has columns of it, and does not punish them.
    level = {name: one[1:].repeat_interleave(2, dim=0) for name, one in inputs.items()}
    for options in ({}, {"do_sample": True, "num_return_sequences": 2}, {"num_beams": 3, "eos_token_id": MANY_ENDS}):
        both(pair, inputs, options | {"max_new_tokens": 9, "no_repeat_ngram_size": 2})
        both(pair, level, options | {"max_new_tokens": 9, "repetition_penalty": 1.3})
    set_adapter(pair[1], True)


def test_a_penalty_for_padded_embeddings_is_that_of_the_prompt_alone(pair: Pair):
    ids = batch_of(pair[0], [17, 33])
    embeddings = pair[2].get_input_embeddings()(ids["input_ids"].masked_fill(ids["input_ids"] == 119, 3)).detach()
    options = {"max_new_tokens": 40, "min_new_tokens": 40, "repetition_penalty": 3.0}
    padded = pair[2].generate(inputs_embeds=embeddings, attention_mask=ids["attention_mask"], **options)
    for row, answer in enumerate(padded):
        own = embeddings[row : row + 1, ids["attention_mask"][row].bool()]
        [alone] = pair[2].generate(inputs_embeds=own, **options)
        assert torch.equal(alone, answer)


@pytest.mark.parametrize("num_beams", [1, 3])
def test_rules_that_forbid_the_tokens_of_other_rules(pair: Pair, num_beams: int):
    """An end is made likelier that may not come yet; the only allowed token is suppressed."""
    options = {"num_beams": num_beams, "max_new_tokens": 8}
    decay = {"min_new_tokens": 6, "exponential_decay_length_penalty": (1, 1.5), "eos_token_id": MANY_ENDS}
    both(pair, batch_of(pair[0], [17, 33]), options | decay)
    only = {"prefix_allowed_tokens_fn": lambda row, ids: [7 + row], "suppress_tokens": [7, 8]}
    both(pair, batch_of(pair[0], [17, 33]), options | only)


def test_sampling_several_answers_for_a_batch(pair: Pair):
    both(
        pair, batch_of(pair[0], [17, 33, 8]), {"do_sample": True, "num_return_sequences": 2, "max_new_tokens": 7, "eos_token_id": MANY_ENDS}
    )


def test_beams_without_audio(pair: Pair):
    """A request without audio has the adapter off for all beams."""
    both(pair, {"input_ids": prompt(0, before=9, seed=12)}, {"num_beams": 3, "max_new_tokens": 9})
    set_adapter(pair[1], True)


@pytest.mark.parametrize(
    "given", [{}, {"max_length": 26}, {"max_length": 40, "max_new_tokens": 3}, {"min_length": 25, "eos_token_id": MOST_ENDS}]
)
@pytest.mark.filterwarnings("ignore:Using the model-agnostic default")
def test_lengths(pair: Pair, given: dict):
    inputs = {"input_ids": prompt(0, before=16, seed=5)}
    both(pair, inputs, given)
    set_adapter(pair[1], True)


def test_beams_over_several_pages_of_the_cache(pair: Pair):
    """Beams split, continue and are dropped while their keys fill several pages of 64."""
    options = {"num_beams": 4, "max_new_tokens": 100, "repetition_penalty": 1.3, "eos_token_id": 118, "min_new_tokens": 100}
    both(pair, batch_of(pair[0], [25]), options)


@pytest.mark.parametrize("pad", [0, 9])
def test_a_generation_config_of_transformers_and_the_padding_of_ended_beams(pair: Pair, pad: int):
    config = transformers.GenerationConfig(
        num_beams=4, max_new_tokens=6, length_penalty=0.3, num_return_sequences=4, eos_token_id=MOST_ENDS[1:]
    )
    theirs, _ = both(pair, batch_of(pair[0], [17, 33]), {"generation_config": config, "pad_token_id": pad, "num_beams": 4})
    filled = theirs.sequences[:, -theirs.beam_indices.shape[1] :][theirs.beam_indices < 0]
    assert set(filled.tolist()) == {pad or MOST_ENDS[1]}  # transformers' beam search treats 0 as no pad id


# --- stop strings ----------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def with_tokenizer(tmp_path_factory) -> tuple:
    """A checkpoint with a tokenizer: our model and processor, transformers' model and tokenizer."""
    folder = tmp_path_factory.mktemp("random-checkpoint")
    write_checkpoint(folder)
    reference = transformers.AutoModelForSpeechSeq2Seq.from_pretrained(str(folder))
    scale_logits(reference)
    tokenizer = transformers.AutoTokenizer.from_pretrained(str(folder))
    return (
        GraniteSpeechForConditionalGeneration.from_pretrained(folder),
        GraniteSpeechProcessor.from_pretrained(folder),
        reference,
        tokenizer,
    )


def test_stop_strings(with_tokenizer):
    ours, processor, reference, their_tokenizer = with_tokenizer
    texts = ["the quick brown fox", "transcribe the speech with proper punctuation, and over the lazy dog"]
    inputs = processor.tokenizer(texts, padding=True, return_tensors="pt", padding_side="left")
    inputs = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    width = inputs["input_ids"].shape[1]
    free = ours.generate(**inputs, max_new_tokens=16)[:, width:]
    # The text of one to three tokens of the free answers, and the same without its first and last character.
    answers = [
        processor.decode(row[start : start + size]) for row in free for start, size in ((0, 1), (2, 3), (5, 2), (7, 3), (11, 2), (14, 1))
    ]
    pieces = [cut for one in answers for cut in (one, one[1:-1]) if cut and "\N{REPLACEMENT CHARACTER}" not in cut]
    first = processor.decode(free[1, :1])
    # A string that begins in the prompt, one that never occurs, and several at once.
    cases = [[one] for one in pieces] + [["lazy dog" + first], ["nothing like it"], pieces[1:4], ["zz", *pieces[2:]]]
    lengths = set()
    for strings, (beams, tokenizer) in product(cases, ((1, processor.tokenizer), (1, their_tokenizer), (3, processor))):
        options = {"max_new_tokens": 16, "stop_strings": strings, "num_beams": beams}
        theirs = reference.generate(**inputs, **options, tokenizer=their_tokenizer)
        assert torch.equal(ours.generate(**inputs, **options, tokenizer=tokenizer), theirs), options
        lengths |= {int((row != processor.tokenizer.pad_token_id).sum()) for row in theirs[:, width:]}
    assert len(lengths) > 4
