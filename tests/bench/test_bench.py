"""The benchmarks run, refuse to time wrong results, and the README files show the newest results."""

import contextlib
import inspect
import json
import re
import shutil
import sys
import time
from pathlib import Path

import pytest
import soundfile
import torch
from granite_kernels import OPERATIONS

from bench import __main__ as command_line
from bench import encoder, gpu, graphs, kernels, kernels_cpu, people, report, results
from granite_speech.errors import MissingDependencyError
from granite_speech.modules.cache import PagedCache
from tests.support.paths import ROOT
from tests.support.spoken import SPEECH, load, sentences


def test_readmes_show_the_newest_results():
    sections = report.sections()
    assert {file.relative_to(ROOT).as_posix() for file, _, _ in sections} == {
        "README.md",
        "bench/results/README.md",
        "granite_speech/assets/README.md",
    }
    for file, command, text in sections:
        assert text and section(file, command) == text


def test_the_headline_has_every_comparison_with_transformers():
    """Also those in which transformers is faster."""
    whole = max((run for run in results.newest() if run["kind"] == "whole-model"), key=lambda run: run["run"]["date"])
    (encoder,) = (run for run in results.newest() if run["kind"] == "encoder" and run["run"]["machine"] == whole["run"]["machine"])
    compared = [name for name in whole if name.startswith("transformers ") and "error" not in whole[name]]
    lines = report.headline().splitlines()[2:]
    assert len(lines) == len(encoder["measurements"]) + len(compared) > 2
    assert all(float(line.split(" | ")[-1].rstrip("x |")) > 0 for line in lines)


def test_result_files_have_commit_machine_and_versions():
    files = list(results.FOLDER.glob("*.json"))
    assert files
    for file in files:
        run = json.loads(file.read_text())["run"]
        assert re.fullmatch(r"[0-9a-f]{40}", run["commit"]) and run["machine"] and run["versions"]["torch"]


@pytest.fixture
def small(monkeypatch):
    """The benchmark's two encoders, small enough for a test."""
    from transformers import GraniteSpeechEncoderConfig as ReferenceConfig
    from transformers.models.granite_speech.modeling_granite_speech import GraniteSpeechCTCEncoder as Reference

    from granite_speech import GraniteSpeechCTCEncoder, GraniteSpeechEncoderConfig

    shape = {"num_layers": 2, "hidden_dim": 32, "num_heads": 2}
    reference = Reference(ReferenceConfig(**shape)).eval()
    ours = GraniteSpeechCTCEncoder(GraniteSpeechEncoderConfig(**shape)).eval()
    ours.load_state_dict(reference.state_dict())
    monkeypatch.setattr(encoder, "encoders", lambda layers: (ours, reference))
    # Device "cpu:0" takes the place of a GPU.
    monkeypatch.setattr(graphs, "side_stream", contextlib.nullcontext)
    monkeypatch.setattr(graphs, "matmul_rate", lambda dtype: {torch.float32: 6e12}[dtype])
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    return ours


def test_an_encoder_run_writes_its_result(small, tmp_path):
    table = encoder.run(layers=2, rounds=2, device="cpu:0", dtype="float32", out=tmp_path)
    (file,) = tmp_path.glob("encoder-a-gpu-*.json")
    result = json.loads(file.read_text())
    assert [one["audio_seconds"] for one in result["measurements"]] == [30.0, 126.0]
    for one in result["measurements"]:
        assert one["seconds"] > 0 and len(one["ratios"]) == 2
        assert one["matmul_share"] == one["matmul_flops"] / one["seconds"] / 6e12
    assert "one clip of 30 s" in table and "a GPU" in table


def test_a_wrong_encoder_is_not_timed(small, tmp_path):
    with torch.no_grad():
        small.out_mid.bias.normal_()
    with pytest.raises(SystemExit, match="differs from transformers"):
        encoder.run(layers=2, rounds=1, device="cpu:0", dtype="float32", out=tmp_path)
    assert not list(tmp_path.iterdir())


def test_matmul_flops_count_the_projections():
    """Counted by hand: per block two feed-forwards, q, k, v and output, and the convolution's two; plus the first and last layers."""
    from granite_speech import GraniteSpeechCTCEncoder, GraniteSpeechEncoderConfig

    ours = GraniteSpeechCTCEncoder(GraniteSpeechEncoderConfig(num_layers=1, hidden_dim=32, num_heads=2, output_dim=10))
    block = 2 * (32 * 128 * 2) + 4 * 32 * 32 + 32 * 128 + 64 * 32
    assert encoder.matmul_flops(ours, 7) == 2 * 7 * (block + 160 * 32 + 2 * 32 * 10)


def section(file: Path, command: str) -> str:
    return re.search(rf"<!-- python -m bench {command} -->\n(.*)\n<!-- end of {command} -->", file.read_text(), re.DOTALL).group(1)


def test_the_audit_page_shows_the_predicted_times():
    assert section(kernels.PREDICTIONS, "kernels --predict") == kernels.predict()
    assert "Predicted, not measured" in kernels.predict()


def test_released_cases_use_the_models_page_size():
    default = inspect.signature(PagedCache).parameters["page_size"].default
    assert {case.shape["page_size"] for case in OPERATIONS["paged_attention"].cases if case.released} == {default}


def test_costs_depend_only_on_shapes():
    for operation in OPERATIONS.values():
        for case in operation.cases:
            if not case.released:
                assert operation.cost(**case.sizes(torch.bfloat16)) == operation.cost(**case.inputs(torch.bfloat16))


