"""Fine-tuning from end to end: words are learned, and the folder that comes out loads here and in transformers."""

import json
import sys
from dataclasses import FrozenInstanceError

import peft  # noqa: F401 (transformers loads adapters through it)
import pytest
import torch
import transformers

from granite_speech import GraniteSpeechForConditionalGeneration, GraniteSpeechProcessor
from granite_speech.cli import main
from granite_speech.errors import CheckpointNotFoundError, InputError, MissingDependencyError
from granite_speech.inputs.audio import load_audio
from granite_speech.training import FinetuneOptions, ctc_transcripts, finetune, read_manifest, transcripts, word_error_rate
from granite_speech.transcription.transcriber import Transcriber, transcript_request
from tests.support.reference_models import scale_logits
from tests.support.tiny_speech import TEXTS, write_manifest, write_model

EVERYTHING = FinetuneOptions(train=("all",), steps=80, learning_rate=1e-2, ctc_weight=0.3)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    write_model(folder)
    return folder


@pytest.fixture(scope="module")
def manifest(tmp_path_factory):
    return write_manifest(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def tuned(base, manifest, tmp_path_factory):
    return finetune(manifest, base, tmp_path_factory.mktemp("tuned") / "out", EVERYTHING, validation=manifest, progress=False)


def theirs(folder):
    model = transformers.AutoModelForSpeechSeq2Seq.from_pretrained(str(folder))
    scale_logits(model)
    return model, transformers.AutoProcessor.from_pretrained(str(folder))


def logits_here_and_there(folder, sound):
    """Of one request, by this package and by transformers with peft, each with its own processor."""
    model, processor = GraniteSpeechForConditionalGeneration.from_pretrained(folder), GraniteSpeechProcessor.from_pretrained(folder)
    request, samples = transcript_request(processor, None), load_audio(sound)
    reference, their_processor = theirs(folder)
    with torch.no_grad():
        here = model(**processor(request, samples)).logits
        there = reference(**their_processor(request, samples[None], return_tensors="pt")).logits
    return here, there, reference


# --- what is learned ---------------------------------------------------------------------------------------------------------------------


def test_three_utterances_are_learned(tuned, manifest):
    assert tuned.steps == 80 and tuned.loss[0] > 5 and tuned.loss[1] < 0.2
    assert tuned.wer[0] > 0.5 and tuned.wer[1] == 0
    transcriber = Transcriber.from_pretrained(tuned.folder)
    utterances = read_manifest(manifest)
    assert [transcriber.transcribe(str(one.audio)) for one in utterances] == list(TEXTS)
    assert transcripts(transcriber.model, transcriber.processor, utterances, batch_seconds=0.1) == list(TEXTS)
    assert ctc_transcripts(transcriber.model, transcriber.processor, utterances) == list(TEXTS)
    assert str(tuned).endswith(f"80 steps, loss {tuned.loss[0]:.3g} → {tuned.loss[1]:.3g}, word error rate {tuned.wer[0]:.1%} → 0.0%")


def test_the_folder_in_transformers_gives_the_same_logits_and_words(tuned, manifest):
    for utterance in read_manifest(manifest):
        here, there, reference = logits_here_and_there(tuned.folder, utterance.audio)
        assert torch.allclose(here, there, atol=3e-4)
    processor = GraniteSpeechProcessor.from_pretrained(tuned.folder)
    inputs = processor(transcript_request(processor, None), load_audio(utterance.audio))
    inputs.pop("input_features_lengths")
    words = reference.generate(**inputs, max_new_tokens=20, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    assert processor.decode(words, skip_special_tokens=True).strip() == utterance.text
    reference.disable_adapters()
    with torch.no_grad():
        without = reference(**inputs).logits
    assert not torch.allclose(without, there, atol=1e-2), "the adapter has been trained, and matters"


def test_what_is_in_the_folder(tuned, base):
    names = {one.name for one in tuned.folder.iterdir()}
    assert names >= {one.name for one in base.iterdir() if one.name != "special_tokens_map.json"}
    assert names >= {"adapter_config.json", "adapter_model.safetensors", "model.safetensors", "training"}
    assert json.loads((tuned.folder / "config.json").read_text())["has_lora_adapter"]
    records = [json.loads(line) for line in (tuned.folder / "training" / "log.jsonl").read_text().splitlines()]
    assert [one["step"] for one in records] == [0, *range(1, 81), 80] and records[-1]["wer"] == 0
    assert records[1].keys() == {
        "step", "epoch", "loss", "lm", "ctc", "ctc_middle", "gradient_norm", "learning_rate", "audio_seconds",
    }  # fmt: skip


@pytest.mark.parametrize("targets", [("q_proj", "v_proj"), ("v_proj", "up_proj", "down_proj")])
def test_a_fresh_adapter_in_transformers(manifest, tmp_path, targets):
    """up_proj and down_proj are names in the encoder, too, where peft must not look for matrices."""
    write_model(tmp_path / "base", adapter=False)
    options = FinetuneOptions(steps=3, learning_rate=1e-2, lora_rank=3, lora_alpha=5, lora_targets=targets)
    report = finetune(manifest, tmp_path / "base", tmp_path / "out", options, progress=False)
    here, there, reference = logits_here_and_there(report.folder, manifest.parent / "train.jsonl-0.wav")
    assert torch.allclose(here, there, atol=3e-4)
    found = {name for name, _ in reference.named_parameters() if "lora_B" in name}
    assert len(found) == 2 * len(targets) and all("language_model" in name for name in found)
    base, tuned = (GraniteSpeechForConditionalGeneration.from_pretrained(tmp_path / name) for name in ("base", "out"))
    changed = {name for name, one in base.named_parameters() if not torch.equal(one, tuned.get_parameter(name))}
    assert changed and all(name.startswith("projector.") for name in changed)


# --- the command -------------------------------------------------------------------------------------------------------------------------


def test_the_command(base, manifest, tmp_path, capfd):
    command = ["finetune", str(manifest), "--model", str(base), "--output", str(tmp_path / "out"), "--validation", str(manifest)]
    command += ["--steps", "3", "--train", "encoder,projector", "--ctc-weight", "0.5", "--learning-rate", "1e-3", "--batch-seconds", "0.8"]
    command += ["--dtype", "bfloat16"]
    status, (out, err) = main(command), capfd.readouterr()
    assert status == 0, err
    assert out.startswith(f"{tmp_path / 'out'}: 3 steps, loss ") and out.count("\n") == 1 and "3/3" in err
    saved = GraniteSpeechForConditionalGeneration.from_pretrained(tmp_path / "out")
    assert {one.dtype for one in saved.parameters()} == {torch.bfloat16}
    files = {one.name: one.read_bytes() for one in (tmp_path / "out").iterdir() if one.is_file()}

    status, (out, err) = main(command), capfd.readouterr()
    assert (status, out) == (2, "") and err.count("\n") == 1 and "training and config.json in it" in err
    status, (again, err) = main([*command, "--resume"]), capfd.readouterr()
    assert status == 0 and again.startswith(f"{tmp_path / 'out'}: 3 steps"), err
    assert {one.name: one.read_bytes() for one in (tmp_path / "out").iterdir() if one.is_file()} == files
    status, (out, err) = main([*command, "--resume", "--seed", "4"]), capfd.readouterr()
    assert (status, out) == (2, "") and "seed = 4 (there 0)" in err


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["--learning-rate", "0"], "learning_rate = 0.0; expected a finite number above 0"),
        (["--learning-rate", "nan"], "learning_rate = nan"),
        (["--train", "projector,ears"], "train = ('projector', 'ears'); expected some of encoder, projector"),
        (["--train", ""], "train = ('',)"),
        (["--ctc-weight", "0.3"], "ctc_weight = 0.3 with train = projector,adapter"),
        (["--dtype", "float16"], "float16"),
        (["--steps", "0"], "steps = 0"),
        (["--lora-targets", "query"], "lora_targets"),
        (["--model", "nowhere at all"], "nowhere at all"),
        (["--validation", "absent.jsonl"], "absent.jsonl"),
        (["--batch-seconds", "0.1"], "0.5 seconds of audio"),
        (["--device", "abacus"], "abacus"),
    ],
)
def test_wrong_values_end_in_one_line(base, manifest, tmp_path, capfd, arguments, said):
    status = main(["finetune", str(manifest), "--model", str(base), "--output", str(tmp_path / "out"), *arguments])
    out, err = capfd.readouterr()
    assert (status, out) == (2, "") and err.startswith("granite-speech: ") and err.count("\n") == 1
    assert said in err


