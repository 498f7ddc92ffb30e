"""Calls of `generate` drawn at random, with and without acceleration: the same answers, and the same errors."""

import copy
import random
from typing import Any

import pytest
import torch
from transformers import GenerationConfig

from granite_speech import accelerate, restore
from tests.support.live_models import LIVE_SPECS, batch
from tests.support.reference_models import build_reference

CALLS = 12  # of each checkpoint

# Options, how often each is given, and its values.
OPTIONS: dict[str, tuple[float, list[Any]]] = {
    "max_new_tokens": (0.8, list(range(9))),
    "max_length": (0.15, [1, 20, 40, 60]),
    "min_new_tokens": (0.2, [0, 3, 9]),
    "min_length": (0.1, [0, 30, 60]),
    "do_sample": (0.4, [True, True, False]),
    "temperature": (0.3, [0.3, 1.0, 2.0, 0.0]),
    "top_k": (0.3, [0, 1, 5, 500, None]),
    "top_p": (0.3, [0.1, 0.9, 1.0, 0.0]),
    "repetition_penalty": (0.2, [1.0, 1.5, 0.7]),
    "num_beams": (0.1, [1, 2]),
    "num_return_sequences": (0.15, [1, 2]),
    "eos_token_id": (0.2, [None, 3, [3, 4, 5], list(range(40)), -1, []]),
    "pad_token_id": (0.15, [None, 0, 99, 117]),
    "no_repeat_ngram_size": (0.08, [0, 2]),
    "sequence_bias": (0.05, [{(3,): 2.0}]),
    "min_p": (0.05, [0.1]),
    "forced_eos_token_id": (0.05, [118]),
    "return_dict_in_generate": (0.1, [True]),
    "output_scores": (0.05, [True]),
    "use_cache": (0.05, [True, False, None]),
    "cache_implementation": (0.05, ["static", "dynamic", None]),
    "synced_gpus": (0.03, [False, None]),
    "prefill_chunk_size": (0.03, [4]),
    "max_cache_len": (0.03, [99]),
    "trust_remote_code": (0.03, [True]),
    "logits_to_keep": (0.03, [0, 1, None]),
    "guidance_scale": (0.03, [1, 1.5]),
    "length_penalty": (0.05, [0.5]),
    "nonsense": (0.02, [None, 1]),
}
_OF_THE_CALL = ("synced_gpus", "trust_remote_code", "logits_to_keep", "nonsense")


def inputs_at_random(rng: random.Random, spec: Any) -> dict[str, torch.Tensor]:
    frames = tuple(rng.randint(1, 70) for _ in range(rng.randint(1, 4)))
    inputs = batch(spec, frames=frames, seed=rng.randrange(1000))
    columns = inputs["input_ids"].shape[1]
    if rng.random() < 0.2:
        del inputs["input_features"], inputs["input_features_mask"]
        inputs["input_ids"] = inputs["input_ids"].masked_fill(inputs["input_ids"] == 119, 5)
    elif rng.random() < 0.2:
        inputs["input_features"] = inputs["input_features"].to(rng.choice([torch.float64, torch.bfloat16]))
    if rng.random() < 0.15:
        inputs["attention_mask"][:, rng.randrange(columns - 1)] = 0
    if rng.random() < 0.15:
        inputs["input_ids"] = torch.nn.functional.pad(inputs["input_ids"], (0, 2), value=117)
        inputs["attention_mask"] = torch.nn.functional.pad(inputs["attention_mask"], (0, 2))
    inputs["attention_mask"] = inputs["attention_mask"].to(rng.choice([torch.int64, torch.int64, torch.bool, torch.float32, torch.int32]))
    if rng.random() < 0.2:
        del inputs["attention_mask"]
    if rng.random() < 0.1:
        inputs["input_ids"] = inputs["input_ids"].int()
    return inputs


def options_at_random(rng: random.Random) -> dict[str, Any]:
    options = {name: rng.choice(values) for name, (share, values) in OPTIONS.items() if rng.random() < share}
    if rng.random() < 0.15:
        moved = {name: options.pop(name) for name in list(options) if name not in _OF_THE_CALL and rng.random() < 0.5}
        try:
            options["generation_config"] = GenerationConfig(**moved)
        except ValueError:  # transformers checks some values here
            options |= moved
    return options


def outcome(live: Any, inputs: dict[str, torch.Tensor], options: dict[str, Any]) -> Any:
    torch.manual_seed(0)
    try:
        output = live.generate(**inputs, **copy.deepcopy(options))
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    ids = output if torch.is_tensor(output) else output.sequences
    return type(output), ids.dtype, ids.tolist()


@pytest.mark.parametrize("spec", LIVE_SPECS, ids=lambda spec: spec.name)
def test_the_same_outcome(spec: Any):
    rng, live = random.Random(spec.name), build_reference(spec)
    for number in range(CALLS):
        inputs, options = inputs_at_random(rng, spec), options_at_random(rng)
        mode = rng.choice([torch.no_grad, torch.enable_grad, torch.inference_mode])
        with mode():
            theirs = outcome(live, inputs, options)
            ours = outcome(accelerate(live), inputs, options)
            restore(live)
        assert ours == theirs, (number, options, {name: (one.shape, one.dtype) for name, one in inputs.items()})
