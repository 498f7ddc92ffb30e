"""The tokenizer against transformers' AutoTokenizer for the same folder, its files, and its chat templates."""

import importlib
import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from granite_speech.errors import CheckpointError, CheckpointNotFoundError, InputError, UnsupportedError
from granite_speech.inputs.tokenizer import LONGEST_PROMPT, GraniteSpeechTokenizer, render_chat_template
from tests.support.small_tokenizer import AUDIO_TOKEN, CHAT_TEMPLATE, SPECIAL_TOKENS, write_tokenizer

TEXTS = [
    "can you transcribe the speech into a written format?",
    "",
    "  two  spaces, 12345 digits\n\nand\ttabs ",
    "Grüße, 日本語, emoji 🎙️ and a\u0301 combining accent",
    "<|start_of_role|>user<|end_of_role|><|audio|><|audio|>text<|end_of_text|>",
    "half a special token <|audio| and <|pad|>",
]
MESSAGES = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "<|audio|>transcribe the speech"}]


@pytest.fixture(scope="module", params=["left", "right"])
def folder(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(f"tokenizer_{request.param}")
    write_tokenizer(folder, padding_side=request.param)
    return folder


@pytest.fixture(scope="module")
def ours(folder):
    return GraniteSpeechTokenizer.from_folder(folder)


@pytest.fixture(scope="module")
def theirs(folder):
    transformers = importlib.import_module("transformers")
    return transformers.AutoTokenizer.from_pretrained(folder)


def assert_alike(ours, theirs, texts=TEXTS):
    for padding_side in (None, "left", "right"):
        expected = theirs(texts, padding=True, padding_side=padding_side, return_tensors="pt")
        batch = ours(texts, padding=True, padding_side=padding_side, return_tensors="pt")
        assert list(batch) == list(expected)
        for name in batch:
            assert batch[name].dtype == torch.int64
            assert torch.equal(batch[name], expected[name])
    for skip in (False, True):
        assert ours.batch_decode(batch.input_ids, skip_special_tokens=skip) == theirs.batch_decode(
            batch.input_ids, skip_special_tokens=skip
        )
    for role in ("bos_token", "eos_token", "pad_token", "unk_token", "sep_token"):
        assert getattr(ours, role) == getattr(theirs, role)
        assert getattr(ours, f"{role}_id") == getattr(theirs, f"{role}_id")
    assert (ours.vocab_size, len(ours), ours.padding_side) == (theirs.vocab_size, len(theirs), theirs.padding_side)
    assert ours.all_special_ids == theirs.all_special_ids
    decoders = [{index: token.special for index, token in one.added_tokens_decoder.items()} for one in (ours, theirs)]
    assert decoders[0] == decoders[1]


def test_equal_to_transformers(ours, theirs):
    assert_alike(ours, theirs)
    for text in TEXTS:
        assert {**ours(text)} == {**theirs(text)}
        assert ours.encode(text) == theirs.encode(text)
    assert ours.convert_tokens_to_ids([AUDIO_TOKEN, "no such token"]) == theirs.convert_tokens_to_ids([AUDIO_TOKEN, "no such token"])
    assert ours.convert_ids_to_tokens([1, 99999]) == [theirs.convert_ids_to_tokens(1), None]


@settings(max_examples=40, deadline=None)
@given(text=st.text(max_size=60))
def test_any_text_equal_to_transformers_and_back(ours, theirs, text):
    ids = ours.encode(text)
    assert ids == theirs.encode(text)
    assert ours.decode(ids) == text


def test_a_saved_folder_loads_the_same_tokenizer(ours, theirs, tmp_path):
    import transformers

    ours.save_pretrained(tmp_path)
    saved = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert_alike(ours, saved)
    assert_alike(GraniteSpeechTokenizer.from_folder(tmp_path), theirs)
    assert saved.chat_template == CHAT_TEMPLATE
    theirs.save_pretrained(tmp_path / "theirs")
    assert_alike(GraniteSpeechTokenizer.from_folder(tmp_path / "theirs"), theirs)


def test_legacy_files(folder, tmp_path):
    """special_tokens_map.json and added_tokens.json are used if tokenizer_config.json has no added_tokens_decoder."""
    import transformers

    write_tokenizer(tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    for role in ("bos_token", "pad_token"):
        config.pop(role)
    config["eos_token"] = "<|pad|>"
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    roles = {"eos_token": {"content": "<|end_of_text|>", "lstrip": False, "normalized": False, "rstrip": False}, "pad_token": "<|late|>"}
    (tmp_path / "special_tokens_map.json").write_text(json.dumps(roles))
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<|late|>": 325}))
    ours = GraniteSpeechTokenizer.from_folder(tmp_path)
    assert (ours.eos_token, ours.pad_token, ours.pad_token_id, ours.bos_token) == ("<|end_of_text|>", "<|late|>", 325, None)
    assert_alike(ours, transformers.AutoTokenizer.from_pretrained(tmp_path), [*TEXTS, "a <|late|> token"])


def test_late_added_tokens_and_named_roles(tmp_path):
    import transformers

    size, _ = write_tokenizer(tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
    config["added_tokens_decoder"] = {str(size): {"content": "<|more|>", **flags}}
    config["extra_special_tokens"] = {"audio_token": AUDIO_TOKEN}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    ours, theirs = GraniteSpeechTokenizer.from_folder(tmp_path), transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert_alike(ours, theirs, [*TEXTS, "one <|more|>"])
    assert ours.audio_token == theirs.audio_token == AUDIO_TOKEN and ours.audio_token_id == theirs.audio_token_id


def test_decoding_forms(ours):
    ids = ours.encode("the speech")
    assert ours.decode(torch.tensor(ids)) == ours.decode(tuple(ids)) == "the speech"
    assert ours.decode([ids, []]) == ours.batch_decode([torch.tensor(ids), []]) == ["the speech", ""]
    assert ours.decode(ids[0]) == ours.decode([ids[0]]) and ours.decode(torch.tensor(ids[0])) == ours.decode(ids[0])
    assert ours.decode([*ids, 100352]) == "the speech"
    with pytest.raises(InputError, match="token id -100"):
        ours.decode([*ids, -100])


def test_refusals(ours, tmp_path):
    for text in (None, 3, [], [3], {"a": 1}):
        with pytest.raises(InputError, match="text of type"):
            ours(text)
    with pytest.raises(InputError, match="padding=True"):
        ours(["a", "a longer text"], return_tensors="pt")
    with pytest.raises(InputError, match="return_tensors"):
        ours("a", return_tensors="tf")
    with pytest.raises(InputError, match="padding_side"):
        ours("a", padding_side="middle")
    with pytest.raises(CheckpointNotFoundError, match=r"tokenizer\.json"):
        GraniteSpeechTokenizer.from_folder(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(CheckpointError, match="unreadable"):
        GraniteSpeechTokenizer.from_folder(tmp_path)
    write_tokenizer(tmp_path, padding_side="top")
    with pytest.raises(CheckpointError, match="padding_side"):
        GraniteSpeechTokenizer.from_folder(tmp_path)


def test_no_pad_token(tmp_path):
    write_tokenizer(tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    del config["pad_token"]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "special_tokens_map.json").unlink()
    tokenizer = GraniteSpeechTokenizer.from_folder(tmp_path)
    assert tokenizer(["ab", "ab"], padding=True, return_tensors="pt").input_ids.shape[0] == 2
    with pytest.raises(InputError, match="no pad token"):
        tokenizer(["a", "a longer text"], padding=True)


def test_chat_template_equals_transformers(ours, theirs):
    answer = [*MESSAGES, {"role": "assistant", "content": "the text"}]
    for conversation in (MESSAGES, answer, [MESSAGES, answer]):
        for prompt in (False, True):
            options = {"add_generation_prompt": prompt}
            text = ours.apply_chat_template(conversation, tokenize=False, **options)
            assert text == theirs.apply_chat_template(conversation, tokenize=False, **options)
            assert {**ours.apply_chat_template(conversation, **options)} == {**theirs.apply_chat_template(conversation, **options)}
    ids = ours.apply_chat_template([MESSAGES, answer], padding=True, return_tensors="pt", return_dict=False)
    assert torch.equal(ids, theirs.apply_chat_template([MESSAGES, answer], padding=True, return_tensors="pt", return_dict=False))
    assert ours.apply_chat_template(MESSAGES, tokenize=False, add_generation_prompt=True).endswith(" ASSISTANT:")


TEMPLATES = [
    "{% for m in messages %}\n    {% if m.role == 'user' %}\n{{ m.content }}\n    {% endif %}\n{% endfor %}",
    "{{ messages | tojson }} {{ tools | tojson(indent=2) }} {{ documents }} {{ bos_token }} {{ name | default('none') }}",
    "{% generation %}{{ messages[0].content }}{% endgeneration %}!",
    "{% for m in messages %}{% if loop.first %}{% continue %}{% endif %}x{% endfor %}",
    "{{ strftime_now('%Y') }} {{ '<é>' | tojson }} {{ '-' * 5 }} {{ 2 ** 10 }} {{ messages[0]['missing'] }}",
]


@pytest.mark.parametrize("template", TEMPLATES)
def test_templates_equal_transformers(ours, theirs, template):
    options = {"tokenize": False, "chat_template": template, "tools": [{"name": "é<>"}], "documents": [{"title": "t", "text": "x"}]}
    assert ours.apply_chat_template(MESSAGES, name="n", **options) == theirs.apply_chat_template(MESSAGES, name="n", **options)


@pytest.mark.parametrize("place", ["config", "config list", "files", "legacy file"])
def test_templates_are_found_where_transformers_finds_them(tmp_path, place):
    import transformers

    write_tokenizer(tmp_path)
    (tmp_path / "chat_template.jinja").unlink()
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    if place == "config":
        config["chat_template"] = "one {{ messages[0].content }}"
    elif place == "config list":
        config["chat_template"] = [{"name": "default", "template": "one"}, {"name": "tool_use", "template": "tools"}]
    elif place == "files":
        config["chat_template"] = "not this one"
        (tmp_path / "chat_template.jinja").write_text("one")
        (tmp_path / "additional_chat_templates").mkdir()
        (tmp_path / "additional_chat_templates" / "tool_use.jinja").write_text("tools")
    else:
        (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": "one"}))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    ours = GraniteSpeechTokenizer.from_folder(tmp_path)
    ours.save_pretrained(tmp_path / "saved")
    for tokenizer in (ours, GraniteSpeechTokenizer.from_folder(tmp_path / "saved")):
        assert tokenizer.apply_chat_template(MESSAGES, tokenize=False).startswith("one")
        if place in ("config list", "files"):
            tools = [{"type": "function"}]
            assert tokenizer.apply_chat_template(MESSAGES, tokenize=False, tools=tools) == "tools"
            assert tokenizer.apply_chat_template(MESSAGES, tokenize=False, chat_template="tool_use") == "tools"
    if place != "legacy file":
        theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "saved")
        assert theirs.chat_template == ours.chat_template == transformers.AutoTokenizer.from_pretrained(tmp_path).chat_template


@pytest.mark.parametrize(
    "template",
    [
        "{% for a in range(99999) %}{% for b in range(99999) %}xxxxxxxxxxxxxxxx{% endfor %}{% endfor %}",
        "{{ 'x' * 1000000000 }}",
        "{{ 10 ** 1000000000 }}",
        "{{ ''.__class__.__mro__ }}",
        "{{ messages.append(1) }}",
        "{% for a in range(1000000000) %}{% endfor %}",
        "{{ raise_exception('wrong role') }}",
        "{% if %}",
        "{{ 1 / 0 }}",
        "{{ messages[0].content + 1 }}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    ],
)
def test_failing_and_runaway_templates_are_input_errors(template):
    with pytest.raises(InputError, match="a chat template that"):
        render_chat_template(template, messages=[{"role": "user", "content": "x"}])


def test_template_refusals(ours):
    assert len(render_chat_template("{{ text }}", text="x" * LONGEST_PROMPT)) == LONGEST_PROMPT
    with pytest.raises(InputError, match="no messages"):
        ours.apply_chat_template([])
    with pytest.raises(InputError, match="unknown role nobody"):
        ours.apply_chat_template([{"role": "nobody", "content": ""}])
    with pytest.raises(InputError, match="continue_final_message"):
        ours.apply_chat_template(MESSAGES, continue_final_message=True, add_generation_prompt=True)
    with pytest.raises(InputError, match="tool"):
        ours.apply_chat_template(MESSAGES, tools=[print])
    bare = GraniteSpeechTokenizer(ours.backend, ours.config)
    with pytest.raises(InputError, match="no chat template"):
        bare.apply_chat_template(MESSAGES)


def test_special_tokens_in_messages_are_not_sanitized_silently(ours):
    with pytest.raises(UnsupportedError, match="sanitize_control_tokens=True"):
        ours.apply_chat_template([{"role": "user", "content": AUDIO_TOKEN}], sanitize_control_tokens=True)


def test_the_small_tokenizer_has_its_special_tokens(folder, ours, tmp_path):
    size, audio_token_id = write_tokenizer(tmp_path)
    assert size == len(ours) and audio_token_id == ours.convert_tokens_to_ids(AUDIO_TOKEN) == size - 1
    assert (tmp_path / "tokenizer.json").read_bytes() == (folder / "tokenizer.json").read_bytes()
    assert {token.content for token in ours.added_tokens_decoder.values() if token.special} == set(SPECIAL_TOKENS)
