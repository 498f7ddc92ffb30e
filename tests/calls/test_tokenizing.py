"""The tokenizer's calls, as users write them, here and in transformers."""

import copy
import json
import pickle
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal

import numpy as np
import pytest
import torch

from granite_speech.errors import CheckpointError, InputError
from granite_speech.inputs.tokenizer import GraniteSpeechTokenizer
from tests.support.two_libraries import Call, comparison
from tests.support.uploads import record_uploads

TEXTS = ["can you transcribe the speech?", "seven", "Grüße, 日本語 and\n\ntwo  spaces<|audio|> x"]
LONG = TEXTS[0] * 3
CHAT = [{"role": "user", "content": "<|audio|>what?"}, {"role": "assistant", "content": " nine one five "}]
MARKED = (
    "{% for m in messages %}{% if m.role == 'assistant' %}A: {% generation %}{{ m.content }}{{ eos_token }}{% endgeneration %}"
    "{% else %}U: {{ m.content }}\n{% endif %}{% endfor %}"
)
PARTS = [{"role": "user", "content": [{"type": "text", "text": "one "}, {"type": "text", "text": "two"}]}]
OF_PARTS = "{% for m in messages %}{% for p in m.content %}{{ p.text if p['type'] == 'text' else p.type }}|{% endfor %}{% endfor %}"


def tokenizer(lib, **options):
    return lib.AutoTokenizer.from_pretrained(lib.folder, **options) if not options else new(lib, **options)


def new(lib, **options):
    """A tokenizer loaded with options."""
    kind = GraniteSpeechTokenizer if lib.name == "granite_speech" else lib.AutoTokenizer
    return kind.from_pretrained(lib.folder, **options)


def encode(*args, **options) -> Call:
    return Call(lambda lib: tokenizer(lib)(*args, **options))


def changed(change, *args, **options) -> Call:
    """The result of a call after a change of the tokenizer."""

    def run(lib):
        one = tokenizer(lib)
        return change(one), one(*args, **options), one.special_tokens_map, len(one)

    return Call(run)


def collate(name: str, **options):
    """A data collator of transformers on two examples."""
    import transformers

    def run(lib):
        one = tokenizer(lib)
        examples = [dict(one(text)) for text in TEXTS[:2]]
        if name == "DataCollatorForSeq2Seq":
            examples = [{**example, "labels": example["input_ids"][1:]} for example in examples]
        return dict(getattr(transformers, name)(one, **options)(examples))

    return Call(run)


def saved_again(lib, **options):
    """A tokenizer saved and loaded."""
    one, folder = new(lib, **options), lib.new_folder()
    one.pad_token = one.eos_token
    one.add_special_tokens({"additional_special_tokens": ["<x>"], "cls_token": "<c>"})
    one.add_tokens(["seven"])
    one.save_pretrained(folder)
    kind = GraniteSpeechTokenizer if lib.name == "granite_speech" else lib.AutoTokenizer
    again = kind.from_pretrained(folder)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    return again([*TEXTS, "<x> seven <c>"], padding=True), again.special_tokens_map, again.padding_side, len(again), config["pad_token"]


PAD = {"input_ids": [[1, 2, 3], [4]], "attention_mask": [[1, 1, 1], [1]]}
ROWS = [{"input_ids": [1, 2, 3], "token_type_ids": [0, 0, 1]}, {"input_ids": [4], "token_type_ids": [1]}]

