"""Fine-tuning end to end: the model learns the words, and the resulting folder loads here and in transformers."""

import json
import shutil
import sys
from dataclasses import FrozenInstanceError

import peft  # noqa: F401 (transformers loads adapters through it)
import pytest
import torch
import transformers
from safetensors.torch import save_file

from granite_speech import GraniteSpeechForConditionalGeneration, GraniteSpeechProcessor
from granite_speech.checkpoints import placement
from granite_speech.cli import main
from granite_speech.errors import CheckpointError, CheckpointNotFoundError, InputError, MissingDependencyError
from granite_speech.inputs.audio import load_audio
from granite_speech.inputs.requests import transcript_request
from granite_speech.training import (
    FinetuneOptions,
    Trainer,
    ctc_transcripts,
    finetune,
    read_manifest,
    transcripts,
    word_error_rate,
)
from granite_speech.transcription.transcriber import Transcriber
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
    """Logits for one request from this package and from transformers with peft, each with its own processor, and the reference model."""
    model, processor = GraniteSpeechForConditionalGeneration.from_pretrained(folder), GraniteSpeechProcessor.from_pretrained(folder)
    request, samples = transcript_request(processor, None), load_audio(sound)
    reference, their_processor = theirs(folder)
    with torch.no_grad():
        here = model(**processor(request, samples)).logits
        there = reference(**their_processor(request, samples[None], return_tensors="pt")).logits
    return here, there, reference


# --- learning ----------------------------------------------------------------------------------------------------------------------------


def test_the_model_learns_three_utterances(tuned, manifest):
    assert tuned.steps == 80 and tuned.loss[0] > 5 and tuned.loss[1] < 0.2
    assert tuned.wer[0] > 0.5 and tuned.wer[1] == 0
    transcriber = Transcriber.from_pretrained(tuned.folder)
    utterances = read_manifest(manifest)
    assert [transcriber.transcribe(str(one.audio)) for one in utterances] == list(TEXTS)
    assert transcripts(transcriber.model, transcriber.processor, utterances, batch_seconds=0.1) == list(TEXTS)
    assert ctc_transcripts(transcriber.model, transcriber.processor, utterances) == list(TEXTS)
    assert str(tuned).endswith(f"80 steps, loss {tuned.loss[0]:.3g} → {tuned.loss[1]:.3g}, word error rate {tuned.wer[0]:.1%} → 0.0%")


def test_transformers_computes_the_same_logits_and_words_from_the_folder(tuned, manifest):
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
    assert not torch.allclose(without, there, atol=1e-2), "the adapter was trained, so it has an effect"


def test_the_output_folder_has_all_files_and_a_complete_log(tuned, base):
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
def test_transformers_loads_a_new_adapter(manifest, tmp_path, targets):
    """up_proj and down_proj also exist in the encoder, where peft must not expect an adapter."""
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


def test_the_processor_does_not_decide_the_dtype(base, manifest, tmp_path, monkeypatch):
    monkeypatch.setattr(placement, "has_bfloat16", lambda: pytest.fail("asked for the fastest dtype"))
    report = finetune(manifest, base, tmp_path / "out", FinetuneOptions(steps=1), progress=False)
    saved = GraniteSpeechForConditionalGeneration.from_pretrained(report.folder)
    assert saved.dtype == GraniteSpeechForConditionalGeneration.from_pretrained(base).dtype == torch.float32


# --- the command -------------------------------------------------------------------------------------------------------------------------


def test_the_command_writes_a_folder_and_resumes(base, manifest, tmp_path, capfd):
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
    assert (status, out) == (2, "") and "seed = 4 (was 0)" in err


@pytest.mark.parametrize(
    "arguments, message",
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
def test_invalid_values_give_a_one_line_error(base, manifest, tmp_path, capfd, arguments, message):
    status = main(["finetune", str(manifest), "--model", str(base), "--output", str(tmp_path / "out"), *arguments])
    out, err = capfd.readouterr()
    assert (status, out) == (2, "") and err.startswith("granite-speech: ") and err.count("\n") == 1
    assert message in err


# --- resuming ----------------------------------------------------------------------------------------------------------------------------

FOUR = FinetuneOptions(steps=4, checkpoint_every=1, learning_rate=1e-3)


@pytest.fixture(scope="module")
def finished(base, manifest, tmp_path_factory):
    return finetune(manifest, base, tmp_path_factory.mktemp("finished") / "out", FOUR, validation=manifest, progress=False)


@pytest.fixture(scope="module")
def stopped(base, manifest, tmp_path_factory):
    """Output folder of a run that was interrupted after its second step."""
    output, step = tmp_path_factory.mktemp("stopped") / "out", Trainer._step

    def interrupted(trainer, batches):
        if trainer.step == 2:
            raise KeyboardInterrupt
        return step(trainer, batches)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Trainer, "_step", interrupted)
        finetune(manifest, base, output, FOUR, validation=manifest, progress=False)
    return output


LOGS = {
    "missing": None,
    "empty": lambda lines: "",
    "a truncated line": lambda lines: lines[0][:9],
    "a truncated last line": lambda lines: "".join(lines)[:-9],
    "lines that are not records": lambda lines: '5\n[]\n{"loss": 1}\n{"step": "1"}\n{"step": 1, "loss": "low"}\n\\0\n',
    "a first line that is not JSON": lambda lines: "[" * 100_000 + "\n" + "".join(lines),
    "complete": "".join,
}


def damaged(folder, target, state):
    shutil.copytree(folder, target)
    log = target / "training" / "log.jsonl"
    if LOGS[state] is None:
        log.unlink()
    else:
        log.write_text(LOGS[state](log.read_text().splitlines(keepends=True)))
    return target


