"""The calls of the processor and of the feature extractor, as users write them, here and in transformers."""

import base64
import copy
import io
import json
import pickle
from collections import UserDict, UserList
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile
import torch
from torch.utils.data import default_collate

from granite_speech.errors import AudioError, InputError, UnsupportedError
from granite_speech.inputs.batch import BatchFeature
from granite_speech.inputs.placeholders import moved, tokens_for
from granite_speech.inputs.recordings import samples_of
from tests.calls.test_tokenizing import MARKED
from tests.support.paths import ROOT
from tests.support.two_libraries import PROMPT, WORDS, Call, comparison, library
from tests.support.uploads import record_uploads

LENGTH = 7800  # that both clips have: transformers gives a padded clip other features
SHORT = "USER: <|audio|>transcribe\n ASSISTANT:"
FILES = [str(ROOT / f"tests/speech/0{number}.flac") for number in (0, 1)]
CHAT = [{"role": "user", "content": "<|audio|>can you transcribe the speech into a written format?"}]
PARTS = (
    "{% for m in messages %}{{ m.role }}: {% for p in m.content %}{% if p.type == 'audio' %}<|audio|>{% else %}{{ p.text }}{% endif %}"
    "{% endfor %}\n{% endfor %}{% if add_generation_prompt %} ASSISTANT:{% endif %}"
)


def process(*args, **options) -> Call:
    """The processor on a prompt, or on what is given, and the first clip."""
    return Call(lambda lib: lib.processor(*(args or [PROMPT]), lib.clips[0], **{"return_tensors": "pt", **options}))


def message(*parts, role="user"):
    return {"role": role, "content": [*parts, {"type": "text", "text": "what?"}]}


def chat(conversation, **options) -> Call:
    """A chat of parts. A function gets the library and returns the conversation."""
    options = {"chat_template": PARTS, "tokenize": True, "return_dict": True, "return_tensors": "pt", **options}
    return Call(lambda lib: lib.processor.apply_chat_template(conversation(lib), **options))


def decoded(lib):
    """Samples of a file in transformers' form, which needs a package for files that may be missing."""
    return lib.clips[0] if lib.name == "transformers" else FILES[0]


def entry(lib):
    array = lib.clips[0]
    return array if lib.name == "transformers" else {"array": array, "sampling_rate": 16000, "path": "x.flac"}


def trained(lib):
    """A collator as fine-tuning scripts have it."""
    processor = lib.new_processor()
    processor.tokenizer.padding_side = "right"
    processor.tokenizer.pad_token = processor.tokenizer.eos_token
    texts = [PROMPT + "seven" + processor.tokenizer.eos_token, SHORT + "nine" + processor.tokenizer.eos_token]
    batch = processor(texts, [clip[:LENGTH] for clip in lib.clips], return_tensors="pt", padding=True)
    labels = batch["input_ids"].clone()
    labels[labels == processor.tokenizer.pad_token_id] = -100
    batch["labels"] = labels
    return {name: value.to("cpu") for name, value in batch.items()}


def reloaded(lib):
    folder = lib.new_folder()
    lib.new_processor().save_pretrained(folder)
    extractor = lib.GraniteSpeechFeatureExtractor.from_pretrained(folder)
    processor = lib.GraniteSpeechProcessor.from_pretrained(str(folder))
    return processor(SHORT, lib.clips[1], return_tensors="pt"), extractor(lib.clips[1]), processor.model_input_names


def extractor_files(lib):
    """Everything that the feature extractor reads and writes."""
    folder, kind = lib.new_folder(), lib.GraniteSpeechFeatureExtractor
    one = kind(projector_window_size=12, projector_downsample_rate=4, padding_value=0.5)
    (path,) = one.save_pretrained(str(folder))
    one.to_json_file(folder / "other.json")
    entries, _ = kind.get_feature_extractor_dict(str(folder))
    ones = [
        kind.from_pretrained(str(folder)),
        kind.from_json_file(folder / "other.json"),
        kind.from_dict(dict(entries)),
        kind.from_pretrained(path),
    ]
    unused = kind.from_pretrained(str(folder), projector_window_size=8, foo=1, return_unused_kwargs=True)
    names = "sampling_rate", "projector_window_size", "projector_downsample_rate", "padding_value", "feature_size", "melspec_kwargs"
    values = [[getattr(each, name) for name in (*names, "padding_side", "return_attention_mask")] for each in (*ones, unused[0])]
    return values, unused[1], Path(path).name, json.loads(one.to_json_string())["projector_window_size"], one.model_input_names


