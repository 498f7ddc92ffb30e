"""The recipe of the bundled checkpoint at a small scale: its stages, resuming, and the files it writes."""

import json
import shutil
from dataclasses import replace

import pytest
import torch

from granite_speech import GraniteSpeechForConditionalGeneration, GraniteSpeechProcessor
from granite_speech.errors import InputError
from granite_speech.training.bundled_checkpoint import recipe
from granite_speech.training.bundled_checkpoint.recipe import Recipe, Training, read_curve
from granite_speech.training.bundled_checkpoint.small_model import PROMPTS, TASKS, make_tokenizer
from granite_speech.training.bundled_checkpoint.vocabulary import VOCABULARY
from tests.support.tiny_speech import write_manifest

RECIPE = Recipe(clips=6, unseen=2, lessons=2, lesson=4, texts=12, text_epochs=1, projector_lessons=1, adapter_lessons=1, request_lessons=1)


def write_data(folder):
    for name, texts in {"speech": ("one", "two one", "three", "two", "one one", "three two"), "unseen": ("one", "two")}.items():
        (folder / name).mkdir(parents=True)
        write_manifest(folder / name, texts).rename(folder / name / "manifest.jsonl")
    return folder


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """A run of all stages without a stop, and the weights after each stage."""
    training = Training(write_data(tmp_path_factory.mktemp("recipe")), RECIPE, progress=False)
    stages = {}
    train = training._train

    def record(stage, *arguments):
        finished = train(stage, *arguments)
        stages[stage] = {name: one.detach().clone() for name, one in training.model.named_parameters()}
        return finished

    training._train = record
    assert training.run()
    return training, stages


def losses(folder, stage):
    return [one["loss"] for one in map(json.loads, (folder / stage / "log.jsonl").read_text().splitlines()) if "loss" in one]


def test_each_stage_changes_only_its_part(done):
    _, stages = done
    encoder, language, projector, adapter, requests = (stages[name] for name in recipe.STAGES)

    def changed(before, after):
        return {name.partition(".")[0] for name in before if not torch.equal(before[name], after[name])}

    assert changed(encoder, language) == {"language_model"}
    assert changed(language, projector) == changed(projector, adapter) == {"projector"}
    assert {name.rpartition(".lora_")[1] for name in adapter if not torch.equal(adapter[name], requests[name])} == {"", ".lora_"}
    assert changed(adapter, requests) == {"projector", "language_model"}
    assert {name.rpartition(".lora_")[2] for name in adapter.keys() - language.keys()} == {"A.weight", "B.weight"}
    assert all(one.abs().max() > 0 for name, one in adapter.items() if "lora_B" in name)


def test_a_run_in_pieces_equals_one_without_a_stop(done, tmp_path):
    folder = write_data(tmp_path / "pieces")
    assert not Training(folder, RECIPE, seconds=0, progress=False).run()
    seconds = 1  # more for each piece, so that a slow machine gets to the end too
    while not (step := Training(folder, RECIPE, seconds=seconds, progress=False)).run():
        seconds += 1
    assert seconds > 1
    for stage in recipe.STAGES:
        assert losses(folder, stage) == losses(done[0].folder, stage)
    for name, one in done[0].model.named_parameters():
        assert torch.equal(dict(step.model.named_parameters())[name], one), name


def test_resuming_with_another_recipe_is_refused(done):
    with pytest.raises(InputError, match="lesson"):
        Training(done[0].folder, replace(RECIPE, lesson=3), progress=False).run()


def test_resuming_a_stage_after_different_earlier_stages_is_refused(done, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(done[0].folder, folder)
    shutil.rmtree(folder / "language_model")
    with pytest.raises(InputError, match=r"projector.*texts"):
        Training(folder, replace(RECIPE, texts=11), progress=False).run()


def test_the_written_checkpoint_is_small_and_loads_in_float32(done, tmp_path):
    training, _ = done
    expected = {name: one.detach().to(torch.bfloat16).float() for name, one in training.model.named_parameters()}
    training.write(tmp_path)
    assert sum(file.stat().st_size for file in tmp_path.glob("*.safetensors")) < 8_000_000
    assert json.loads((tmp_path / "config.json").read_text())["torch_dtype"] == "float32"
    model = GraniteSpeechForConditionalGeneration.from_pretrained(tmp_path)
    assert model.dtype == torch.float32
    for name, one in model.named_parameters():
        assert torch.equal(one, expected[name]), name
    assert GraniteSpeechProcessor.from_pretrained(tmp_path).tokenizer.encode("seven") == training.tokenizer.encode("seven")
    assert not list(tmp_path.glob("*.unfinished")), "no unfinished file remains"


def test_the_curves_are_plotted(done, tmp_path):
    training, _ = done
    training.plot(tmp_path / "curve.svg")
    plot = (tmp_path / "curve.svg").read_text()
    assert plot.startswith("<?xml") and len(plot) > 10_000
    curve = read_curve(training.folder / "encoder" / "log.jsonl")
    assert {"loss", "ctc_wer"} <= set().union(*curve) and [one["step"] for one in curve] == sorted(one["step"] for one in curve)


def test_a_curve_has_average_losses_and_all_validations(tmp_path):
    log = tmp_path / "log.jsonl"
    log.write_text("".join(json.dumps({"step": step, "loss": step / 10}) + "\n" for step in range(1, 121)) + '{"step": 70, "wer": 0.5}\n')
    curve = read_curve(log)
    assert curve == [{"step": 50, "loss": 2.55}, {"step": 70, "wer": 0.5}, {"step": 100, "loss": 7.55}, {"step": 120, "loss": 11.05}]


def test_words_are_tokenized_into_characters_and_prompts_are_not():
    tokenizer = make_tokenizer()
    pieces = [len(tokenizer.encode(" " + word)) / len(word) for word in VOCABULARY]
    assert sum(pieces) / len(pieces) > 0.75
    for text in (*filter(None, PROMPTS), *TASKS, *VOCABULARY):
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert len(tokenizer.encode("transcribe the speech to text.")) < 20
