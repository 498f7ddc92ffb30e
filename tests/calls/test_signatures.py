"""Every parameter of transformers' public methods exists here by name, apart from a list with the reason for each."""

import inspect
from collections.abc import Iterator

import torch
import transformers

import granite_speech
from granite_speech.inputs.tokenizer import GraniteSpeechTokenizer

# The only reasons to leave a parameter or a method out.
MODALITY, REMOTE_CODE, DEVICES, DEPRECATED = "another modality", "code from the hub", "several devices", "deprecated"
MOST = 60  # parameters

NAMES = (
    "AutoConfig",
    "AutoFeatureExtractor",
    "AutoModelForSpeechSeq2Seq",
    "AutoProcessor",
    "AutoTokenizer",
    "Blip2QFormerConfig",
    "GraniteConfig",
    "GraniteSpeechCTCEncoder",
    "GraniteSpeechConfig",
    "GraniteSpeechEncoderConfig",
    "GraniteSpeechFeatureExtractor",
    "GraniteSpeechForConditionalGeneration",
    "GraniteSpeechModel",
    "GraniteSpeechPlusConfig",
    "GraniteSpeechPlusEncoderConfig",
    "GraniteSpeechPlusForConditionalGeneration",
    "GraniteSpeechProcessor",
)
PAIRS = {name: (getattr(granite_speech, name), getattr(transformers, name)) for name in NAMES} | {
    "GraniteSpeechTokenizer": (GraniteSpeechTokenizer, transformers.PreTrainedTokenizerFast),
    "GenerationConfig": (granite_speech.GenerationConfig, transformers.GenerationConfig),
}

# By parameter: why no method here has it.
PARAMETERS: dict[str, str] = {}
# By method: why no class here has it.
METHODS: dict[str, str] = {}


def methods(theirs: type) -> Iterator[str]:
    """transformers' own public methods of a class, constructor and call included."""
    for name in dir(theirs):
        inherited = issubclass(theirs, torch.nn.Module) and getattr(torch.nn.Module, name, None) is getattr(theirs, name)
        if (not name.startswith("_") or name in ("__init__", "__call__")) and callable(getattr(theirs, name)) and not inherited:
            yield name


def parameters(method: object) -> set[str]:
    variable = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return {name for name, one in inspect.signature(method).parameters.items() if one.kind not in variable}


def left_out() -> list[tuple[str, str, str]]:
    """Class, method and parameter of each that is missing here."""
    found = []
    for name, (ours, theirs) in PAIRS.items():
        for method in methods(theirs):
            if hasattr(ours, method):
                missing = parameters(getattr(theirs, method)) - parameters(getattr(ours, method))
                found += [(name, method, one) for one in sorted(missing)]
    return found


def test_parameters_that_are_left_out():
    found = left_out()
    assert {one for _, _, one in found} == set(PARAMETERS), found
    assert set(PARAMETERS.values()) <= {MODALITY, REMOTE_CODE, DEVICES, DEPRECATED}
    assert len(found) <= MOST


def test_methods_that_are_left_out():
    found = {method for ours, theirs in PAIRS.values() for method in methods(theirs) if not hasattr(ours, method)}
    assert found == set(METHODS)