def padded(lib, **options):
    features = [lib.processor.audio_processor(clip)["input_features"][0] for clip in lib.clips]
    return lib.processor.audio_processor.pad([{"input_features": one} for one in features], **options)


CALLS = {
    "a prompt and a clip": process(),
    "keywords": Call(lambda lib: lib.processor(text=PROMPT, audio=lib.clips[0], device="cpu", return_tensors="pt")),
    "lists of one": Call(lambda lib: lib.processor([PROMPT], [lib.clips[0]], return_tensors="pt")),
    "lists": process([PROMPT], return_tensors=None),
    "arrays": process(return_tensors="np"),
    "a tensor": Call(lambda lib: lib.processor(PROMPT, torch.from_numpy(lib.clips[0]), return_tensors="pt")),
    "a tensor as torchaudio loads it": Call(lambda lib: lib.processor(PROMPT, torch.from_numpy(lib.clips[0])[None], return_tensors="pt")),
    "double precision": Call(lambda lib: lib.processor(PROMPT, lib.clips[0].astype(np.float64), return_tensors="pt")),
    "a sound file": Call(lambda lib: lib.processor(PROMPT, decoded(lib), return_tensors="pt")),
    "sound files": Call(lambda lib: lib.processor([PROMPT], [decoded(lib)], return_tensors="pt")),
    "an entry of datasets": Call(lambda lib: lib.processor(PROMPT, entry(lib), return_tensors="pt")),
    "audio by its earlier name": Call(
        lambda lib: lib.processor(PROMPT, audios=lib.clips[0], return_tensors="pt"), differs="transformers refuses audios by name"
    ),
    "a list of numbers": Call(
        lambda lib: lib.processor(PROMPT, lib.clips[0].tolist(), return_tensors="pt"), differs="transformers fails: a list has no ndim"
    ),
    "text_kwargs": process(
        text_kwargs={"padding": "max_length", "max_length": 120, "padding_side": "right"}, audio_kwargs={"device": "cpu"}
    ),
    "common_kwargs for arrays": Call(lambda lib: lib.processor(PROMPT, lib.clips[0], common_kwargs={"return_tensors": "np"})),
    "common_kwargs": Call(lambda lib: lib.processor(PROMPT, lib.clips[0], common_kwargs={"return_tensors": "pt"})),
    "padding to a length": process(padding="max_length", max_length=120),
    "longest": Call(
        lambda lib: lib.processor([PROMPT, SHORT], lib.clips, padding="longest", padding_side="right", return_tensors="pt")["input_ids"]
    ),
    "no padding": Call(lambda lib: lib.processor([PROMPT, SHORT], lib.clips, padding=False, return_tensors=None)["input_ids"]),
    "cutting after the audio": process(truncation=True, max_length=60),
    "cutting audio tokens": Call(
        lambda lib: lib.processor(PROMPT, lib.clips[0], max_length=8, truncation=True, return_tensors="pt"),
        differs="transformers returns a prompt that its model refuses",
        refused=InputError,
    ),
    "no special tokens": process(add_special_tokens=False, pad_to_multiple_of=16),
    "offsets and lengths": process(return_offsets_mapping=True, return_length=True, return_special_tokens_mask=True),
    "answers": process(text_target="seven", return_tensors=None),
    "options without effect": process(images=None, videos=None, verbose=False, return_mm_token_type_ids=False, load_audio_backend="auto"),
    "text alone": Call(lambda lib: lib.processor(["seven", "no sound at all"], return_tensors="pt")),
    "text alone with None": Call(lambda lib: lib.processor("seven", None, return_tensors="pt", padding=True)),
    "a collator": Call(trained),
    "words from features": Call(
        lambda lib: lib.words(lib.model.generate(**lib.processor(PROMPT, lib.clips[0], return_tensors="pt"), max_new_tokens=20))
    ),
    "saved and loaded": Call(reloaded),
    "a processor's parts": Call(lambda lib: (lib.processor.model_input_names, lib.GraniteSpeechProcessor.get_attributes())),
    "a processor's dictionary": Call(lambda lib: (lib.processor.to_dict(), json.loads(lib.processor.to_json_string()))),
    "a processor from its parts": Call(
        lambda lib: (
            lib.GraniteSpeechProcessor.from_args_and_dict(
                (lib.processor.audio_processor, lib.processor.tokenizer), {"audio_token": "<|audio|>"}, chat_template="x"
            ).chat_template
        )
    ),
    "a padding side when loading": Call(
        lambda lib: lib.GraniteSpeechProcessor.from_pretrained(lib.folder, padding_side="right", use_fast=True).tokenizer.padding_side
    ),
    "batch_decode": Call(lambda lib: lib.processor.batch_decode(lib.batch["input_ids"], skip_special_tokens=True)),
    "decode": Call(lambda lib: lib.processor.decode([70, 320], skip_special_tokens=True, clean_up_tokenization_spaces=False)),
    "post_process_multimodal_output": Call(lambda lib: lib.processor.post_process_multimodal_output(torch.tensor([[70, 320], [71, 72]]))),
    "a copy": Call(lambda lib: copy.deepcopy(lib.processor)(SHORT, lib.clips[0], return_tensors="pt")),
    "a chat as text": Call(lambda lib: lib.processor.apply_chat_template(CHAT, add_generation_prompt=True)),
    "a chat as ids": Call(lambda lib: lib.processor.apply_chat_template([{"role": "user", "content": "what?"}], tokenize=True)),
    "a chat as a dictionary": Call(
        lambda lib: lib.processor.apply_chat_template(
            [{"role": "user", "content": "what?"}], tokenize=True, return_dict=True, return_tensors="pt", add_generation_prompt=True
        )
    ),
    "a chat with a clip": chat(lambda lib: [message({"type": "audio", "audio": lib.clips[0]})], add_generation_prompt=True),
    "chats with clips": chat(
        lambda lib: [[message({"type": "audio", "audio": clip[:LENGTH]})] * (1 + index) for index, clip in enumerate(lib.clips)],
        processor_kwargs={"padding": True, "padding_side": "right"},
    ),
    "a chat with a file": chat(lambda lib: [message({"type": "audio", "audio" if lib.name == "transformers" else "path": decoded(lib)})]),
    "a chat with a file called url": chat(
        lambda lib: [message({"type": "audio", "audio" if lib.name == "transformers" else "url": decoded(lib)})]
    ),
    "a chat with an entry of datasets": chat(lambda lib: [message({"type": "audio", "audio": entry(lib)})]),
    "a chat that is not a dictionary": chat(lambda lib: [message({"type": "audio", "audio": lib.clips[0]})], return_dict=False),
    "a chat as arrays": chat(lambda lib: [message({"type": "audio", "audio": lib.clips[0]})], return_tensors="np"),
    "a chat with options of the call": chat(
        lambda lib: [message({"type": "audio", "audio": lib.clips[0]})], padding="max_length", max_length=90, add_special_tokens=False
    ),
    "a chat to be continued": Call(
        lambda lib: lib.processor.apply_chat_template([*CHAT, {"role": "assistant", "content": "nine"}], continue_final_message=True)
    ),
    "a chat with marked answers": Call(
        lambda lib: lib.processor.apply_chat_template(
            [{"role": "user", "content": "what?"}, {"role": "assistant", "content": "nine"}],
            chat_template=MARKED,
            tokenize=True,
            return_dict=True,
            return_assistant_tokens_mask=True,
            return_tensors="pt",
        )
    ),
    "marked answers after a clip": Call(
        lambda lib: lib.processor.apply_chat_template(
            [message({"type": "audio", "audio": lib.clips[0]}), {"role": "assistant", "content": [{"type": "text", "text": "nine"}]}],
            chat_template=PARTS.replace("{{ p.text }}", "{% generation %}{{ p.text }}{% endgeneration %}"),
            tokenize=True,
            return_dict=True,
            return_assistant_tokens_mask=True,
            return_tensors="pt",
        )["assistant_masks"]
    ),
    "a clip in a template of text": Call(
        lambda lib: lib.processor.apply_chat_template([message({"type": "audio", "audio": lib.clips[0]})], tokenize=True, return_dict=True),
        differs="transformers fails in the template; here the parts are joined",
    ),
    "features": Call(lambda lib: lib.processor.audio_processor(lib.clips[0])),
    "features of a batch": Call(lambda lib: lib.processor.audio_processor([torch.from_numpy(lib.clips[0])] * 2, device="cpu")),
    "files of the feature extractor": Call(extractor_files),
    "padded features": Call(padded),
    "padded features to a length": Call(lambda lib: padded(lib, padding="max_length", max_length=120, return_attention_mask=False)),
    "padded features, cut": Call(lambda lib: padded(lib, max_length=40, truncation=True, padding="max_length", return_tensors="np")),
    "fetch_audio": Call(lambda lib: lib.processor.audio_processor.fetch_audio([lib.clips[0], lib.clips[1]])),
}