CALLS = {
    "one text": encode(TEXTS[2]),
    "a list of one": encode([TEXTS[0]], return_tensors="pt"),
    "a tuple": encode(tuple(TEXTS)),
    "arrays": encode(TEXTS[0], return_tensors="np"),
    "ragged arrays": Call(lambda lib: [row.tolist() for row in tokenizer(lib)(TEXTS, return_tensors="np")["input_ids"]]),
    "an enumeration for tensors": Call(lambda lib: tokenizer(lib)("a", return_tensors=_transformers().TensorType.PYTORCH)),
    "no text": encode("", return_tensors="pt"),
    "padding to a length": encode(TEXTS[1], padding="max_length", max_length=12, return_tensors="pt"),
    "padding to the model's length": Call(lambda lib: tokenizer(lib)(TEXTS[1], padding="max_length", return_tensors="pt")),
    "padding to a multiple": encode(TEXTS, padding="longest", pad_to_multiple_of=8, padding_side="right"),
    "padding and cutting": encode(TEXTS, padding=True, truncation=True, max_length=6, return_tensors="pt"),
    "padding by an enumeration": Call(lambda lib: tokenizer(lib)(TEXTS, padding=_transformers().utils.PaddingStrategy.LONGEST)),
    "do_not_pad": encode(TEXTS, padding="do_not_pad", truncation="do_not_truncate"),
    "max_length alone cuts": encode(TEXTS, max_length=5),
    "max_length with padding=True": encode(TEXTS, padding=True, max_length=5),
    "cutting on the left": Call(lambda lib: new(lib, truncation_side="left")(LONG, truncation=True, max_length=4)),
    "only_first": encode(TEXTS[0], LONG, truncation="only_first", max_length=40),
    "only_second": encode(TEXTS[0], LONG, truncation="only_second", max_length=40),
    "pairs": encode(TEXTS[:2], TEXTS[1:], return_token_type_ids=True, padding=True),
    "a list of pairs": encode([("a", "b"), ("c", "d")]),
    "words": encode([["a", "bc"], ["d"]], is_split_into_words=True),
    "one text of words": encode(["a", "bc"], is_split_into_words=True),
    "answers": encode(TEXTS[0], text_target=TEXTS[1]),
    "answers alone": encode(text_target=TEXTS[:2], padding=True),
    "shorter answers": encode(TEXTS[0], text_target=LONG, max_length=30, max_target_length=3, truncation=True),
    "overflowing": encode(LONG, truncation=True, max_length=10, stride=3, return_overflowing_tokens=True, padding=True),
    "overflowing batch": encode([LONG, "a"], truncation=True, max_length=20, return_overflowing_tokens=True, return_offsets_mapping=True),
    "everything": encode(
        TEXTS, return_token_type_ids=True, return_special_tokens_mask=True, return_offsets_mapping=True, return_length=True, padding=True
    ),
    "no mask": encode(TEXTS, return_attention_mask=False),
    "tokenizer_kwargs": encode(TEXTS[0], tokenizer_kwargs={"max_length": 3, "truncation": True}),
    "special tokens split": encode("a<|audio|>", split_special_tokens=True),
    "encode to a tensor": Call(lambda lib: tokenizer(lib).encode(LONG, return_tensors="pt", truncation=True, max_length=9)),
    "encode without special tokens": Call(lambda lib: tokenizer(lib).encode(TEXTS[0], add_special_tokens=False)),
    "encode a pair": Call(lambda lib: tokenizer(lib).encode("a", "b", padding="max_length", max_length=6, padding_side="right")),
    "tokenize": Call(lambda lib: tokenizer(lib).tokenize(TEXTS[2])),
    "back to text": Call(lambda lib: tokenizer(lib).convert_tokens_to_string(tokenizer(lib).tokenize(TEXTS[2]))),
    "decode": Call(lambda lib: _decoded(tokenizer(lib))),
    "batch_decode of one text": Call(lambda lib: tokenizer(lib).batch_decode([70, 71, 72])),
    "batch_decode of nothing": Call(
        lambda lib: tokenizer(lib).batch_decode([]), differs="transformers gives one empty text for no sequences; here there are none"
    ),
    "ids to tokens": Call(lambda lib: tokenizer(lib).convert_ids_to_tokens([70, 320, 321, 322], skip_special_tokens=True)),
    "ids of an array to tokens": Call(lambda lib: tokenizer(lib).convert_ids_to_tokens(np.array([70, 320]))),
    "the vocabulary": Call(lambda lib: (tokenizer(lib).get_vocab(), tokenizer(lib).vocab, tokenizer(lib).get_added_vocab())),
    "special tokens": Call(lambda lib: (tokenizer(lib).all_special_tokens, tokenizer(lib).all_special_ids)),
    "a special tokens mask": Call(lambda lib: tokenizer(lib).get_special_tokens_mask([5, 320, 7], already_has_special_tokens=True)),
    "numbers": Call(lambda lib: _numbers(tokenizer(lib))),
    "places of tokens": Call(lambda lib: _places(tokenizer(lib)(TEXTS[:2], TEXTS[1:]))),
    "the end of text as pad token": changed(lambda one: setattr(one, "pad_token", one.eos_token), TEXTS, padding=True),
    "an id as pad token": changed(lambda one: setattr(one, "pad_token_id", one.eos_token_id), TEXTS, padding=True),
    "a pad token that is not known": changed(lambda one: setattr(one, "pad_token", "[PAD]"), TEXTS, padding=True),
    "a new pad token": changed(lambda one: one.add_special_tokens({"pad_token": "[PAD]"}), TEXTS, padding=True, return_tensors="pt"),
    "a known pad token": changed(lambda one: one.add_special_tokens({"pad_token": "<|pad|>", "sep_token": "a"}), TEXTS),
    "new special tokens": changed(
        lambda one: (one.add_special_tokens({"additional_special_tokens": ["<x>", "<|audio|>"]}), one.extra_special_tokens), "a<x>b"
    ),
    "new tokens": changed(lambda one: (one.add_tokens(["seven", "xyz"]), one.add_tokens("xyz"), one.add_tokens([])), "seven xyzzy"),
    "the padding side": changed(lambda one: setattr(one, "padding_side", "right"), TEXTS, padding=True),
    "loaded with a padding side": Call(lambda lib: new(lib, padding_side="right", use_fast=True)(TEXTS, padding=True)),
    "loaded with a pad token": Call(lambda lib: new(lib, pad_token="<|end_of_text|>", trust_remote_code=True)(TEXTS, padding=True)),
    "loaded with a new eos token": Call(lambda lib: (new(lib, eos_token="<e>").eos_token_id, new(lib, eos_token="<e>")("a<e>"))),
    "loaded with ends added": Call(lambda lib: new(lib, add_bos_token=True, add_eos_token=True)(["a"], ["b"], return_token_type_ids=True)),
    "ends added later": changed(lambda one: setattr(one, "add_eos_token", True), TEXTS),
    "ends added and cut": Call(lambda lib: new(lib, add_eos_token=True)(LONG, truncation=True, max_length=5)["input_ids"]),
    "loaded with a length": Call(lambda lib: new(lib, model_max_length=7)(LONG, truncation=True)),
    "saved and loaded": Call(saved_again),
    "pad a dictionary": Call(lambda lib: tokenizer(lib).pad(PAD)),
    "pad rows": Call(lambda lib: tokenizer(lib).pad(ROWS, return_tensors="pt", pad_to_multiple_of=4)),
    "pad masks of special tokens": Call(
        lambda lib: tokenizer(lib).pad({**PAD, "special_tokens_mask": [[0, 0, 0], [0]], "token_type_ids": [[1, 1, 1], [1]]})
    ),
    "pad on the right": Call(lambda lib: tokenizer(lib).pad(ROWS, padding_side="right", padding="max_length", max_length=5)),
    "pad tensors": Call(lambda lib: tokenizer(lib).pad([{"input_ids": torch.tensor([1, 2])}, {"input_ids": torch.tensor([3])}])),
    "pad arrays": Call(lambda lib: tokenizer(lib).pad({"input_ids": [np.array([1, 2]), np.array([3])]})),
    "pad one text": Call(lambda lib: tokenizer(lib).pad({"input_ids": [1, 2]}, padding="max_length", max_length=4)),
    "pad nothing": Call(lambda lib: tokenizer(lib).pad(PAD, padding=False, return_attention_mask=False)),
    "pad labels of one length": Call(lambda lib: tokenizer(lib).pad({**PAD, "labels": [[1], [2]]}, return_tensors="pt")),
    "collator with padding": collate("DataCollatorWithPadding", pad_to_multiple_of=4),
    "collator for answers": collate("DataCollatorForSeq2Seq"),
    "collator for language models": collate("DataCollatorForLanguageModeling", mlm=False),
    "chat": Call(lambda lib: tokenizer(lib).apply_chat_template(CHAT)),
    "chat as text": Call(lambda lib: tokenizer(lib).apply_chat_template([CHAT, CHAT[:1]], tokenize=False)),
    "chat as a tensor": Call(lambda lib: tokenizer(lib).apply_chat_template(CHAT[:1], None, None, return_tensors="pt", return_dict=False)),
    "chat, padded and cut": Call(
        lambda lib: tokenizer(lib).apply_chat_template([CHAT, CHAT[:1]], padding=True, truncation=True, max_length=9, return_tensors="pt")
    ),
    "chat to be continued": Call(lambda lib: tokenizer(lib).apply_chat_template(CHAT, tokenize=False, continue_final_message=True)),
    "chat to be continued, stripped": Call(
        lambda lib: tokenizer(lib).apply_chat_template(
            CHAT, chat_template="{% for m in messages %}{{ m.content | trim }}.{% endfor %}", tokenize=False, continue_final_message=True
        )
    ),
    "chat of parts to be continued": Call(
        lambda lib: tokenizer(lib).apply_chat_template(PARTS, chat_template=OF_PARTS, tokenize=False, continue_final_message=True)
    ),
    "chat with marked answers": Call(
        lambda lib: tokenizer(lib).apply_chat_template(CHAT, chat_template=MARKED, return_assistant_tokens_mask=True)
    ),
    "chats with marked answers": Call(
        lambda lib: tokenizer(lib).apply_chat_template(
            [CHAT, [*CHAT, *CHAT]], chat_template=MARKED, return_assistant_tokens_mask=True, padding=True, return_tensors="pt"
        )
    ),
    "chat of parts": Call(lambda lib: tokenizer(lib).apply_chat_template(PARTS, chat_template=OF_PARTS, tokenize=False)),
    "chat of parts in a template of text": Call(
        lambda lib: tokenizer(lib).apply_chat_template(PARTS, tokenize=False),
        differs="transformers fails in the template; here the parts are joined",
    ),
    "chat with documents": Call(
        lambda lib: tokenizer(lib).apply_chat_template(
            CHAT, documents=[{"title": "t", "text": "x"}], chat_template="{{ documents[0].text }}{{ name }}", name="n", tokenize=False
        )
    ),
    "one message of a chat": Call(lambda lib: tokenizer(lib).encode_message_with_chat_template(CHAT[1], CHAT[:1])),
    "tools that are functions": Call(lambda lib: _with_tools(tokenizer(lib), [_tool, _Tools().method, {"name": "x"}])),
    "a tool without a description": Call(
        lambda lib: _with_tools(tokenizer(lib), [lambda x: x]), differs="transformers raises an error too", refused=InputError
    ),
    "a copy": Call(lambda lib: copy.deepcopy(tokenizer(lib))(TEXTS)),
    "pickled": Call(lambda lib: pickle.loads(pickle.dumps(tokenizer(lib)))(TEXTS, padding=True, return_tensors="pt")),
}

