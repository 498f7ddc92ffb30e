"""Training in two processes, which torchrun starts: the steps of one process, one report, and no process left waiting.

Starting takes much longer than training here, so one start runs all checks, and each test looks at one of their results.
"""

import json
import os
import subprocess
import sys

import pytest
import torch

from granite_speech import GraniteSpeechForConditionalGeneration
from granite_speech.errors import InputError
from granite_speech.training import finetune, processes, read_manifest
from granite_speech.transcription.transcriber import Transcriber
from tests.support.paths import ROOT
from tests.support.tiny_speech import TEXTS, make_trainer, write_manifest, write_model
from tests.support.two_processes import FAILURES, OPTIONS

needs_processes = pytest.mark.skipif(not torch.distributed.is_available(), reason="needs torch.distributed")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    write_model(folder)
    return folder


@pytest.fixture(scope="module")
def manifest(tmp_path_factory):
    return write_manifest(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """For `make_trainer`. The model has no dropout, since each process has its own."""
    folder = tmp_path_factory.mktemp("everything")
    write_model(folder / "model")
    write_manifest(folder, (*TEXTS, "one", "two", "three one"))
    return folder


def torchrun(folder, *command):
    """Run in two processes. Returns (exit status, standard output of each, standard error of both)."""
    logs = folder / "logs"
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--redirects", "3", "--log-dir", logs]
    roots = os.pathsep.join((str(ROOT), str(ROOT / "kernels")))
    environment = {**os.environ, "PYTHONPATH": roots, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([*map(str, (*launch, *command))], capture_output=True, text=True, env=environment, timeout=400, check=False)
    out, err = ([file.read_text() for file in sorted(logs.rglob(name))] for name in ("stdout.log", "stderr.log"))
    assert len(out) == 2, done.stderr
    return done.returncode, out, "".join(err)


@pytest.fixture(scope="module")
def results(manifest, base, folder, tmp_path_factory):
    """(results of each process, output folder) of tests/support/two_processes.py."""
    output = tmp_path_factory.mktemp("processes")
    status, out, err = torchrun(output, "-m", "tests.support.two_processes", manifest, base, folder, output)
    assert status == 0, err
    return [json.loads(one.splitlines()[-1]) for one in out], output


@pytest.fixture(scope="module")
def in_callers_group(results):
    return [one["caller"] for one in results[0]], results[1] / "caller"


@pytest.fixture(scope="module")
def in_group_of_finetune(results):
    return [one["finetune"] for one in results[0]], results[1] / "finetune"


@pytest.fixture(scope="module")
def alone(base, manifest, tmp_path_factory):
    return finetune(manifest, base, tmp_path_factory.mktemp("alone") / "out", OPTIONS, validation=manifest, progress=False)


@needs_processes
@pytest.mark.parametrize("group", ["in_callers_group", "in_group_of_finetune"])
def test_two_processes_tune_like_one(request, manifest, alone, group):
    (first, second), output = request.getfixturevalue(group)
    tuned, output = first["tuned"], output / "tuned"
    assert tuned == second["tuned"] and "3 steps" in tuned["report"]
    assert "training and config.json in it" in tuned["refused"]
    assert tuned["resumed"], "resuming a finished training gives the same report"
    assert tuned["group remains"] == (group == "in_callers_group"), "finetune closes its own group, but not the caller's"
    assert {one.name for one in output.iterdir()} == {one.name for one in alone.folder.iterdir()}
    mine, theirs = ([json.loads(line) for line in (one / "training" / "log.jsonl").open()] for one in (output, alone.folder))
    assert [one["step"] for one in mine] == [one["step"] for one in theirs] == [0, 1, 2, 3, 3]
    for one, other in zip(mine, theirs, strict=True):
        assert one.get("loss", 0) == pytest.approx(other.get("loss", 0), rel=1e-3)
    expected = dict(GraniteSpeechForConditionalGeneration.from_pretrained(alone.folder).named_parameters())
    for name, one in GraniteSpeechForConditionalGeneration.from_pretrained(output).named_parameters():
        assert torch.allclose(one, expected[name], atol=5e-3), name
    assert Transcriber.from_pretrained(output).transcribe(str(read_manifest(manifest)[0].audio), max_new_tokens=1) is not None


@needs_processes
def test_processes_can_join_again_after_leaving(in_group_of_finetune):
    """A process that joins again first must not use the other's address in the previous group."""
    results, _ = in_group_of_finetune
    assert [one["joined"] for one in results] == [[[[number, 0], [number, 1]] for number in range(4)]] * 2


@needs_processes
def test_the_command_in_two_processes_reports_once(in_group_of_finetune):
    results, folder = in_group_of_finetune
    statuses, out, err = zip(*(one["command"] for one in results), strict=True)
    assert statuses == (0, 0), err
    assert out[0].startswith(f"{folder / 'command'}: 2 steps, loss ") and out[1] == ""


@needs_processes
@pytest.mark.parametrize(
    "case, message", [("taken", "training and config.json in it"), ("uneven", "accumulate = 1 for 2 processes")], ids=["taken", "uneven"]
)
def test_a_refused_command_fails_in_both_processes_and_reports_once(in_callers_group, case, message):
    """Only process 0 checks whether the output folder is taken, but the other one must stop too."""
    results, _ = in_callers_group
    statuses, out, err = zip(*(one[case] for one in results), strict=True)
    assert statuses == (2, 2) and out == ("", "") and err[1] == ""
    assert err[0].startswith("granite-speech: ") and err[0].count("\n") == 1 and message in err[0]


@needs_processes
@pytest.mark.parametrize("place", FAILURES)
def test_an_error_in_one_process_stops_both(in_callers_group, place):
    results, _ = in_callers_group
    assert [one["failures"][place] for one in results] == ["AudioError a broken file"] * 2


@needs_processes
def test_two_processes_take_the_same_steps_as_one(in_callers_group, folder):
    alone = make_trainer(folder, accumulate=2)
    alone.run()
    (first, second), _ = in_callers_group
    together = first["trained"]
    assert second["trained"] == together
    assert [one["step"] for one in together] == [one["step"] for one in alone.history]
    for mine, theirs in zip(together, alone.history, strict=True):
        assert mine.keys() == theirs.keys() and mine["audio_seconds"] == pytest.approx(theirs["audio_seconds"])
        assert mine["loss"] == pytest.approx(theirs["loss"], rel=1e-3) and mine["epoch"] == theirs["epoch"]
        assert mine["gradient_norm"] == pytest.approx(theirs["gradient_norm"], rel=1e-2)


@needs_processes
def test_two_processes_stop_when_time_is_up_and_resume(in_callers_group):
    (first, _), _ = in_callers_group
    assert first["stopped"] == []
    assert [one["loss"] for one in first["continued"]] == pytest.approx([one["loss"] for one in first["trained"]], rel=1e-4)


@pytest.mark.parametrize(
    "device, gpus, local_rank, expected",
    [
        (None, 0, "1", "cpu"),
        (None, 2, "1", "cuda:1"),
        ("cuda", 2, "0", "cuda:0"),
        (torch.device("cuda"), 2, "1", "cuda:1"),
        ("cuda:0", 2, "1", "cuda:0"),
        ("cpu", 2, "1", "cpu"),
    ],
)
def test_each_process_has_its_own_device(monkeypatch, device, gpus, local_rank, expected):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setenv("LOCAL_RANK", local_rank)
    assert str(processes._own_device(device, shared=True)) == expected
    assert str(processes._own_device(device, shared=False)) == str(device or ("cuda" if gpus else "cpu"))


def test_more_processes_than_gpus_and_two_on_one_gpu_are_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(InputError, match="process 2 of this machine, which has 2 GPUs"):
        processes._own_device("cuda", shared=True)
    processes._check_devices([("a", "cuda:0"), ("a", "cuda:1"), ("b", "cuda:0")])
    with pytest.raises(InputError, match="2 processes on cuda:0"):
        processes._check_devices([("a", "cuda:0"), ("a", "cuda:0")])