def test_replace_section_needs_both_markers(tmp_path):
    file = tmp_path / "README.md"
    file.write_text("a\n<!-- python -m bench audit -->\nold\n<!-- end of audit -->\nb\n")
    results.replace_section(file, "audit", "new")
    assert file.read_text() == "a\n<!-- python -m bench audit -->\nnew\n<!-- end of audit -->\nb\n"
    with pytest.raises(ValueError, match="has no section between"):
        results.replace_section(file, "report", "new")


def test_a_cpu_run_of_the_kernels_writes_its_result(tmp_path):
    quick = ("--benchmark-max-time=0.05", "--benchmark-min-rounds=2", "-k", "lora_linear and v_proj and not 128 and not compiled")
    text = kernels_cpu.run(operations=["lora_linear"], out=tmp_path, options=quick)
    (file,) = tmp_path.glob("kernels-cpu-*.json")
    measured = json.loads(file.read_text())["measurements"]
    assert {one["operation"] for one in measured} == {"lora_linear"}
    assert all(one["seconds"]["torch"]["median"] > 0 and one["seconds"]["library"]["rounds"] >= 2 for one in measured)
    assert measured[0]["case"] in text


def test_gpu_steps_are_logged_and_stopped_with_their_children(tmp_path, monkeypatch):
    def step(name: str, program: str, seconds: float) -> gpu.Step:
        return gpu.Step(name, [sys.executable, "-c", program], seconds)

    started, survived = tmp_path / "started", tmp_path / "survived"
    child = f"touch {started}; sleep 3; touch {survived}"
    interpret = "import os; print(os.environ['TRITON_INTERPRET'])"
    slow = f"import subprocess; subprocess.run(['sh', '-c', {child!r}])"
    monkeypatch.setattr(
        gpu, "steps", lambda out: [step("one", interpret, 60), step("two", "raise SystemExit(3)", 60), step("three", slow, 2)]
    )
    monkeypatch.setattr(gpu, "LEAST_SECONDS", 1)
    assert gpu.run(tmp_path, budget=60) == 2
    done = json.loads((tmp_path / "summary.json").read_text())["steps"]
    assert [one["status"] for one in done] == [0, 3, "stopped after 2 s"]
    assert (tmp_path / "one.log").read_text() == "0\n"
    assert gpu.run(tmp_path, budget=0.5) == 3
    assert "no time left" in (tmp_path / "summary.json").read_text()
    assert started.exists()
    time.sleep(max(0, started.stat().st_mtime + 3.5 - time.time()))
    assert not survived.exists(), "a surviving child would share the GPU with the next step"


def test_gpu_steps_are_valid_commands_with_separate_result_files(tmp_path, monkeypatch):
    parsed = []
    monkeypatch.setattr(command_line, "_run", lambda options: parsed.append(options) or 0)
    monkeypatch.setattr(shutil, "which", lambda program: program)
    steps = gpu.steps(tmp_path)
    assert any("compute-sanitizer" in step.command for step in steps)
    for step in steps:
        assert all((ROOT / argument).exists() for argument in step.command if argument.startswith("tests"))
        if "bench" in step.command:
            monkeypatch.setattr(sys, "argv", step.command[step.command.index("bench") :])
            with pytest.raises(SystemExit, match="0"):
                command_line.main()
    names = ["steps", "parity", "model", "tune", "kernels", "turboctc", "accelerated", "serving"]
    assert [step.name for step in steps][:8] == names, "the most informative first"
    assert [options.command for options in parsed] == ["model", "model", "tune", "kernels", "model", "model", "model", "kernels"]
    timed, whole, tuned, quick, turboctc, accelerated, serving, compiled = parsed
    assert timed.device == whole.device == accelerated.device == serving.device == "cuda"
    assert timed.part == ["steps"] and whole.part is None and accelerated.part == ["accelerated"] and serving.part == ["serving"]
    assert turboctc.part == ["turboctc"] and turboctc.device == "cuda" and turboctc.out == tmp_path
    assert timed.out == whole.out == accelerated.out == serving.out == quick.out == tmp_path
    assert tuned.out == tmp_path and tuned.seconds < steps[3].seconds and tuned.dtype == "bfloat16"
    assert quick.no_compiled and not compiled.no_compiled and quick.out != compiled.out
    assert set(compiled.operation) <= set(OPERATIONS)


def test_recordings_of_people_may_be_wav_or_raw_files(monkeypatch, tmp_path):
    """Replaces their recordings by synthetic ones: a file with a header, one without, and one with another text than the expected one."""
    spoken = sorted(sentences(), key=lambda utterance: len(utterance.text.split()))[:3]
    files = {SPEECH / spoken[0].audio: spoken[0].text, tmp_path / "headless.raw": spoken[1].text, SPEECH / spoken[2].audio: "zero"}
    samples, rate = soundfile.read(SPEECH / spoken[1].audio)
    soundfile.write(tmp_path / "headless.raw", samples, rate, subtype="PCM_16", format="RAW")
    monkeypatch.setattr(people, "RECORDINGS", files)
    (tmp_path / "copies").mkdir()
    measured = people.measure(*load(), tmp_path / "copies")
    assert measured["recordings"] == 3 and measured["misheard"] == [("zero", spoken[2].text)] and measured["wer"] == 0.3333
    assert f'"zero" as "{spoken[2].text}"' in people.sentence(measured)


def test_missing_recordings_of_people_raise(monkeypatch, tmp_path):
    monkeypatch.setattr(people, "RECORDINGS", {tmp_path / "none.wav": "one"})
    with pytest.raises(MissingDependencyError, match="apt-get install"):
        people.measure(*load(), tmp_path)