test_tokenizing = comparison(CALLS)


def _tool(
    city: str,
    days: int = 3,
    scale: Literal["C", "F"] | None = None,
    places: list[tuple[float, float]] | None = None,
    options: dict[str, bool | int] | None = None,
    anything: Any = None,
) -> list[str]:
    """Says what the weather is.

    It does so for several days.

    Args:
        city: where,
            by its name
        days: how many
        scale: of temperatures (choices: ["C", "F"])
        places: on the map
        options: more
        anything: else

    Returns:
        Texts, one a day.

    Raises:
        ValueError: no such city.
    """


class _Tools:
    def method(self, x: bool | str):
        """Does nothing.

        Args:
            x: a value
        """


def _with_tools(one, tools):
    text = one.apply_chat_template(CHAT, tools=tools, chat_template="{{ tools | tojson }}", tokenize=False)
    return json.loads(text)


def _transformers():
    import transformers

    return transformers


def _decoded(one):
    ids = one(TEXTS[2])["input_ids"] + [320, 321]
    forms = (ids, torch.tensor(ids), np.array(ids), list(np.array(ids)), [ids, ids[:3]], torch.tensor([ids, ids]), 70, torch.tensor(70))
    options = {"skip_special_tokens": True, "clean_up_tokenization_spaces": False, "spaces_between_special_tokens": False}
    return [one.decode(form) for form in forms], one.decode(ids, **options), one.batch_decode([torch.tensor(ids), [70]], **options)


