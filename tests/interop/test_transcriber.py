"""A `Transcriber` with a live model of transformers gives what it gives with this package's model of the same weights."""

import copy
import pickle
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import IA3Config, LoraConfig, PromptTuningConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import nn

import granite_speech
from granite_speech import (
    Engine,
    GraniteSpeechForConditionalGeneration,
    GraniteSpeechProcessor,
    InputError,
    Transcriber,
    UnsupportedError,
    accelerate,
    restore,
)
from granite_speech.checkpoints.hub import EMBEDDED_FOLDER
from granite_speech.engine import runtime
from granite_speech.inputs.requests import transcript_request
from granite_speech.transcription.live_models import own_processor, running_model
from granite_speech.transcription.transcript import Segment
from tests.support.live_models import bundled, language_model, speech
from tests.support.random_checkpoint import write_checkpoint
from tests.support.reference_models import set_adapter
from tests.support.spoken import SPEECH, load, sentences

SPOKEN = sentences()
FILES = [SPEECH / one.audio for one in SPOKEN]
TEXTS = [one.text for one in SPOKEN]
QV = LoraConfig(r=4, lora_alpha=16, target_modules=["q_proj", "v_proj"], init_lora_weights=False)


@pytest.fixture(scope="module")
def processor() -> Any:
    """transformers' processor of the bundled checkpoint."""
    return transformers.AutoProcessor.from_pretrained(EMBEDDED_FOLDER)


@pytest.fixture(scope="module")
def live() -> Any:
    return accelerate(bundled())


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A checkpoint with random weights and an adapter."""
    folder = tmp_path_factory.mktemp("random")
    write_checkpoint(folder)
    return folder


@pytest.fixture
def random(folder: Path) -> Any:
    return transformers.GraniteSpeechForConditionalGeneration.from_pretrained(str(folder)).eval()


@pytest.fixture(scope="module")
def random_processor(folder: Path) -> GraniteSpeechProcessor:
    return GraniteSpeechProcessor.from_pretrained(folder)


@pytest.fixture
def transcriber(random: Any, random_processor: GraniteSpeechProcessor) -> Iterator[Transcriber]:
    """Of the random checkpoint."""
    with Transcriber(accelerate(random), random_processor) as transcriber:
        yield transcriber


def answer(transcriber: Transcriber) -> str:
    """A short text, which random weights do not end."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", granite_speech.TruncatedAnswerWarning)
        return transcriber.transcribe(FILES[0], max_new_tokens=12, compression_ratio_threshold=None)


def own_answer(folder: Path, change: Callable[[Any], Any] = lambda model: None) -> str:
    """The text of this package's model of the random checkpoint, after a change."""
    model = GraniteSpeechForConditionalGeneration.from_pretrained(folder)
    change(model)
    with Transcriber(model, GraniteSpeechProcessor.from_pretrained(folder)) as own:
        return answer(own)


def assert_equal(found: Sequence[Segment], expected: Sequence[Segment]) -> None:
    """Segments and their words, but for the last bits of confidences."""
    for one, other in zip(found, expected, strict=True):
        assert replace(one, words=None, confidence=None) == replace(other, words=None, confidence=None)
        assert one.words and one.confidence == pytest.approx(other.confidence, abs=1e-3)
        for word, right in zip(one.words, other.words, strict=True):
            assert asdict(word) == pytest.approx(asdict(right), abs=1e-3)


def test_texts_and_segments_are_those_of_this_packages_model(live: Any, processor: Any):
    pause = torch.zeros(8000)
    recording = torch.cat([part for one in SPOKEN for part in (one.waveform(16_000), pause)])
    with Transcriber(*load()) as ours, Transcriber(live, processor) as theirs:
        assert theirs.transcribe(FILES) == TEXTS
        expected, found = (one.transcribe(recording, word_timestamps=True) for one in (ours, theirs))
        assert len(found.segments) > 5
        assert_equal(found.segments, expected.segments)
        assert granite_speech.transcribe(FILES[0], model=theirs) == TEXTS[0]


