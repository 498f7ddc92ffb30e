"""Captured graphs on a real GPU: the same ids as eager steps, and no stale weights. The tests need a GPU."""

import copy

import pytest
import torch

from granite_speech import Engine, GraniteSpeechForConditionalGeneration
from granite_speech.engine.graphs import CudaCapture
from granite_speech.engine.state import DecodeState, Row, StateSize
from granite_speech.engine.step import DecodeStep, Selection
from granite_speech.generation.options import GenerationOptions
from granite_speech.modules.cache import PagePool
from tests.support.random_requests import assert_as_generate, random_request
from tests.support.small_models import attentive, batch, small_model

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]

OPTIONS = [
    {},
    {"repetition_penalty": 1.4, "min_new_tokens": 5},
    {"do_sample": True, "temperature": 0.8, "top_k": 20, "top_p": 0.9},
    {"eos_token_id": []},
]


def on_gpu() -> tuple[GraniteSpeechForConditionalGeneration, dict[str, object]]:
    model = small_model()
    inputs = {name: one.cuda() if isinstance(one, torch.Tensor) else one for name, one in batch(model).items()}
    return model.cuda(), inputs


def answer(model: GraniteSpeechForConditionalGeneration, inputs: dict[str, object], **options) -> list[list[int]]:
    torch.cuda.manual_seed(7)
    return model.generate(**inputs, **{"max_new_tokens": 25, **options}).tolist()


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_replayed_steps_give_the_ids_of_eager_ones(options):
    model, inputs = on_gpu()
    ends = model(**inputs).logits[:, -1].argmax(-1).tolist()[:1] if "eos_token_id" not in options else []
    options = {"eos_token_id": [*ends, 95]} | options
    model.use_graphs = False
    expected = answer(model, inputs, **options)
    model.use_graphs = True
    first, second = (answer(model, inputs, **options) for _ in range(2))
    assert len(model.runtime.decoder_graphs) and len(model.runtime.encoder_graphs), "nothing was captured"
    assert answer(model, inputs, **options) == second == first == expected


def test_a_second_generator_draws_the_same_numbers_eagerly_and_captured():
    model, inputs = on_gpu()
    ids, states = [], []
    for use_graphs in (False, True, True):
        model.use_graphs = use_graphs
        rng = torch.Generator("cuda").manual_seed(3)
        ids.append(model.generate(**inputs, do_sample=True, max_new_tokens=12, eos_token_id=[95], generator=rng).tolist())
        states.append(rng.get_offset())
    assert ids[0] == ids[1] == ids[2] and states[0] == states[1] == states[2]


def test_a_weight_changed_after_warmup_changes_the_answer():
    model, inputs = on_gpu()
    model.warmup(rows=[3], seconds=[1.0])
    before = answer(model, inputs, eos_token_id=[])
    assert answer(model, inputs, eos_token_id=[]) == before
    changes = {
        "in place": lambda: model.lm_head.weight.neg_(),
        "replaced": lambda: setattr(model.lm_head, "weight", torch.nn.Parameter(-model.lm_head.weight)),
        "loaded": lambda: model.load_state_dict({name: -one if "lm_head" in name else one for name, one in model.state_dict().items()}),
        "merged": lambda: model.merge_adapter(),
    }
    for name, change in changes.items():
        with torch.no_grad():
            change()
        model.use_graphs = True
        captured = [answer(model, inputs, eos_token_id=[]) for _ in range(2)]
        fresh = copy.deepcopy(model)
        fresh.use_graphs = False
        assert captured == [answer(fresh, inputs, eos_token_id=[])] * 2, name
        assert captured[0] != before, name
        before = captured[0]


def test_generate_waits_no_more_than_once_and_for_copies_made_late():
    model, inputs = on_gpu()
    for _ in range(2):
        answer(model, inputs, eos_token_id=[])
    torch.cuda.set_sync_debug_mode("error")
    try:
        with pytest.raises(RuntimeError, match="synchronizing"):
            model.generate(**inputs, max_new_tokens=12, eos_token_id=[])  # reads the prompt: the one wait
        with model.runtime.session(model) as runtime:
            for key in list(runtime.decoder_graphs.keys()):
                runtime.decoder_graphs.replay(key)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_many_batches_of_different_sizes():
    """Graphs share one pool of memory, and the pages grow between requests."""
    model, inputs = on_gpu()
    model.use_graphs = False
    sizes = [(1, 5), (3, 40), (2, 300), (1, 5), (3, 90), (3, 40)]
    some = {
        rows: {**inputs, "input_ids": inputs["input_ids"][:rows], "attention_mask": inputs["attention_mask"][:rows]} for rows in (1, 2, 3)
    }
    some[1] |= {"input_features": inputs["input_features"][:1], "input_features_lengths": inputs["input_features_lengths"][:1]}
    expected = [answer(model, some[rows], max_new_tokens=new, eos_token_id=[]) for rows, new in sizes]
    model.use_graphs = True
    for _ in range(3):
        assert [answer(model, some[rows], max_new_tokens=new, eos_token_id=[]) for rows, new in sizes] == expected


def test_choosing_a_token_can_be_captured_with_a_large_vocabulary():
    """Sorting and top k take other paths there than in a small one."""
    config, vocab_size, rows = small_model().config.text_config, 100_353, 3
    pool = PagePool(config, dtype=torch.bfloat16, device=torch.device("cuda"))
    pool.require(8)
    selection = Selection(penalty=True, minimum=True, sample=True, temperature=True, top_k=50, top_p=True)
    logits = torch.randn(rows, vocab_size, device="cuda").bfloat16()

    def chosen(capture) -> list[int]:
        state = DecodeState(StateSize.of(rows, 4, 2), vocab_size, pool)
        state.top_k.fill_(50)
        state.see(torch.zeros(rows, 1, dtype=torch.int64, device="cuda"), torch.zeros(rows, 1, dtype=torch.bool, device="cuda"))
        options = {"repetition_penalty": 1.2, "min_new_tokens": 3, "temperature": 0.7, "top_k": 50, "top_p": 0.9, "do_sample": True}
        step = DecodeStep(None, state, selection, rows)
        state.draw(rows, torch.Generator("cuda").manual_seed(1))
        replay = capture(lambda: step.choose(logits, 0))  # runs it once, so the state is filled afterwards
        generation = GenerationOptions(eos_token_id=(5, 6), max_new_tokens=9, **options)
        state.enter([Row(generation, prompt=0, keys=0, position=-1, has_audio=False, origin=row) for row in range(rows)])
        state.see(torch.arange(12, device="cuda").view(3, 4), torch.ones(3, 4, dtype=torch.bool, device="cuda"))
        replay()
        return state.history[0, :rows].tolist()

    assert chosen(CudaCapture(torch.device("cuda", 0))) == chosen(lambda function: function)


def test_an_engine_gives_the_tokens_of_generate():
    """Rows join and leave between captured steps; pages run short; some requests draw."""
    model = attentive(small_model()).cuda()
    requests = [random_request(number, model, sample=number % 4 == 0, on="cuda") for number in range(200)]
    with Engine(model, None, max_rows=16, max_pages=40) as engine, Engine(model, None, max_rows=1, max_pages=40) as alone:
        for _ in range(2):  # captured, and replayed
            answers = [handle.result(60) for handle in [engine.submit(inputs=one.inputs, **one.options) for one in requests]]
        assert engine.counters().pages_used == 0
        for request, answer in zip(requests, answers, strict=True):
            if "seed" in request.options:
                assert alone.submit(inputs=request.inputs, **request.options).result(60).token_ids == answer.token_ids
            else:
                assert_as_generate(model, request, answer)
