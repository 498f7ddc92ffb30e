"""The command `granite-speech`. Text goes to standard output, and everything else to standard error."""

import argparse
import os
import sys
from collections.abc import Sequence
from dataclasses import fields

from granite_speech import __version__
from granite_speech.errors import GraniteSpeechError
from granite_speech.training.options import FinetuneOptions

__all__ = ["command", "main"]

# The exit status of a program that SIGINT ends, as shells show it.
_INTERRUPTED = 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="granite-speech", description="IBM's Granite Speech: speech in, text out.")
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    parser.set_defaults(quiet=False)
    commands = parser.add_subparsers(dest="command", required=True)
    _add_transcribe(commands)
    _add_verify(commands)
    _add_finetune(commands)
    return parser


def _add_transcribe(commands: argparse._SubParsersAction) -> None:
    transcribe = commands.add_parser(
        "transcribe",
        help="transcribe sound files",
        description="Transcribe sound files together, one line each, in their order.",
        epilog="Exit status: 0 all files were transcribed, 1 some failed or were cut off, 2 nothing could be done (usage, model), "
        "130 interrupted.",
    )
    transcribe.set_defaults(run=_transcribe)
    transcribe.add_argument("audio", nargs="+", metavar="AUDIO", help="a sound file in any common format, or - for standard input")
    transcribe.add_argument(
        "--model",
        metavar="FOLDER_OR_ID",
        help="a checkpoint's folder or hub id (default: the small model inside the package, which knows 70 words)",
    )
    transcribe.add_argument("--prompt", help="the request (default: the checkpoint's own transcription request)")
    transcribe.add_argument("--max-new-tokens", type=_positive, default=400, metavar="N", help="most tokens in an answer (default: 400)")
    transcribe.add_argument("--device", help="cpu, cuda, cuda:1 … (default: cuda if available)")
    transcribe.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="dtype of the weights (default: the checkpoint's)")


def _add_verify(commands: argparse._SubParsersAction) -> None:
    verify = commands.add_parser(
        "verify",
        help="compare a checkpoint with transformers, stage by stage",
        description="Run the bundled recording through this package and through transformers, in float32 and in the checkpoint's "
        "dtype, and compare every stage. Only one model is in memory at a time. Needs transformers, peft and torchaudio.",
        epilog="Exit status: 0 all stages agree, 1 at least one does not (the first is named), 2 the comparison failed.",
    )
    verify.set_defaults(run=_verify)
    verify.add_argument("model", metavar="FOLDER_OR_ID", help="a checkpoint's folder or hub id")
    verify.add_argument("--device", help="cpu, cuda, cuda:1 … (default: cuda if available)")


def _add_finetune(commands: argparse._SubParsersAction) -> None:
    """Options of the loop, their checks and their help come from `FinetuneOptions`."""
    finetune = commands.add_parser(
        "finetune",
        help="tune a checkpoint on your own recordings",
        description="Tune a checkpoint on a manifest: JSON lines with audio (a path, relative to the manifest), text and an "
        'optional prompt, such as {"audio": "one.wav", "text": "turn left"}.',
        epilog="On several GPUs: torchrun --nproc-per-node 4 -m granite_speech.cli finetune … --accumulate 4. "
        "Exit status: 0 the folder was written, 2 it was not (usage, manifest, model), 130 interrupted.",
    )
    # torchrun's processes all end the same way, so only the first reports.
    finetune.set_defaults(run=_finetune, quiet=os.environ.get("RANK", "0") != "0")
    finetune.add_argument("manifest", metavar="MANIFEST", help="the recordings to train on")
    finetune.add_argument("--model", required=True, metavar="FOLDER_OR_ID", help="a checkpoint's folder or hub id")
    finetune.add_argument("--output", required=True, metavar="DIR", help="the checkpoint folder to write")
    finetune.add_argument("--validation", metavar="MANIFEST", help="recordings to measure the word error rate on, before and after")
    finetune.add_argument("--resume", action="store_true", help="resume from the training checkpoint in DIR, or start if it has none")
    finetune.add_argument("--device", help="cpu, cuda, cuda:1 … (default: cuda if available; under torchrun, one GPU per process)")
    for one in fields(FinetuneOptions):
        several = isinstance(one.default, tuple)
        shown = ",".join(one.default) if several else one.default
        finetune.add_argument(
            "--" + one.name.replace("_", "-"),
            type=(lambda text: tuple(text.split(","))) if several else one.metadata["kind"],
            default=one.default,
            metavar="NAMES" if several else one.metadata["kind"].__name__.upper(),
            help=one.metadata["help"] + ("" if shown is None else f" (default: {shown})"),
        )


def _positive(text: str) -> int:
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive integer")
    return value


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line. Returns the exit status."""
    options = _parser().parse_args(arguments)
    try:
        return options.run(options)
    except KeyboardInterrupt:
        return _INTERRUPTED
    except GraniteSpeechError as error:
        if not options.quiet:
            _print_error(error)
        return 2


def command() -> None:
    """Run the command line and end the process."""
    status = main()
    if status == _INTERRUPTED:
        # At once: Python would first wait for threads that read a file or run the model, and fail if one of them has standard input.
        sys.stdout.flush()
        os._exit(status)
    sys.exit(status)


def _print_error(message: object) -> None:
    print(f"granite-speech: {message}", file=sys.stderr)


# Each command has its own imports, because torch takes seconds to import, and --help and usage errors need not wait for it.


def _transcribe(options: argparse.Namespace) -> int:
    from granite_speech.checkpoints.hub import EMBEDDED_FOLDER
    from granite_speech.transcription.transcriber import Transcriber

    if options.model is None:
        _print_error(
            "no --model given: using the small model inside the package, which knows only 70 English words: digits, numbers, commands. "
            "For any speech, use --model ibm-granite/granite-speech-3.3-2b"
        )
    transcriber = Transcriber.from_pretrained(options.model or EMBEDDED_FOLDER, device=options.device, dtype=options.dtype)
    failed = False
    for audio, one in zip(options.audio, transcriber.stream(options.audio, options.prompt, options.max_new_tokens), strict=True):
        if one.error is None:
            print(one.text, flush=True)
        for message in (one.error, one.audio_warning, one.truncated):
            if message is not None:
                _print_error(f"{audio}: {message}")
        failed |= one.error is not None or one.truncated is not None
    return 1 if failed else 0


def _verify(options: argparse.Namespace) -> int:
    from granite_speech.verify import report, verify

    comparisons = verify(options.model, device=options.device)
    print(report(comparisons))
    return 1 if any(one.first_miss for one in comparisons) else 0


def _finetune(options: argparse.Namespace) -> int:
    from granite_speech.training import finetune

    chosen = FinetuneOptions(**{one.name: getattr(options, one.name) for one in fields(FinetuneOptions)})
    others = {name: getattr(options, name) for name in ("validation", "resume", "device")}
    try:
        report = finetune(options.manifest, options.model, options.output, chosen, **others)
    except KeyboardInterrupt:
        if not options.quiet:
            _print_error("interrupted; the same command with --resume continues from the last checkpoint")
        return _INTERRUPTED
    if not options.quiet:
        print(report)
    return 0


if __name__ == "__main__":
    command()
