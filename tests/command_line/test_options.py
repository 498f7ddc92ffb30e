"""Options of whisper's and of IBM's command lines: accepted, passed on, or refused by name before a model is loaded."""

import sys

import pytest

from granite_speech import Transcriber
from granite_speech.cli import main
from granite_speech.command_line.options import parse_transcription
from tests.support.scripted_transcriber import FIRST_LINE, ScriptedTranscriber, transcript


@pytest.fixture
def transcriber(monkeypatch):
    scripted = ScriptedTranscriber({"a.wav": transcript("one"), "b.wav": transcript("two"), "-e.wav": transcript("three")})
    monkeypatch.setattr(Transcriber, "from_pretrained", scripted.from_pretrained)
    return scripted


# --- where options and files end --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "line, audio, expected",
    [
        ("a.wav --task translate b.wav", ["a.wav", "b.wav"], {"task": "translate"}),
        ("--max_new_tokens=9 a.wav", ["a.wav"], {"max_new_tokens": 9}),
        ("--max_new-tokens 9 a.wav", ["a.wav"], {"max_new_tokens": 9}),
        ("--lang de a.wav", ["a.wav"], {"language": "de"}),
        ("--suppress_tokens -1 a.wav", ["a.wav"], {"suppress_tokens": "-1"}),
        ("--suppress_tokens -1,2 a.wav", ["a.wav"], {"suppress_tokens": "-1,2"}),
        ("--prompt -loud a.wav", ["a.wav"], {"prompt": "-loud"}),
        ("--prompt= a.wav", ["a.wav"], {"prompt": ""}),
        ("--prompt a=b a.wav", ["a.wav"], {"prompt": "a=b"}),
        ("--word_timestamps a.wav", ["a.wav"], {"word_timestamps": True}),
        ("--word_timestamps False a.wav", ["a.wav"], {"word_timestamps": False}),
        ("--word_timestamps=false a.wav", ["a.wav"], {"word_timestamps": False}),
        ("--condition_on_previous_text None a.wav", ["a.wav"], {"condition_on_previous_text": None}),
        ("--beam_size None --temperature 0 a.wav", ["a.wav"], {"beam_size": None, "temperature": 0.0}),
        ("--keyword Ada --keyword_bias=Watson a.wav --keywords x,y", ["a.wav"], {"keywords": ["Ada", "Watson", "x", "y"]}),
        ("--language de -- -e.wav --task", ["-e.wav", "--task"], {"language": "de"}),
        ("- a.wav", ["-", "a.wav"], {}),
    ],
)
def test_options_are_told_from_files(line, audio, expected):
    options = parse_transcription(line.split())
    assert options.audio == audio
    assert options.call == expected


@pytest.mark.parametrize(
    "line, formats",
    [
        ("--output-format srt a.wav", ["srt"]),
        ("--output_format srt vtt a.wav", ["srt", "vtt"]),
        ("a.wav -f srt,vtt", ["srt", "vtt"]),
        ("-f srt,json txt a.wav", ["srt", "json", "txt"]),
        ("-fsrt a.wav", ["srt"]),
        ("--output-format=SRT a.wav", ["srt"]),
        ("-f srt -f tsv a.wav", ["srt", "tsv"]),
        ("a.wav --output-format all", ["txt", "srt", "vtt", "tsv", "json"]),
    ],
)
def test_output_formats_do_not_take_the_files_after_them(line, formats):
    options = parse_transcription(line.split())
    assert (options.audio, options.output_format) == (["a.wav"], formats)


def test_a_file_after_a_truth_value_is_a_file():
    options = parse_transcription(["--verbose", "a.wav", "--local_files_only", "b.wav", "--resume", "-o", "x", "--fp16", "True", "c.wav"])
    assert options.audio == ["a.wav", "b.wav", "c.wav"]
    assert (options.quiet, options.local_files_only, options.resume, options.fp16) == (False, True, True, True)


# --- what other programs have -----------------------------------------------------------------------------------------------------

