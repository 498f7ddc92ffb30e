"""Calls of `generate`, as users write them, here and in transformers."""

import copy
from typing import Any

import numpy as np
import torch
import transformers

from granite_speech import InputError, UnsupportedError
from tests.support.two_libraries import PROMPT, Call, Library, comparison, library

TEXT = torch.tensor([[17, 40, 17, 41, 17, 40, 33]])
SHORT = "USER: <|audio|>transcribe\n ASSISTANT:"
SAMPLING = {"do_sample": True, "max_new_tokens": 8, "top_k": 0, "temperature": 3.0}


def generated(**options: Any) -> Call:
    """Ids of the first clip's answer."""
    return Call(lambda lib: lib.model.generate(**lib.inputs, **{"max_new_tokens": 10} | options))


def continued(**options: Any) -> Call:
    """Ids after a text."""
    return Call(lambda lib: lib.model.generate(input_ids=TEXT, **{"max_new_tokens": 10, "eos_token_id": []} | options))


def recorded(**options: Any) -> Call:
    return continued(return_dict_in_generate=True, **options)


def scored(**options: Any) -> Call:
    """Ids, and the scores that they were chosen from."""
    return recorded(output_scores=True, **options)


def left_padded(lib: Library) -> dict[str, torch.Tensor]:
    """Two prompts of different lengths, each with the first clip."""
    rows = [dict(lib.processor(text, lib.clips[0], return_tensors="pt")) for text in (PROMPT, SHORT)]
    missing = rows[0]["input_ids"].shape[1] - rows[1]["input_ids"].shape[1]
    for name, value in (("input_ids", 321), ("attention_mask", 0)):
        rows[1][name] = torch.nn.functional.pad(rows[1][name], (missing, 0), value=value)
    names = ("input_ids", "attention_mask", "input_features", "input_features_mask")
    return {name: torch.cat([row[name] for row in rows]) for name in names}


def embedded(lib: Library, ids: torch.Tensor = TEXT) -> torch.Tensor:
    return lib.model.get_input_embeddings()(ids)


class EndsWith:
    """A criterion for each row."""

    def __init__(self, *tokens: int):
        self.tokens = torch.tensor(tokens)

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        return torch.isin(input_ids[:, -1], self.tokens)


def after_columns(columns: int):
    return lambda input_ids, scores, **kwargs: input_ids.shape[1] >= columns