test_processing = comparison(CALLS)

ours = pytest.fixture(lambda: library("granite_speech"))


# --- the lengths of clips ---------------------------------------------------------------------------------------------------------------


def test_lengths_are_a_tensor_like_the_others(ours):
    batch = ours.processor([PROMPT, SHORT], ours.clips)
    lengths = batch["input_features_lengths"]
    assert lengths.dtype == torch.int64 and lengths.shape == (2,) and lengths.device.type == "cpu"
    assert torch.equal(lengths, torch.tensor([ours.processor.audio_processor.count_frames(len(clip)).encoder for clip in ours.clips]))
    by_hand = {name: value.to("cpu") for name, value in batch.items()}
    expected = ours.model.generate(**batch.to("cpu"), max_new_tokens=4)
    assert torch.equal(ours.model.generate(**by_hand, max_new_tokens=4), expected)
    moved_batch = BatchFeature(batch).to("meta")
    assert {one.device.type for name, one in moved_batch.items() if name != "input_features_lengths"} == {"meta"}
    assert moved_batch.input_features_lengths is lengths


def test_collators_stack_and_index(ours):
    one, other = (ours.processor(PROMPT, clip[:LENGTH]) for clip in ours.clips)
    stacked = default_collate([{name: value[0] for name, value in each.items()} for each in (one, other)])
    assert stacked["input_features_lengths"].tolist() == [24, 24]
    joined = {name: torch.cat([one[name], other[name]]) for name in one}
    together = ours.processor([PROMPT, PROMPT], [clip[:LENGTH] for clip in ours.clips])
    assert all(torch.equal(joined[name], together[name]) for name in together)
    again = pickle.loads(pickle.dumps(together))
    assert type(again) is BatchFeature and torch.equal(again.input_ids, copy.copy(together).input_ids)