def test_what_would_be_written_over(base, manifest, tmp_path):
    with pytest.raises(InputError, match="the model's own folder"):
        finetune(manifest, base, base, resume=True, progress=False)
    (tmp_path / "config.json").write_text("{}")
    for resume in (False, True):  # a model that was not trained there is nothing to go on from
        with pytest.raises(InputError, match=r"config\.json in it"):
            finetune(manifest, base, tmp_path, resume=resume, progress=False)
    with pytest.raises(CheckpointNotFoundError):
        finetune(manifest, tmp_path / "absent", tmp_path / "out", progress=False)
    assert not (tmp_path / "out").exists()


def test_an_interruption_says_how_to_go_on(base, manifest, tmp_path, capfd, monkeypatch):
    def interrupt(*arguments, **named):
        raise KeyboardInterrupt

    monkeypatch.setattr("granite_speech.training.trainer.Trainer.run", interrupt)
    assert main(["finetune", str(manifest), "--model", str(base), "--output", str(tmp_path / "out")]) == 130
    assert "--resume" in capfd.readouterr().err


# --- options and word errors ----------------------------------------------------------------------------------------------------------


def test_options_are_frozen_and_say_what_trains():
    with pytest.raises(FrozenInstanceError):
        EVERYTHING.seed = 3
    assert EVERYTHING.parts == ("encoder", "projector", "adapter", "language_model")
    assert FinetuneOptions().parts == ("projector", "adapter")
    assert FinetuneOptions(train=["encoder"]) == FinetuneOptions(train=("encoder",))
    assert json.loads(json.dumps(EVERYTHING.identity())) == EVERYTHING.identity()
    for wrong in ({"train": ()}, {"train": ("encoder", "encoder")}, {"epochs": True}, {"warmup": 1.1}, {"seed": -1}, {"steps": 1.0}):
        with pytest.raises(InputError, match=next(iter(wrong))):
            FinetuneOptions(**wrong)


def test_word_errors():
    assert word_error_rate(["one two three four"], ["one too three"]) == 0.5
    assert word_error_rate(["one two", "three"], ["one two", ""]) == pytest.approx(1 / 3)
    assert word_error_rate(["One."], ["one"]) == 1.0


def test_without_jiwer(base, manifest, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "jiwer", None)
    with pytest.raises(MissingDependencyError, match="jiwer"):
        finetune(manifest, base, tmp_path / "out", validation=manifest, progress=False)
    assert not (tmp_path / "out").exists()
    finetune(manifest, base, tmp_path / "out", FinetuneOptions(steps=1), progress=False)
