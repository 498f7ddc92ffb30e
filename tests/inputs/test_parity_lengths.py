"""The processor, the features and the model agree on the number of audio tokens at every length."""

import pytest
import torch
import transformers

from granite_speech import GraniteSpeechProcessor
from granite_speech.inputs.features import count_frames
from tests.support.random_checkpoint import write_checkpoint

HOP, PAIR, WINDOW, CONTEXT = 160, 320, 15 * 320, 200 * 320
# transformers pads by reflection, which needs more samples than it reflects.
FIRST = 257
LENGTHS = sorted(
    {
        multiple * unit + offset
        for unit, multiples in ((HOP, (2, 3, 7)), (PAIR, (2, 5, 31)), (WINDOW, (1, 2, 3)), (CONTEXT, (1, 2)))
        for multiple in multiples
        for offset in (-161, -1, 0, 1, 159)
        if multiple * unit + offset >= FIRST
    }
)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    model = write_checkpoint(folder)
    return model, GraniteSpeechProcessor.from_pretrained(folder), transformers.AutoProcessor.from_pretrained(str(folder))


def test_there_are_enough_lengths():
    assert len(LENGTHS) >= 40


@pytest.mark.parametrize("samples", LENGTHS)
def test_inputs_equal_those_of_transformers(samples, checkpoint):
    _, ours, theirs = checkpoint
    audio = 0.1 * torch.randn(samples, generator=torch.Generator().manual_seed(samples))
    text = "USER: <|audio|>transcribe the speech\n ASSISTANT:"
    mine, expected = ours(text, audio), theirs(text, audio[None], return_tensors="pt")
    assert torch.equal(mine["input_ids"], expected["input_ids"])
    assert torch.equal(mine["attention_mask"], expected["attention_mask"])
    assert torch.equal(mine["input_features_mask"], expected["input_features_mask"])
    assert float((mine["input_features"] - expected["input_features"]).abs().max()) <= 2e-5
    assert mine["input_features_lengths"].tolist() == [mine["input_features"].shape[1]]


def test_token_counts_match_features_and_projector_at_every_length(checkpoint):
    """From one sample to twelve seconds in steps of 37 samples: counted, extracted, and projected."""
    model, processor, _ = checkpoint
    samples = list(range(1, 12 * 16000, 37))
    noise = torch.randn(samples[-1], generator=torch.Generator().manual_seed(0))
    extractor, projector = processor.audio_processor, model.projector
    for start in range(0, len(samples), 400):
        batch = samples[start : start + 400 : 7]
        _, frames = extractor.extract_packed([noise[:one] for one in batch], "cpu")
        for one, length in zip(batch, frames, strict=True):
            assert count_frames(one).encoder == length
    for one in samples:
        count = count_frames(one)
        assert count.tokens == projector.tokens(count.encoder) == -(-((one // 160 + 1) // 2) // 15) * 3
    for one in [160, *samples[len(samples) // 12 :: len(samples) // 12]]:  # the processor refuses a clip without a token
        inputs = processor("<|audio|>", noise[:one])
        vectors = model.get_audio_features(inputs["input_features"], inputs["input_features_lengths"]).pooler_output
        assert int((inputs["input_ids"] == model.config.audio_token_index).sum()) == vectors.shape[1] == count_frames(one).tokens