def test_batch_features_convert(ours):
    batch = BatchFeature({"a": [[1, 2], [3, 4]], "b": "text", "c": [np.zeros(2), np.ones(2)], "d": []}, tensor_type="pt")
    assert batch.a.dtype == torch.int64 and batch.b == "text" and batch.c.shape == (2, 2) and batch.d.dtype == torch.int64
    arrays = BatchFeature(batch, tensor_type="np", skip_tensor_conversion=["c"])
    assert arrays.a.tolist() == [[1, 2], [3, 4]] and isinstance(arrays.a, np.ndarray) and isinstance(arrays.c, torch.Tensor)
    assert BatchFeature(a=[torch.zeros(1)]).to(torch.float16).a[0].dtype == torch.float16
    with pytest.raises(InputError, match=r"a with rows of \[1, 2\]"):
        BatchFeature({"a": [[1], [1, 2]]}, tensor_type="pt")
    with pytest.raises(InputError, match="return_tensors='tf'"):
        BatchFeature({"a": [1]}, tensor_type="tf")


# --- forms of audio ---------------------------------------------------------------------------------------------------------------------


def test_every_form_of_one_clip(ours, tmp_path):
    """Each gives the features of the array, to the precision of a 16-bit file."""
    clip = (ours.clips[0] * 32768).round().clip(-32768, 32767) / 32768
    expected = ours.processor(PROMPT, clip)
    file = tmp_path / "a.wav"
    soundfile.write(file, clip, 16000, subtype="PCM_16")
    written = file.read_bytes()
    decoder = SimpleNamespace(get_all_samples=lambda: SimpleNamespace(data=torch.from_numpy(clip)[None], sample_rate=16000.0))
    forms = [
        str(file), file, [str(file)], (file,), [[file]], written, io.BytesIO(written),
        {"path": str(file), "bytes": None}, {"bytes": written},
        {"array": clip, "sampling_rate": 16000}, {"array": clip.tolist(), "sampling_rate": 16000}, [{"array": clip}], decoder, [decoder],
        clip.tolist(), tuple(clip.tolist()), [clip.tolist()], np.stack([clip, clip], axis=1), torch.from_numpy(clip),
        UserList([clip]), UserDict(array=clip), "data:audio/wav;base64," + base64.b64encode(written).decode(),
    ]  # fmt: skip
    for form in forms:
        batch = ours.processor(PROMPT, form, sampling_rate=16000)
        assert torch.equal(batch.input_ids, expected.input_ids)
        torch.testing.assert_close(batch.input_features, expected.input_features, rtol=0, atol=1e-5)