@pytest.mark.parametrize("state", LOGS)
def test_a_finished_run_resumes_with_any_log(base, manifest, finished, tmp_path, state):
    folder = damaged(finished.folder, tmp_path / "out", state)
    (folder / "model.safetensors").unlink()
    report = finetune(manifest, base, folder, FOUR, validation=manifest, resume=True, progress=False)
    assert (folder / "model.safetensors").read_bytes() == (finished.folder / "model.safetensors").read_bytes()
    known = {
        "a first line that is not JSON": (finished.loss, finished.wer),
        "complete": (finished.loss, finished.wer),
        "a truncated last line": (finished.loss, (finished.wer[0], None)),
    }
    assert (report.steps, report.loss, report.wer) == (4, *known.get(state, ((None, None), (None, None))))
    assert ("unknown" in str(report)) == (state not in ("complete", "a first line that is not JSON"))


@pytest.mark.parametrize("state", LOGS)
def test_an_interrupted_run_resumes_with_any_log(base, manifest, finished, stopped, tmp_path, state):
    report = finetune(manifest, base, damaged(stopped, tmp_path / "out", state), FOUR, validation=manifest, resume=True, progress=False)
    assert (report.folder / "model.safetensors").read_bytes() == (finished.folder / "model.safetensors").read_bytes()
    assert report.loss[1] == finished.loss[1] and report.wer[1] == finished.wer[1]
    kept = state in ("complete", "a truncated last line", "a first line that is not JSON")
    assert (report.loss[0], report.wer[0]) == ((finished.loss[0], finished.wer[0]) if kept else (None, None))


def test_resuming_without_validation_reports_no_word_error_rate(base, manifest, stopped, tmp_path):
    folder = damaged(stopped, tmp_path / "out", "missing")
    report = finetune(manifest, base, folder, FOUR, resume=True, progress=False)
    assert report.wer is None and report.loss[0] is None and str(report).endswith(f"4 steps, loss unknown → {report.loss[1]:.3g}")


def test_a_log_that_cannot_be_written_is_an_error(base, manifest, finished, tmp_path):
    folder = damaged(finished.folder, tmp_path / "out", "missing")
    (folder / "training" / "log.jsonl").mkdir()
    with pytest.raises(CheckpointError, match="could not be written"):
        finetune(manifest, base, folder, FOUR, resume=True, progress=False)


@pytest.mark.parametrize("facts", ["5", "{}", '{"identity": 5, "step": 1}', '{"identity": {}, "step": "1"}', "[" * 100_000])
def test_an_invalid_training_checkpoint_is_refused(base, manifest, tmp_path, facts):
    (tmp_path / "training").mkdir()
    save_file({"a": torch.zeros(1)}, tmp_path / "training" / "state.safetensors", {"training": facts})
    with pytest.raises(CheckpointError, match="not a training checkpoint"):
        finetune(manifest, base, tmp_path, FOUR, resume=True, progress=False)


def test_the_bundled_checkpoint_can_be_tuned_into_a_folder_named_embedded(manifest, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "embedded").mkdir()
    report = finetune(manifest, "embedded", "embedded", FinetuneOptions(steps=1), progress=False)
    assert (tmp_path / "embedded" / "model.safetensors").is_file() and report.steps == 1


def test_existing_checkpoints_are_not_overwritten(base, manifest, tmp_path):
    with pytest.raises(InputError, match="the model's own folder"):
        finetune(manifest, base, base, resume=True, progress=False)
    (tmp_path / "config.json").write_text("{}")
    for resume in (False, True):  # there is no run to resume
        with pytest.raises(InputError, match=r"config\.json in it"):
            finetune(manifest, base, tmp_path, resume=resume, progress=False)
    with pytest.raises(CheckpointNotFoundError):
        finetune(manifest, tmp_path / "absent", tmp_path / "out", progress=False)
    assert not (tmp_path / "out").exists()


def test_an_interrupted_command_says_how_to_resume(base, manifest, tmp_path, capfd, monkeypatch):
    def interrupt(*arguments, **named):
        raise KeyboardInterrupt

    monkeypatch.setattr("granite_speech.training.trainer.Trainer.run", interrupt)
    assert main(["finetune", str(manifest), "--model", str(base), "--output", str(tmp_path / "out")]) == 130
    assert "--resume" in capfd.readouterr().err


# --- options and word error rates --------------------------------------------------------------------------------------------------------


def test_options_are_immutable_checked_and_list_the_parts():
    with pytest.raises(FrozenInstanceError):
        EVERYTHING.seed = 3
    assert EVERYTHING.parts == ("encoder", "projector", "adapter", "language_model")
    assert FinetuneOptions().parts == ("projector", "adapter")
    assert FinetuneOptions(train=["encoder"]) == FinetuneOptions(train=("encoder",))
    assert json.loads(json.dumps(EVERYTHING.identity())) == EVERYTHING.identity()
    for wrong in ({"train": ()}, {"train": ("encoder", "encoder")}, {"epochs": True}, {"warmup": 1.1}, {"seed": -1}, {"steps": 1.0}):
        with pytest.raises(InputError, match=next(iter(wrong))):
            FinetuneOptions(**wrong)


def test_word_error_rates():
    assert word_error_rate(["one two three four"], ["one too three"]) == 0.5
    assert word_error_rate(["one two", "three"], ["one two", ""]) == pytest.approx(1 / 3)
    assert word_error_rate(["One."], ["one"]) == 1.0


def test_validation_needs_jiwer_and_training_does_not(base, manifest, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "jiwer", None)
    with pytest.raises(MissingDependencyError, match="jiwer"):
        finetune(manifest, base, tmp_path / "out", validation=manifest, progress=False)
    assert not (tmp_path / "out").exists()
    finetune(manifest, base, tmp_path / "out", FinetuneOptions(steps=1), progress=False)
