"""The command `granite-speech`. Text goes to standard output, and everything else to standard error."""

import argparse
import os
import sys
from collections.abc import Sequence
from dataclasses import fields

from granite_speech.command_line.options import parse_download, parse_transcription
from granite_speech.command_line.output import OutputClosedError, flush_streams, message, open_missing_streams, write_line
from granite_speech.errors import GraniteSpeechError
from granite_speech.training.options import FinetuneOptions

__all__ = ["command", "main"]

# The exit status of a program that SIGINT ends, as shells show it.
_INTERRUPTED = 130
_OUTPUT_CLOSED = 1


def _parse_verify(arguments: Sequence[str]) -> argparse.Namespace:
    verify = argparse.ArgumentParser(
        prog="granite-speech verify",
        description="Run the bundled recording through this package and through transformers, in float32 and in the checkpoint's "
        "dtype, and compare every stage. Only one model is in memory at a time. Needs transformers, peft and torchaudio.",
        epilog="Exit status: 0 all stages agree, 1 at least one does not (the first is named), 2 the comparison failed.",
    )
    verify.add_argument("model", metavar="FOLDER_OR_ID", help="a checkpoint's folder or hub id")
    verify.add_argument("--device", help="cpu, cuda, cuda:1 … (default: cuda if available)")
    return verify.parse_args(arguments)


def _parse_finetune(arguments: Sequence[str]) -> argparse.Namespace:
    """Options of the loop, their checks and their help come from `FinetuneOptions`."""
    finetune = argparse.ArgumentParser(
        prog="granite-speech finetune",
        description="Tune a checkpoint on a manifest: JSON lines with audio (a path, relative to the manifest), text and an "
        'optional prompt, such as {"audio": "one.wav", "text": "turn left"}. A CTC model takes no prompts.',
        epilog="On several GPUs: torchrun --nproc-per-node 4 -m granite_speech.cli finetune … --accumulate 4. "
        "Exit status: 0 the folder was written, 2 it was not (usage, manifest, model), 130 interrupted.",
    )
    finetune.add_argument("manifest", metavar="MANIFEST", help="the recordings to train on")
    finetune.add_argument("--model", required=True, metavar="FOLDER_OR_ID", help="a checkpoint's folder or hub id")
    finetune.add_argument("--output", required=True, metavar="DIR", help="the checkpoint folder to write")
    finetune.add_argument("--validation", metavar="MANIFEST", help="recordings to measure the word error rate on, before and after")
    finetune.add_argument("--resume", action="store_true", help="resume from the training checkpoint in DIR, or start if it has none")
    finetune.add_argument("--device", help="cpu, cuda, cuda:1 … (default: cuda if available; under torchrun, one GPU per process)")
    for one in fields(FinetuneOptions):
        several = one.metadata["kind"] is tuple
        shown = ",".join(one.default) if isinstance(one.default, tuple) else one.default
        finetune.add_argument(
            "--" + one.name.replace("_", "-"),
            type=(lambda text: tuple(text.split(","))) if several else one.metadata["kind"],
            default=one.default,
            metavar="NAMES" if several else one.metadata["kind"].__name__.upper(),
            help=one.metadata["help"] + ("" if shown is None else f" (default: {shown})"),
        )
    return finetune.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line. Returns the exit status."""
    try:
        return _run(list(sys.argv[1:] if arguments is None else arguments))
    except OutputClosedError:
        return _OUTPUT_CLOSED


def command() -> None:
    """Run the command line and end the process."""
    open_missing_streams()
    try:
        status = _run(sys.argv[1:])
        ends_at_once = status == _INTERRUPTED
    except OutputClosedError:
        status, ends_at_once = _OUTPUT_CLOSED, True
    except SystemExit as usage:
        status, ends_at_once = usage.code, False
    out_is_open, err_is_open = flush_streams()
    status = status or (0 if out_is_open else _OUTPUT_CLOSED)
    if ends_at_once or not out_is_open or not err_is_open:
        # Python would first wait for threads that read a file or run the model, and fail if one of them has standard input; and it
        # would try again to write what is buffered, and complain.
        os._exit(status)
    sys.exit(status)


def _run(given: list[str]) -> int:
    name, rest = (given[0], given[1:]) if given and given[0] in _COMMANDS else ("transcribe", given)
    parse, run = _COMMANDS[name]
    options = parse(rest)
    try:
        return run(options)
    except KeyboardInterrupt:
        return _INTERRUPTED
    except GraniteSpeechError as error:
        if name != "finetune" or _is_first_process():
            message(error)
        return 2


def _is_first_process() -> bool:
    """torchrun's processes all end the same way, so only the first reports."""
    return os.environ.get("RANK", "0") == "0"


# Each command has its own imports, because torch takes seconds to import, and --help and usage errors need not wait for it.


def _transcribe(options: argparse.Namespace) -> int:
    from granite_speech.command_line.transcribe import transcribe

    return transcribe(options)


def _download(options: argparse.Namespace) -> int:
    from granite_speech.checkpoints.hub import resolve

    if options.ignored:
        message(f"{', '.join(options.ignored)} ignored: llama.cpp is not used")
    settings = {name: getattr(options, name) for name in ("cache_dir", "revision", "local_files_only")}
    write_line(str(resolve(options.model, **settings)))
    return 0


def _verify(options: argparse.Namespace) -> int:
    from granite_speech.verify import report, verify

    comparisons = verify(options.model, device=options.device)
    write_line(report(comparisons))
    return 1 if any(one.first_miss for one in comparisons) else 0


def _finetune(options: argparse.Namespace) -> int:
    from granite_speech.training import finetune

    chosen = FinetuneOptions(**{one.name: getattr(options, one.name) for one in fields(FinetuneOptions)})
    others = {name: getattr(options, name) for name in ("validation", "resume", "device")}
    try:
        report = finetune(options.manifest, options.model, options.output, chosen, **others)
    except KeyboardInterrupt:
        if _is_first_process():
            message("interrupted; the same command with --resume continues from the last checkpoint")
        return _INTERRUPTED
    if _is_first_process():
        write_line(str(report))
    return 0


_COMMANDS = {
    "transcribe": (parse_transcription, _transcribe),
    "verify": (_parse_verify, _verify),
    "finetune": (_parse_finetune, _finetune),
    "download": (parse_download, _download),
}


if __name__ == "__main__":
    command()