def test_either_packages_processor_serves(live: Any, processor: Any):
    own = GraniteSpeechProcessor.from_pretrained(EMBEDDED_FOLDER)
    made = own_processor(processor)
    assert own_processor(own) is own
    assert made.chat_template == own.chat_template and made.audio_token == own.audio_token
    assert made.tokenizer.name_or_path == processor.tokenizer.name_or_path
    clip = SPOKEN[0].waveform(16_000)
    for name, one in own("<|audio|>yes", clip).items():
        assert torch.equal(made("<|audio|>yes", clip)[name], one), name
    with Transcriber(live, own) as transcriber:
        assert transcriber.transcribe(FILES[:3]) == TEXTS[:3]


def test_a_processor_keeps_what_was_changed_in_it(processor: Any):
    changed = copy.deepcopy(processor)
    changed.chat_template = "{{ messages[0]['content'] }}!"
    changed.tokenizer.add_tokens(["new-token"])
    made = own_processor(changed)
    assert made.chat_template == changed.chat_template
    assert made.tokenizer.convert_tokens_to_ids("new-token") == changed.tokenizer.convert_tokens_to_ids("new-token")


def test_the_adapter_is_on_however_transformers_left_it(transcriber: Transcriber, random: Any, folder: Path):
    with_adapter, without = own_answer(folder), own_answer(folder, lambda model: model.disable_adapters())
    assert with_adapter != without
    assert answer(transcriber) == with_adapter
    random.requires_grad_(False)
    set_adapter(random, False)  # as after a text without audio
    assert answer(transcriber) == with_adapter
    layer = language_model(random).layers[0].self_attn.q_proj
    assert layer.disable_adapters and not any(one.requires_grad for one in random.parameters()), "the live model is left as it is"


def test_a_model_of_peft(folder: Path, tmp_path: Path, random_processor: GraniteSpeechProcessor):
    for one in folder.iterdir():
        if not one.name.startswith("adapter"):
            (tmp_path / one.name).write_bytes(one.read_bytes())
    plain = transformers.GraniteSpeechForConditionalGeneration.from_pretrained(str(tmp_path)).eval()
    torch.manual_seed(0)
    model = get_peft_model(accelerate(plain), QV).eval()
    inputs = random_processor(transcript_request(random_processor), SPOKEN[0].waveform(16_000))
    del inputs["input_features_lengths"]  # which transformers does not know

    def expected() -> str:
        """What transformers' own loop and modules give for the whole recording."""
        restore(model)
        ids = model.generate(**inputs, max_new_tokens=12)[0, inputs["input_ids"].shape[1] :]
        accelerate(model)
        return random_processor.decode(ids, skip_special_tokens=True).strip()

    def found() -> str:
        with Transcriber(model, random_processor) as transcriber:
            return answer(transcriber)

    texts = [expected()]
    assert found() == texts[0]
    with model.disable_adapter():
        texts.append(expected())
        assert found() == texts[1]
    for module in model.modules():
        if isinstance(module, LoraLayer):
            module.set_scale("default", 9.0)
    texts.append(expected())
    assert found() == texts[2]
    model.merge_adapter()
    assert found() == texts[2]
    assert len(set(texts)) == 3


def test_captured_steps_follow_the_live_model(transcriber: Transcriber, random: Any, folder: Path, monkeypatch):
    # A replay runs the same function again; what a real capture allows is tested in tests/engine.
    monkeypatch.setattr(runtime, "_can_be_captured", lambda model: True)
    captured, replays = [], []

    def capture(function: Callable[[], None]) -> Callable[[], None]:
        captured.append(function)
        return lambda: (replays.append(1), function())

    twin = running_model(random)
    twin.runtime.make_capture = lambda device: capture
    expected = own_answer(folder)
    assert [answer(transcriber) for _ in range(3)] == [expected] * 3 and captured and replays
    count, norm = len(captured), language_model(random).norm
    with torch.no_grad():
        norm.weight.neg_()
    assert answer(transcriber) == own_answer(folder, lambda model: model.decoder.norm.weight.data.neg_()) != expected
    assert len(captured) == count, "in place: the same graphs read the new values"
    layer = language_model(random).layers[0].self_attn.q_proj
    layer.set_scale("default", 3.0)
    answer(transcriber)
    answer(transcriber)
    assert running_model(random) is twin and len(captured) > count, "a scale is read when a graph is captured"


