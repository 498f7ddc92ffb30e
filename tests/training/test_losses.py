"""Losses: cross entropy against the model's own forward, and CTC against the sum over all alignments."""

import itertools
import math

import pytest
import torch

from granite_speech import GraniteSpeechForConditionalGeneration, GraniteSpeechProcessor
from granite_speech.inputs.audio import load_audio
from granite_speech.modules.packing import Segments
from granite_speech.training import (
    Dialogue,
    SpeechData,
    TextData,
    Utterance,
    ctc_loss,
    label_loss,
    prepare,
    read_manifest,
    speech_loss,
    text_loss,
)
from granite_speech.training.batches import Batch, Row
from tests.support.tiny_speech import TEXTS, write_manifest, write_model

PARTS = ("encoder", "projector", "adapter", "language_model")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    write_model(folder)
    return folder


@pytest.fixture(scope="module")
def utterances(tmp_path_factory):
    return read_manifest(write_manifest(tmp_path_factory.mktemp("data")))


@pytest.fixture
def model(folder):
    """In float64, with an adapter that has an effect."""
    model = GraniteSpeechForConditionalGeneration.from_pretrained(folder, dtype="float64")
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, generator=torch.Generator().manual_seed(3))
    return model


@pytest.fixture
def data(folder, utterances, model):
    return SpeechData(utterances, Dialogue(GraniteSpeechProcessor.from_pretrained(folder), model.config), batch_seconds=9.0, ctc=True)


def gradients(model, *values):
    model.zero_grad()
    sum(value.total for value in values).backward()
    return {name: one.grad.clone() for name, one in model.named_parameters() if one.grad is not None}


def test_speech_loss_equals_the_models_own(folder, utterances, model, data):
    """`forward` computes the mean over the answers' tokens from padded prompts, with labels of -100 outside the answers."""
    batch = data.load(0, [0, 1, 2])
    mine = speech_loss(model, batch, batch.counts)
    assert mine.parts.keys() == {"lm"} and mine.total is mine.parts["lm"]

    inputs = data.dialogue.processor.audio_processor([load_audio(one.audio) for one in utterances])
    rows, width = batch.ids.split(batch.rows.lengths), batch.rows.longest
    ids, labels, mask = torch.zeros(3, width, dtype=torch.int64), torch.full((3, width), -100), torch.zeros(3, width)
    for row, (one, text) in enumerate(zip(rows, TEXTS, strict=True)):
        count = len(data.dialogue.answer(text))
        ids[row, : len(one)], mask[row, : len(one)] = one, 1
        labels[row, len(one) - count : len(one)] = one[-count:]
    inputs.pop("audio_embed_sizes")
    whole = model(input_ids=ids, attention_mask=mask, labels=labels, **inputs)
    assert torch.allclose(mine.total, whole.loss, rtol=1e-12, atol=0)
    assert not torch.allclose(mine.total, model(input_ids=ids, attention_mask=mask, labels=ids, **inputs).loss, rtol=1e-3)


