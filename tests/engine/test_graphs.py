"""Steps of `generate` in graphs, which a stand-in for CUDA graphs captures on the CPU: the ids of eager steps, and never stale ones."""

import copy
from types import SimpleNamespace
from typing import Any

import peft
import pytest
import torch
from granite_kernels.op import CHOICE
from torch import Tensor, nn

from granite_speech import GraniteSpeechForConditionalGeneration
from granite_speech.engine import decoding, encoding, prefill
from granite_speech.engine.graphs import CaptureWarning
from granite_speech.engine.state import STEPS
from granite_speech.engine.step import DecodeStep
from granite_speech.modules.adapter import attach_adapter
from granite_speech.modules.adapter_config import AdapterConfig
from tests.support.fake_graph import CaptureError, FakeCapture, tensors_of
from tests.support.small_models import AUDIO, attentive, small_model, text

WITHOUT_ADAPTER = "language_model.model.layers.1.mlp.down_proj"


@pytest.fixture
def graphed(monkeypatch) -> SimpleNamespace:
    """The small model, whose steps are captured, and what captures them. Kernels run in the interpreter."""
    monkeypatch.setenv(CHOICE, "triton")
    for stage in (encoding, prefill):  # these tests are about decode steps
        monkeypatch.setattr(stage, "bucket_of", lambda lengths: None)
    model = attentive(small_model())

    def persistent() -> list[Tensor]:
        return tensors_of(model.language_model, model.runtime.state, model.runtime.pool)

    capture = FakeCapture(persistent)
    model.runtime.make_capture = lambda device: capture
    return SimpleNamespace(model=model, capture=capture)


def prompts(rows: int = 1, *, clip_in: int | None = None) -> dict[str, Any]:
    """Prompts of 3, 6, 9, … tokens of text; the row `clip_in` has a clip of 15 frames too."""
    rng, audio = torch.Generator().manual_seed(3), 3
    texts = [text(3 * row + 3, rng) for row in range(rows)]
    if clip_in is not None:
        texts[clip_in] = torch.cat((torch.full((audio,), AUDIO), texts[clip_in]))
    width = max(map(len, texts))
    inputs = {"input_ids": torch.full((rows, width), 94), "attention_mask": torch.zeros(rows, width, dtype=torch.int64)}
    for row, one in enumerate(texts):
        inputs["input_ids"][row, width - len(one) :], inputs["attention_mask"][row, width - len(one) :] = one, 1
    if clip_in is not None:
        inputs |= {"input_features": torch.randn(1, 15, 160, generator=rng), "input_features_lengths": [15]}
    return inputs


def answers(model: GraniteSpeechForConditionalGeneration, inputs: dict[str, Any], **options: Any) -> Tensor:
    """New tokens, without an end token unless the options name one. Each call that samples begins with the same seed."""
    options = {"max_new_tokens": 4, "eos_token_id": []} | options
    if options.get("do_sample"):
        options["generator"] = torch.Generator().manual_seed(8)
    return model.generate(**inputs, **options)[:, inputs["input_ids"].shape[1] :]


def eagerly(model: GraniteSpeechForConditionalGeneration, inputs: dict[str, Any], kernels: str = "torch", **options: Any) -> Tensor:
    """What a copy of the model answers without graphs, by default with the references, which are much faster than the interpreter."""
    model = copy.deepcopy(model)
    model.use_graphs = False
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(CHOICE, kernels)
        return answers(model, inputs, **options)


# --- a shape that was seen before is replayed ------------------------------------------------------------------------------------

