"""Fine-tuning TurboCTC end to end: it learns the words, and the folder loads here and in transformers."""

import json
import re

import pytest
import torch
import transformers
from granite_kernels.cpu import has_int8
from torch import nn

from granite_speech import GraniteSpeech5ForCTC, GraniteSpeech5Processor
from granite_speech.cli import main
from granite_speech.config_ctc import GraniteSpeech5CTCConfig
from granite_speech.errors import AudioError, InputError, UnsupportedError
from granite_speech.inputs.audio import load_audio
from granite_speech.inputs.ctc_tokenizer import GraniteSpeech5Tokenizer
from granite_speech.inputs.delta_features import GraniteSpeech5FeatureExtractor
from granite_speech.modules import int8_weight
from granite_speech.training import CTCData, FinetuneOptions, best_path_transcripts, ctc_head_loss, finetune, prepare, read_manifest
from tests.support import tiny_speech
from tests.support.ctc_tokenizers import write_ctc_tokenizer
from tests.support.tiny_speech import TEXTS, write_manifest, write_sound

OPTIONS = FinetuneOptions(steps=120, learning_rate=5e-3)


def write_model(folder, **values):
    """A complete checkpoint with about 60,000 parameters."""
    vocab_size = write_ctc_tokenizer(folder)
    encoder = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 2, "vocab_size": vocab_size}
    encoder |= {"context_size": 16, "max_position_embeddings": 16, "subsample_layers": [1]} | values
    torch.manual_seed(0)
    model = GraniteSpeech5ForCTC(GraniteSpeech5CTCConfig(vocab_size=vocab_size, encoder_config=encoder))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=1.0 / parameter.shape[-1] ** 0.5)
    model.save_pretrained(folder)
    GraniteSpeech5Processor(GraniteSpeech5FeatureExtractor(), GraniteSpeech5Tokenizer.from_folder(folder)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def manifest(tmp_path_factory):
    return write_manifest(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def tuned(base, manifest, tmp_path_factory):
    return finetune(manifest, base, tmp_path_factory.mktemp("tuned") / "out", OPTIONS, validation=manifest, progress=False)


def data(base, manifest, **options) -> CTCData:
    config = GraniteSpeech5CTCConfig.from_pretrained(base)
    processor = GraniteSpeech5Processor.from_pretrained(base)
    return CTCData(read_manifest(manifest), processor, config, **{"batch_seconds": 5.0, **options})


def test_the_model_learns_three_utterances(tuned, manifest):
    assert tuned.steps == 120 and tuned.loss[0] > 1 and tuned.loss[1] < 0.2
    assert tuned.wer[0] > 0.5 and tuned.wer[1] == 0
    model, processor = GraniteSpeech5ForCTC.from_pretrained(tuned.folder), GraniteSpeech5Processor.from_pretrained(tuned.folder)
    assert best_path_transcripts(model, processor, read_manifest(manifest), batch_seconds=0.6) == list(TEXTS)
    records = [json.loads(line) for line in (tuned.folder / "training" / "log.jsonl").read_text().splitlines()]
    assert records[1].keys() == {"step", "epoch", "loss", "ctc", "gradient_norm", "learning_rate", "audio_seconds"}


def test_transformers_reads_the_same_words_from_the_folder(tuned, manifest):
    model, processor = transformers.AutoModelForCTC.from_pretrained(tuned.folder), transformers.AutoProcessor.from_pretrained(tuned.folder)
    ours = GraniteSpeech5ForCTC.from_pretrained(tuned.folder)
    for utterance in read_manifest(manifest):
        inputs = processor(load_audio(utterance.audio).numpy(), sampling_rate=16000, return_tensors="pt")
        with torch.no_grad():
            assert torch.allclose(model(**inputs).logits, ours(**inputs).logits, atol=3e-4)
        assert processor.batch_decode(model.generate(**inputs), skip_special_tokens=True) == [utterance.text]


def test_the_loss_is_that_of_transformers_for_the_same_labels(base, manifest):
    """Per label of the step, where transformers takes the mean of each clip."""
    batch, processor = data(base, manifest).load(0, [0, 1, 2]), GraniteSpeech5Processor.from_pretrained(base)
    reference = transformers.GraniteSpeech5ForCTC.from_pretrained(base, ctc_loss_reduction="sum").eval()
    waveforms = [load_audio(one.audio) for one in read_manifest(manifest)]
    inputs = processor(waveforms, text=list(TEXTS), return_tensors="pt")
    expected = reference(**inputs).loss / (inputs["labels"] != 0).sum()
    ours = ctc_head_loss(GraniteSpeech5ForCTC.from_pretrained(base).eval(), batch, batch.counts)
    assert torch.allclose(ours.total, expected, rtol=1e-4) and batch.counts["characters"] == (inputs["labels"] != 0).sum()


def test_an_adapter_alone_trains_its_targets_and_is_merged(base, manifest, tmp_path):
    targets = ("q_proj", "linear1", "pointwise_lin2")
    options = FinetuneOptions(train=("adapter",), steps=3, learning_rate=1e-2, lora_rank=3, lora_alpha=5, lora_targets=targets)
    report = finetune(manifest, base, tmp_path / "out", options, progress=False)
    before, after = (GraniteSpeech5ForCTC.from_pretrained(one) for one in (base, report.folder))
    changed = {name for name, one in before.state_dict().items() if not torch.equal(one, after.state_dict()[name])}
    assert {name.split(".")[-2] for name in changed} == set(targets), "and no statistics"
    assert len(changed) == 4 * 4, "two of the feed-forwards' in a layer"
    reference = transformers.GraniteSpeech5ForCTC.from_pretrained(report.folder).eval()
    inputs = {"input_features": torch.randn(1, 40, 320)}
    with torch.no_grad():
        assert torch.allclose(reference(**inputs).logits, after(**inputs).logits, atol=3e-4)


def test_the_encoder_trains_its_statistics_in_float32_and_an_untied_head(base):
    config = GraniteSpeech5CTCConfig.from_pretrained(base)
    config.tie_word_embeddings = False
    model = GraniteSpeech5ForCTC(config).bfloat16()
    trained = prepare(model, ("encoder",))
    assert {"ctc_head.weight", "encoder.out.weight", "encoder.layers.0.conv.norm.weight"} <= trained.keys()
    norms = [one for one in model.modules() if isinstance(one, nn.BatchNorm1d)]
    assert norms and all(one.training and one.running_mean.dtype == torch.float32 for one in norms)


def test_an_interrupted_run_resumes_with_the_same_losses(base, manifest, tmp_path):
    options = FinetuneOptions(steps=4, checkpoint_every=2, learning_rate=1e-3, batch_seconds=0.8)
    whole = finetune(manifest, base, tmp_path / "whole", options, progress=False)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        from granite_speech.training import Trainer

        step = Trainer._step

        def interrupted(trainer, batches):
            if trainer.step == 3:
                raise KeyboardInterrupt
            return step(trainer, batches)

        patch.setattr(Trainer, "_step", interrupted)
        finetune(manifest, base, tmp_path / "part", options, progress=False)
    resumed = finetune(manifest, base, tmp_path / "part", options, resume=True, progress=False)
    assert resumed.loss == whole.loss
    assert (tmp_path / "part" / "model.safetensors").read_bytes() == (tmp_path / "whole" / "model.safetensors").read_bytes()


def test_the_command_writes_a_folder(base, manifest, tmp_path, capfd):
    command = ["finetune", str(manifest), "--model", str(base), "--output", str(tmp_path / "out"), "--validation", str(manifest)]
    status, (out, err) = main([*command, "--steps", "2", "--train", "encoder,adapter", "--dtype", "bfloat16"]), capfd.readouterr()
    assert status == 0 and re.fullmatch(r".*out: 2 steps, loss .* → .*, word error rate .*% → .*%\n", out), err
    saved = GraniteSpeech5ForCTC.from_pretrained(tmp_path / "out")
    assert saved.dtype == torch.bfloat16 and saved.encoder.layers[0].conv.norm.weight.dtype == torch.float32


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--train", "projector,adapter"], "train = ('projector', 'adapter') for a model without a language model"),
        (["--train", "language_model"], "expected some of encoder, adapter, or all"),
        (["--train", "encoder", "--ctc-weight", "0.3"], "ctc_weight = 0.3 for a model without"),
        (["--ctc-middle", "0.5"], "ctc_middle = 0.5 for a model without"),
        (["--train", "adapter", "--lora-targets", "gate_proj"], "an adapter for gate_proj; expected projections of the encoder"),
        (["--batch-seconds", "0.1"], "0.5 seconds of audio"),
    ],
)
def test_options_of_other_models_are_refused_by_name(base, manifest, tmp_path, capfd, arguments, message):
    status = main(["finetune", str(manifest), "--model", str(base), "--output", str(tmp_path / "out"), *arguments])
    out, err = capfd.readouterr()
    assert (status, out) == (2, "") and err.startswith("granite-speech: ") and err.count("\n") == 1 and message in err


