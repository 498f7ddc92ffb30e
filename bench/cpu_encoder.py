"""The encoder in the released size on a CPU, with random weights: one clip, and a packed batch of unequal clips."""

import copy
import statistics
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from bench.encoder import CLIP_SECONDS, FRAMES_A_SECOND, check_agreement, encoders, matmul_flops
from bench.turns import REFERENCES, SYSTEMS, compared, error, seconds_in_turns, torch_dtype

__all__ = ["measure"]

# Largest error of the encoder's states, relative to ours in float32.
TOLERANCES = {"ours bfloat16": 3e-2, "transformers bfloat16": 3e-2, "ours int8": 8e-2}


def measure(layers: int, rounds: int, systems: tuple[str, ...] = SYSTEMS) -> dict[str, Any]:
    """Seconds of each system.

    Args:
        layers: of the encoder.
        rounds: for one clip; for the batch, which takes far longer, half as many.
        systems: some of SYSTEMS, those in float32 among them.

    Raises:
        SystemExit: the states of a system are wrong; nothing is timed.
    """
    models = _models(layers, systems)
    lengths = [seconds * FRAMES_A_SECOND for seconds in CLIP_SECONDS]
    batch = torch.randn(len(lengths), max(lengths), models["ours float32"].config.input_dim)
    with torch.inference_mode():
        errors = _check(models, batch, lengths)
        measurements = [
            _measure(f"one clip of {CLIP_SECONDS[-1]} s", models, batch[-1:], lengths[-1:], rounds),
            _measure(f"{len(lengths)} clips of {CLIP_SECONDS[0]} to {CLIP_SECONDS[-1]} s", models, batch, lengths, (rounds + 1) // 2),
        ]
    hidden = models["ours float32"].config.hidden_dim
    return {"layers": layers, "hidden_dim": hidden, "errors": errors, "measurements": measurements}


def _models(layers: int, systems: tuple[str, ...]) -> dict[str, torch.nn.Module]:
    ours, reference = encoders(layers)
    found = {"ours float32": ours, "transformers float32": reference}
    for system in systems:
        if system not in found:
            found[system] = copy.deepcopy(reference if system in REFERENCES else ours).to(torch_dtype(system))
        if system == "ours int8":
            from granite_speech.modules.int8_layers import round_to_int8

            round_to_int8(torch.nn.ModuleDict({"encoder": found[system]}))
    return {system: found[system] for system in systems}


def _check(models: dict[str, torch.nn.Module], batch: torch.Tensor, lengths: list[int]) -> dict[str, float]:
    """In float32 against transformers' encoder on some clips alone; errors of the other dtypes, relative to ours in float32."""
    truth = check_agreement(models["ours float32"], models["transformers float32"], batch, lengths, 1e-4)
    errors = {}
    for system in (one for one in models if one in TOLERANCES):
        # Of the longest clip: transformers' states of the others would depend on the padding.
        inputs = (batch[-1:], lengths[-1:]) if system in REFERENCES else (batch, lengths)
        states = _call(system, models[system], *inputs)().last_hidden_state
        errors[system] = error(states[-1], truth[-1])
        if not errors[system] <= TOLERANCES[system]:
            raise SystemExit(f"encoder: the states of {system} have an error of {errors[system]:.1e} (allowed: {TOLERANCES[system]:.0e})")
    return errors


def _call(system: str, model: torch.nn.Module, batch: torch.Tensor, lengths: list[int]) -> Callable[[], Any]:
    batch = batch.to(torch_dtype(system))
    return partial(model, batch) if system in REFERENCES else partial(model, batch, lengths)


def _measure(what: str, models: dict[str, torch.nn.Module], batch: torch.Tensor, lengths: list[int], rounds: int) -> dict[str, Any]:
    calls = {system: _call(system, model, batch, lengths) for system, model in models.items()}
    weight = models["ours float32"].layers[0].ff1.up_proj.weight
    products = {}
    for name in dict.fromkeys(system.rpartition(" ")[2] for system in REFERENCES):
        frames = torch.randn(sum(lengths), weight.shape[1]).to(getattr(torch, name))
        products[name] = partial(torch.nn.functional.linear, frames, weight.to(frames.dtype))
        products[name]()
    taken = seconds_in_turns(calls | products, rounds)
    rates = {name: 2 * sum(lengths) * weight.numel() / statistics.median(taken.pop(name)) for name in products}
    measured = compared(taken, [one for one in REFERENCES if one in models])
    flops = matmul_flops(models["ours float32"], sum(lengths))
    shares = {
        system: flops / seconds / rates[system.rpartition(" ")[2]]
        for system, seconds in measured["seconds"].items()
        if system not in REFERENCES and system.rpartition(" ")[2] in rates
    }
    return {
        "what": what,
        "audio_seconds": sum(lengths) / FRAMES_A_SECOND,
        "rounds": rounds,
        **measured,
        "matmul_flops": flops,
        "machine_matmul_flops_a_second": rates,
        "matmul_share": shares,
    }
