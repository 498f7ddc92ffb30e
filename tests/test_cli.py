"""The command line on real models: text on standard output, messages on standard error, and exit codes for scripts."""

import io
import json
import os
import signal
import statistics
import subprocess
import sys
import threading
import time
import types
import wave

import pytest
from granite_kernels.cpu import has_bfloat16

from granite_speech import Engine, Transcriber, __version__, load_audio
from granite_speech.cli import main
from granite_speech.transcription import transcriber
from granite_speech.transcription.transcript import Segment
from tests.support.paths import ROOT
from tests.support.random_checkpoint import write_checkpoint
from tests.support.sound_headers import wav_header
from tests.support.spoken import SPEECH, sentences

JFK = ROOT / "granite_speech" / "assets" / "jfk.flac"
TEXTS = [one.text for one in sentences()]
FILES = [SPEECH / one.audio for one in sentences()]
ENVIRONMENT = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")])}


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """Random weights. Every seventh token ends an answer, because otherwise no answer would end."""
    folder = tmp_path_factory.mktemp("checkpoint")
    ends = range(0, write_checkpoint(folder).config.text_config.vocab_size, 7)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": list(ends)}))
    return folder


@pytest.fixture(scope="session")
def spoken(tmp_path_factory):
    """The first second of the recording as a WAV."""
    import soundfile

    samples, rate = soundfile.read(JFK, dtype="int16", frames=16_000)
    path = tmp_path_factory.mktemp("sound") / "one second.wav"
    with wave.open(str(path), "wb") as file:
        file.setparams((1, 2, rate, 0, "NONE", ""))
        file.writeframes(samples.tobytes())
    return path


FASTEST = "bfloat16" if has_bfloat16() else "float32"


def first_line(model="embedded", dtype=FASTEST):
    return f"granite-speech: {model}, {dtype} on cpu, 1 thread\n"


def run(capfd, checkpoint, *arguments):
    """The exit status, standard output, and standard error without its first line, which says what runs."""
    status = main(["transcribe", "--model", str(checkpoint), "--max-new-tokens", "64", *map(str, arguments)])
    out, err = capfd.readouterr()
    return status, out, err.removeprefix(first_line(checkpoint))


def test_standard_output_has_only_the_text(checkpoint, capfd):
    status, out, err = run(capfd, checkpoint, JFK)
    assert status == 0 and err == ""
    assert out.endswith("\n") and out.strip() and out.count("\n") == 1
    assert run(capfd, checkpoint, JFK) == (0, out, ""), "the same file gives the same text"


def test_options_reach_the_model(checkpoint, capfd, spoken):
    _, out, _ = run(capfd, checkpoint, spoken)
    assert run(capfd, checkpoint, spoken, "--prompt", "translate the speech to German.")[1] != out
    assert run(capfd, checkpoint, spoken, "--device", "cpu", "--dtype", "fastest")[1] == out
    _, shorter, _ = run(capfd, checkpoint, spoken, "--max-new-tokens", "2")
    assert out.startswith(shorter.strip()) and len(shorter) < len(out)


def test_an_answer_that_is_cut_off_is_printed_with_a_warning(checkpoint, capfd, spoken):
    _, whole, _ = run(capfd, checkpoint, spoken)
    status, out, err = run(capfd, checkpoint, spoken, JFK, spoken, "--max-new-tokens", "2")
    entries = [entry.splitlines() for entry in out.split("\n\n")]
    assert [name for name, _ in entries] == [f"{spoken}:", f"{JFK}:", f"{spoken}:"]
    first, _, last = (text for _, text in entries)
    assert status == 1 and first == last and whole.startswith(first)
    lines = err.splitlines()
    assert [line.split(": ")[1] for line in lines] == [str(spoken), str(JFK), str(spoken)], "each file has its own warning"
    assert all("cut off after 2 tokens" in line and line.endswith("Raise max_new_tokens.") for line in lines)


def test_a_misspelled_kernel_setting_gives_a_one_line_error(checkpoint, capfd, monkeypatch):
    monkeypatch.setenv("GRANITE_SPEECH_KERNELS", "tritn")
    status, out, err = run(capfd, checkpoint, JFK, "--device", "cpu")
    assert (status, out) == (2, "")
    assert err.count("\n") == 1 and "one of 'triton', 'torch'" in err and "GRANITE_SPEECH_KERNELS=tritn" in err, err