def test_a_prompt_of_the_validation_is_refused(base, manifest, tmp_path):
    held_out = tmp_path / "held-out.jsonl"
    write_sound(tmp_path / "one.wav", "one")
    held_out.write_text(json.dumps({"audio": "one.wav", "text": "one", "prompt": "translate"}))
    with pytest.raises(InputError, match=r"held-out\.jsonl, line 1: the prompt 'translate'"):
        finetune(manifest, base, tmp_path / "out", validation=held_out, progress=False)
    assert not (tmp_path / "out").exists()


def test_projections_of_an_encoder_are_refused_for_a_language_model(manifest, tmp_path):
    tiny_speech.write_model(tmp_path / "base", adapter=False)
    with pytest.raises(InputError, match="an adapter for linear1; expected projections of the language model"):
        finetune(manifest, tmp_path / "base", tmp_path / "out", FinetuneOptions(lora_targets=("linear1",)), progress=False)


LINES = {
    "a prompt": ({"prompt": "translate"}, InputError, "line 1: the prompt 'translate'"),
    "the blank": ({"text": "one <pad> two"}, InputError, r"labels include \[0\]"),
    "too many labels": (
        {"text": "the quick brown fox jumps over it"},
        AudioError,
        r"line 1: 12 frames of audio \(0\.50 s\) for \d+ labels",
    ),
}


@pytest.mark.parametrize("name", LINES)
def test_lines_that_cannot_be_learned_are_named(base, tmp_path, name):
    values, kind, message = LINES[name]
    sound = write_sound(tmp_path / "one.wav", "one two")
    (tmp_path / "lines.jsonl").write_text(json.dumps({"audio": sound.name, "text": "one two"} | values))
    with pytest.raises(kind, match=message):
        data(base, tmp_path / "lines.jsonl")


def test_a_clip_that_augmentation_leaves_too_short_is_named(base, manifest):
    short = data(base, manifest, augment=lambda waveform, generator, epoch: waveform[:1000])
    with pytest.raises(AudioError, match=r"line 1: 1 frames of audio \(0\.06 s\) for \d+ labels"):
        short.load(0, [0])


@pytest.mark.skipif(not has_int8(), reason="a processor that is not fast at products of 8-bit integers")
def test_int8_weights_are_not_trained(base, monkeypatch):
    monkeypatch.setattr(int8_weight, "_FEWEST", 1)
    with pytest.raises(UnsupportedError, match="training"):
        prepare(GraniteSpeech5ForCTC.from_pretrained(base, quantize="int8"), ("encoder",))
