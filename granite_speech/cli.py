"""The command `granite-speech`: text to standard output, everything else to standard error."""

import argparse
import sys
from collections.abc import Sequence

from granite_speech import __version__
from granite_speech.errors import GraniteSpeechError

__all__ = ["main"]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="granite-speech", description="IBM's Granite Speech: speech in, text out.")
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = parser.add_subparsers(dest="command", required=True)
    transcribe = commands.add_parser(
        "transcribe",
        help="write down what is said in sound files",
        description="Write down what is said in sound files, one line each.",
        epilog="Exit status: 0 all files were transcribed, 1 some were not, 2 nothing could be done (usage, model).",
    )
    transcribe.add_argument("audio", nargs="+", metavar="AUDIO", help="a sound file of any common format, or - for standard input")
    transcribe.add_argument("--model", required=True, metavar="FOLDER_OR_ID", help="a checkpoint's folder, or its id on the hub")
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
    return parser


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
    return {"transcribe": _transcribe, "verify": _verify}[options.command](options)


# Imported in the commands: torch takes seconds, and --help and a mistyped option should not wait for it.


def _transcribe(options: argparse.Namespace) -> int:
    from granite_speech.transcriber import Transcriber

    try:
        transcriber = Transcriber.from_pretrained(options.model, device=options.device, dtype=options.dtype)
    except GraniteSpeechError as error:
        print(f"granite-speech: {error}", file=sys.stderr)
        return 2
    failed = False
    for audio in options.audio:
        try:
            print(transcriber.transcribe(audio, options.prompt, options.max_new_tokens), flush=True)
        except GraniteSpeechError as error:
            failed = True
            print(f"granite-speech: {audio}: {error}", file=sys.stderr)
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


if __name__ == "__main__":
    sys.exit(main())