def test_the_module_runs_as_a_command_and_refuses_kernels_that_cannot_run(checkpoint, tmp_path):
    command = [sys.executable, "-m", "granite_speech.cli", "transcribe", str(JFK), "--model", str(checkpoint), "--device", "cpu"]
    environment = {name: one for name, one in ENVIRONMENT.items() if name != "TRITON_INTERPRET"} | {"GRANITE_SPEECH_KERNELS": "triton"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("granite-speech: ") and done.stderr.count("\n") == 1, done.stderr
    assert "CUDA tensors" in done.stderr and "GRANITE_SPEECH_KERNELS=triton" in done.stderr, done.stderr


def test_audio_from_standard_input(checkpoint, capfd, monkeypatch):
    _, out, _ = run(capfd, checkpoint, JFK)
    monkeypatch.setattr(sys, "stdin", types.SimpleNamespace(buffer=io.BytesIO(JFK.read_bytes())))
    assert run(capfd, checkpoint, "-") == (0, out, "")


def test_bad_files_do_not_stop_the_others(checkpoint, capfd, spoken, tmp_path):
    (tmp_path / "text.wav").write_text("this is no sound")
    _, alone, _ = run(capfd, checkpoint, spoken)
    status, out, err = run(capfd, checkpoint, spoken, tmp_path / "text.wav", tmp_path / "absent.wav", tmp_path, spoken)
    assert status == 1
    first, *failed, last = out.split("\n\n")
    assert f"{first}\n" == last == f"{spoken}:\n{alone}"
    assert [entry.split("\n", 1)[0] for entry in failed] == [f"{tmp_path}/text.wav:", f"{tmp_path}/absent.wav:", f"{tmp_path}:"]
    assert all(entry.split("\n", 1)[1].startswith("[failed: ") for entry in failed)
    lines = err.splitlines()
    assert len(lines) == 3 and all(line.startswith(f"granite-speech: {tmp_path}") for line in lines)
    assert "text.wav" in lines[0] and "which does not exist" in lines[1] and "which is a folder" in lines[2]


def test_the_first_line_says_what_runs_and_quiet_leaves_it_out(checkpoint, capfd, spoken):
    for dtype in ("float32", "bfloat16", "torch.float32"):
        assert main([str(spoken), "--model", str(checkpoint), "--max-new-tokens", "2", "--dtype", dtype]) == 1
        assert capfd.readouterr().err.startswith(first_line(checkpoint, dtype.removeprefix("torch.")))
    assert main([str(spoken), "--model", str(checkpoint), "--dtype", "auto"]) == 0
    assert capfd.readouterr().err == first_line(checkpoint, "float32"), "the checkpoint's"
    assert main([str(spoken), "--model", str(checkpoint), "--quiet", "--quantize", "int8"]) == 0
    assert capfd.readouterr().err == ""
    assert main([str(spoken), "--dtype", "float32", "--quantize", "int8"]) == 0
    first, second = capfd.readouterr().err.splitlines()
    assert first == "granite-speech: embedded, float32 and int8 on cpu, 1 thread" and "no --model given" in second


# --- several files at once --------------------------------------------------------------------------------------------------------


def start(*arguments, script=("-m", "granite_speech.cli"), **options) -> subprocess.Popen:
    """The command on the bundled model, as a process of its own, which is killed after a minute."""
    command = [sys.executable, *script, "transcribe", "--model", "embedded", *map(str, arguments)]
    environment = {name: one for name, one in ENVIRONMENT.items() if name != "PYTHONUNBUFFERED"}
    process = subprocess.Popen(command, env=environment, text=True, bufsize=1, stdout=subprocess.PIPE, **options)
    watch = threading.Timer(60, process.kill)
    watch.daemon = True
    watch.start()
    return process


def test_files_are_transcribed_together_and_printed_in_order(monkeypatch, capfd):
    made = []

    def make(*arguments) -> Engine:
        made.append(Engine(*arguments))
        return made[-1]

    monkeypatch.setattr(transcriber, "Engine", make)
    assert main(["transcribe", "--model", "embedded", *map(str, FILES)]) == 0
    assert capfd.readouterr() == ("\n".join(f"{file}:\n{text}\n" for file, text in zip(FILES, TEXTS, strict=True)), first_line())
    [engine] = made
    assert engine.counters().submitted == len(FILES)
    assert engine.counters().rows > 2 * engine.counters().steps, "more than two answers went on at once"


def test_messages_come_in_order_with_the_lines(tmp_path):
    samples = (load_audio(FILES[2]) * 32768).short().numpy().tobytes()
    unfinished = bytearray(wav_header(data=samples, claimed=0))
    unfinished[4:8] = bytes(4)
    (tmp_path / "unfinished.wav").write_bytes(unfinished)
    names = [FILES[0], "nowhere.wav", FILES[1], tmp_path / "unfinished.wav", tmp_path, FILES[3]]
    process = start(*names, stderr=subprocess.STDOUT)
    assert process.stdout.readline() == first_line()
    entries = [entry.splitlines() for entry in process.communicate(timeout=120)[0].split("\n\n")]
    assert [entry[0] for entry in entries] == [f"{name}:" for name in names]
    assert [entries[place][1] for place in (0, 2, 3, 5)] == TEXTS[:4]
    for place, reason in ((1, "which does not exist"), (3, "never filled in"), (4, "which is a folder")):
        assert entries[place][-1].startswith(f"granite-speech: {names[place]}: ") and reason in entries[place][-1]
    assert process.returncode == 1


def test_a_header_that_was_never_filled_in_is_no_failure(tmp_path, capfd):
    content = bytearray(wav_header(data=bytes(32_000), claimed=0))
    content[4:8] = bytes(4)
    (tmp_path / "unfinished.wav").write_bytes(content)
    assert main(["transcribe", "--model", "embedded", str(tmp_path / "unfinished.wav")]) == 0
    assert "never filled in" in capfd.readouterr().err


def test_a_line_does_not_wait_for_the_files_after_it():
    with start(FILES[0], "-", FILES[2], stdin=subprocess.PIPE) as process:
        assert [process.stdout.readline() for _ in range(2)] == [f"{FILES[0]}:\n", f"{TEXTS[0]}\n"]  # its standard input is still empty
        process.stdin.buffer.write(FILES[1].read_bytes())
        process.stdin.close()
        assert process.stdout.read() == f"\n-:\n{TEXTS[1]}\n\n{FILES[2]}:\n{TEXTS[2]}\n"
    assert process.returncode == 0


def interrupt(process: subprocess.Popen) -> tuple[str, str]:
    """Press Ctrl-C. What the process still writes; it has to end at once."""
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=10)
    assert process.returncode == 130
    return out, err


