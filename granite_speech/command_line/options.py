"""The options of transcription on the command line: our own, and those of whisper's and of IBM's command."""

import argparse
import textwrap
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from granite_speech import __version__
from granite_speech.command_line.parser import CommandParser, or_none, positive, truth_value
from granite_speech.inputs.prompt_modes import PROMPT_MODES
from granite_speech.transcription.options import SEGMENTATIONS
from granite_speech.transcription.writers import FORMATS

__all__ = ["parse_download", "parse_transcription"]

_USAGE = """granite-speech FILE [FILE ...] [options]
       granite-speech {transcribe,verify,finetune,download} ..."""

_COMMANDS = """commands:
  transcribe            the same as no command
  verify                compare a checkpoint with transformers
  finetune              tune a checkpoint on your own recordings
  download              fetch a checkpoint ahead of its use

granite-speech COMMAND --help shows the options of a command. A file that is
named like one is given as ./verify.

Exit status: 0 all files were transcribed, 1 something failed or was cut off
(each is named), 2 nothing could be done (usage, model), 130 interrupted."""

_integer, _number, _text = or_none(int), or_none(float), or_none(str)

# Options of other command lines whose value is part of the call: `TranscribeOptions` accepts the values that change nothing.
_CHECKED_IN_THE_CALL: dict[str, Callable[[str], Any]] = {
    "beam-size": _integer,
    "num-beams": _integer,
    "best-of": _integer,
    "patience": _number,
    "length-penalty": _number,
    "suppress-tokens": _text,
    "carry-initial-prompt": truth_value,
    "condition-on-previous-text": truth_value,
    "logprob-threshold": _number,
    "no-speech-threshold": _number,
    "hallucination-silence-threshold": _number,
    "prepend-punctuations": _text,
    "append-punctuations": _text,
    "vad-threshold": _number,
    "vad-min-speech-duration": _number,
    "vad-min-silence-duration": _number,
    "vad-speech-pad": _number,
}


# Options without a counterpart in a call: what converts the value, the values that change nothing here, and what to use for others.
_ELSEWHERE: dict[str, tuple[Callable[[str], Any], tuple[Any, ...], str]] = {
    "temperature-increment-on-fallback": (
        _number,
        (None, 0.0, 0.2),
        "A window whose text repeats itself is cut smaller, not tried at another temperature: use --temperature",
    ),
}
# No computer has more cores, and some thousands of threads would never end: they wait for each other at every operation.
_MOST_THREADS = 1024
_LLAMA_CPP = ("llama-cpp-binary", "llama-cpp-quant", "llama-cpp-mmproj", "llama-cpp-arg", "llama-cpp-timeout")
# Options that become keyword arguments of `Transcriber.stream_segments`, if they are given.
_CALL = (
    *("task", "language", "target_language", "prompt", "initial_prompt", "keywords", "max_new_tokens", "temperature"),
    *("segmentation", "chunk_length", "chunk_overlap", "clip_timestamps", "compression_ratio_threshold"),
    *("word_timestamps", "prompt_mode", "prefix_text"),
    *(name.replace("-", "_") for name in _CHECKED_IN_THE_CALL),
)


def parse_transcription(arguments: Sequence[str]) -> argparse.Namespace:
    """The options of `granite-speech FILE …`. A usage error ends the process with status 2.

    Beside the options as they are named, the namespace has `call`: a dictionary of those that `TranscribeOptions` takes; and
    `cache_dir`. `--plot` implies `--word-timestamps`.
    """
    parser = _transcription_parser()
    options = parser.parse_args(arguments)
    _merge_hub_options(parser, options)
    _refuse_what_changes_the_result(parser, options)
    if options.fp16 is False:
        if options.dtype not in (None, "float32"):
            parser.error(f"--fp16 False means --dtype float32, which contradicts --dtype {options.dtype}: omit one of them")
        options.dtype = "float32"
    if options.audio.count("-") > 1:
        parser.error("standard input (-) can be read only once")
    options.writes_files = options.output_format is not None or options.output_dir is not None
    if options.resume and not options.writes_files:
        parser.error("--resume skips files whose output is complete, so it needs --output-format or --output-dir")
    options.quiet = bool(options.quiet) or options.verbose is not True
    _check_words(parser, options)
    options.call = {name: getattr(options, name) for name in _CALL if hasattr(options, name)}
    if not options.call.keys() & {"prompt", "initial_prompt"}:
        options.call.pop("carry_initial_prompt", None)  # there is nothing to carry
    return options


def parse_download(arguments: Sequence[str]) -> argparse.Namespace:
    """The options of `granite-speech download MODEL`, with `cache_dir`."""
    parser = CommandParser(
        prog="granite-speech download",
        description="Fetch a checkpoint ahead of its use, and print its folder. Files that are there already are not fetched again.",
        epilog="Exit status: 0 the checkpoint is there, 2 it is not, 130 interrupted (the same command continues).",
    )
    parser.add_argument("model", metavar="FOLDER_OR_ID", help="a hub id such as ibm-granite/granite-speech-3.3-2b")
    _add_hub_options(partial(parser.option, parser))
    options = parser.parse_args(arguments)
    _merge_hub_options(parser, options)
    return options


