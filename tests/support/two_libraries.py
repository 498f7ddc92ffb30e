"""The same call in this package and in transformers, on the same folder, with the results compared.

CALLS = {"torch_dtype": Call(lambda lib: lib.GraniteSpeechModel.from_pretrained(lib.folder, torch_dtype="auto").dtype)}
test_loading = comparison(CALLS)
"""

import importlib
import tempfile
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, is_dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from granite_speech import load_audio
from granite_speech.checkpoints.hub import EMBEDDED_FOLDER
from tests.support.paths import ROOT
from tests.support.reference_models import scale_logits, set_adapter

__all__ = ["PROMPT", "WORDS", "Call", "Library", "assert_same", "comparison"]

PROMPT = "USER: <|audio|>can you transcribe the speech into a written format?\n ASSISTANT:"
WORDS = "nine one five seven"  # of the first clip


class Library:
    """One of the two packages, with a model and a processor of the bundled checkpoint.

    Any class of the package is an attribute. `model` and `processor` are loaded once and must not be changed; `new_model` and
    `new_processor` return fresh ones.

    Attributes:
        name: "granite_speech" or "transformers".
        folder: of the bundled checkpoint.
    """

    def __init__(self, name: str):
        self.name, self.folder = name, str(EMBEDDED_FOLDER)
        self._folders: list[tempfile.TemporaryDirectory] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(importlib.import_module(self.name), name)

    def new_model(self, **options: Any) -> Any:
        model = self.GraniteSpeechForConditionalGeneration.from_pretrained(self.folder, **options)
        if self.name == "transformers":
            scale_logits(model)
        return model.eval()

    def new_bare_model(self, **options: Any) -> Any:
        """A model of the same checkpoint without its adapter."""
        folder = self.folder
        try:
            self.folder = _bare_folder().name
            return self.new_model(**options)
        finally:
            self.folder = folder

    def new_processor(self) -> Any:
        return self.AutoProcessor.from_pretrained(self.folder)

    @cached_property
    def model(self) -> Any:
        return self.new_model()

    @cached_property
    def processor(self) -> Any:
        return self.new_processor()

    @property
    def clips(self) -> list[np.ndarray]:
        return [one.copy() for one in _clips()]

    @property
    def inputs(self) -> dict[str, Any]:
        """The processor's result for PROMPT and the first clip."""
        return dict(self.processor(PROMPT, self.clips[0], return_tensors="pt"))

    @property
    def batch(self) -> dict[str, Any]:
        """The same for two prompts of different lengths with a clip each."""
        texts = [PROMPT, "USER: <|audio|>transcribe\n ASSISTANT:"]
        return dict(self.processor(texts, self.clips, return_tensors="pt", padding=True, padding_side="left"))

    def words(self, ids: torch.Tensor) -> str:
        """The text of the first answer to `inputs`."""
        return self.processor.batch_decode(ids[:, self.inputs["input_ids"].shape[1] :], skip_special_tokens=True)[0].strip()

    def new_folder(self) -> Path:
        """An empty folder, which is removed when the tests end."""
        self._folders.append(tempfile.TemporaryDirectory(prefix="calls-"))
        return Path(self._folders[-1].name)


@cache
def _bare_folder() -> tempfile.TemporaryDirectory:
    folder = tempfile.TemporaryDirectory(prefix="bare-")
    for file in EMBEDDED_FOLDER.iterdir():
        if not file.name.startswith("adapter"):
            Path(folder.name, file.name).symlink_to(file)
    return folder


@cache
def _clips() -> tuple[np.ndarray, ...]:
    return tuple(load_audio(ROOT / f"tests/speech/0{number}.flac").numpy() for number in (0, 1))


@cache
def library(name: str) -> Library:
    return Library(name)


# Entries that only transformers has, and why.
_THEIRS_ALONE = {
    "past_key_values": "generate does not return its pages, which the next request uses",
    "transformers_version": "about transformers",
    "_commit_hash": "about the hub's cache",
    "padding_side": "of a feature extractor: unused defaults of its base class",
    "return_attention_mask": "of a feature extractor, too",
    "language_model.lm_head.weight": "in a file: a tied head is written once",
}


@dataclass(frozen=True)
class Call:
    """A call that users write.

    Attributes:
        run: takes a Library. What it returns is compared; tensors by value, text and numbers exactly.
        differs: why the results differ here, if they do; the test then fails if they are equal.
        refused: the class of the error that this package raises, if it refuses the call; with `differs` as the reason.
        tolerance: of floating-point tensors, relative to the largest value.
    """

    run: Callable[[Library], Any]
    differs: str | None = None
    refused: type[Exception] | None = None
    tolerance: float = 1e-4


