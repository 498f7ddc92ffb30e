"""Calls from notebooks, model cards and issues, one of each kind, here and in transformers."""

from typing import Any

import numpy as np
import torch
import transformers

from tests.support.two_libraries import PROMPT, WORDS, Call, Library, comparison, library

TEMPLATE = "{% for m in messages %}{% for c in m.content %}{{ '<|audio|>' if c.type == 'audio' else c.text }}{% endfor %}{% endfor %}"


class Stop(transformers.StoppingCriteria):
    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        return torch.ones(len(input_ids), dtype=torch.bool)


def generate(lib: Library, **options: Any) -> torch.Tensor:
    return lib.model.generate(**lib.inputs, **options)


def under_autocast(lib: Library) -> str:
    with torch.inference_mode(), torch.amp.autocast("cpu", dtype=torch.bfloat16):
        return lib.words(generate(lib, max_new_tokens=20))


def stereo(lib: Library) -> str:
    two = np.stack([lib.clips[0], lib.clips[0]], 1)  # (samples, channels), as soundfile.read gives it
    return lib.words(lib.model.generate(**lib.processor(PROMPT, two, return_tensors="pt"), max_new_tokens=20))


def share_of_loss(lib: Library) -> torch.Tensor:
    labels = lib.inputs["input_ids"].clone()
    count = int((labels[:, 1:] != -100).sum())
    return lib.model(**lib.inputs, labels=labels, num_items_in_batch=4 * count).loss


def kept_configuration(lib: Library) -> list[int]:
    model, folder = lib.new_model(), lib.new_folder()
    model.generation_config.max_new_tokens = 2
    ids = model.generate(**lib.inputs)
    model.generation_config.save_pretrained(folder)
    return [ids.shape[1], lib.GenerationConfig.from_pretrained(folder).max_new_tokens]


def wrapped(lib: Library) -> int:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=4, target_modules=["k_proj"], task_type="CAUSAL_LM")
    return sum(one.numel() for one in get_peft_model(lib.new_model(), config).parameters() if one.requires_grad)


def pad_token(lib: Library) -> list[Any]:
    tokenizer = lib.AutoProcessor.from_pretrained(lib.folder).tokenizer
    tokenizer.pad_token = tokenizer.eos_token
    return [tokenizer.pad_token_id, tokenizer.eos_token_id]


def audio_in_chat(lib: Library) -> Any:
    chat = [{"role": "user", "content": [{"type": "audio", "audio": lib.clips[0]}, {"type": "text", "text": "hi"}]}]
    return lib.processor.apply_chat_template(chat, chat_template=TEMPLATE, tokenize=True, return_dict=True, return_tensors="pt")


def hooked(lib: Library, layer: int) -> torch.Tensor:
    seen: dict[str, torch.Tensor] = {}
    encoder = lib.model.model.encoder
    handle = encoder.layers[layer].register_forward_hook(lambda module, arguments, output: seen.update(output=output))
    encoder(lib.inputs["input_features"])
    handle.remove()
    return seen["output"].detach()


def decoder(lib: Library) -> Any:
    return lib.model.model.language_model


def embedded() -> dict[str, torch.Tensor]:
    states = torch.randn(1, 6, 128, generator=torch.Generator().manual_seed(1))
    return {"inputs_embeds": states, "attention_mask": torch.ones(1, 6, dtype=torch.long)}


def loaded(lib: Library, kind: str = "AutoModelForSpeechSeq2Seq", **options: Any) -> str:
    return type(getattr(lib, kind).from_pretrained(lib.folder, **options)).__name__


def saved(lib: Library, what: Any, **options: Any) -> bool:
    folder = lib.new_folder()
    what.save_pretrained(str(folder), **options)
    return any(folder.iterdir())


SWALLOWED = "transformers 5.23 does not use num_items_in_batch for this model"
ONE_CHANNEL = "transformers takes the channels for clips, and fails"