def _merge_hub_options(parser: CommandParser, options: argparse.Namespace) -> None:
    if None not in (options.download_root, options.model_dir) and options.download_root != options.model_dir:
        parser.error("--download-root and --model-dir are the same option: omit one of them")
    options.cache_dir = options.download_root or options.model_dir
    options.local_files_only = bool(options.local_files_only)
    options.ignored = [f"--{name}" for name in _LLAMA_CPP if getattr(options, name.replace("-", "_")) is not None]


def _refuse_what_changes_the_result(parser: CommandParser, options: argparse.Namespace) -> None:
    for name, (_, accepted, instead) in _ELSEWHERE.items():
        value = getattr(options, name.replace("-", "_"), None)
        if value not in accepted:
            parser.error(f"--{name} {value} is not supported, only {' or '.join(map(str, accepted))}. {instead}")


def _check_words(parser: CommandParser, options: argparse.Namespace) -> None:
    """Refuse what needs the times of words, if there will be none."""
    wanted = getattr(options, "word_timestamps", None)
    if options.plot is not None:
        if wanted is False:
            parser.error("--plot shows the times of words, which contradicts --word-timestamps False: omit one of them")
        if "-" in options.audio:
            parser.error("--plot reads a recording again, and standard input (-) can be read only once: save it to a file")
        if options.resume:
            parser.error("--resume skips files whose texts are complete, but does not know of plots: omit --resume or --plot")
        options.word_timestamps = wanted = True
    options.highlight_words = bool(options.highlight_words)
    is_timed = wanted or getattr(options, "prompt_mode", None) == "word_timestamps"
    if options.highlight_words and not is_timed:
        parser.error("--highlight-words needs the times of words: add --word-timestamps")


