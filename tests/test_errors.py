"""Every error has three parts, is also a built-in exception, and survives pickling between processes."""

import copy
import pickle
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import pytest

from granite_speech import errors

CLASSES = [getattr(errors, name) for name in errors.__all__]
PARTS = {"got": "a folder {x} of 3 files", "expected": "one file", "remedy": "Remove two; keep %s"}
BASES = {
    "AudioError": (errors.InputError, ValueError),
    "CheckpointError": (ValueError,),
    "CheckpointNotFoundError": (errors.CheckpointError, FileNotFoundError, ValueError),
    "ConfigError": (ValueError,),
    "EngineError": (RuntimeError,),
    "GraniteSpeechError": (Exception,),
    "InputError": (ValueError,),
    "KernelError": (ValueError,),
    "MissingDependencyError": (ImportError,),
    "OutputError": (OSError,),
    "UnsupportedError": (NotImplementedError,),
}


def _raise(cls):
    raise cls(**PARTS)


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
def test_a_message_has_three_parts(cls):
    error = cls(**PARTS)
    assert str(error) == "a folder {x} of 3 files; expected one file. Remove two; keep %s."
    assert (error.got, error.expected, error.remedy) == tuple(PARTS.values())


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
def test_all_three_parts_are_required(cls):
    for missing in PARTS:
        with pytest.raises(TypeError, match=missing):
            cls(**{name: text for name, text in PARTS.items() if name != missing})
    with pytest.raises(TypeError):
        cls("a message")
    with pytest.raises(TypeError):
        cls(*PARTS.values())


def test_errors_are_also_builtin_exceptions():
    assert set(BASES) == set(errors.__all__)
    for name, bases in BASES.items():
        cls = getattr(errors, name)
        assert issubclass(cls, errors.GraniteSpeechError)
        for base in bases:
            with pytest.raises(base):
                _raise(cls)


def test_sibling_errors_do_not_inherit_from_each_other():
    # Catching one kind of error must not catch another.
    assert not issubclass(errors.UnsupportedError, ValueError)
    assert not issubclass(errors.ConfigError, errors.CheckpointError)
    assert not issubclass(errors.InputError, errors.ConfigError)
    assert not issubclass(errors.MissingDependencyError, OSError)


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
@pytest.mark.parametrize(
    "way", [lambda error: pickle.loads(pickle.dumps(error)), copy.copy, copy.deepcopy], ids=["pickle", "copy", "deepcopy"]
)
def test_copies_keep_all_parts(cls, way):
    again = way(cls(**PARTS))
    assert type(again) is cls
    assert str(again) == str(cls(**PARTS))
    assert (again.got, again.expected, again.remedy) == tuple(PARTS.values())


def test_an_error_survives_a_worker_process():
    with (
        ProcessPoolExecutor(1, mp_context=get_context("fork")) as pool,
        pytest.raises(errors.CheckpointNotFoundError, match="a folder") as caught,
    ):
        pool.submit(_raise_not_found).result(timeout=30)
    assert caught.value.remedy == PARTS["remedy"]


def _raise_not_found():
    raise errors.CheckpointNotFoundError(**PARTS)
