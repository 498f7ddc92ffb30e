"""Which dtype a model has: the checkpoint's for the model classes, the processor's fastest for transcription on a CPU."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

from granite_speech import (
    AutoModelForSpeechSeq2Seq,
    GraniteSpeechCTCEncoder,
    GraniteSpeechForConditionalGeneration,
    GraniteSpeechModel,
    InputError,
    Transcriber,
    UnsupportedError,
    load_model,
    transcribe,
)
from granite_speech.checkpoints import placement
from granite_speech.checkpoints.hub import EMBEDDED_FOLDER
from granite_speech.checkpoints.placement import choose_dtype
from granite_speech.cli import main
from tests.support.spoken import SPEECH, sentences

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
FIRST = sentences()[0]


@pytest.fixture(params=[True, False], ids=["a processor with bfloat16", "one without"])
def fastest(request, monkeypatch) -> torch.dtype:
    """What "fastest" means on a CPU of one kind or the other."""
    monkeypatch.setattr(placement, "has_bfloat16", lambda: request.param)
    return torch.bfloat16 if request.param else torch.float32


@pytest.fixture(params=["float32", "bfloat16", "float16"])
def folder(request, tmp_path):
    """The bundled checkpoint in a dtype."""
    model = GraniteSpeechForConditionalGeneration.from_pretrained("embedded", dtype=request.param)
    model.save_pretrained(tmp_path / "checkpoint")
    for one in EMBEDDED_FOLDER.iterdir():
        if "token" in one.name or "processor" in one.name or "template" in one.name:
            shutil.copy(one, tmp_path / "checkpoint")
    assert json.loads((tmp_path / "checkpoint/config.json").read_text())["dtype"] == request.param
    return tmp_path / "checkpoint"


def stored_dtypes(folder) -> set[str]:
    names = ("model.safetensors", "adapter_model.safetensors")
    return {
        str(tensor.dtype).removeprefix("torch.")
        for name in names
        for tensor in load_file(folder / name).values()
        if tensor.is_floating_point()
    }


# --- one resolver -----------------------------------------------------------------------------------------------------------------


def test_fastest_on_a_cpu_depends_on_the_processor_alone(fastest):
    for configured in ("float32", "bfloat16", "float16", "float64", None):
        assert choose_dtype("fastest", {"dtype": configured}, CPU) == choose_dtype("fastest", {"dtype": configured}) == fastest


def test_fastest_on_a_gpu_is_the_checkpoints_if_that_has_16_bits(fastest):
    expected = {"float32": torch.bfloat16, "bfloat16": torch.bfloat16, "float16": torch.float16, None: torch.bfloat16}
    for configured, dtype in expected.items():
        assert choose_dtype("fastest", {"dtype": configured}, CUDA) == choose_dtype("fastest", {"torch_dtype": configured}, CUDA) == dtype


def test_without_a_request_the_configuration_decides_whatever_the_processor(fastest):
    for requested in (None, "auto"):
        assert (
            choose_dtype(requested, {"dtype": "float16"}, CPU) == choose_dtype(requested, {"torch_dtype": "float16"}, CUDA) == torch.float16
        )
        assert choose_dtype(requested, {}, CPU) is None


def test_parts_may_all_be_the_fastest(fastest):
    assert choose_dtype({"text_config": "fastest", "": fastest}, {}, CPU) == fastest
    with pytest.raises(UnsupportedError, match="one dtype for all"):
        choose_dtype({"text_config": "fastest", "": "float64"}, {}, CPU)


@pytest.mark.parametrize("wrong", ["fast", "fastes", "int8", 16, torch.int8])
def test_what_is_not_a_dtype_is_refused_and_fastest_is_named(wrong):
    with pytest.raises(InputError, match="'fastest'"):
        choose_dtype(wrong, {}, CPU)


# --- what transcribes -------------------------------------------------------------------------------------------------------------


def test_transcription_on_a_cpu_takes_the_fastest_and_auto_the_checkpoints(folder, fastest):
    stored = json.loads((folder / "config.json").read_text())["dtype"]
    for load in (Transcriber.from_pretrained, load_model):
        for asked, expected in ((None, fastest), ("fastest", fastest), ("auto", getattr(torch, stored)), ("float64", torch.float64)):
            with load(folder, device="cpu", dtype=asked) as one:
                assert one.model.dtype == expected, asked
    assert transcribe(SPEECH / FIRST.audio, folder, device="cpu") == FIRST.text


def test_transcription_on_a_gpu_keeps_the_checkpoints_dtype(monkeypatch):
    loaded = []
    monkeypatch.setattr(GraniteSpeechForConditionalGeneration, "from_pretrained", lambda name, **settings: loaded.append(settings) or 1 / 0)
    monkeypatch.setattr("granite_speech.transcription.transcriber.choose_device", lambda device, _: torch.device(device))
    for device in ("cuda", "cpu"):
        with pytest.raises(ZeroDivisionError):
            Transcriber.from_pretrained("embedded", device=device)
    assert [one["dtype"] for one in loaded] == [None, "fastest"]


def test_every_way_to_transcribe_has_the_same_default(monkeypatch, fastest, capfd):
    used = []
    monkeypatch.setattr(Transcriber, "_setup", lambda self, model, *rest: used.append(model.dtype) or 1 / 0)
    path = str(SPEECH / FIRST.audio)
    for call in (
        lambda: Transcriber.from_pretrained("embedded", device="cpu").transcribe(path),
        lambda: load_model("embedded", device="cpu").transcribe(path),
        lambda: transcribe(path, "embedded", device="cpu"),
        lambda: main([path, "--device", "cpu"]),
        lambda: main([path, "--device", "cpu", "--dtype", "FASTEST"]),
    ):
        with pytest.raises(ZeroDivisionError):
            call()
    assert used == [fastest] * 5
    for call in (
        lambda: transcribe(path, "embedded", device="cpu", fp16=False),
        lambda: main([path, "--device", "cpu", "--fp16", "False"]),
    ):
        with pytest.raises(ZeroDivisionError):
            call()
    assert used[5:] == [torch.float32] * 2
    name = str(fastest).removeprefix("torch.")
    lines = [line for line in capfd.readouterr().err.splitlines() if " on cpu" in line]
    assert lines == [f"granite-speech: embedded, {one} on cpu, 1 thread" for one in (name, name, "float32")]


# --- what loads, trains and saves -------------------------------------------------------------------------------------------------


def test_models_loaded_by_default_and_saved_keep_the_checkpoints_dtype(folder, fastest, tmp_path):
    stored = json.loads((folder / "config.json").read_text())["dtype"]
    for dtype in (None, "auto"):
        model = GraniteSpeechForConditionalGeneration.from_pretrained(folder, dtype=dtype)
        assert model.dtype == getattr(torch, stored)
        model.save_pretrained(tmp_path / "again")
        assert stored_dtypes(tmp_path / "again") == stored_dtypes(folder) == {stored}
        assert json.loads((tmp_path / "again/config.json").read_text())["dtype"] == stored


@pytest.mark.parametrize(
    "kind", [GraniteSpeechForConditionalGeneration, AutoModelForSpeechSeq2Seq, GraniteSpeechModel, GraniteSpeechCTCEncoder]
)
def test_every_model_class_takes_fastest_and_keeps_the_checkpoints_dtype_without_it(kind, fastest):
    stored = torch.bfloat16 if kind is GraniteSpeechCTCEncoder else torch.float32  # its part of the configuration does not say: the file's
    for options, expected in (({}, stored), ({"dtype": "fastest"}, fastest), ({"torch_dtype": "fastest"}, fastest)):
        model = kind.from_pretrained("embedded", **options)
        assert {one.dtype for one in model.parameters()} == {expected}


def test_a_model_from_a_configuration_takes_fastest_too(fastest):
    config = GraniteSpeechForConditionalGeneration.from_pretrained("embedded").config
    assert AutoModelForSpeechSeq2Seq.from_config(config).dtype == torch.float32
    assert AutoModelForSpeechSeq2Seq.from_config(config, dtype="fastest").dtype == fastest