OPTIONS = {
    "greedy": {},
    "penalty and minimum": {"repetition_penalty": 1.5, "min_new_tokens": 2, "eos_token_id": list(range(0, 96, 2))},
    "sampling": {"do_sample": True, "top_k": 0},
    "sampling with every rule": {"do_sample": True, "temperature": 1.3, "top_k": 20, "top_p": 0.9, "repetition_penalty": 1.2},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_a_shape_seen_before_is_replayed_with_the_same_ids(graphed, name):
    inputs = prompts(2)
    expected = eagerly(graphed.model, inputs, **OPTIONS[name])
    assert torch.equal(answers(graphed.model, inputs, **OPTIONS[name]), expected)
    assert graphed.capture.graphs == [], "a shape that is new to a request runs eagerly"
    assert torch.equal(answers(graphed.model, inputs, **OPTIONS[name]), expected)
    assert graphed.capture.replays == expected.shape[1] - 1 > 0, "the first token needs no step"


def test_a_graph_answers_other_prompts(graphed):
    answers(graphed.model, prompts(2))
    other = prompts(2) | {"input_ids": prompts(2)["input_ids"] + 1}
    expected = eagerly(graphed.model, other)
    assert torch.equal(answers(graphed.model, other), expected) and graphed.capture.replays == 3
    assert not torch.equal(expected, eagerly(graphed.model, prompts(2)))


def test_rows_with_and_without_the_adapter(graphed):
    """Three rows use a graph of four."""
    inputs = prompts(3, clip_in=1)
    expected = eagerly(graphed.model, inputs)
    for _ in range(2):
        assert torch.equal(answers(graphed.model, inputs), expected)
    assert graphed.capture.replays == 3


def test_rows_that_end_at_different_steps_use_smaller_graphs(graphed):
    inputs = prompts(3)
    free = eagerly(graphed.model, inputs, max_new_tokens=5)
    ends = [int(free[0, 1]), int(free[1, 2])]
    expected = eagerly(graphed.model, inputs, max_new_tokens=5, eos_token_id=ends)
    lengths = [next((step + 1 for step, token in enumerate(row) if token in ends), 5) for row in expected.tolist()]
    assert len(set(lengths)) == 3, "or choose other prompts"
    for _ in range(2):
        assert torch.equal(answers(graphed.model, inputs, max_new_tokens=5, eos_token_id=ends), expected)
    assert len(graphed.capture.graphs) == 3, "for 4, 2 and 1 rows"
    assert all(one.replays for one in graphed.capture.graphs)


def test_steps_that_cannot_end_an_answer_are_one_graph(graphed):
    inputs, tokens = prompts(), 1 + STEPS + 1
    expected = eagerly(graphed.model, inputs, max_new_tokens=tokens)
    for _ in range(2):
        assert torch.equal(answers(graphed.model, inputs, max_new_tokens=tokens), expected)
    assert graphed.capture.replays == 2
    assert len({len(one.operations) for one in graphed.capture.graphs}) == 2


def test_kept_scores_are_those_of_eager_steps(graphed):
    inputs, options = prompts(), {"max_new_tokens": 3, "eos_token_id": [], "return_dict_in_generate": True, "output_scores": True}
    answers(graphed.model, inputs)
    answers(graphed.model, inputs)
    before = graphed.capture.replays
    scores = torch.stack(graphed.model.generate(**inputs, **options).scores)
    assert graphed.capture.replays == before > 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(CHOICE, "torch")
        expected = copy.deepcopy(graphed.model).generate(**inputs, **options).scores
    torch.testing.assert_close(scores, torch.stack(expected), rtol=1e-4, atol=1e-4)


def test_without_use_graphs_nothing_is_captured(graphed):
    expected = eagerly(graphed.model, prompts())
    graphed.model.use_graphs = False
    for _ in range(2):
        assert torch.equal(answers(graphed.model, prompts()), expected)
    assert graphed.capture.graphs == []


def test_a_capture_that_fails_leaves_eager_steps(graphed):
    attempts = []

    def fails(function):
        attempts.append(function)
        function()
        raise RuntimeError("operation not permitted when stream is capturing")

    graphed.model.runtime.make_capture = lambda device: fails
    expected = eagerly(graphed.model, prompts())
    assert torch.equal(answers(graphed.model, prompts()), expected)
    with pytest.warns(CaptureWarning, match="not permitted"):
        assert torch.equal(answers(graphed.model, prompts()), expected)
    assert torch.equal(answers(graphed.model, prompts()), expected)
    assert len(attempts) == 1


# --- faults that the stand-in finds ----------------------------------------------------------------------------------------------

STATES, FINISH = DecodeStep._fused_states, DecodeStep._finish


def replaces_its_tokens(step, *arguments):
    chosen = FINISH(step, *arguments)
    step._tokens = step._tokens.clone()
    return chosen


def reads_a_length(step, *arguments):
    assert int(step._kv_lens.max()) >= 0
    return FINISH(step, *arguments)


def keeps_scores_for_later(step, scores, *arguments):
    scores = scores + 0 * getattr(step, "last", scores).mean()
    step.last = scores
    return FINISH(step, scores, *arguments)


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (replaces_its_tokens, r"begin_step.*neither persistent nor allocated"),
        (reads_a_length, r"test_graphs.py:\d+ assert int\(.*reads a value on the host"),
        (keeps_scores_for_later, r"test_graphs.py:\d+ .*neither persistent nor allocated"),
    ],
)
def test_a_step_that_cannot_be_captured_is_found(graphed, monkeypatch, fault, message):
    monkeypatch.setattr(DecodeStep, "_finish", fault)
    expected = eagerly(graphed.model, prompts())
    assert torch.equal(answers(graphed.model, prompts()), expected), "run eagerly, the fault has no effect"
    with pytest.raises(CaptureError, match=message):
        answers(graphed.model, prompts())


