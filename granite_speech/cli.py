"""The command `granite-speech`: text to standard output, everything else to standard error."""

import argparse
import os
import sys
import warnings
from collections.abc import Sequence
from dataclasses import fields

from granite_speech import __version__
from granite_speech.errors import GraniteSpeechError
from granite_speech.training.options import FinetuneOptions

__all__ = ["main"]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="granite-speech", description="IBM's Granite Speech: speech in, text out.")
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = parser.add_subparsers(dest="command", required=True)
    transcribe = commands.add_parser(
        "transcribe",
        help="write down what is said in sound files",
        description="Write down what is said in sound files, one line each.",
        epilog="Exit status: 0 all files were transcribed, 1 some were not or were cut off, 2 nothing could be done (usage, model).",
    )
    transcribe.add_argument("audio", nargs="+", metavar="AUDIO", help="a sound file of any common format, or - for standard input")
    transcribe.add_argument(
        "--model",
        metavar="FOLDER_OR_ID",
        help="a checkpoint's folder, or its id on the hub (default: the small model inside the package, which knows 70 words)",
    )
    transcribe.add_argument("--prompt", help="what to ask of the speech (default: the release's own request for a transcript)")
    transcribe.add_argument("--max-new-tokens", type=_positive, default=400, metavar="N", help="the answer's length at most (default: 400)")
    transcribe.add_argument("--device", help="cpu, cuda, cuda:1 … (default: cuda where there is one)")
    transcribe.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="of the weights (default: the checkpoint's)")
    verify = commands.add_parser(
        "verify",
        help="compare a checkpoint with transformers, stage by stage",
        description="Run the bundled recording through this package and through transformers, in float32 and in the checkpoint's "
        "dtype, and compare every stage. One of the two models is in memory at a time. Needs transformers, peft and torchaudio.",
        epilog="Exit status: 0 all stages agree, 1 one does not (the first is named), 2 the comparison could not be made.",
    )
    verify.add_argument("model", metavar="FOLDER_OR_ID", help="a checkpoint's folder, or its id on the hub")
    verify.add_argument("--device", help="cpu, cuda, cuda:1 … (default: cuda where there is one)")
    _add_finetune(commands)
    return parser


def _add_finetune(commands: argparse._SubParsersAction) -> None:
    """The options of the loop are those of `FinetuneOptions`, which checks them and says what they mean."""
    finetune = commands.add_parser(
        "finetune",
        help="tune a checkpoint on your own recordings",
        description="Tune a checkpoint on a manifest: JSON lines with audio (a path, relative to the manifest), text and, where "
        'wanted, prompt, such as {"audio": "one.wav", "text": "turn left"}.',
        epilog="On several GPUs: torchrun --nproc-per-node 4 -m granite_speech.cli finetune … --accumulate 4. "
        "Exit status: 0 the folder is written, 2 nothing came of it (usage, manifest, model), 130 interrupted.",
    )
    finetune.add_argument("manifest", metavar="MANIFEST", help="the recordings to train on")
    finetune.add_argument("--model", required=True, metavar="FOLDER_OR_ID", help="a checkpoint's folder, or its id on the hub")
    finetune.add_argument("--output", required=True, metavar="DIR", help="the folder to write, a checkpoint like the model's")
    finetune.add_argument("--validation", metavar="MANIFEST", help="recordings whose word error rate is taken before and after")
    finetune.add_argument("--resume", action="store_true", help="resume from the last checkpoint in DIR, or begin if there is none")
    finetune.add_argument("--device", help="cpu, cuda, cuda:1 … (default: cuda if available; under torchrun, a GPU for each process)")
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
    """Run the command line; returns the exit status."""
    options = _parser().parse_args(arguments)
    return {"transcribe": _transcribe, "verify": _verify, "finetune": _finetune}[options.command](options)


# Imported in the commands: torch takes seconds, and --help and a mistyped option should not wait for it.


def _transcribe(options: argparse.Namespace) -> int:
    from granite_speech.checkpoints.hub import EMBEDDED_FOLDER
    from granite_speech.transcription.transcriber import Transcriber, TruncatedAnswerWarning

    if options.model is None:
        print(
            "granite-speech: no --model given: the small one inside the package listens, which knows 70 English words: digits, numbers, "
            "commands. For any speech: --model ibm-granite/granite-speech-3.3-2b",
            file=sys.stderr,
        )
    try:
        transcriber = Transcriber.from_pretrained(options.model or EMBEDDED_FOLDER, device=options.device, dtype=options.dtype)
    except GraniteSpeechError as error:
        print(f"granite-speech: {error}", file=sys.stderr)
        return 2
    failed = False
    for audio in options.audio:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", TruncatedAnswerWarning)
            try:
                print(transcriber.transcribe(audio, options.prompt, options.max_new_tokens), flush=True)
            except GraniteSpeechError as error:
                failed = True
                print(f"granite-speech: {audio}: {error}", file=sys.stderr)
        for warning in caught:
            failed |= issubclass(warning.category, TruncatedAnswerWarning)
            print(f"granite-speech: {audio}: {warning.message}", file=sys.stderr)
    return 1 if failed else 0


def _verify(options: argparse.Namespace) -> int:
    from granite_speech.verify import report, verify

    try:
        comparisons = verify(options.model, device=options.device)
    except GraniteSpeechError as error:
        print(f"granite-speech: {error}", file=sys.stderr)
        return 2
    print(report(comparisons))
    return 1 if any(one.first_miss for one in comparisons) else 0


def _finetune(options: argparse.Namespace) -> int:
    from granite_speech.training import finetune

    reports = os.environ.get("RANK", "0") == "0"  # of torchrun's processes, which all end in the same way
    places = {name: getattr(options, name) for name in ("validation", "resume", "device")}
    try:
        chosen = FinetuneOptions(**{one.name: getattr(options, one.name) for one in fields(FinetuneOptions)})
        report = finetune(options.manifest, options.model, options.output, chosen, **places)
    except GraniteSpeechError as error:
        if reports:
            print(f"granite-speech: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        if reports:
            print("granite-speech: interrupted; the same command with --resume goes on from the last checkpoint", file=sys.stderr)
        return 130
    if reports:
        print(report)
    return 0


if __name__ == "__main__":
    sys.exit(main())