def test_ctc_loss_equals_the_sum_over_alignments(model):
    """Sums over all paths of the clips' frames that collapse to the text, for the middle and last layers."""
    frames = torch.randn(7, 160, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    rows = [Row([1, 2], 1, [2, 2], "a"), Row([1, 2], 1, [1], "b")]
    clips = (4, 3)
    batch = Batch.pack(rows, frames.split(clips), audio_token=0, audio_seconds=0.0, device=torch.device("cpu"))
    encoder, segments = model.encoder, Segments(clips, torch.device("cpu"))
    # Only three labels: with 128, four frames would have 128 ** 4 paths.
    encoder.out.weight = torch.nn.Parameter(torch.cat([encoder.out.weight[:3], encoder.out.weight[3:] * 0]))
    encoder.out.bias = torch.nn.Parameter(torch.cat([torch.zeros(3), torch.full((125,), -1e9)]).double())

    middle = encoder.layers[0](encoder.input_linear(frames), clips=segments)
    last = encoder.encode(frames, segments)
    sums = []
    for states in (last, middle):
        probabilities = encoder.ctc_logits(states).softmax(-1).split(clips)
        sums.append(0.0)
        for clip, row in zip(probabilities, rows, strict=True):
            total = 0.0
            for path in itertools.product(range(3), repeat=len(clip)):
                if [one for one, _ in itertools.groupby(path) if one] == row.characters:
                    total += math.prod(clip[frame, label].item() for frame, label in enumerate(path))
            sums[-1] -= math.log(total)
    value = ctc_loss(model, batch, batch.counts, middle=0.25)
    assert batch.counts["characters"] == 3
    assert value.parts["ctc"].item() == pytest.approx(sums[0] / 3, rel=1e-9)
    assert value.parts["ctc_middle"].item() == pytest.approx(sums[1] / 3, rel=1e-9)
    assert value.total.item() == pytest.approx((0.75 * sums[0] + 0.25 * sums[1]) / 3, rel=1e-9)


def test_the_ctc_loss_is_added_with_its_weight(model, data):
    batch = data.load(0, [0, 1])
    language, ctc = speech_loss(model, batch, batch.counts), ctc_loss(model, batch, batch.counts, middle=0.5)
    both = speech_loss(model, batch, batch.counts, ctc_weight=0.3)
    assert torch.allclose(both.total, language.total + 0.3 * ctc.total, rtol=1e-12)
    assert both.parts.keys() == {"lm", "ctc", "ctc_middle"}
    assert not model.encoder.out._forward_hooks, "the hook is removed"


def test_each_loss_has_gradients_for_the_right_parameters(model, data):
    batch = data.load(0, [0, 1, 2])
    prepare(model, PARTS)
    model.eval()
    reached = gradients(model, ctc_loss(model, batch, batch.counts))
    assert all(name.startswith("encoder.") for name in reached) and "encoder.out_mid.weight" in reached
    everything = gradients(model, speech_loss(model, batch, batch.counts, ctc_weight=1.0))
    assert everything.keys() == {name for name, _ in model.named_parameters()}
    assert all(one.abs().max() > 0 for name, one in everything.items() if not name.endswith(("attn.to_kv.bias", "key.bias")))


def test_text_loss_does_not_use_the_adapter(model, data):
    texts = [Utterance(text=one, prompt="?", audio=None, manifest="m", line=1) for one in TEXTS]
    batch = TextData(texts, data.dialogue, batch_tokens=100).load(0, [0, 1, 2])
    prepare(model, PARTS)
    model.eval()
    value = text_loss(model, batch, batch.counts)
    found = gradients(model, value)
    assert all(one.abs().max() == 0 for name, one in found.items() if "lora" in name)
    assert all(name.startswith("language_model.") for name in found)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.zeros_(parameter)
    assert torch.equal(text_loss(model, batch, batch.counts).total, value.total)


@pytest.mark.parametrize("loss", ["ctc", "speech"])
def test_several_batches_have_the_gradient_of_one_large_batch(model, data, loss):
    """Also if their sizes differ."""
    prepare(model, PARTS)
    model.eval()  # in training mode BatchNorm would depend on the batch
    function = ctc_loss if loss == "ctc" else lambda *call: speech_loss(*call, ctc_weight=0.5)
    whole, parts = data.load(0, [0, 1, 2]), [data.load(0, [2]), data.load(0, [0, 1])]
    assert {name: sum(part.counts[name] for part in parts) for name in whole.counts} == whole.counts
    expected = gradients(model, function(model, whole, whole.counts))
    found = gradients(model, *(function(model, part, whole.counts) for part in parts))
    for name, one in expected.items():
        assert torch.allclose(found[name], one, rtol=1e-8, atol=1e-10), name


def test_a_clip_too_short_for_its_text_adds_no_loss(model, data):
    batch = data.load(0, [0])
    rows = [Row([1, 2], 1, [97] * 40, "too long"), Row([1, 2], 1, [97], "right")]
    clips = [batch.frames[:10], batch.frames[:10]]
    pair = Batch.pack(rows, clips, audio_token=0, audio_seconds=0.0, device=torch.device("cpu"))
    alone = Batch.pack(rows[1:], clips[1:], audio_token=0, audio_seconds=0.0, device=torch.device("cpu"))
    counts = {"characters": 1}
    assert torch.allclose(ctc_loss(model, pair, counts).total, ctc_loss(model, alone, counts).total)


def test_label_loss_is_the_distance_from_the_encoders_letters(model, data):
    """Computed here clip by clip and window by window, in plain loops."""
    batch, tokens = data.load(0, [0, 1, 2]), torch.arange(128) + 3
    value = label_loss(model, batch, batch.counts, tokens=tokens)
    width, share = model.config.window_size, model.config.downsample_rate
    embeddings, wanted = model.language_model.get_input_embeddings().weight, []
    for clip in batch.frames.split(batch.clips.lengths):
        alone = Segments((len(clip),), clip.device)
        labels = model.encoder.out(model.encoder.encode(clip.double(), alone)).argmax(1).tolist()
        labels += [0] * (-len(labels) % width)
        wanted += [embeddings[tokens[max(labels[at : at + share])]] for at in range(0, len(labels), share)]
    wanted = torch.stack(wanted).float()
    states = model.encoder.encode(batch.frames.double(), batch.clips)
    vectors = model.project_packed(states, batch.clips)[0].float()
    assert value.total.item() == pytest.approx(((vectors - wanted) ** 2).mean().item() / wanted.square().mean().item(), rel=1e-5)
    assert {name.partition(".")[0] for name in gradients(model, value)} == {"projector"}
    half = label_loss(model, batch, {"answer_tokens": 2 * batch.counts["answer_tokens"]}, tokens=tokens)
    assert half.total.item() == pytest.approx(value.total.item() / 2)


def test_label_loss_can_be_minimized(model, data):
    batch, tokens = data.load(0, [0, 1, 2]), torch.arange(128) + 3
    optimizer = torch.optim.Adam(prepare(model, ("projector",)).values(), lr=0.02)
    distances = []
    for _ in range(60):
        value = label_loss(model, batch, batch.counts, tokens=tokens)
        optimizer.zero_grad()
        value.total.backward()
        optimizer.step()
        distances.append(value.parts["distance"].item())
    assert distances[-1] < 0.3 * distances[0]