def replaces_the_tokens_of_the_state(step, *arguments):
    chosen = FINISH(step, *arguments)
    step._state.tokens = step._state.tokens.clone()
    step._tokens = step._state.tokens[: step._rows]
    return chosen


def test_a_step_that_replaces_a_tensor_of_the_state_is_found(graphed, monkeypatch):
    monkeypatch.setattr(DecodeStep, "_finish", replaces_the_tokens_of_the_state)
    answers(graphed.model, prompts())
    with pytest.raises(CaptureError, match="persistent"):
        answers(graphed.model, prompts())


def counts_lengths_on_the_host(step):
    step.length = getattr(step, "length", 2) + 1  # the prompt has 3 tokens
    step._kv_lens.fill_(step.length)
    return STATES(step)


def test_a_length_of_the_host_gives_other_ids(graphed, monkeypatch):
    monkeypatch.setattr(DecodeStep, "_fused_states", counts_lengths_on_the_host)
    expected = eagerly(graphed.model, prompts())
    assert torch.equal(answers(graphed.model, prompts()), expected), "run eagerly, the fault has no effect"
    assert not torch.equal(answers(graphed.model, prompts()), expected)


# --- graphs follow the model -----------------------------------------------------------------------------------------------------


def captured(graphed: SimpleNamespace, inputs: dict[str, Any]) -> Tensor:
    """Have a step of one row captured and replayed. Returns the answer."""
    answers(graphed.model, inputs)
    ids = answers(graphed.model, inputs)
    assert graphed.capture.replays == 3 and len(graphed.model.runtime.decoder_graphs) == 1
    return ids


def test_a_weight_changed_in_place_changes_the_next_answer(graphed):
    before = captured(graphed, prompts())
    with torch.no_grad():
        graphed.model.language_model.lm_head.weight.mul_(-1)
    after = answers(graphed.model, prompts())
    assert torch.equal(after, eagerly(graphed.model, prompts())) and not torch.equal(after, before)
    assert graphed.capture.replays == 6 and len(graphed.capture.graphs) == 1


def replace_parameter(model):
    head = model.language_model.lm_head
    head.weight = nn.Parameter(-head.weight.detach())


def replace_data(model):
    head = model.language_model.lm_head
    head.weight.data = -head.weight.detach()


def replace_module(model):
    torch.manual_seed(3)
    model.language_model.lm_head = nn.Linear(32, 96, bias=False)


def load_and_assign(model):
    weights = {name: one.clone() for name, one in model.state_dict().items()}
    weights["language_model.lm_head.weight"].neg_()
    model.load_state_dict(weights, assign=True)


def attach(model):
    attach_adapter(model, AdapterConfig.plain(4, 8, ["down_proj"]), [WITHOUT_ADAPTER])
    nn.init.normal_(model.get_submodule(WITHOUT_ADAPTER).lora_B.weight, std=100.0)


def hook(model):
    model.language_model.lm_head.register_forward_hook(lambda module, given, out: -out)


def second_adapter(model):
    config = {"r": 4, "lora_alpha": 400, "target_modules": ["k_proj", "down_proj"], "init_lora_weights": False}
    torch.manual_seed(5)
    model.add_adapter(config, "second")


def grow(model):
    model.resize_token_embeddings(128)
    head = model.get_output_embeddings()
    with torch.no_grad():
        head.weight[96:] = 10 * head.weight[:32]


