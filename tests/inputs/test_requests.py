"""Requests in the words of each family of checkpoints, languages and keywords, and the window limit that a checkpoint states."""

import json
import shutil
from pathlib import Path

import pytest
from transformers import AutoConfig

import granite_speech
from granite_speech.config import GraniteSpeechConfig
from granite_speech.errors import ConfigError, InputError
from granite_speech.inputs.languages import language_name
from granite_speech.inputs.processor import GraniteSpeechProcessor
from granite_speech.inputs.requests import PROMPT_3, PROMPT_4, SYSTEM_3, request_for, transcript_request, window_limit
from granite_speech.training.bundled_checkpoint.small_model import WINDOW_SECONDS, make_model, make_tokenizer

EMBEDDED = Path(granite_speech.__file__).parent / "assets" / "embedded"
ROLES = (
    "{% for one in messages %}<|start_of_role|>{{ one.role }}<|end_of_role|>{{ one.content }}<|end_of_text|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start_of_role|>assistant<|end_of_role|>{% endif %}"
)
PLUS_SYSTEM = "\n".join(
    (
        "Knowledge Cutoff Date: April 2024.",
        "Today's Date: December 19, 2024.",
        "You are Granite, developed by IBM. You are a helpful AI assistant",
    )
)


def made(template: str | None) -> GraniteSpeechProcessor:
    processor = GraniteSpeechProcessor.from_pretrained("embedded")
    processor.chat_template = processor.tokenizer.chat_template = template
    return processor


@pytest.fixture(scope="module")
def third() -> GraniteSpeechProcessor:
    return made(ROLES)


@pytest.fixture(scope="module")
def fourth() -> GraniteSpeechProcessor:
    return GraniteSpeechProcessor.from_pretrained("embedded")


def in_roles(system: str, words: str) -> str:
    return (
        f"<|start_of_role|>system<|end_of_role|>{system}<|end_of_text|>\n<|start_of_role|>user<|end_of_role|>{words}<|end_of_text|>\n"
        "<|start_of_role|>assistant<|end_of_role|>"
    )


# Options, and the request of 3.x, of 4.x and of plus.
WORDS = {
    "a transcript": ({}, PROMPT_3, PROMPT_4, PROMPT_3),
    "of a language": (
        {"language": "de"},
        "can you transcribe the German speech into a written format?",
        "transcribe the German speech with proper punctuation and capitalization.",
        "can you transcribe the German speech into a written format?",
    ),
    "with keywords": (
        {"keywords": ["Kim", "EBITDA"]},
        f"{PROMPT_3} Keywords: Kim, EBITDA",
        "transcribe the speech to text. Keywords: Kim, EBITDA",
        f"{PROMPT_3} Keywords: Kim, EBITDA",
    ),
    "a translation": (
        {"task": "translate", "language": "French"},
        "translate the speech to English",
        "translate the speech to English with proper punctuation and capitalization.",
        "translate the speech to English",
    ),
    "to a language, with keywords": (
        {"task": "translate", "language": "en", "target_language": "zh", "keywords": "Kim"},
        "translate the speech to Mandarin. Keywords: Kim",
        "translate the speech to Mandarin. Keywords: Kim",
        "translate the speech to Mandarin. Keywords: Kim",
    ),
    "other words": ({"prompt": "what is said", "keywords": "Kim"}, *["what is said. Keywords: Kim"] * 3),
    "other words that end": ({"prompt": "Say it! ", "language": "de", "keywords": "Kim"}, *["Say it! Keywords: Kim"] * 3),
    "an empty prompt": ({"prompt": ""}, PROMPT_3, PROMPT_4, PROMPT_3),
    "an unknown language": ({"language": "auto", "keywords": " , "}, PROMPT_3, PROMPT_4, PROMPT_3),
}


@pytest.mark.parametrize("name", WORDS)
def test_the_words_of_each_family(third, fourth, name):
    options, words_3, words_4, words_plus = WORDS[name]
    assert request_for(third, **options) == in_roles(SYSTEM_3, f"<|audio|>{words_3}")
    assert request_for(fourth, **options) == f"USER: <|audio|>{words_4}\n ASSISTANT:"
    assert request_for(made(None), **options) == f"<|audio|>{words_4}"
    plus = in_roles(PLUS_SYSTEM, f"<|audio|> {words_plus}")
    assert request_for(third, model_type="granite_speech_plus", **options) == plus
    assert request_for(third, model_type="granite_speech", **options) == request_for(third, **options)