WHISPER_DEFAULTS = (
    "--model_dir cache --device cpu --task transcribe --temperature 0 --best_of 5 --patience None --length_penalty None "
    "--suppress_tokens -1 --fp16 True --temperature_increment_on_fallback 0.2 --compression_ratio_threshold 2.4 --logprob_threshold -1.0 "
    "--no_speech_threshold 0.6 --word_timestamps False --prepend_punctuations ( --append_punctuations ) --highlight_words False "
    "--max_line_width None --max_line_count None --max_words_per_line None --threads 0 --clip_timestamps 0 "
    "--hallucination_silence_threshold None --beam_size 1 --condition_on_previous_text False --carry_initial_prompt False"
)
IBM_DEFAULTS = (
    "--num-beams 1 --prompt-mode default --chunk-length 30 --chunk-overlap 0 --segmentation vad --vad-threshold 0.2 "
    "--vad-min-speech-duration 0.2 --vad-min-silence-duration 0.5 --vad-speech-pad 0.2 --max-new-tokens 200 --verbose"
)


@pytest.mark.parametrize("line", [WHISPER_DEFAULTS, IBM_DEFAULTS], ids=["whisper", "IBM"])
@pytest.mark.parametrize("dash", "-_")
def test_values_that_change_nothing_are_accepted(transcriber, capfd, line, dash):
    words = [word[:2] + word[2:].replace("_", dash).replace("-", dash) if word.startswith("--") else word for word in line.split()]
    assert main(["--model", "m", *words, "a.wav"]) == 0
    out, err = capfd.readouterr()
    assert out == "one\n" and err in ("", FIRST_LINE)


@pytest.mark.parametrize(
    "option, reason",
    [
        ("--beam_size 5", "greedily"),
        ("--num-beams=4", "greedily"),
        ("--best_of 3", "best_of"),
        ("--condition_on_previous_text True", "on its own"),
        ("--condition-on-previous-text", "on its own"),
        ("--initial_prompt x --carry_initial_prompt False", "carry_initial_prompt"),
        ("--no_speech_threshold 0.9", "silence"),
        ("--logprob_threshold -2", "logprob_threshold"),
        ("--highlight_words True", "add --word-timestamps"),
        ("--highlight-words --word_timestamps False", "add --word-timestamps"),
        ("--word_timestamps=maybe", "maybe"),
        ("--prompt_mode whispered", "'whispered'"),
        ("--plot a.png --word_timestamps False", "contradicts --word-timestamps False"),
        ("--plot a.png -", "standard input (-) can be read only once"),
        ("--plot a.png --resume -f srt", "does not know of plots"),
        ("--plot a.docx", "'a.docx' for an image"),
        ("--plot words", ".png, .svg, .pdf"),
        ("--plot a.png b.wav", "expected a folder"),
        ("--plot /dev/null/a.png", "cannot be written"),
        ("--temperature_increment_on_fallback 0.5", "--temperature"),
        ("--vad_threshold 0.3", "vad_threshold=0.3"),
        ("--suppress_tokens 5", "suppress_tokens"),
        ("--task sing", "--task"),
        ("--temperature -1", "temperature"),
        ("--language xx", "language='xx'"),
        ("--target_language de", "task='translate'"),
        ("--task translate --language English", "another target_language"),
        ("--chunk_length 0", "chunk_length"),
        ("--clip_timestamps 3,1", "clip_timestamps"),
        ("--prompt x --initial_prompt y", "prompt"),
        ("--fp16 False --dtype bfloat16", "--fp16"),
        ("--model_dir x --download_root y", "--download-root"),
        ("--max_line_width 0 -f srt", "--max-line-width"),
        ("--threads -2", "--threads"),
        ("--threads 5000", "'5000' is more than 1024"),
        ("--beam_size many", "--beam-size"),
        ("--verbose=maybe", "maybe"),
        ("--output-format docx", "docx"),
        ("--output-format b.wav", "b.wav"),
        ("--output-format", "expected one argument"),
        ("--model --device cpu", "--model"),
        ("--out x", "ambiguous"),
        ("--loud", "--loud"),
        ("--resume", "--output-dir"),
        ("- -", "only once"),
    ],
)
def test_what_would_change_the_result_is_refused_before_the_model_is_loaded(transcriber, capfd, option, reason):
    try:
        status = main(["a.wav", *option.split()])
    except SystemExit as stop:
        status = stop.code
    out, err = capfd.readouterr()
    assert (status, out, transcriber.loaded) == (2, "", [])
    assert reason in err.splitlines()[-1] and "Traceback" not in err