def _numbers(one):
    added = one.num_special_tokens_to_add(), one.num_special_tokens_to_add(pair=True)
    lengths = one.model_max_length, one.max_len_single_sentence, one.vocab_size, len(one)
    return added, lengths, one.padding_side, one.truncation_side, one.is_fast, one.pad_token_type_id, list(one.model_input_names)


def _places(batch):
    spans = [
        batch.token_to_chars(1, 2),
        batch.word_to_tokens(0, 1),
        batch.word_to_chars(1, 0),
        batch.word_to_tokens(0, 0, sequence_index=1),
    ]
    single = (
        batch.tokens(1),
        batch.word_ids(),
        batch.sequence_ids(1),
        batch.char_to_token(4),
        batch.char_to_token(1, 2, 1),
        batch.char_to_word(6),
    )
    other = (
        batch.token_to_word(3),
        batch.token_to_sequence(1, 0),
        batch.n_sequences,
        batch.is_fast,
        batch[0].ids,
        [one.ids for one in batch[0:2]],
    )
    return [tuple(span) for span in spans], single, other


# --- what only this package promises ------------------------------------------------------------------------------------------------------


@pytest.fixture
def ours():
    from granite_speech.checkpoints.hub import EMBEDDED_FOLDER

    return GraniteSpeechTokenizer.from_pretrained(EMBEDDED_FOLDER)


