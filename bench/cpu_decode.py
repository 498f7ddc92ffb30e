"""Decode steps at batch 1 on a CPU: parts of released language models, 1 GB in float32, with random weights."""

import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import torch

from bench import checkpoints_cpu
from bench.turns import REFERENCES, SYSTEMS, compared, error, seconds_in_turns

__all__ = ["PARTS", "measure"]

# A released model, and one in how many of its layers and tokens. The head of one is tied to its embeddings, that of the other is not.
PARTS = (("3.3-2b", 10), ("4.1-2b", 8))
PROMPT, NEW_TOKENS, CHECKED = 100, 33, 9
# Largest error of the logits, relative to ours in float32.
TOLERANCES = {"transformers float32": 1e-4, "ours bfloat16": 3e-2, "transformers bfloat16": 3e-2, "ours int8": 8e-2}


def measure(rounds: int, systems: tuple[str, ...] = SYSTEMS, parts: tuple[tuple[str, int], ...] = PARTS) -> list[dict[str, Any]]:
    """Seconds per token of each system.

    Raises:
        SystemExit: the tokens or logits of a system are wrong; nothing is timed.
    """
    measurements = []
    for name, part in parts:
        configuration = checkpoints_cpu.decoder(name, part)
        with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
            size = checkpoints_cpu.write(Path(folder), configuration)
            models = {system: checkpoints_cpu.load(system, Path(folder)) for system in systems}
            measured = _measure(models, configuration, rounds)
        text = configuration["text_config"]
        shape = {key: text[key] for key in ("hidden_size", "intermediate_size", "num_hidden_layers", "vocab_size")}
        measurements.append({"what": checkpoints_cpu.title(name, part), "float32_bytes": size, "shape": shape} | measured)
    return measurements


def _measure(models: dict[str, Any], configuration: dict[str, Any], rounds: int) -> dict[str, Any]:
    text = configuration["text_config"]
    prompt = torch.randint(2, text["vocab_size"] - 1, (1, PROMPT), generator=torch.Generator().manual_seed(0))
    generate = {system: partial(_generate, model, prompt) for system, model in models.items()}
    truth = generate["ours float32"](CHECKED)
    if not torch.equal(generate["transformers float32"](CHECKED), truth):
        raise SystemExit("decode: other tokens in float32 than in transformers, so nothing was timed")
    errors = _errors(models, prompt, truth[0, PROMPT:], text["logits_scaling"])
    calls = {f"{system} {count}": partial(call, count) for system, call in generate.items() for count in (1, NEW_TOKENS)}
    for call in generate.values():
        call(2)  # a prompt and a step
    taken = seconds_in_turns(calls, rounds)
    steps = {}
    for system in models:
        both = zip(taken[f"{system} 1"], taken[f"{system} {NEW_TOKENS}"], strict=True)
        steps[system] = [(long - short) / (NEW_TOKENS - 1) for short, long in both]
    return compared(steps, [one for one in REFERENCES if one in models]) | {"errors": errors}


def _generate(model: Any, prompt: torch.Tensor, count: int) -> torch.Tensor:
    """Prompt and new tokens `(1, PROMPT + count)`."""
    mask = torch.ones_like(prompt)
    return model.generate(input_ids=prompt, attention_mask=mask, max_new_tokens=count, do_sample=False, pad_token_id=0)


def _errors(models: dict[str, Any], prompt: torch.Tensor, tokens: torch.Tensor, scaling: float) -> dict[str, float]:
    """Of the logits of every step, with these tokens whatever the model would choose; relative to ours in float32."""
    logits = {system: _logits(model, prompt, tokens) / (scaling if system in REFERENCES else 1) for system, model in models.items()}
    errors = {system: error(found, logits["ours float32"]) for system, found in logits.items() if system != "ours float32"}
    for system, found in errors.items():
        if not found <= TOLERANCES[system]:
            raise SystemExit(f"decode: the logits of {system} have an error of {found:.1e} (allowed: {TOLERANCES[system]:.0e})")
    return errors


def _logits(model: Any, prompt: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Of each token `(tokens, vocabulary)`: the first from the prompt, each other one from a step with the cache."""
    output = model(input_ids=prompt, use_cache=True)
    logits = [output.logits[0, -1]]
    for token in tokens[:-1]:
        output = model(input_ids=token.view(1, 1), past_key_values=output.past_key_values, use_cache=True)
        logits.append(output.logits[0, -1])
    return torch.stack(logits)