def test_a_package_that_an_option_needs_is_missed_once_and_before_the_model_is_loaded(transcriber, capfd, monkeypatch):
    monkeypatch.setitem(sys.modules, "silero_vad", None)
    assert main(["a.wav", "b.wav", "--model", "m", "--segmentation", "silero"]) == 2
    out, err = capfd.readouterr()
    assert (out, transcriber.loaded) == ("", []) and "[vad]" in err and err.count("\n") == 1


def test_options_of_llama_cpp_are_ignored_with_a_warning(transcriber, capfd):
    assert main(["a.wav", "--model", "m", "--llama_cpp_arg", "-t", "--llama-cpp-arg=4", "--llama_cpp_binary", "x"]) == 0
    out, err = capfd.readouterr()
    assert out == "one\n"
    assert err == FIRST_LINE + "granite-speech: --llama-cpp-binary, --llama-cpp-arg ignored: llama.cpp is not used\n"


# --- what reaches the model -------------------------------------------------------------------------------------------------------


def test_options_of_the_call_reach_the_transcriber(transcriber):
    line = "--task translate --language German --target_language fr --keywords Ada,Watson --max_new_tokens 7 --temperature 0.5 --prompt x"
    windows = "--segmentation fixed --chunk_length 8 --chunk_overlap 1 --clip_timestamps 1,2,5 --compression_ratio_threshold None"
    assert main(["a.wav", "--model", "m", *line.split(), *windows.split()]) == 0
    request = {"task": "translate", "language": "German", "target_language": "fr", "keywords": ["Ada", "Watson"], "prompt": "x"}
    decoding = {"max_new_tokens": 7, "temperature": 0.5, "compression_ratio_threshold": None}
    cuts = {"segmentation": "fixed", "chunk_length": 8.0, "chunk_overlap": 1.0, "clip_timestamps": "1,2,5"}
    assert transcriber.calls == [request | decoding | cuts]


def test_options_of_words_and_of_plus_checkpoints_reach_the_transcriber(transcriber, capfd):
    line = "--word_timestamps True --prompt-mode speaker_attributed --prefix_text -loud"
    assert main(["a.wav", "--model", "m", *line.split()]) == 0
    assert transcriber.calls == [{"word_timestamps": True, "prompt_mode": "speaker_attributed", "prefix_text": "-loud"}]
    assert main(["a.wav", "--model", "m", "--word-timestamps", "--prompt_mode", "None", "--prefix-text", "None"]) == 0
    assert transcriber.calls[1] == {"word_timestamps": True, "prompt_mode": None, "prefix_text": None}


def test_a_plot_implies_word_timestamps():
    options = parse_transcription(["a.wav", "--plot", "a.png", "--highlight-words", "-f", "srt"])
    assert options.call == {"word_timestamps": True} and options.highlight_words is True
    options = parse_transcription(["a.wav", "--plot", "None"])
    assert options.call == {} and options.plot is None and options.highlight_words is False


def test_words_whose_times_the_model_writes_can_be_highlighted():
    options = parse_transcription(["a.wav", "--prompt-mode", "word_timestamps", "--highlight-words", "-f", "srt"])
    assert options.highlight_words is True and options.call == {"prompt_mode": "word_timestamps"}


@pytest.mark.parametrize(
    "line, expected",
    [
        ("", {}),
        ("--download_root x --model-dir x", {"cache_dir": "x"}),
        ("--model_dir x --revision main --local_files_only", {"cache_dir": "x", "revision": "main", "local_files_only": True}),
        ("--device cpu --dtype bfloat16 --quantize int8", {"device": "cpu", "dtype": "bfloat16", "quantize": "int8"}),
        ("--fp16 False", {"dtype": "float32"}),
        ("--fp16 True --dtype float16", {"dtype": "float16"}),
    ],
)
def test_options_of_the_model_reach_from_pretrained(transcriber, line, expected):
    nothing = {"device": None, "dtype": None, "quantize": None, "cache_dir": None, "revision": None, "local_files_only": False}
    assert main(["a.wav", "--model", "m", *line.split()]) == 0
    assert transcriber.loaded == [("m", nothing | expected)]