def test_each_clip_has_its_own_rate(ours, tmp_path):
    """Rates of entries and files are respected; sampling_rate is that of arrays."""
    low = ours.clips[0][::2].copy()
    file = tmp_path / "a.wav"
    soundfile.write(file, low, 8000, subtype="FLOAT")
    alone = ours.processor(PROMPT, low, sampling_rate=8000)
    entries = [{"array": low, "sampling_rate": 8000}, file, ours.clips[0], [low.tolist()][0]]
    batch = ours.processor([PROMPT] * 4, entries, sampling_rate=8000)
    frames = alone.input_features.shape[1]
    for row in (0, 1, 3):
        torch.testing.assert_close(batch.input_features[row, :frames], alone.input_features[0], rtol=0, atol=1e-5)
    assert batch.input_features_lengths.tolist() == [frames, frames, 2 * frames, frames] or batch.input_features_lengths[2] > 1.9 * frames
    rows = ours.processor([PROMPT, PROMPT], np.stack([low, low]), sampling_rate=8000)
    torch.testing.assert_close(rows.input_features[1], alone.input_features[0], rtol=0, atol=1e-5)


# --- prompts that are expanded already ----------------------------------------------------------------------------------------------------


def test_an_entry_of_datasets_is_a_recording(ours):
    entry = {"array": ours.clips[0], "sampling_rate": 16000}
    assert samples_of(entry, ours.processor, None) == (entry, None)


def test_parts_of_transformers_work_in_the_processor(ours):
    """Its tokenizer, for those who have changed one."""
    theirs = library("transformers").processor.tokenizer
    mixed = ours.GraniteSpeechProcessor(ours.processor.audio_processor, theirs)
    expected = ours.processor(PROMPT, ours.clips[0])
    assert all(torch.equal(value, expected[name]) for name, value in mixed(PROMPT, ours.clips[0]).items())
    assert mixed.apply_chat_template(CHAT) == ours.processor.apply_chat_template(CHAT)


def test_an_expanded_prompt_is_used_as_it_is(ours):
    processor, clips = ours.processor, ours.clips
    sizes = [processor.audio_processor.count_frames(len(clip)).tokens for clip in clips]
    grown = [text.replace("<|audio|>", "<|audio|>" * size) for text, size in zip([PROMPT, SHORT], sizes, strict=True)]
    expected = processor([PROMPT, SHORT], clips)
    for texts in (grown, [grown[0], SHORT], [PROMPT, grown[1]]):
        batch = processor(texts, clips)
        assert all(torch.equal(batch[name], expected[name]) for name in expected)
    both = processor("<|audio|>" * sum(sizes) + "x", clips)
    assert torch.equal(both.input_ids, processor("<|audio|><|audio|>x", clips).input_ids)
    again = processor.apply_chat_template([{"role": "user", "content": grown[0]}], tokenize=True, return_dict=True, audio=clips[0])
    assert again["input_ids"][0].count(322) == sizes[0] and again["input_features"].shape[0] == 1
    same = np.stack([clips[0][:LENGTH], clips[1][:LENGTH]])
    count = processor.audio_processor.count_frames(LENGTH).tokens
    texts = [text.replace("<|audio|>", "<|audio|>" * count) for text in (PROMPT, SHORT)]
    assert torch.equal(processor(texts, same).input_ids, processor([PROMPT, SHORT], same).input_ids)
    assert processor("<|audio|>" * count, np.stack([same[0], same[0]], axis=1))["input_ids"].shape == (1, count)
    for wrong in (grown[0] + "<|audio|>", grown[0].replace("<|audio|>", "", 1), [grown[0], grown[0], SHORT]):
        with pytest.raises(AudioError, match="placeholder"):
            processor(wrong, clips[0])