def test_an_interrupt_ends_a_process_that_waits_for_a_file():
    process = start(FILES[0], "-", stdin=subprocess.PIPE, stderr=subprocess.PIPE)
    assert [process.stdout.readline() for _ in range(2)] == [f"{FILES[0]}:\n", f"{TEXTS[0]}\n"]
    assert interrupt(process) == ("", first_line())


COMPUTING = """
import sys, time
from granite_speech.cli import command
from granite_speech.engine.worker import Worker
def turn(worker):
    print("computing", flush=True)
    time.sleep(60)
Worker.turn = turn
command()
"""


def test_an_interrupt_does_not_wait_for_the_model():
    process = start(FILES[0], script=("-c", COMPUTING), stderr=subprocess.PIPE)
    assert process.stdout.readline() == "computing\n"
    assert interrupt(process) == ("", first_line())


def test_lines_before_an_interrupt_are_printed(monkeypatch, capfd):
    def stream_segments(*_, **__):
        yield 0, Segment(0, 0.0, 1.0, "ready")
        raise KeyboardInterrupt

    monkeypatch.setattr(Transcriber, "stream_segments", stream_segments)
    assert main(["transcribe", "--model", "embedded", "one.wav"]) == 130
    assert capfd.readouterr() == ("ready\n", first_line())