def test_changes_of_the_live_model_change_the_next_transcript(transcriber: Transcriber, random: Any, folder: Path):
    def in_place(model: Any) -> None:
        with torch.no_grad():
            (model if model is not random else language_model(random)).get_input_embeddings().weight.neg_()

    def replaced(model: Any) -> None:
        in_place(model)
        encoder = speech(random).encoder if model is random else model.encoder
        encoder.input_linear.weight = nn.Parameter(encoder.input_linear.weight.detach().flip(0))

    before = answer(transcriber)
    texts = [before]
    in_place(random)
    texts.append(answer(transcriber))
    assert texts[-1] == own_answer(folder, in_place)
    in_place(random)
    replaced(random)
    texts.append(answer(transcriber))
    assert texts[-1] == own_answer(folder, replaced)
    assert len(set(texts)) == 3


def test_another_dtype_and_another_vocabulary(transcriber: Transcriber, random: Any, folder: Path):
    before = answer(transcriber)
    random.double()
    assert answer(transcriber) == own_answer(folder, lambda model: model.double())
    random.float()
    size = language_model(random).embed_tokens.weight.shape[0]
    random.resize_token_embeddings(size + 40, mean_resizing=False)
    with torch.no_grad():
        for module in (language_model(random).embed_tokens, random.get_output_embeddings()):
            module.weight[size:] = 0
    assert answer(transcriber) == before
    random.get_output_embeddings().bias = nn.Parameter(torch.zeros(size + 40).index_fill(0, torch.tensor(size + 30), 1e4))
    assert answer(transcriber) != before, "tokens that were added can be chosen"


def test_options_of_generation_are_followed(transcriber: Transcriber, random: Any):
    before = answer(transcriber)
    random.generation_config.eos_token_id = list(range(random.config.text_config.vocab_size))
    assert answer(transcriber) != before


def test_logits_are_divided_by_logits_scaling(transcriber: Transcriber, random: Any, folder: Path, random_processor: Any):
    own = GraniteSpeechForConditionalGeneration.from_pretrained(folder)
    inputs = random_processor("<|audio|>yes", SPOKEN[0].waveform(16_000))
    with torch.no_grad():
        found, expected = running_model(random)(**inputs).logits, own(**inputs).logits
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
    assert random.config.text_config.logits_scaling == 8


def test_the_encoder_gives_its_ctc_log_probabilities(live: Any, processor: Any):
    inputs = own_processor(processor)("<|audio|>yes", SPOKEN[0].waveform(16_000))

    def log_probabilities(model: Any) -> torch.Tensor:
        with Engine(model, None, max_rows=1) as engine:
            return engine.submit(inputs=inputs, max_new_tokens=1, ctc=True).result().ctc_logprobs

    expected = log_probabilities(load()[0])
    torch.testing.assert_close(log_probabilities(running_model(live)), expected, rtol=0, atol=1e-4)
    with torch.no_grad():
        speech(live).encoder.out.bias[3] += 4
        found = log_probabilities(running_model(live))
        speech(live).encoder.out.bias[3] -= 4
    assert not torch.allclose(found, expected, atol=1e-2)


def hooked(model: Any) -> None:
    speech(model).encoder.layers[1].register_forward_hook(lambda module, arguments, output: None)


def with_own_method(model: Any) -> None:
    model.get_audio_features = lambda *arguments, **options: None


def with_dora(model: Any) -> None:
    model.add_adapter(LoraConfig(r=2, use_dora=True, target_modules=["k_proj"]), adapter_name="other")


def with_ia3(model: Any) -> None:
    get_peft_model(model, IA3Config(target_modules=["k_proj"], feedforward_modules=[]))


def quantized(model: Any) -> None:
    kind = torch.ao.nn.quantized.dynamic.Linear
    language_model(model).layers[0].mlp.up_proj = kind(128, 256)