def test_calls_of_several_threads_do_not_disturb_each_other(ours):
    whole, cut = ours(LONG)["input_ids"], ours(LONG, truncation=True, max_length=3)["input_ids"]

    def lengths(limit):
        return {len(ours(LONG, max_length=limit, truncation=limit is not None)["input_ids"]) for _ in range(300)}

    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lengths, [None, 3, None, 3]))
    assert found == [{len(whole)}, {len(cut)}] * 2


def test_a_truncated_call_leaves_no_trace(ours):
    whole = ours(LONG)
    assert len(ours(LONG, truncation=True, max_length=3, split_special_tokens=True)["input_ids"]) == 3
    assert ours(LONG) == whole and ours("<|audio|>")["input_ids"] == [322]


def test_roles_are_warned_about_and_saved(ours, tmp_path):
    with pytest.warns(UserWarning, match=r"'\[PAD\]' is not in the vocabulary.*add_special_tokens"):
        ours.pad_token = "[PAD]"
    ours.add_special_tokens({"pad_token": "[PAD]"})
    ours.unk_token = None
    files = ours.save_pretrained(tmp_path / "a", filename_prefix="x")
    assert {file.rsplit("/", 1)[1] for file in files} == {"x-tokenizer.json", "x-tokenizer_config.json", "chat_template.jinja"}
    ours.save_pretrained(str(tmp_path))
    again = GraniteSpeechTokenizer.from_pretrained(tmp_path)
    assert (again.pad_token, again.pad_token_id, again.unk_token) == ("[PAD]", 323, None)
    with pytest.raises(InputError, match="pad_token_id = 99999"):
        again.pad_token_id = 99999
    with pytest.raises(InputError, match="pad_token = 5"):
        again.pad_token = 5
    with pytest.raises(InputError, match="role 'nobody'"):
        again.add_special_tokens({"nobody": "x"})