@pytest.mark.parametrize(
    ("runs", "sizes", "counts"),
    [
        ([1], [6], [6]),
        ([2], [6, 9], [6, 9]),
        ([6], [6], [1] * 6),
        ([15], [6, 9], [1] * 15),
        ([6, 1], [6, 9], [1] * 6 + [9]),
        ([1, 9], [6, 9], [6] + [1] * 9),
        ([3], [3, 3, 3], [3, 3, 3]),
        ([3, 3], [3, 3], [1] * 6),
        ([3, 1], [3, 9, 3, 3], [3, 9, 3, 3]),
        ([3, 2], [3, 9, 9], [1] * 3 + [9, 9]),
        ([5], [6], None),
        ([6, 6], [6], None),
        ([6], [6, 6], None),
        ([7], [6, 9], None),
        ([1], [0], [0]),
        ([], [], []),
        ([], [3], None),
    ],
)
def test_what_runs_of_audio_tokens_stand_for(runs, sizes, counts):
    assert tokens_for(runs, sizes) == counts


def test_ranges_move_with_the_expansion():
    assert moved(["a<A>b<A>c", "d"], "<A>", [3, 2], [[(0, 1), (4, 5), (8, 9), (1, 9)], [(0, 1)]]) == [
        [(0, 1), (10, 11), (17, 18), (1, 18)],
        [(0, 1)],
    ]


def test_masks_after_a_clip_mark_the_answer(ours):
    conversation = [
        message({"type": "audio", "audio": ours.clips[0]}),
        {"role": "assistant", "content": [{"type": "text", "text": "nine five"}]},
    ]
    template = PARTS.replace("{{ p.text }}", "{% if m.role == 'assistant' %}{% generation %}{{ p.text }}{% endgeneration %}{% endif %}")
    options = {"chat_template": template, "tokenize": True, "return_dict": True, "return_assistant_tokens_mask": True}
    batch = ours.processor.apply_chat_template(conversation, **options)
    chosen = [one for one, inside in zip(batch["input_ids"][0], batch["assistant_masks"][0], strict=True) if inside]
    assert ours.processor.decode(chosen) == "nine five"


# --- files, uploads and refusals ----------------------------------------------------------------------------------------------------------


def test_loading_with_settings_and_uploading(ours, tmp_path, monkeypatch):
    uploads = record_uploads(monkeypatch)
    kind = ours.GraniteSpeechProcessor
    processor = kind.from_pretrained(
        ours.folder, padding_side="right", chat_template="x", projector_window_size=12, audio_token="<|audio|>", trust_remote_code=True,
        cache_dir=tmp_path, revision="main", token=None, force_download=False, local_files_only=True,
    )  # fmt: skip
    assert processor.tokenizer.padding_side == "right" and processor.chat_template == "x"
    assert processor.feature_extractor.projector_window_size == 12 and processor.tokenizer.name_or_path == ours.folder
    rate = kind.from_pretrained(ours.folder, sampling_rate=8000).audio_processor
    assert rate.sampling_rate == rate.melspec_kwargs["sample_rate"] == 8000
    processor.save_pretrained(tmp_path / "name", push_to_hub=True, commit_message="words")
    processor.push_to_hub("me/processor", private=True)
    processor.audio_processor.push_to_hub("me/extractor")
    names = ["chat_template.jinja", "preprocessor_config.json", "processor_config.json", "tokenizer.json", "tokenizer_config.json"]
    expected = [("name", names, {"commit_message": "words"}), ("me/processor", names, {"private": True})]
    assert uploads == [*expected, ("me/extractor", ["preprocessor_config.json"], {})]
    entries, rest = kind.get_processor_dict(tmp_path / "name")
    assert entries["audio_processor"]["projector_window_size"] == 12 and rest == {}