CALLS = {
    "a notebook's padding_side": Call(lambda lib: [lib.batch["input_ids"], lib.batch["attention_mask"], lib.batch["input_features_mask"]]),
    "inputs by a dict comprehension": Call(
        lambda lib: lib.model.generate(**{name: one.to("cpu") for name, one in lib.inputs.items()}, max_new_tokens=3)
    ),
    "autocast over float32": Call(under_autocast),
    "(samples, channels)": Call(stereo, differs=ONE_CHANNEL),
    "trust_remote_code=True": Call(lambda lib: loaded(lib, trust_remote_code=True)),
    "a processor's trust_remote_code=True": Call(lambda lib: loaded(lib, "AutoProcessor", trust_remote_code=True)),
    "attn_implementation='sdpa'": Call(lambda lib: loaded(lib, attn_implementation="sdpa")),
    "low_cpu_mem_usage, use_safetensors": Call(lambda lib: loaded(lib, low_cpu_mem_usage=True, use_safetensors=True)),
    "pretrained_model_name_or_path=": Call(
        lambda lib: lib.GraniteSpeechForConditionalGeneration.from_pretrained(pretrained_model_name_or_path=lib.folder).dtype
    ),
    "safe_serialization=True": Call(lambda lib: saved(lib, lib.new_bare_model(), safe_serialization=True)),
    "state_dict=": Call(lambda lib: saved(lib, model := lib.new_bare_model(), state_dict=model.state_dict())),
    "push_to_hub=False": Call(lambda lib: saved(lib, lib.processor, push_to_hub=False)),
    "num_parameters(only_trainable=True)": Call(lambda lib: lib.new_model().requires_grad_(True).num_parameters(only_trainable=True)),
    "temperature with greedy": Call(lambda lib: generate(lib, max_new_tokens=3, temperature=0.2, do_sample=False)),
    "empty logits_processor": Call(lambda lib: generate(lib, max_new_tokens=3, logits_processor=[])),
    "stopping_criteria": Call(lambda lib: generate(lib, max_new_tokens=5, stopping_criteria=transformers.StoppingCriteriaList([Stop()]))),
    "no_repeat_ngram_size": Call(lambda lib: generate(lib, max_new_tokens=8, no_repeat_ngram_size=3)),
    "NumPy integers": Call(lambda lib: generate(lib, max_new_tokens=np.int64(3))),
    "use_cache=True, synced_gpus=False": Call(lambda lib: generate(lib, max_new_tokens=3, use_cache=True, synced_gpus=False)),
    "num_items_in_batch": Call(share_of_loss, differs=SWALLOWED),
    "generation_config is an object": Call(kept_configuration),
    "peft with a task type": Call(wrapped),
    "pad_token = eos_token": Call(pad_token),
    "tokenizer.pad": Call(lambda lib: dict(lib.processor.tokenizer.pad({"input_ids": [[1], [1, 2]]}))),
    "tokenizer.tokenize": Call(lambda lib: lib.processor.tokenizer.tokenize("five")),
    "tokenizer truncation": Call(lambda lib: dict(lib.processor.tokenizer("five six", truncation=True, max_length=1))),
    "decode(clean_up_tokenization_spaces=)": Call(lambda lib: lib.processor.tokenizer.decode([65], clean_up_tokenization_spaces=False)),
    "audio inside a chat message": Call(audio_in_chat),
    "projector(states)": Call(
        lambda lib: lib.model.model.projector(lib.model.model.encoder(lib.inputs["input_features"]).last_hidden_state)
    ),
    "language_model(inputs_embeds=, attention_mask=)": Call(lambda lib: decoder(lib)(**embedded()).last_hidden_state),
    "generate(inputs_embeds=)": Call(lambda lib: lib.model.generate(**embedded(), max_new_tokens=3)),
    "hook on an encoder layer": Call(lambda lib: hooked(lib, 1)),
    "hook on the middle encoder layer": Call(lambda lib: hooked(lib, 2)),  # to whose output the CTC feedback is added
    "return_tensors='np'": Call(lambda lib: dict(lib.processor(PROMPT, lib.clips[0], return_tensors="np"))),
}

test_notebooks = comparison(CALLS)


def test_autocast_and_stereo_give_the_words():
    lib = library("granite_speech")
    assert under_autocast(lib) == stereo(lib) == WORDS
