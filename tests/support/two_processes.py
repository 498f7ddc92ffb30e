"""The program that tests/training/test_processes.py starts in two processes. Each prints its results as one line of JSON.

First `finetune` makes its own process group, then the caller does. Arguments: the manifest and model to tune; a folder for `make_trainer`;
and an empty folder for outputs.
"""

import contextlib
import io
import json
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from granite_speech.cli import main
from granite_speech.errors import AudioError, GraniteSpeechError
from granite_speech.training import FinetuneOptions, finetune
from granite_speech.training.processes import gather, process_group, rank
from tests.support.tiny_speech import make_trainer

OPTIONS = FinetuneOptions(train=("all",), steps=3, learning_rate=1e-3, batch_seconds=0.8, accumulate=2, checkpoint_every=2)
FAILURES = {  # the process that fails, and the function that raises
    "reading": (1, "granite_speech.training.finetuning.read_manifest"),
    "loading": (1, "granite_speech.training.data.SpeechData.load"),
    "validating": (0, "granite_speech.training.finetuning.transcripts"),
    "writing": (0, "granite_speech.training.state.TrainingFolder.write"),
}


def join_repeatedly() -> list[list]:
    """What the processes gather in four groups, one after another. Each process is late once or more."""
    gathered = []
    for number in range(4):
        with process_group("cpu"):
            gathered.append(gather([number, rank()]))
            late = rank() == number % 2
        time.sleep(0.3 * late)
    return gathered


def tune(manifest: str, model: str, output: Path) -> dict:
    """Tune, then again into the same folder, which must be refused, then resume."""
    report = finetune(manifest, model, output, OPTIONS, validation=manifest, progress=False)
    try:
        finetune(manifest, model, output, OPTIONS, progress=False)
        refused = "not refused"
    except GraniteSpeechError as error:
        refused = error.got
    resumed = finetune(manifest, model, output, OPTIONS, validation=manifest, resume=True, progress=False)
    return {"report": str(report), "refused": refused, "resumed": resumed == report, "group remains": dist.is_initialized()}


def tune_with_failure(place: str, manifest: str, model: str, output: Path) -> str:
    def fail(*arguments, **named):
        raise AudioError(got="a broken file", expected="sound", remedy="Record it again")

    failing, target = FAILURES[place]
    options = FinetuneOptions(steps=2, batch_seconds=0.8, accumulate=2)
    with pytest.MonkeyPatch.context() as patch:
        if dist.get_rank() == failing:
            patch.setattr(target, fail)
        try:
            finetune(manifest, model, output, options, validation=manifest, progress=False)
        except GraniteSpeechError as error:
            return f"{type(error).__name__} {error.got}"
    return "no error"


def run_command(*arguments: str) -> tuple[int, str, str]:
    """(exit status, standard output, standard error) of the command line."""
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
        status = main(["finetune", *arguments])
    return status, out.getvalue(), err.getvalue()


def train(folder: Path, output: Path, seconds: float | None = None) -> list[dict]:
    """The log after training in both processes, or resuming."""
    trainer = make_trainer(folder, output, accumulate=2)
    trainer.resume()
    trainer.run(seconds=seconds)
    return [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]


def in_group_of_finetune(manifest: str, model: str, command: list[str], output: Path) -> dict:
    results = {"joined": join_repeatedly(), "tuned": tune(manifest, model, output / "tuned")}
    return results | {"command": run_command(*command, str(output / "command"), "--accumulate", "2")}


def in_callers_group(manifest: str, model: str, command: list[str], folder: Path, output: Path) -> dict:
    results = {"tuned": tune(manifest, model, output / "tuned")}
    results["failures"] = {place: tune_with_failure(place, manifest, model, output / place) for place in FAILURES}
    results["taken"] = run_command(*command, str(output / "tuned"), "--accumulate", "2")
    results["uneven"] = run_command(*command, str(output / "tuned"), "--resume")
    results["trained"] = train(folder, output / "trained")
    results["stopped"], results["continued"] = train(folder, output / "pieces", seconds=0), train(folder, output / "pieces")
    return results


def main_of_each_process(manifest: str, model: str, folder: Path, output: Path) -> dict:
    command = [manifest, "--model", model, "--batch-seconds", "0.8", "--steps", "2", "--output"]
    results = {"finetune": in_group_of_finetune(manifest, model, command, output / "finetune")}
    dist.init_process_group("gloo")
    results["caller"] = in_callers_group(manifest, model, command, folder, output / "caller")
    dist.barrier()
    dist.destroy_process_group()
    return results


if __name__ == "__main__":
    torch.set_num_threads(1)
    manifest, model, folder, output = sys.argv[1:]
    print(json.dumps(main_of_each_process(manifest, model, Path(folder), Path(output))), flush=True)