# --- what cannot be done ----------------------------------------------------------------------------------------------------------


def test_a_single_missing_file_is_an_error(checkpoint, capfd, tmp_path):
    status, out, err = run(capfd, checkpoint, tmp_path / "absent.wav")
    assert (status, out) == (1, "") and "Traceback" not in err


@pytest.mark.parametrize("name", ["nowhere", "an empty folder", "a file"])
def test_a_missing_model_gives_a_one_line_error(capfd, tmp_path, name):
    (tmp_path / "an empty folder").mkdir()
    (tmp_path / "a file").write_text("x")
    status, out, err = run(capfd, tmp_path / name, JFK)
    assert (status, out) == (2, "")
    assert err.startswith("granite-speech: ") and err.count("\n") == 1 and str(tmp_path) in err


def test_an_unknown_device_gives_a_one_line_error(checkpoint, capfd):
    status, out, err = run(capfd, checkpoint, JFK, "--device", "abacus")
    assert (status, out) == (2, "") and "'abacus'" in err and err.count("\n") == 1


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["transcribe", "a.wav", "--model", "m", "--max-new-tokens", "0"], "'0' is not a positive integer"),
        (["transcribe", "a.wav", "--model", "m", "--max-new-tokens=-3"], "'-3' is not a positive integer"),
        (["transcribe", "a.wav", "--model", "m", "--max-new-tokens", "many"], "'many' is not a positive integer"),
        (["transcribe", "a.wav", "--model", "m", "--max-new-tokens", "1.5"], "'1.5' is not a positive integer"),
        (["transcribe", "a.wav", "--model", "m", "--dtype", "int8"], "int8"),
        (["transcribe", "--model", "m"], "FILE"),
        (["verify"], "FOLDER_OR_ID"),
        (["download"], "FOLDER_OR_ID"),
        ([], "FILE"),
    ],
)
def test_usage_errors(capfd, arguments, message):
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    out, err = capfd.readouterr()
    assert caught.value.code == 2 and out == ""
    assert message in err.splitlines()[-1]


def test_the_help_shows_the_options_of_transcription_and_names_the_other_commands(capfd, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit):
        main(["--help"])
    out = capfd.readouterr().out
    for part in ("what to write:", "--output-format", "--resume", "--keywords", "the model:", "windows:", "verify", "finetune", "download"):
        assert part in out
    assert max(map(len, out.splitlines())) <= 80


def test_the_version(capfd):
    with pytest.raises(SystemExit) as caught:
        main(["--version"])
    assert caught.value.code == 0 and capfd.readouterr().out == f"granite-speech {__version__}\n"


WITHOUT_TORCH = """
import sys
from granite_speech.cli import main
try:
    main(sys.argv[1:])
except SystemExit as exit:
    heavy = {"torch", "numpy", "soundfile", "transformers"} & set(sys.modules)
    print("imported", sorted(heavy), file=sys.stderr)
    raise
"""


@pytest.mark.parametrize(
    "arguments, status",
    [
        (["--help"], 0),
        (["transcribe", "--help"], 0),
        (["finetune", "--help"], 0),
        (["download", "--help"], 0),
        (["--max-new-tokens", "x"], 2),
    ],
)
def test_help_and_usage_errors_do_not_import_torch(arguments, status):
    command = [sys.executable, "-c", WITHOUT_TORCH, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT, check=False)
    assert done.returncode == status
    assert done.stderr.splitlines()[-1] == "imported []"
    assert ("usage: granite-speech" in done.stdout) == (status == 0)


@pytest.mark.parametrize(
    "arguments, seconds", [(["-c", "import granite_speech"], 0.3), (["-m", "granite_speech.cli", "--help"], 0.5)], ids=["import", "--help"]
)
def test_import_and_help_are_fast(arguments, seconds):
    """The median of five runs, including Python's own start, at up to three times the limit because the machine may be busy."""

    def run_once() -> float:
        started = time.perf_counter()
        subprocess.run([sys.executable, *arguments], capture_output=True, env=ENVIRONMENT, check=True)
        return time.perf_counter() - started

    assert statistics.median(run_once() for _ in range(5)) < 3 * seconds