def raise_token(input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
    """A processor that writes to its argument and depends on the row's tokens."""
    scores[:, (input_ids[:, -1] + 1) % 300] += 2.0
    return scores


def with_config(change: Any, **call: Any) -> Call:
    """A call of a model whose generation_config was changed."""

    def run(lib: Library) -> Any:
        model = lib.model
        before = copy.deepcopy(model.generation_config)
        try:
            change(lib, model)
            return model.generate(input_ids=TEXT, **call)
        finally:
            model.generation_config = before

    return Call(run)


def set_attributes(lib: Library, model: Any) -> None:
    model.generation_config.max_new_tokens = 3
    model.generation_config.eos_token_id = None


def assign(lib: Library, model: Any) -> None:
    model.generation_config = lib.GenerationConfig(max_new_tokens=9)


def prefix(batch_id: int, ids: torch.Tensor) -> list[int]:
    return [20 + 10 * batch_id, 21 + 10 * batch_id + len(ids) % 3]


def streamed(kind: str, **options: Any) -> Call:
    def run(lib: Library) -> str:
        streamer = getattr(transformers, kind)(lib.processor.tokenizer, skip_prompt=True, **options)
        lib.model.generate(**lib.inputs, streamer=streamer, max_new_tokens=12)
        return "".join(streamer)

    return Call(run)


def first_row_after(steps: int):
    """A criterion that ends the first row after so many steps."""
    seen = []
    return lambda ids, scores, **kwargs: torch.tensor([len(seen) >= steps or bool(seen.append(1)), False])


class Collector:
    def __init__(self):
        self.received = []

    def put(self, ids: torch.Tensor) -> None:
        self.received.append(ids.clone())

    def end(self) -> None:
        self.received.append("end")


def batch_stream(lib: Library) -> list:
    collector = Collector()
    lib.model.generate(**left_padded(lib), streamer=collector, max_new_tokens=12, stopping_criteria=[first_row_after(4)])
    return collector.received


ARGUMENTS = {
    "inputs by position": Call(lambda lib: lib.model.generate(TEXT, max_new_tokens=4)),
    "inputs by name": Call(lambda lib: lib.model.generate(inputs=TEXT, max_new_tokens=4)),
    "a configuration by position": Call(lambda lib: lib.model.generate(TEXT, lib.GenerationConfig(max_new_tokens=5, num_beams=2))),
    "transformers' configuration": Call(
        lambda lib: lib.model.generate(TEXT, generation_config=transformers.GenerationConfig(max_new_tokens=5, do_sample=False))
    ),
    "processor and criteria by position": Call(
        lambda lib: lib.model.generate(TEXT, None, [raise_token], [EndsWith(40)], None, False, None, None, max_new_tokens=12)
    ),
    "no prompt": Call(lambda lib: lib.model.generate(max_new_tokens=5)),
    "no options": Call(lambda lib: lib.model.generate(**lib.inputs)),
    "both inputs": Call(lambda lib: lib.model.generate(TEXT, input_ids=TEXT), refused=InputError, differs="both refuse it"),
    "None everywhere": continued(
        logits_processor=None,
        stopping_criteria=None,
        prefix_allowed_tokens_fn=None,
        synced_gpus=None,
        assistant_model=None,
        streamer=None,
        negative_prompt_ids=None,
        negative_prompt_attention_mask=None,
        custom_generate=None,
        labels=None,
        token_type_ids=None,
        position_ids=None,
        past_key_values=None,
        inputs_embeds=None,
        pixel_values=None,
        assistant_tokenizer=None,
    ),
    "empty lists": continued(logits_processor=[], stopping_criteria=transformers.StoppingCriteriaList()),
    "options that change nothing": continued(use_cache=False, cache_implementation="static", synced_gpus=False, disable_compile=True),
    "labels": continued(labels=TEXT),
    "position ids": continued(position_ids=torch.arange(7)[None]),
    "padding without a mask": Call(
        lambda lib: lib.model.generate(
            torch.tensor([[321, 321, 40, 17], [17, 41, 22, 33]]),
            max_new_tokens=2,
            suppress_tokens=[320],
            return_dict_in_generate=True,
            output_scores=True,
        )
    ),
    "a batch": Call(lambda lib: lib.model.generate(**left_padded(lib), max_new_tokens=12)),
    "an assistant": Call(
        lambda lib: lib.model.generate(TEXT, assistant_model=lib.model), refused=UnsupportedError, differs="no assisted decoding"
    ),
    "numpy values": continued(
        max_new_tokens=np.int64(6), num_beams=np.int32(2), length_penalty=np.float64(0.5), early_stopping=True, do_sample=np.bool_(False)
    ),
    "tensors": continued(eos_token_id=torch.tensor(40), pad_token_id=torch.tensor(3), max_new_tokens=9),
    "temperature without sampling": generated(temperature=0.0, top_p=0.9, top_k=10, min_p=0.1, typical_p=0.5, num_beams=1),
    "None undoes an option": Call(lambda lib: lib.model.generate(**lib.inputs, eos_token_id=None, max_new_tokens=40)),
    "no top k": continued(**SAMPLING | {"top_k": None, "temperature": None}),
}

PROCESSORS = {
    "no repeated pairs": scored(no_repeat_ngram_size=2),
    "no repeated tokens": scored(no_repeat_ngram_size=1, repetition_penalty=1.2),
    "no repeated triples, beams": scored(no_repeat_ngram_size=3, num_beams=3),
    "no pairs of the prompt": scored(encoder_no_repeat_ngram_size=2),
    "tokens of the prompt": scored(encoder_repetition_penalty=1.8),
    "suppressed tokens": generated(suppress_tokens=[320, 300, 5], begin_suppress_tokens=[200, 41]),
    "suppressed tokens, beams": scored(suppress_tokens=range(40, 80), begin_suppress_tokens=[200, 41], num_beams=2),
    "bad words": scored(bad_words_ids=[[40], [17, 41], [320]], eos_token_id=320),
    "bad words of the answer": generated(bad_words_ids=[[300], [220, 1], [320]], return_dict_in_generate=True, output_scores=True),
    "sequence bias": scored(sequence_bias={(40,): -3.0, (33, 17): 9.0, (17, 41, 22): 5.5}),
    "sequence bias as a list": scored(sequence_bias=[[[40], -3.0], [[33, 17], 9.0]], num_beams=2),
    "forced end": scored(forced_eos_token_id=[320, 7], eos_token_id=320, max_new_tokens=6),
    "forced end of beams": scored(forced_eos_token_id=320, eos_token_id=320, max_new_tokens=6, num_beams=3),
    "forced beginning": Call(
        lambda lib: lib.model.generate(TEXT[:, :1], forced_bos_token_id=44, begin_suppress_tokens=range(45, 323), max_new_tokens=4)
    ),
    "decay": scored(exponential_decay_length_penalty=(2, 1.7), eos_token_id=[320, 40], max_new_tokens=20),
    "renormalized": scored(renormalize_logits=True, output_logits=True),
    "invalid values": scored(remove_invalid_values=True, suppress_tokens=[4]),
    "allowed tokens": scored(prefix_allowed_tokens_fn=prefix),
    "allowed tokens, beams": Call(
        lambda lib: lib.model.generate(TEXT.expand(2, -1), prefix_allowed_tokens_fn=prefix, num_beams=3, max_new_tokens=6)
    ),
    "a processor": scored(logits_processor=[raise_token], repetition_penalty=1.3),
    "a processor, beams": scored(logits_processor=transformers.LogitsProcessorList([raise_token]), num_beams=3),
    "a processor, a padded batch": Call(
        lambda lib: lib.model.generate(**left_padded(lib), logits_processor=[raise_token], max_new_tokens=12)
    ),
    "a processor, sampling": scored(**SAMPLING, logits_processor=[raise_token], num_return_sequences=2),
    "transformers' processors": scored(
        logits_processor=transformers.LogitsProcessorList(
            [
                transformers.NoRepeatNGramLogitsProcessor(2),
                transformers.SuppressTokensLogitsProcessor([40, 41]),
                transformers.MinNewTokensLengthLogitsProcessor(7, 4, 320),
            ]
        ),
        eos_token_id=320,
    ),
    "transformers' processor in place of an option": scored(
        no_repeat_ngram_size=1, logits_processor=[transformers.NoRepeatNGramLogitsProcessor(3)]
    ),
    "transformers' temperature": scored(
        **SAMPLING, logits_processor=transformers.LogitsProcessorList([transformers.TemperatureLogitsWarper(0.7)])
    ),
}

CUTOFFS = {
    "min p": scored(**SAMPLING, min_p=0.2),
    "top h": scored(**SAMPLING, top_h=0.4),
    "typical": scored(**SAMPLING, typical_p=0.6),
    "epsilon": scored(**SAMPLING, epsilon_cutoff=0.01),
    "eta": scored(**SAMPLING, eta_cutoff=0.02),
    "all of them": scored(**SAMPLING | {"top_k": 60, "temperature": 4.0}, top_p=0.95, min_p=0.02, typical_p=0.9, epsilon_cutoff=0.001),
    "beams": scored(**SAMPLING, min_p=0.02, num_beams=3, typical_p=0.95, eos_token_id=320),
    "eta, beams": scored(**SAMPLING, eta_cutoff=0.01, num_beams=2, epsilon_cutoff=0.001, top_h=0.9, eos_token_id=320),
    "top p of 0": scored(**SAMPLING, top_p=0.0),
}

STOPPING = {
    "a criterion": generated(stopping_criteria=[after_columns(30)]),
    "a criterion for each row": Call(
        lambda lib: lib.model.generate(**left_padded(lib), stopping_criteria=[EndsWith(*range(100, 323))], max_new_tokens=12)
    ),
    "a criterion, beams": continued(stopping_criteria=[EndsWith(*range(0, 323, 3))], num_beams=3, num_return_sequences=2),
    "maximum length in place of the option": continued(stopping_criteria=[transformers.MaxLengthCriteria(20)], max_new_tokens=3),
    "a shorter maximum": continued(stopping_criteria=transformers.StoppingCriteriaList([transformers.MaxLengthCriteria(max_length=10)])),
    "end tokens in place of the option": generated(stopping_criteria=[transformers.EosTokenCriteria([300])], max_new_tokens=40),
    "time": continued(max_time=0.0),
    "time, beams": continued(max_time=0.0, num_beams=2),
    "enough time": continued(max_time=100.0),
    "time criterion": continued(stopping_criteria=[transformers.MaxTimeCriteria(0.0)]),
    "criterion of recorded scores": recorded(
        output_scores=True, stopping_criteria=[lambda ids, scores, **kwargs: len(scores) == 4], max_new_tokens=8
    ),
    "a stop string as a criterion": Call(
        lambda lib: lib.model.generate(
            **lib.inputs,
            stopping_criteria=[transformers.StopStringCriteria(library("transformers").processor.tokenizer, ["one", "zzz"])],
            max_new_tokens=12,
        )
    ),
    "length by columns": Call(lambda lib: lib.model.generate(TEXT, max_length=12, min_length=11, eos_token_id=list(range(300)))),
}

EMBEDDINGS = {
    "alone": Call(lambda lib: lib.model.generate(inputs_embeds=embedded(lib), max_new_tokens=8)),
    "with ids": Call(lambda lib: lib.model.generate(input_ids=TEXT, inputs_embeds=embedded(lib), max_new_tokens=8)),
    "with other ids": Call(
        lambda lib: lib.model.generate(input_ids=TEXT[:, :2], inputs_embeds=embedded(lib), max_length=17),
        differs="transformers fails, because its positions follow the ids",
    ),
    "padded on the left": Call(
        lambda lib: lib.model.generate(
            inputs_embeds=embedded(lib, torch.cat((TEXT, TEXT.flip(1)))),
            attention_mask=torch.tensor([[0, 0, 1, 1, 1, 1, 1], [1] * 7]),
            max_new_tokens=8,
        )
    ),
    "beams": Call(lambda lib: lib.model.generate(inputs_embeds=embedded(lib), num_beams=3, repetition_penalty=1.3, max_new_tokens=8)),
    "sampling": Call(lambda lib: lib.model.generate(inputs_embeds=embedded(lib), **SAMPLING, num_return_sequences=2)),
    "rules": Call(lambda lib: lib.model.generate(inputs_embeds=embedded(lib), no_repeat_ngram_size=2, max_length=15, min_length=10)),
    "a processor": Call(
        lambda lib: lib.model.generate(
            inputs_embeds=embedded(lib), logits_processor=[lambda ids, scores: scores.roll(ids.shape[1], 1)], max_new_tokens=6
        )
    ),
}

RECORDS = {
    "scores and logits": recorded(output_scores=True, output_logits=True, repetition_penalty=1.4),
    "of beams": recorded(output_scores=True, output_logits=True, repetition_penalty=1.4, num_beams=3, eos_token_id=320),
    "hidden states": recorded(output_hidden_states=True, max_new_tokens=3),
    "hidden states of beams": recorded(output_hidden_states=True, max_new_tokens=3, num_beams=2, eos_token_id=320),
    "hidden states after audio": Call(
        lambda lib: lib.model.generate(**lib.inputs, output_hidden_states=True, return_dict_in_generate=True, max_new_tokens=2)
    ),
    "not returned": continued(output_scores=True, output_attentions=True, output_hidden_states=True),
    "transition scores": Call(lambda lib: transition_scores(lib)),
    "normalized transition scores": Call(lambda lib: transition_scores(lib, normalize_logits=True), tolerance=1e-3),
    "transition scores of beams": Call(lambda lib: transition_scores(lib, num_beams=3, num_return_sequences=3)),
    "attentions": Call(
        lambda lib: lib.model.generate(TEXT, output_attentions=True, return_dict_in_generate=True),
        refused=InputError,
        differs="decode steps do not compute weights",
    ),
}


def transition_scores(lib: Library, normalize_logits: bool = False, **options: Any) -> torch.Tensor:
    output = lib.model.generate(**lib.inputs, max_new_tokens=40, return_dict_in_generate=True, output_scores=True, **options)
    beams = output.beam_indices if options else None
    return lib.model.compute_transition_scores(output.sequences, output.scores, beams, normalize_logits=normalize_logits)


CONFIGURATIONS = {
    "of the model": Call(lambda lib: lib.model.generation_config.to_dict()),
    "changed": with_config(set_attributes),
    "changed and overridden": with_config(set_attributes, max_new_tokens=5),
    "its maximum wins over a length": with_config(set_attributes, max_length=30),
    "assigned": with_config(assign),
    "an argument inherits from it": with_config(set_attributes, generation_config=transformers.GenerationConfig(do_sample=False)),
    "saved": Call(lambda lib: saved(lib)),
    "with unknown names": Call(lambda lib: saved(lib, languages=["en"], forced_decoder_ids=None)),
    "update": Call(lambda lib: lib.GenerationConfig(top_k=3).update(top_k=4, nonsense=5, max_new_tokens=6)),
    "from a dictionary": Call(lambda lib: lib.GenerationConfig.from_dict({"top_k": 3}, top_p=0.5, do_sample=True).to_dict()),
    "unused arguments": Call(lambda lib: lib.GenerationConfig.from_dict({"top_k": 3}, return_unused_kwargs=True, top_p=1.0)[1] == {}),
    "equality": Call(
        lambda lib: [
            lib.GenerationConfig(top_k=3) == lib.GenerationConfig(top_k=3),
            lib.GenerationConfig(top_k=3) == lib.GenerationConfig(),
            lib.GenerationConfig() == {},
            len({lib.GenerationConfig(top_k=3), lib.GenerationConfig(top_k=3)}),
        ]
    ),
    "text": Call(lambda lib: repr(lib.GenerationConfig(max_new_tokens=3, eos_token_id=[1, 2]))),
    "of a new model": Call(
        lambda lib: lib.GraniteSpeechForConditionalGeneration.from_pretrained(lib.folder).generation_config.eos_token_id
    ),
    "default": Call(lambda lib: lib.GenerationConfig().max_new_tokens),
    "can generate": Call(lambda lib: lib.GraniteSpeechForConditionalGeneration.can_generate()),
}


def saved(lib: Library, **options: Any) -> dict[str, Any]:
    """A configuration that was saved by this package and loaded by both, or the other way round."""
    folder, config = lib.new_folder(), lib.GenerationConfig(max_new_tokens=3, suppress_tokens=[4], **options)
    config.save_pretrained(folder, config_file_name="answers.json")
    read = [one.from_pretrained(folder, "answers.json") for one in (lib.GenerationConfig, transformers.GenerationConfig)]
    assert read[0] == config
    return {name: [getattr(one, name) for one in read] for name in ("max_new_tokens", "suppress_tokens", "do_sample", *options)}


STREAMS = {
    "an iterator": streamed("TextIteratorStreamer"),
    "without special tokens": streamed("TextIteratorStreamer", skip_special_tokens=True),
    "a batch": Call(batch_stream),
}


def test_text_streamer(capsys):
    """transformers' TextStreamer prints the answer as it grows."""
    printed = []
    for name in ("granite_speech", "transformers"):
        lib = library(name)
        lib.model.generate(
            **lib.inputs, streamer=transformers.TextStreamer(lib.processor.tokenizer, skip_special_tokens=True), max_new_tokens=12
        )
        printed.append(capsys.readouterr().out)
    assert printed[0] == printed[1] and "nine one" in printed[0]


test_arguments = comparison(ARGUMENTS)
test_processors = comparison(PROCESSORS)
test_cutoffs = comparison(CUTOFFS)
test_stopping = comparison(STOPPING)
test_embeddings = comparison(EMBEDDINGS)
test_records = comparison(RECORDS)
test_configurations = comparison(CONFIGURATIONS)
test_streams = comparison(STREAMS)