def comparison(calls: Mapping[str, Call]) -> Callable:
    """A test function with one case for each call."""

    @pytest.mark.parametrize("call", [pytest.param(call, id=name) for name, call in calls.items()])
    def test(call: Call) -> None:
        compare(call)

    return test


def compare(call: Call) -> None:
    """Run a call in both packages and compare what it returns, or whether it fails."""
    ours, theirs = (_outcome(call, name) for name in ("granite_speech", "transformers"))
    if call.refused is not None:
        assert call.differs, "a refused call needs its reason"
        assert isinstance(ours, call.refused), f"expected {call.refused.__name__}, got {ours!r}"
        return
    if isinstance(ours, Exception):
        raise ours
    if call.differs is None:
        if isinstance(theirs, Exception):
            raise AssertionError("only transformers refuses this call; record why in `differs`") from theirs
        assert_same(ours, theirs, call.tolerance)
        return
    assert isinstance(theirs, Exception) or not _same(ours, theirs, call.tolerance), "the recorded difference is gone; remove `differs`"


def _same(ours: Any, theirs: Any, tolerance: float) -> bool:
    try:
        assert_same(ours, theirs, tolerance)
    except AssertionError:
        return False
    return True


def _outcome(call: Call, name: str) -> Any:
    torch.manual_seed(0)
    model = library(name).model  # loaded here, because a call may be in inference mode, and its weights could then not be trained
    if name == "transformers":
        set_adapter(model, True)  # its `generate` leaves it as the last request needed it
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return call.run(library(name))
        except Exception as error:
            return error


def assert_same(ours: Any, theirs: Any, tolerance: float = 1e-4, where: str = "result") -> None:
    """Assert that two results have the same structure and values. Entries that only this package has are not compared."""
    if isinstance(theirs, torch.Tensor | np.ndarray) or isinstance(ours, torch.Tensor | np.ndarray):
        assert isinstance(ours, type(theirs)), f"{where}: {type(ours).__name__}, not {type(theirs).__name__}"
        ours, theirs = torch.as_tensor(ours), torch.as_tensor(theirs)
        assert ours.shape == theirs.shape, f"{where}: shape {tuple(ours.shape)}, not {tuple(theirs.shape)}"
        if theirs.is_floating_point():
            assert ours.is_floating_point(), f"{where}: {ours.dtype}, not {theirs.dtype}"
            scale = float(theirs.float().nan_to_num(posinf=0, neginf=0).abs().max()) if theirs.numel() else 0.0
            assert torch.allclose(ours.float(), theirs.float(), rtol=0, atol=tolerance * max(scale, 1e-6), equal_nan=True), where
        else:
            assert torch.equal(ours, theirs), f"{where}: {ours.tolist()!r:.300}, not {theirs.tolist()!r:.300}"
    elif isinstance(theirs, Mapping) or (is_dataclass(theirs) and not isinstance(theirs, type)):
        mine, other = _entries(ours), _entries(theirs)
        missing = other.keys() - mine.keys() - _THEIRS_ALONE.keys()
        assert not missing, f"{where}: no {sorted(missing)!r:.300}"
        for name in mine.keys() & other.keys():
            assert_same(mine[name], other[name], tolerance, f"{where}.{name}")
    elif isinstance(theirs, list | tuple):
        assert isinstance(ours, list | tuple) and len(ours) == len(theirs), f"{where}: {ours!r:.300}, not {theirs!r:.300}"
        for index, (one, other) in enumerate(zip(ours, theirs, strict=True)):
            assert_same(one, other, tolerance, f"{where}[{index}]")
    elif isinstance(theirs, float):
        assert ours == pytest.approx(theirs, rel=max(tolerance, 1e-6), nan_ok=True), f"{where}: {ours!r}, not {theirs!r}"
    else:
        assert ours == theirs, f"{where}: {ours!r:.300}, not {theirs!r:.300}"


def _entries(value: Any) -> dict[str, Any]:
    if isinstance(value, Mapping):
        return dict(value)
    assert is_dataclass(value), f"a {type(value).__name__}, not a mapping or a record"
    return {one.name: getattr(value, one.name) for one in fields(value) if getattr(value, one.name) is not None}