def test_plus_is_known_by_its_vocabulary(third, monkeypatch):
    monkeypatch.setattr(third.tokenizer, "convert_tokens_to_ids", {"<|audio|>": 100_352}.get)
    assert transcript_request(third) == request_for(third) == in_roles(PLUS_SYSTEM, f"<|audio|> {PROMPT_3}")
    assert transcript_request(third, model_type="granite_speech") == in_roles(SYSTEM_3, f"<|audio|>{PROMPT_3}")


TAGS = {
    "speaker_attributed": (
        "Speaker attribution: Transcribe and denote who is speaking by adding [Speaker 1]: and [Speaker 2]: tags before speaker turns."
    ),
    "word_timestamps": (
        "Timestamps: Transcribe the speech. After each word, add a timestamp tag showing the end time in centiseconds, "
        "e.g. hello [T:45] world [T:82]"
    ),
}


@pytest.mark.parametrize("mode", TAGS)
def test_requests_for_tags(third, fourth, mode):
    plus = {"model_type": "granite_speech_plus"}
    assert request_for(third, prompt_mode=mode, **plus) == in_roles(PLUS_SYSTEM, f"<|audio|> {TAGS[mode]}")
    assert request_for(third, prompt_mode=mode, language="de", **plus) == request_for(third, prompt_mode=mode, **plus)
    words = TAGS[mode] + ("." if TAGS[mode][-1] == "]" else "") + " Keywords: Kim"
    assert request_for(third, prompt_mode=mode, keywords=["Kim"], **plus) == in_roles(PLUS_SYSTEM, f"<|audio|> {words}")
    for other in (third, fourth):
        with pytest.raises(InputError, match=f"prompt_mode='{mode}'; expected a plus checkpoint.*granite-speech-4.1-2b-plus"):
            request_for(other, prompt_mode=mode)
    own = request_for(third, prompt_mode=mode, prompt="Who says what?", **plus)
    assert own == request_for(third, prompt="Who says what?", **plus)  # the mode says how the answer is read
    with pytest.raises(InputError, match=f"prompt_mode='{mode}' with"):
        request_for(third, prompt_mode=mode, task="translate", **plus)


@pytest.mark.parametrize("template", [ROLES, ROLES.replace("{% endif %}", "{{ prefix_text or '' }}{% endif %}")])
def test_an_answer_can_continue_a_text(template, fourth):
    processor, plus = made(template), {"model_type": "granite_speech_plus"}
    begun = in_roles(PLUS_SYSTEM, f"<|audio|> {PROMPT_3}")
    assert request_for(processor, prefix_text="[Speaker 1]: so ", **plus) == begun + "[Speaker 1]: so"
    assert request_for(processor, prompt=begun, prefix_text="so", **plus) == begun + "so"
    assert request_for(processor, prefix_text=" ", **plus) == request_for(processor, prefix_text="", **plus) == begun
    assert request_for(fourth, prefix_text="") == request_for(fourth)
    for wrong, message in (("<|audio|>", "occurs 2 times"), (3, "prefix_text of type int")):
        with pytest.raises(InputError, match=message):
            request_for(processor, prefix_text=wrong, **plus)
    with pytest.raises(InputError, match="prefix_text; expected a plus checkpoint, which was trained to continue"):
        request_for(fourth, prefix_text="so")


def test_a_prompt_with_a_place_for_the_recording(third, fourth):
    for processor in (third, fourth):
        complete = request_for(processor)
        assert request_for(processor, prompt=complete) == transcript_request(processor, complete) == complete
        grown = complete.replace("<|audio|>", "<|audio|>" * 8)  # as many as its audio tokens
        assert transcript_request(processor, grown) == grown
        assert request_for(processor, prompt="<|audio|>what?", keywords="a") == request_for(processor, prompt="what?", keywords="a")
        assert "What is <|audio|> about?" in request_for(processor, prompt="What is <|audio|> about?")
        assert transcript_request(processor, "<|audio|><|audio|>").count("<|audio|>") == 2  # for the processor to judge
        with pytest.raises(InputError, match="ends with the start of the answer"):
            request_for(processor, prompt=complete, keywords="a")
        with pytest.raises(InputError, match="occurs 2 times"):
            request_for(processor, prompt="<|audio|> and <|audio|>")
    with pytest.raises(InputError, match="occurs 0 times"):
        request_for(made("{{ messages[0].role }}"))


@pytest.mark.parametrize("keywords", ["a b, c,a b", ["a  b", " c ", "a b"], ("a b,c", ""), {"a b": 1, "c": 2}, iter(["a b\n", "c"])])
def test_keywords_are_cleaned(fourth, keywords):
    assert "text. Keywords: a b, c\n" in request_for(fourth, keywords=keywords)