@pytest.mark.parametrize(
    ("call", "kind", "words"),
    [
        (lambda lib: lib.processor(PROMPT, lib.clips[0], colour=1), InputError, "colour"),
        (lambda lib: lib.processor(PROMPT, lib.clips[0], text_kwargs={"colour": 1}), InputError, "colour"),
        (lambda lib: lib.processor(PROMPT, lib.clips[0], text_kwargs=[1]), InputError, "text_kwargs of type list"),
        (lambda lib: lib.processor(PROMPT, lib.clips[0], audio_kwargs={"max_length": 9}), InputError, "max_length=9 in audio_kwargs"),
        (
            lambda lib: lib.processor(PROMPT, lib.clips[0], padding=False, text_kwargs={"padding": True}),
            InputError,
            "padding in text_kwargs",
        ),
        (
            lambda lib: lib.processor(PROMPT, lib.clips[0], sampling_rate=1, audio_kwargs={"sampling_rate": 2}),
            InputError,
            "sampling_rate=1",
        ),
        (lambda lib: lib.processor(PROMPT, lib.clips[0], images=[1]), UnsupportedError, "images"),
        (lambda lib: lib.processor(PROMPT, lib.clips[0], return_mm_token_type_ids=True), UnsupportedError, "return_mm_token_type_ids"),
        (lambda lib: lib.processor(PROMPT, "http://example.org/a.wav"), InputError, "network address"),
        (lambda lib: lib.processor(PROMPT, {"text": 1}), InputError, "dictionary of"),
        (lambda lib: lib.processor.audio_processor(lib.clips[0], sampling_rate=8000), AudioError, "sampling rate of 8000"),
        (lambda lib: lib.processor.audio_processor.pad([{"x": 1}]), InputError, "input_features"),
        (lambda lib: lib.GraniteSpeechFeatureExtractor.from_pretrained(lib.folder, colour=1), InputError, "colour"),
        (lambda lib: lib.GraniteSpeechFeatureExtractor.from_dict({}, colour=1), InputError, "colour"),
        (lambda lib: lib.processor.apply_chat_template(CHAT, load_audio_from_video=True), UnsupportedError, "load_audio_from_video"),
        (lambda lib: lib.processor.apply_chat_template([message({"type": "image", "image": 1})]), UnsupportedError, "'image'"),
        (lambda lib: lib.processor.post_process_multimodal_output([1], generation_mode="image"), InputError, "image"),
    ],
)
def test_wrong_calls_are_refused(ours, call, kind, words):
    with pytest.raises(kind, match=words):
        call(ours)


def test_extractors_arrays_and_words(ours):
    extractor = ours.processor.audio_processor
    arrays = extractor(ours.clips[0], sampling_rate=16000, return_tensors="np")
    assert isinstance(arrays["input_features"], np.ndarray) and isinstance(arrays["audio_embed_sizes"], list)
    assert np.array_equal(extractor.fetch_audio(FILES[0]), ours.clips[0])
    batch = ours.processor.apply_chat_template(
        [message({"type": "audio", "path": FILES[0]})][:1], tokenize=True, return_dict=True, return_tensors="pt", add_generation_prompt=True
    )
    assert set(batch) >= {"input_ids", "attention_mask", "input_features", "input_features_mask", "input_features_lengths"}
    chat = [{"role": "user", "content": [{"type": "audio", "path": FILES[0]}, {"type": "text", "text": CHAT[0]["content"][9:]}]}]
    inputs = ours.processor.apply_chat_template(chat, tokenize=True, return_dict=True, return_tensors="pt", add_generation_prompt=True)
    assert ours.words(ours.model.generate(**inputs, max_new_tokens=20)).startswith(WORDS)
