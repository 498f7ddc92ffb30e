"""How often the host waits for a GPU, counted on a stand-in for one, and tests of the stand-in itself."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from bench.stand_in_gpu import StandInGPU
from granite_speech import GraniteSpeechForConditionalGeneration
from granite_speech.modules.cache import PagedCache
from granite_speech.modules.packing import Segments
from granite_speech.modules.tokens import Tokens
from granite_speech.modules.transfers import on_device, on_host
from granite_speech.transcription.word_edges import loudness
from tests.support.small_models import batch, small_model


@pytest.fixture
def gpu():
    with StandInGPU() as gpu, torch.no_grad():
        yield gpu


def inputs_of(model: GraniteSpeechForConditionalGeneration) -> dict[str, object]:
    """A batch as the processor returns it, with the mask of its audio vectors."""
    inputs = batch(model)
    counts = torch.tensor([model.projector.tokens(frames) for frames in inputs["input_features_lengths"]])
    return inputs | {"input_features_mask": torch.arange(int(counts.max())) < counts[:, None]}


def device_calls(gpu: StandInGPU) -> tuple[GraniteSpeechForConditionalGeneration, dict[str, object]]:
    model = small_model()
    inputs = gpu.move(inputs_of(model))
    model = gpu.move(model)
    gpu.waits.clear()
    return model, inputs


# --- the model -------------------------------------------------------------------------------------------------------------------


def test_a_prefill_waits_once():
    with torch.no_grad():
        expected = small_model()(**inputs_of(small_model()))
    with StandInGPU() as gpu, torch.no_grad():
        model, inputs = device_calls(gpu)
        output = model(**inputs)
        logits, audio = output.logits, output.audio_hidden_states  # padding what the caller reads waits for nothing
    assert len(gpu.waits) == 1, gpu.waits
    torch.testing.assert_close(logits.values, expected.logits, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(audio.values, expected.audio_hidden_states, rtol=1e-4, atol=1e-4)


def test_optional_inputs_are_read_in_the_same_wait(gpu):
    model, inputs = device_calls(gpu)
    width = inputs["input_ids"].shape[1]
    more = {
        "position_ids": torch.arange(width)[None],
        "cache_position": torch.arange(width),
        "input_features_lengths": torch.tensor(inputs["input_features_lengths"]),
    }
    model(**inputs | gpu.move(more))
    assert len(gpu.waits) == 1, gpu.waits


def test_a_loss_adds_no_wait(gpu):
    model, inputs = device_calls(gpu)
    labels = gpu.move(torch.where(inputs_of(small_model())["attention_mask"] == 1, 5, -100))
    gpu.waits.clear()
    model(**inputs, labels=labels)
    assert len(gpu.waits) == 1, gpu.waits


@pytest.mark.parametrize("options", [{}, {"do_sample": True}, {"repetition_penalty": 1.3, "min_new_tokens": 1}], ids=str)
def test_generate_waits_for_its_prompt_alone(gpu, options):
    """Tokens are read one step late: the host waits for a copy while the device runs the next step."""
    model, inputs = device_calls(gpu)
    gpu.late_reads = 0
    model.generate(**inputs, max_new_tokens=4, eos_token_id=[95], **options)
    assert (len(gpu.waits), gpu.late_reads) == (1, 4), gpu.waits


def test_what_the_times_of_words_need_waits_for_nothing(gpu):
    model, inputs = device_calls(gpu)
    features, lengths = inputs["input_features"], tuple(inputs["input_features_lengths"])
    clips = Segments(lengths, features.device)
    ctc = []
    states = model.encoder.encode(clips.pack(features), clips, ctc=ctc)
    found = model.encoder.ctc_logits(states).log_softmax(-1, dtype=torch.float32)
    level = loudness(features[0], bands=features.shape[2] // 2)
    assert found.device == level.device == features.device and len(ctc) == 2
    assert level.shape == (2 * features.shape[1],) and not gpu.waits


def test_a_decode_step_runs_with_fake_tensors():
    """Without values and without a GPU, which is how launches and allocations of the released shapes are counted."""
    config, device = small_model().config, torch.device("cuda")
    with FakeTensorMode(), torch.no_grad():
        with device:
            model = GraniteSpeechForConditionalGeneration(config).eval()
        rows = Segments((1,) * 4, device)
        step = PagedCache(config.text_config, 4, dtype=torch.float32, device=device).begin(rows)
        tokens = Tokens(segments=rows, positions=on_device([0] * 4, device), adapter_index=on_device([0, -1, 0, -1], device), step=step)
        logits = model.language_model.logits(model.language_states(model.embed_tokens(on_device([3] * 4, device)), tokens))
    assert (logits.shape, logits.device.type) == ((4, config.text_config.vocab_size), "cuda")


# --- the stand-in ----------------------------------------------------------------------------------------------------------------

WAITS = {
    "item": lambda x: x.sum().item(),
    "tolist": lambda x: x.tolist(),
    "bool": lambda x: bool(x.any()),
    "nonzero": lambda x: x.nonzero(),
    "mask": lambda x: x[x > 1],
    "assignment by mask": lambda x: x.__setitem__(x > 1, 0.0),
    "masked_select": lambda x: x.masked_select(x > 1),
    "unique": lambda x: x.unique(),
    "equal": lambda x: torch.equal(x, x),
    "repeat_interleave": lambda x: x.repeat_interleave(x.long()),
    "to the host": lambda x: x.cpu(),
    "into a host tensor": lambda x: torch.empty(3).copy_(x),
    "from ordinary memory": lambda x: torch.ones(3).to(x.device),
    "from ordinary memory, non-blocking": lambda x: torch.ones(3).to(x.device, non_blocking=True),
    "from pinned memory, blocking": lambda x: torch.ones(3).pin_memory().to(x.device),
    "a new tensor of values": lambda x: torch.tensor([1.0, 2.0], device=x.device),
    "copy_ from ordinary memory": lambda x: x.copy_(torch.ones(3)),
}
NO_WAITS = {
    "arithmetic": lambda x: (x * 2 + 1).softmax(0),
    "in place": lambda x: x.add_(1),
    "views": lambda x: x[1:].view(2, 1).t(),
    "an index": lambda x: x[x.long()],
    "new tensors": lambda x: (torch.zeros(3, device=x.device), torch.arange(3, device="cuda"), x.new_empty(2)),
    "from pinned memory": lambda x: torch.ones(3).pin_memory().to(x.device, non_blocking=True),
    "copy_ from pinned memory": lambda x: x.copy_(torch.ones(3).pin_memory(), non_blocking=True),
    "another dtype": lambda x: x.to(torch.float16),
    "repeat_interleave with a size": lambda x: x.repeat_interleave(x.long(), output_size=3),
    "on the host": lambda x: torch.ones(3)[torch.ones(3) > 0].tolist(),
}


@pytest.mark.parametrize("name", WAITS)
def test_a_wait_is_counted_with_its_line(gpu, name):
    WAITS[name](gpu.move(torch.arange(3.0)))
    assert len(gpu.waits) == 1 and "test_device_waits.py:" in gpu.waits[0], gpu.waits


@pytest.mark.parametrize("name", NO_WAITS)
def test_operations_that_do_not_wait_are_not_counted(gpu, name):
    NO_WAITS[name](gpu.move(torch.arange(3.0)))
    assert gpu.waits == []


def test_values_are_correct_and_views_share_memory(gpu):
    x = gpu.move(torch.arange(6.0))
    x.view(2, 3)[1].add_(10)
    x[0] = 7
    assert x.tolist() == [7, 1, 2, 13, 14, 15] and x.device == torch.device("cuda", 0)


def test_a_cpu_tensor_among_device_tensors_is_refused(gpu):
    x = gpu.move(torch.arange(3.0))
    assert (x + torch.tensor(1.0)).tolist() == [1, 2, 3], "a tensor without dimensions counts as a number, as in PyTorch"
    with pytest.raises(RuntimeError, match="CPU tensor of shape"):
        x + torch.ones(3)


def test_the_stand_in_is_removed_afterwards():
    with StandInGPU() as gpu:
        x = gpu.move(torch.ones(2))
    assert torch.ones(2).device.type == "cpu"
    with pytest.raises(RuntimeError, match="outside its `with` block"):
        x + 1


# --- the copies ------------------------------------------------------------------------------------------------------------------


def test_tensors_of_every_dtype_are_read_together(gpu):
    tensors = [
        torch.tensor([True, False, True]),
        None,
        torch.tensor([[0.5], [float("nan")]]),
        torch.empty(0, 3, dtype=torch.int64),
        torch.tensor(2**62 + 1),
        torch.arange(6, dtype=torch.int32).view(2, 3).t(),
        torch.tensor([1.5, -2.0], dtype=torch.bfloat16),
    ]
    read = on_host(*gpu.move(tensors))
    assert len(gpu.waits) == 1
    for mine, given in zip(read, tensors, strict=True):
        assert (mine is None) == (given is None)
        if given is not None:
            torch.testing.assert_close(mine, given, rtol=0, atol=0, equal_nan=True)


def test_host_tensors_are_returned_unchanged():
    values = torch.arange(3)
    assert on_host(values, None)[0] is values
    assert on_device(values, torch.device("cpu")) is values
    assert on_device([1, 2], torch.device("cpu"), torch.int32).dtype == torch.int32