def test_effectless_options_are_warned_about(ours):
    with pytest.warns(UserWarning, match="max_length has no effect with padding=True"):
        ours(TEXTS, padding=True, max_length=5)
    with pytest.warns(UserWarning, match="clean_up_tokenization_spaces"):
        ours.decode([70], clean_up_tokenization_spaces=True)
    with pytest.warns(UserWarning, match="generation"):
        ours.apply_chat_template(CHAT, return_assistant_tokens_mask=True)
    ours.model_max_length = 10**30
    with pytest.warns(UserWarning, match="truncation has no effect"):
        ours(TEXTS, truncation=True)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda one: one("a", foo=1), "foo"),
        (lambda one: one("a", padding="most"), "padding = 'most'"),
        (lambda one: one("a", truncation="middle"), "truncation = 'middle'"),
        (lambda one: one("a", max_length=-1), "max_length = -1"),
        (lambda one: setattr(one, "padding_side", "top") or one(TEXTS, padding=True), "padding_side = 'top'"),
        (lambda one: setattr(one, "padding_side", "top") or one.pad(PAD), "padding_side = 'top'"),
        (lambda one: setattr(one, "truncation_side", "top") or one("a", max_length=1), "truncation_side = 'top'"),
        (lambda one: one("a", padding=True, pad_to_multiple_of=0), "pad_to_multiple_of"),
        (lambda one: one("a", max_length=9, truncation=True, padding=True, pad_to_multiple_of=8), "max_length=9"),
        (lambda one: one(LONG, max_length=4, stride=7, truncation=True), "stride=7"),
        (lambda one: one(["a", "b"], ["c"]), "text_pair of 1"),
        (lambda one: one(["a", "b"], "c"), "text_pair of str"),
        (lambda one: one(None), "text of type NoneType"),
        (lambda one: one("a", return_tensors="tf"), "tf"),
        (lambda one: one.decode([70], colour=1), "colour"),
        (lambda one: one.decode([[70], 5]), "token ids of type"),
        (lambda one: one.decode([1.5]), "token ids of type float"),
        (lambda one: one.tokenize(["a", "b"]), "text of type list"),
        (lambda one: one.pad({"attention_mask": [[1]]}), "input_ids"),
        (lambda one: one.pad([{"input_ids": [1]}, {"input_ids": [1], "labels": [2]}]), "labels"),
        (lambda one: one.pad({"input_ids": [[1], [2, 3]], "labels": [[1], [2, 3]]}, return_tensors="pt"), "labels with rows of"),
        (lambda one: one.get_special_tokens_mask([1]), "already_has_special_tokens"),
        (lambda one: one.apply_chat_template(CHAT, add_generation_prompt=True, continue_final_message=True), "add_generation_prompt"),
        (lambda one: one.apply_chat_template(CHAT, chat_template="x", continue_final_message=True), "'content' is not in"),
        (lambda one: one.apply_chat_template(CHAT, tokenize=False, return_assistant_tokens_mask=True), "tokenize=True"),
        (lambda one: one.apply_chat_template(["a"]), "holds str"),
        (lambda one: one.apply_chat_template(CHAT, documents=["x"]), "document"),
        (lambda one: GraniteSpeechTokenizer.from_pretrained("embedded", paddingside="left"), "paddingside"),
        (lambda one: GraniteSpeechTokenizer.from_pretrained("embedded", padding_side="top"), "padding_side"),
        (lambda one: one.save_pretrained(""), "save_directory"),
    ],
)
def test_wrong_calls_are_refused(ours, call, words):
    with pytest.raises(InputError, match=words):
        call(ours)


def test_folders_that_are_files_and_uploads(ours, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="which is a file"):
        ours.save_pretrained(tmp_path / "file")
    uploads = record_uploads(monkeypatch)
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "secret.txt").write_text("")
    ours.save_pretrained(tmp_path / "old", push_to_hub=True, private=True)
    assert ours.push_to_hub("me/name", commit_message="words", token="t") == "me/name"
    names = ["chat_template.jinja", "tokenizer.json", "tokenizer_config.json"]
    assert uploads == [("old", names, {"private": True}), ("me/name", names, {"commit_message": "words", "token": "t"})]
    assert ours.save_vocabulary(tmp_path / "v") == (str(tmp_path / "v/vocab.json"), str(tmp_path / "v/merges.txt"))