def _transcription_parser() -> CommandParser:
    """The parser of `granite-speech FILE …`."""
    parser = CommandParser(
        prog="granite-speech",
        usage=_USAGE,
        description="Recordings of any length to text, with IBM's Granite Speech.",
        epilog=_COMMANDS,
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    reading = parser.add_argument_group("what to read")
    reading.add_argument("audio", nargs="+", metavar="FILE", help="a recording in any common format, or - for standard input")
    _add_writing(parser)
    _add_model(parser)
    _add_request(parser)
    _add_windows(parser)
    _add_others(parser)
    return parser


def _add_writing(parser: CommandParser) -> None:
    group = parser.add_argument_group("what to write")
    add = partial(parser.option, group)
    several = (*FORMATS, "all")
    add(
        *("--output-format", "-f"),
        words=several,
        type=_formats,
        action="extend",
        metavar="FORMAT",
        help=f"write files instead of standard output: {', '.join(several)}; several with spaces or commas (default: txt)",
    )
    add("--output-dir", "-o", metavar="DIR", help="write files into this folder (default: the working directory)")
    for name, what in (("line-width", "characters in a line"), ("line-count", "lines"), ("words-per-line", "words in a line")):
        add(f"--max-{name}", type=or_none(positive), metavar="N", help=f"most {what} of a subtitle")
    _add_truth_value(
        add, "word-timestamps", "give each word its time, in json, srt and vtt, and its confidence, in json", default=argparse.SUPPRESS
    )
    _add_truth_value(add, "highlight-words", "srt and vtt: underline each word while it is spoken; needs times of words")
    add(
        "--plot",
        type=_text,
        metavar="FILE",
        help="draw the spectrogram, the words and their confidences: a .png, .svg or .pdf; DIR/ for a .png of each recording; implies "
        "--word-timestamps",
    )
    _add_truth_value(add, "resume", "skip the files whose output is complete")
    _add_truth_value(add, "verbose", "False: neither a progress bar nor a line for each file written", default=True)
    _add_truth_value(add, "quiet", "the same as --verbose False")


def _add_model(parser: CommandParser) -> None:
    group = parser.add_argument_group("the model")
    add = partial(parser.option, group)
    add(
        "--model",
        metavar="FOLDER_OR_ID",
        help="a checkpoint's folder or hub id (default: the small model inside the package, which knows 70 words)",
    )
    _add_hub_options(add)
    add("--device", type=_text, help="cpu, cuda, cuda:1 … (default: cuda if available)")
    add(
        "--dtype",
        type=lambda text: text.lower().removeprefix("torch."),
        choices=("fastest", "auto", "float32", "bfloat16", "float16"),
        help="of the weights. fastest, the default on a CPU: bfloat16 if the processor multiplies it faster than float32, else float32; "
        "auto, the default on a GPU: the checkpoint's",
    )
    _add_truth_value(add, "fp16", "whisper's option; False: the same as --dtype float32")
    add(
        "--quantize",
        choices=("int8",),
        help="round the language model's weights to 8 bits; on a CPU with avx512_vnni or AMX also those of the encoder and the projector, "
        "and multiply in 8 bits",
    )
    add(
        "--threads",
        type=or_none(_count),
        metavar="N",
        help="threads for a model on the CPU (default: OMP_NUM_THREADS if set, else one for each core that this process may use and "
        "others leave free)",
    )


def _add_hub_options(add: Callable[..., None]) -> None:
    add("--download-root", type=_text, metavar="DIR", help="the cache for downloaded checkpoints (default: Hugging Face's)")
    add("--model-dir", type=_text, metavar="DIR", help="the same as --download-root")
    add("--revision", type=_text, metavar="NAME", help="a checkpoint's branch, tag or commit on the hub")
    _add_truth_value(add, "local-files-only", "use only what has been downloaded before")
    for name in _LLAMA_CPP:
        add(f"--{name}", action="append", help=argparse.SUPPRESS)


def _add_request(parser: CommandParser) -> None:
    group = parser.add_argument_group("the request")
    add = partial(parser.option, group, default=argparse.SUPPRESS)
    add("--task", choices=("transcribe", "translate"), help="what to do (default: transcribe)")
    add("--language", type=_text, metavar="NAME", help="of the speech: a name or code, such as German or de")
    add("--target-language", type=_text, metavar="NAME", help="of a translation (default: English)")
    add("--prompt", metavar="TEXT", help="the request, in place of the checkpoint's own; it goes with every window")
    add("--initial-prompt", metavar="TEXT", help="the same as --prompt")
    keywords = {"action": "extend", "dest": "keywords"}
    add("--keyword", "--keyword-bias", **keywords, type=lambda text: [text], metavar="TEXT", help="a name or term to expect; repeatable")
    add("--keywords", **keywords, type=lambda text: text.split(","), metavar="TEXTS", help='several of them: "Ada, Watson"')
    add("--prompt-mode", type=_text, metavar="MODE", help=f"of plus checkpoints: {', '.join(PROMPT_MODES)}")
    add("--prefix-text", type=_text, metavar="TEXT", help="of plus checkpoints: the beginning of the answer, as it ended before this audio")
    add(
        "--max-new-tokens",
        type=or_none(positive),
        metavar="N",
        help="most tokens in the answer for a window (default: 400; 2000 with --prompt-mode word_timestamps)",
    )
    add("--temperature", type=_number, metavar="T", help="0: the likeliest tokens; above: drawn at random (default: 0)")


def _add_windows(parser: CommandParser) -> None:
    group = parser.add_argument_group("windows")
    add = partial(parser.option, group, default=argparse.SUPPRESS)
    add(
        "--segmentation",
        choices=SEGMENTATIONS,
        help="where a recording is cut: at pauses (energy; vad is the same), at those that silero-vad finds, or every --chunk-length "
        "seconds (default: energy)",
    )
    add("--chunk-length", type=_number, metavar="S", help="longest window, in seconds (default, and at most: the checkpoint's limit)")
    add("--chunk-overlap", type=_number, metavar="S", help="seconds that two windows of --segmentation fixed have in common (default: 0)")
    add("--clip-timestamps", type=_text, metavar="TIMES", help="transcribe only from start to end, …, in seconds: 10,20,30.5,45")
    add(
        "--compression-ratio-threshold",
        type=_number,
        metavar="X",
        help="a text that compresses this well repeats itself: its window is cut smaller and tried again (default: 2.4; None: never)",
    )


def _add_others(parser: CommandParser) -> None:
    names = ", ".join(f"--{name}" for name in (*_CHECKED_IN_THE_CALL, *_ELSEWHERE))
    text = (
        "Options of whisper and of IBM's command mean the same here, also with underscores. These are accepted with values that change "
        f"nothing, and refused with others: {names}. The options --llama-cpp-… are ignored with a warning."
    )
    indented = textwrap.fill(text, 77, break_on_hyphens=False)
    group = parser.add_argument_group("options of other programs", indented)
    add = partial(parser.option, group, default=argparse.SUPPRESS, help=argparse.SUPPRESS)
    for name, kind in _CHECKED_IN_THE_CALL.items():
        _add_typed(add, name, kind)
    for name, (kind, _, _) in _ELSEWHERE.items():
        _add_typed(add, name, kind)


def _add_typed(add: Callable[..., None], name: str, kind: Callable[[str], Any]) -> None:
    optional = {"nargs": "?", "const": True} if kind is truth_value else {}
    add(f"--{name}", type=kind, **optional)


def _add_truth_value(add: Callable[..., None], name: str, meaning: str, **default: Any) -> None:
    add(f"--{name}", nargs="?", const=True, type=truth_value, metavar="True|False", help=meaning, **default)


def _formats(text: str) -> list[str]:
    chosen = [one for one in text.lower().replace(",", " ").split()]
    for one in chosen or [text]:
        if one not in (*FORMATS, "all"):
            raise argparse.ArgumentTypeError(f"{one!r} is not one of {', '.join(FORMATS)}, all")
    return list(FORMATS) if "all" in chosen else chosen


def _count(text: str) -> int | None:
    """A number of threads; whisper's 0 is the default."""
    count = None if text == "0" else positive(text)
    if count is not None and count > _MOST_THREADS:
        raise argparse.ArgumentTypeError(f"{text!r} is more than {_MOST_THREADS}")
    return count