REFUSED = {
    hooked: "there is a hook on encoder.layers.1",
    with_own_method: "a method of GraniteSpeechForConditionalGeneration is not transformers' own",
    with_dora: "is not plain LoRA",
    with_ia3: "is a peft.tuners.ia3",
    quantized: "language_model.layers.0.mlp.up_proj is a torch.ao.nn.quantized",
}


@pytest.mark.parametrize("change", REFUSED, ids=lambda one: one.__name__)
def test_what_cannot_be_followed_is_refused_with_the_reason(change: Callable, transcriber: Transcriber, random: Any):
    before = answer(transcriber)
    change(random)
    with pytest.raises(UnsupportedError, match=f"because .*{re.escape(REFUSED[change])}.*Transcriber.from_pretrained"):
        answer(transcriber)
    if change is hooked:
        speech(random).encoder.layers[1]._forward_hooks.clear()
        assert answer(transcriber) == before


def test_training_mode_is_refused(transcriber: Transcriber, random: Any):
    random.train()
    with pytest.raises(InputError, match=r"a model in training mode.*eval"):
        answer(transcriber)
    random.eval()
    speech(random).encoder.layers[0].conv.batch_norm.train()
    with pytest.raises(InputError, match="a module of the encoder in training mode"):
        answer(transcriber)


def test_prompt_tuning_is_refused(random: Any, random_processor: Any):
    values = {"num_layers": 4, "token_dim": 128, "num_attention_heads": 4, "num_transformer_submodules": 1}
    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3, **values)
    with pytest.raises(UnsupportedError, match="PROMPT_TUNING"):
        Transcriber(accelerate(get_peft_model(random, config)), random_processor)


def test_a_model_that_is_not_accelerated_is_refused(random: Any, random_processor: Any):
    for model in (random, get_peft_model(random, QV)):
        with pytest.raises(InputError, match=r"not accelerated.*granite_speech\.accelerate\(model\)"):
            Transcriber(model, random_processor)


def test_what_is_neither_model_nor_processor_is_refused(live: Any, processor: Any):
    for other in ("ibm-granite/granite-speech-3.3-2b", None, nn.Linear(2, 2), load()[0].model):
        with pytest.raises(InputError, match=r"in place of a model.*Transcriber\.from_pretrained"):
            Transcriber(other, processor)
    for other in ("embedded", None, processor.tokenizer, processor.audio_processor):
        with pytest.raises(InputError, match=r"in place of a processor.*GraniteSpeechProcessor\.from_pretrained"):
            Transcriber(live, other)


def test_the_end_of_acceleration_is_the_end_of_transcripts(random: Any, random_processor: Any):
    with accelerate(random):
        transcriber = Transcriber(random, random_processor)
        before = answer(transcriber)
    with pytest.raises(InputError, match="not accelerated"):
        answer(transcriber)
    accelerate(random)
    assert answer(transcriber) == before
    transcriber.close()


def test_a_copy_is_refused(live: Any, processor: Any):
    transcriber = Transcriber(live, processor)
    for copied in (copy.copy, copy.deepcopy, pickle.dumps):
        with pytest.raises(InputError, match="accelerate the copy"):
            copied(transcriber)


def test_threads_at_once_while_the_live_model_writes_text(live: Any, processor: Any):
    """Answers to text switch the live adapter off."""
    ids = torch.tensor([[5, 9, 12]])
    with Transcriber(live, processor) as transcriber, ThreadPoolExecutor(3) as threads:
        texts = threads.submit(lambda: [live.generate(input_ids=ids, max_new_tokens=9) for _ in range(20)])
        found = list(threads.map(lambda number: transcriber.transcribe(FILES[number:] + FILES[:number]), range(4)))
        alone = live.generate(input_ids=ids, max_new_tokens=9)
        assert all(torch.equal(one, alone) for one in texts.result())
    assert found == [TEXTS[number:] + TEXTS[:number] for number in range(4)]


def test_a_part_of_this_package_that_peft_wrapped_still_serves(folder: Path, random_processor: Any):
    torch.manual_seed(0)
    with Transcriber(get_peft_model(GraniteSpeechForConditionalGeneration.from_pretrained(folder), QV).eval(), random_processor) as one:
        assert answer(one)
