"""The recipe of the checkpoint inside the package, at a scale that a test can wait for: its stages, its pieces, what it writes."""

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

RECIPE = Recipe(clips=6, unseen=2, lessons=2, lesson=4, texts=12, text_epochs=1, projector_lessons=1, adapter_lessons=1)


def write_data(folder):
    for name, texts in {"speech": ("one", "two one", "three", "two", "one one", "three two"), "unseen": ("one", "two")}.items():
        (folder / name).mkdir(parents=True)
        write_manifest(folder / name, texts).rename(folder / name / "manifest.jsonl")
    return folder


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """All stages in one go."""
    training = Training(write_data(tmp_path_factory.mktemp("recipe")), RECIPE, progress=False)
    stages = {}
    train = training._train

    def noting(stage, *arguments):
        finished = train(stage, *arguments)
        stages[stage] = {name: one.detach().clone() for name, one in training.model.named_parameters()}
        return finished

    training._train = noting
    assert training.run()
    return training, stages


def losses(folder, stage):
    return [one["loss"] for one in map(json.loads, (folder / stage / "log.jsonl").read_text().splitlines()) if "loss" in one]


def test_each_stage_trains_its_part_and_leaves_the_others(done):
    _, stages = done
    encoder, language, projector, adapter = (stages[name] for name in recipe.STAGES)

    def changed(before, after):
        return {name.partition(".")[0] for name in before if not torch.equal(before[name], after[name])}

    assert changed(encoder, language) == {"language_model"}
    assert changed(language, projector) == changed(projector, adapter) == {"projector"}
    assert {name.rpartition(".lora_")[2] for name in adapter.keys() - language.keys()} == {"A.weight", "B.weight"}
    assert all(one.abs().max() > 0 for name, one in adapter.items() if "lora_B" in name)


def test_in_pieces_it_is_the_same_training(done, tmp_path):
    folder = write_data(tmp_path / "pieces")
    assert not Training(folder, RECIPE, seconds=0, progress=False).run()
    pieces = 0
    while not (step := Training(folder, RECIPE, seconds=4, progress=False)).run():
        pieces += 1
    assert pieces >= 1
    for stage in recipe.STAGES:
        assert losses(folder, stage) == losses(done[0].folder, stage)
    for name, one in done[0].model.named_parameters():
        assert torch.equal(dict(step.model.named_parameters())[name], one), name


def test_data_of_another_recipe_is_not_gone_on_with(done):
    with pytest.raises(InputError, match="lesson"):
        Training(done[0].folder, replace(RECIPE, lesson=3), progress=False).run()


def test_a_stage_is_not_gone_on_with_on_other_earlier_stages(done, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(done[0].folder, folder)
    shutil.rmtree(folder / "language_model")
    with pytest.raises(InputError, match=r"projector.*texts"):
        Training(folder, replace(RECIPE, texts=11), progress=False).run()


def test_what_is_written_is_a_checkpoint_of_the_right_size_and_dtype(done, tmp_path):
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
    assert not list(tmp_path.glob("*.unfinished")), "nothing unfinished is left"


def test_the_curves_are_drawn(done, tmp_path):
    training, _ = done
    training.plot(tmp_path / "curve.svg")
    drawn = (tmp_path / "curve.svg").read_text()
    assert drawn.startswith("<?xml") and len(drawn) > 10_000
    curve = read_curve(training.folder / "encoder" / "log.jsonl")
    assert {"loss", "ctc_wer"} <= set().union(*curve) and [one["step"] for one in curve] == sorted(one["step"] for one in curve)


def test_a_curve_is_thinned_to_means_and_keeps_validations(tmp_path):
    log = tmp_path / "log.jsonl"
    log.write_text("".join(json.dumps({"step": step, "loss": step / 10}) + "\n" for step in range(1, 121)) + '{"step": 70, "wer": 0.5}\n')
    curve = read_curve(log)
    assert curve == [{"step": 50, "loss": 2.55}, {"step": 70, "wer": 0.5}, {"step": 100, "loss": 7.55}, {"step": 120, "loss": 11.05}]


def test_words_are_spelled_and_prompts_are_not():
    tokenizer = make_tokenizer()
    pieces = [len(tokenizer.encode(" " + word)) / len(word) for word in VOCABULARY]
    assert sum(pieces) / len(pieces) > 0.75
    for text in (*filter(None, PROMPTS), *TASKS, *VOCABULARY):
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert len(tokenizer.encode("transcribe the speech to text.")) < 20