CHANGES = {
    "replaced parameter": replace_parameter,
    "replaced data": replace_data,
    "replaced module": replace_module,
    "load_state_dict(assign=True)": load_and_assign,
    "attached adapter": attach,
    "merged adapter": lambda model: model.merge_adapter(),
    "forward hook": hook,
    "adapters off": lambda model: model.disable_adapters(),
    "another adapter": second_adapter,
    "more tokens": grow,
}
ABOUT_AUDIO = ("attached adapter", "adapters off", "another adapter")  # without audio an adapter has no effect


@pytest.mark.parametrize("name", CHANGES)
def test_graphs_of_another_model_are_dropped(graphed, name):
    inputs = prompts(clip_in=0 if name in ABOUT_AUDIO else None)
    before = captured(graphed, inputs)
    CHANGES[name](graphed.model)
    expected = eagerly(graphed.model, inputs)
    assert not torch.equal(expected, before), "or choose a greater change"
    assert torch.equal(answers(graphed.model, inputs), expected)
    assert len(graphed.model.runtime.decoder_graphs) == 0 and graphed.capture.replays == 3


def scale_up(layer):
    layer.scaling["default"] *= 50


BY_PEFT = {
    "off": lambda layer: layer.enable_adapters(False),
    "another": lambda layer: layer.set_adapter("second"),
    "merged": lambda layer: layer.merge(),
    "another scaling": scale_up,
}


@pytest.mark.parametrize("name", BY_PEFT)
def test_graphs_are_dropped_when_peft_switches_its_layers(graphed, name):
    """A merge changes weights in place, which a graph follows, but the adapter must leave the graph."""
    graphed.model.merge_adapter()  # with one of its own, `generate` would switch adapters by itself
    wrapped = peft.get_peft_model(graphed.model, peft.LoraConfig(r=4, target_modules=["o_proj"], init_lora_weights=False, lora_alpha=400))
    wrapped.add_adapter("second", peft.LoraConfig(r=4, target_modules=["o_proj"], init_lora_weights=False, lora_alpha=400))
    wrapped.eval()
    inputs = prompts()
    captured(graphed, inputs)
    for layer in (one for one in graphed.model.modules() if isinstance(one, peft.tuners.lora.Linear)):
        BY_PEFT[name](layer)
    expected = eagerly(graphed.model, inputs)
    assert torch.equal(answers(graphed.model, inputs), expected)
    assert len(graphed.model.runtime.decoder_graphs) == 0 and graphed.capture.replays == 3


def test_another_dtype(graphed):
    captured(graphed, prompts())
    graphed.model.to(torch.bfloat16)
    expected = eagerly(graphed.model, prompts(), kernels="triton")
    for replays in (3, 6):
        assert torch.equal(answers(graphed.model, prompts()), expected)
        assert graphed.capture.replays == replays


def test_a_hook_that_was_removed_allows_graphs_again(graphed):
    expected = eagerly(graphed.model, prompts())
    handle = graphed.model.language_model.lm_head.register_forward_hook(lambda module, given, out: -out)
    answers(graphed.model, prompts())
    answers(graphed.model, prompts())
    assert graphed.capture.graphs == []
    handle.remove()
    for replays in (0, 3):
        assert torch.equal(answers(graphed.model, prompts()), expected)
        assert graphed.capture.replays == replays


def test_a_pool_that_grew_between_requests(graphed):
    before = captured(graphed, prompts())
    pages = graphed.model.runtime.pool.total
    answers(graphed.model, prompts(), max_new_tokens=300, eos_token_id=list(range(96)))  # ends with its first token
    assert graphed.model.runtime.pool.total > pages and len(graphed.model.runtime.decoder_graphs) == 0
    assert torch.equal(answers(graphed.model, prompts()), before) and graphed.capture.replays == 3
    assert torch.equal(answers(graphed.model, prompts()), before) and graphed.capture.replays == 6


def test_a_pool_that_grows_within_a_request(graphed, monkeypatch):
    monkeypatch.setattr(decoding, "_RESERVED_TOKENS", 2)
    ids = text(62, torch.Generator().manual_seed(6))[None]  # 2 more tokens fill the first page
    expected = eagerly(graphed.model, {"input_ids": ids})
    answers(graphed.model, {"input_ids": ids}, max_new_tokens=2)
    pages = graphed.model.runtime.pool.total
    assert torch.equal(answers(graphed.model, {"input_ids": ids}), expected)
    assert graphed.capture.replays == 1 and graphed.model.runtime.pool.total > pages