def test_names_of_languages():
    for german in ("de", "DE", "de-DE", "de_AT", "German", "german", " GERMAN ", "deu", "ger"):
        assert language_name(german, "language") == "German"
    codes = {"zh": "Mandarin", "zh-Hans-CN": "Mandarin", "Chinese": "Mandarin", "mandarin chinese": "Mandarin", "pt-BR": "Portuguese"}
    codes |= {"es-419": "Spanish", "haw": "Hawaiian", "yue": "Cantonese", "haitian  creole": "Haitian Creole", "ja": "Japanese"}
    others = {"swiss german": "Swiss German", "Bokmål": "Bokmål", "old-norse": "Old-Norse", "N'Ko": "N'Ko"}
    for given, name in (codes | others).items():
        assert language_name(given, "language") == name


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"task": "summarize"}, "task = 'summarize'"),
        ({"task": None}, "task = None"),
        ({"language": "xx"}, r"language='xx'.*codes af, am, .*, de, .*Pass the name"),
        ({"language": "xx-DE"}, "language='xx-DE'"),
        ({"task": "translate", "target_language": "qq"}, "target_language='qq'"),
        ({"language": ""}, "language=''"),
        ({"language": 3}, "language=3"),
        ({"language": "German. Then stop"}, "language="),
        ({"language": "e" * 41}, "language="),
        ({"target_language": "de"}, "target_language='de' for task='transcribe'"),
        ({"task": "translate", "language": "en"}, "from English to English.*English if omitted"),
        ({"task": "translate", "language": "de", "target_language": "German"}, "from German to German"),
        ({"task": "translate", "target_language": "auto"}, "target_language"),
        ({"keywords": 3}, "keywords of type int"),
        ({"keywords": b"a"}, "keywords of type bytes"),
        ({"keywords": ["a", None]}, "a NoneType among the keywords"),
        ({"keywords": "a, <|audio|>"}, "the keyword 'a, <.audio.>'"),
        ({"prompt": 3}, "a prompt of type int"),
    ],
)
def test_refused_options(fourth, options, message):
    with pytest.raises(InputError, match=message):
        request_for(fourth, **options)


# --- the window limit -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "transcribe", "translate"),
    [(None, 30, 10), (4, 4, 4), ({"transcribe": 12.5}, 12.5, 10), ({"translate": 5, "transcribe": None}, 30, 5)],
)
def test_window_limits_survive_files(tmp_path, value, transcribe, translate):
    config = GraniteSpeechConfig() if value is None else GraniteSpeechConfig(window_seconds=value)
    config.save_pretrained(tmp_path / "ours")
    theirs = AutoConfig.from_pretrained(tmp_path / "ours")
    theirs.save_pretrained(tmp_path / "theirs")
    again = GraniteSpeechConfig.from_pretrained(tmp_path / "theirs")
    for one in (config, GraniteSpeechConfig.from_pretrained(tmp_path / "ours"), theirs, again):
        assert (window_limit(one, "transcribe"), window_limit(one, "translate")) == (transcribe, translate)
    assert ("window_seconds" in json.loads((tmp_path / "theirs" / "config.json").read_text())) == (value is not None)
    with pytest.raises(InputError, match="task"):
        window_limit(config, "sing")


@pytest.mark.parametrize("value", [0, -1, True, "4", float("nan"), float("inf"), [4], {"transcribe": 0}, {"sing": 4}, {"translate": "4"}])
def test_wrong_window_limits(value):
    with pytest.raises(ConfigError, match=r"window_seconds = .*; expected a number of seconds above 0"):
        GraniteSpeechConfig(window_seconds=value)


def test_the_limit_of_the_bundled_checkpoint(tmp_path):
    model = granite_speech.GraniteSpeechForConditionalGeneration.from_pretrained("embedded")
    assert window_limit(model.config, "transcribe") == window_limit(model.config, "translate") == WINDOW_SECONDS
    assert make_model(make_tokenizer(), 0).config.window_seconds == WINDOW_SECONDS  # for the next one that is trained
    model.save_pretrained(tmp_path / "saved")
    assert json.loads((tmp_path / "saved" / "config.json").read_text())["window_seconds"] == WINDOW_SECONDS
    shutil.copytree(EMBEDDED, tmp_path / "wrong")
    config = json.loads((EMBEDDED / "config.json").read_text()) | {"window_seconds": -4}
    (tmp_path / "wrong" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match="window_seconds"):
        granite_speech.GraniteSpeechForConditionalGeneration.from_pretrained(tmp_path / "wrong")
