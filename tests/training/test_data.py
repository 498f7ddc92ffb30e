"""From utterances to packed batches: the plan, the token ids, and the errors."""

import random
from itertools import pairwise

import pytest
import torch

from granite_speech.config import GraniteSpeechConfig
from granite_speech.errors import AudioError, ConfigError, InputError
from granite_speech.inputs.audio import load_audio
from granite_speech.inputs.processor import GraniteSpeechProcessor
from granite_speech.inputs.requests import transcript_request
from granite_speech.training import Dialogue, SpeechData, TextData, Utterance, plan_batches, read_manifest
from tests.support.tiny_speech import TEXTS, write_manifest, write_model

THIRD = """{% for m in messages %}<|start_of_role|>{{ m.role }}<|end_of_role|>{{ m.content }}<|end_of_text|>
{% endfor %}{% if add_generation_prompt %}<|start_of_role|>assistant<|end_of_role|>{% endif %}"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    write_model(folder)
    return folder


@pytest.fixture
def dialogue(folder):
    return Dialogue(GraniteSpeechProcessor.from_pretrained(folder), GraniteSpeechConfig.from_pretrained(folder))


@pytest.fixture(scope="module")
def utterances(tmp_path_factory):
    return read_manifest(write_manifest(tmp_path_factory.mktemp("data"), (*TEXTS, "one", "two", "one three two one")))


def text(answer, prompt="?", line=1):
    return Utterance(text=answer, prompt=prompt, audio=None, manifest="m.jsonl", line=line)


# --- plans ---------------------------------------------------------------------------------------------------------------------------


def test_a_plan_has_each_utterance_once_and_no_batch_over_budget():
    rng = random.Random(0)
    for _ in range(30):
        budget = rng.randint(1, 500)
        costs = [rng.randint(1, budget) for _ in range(rng.randint(1, 2000))]
        batches = plan_batches(costs, budget, seed=1, epoch=0)
        assert sorted(index for batch in batches for index in batch) == list(range(len(costs)))
        assert all(batch and sum(costs[index] for index in batch) <= budget for batch in batches)


def test_batches_are_full_of_similar_lengths_and_differ_between_epochs():
    rng = random.Random(0)
    costs = [rng.randint(10, 200) for _ in range(5000)]
    plans = [plan_batches(costs, 2000, seed=seed, epoch=epoch) for seed, epoch in ((0, 0), (0, 0), (0, 1), (1, 0))]
    assert plans[0] == plans[1] and plans[0] != plans[2] != plans[3] != plans[0]
    assert sum(costs) / (2000 * len(plans[0])) > 0.9, "batches are nearly full"
    spreads = [max(costs[one] for one in batch) - min(costs[one] for one in batch) for batch in plans[0]]
    assert sum(spreads) / len(spreads) < 30, "lengths in a batch are similar (170 without sorting)"
    means = [sum(costs[one] for one in batch) / len(batch) for batch in plans[0]]
    assert sum(a < b for a, b in pairwise(means)) < 0.65 * len(means), "batches are not ordered by length"
    assert not {frozenset(batch) for batch in plans[0]} & {frozenset(batch) for batch in plans[2]}, "no batch has the same members again"


# --- requests and answers --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("template", ["own", "third", None])
@pytest.mark.parametrize("prompt", [None, "translate the speech to German."])
def test_requests_equal_those_of_the_processor(dialogue, utterances, template, prompt):
    if template != "own":
        dialogue.processor.chat_template = THIRD if template else None
    for one in utterances[:3]:
        samples = load_audio(one.audio)
        expected = dialogue.processor(transcript_request(dialogue.processor, prompt), samples)
        frames = expected["input_features_lengths"][0]
        assert dialogue.request(prompt, frames) == expected["input_ids"][0].tolist()


@pytest.mark.parametrize("template, answer", [("own", " seven left"), ("third", "seven left"), (None, "seven left")])
def test_answers_follow_the_template_and_end(dialogue, template, answer):
    if template != "own":
        dialogue.processor.chat_template = THIRD if template else None
    ids = dialogue.answer("seven left")
    assert ids[-1] == dialogue.tokenizer.eos_token_id and ids.count(ids[-1]) == 1
    assert dialogue.tokenizer.decode(ids[:-1]) == answer


def test_ctc_labels_are_code_points(dialogue):
    assert dialogue.characters("ab ~") == [97, 98, 32, 126]
    for wrong in ("\x80", "’", "\0"):
        with pytest.raises(InputError, match=f"code point {ord(wrong)}"):
            dialogue.characters(f"it{wrong}s")


def test_special_tokens_in_prompts_and_answers_are_refused(dialogue):
    for call in (lambda prompt: dialogue.request(prompt, 30), dialogue.text_request):
        with pytest.raises(InputError, match=r"<\|audio\|>"):
            call("what is <|audio|>?")
    for token in ("<|audio|>", "<|end_of_text|>"):
        with pytest.raises(InputError, match="special token"):
            dialogue.answer(f"one {token} two")


def test_a_processor_from_another_checkpoint_is_refused(dialogue, folder):
    config = GraniteSpeechConfig.from_pretrained(folder)
    config.audio_token_index += 1
    with pytest.raises(ConfigError, match="audio_token_index"):
        Dialogue(dialogue.processor, config)
    config = GraniteSpeechConfig.from_pretrained(folder)
    config.text_config.eos_token_id = None
    with pytest.raises(ConfigError, match="ends an answer"):
        Dialogue(dialogue.processor, config)


# --- batches ---------------------------------------------------------------------------------------------------------------------------


def test_contents_of_a_batch_of_speech(dialogue, utterances):
    data = SpeechData(utterances, dialogue, batch_seconds=3.0, ctc=True)
    batch = data.load(0, [2, 0])
    waves = [load_audio(utterances[index].audio) for index in (2, 0)]
    features = [dialogue.processor.audio_processor(wave)["input_features"][0] for wave in waves]
    assert torch.equal(batch.frames, torch.cat(features))
    assert batch.clips.lengths == tuple(map(len, features)) and batch.frames.dtype == torch.float32
    rows = batch.ids.split(batch.rows.lengths)
    for row, index, frames in zip(rows, (2, 0), batch.clips.lengths, strict=True):
        answer = dialogue.answer(TEXTS[index])
        assert row.tolist() == dialogue.request(None, frames) + answer
    assert torch.equal(batch.ids[batch.answer_places + 1], batch.answers)
    assert batch.answers.tolist() == dialogue.answer(TEXTS[2]) + dialogue.answer(TEXTS[0])
    assert (batch.ids[batch.audio_places] == dialogue.audio_token).all()
    assert len(batch.audio_places) == sum(map(dialogue.audio_tokens, batch.clips.lengths))
    assert batch.positions.tolist() == [place for length in batch.rows.lengths for place in range(length)]
    assert "".join(map(chr, batch.characters.tolist())) == TEXTS[2] + TEXTS[0] and batch.character_lengths == (5, 7)
    assert batch.audio_seconds == (4000 + 8000) / 16000 and batch.names == (utterances[2].where, utterances[0].where)
    assert batch.counts == {"answer_tokens": len(batch.answers), "characters": 12}


def test_contents_of_a_batch_of_texts(dialogue):
    data = TextData([text("two"), text("three one", "what?")], dialogue, batch_tokens=100)
    batch = data.load(0, [1, 0])
    assert batch.frames is None and len(batch.audio_places) == 0 and batch.audio_seconds == 0
    assert batch.answers.tolist() == dialogue.answer("three one") + dialogue.answer("two")
    assert dialogue.tokenizer.decode(batch.ids.tolist()) == (
        "USER: what?\n ASSISTANT: three one<|end_of_text|>USER: ?\n ASSISTANT: two<|end_of_text|>"
    )
    with pytest.raises(InputError, match=r"m\.jsonl, line 7: .* tokens"):
        TextData([text("two"), text("one " * 50, line=7)], dialogue, batch_tokens=40)


def test_features_are_cached_up_to_a_limit(dialogue, tmp_path):
    utterances = read_manifest(write_manifest(tmp_path))
    data = SpeechData(utterances, dialogue, batch_seconds=3.0)
    small = SpeechData(utterances, dialogue, batch_seconds=3.0, cache_bytes=20_000)
    first = [one.load(0, [0, 1, 2]).frames for one in (data, small)]
    for one in utterances:
        one.audio.unlink()
    assert torch.equal(data.load(1, [0, 1, 2]).frames, first[0]), "nothing is read twice"
    with pytest.raises(AudioError, match=r"line 2.*does not exist"):
        small.load(1, [0, 1, 2])


def test_augmentation_follows_from_seed_epoch_and_utterance(dialogue, utterances):
    def louder(waveform, generator, epoch):
        return waveform.mul_(1 + torch.rand(1, generator=generator))  # in place, which must not change the cached waveform

    def make(seed=0, augment=louder):
        return SpeechData(utterances, dialogue, batch_seconds=5.0, seed=seed, augment=augment)

    data = make()
    first = data.load(0, [0, 3]).frames
    assert not torch.equal(data.load(1, [0, 3]).frames, first), "epochs differ"
    assert torch.equal(data.load(0, [0, 3]).frames, first), "an epoch is repeatable"
    assert torch.equal(make().load(0, [0, 3]).frames, first), "other loads have no effect"
    assert torch.equal(make().load(0, [3]).frames, first[-len(make().load(0, [3]).frames) :]), "the rest of the batch has no effect"
    assert not torch.equal(make(seed=1).load(0, [0, 3]).frames, first)
    with pytest.raises(AudioError, match=r"line 1: .*NaN"):
        make(augment=lambda waveform, generator, epoch: waveform * torch.nan).load(0, [0])
    with pytest.raises(AudioError, match="line 1: 100 samples"):
        make(augment=lambda waveform, generator, epoch: waveform[:100]).load(0, [0])


def test_utterances_that_do_not_fit_are_refused(dialogue, utterances, tmp_path):
    with pytest.raises(InputError, match=r"line 6: 1\.0 seconds"):
        SpeechData(utterances, dialogue, batch_seconds=0.9)
    manifest = write_manifest(tmp_path, ("one",))
    clip = {"audio": "train.jsonl-0.wav"}
    for words, message in (
        ("a" * 8, "line 1: 13 frames .* for 15 labels"),
        ("abcdefghijklmn", "for 14 labels"),
        ("naïve ’", "code point 239"),
    ):
        manifest.write_text(str(clip | {"text": words}).replace("'", '"'))
        with pytest.raises(InputError, match=message):
            SpeechData(read_manifest(manifest), dialogue, batch_seconds=5.0, ctc=True)
        SpeechData(read_manifest(manifest), dialogue, batch_seconds=5.0)  # valid without a CTC loss
    manifest.write_text(str(clip | {"text": "one", "prompt": "<|audio|>?"}).replace("'", '"'))
    with pytest.raises(InputError, match="line 1: the prompt"):
        SpeechData(read_manifest(manifest), dialogue, batch_seconds=5.0)
