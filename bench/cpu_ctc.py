"""TurboCTC in the released size on a CPU, with random weights: from features to the best path, of one clip and of eight unequal ones."""

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from bench.encoder import CLIP_SECONDS, FRAMES_A_SECOND
from bench.products import Products
from bench.turns import REFERENCES, SYSTEMS, compared, error, seconds_in_turns, torch_dtype
from granite_speech.config_ctc import GraniteSpeech5CTCConfig
from granite_speech.model_ctc import GraniteSpeech5ForCTC

__all__ = ["measure", "pair"]

# Largest error of the logits, relative to ours in float32. transformers in float32 is compared clip by clip.
TOLERANCES = {"transformers float32": 1e-4, "ours bfloat16": 6e-2, "transformers bfloat16": 6e-2, "ours int8": 1.5e-1}


def measure(rounds: int, systems: tuple[str, ...] = SYSTEMS, configuration: dict[str, Any] | None = None) -> dict[str, Any]:
    """Seconds of each system, and how many seconds of audio it transcribes in one.

    Args:
        rounds: for one clip; for the batch, which takes far longer, half as many.
        systems: some of SYSTEMS, "ours float32" and "transformers float32" among them.
        configuration: values of `GraniteSpeech5CTCConfig`; None for the released ones.

    Raises:
        SystemExit: the logits of a system are wrong; nothing is timed.
    """
    models = _models(systems, configuration or {})
    config = models["ours float32"].config.encoder_config
    lengths = [seconds * FRAMES_A_SECOND for seconds in CLIP_SECONDS]
    generator = torch.Generator().manual_seed(0)
    batch = torch.randn(len(lengths), max(lengths), 4 * config.num_mel_bins, generator=generator)
    with torch.no_grad():  # not inference mode, in which a product is not an operation of its own
        errors = _check(models, batch, lengths)
        measurements = [
            _measure(f"one clip of {CLIP_SECONDS[-1]} s", models, batch[-1:], lengths[-1:], rounds),
            _measure(f"{len(lengths)} clips of {CLIP_SECONDS[0]} to {CLIP_SECONDS[-1]} s", models, batch, lengths, (rounds + 1) // 2),
        ]
    return {"layers": config.num_hidden_layers, "hidden_dim": config.hidden_size, "errors": errors, "measurements": measurements}


def pair(configuration: dict[str, Any]) -> tuple[Any, Any]:
    """Ours and transformers', with the same random weights, in float32."""
    import transformers

    torch.manual_seed(0)
    reference = transformers.GraniteSpeech5ForCTC(transformers.GraniteSpeech5CTCConfig(**configuration)).eval()
    ours = GraniteSpeech5ForCTC(GraniteSpeech5CTCConfig(**configuration)).eval()
    ours.load_state_dict(reference.state_dict())
    return ours, reference


def _models(systems: tuple[str, ...], configuration: dict[str, Any]) -> dict[str, Any]:
    from granite_speech.modules.int8_layers import round_to_int8

    ours, reference = pair(configuration)
    found = {"ours float32": ours, "transformers float32": reference}
    for system in systems:
        if system not in found:
            found[system] = copy.deepcopy(reference if system in REFERENCES else ours).to(torch_dtype(system))
        if system == "ours int8":
            round_to_int8(found[system])
    return {system: found[system] for system in systems}


def _inputs(system: str, batch: torch.Tensor, lengths: list[int]) -> dict[str, torch.Tensor]:
    """Of `forward` and `generate`: features of the longest clip's width, with a mask if there is padding."""
    inputs = {"input_features": batch[:, : max(lengths)].to(torch_dtype(system))}
    if min(lengths) < max(lengths):
        inputs["attention_mask"] = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()
    return inputs


def _check(models: dict[str, Any], batch: torch.Tensor, lengths: list[int]) -> dict[str, float]:
    """Errors of the logits, relative to ours in float32."""
    truth = models["ours float32"](**_inputs("ours float32", batch, lengths)).logits
    errors = {}
    for system, model in models.items():
        if system not in TOLERANCES:
            continue
        clips = range(len(lengths)) if system in REFERENCES else [slice(None)]
        found = []
        for clip in clips:
            some = slice(clip, clip + 1) if isinstance(clip, int) else clip
            logits = model(**_inputs(system, batch[some], lengths[some])).logits
            found.append(error(logits.float(), truth[some, : logits.shape[1]]))
        errors[system] = max(found)
        if not errors[system] <= TOLERANCES[system]:
            raise SystemExit(f"TurboCTC: the logits of {system} have an error of {errors[system]:.1e} (allowed: {TOLERANCES[system]:.1e})")
    return errors


def _measure(what: str, models: dict[str, Any], batch: torch.Tensor, lengths: list[int], rounds: int) -> dict[str, Any]:
    calls: dict[str, Callable[[], Any]] = {
        system: partial(model.generate, **_inputs(system, batch, lengths)) for system, model in models.items()
    }
    floors = {system: _floor(call) for system, call in calls.items() if system not in REFERENCES}
    measured = compared(seconds_in_turns(calls, rounds), [one for one in REFERENCES if one in calls])
    audio = sum(lengths) / FRAMES_A_SECOND
    times_real = {system: audio / seconds for system, seconds in measured["seconds"].items()}
    return {"what": what, "audio_seconds": audio, "rounds": rounds, **measured, "floors": floors, "rtfx": times_real}


def _floor(call: Callable[[], Any]) -> dict[str, float]:
    with Products() as products:
        call()
    seconds = products.seconds()
    return {"matmul_flops": products.flops, "matmul_flops_a_second": products.flops / seconds, "seconds": seconds}
