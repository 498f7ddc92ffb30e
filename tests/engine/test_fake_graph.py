"""The stand-in for CUDA graphs: what it replays is right, and what a graph cannot do is caught."""

from types import SimpleNamespace

import pytest
import torch
from granite_kernels.op import CHOICE
from torch import Tensor

from granite_speech.modules.cache import PagedCache
from granite_speech.modules.packing import Segments
from granite_speech.modules.tokens import Tokens
from tests.support.fake_graph import CaptureError, capture, tensors_of
from tests.support.small_models import small_model


def a_state() -> SimpleNamespace:
    rng = torch.Generator().manual_seed(4)
    return SimpleNamespace(
        x=torch.randn(3, 4, generator=rng),
        y=torch.randn(3, 4, generator=rng),
        index=torch.tensor([2, 0, 1]),
        count=torch.zeros((), dtype=torch.int64),
        done=torch.tensor([False, True, False]),
        log=torch.zeros(8, 3, dtype=torch.int64),
    )


def tensors(state: SimpleNamespace) -> dict[str, Tensor]:
    return {name: one for name, one in vars(state).items() if isinstance(one, Tensor)}


def replayed(body, runs: int = 3) -> tuple[SimpleNamespace, SimpleNamespace]:
    """The state after some eager runs, and after one capture and as many replays."""
    eager, graphed = a_state(), a_state()
    for _ in range(runs):
        body(eager)
    graph = capture(lambda: body(graphed), persistent=lambda: tensors(graphed).values())
    for name, one in tensors(graphed).items():
        assert torch.equal(one, getattr(a_state(), name)), "a capture executes nothing"
    for _ in range(runs):
        graph.replay()
    return eager, graphed


# --- what is replayed ------------------------------------------------------------------------------------------------------------


def accumulate(state):
    state.count.add_(1)
    state.x += state.y * state.count


def views(state):
    first, second = state.x.chunk(2, dim=-1)
    rotated = torch.cat((-second, first), dim=-1)
    rotated.view(-1)[2:5].mul_(3.0)
    state.x.t()[1].copy_(rotated.flatten()[:3])
    state.y[0] = 2.5
    state.y[1:] = rotated[:2] + state.y[:1]


def scatter(state):
    state.x.index_copy_(0, state.index, state.x + 1)
    state.y.scatter_(1, state.index[:, None], state.x[:, :1])
    state.log[0].copy_(state.x[state.index].argmax(-1))
    state.log.index_copy_(0, state.count[None] + 1, state.y.argmin(-1)[None])
    state.count.add_(1)


def choose(state):
    best = state.x.argmax(-1)
    tokens = torch.where(state.done, 0, best)
    state.done.logical_or_(torch.isin(tokens, state.index))
    state.x.masked_fill_(state.done[:, None], 0.5)
    state.index.copy_(tokens.clamp(max=2))
    state.y.copy_(torch.empty_like(state.x).copy_(state.x).softmax(-1))


@torch.library.custom_op("fake_graph_test::add_and_double", mutates_args={"x"})
def add_and_double(x: Tensor, y: Tensor) -> Tensor:
    x += float(y.sum())  # a read inside an operation, as in an interpreted kernel
    return torch.tensor(x.tolist()) * 2


def registered(state):
    doubled = add_and_double(state.x[:2], state.y)
    state.y.copy_(doubled.repeat_interleave(state.index[:2].clamp(max=1) + 1, 0, output_size=3))


def results_in_given_memory(state):
    kept = torch.zeros(3, 4)
    torch.mul(state.x, 1.5, out=kept)
    torch._foreach_add_([state.x, state.y], [kept, kept])
    values, places = torch.max(kept, dim=1)
    state.log[1] = places
    state.y[:, 0] = values


@pytest.mark.parametrize("body", [accumulate, views, scatter, choose, registered, results_in_given_memory])
def test_replays_give_what_eager_runs_give(body):
    eager, graphed = replayed(body)
    assert any(not torch.equal(one, getattr(a_state(), name)) for name, one in tensors(eager).items())
    for name, one in tensors(eager).items():
        assert torch.equal(getattr(graphed, name), one), name


def test_a_replay_reads_its_inputs_again_and_views_are_not_recorded():
    x, out = torch.ones(2, 3), torch.zeros(3)
    graph = capture(lambda: out.copy_(x.t().unsqueeze(0)[0].sum(1)), persistent=[x, out])
    assert [one.func.overloadpacket.__name__ for one in graph.operations] == ["sum", "copy_"]
    for value in (2.0, 5.0):
        x.fill_(value)
        graph.replay()
        assert out.tolist() == [2 * value] * 3


def test_results_of_a_capture_are_garbage_until_a_replay():
    x, kept = torch.ones(2), []
    graph = capture(lambda: kept.extend((x + 1, (x + 1).long(), x > 0)), persistent=[x])
    assert kept[0].isnan().all() and (kept[1] < -(2**60)).all() and not kept[2].any()
    graph.replay()
    assert kept[0].tolist() == kept[1].tolist() == [2, 2] and kept[2].all()


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_capture_and_replay_under_every_gradient_mode(mode):
    linear, out = torch.nn.Linear(3, 3), torch.zeros(2, 3)
    x = torch.ones(2, 3)
    with mode():
        graph = capture(lambda: out.copy_(linear(x.reshape(3, 2).reshape(2, 3)).detach()), persistent=[x, out, *linear.parameters()])
    graph.replay()
    torch.testing.assert_close(out, linear(x).detach())


# --- what is caught --------------------------------------------------------------------------------------------------------------


def reassigns_its_state(state):
    state.x = state.x + 1


def swaps_its_state(state):
    state.x, state.y = state.y, state.x
    state.x.add_(1)


def bakes_in_a_number(state):
    state.steps = getattr(state, "steps", 0) + 1
    state.x.add_(state.steps)


def bakes_in_a_place(state):
    state.steps = getattr(state, "steps", 0) + 1
    state.log[state.steps].copy_(state.index)


def accumulates_in_a_temporary(state):
    if not hasattr(state, "kept"):
        state.kept = [state.x * 0]
    state.kept[0] += 1
    state.x.copy_(state.kept[0])


def reads_empty_memory(state):
    state.x.copy_(torch.empty_like(state.x).mul_(0.0))


@pytest.mark.parametrize("body", [bakes_in_a_number, bakes_in_a_place, accumulates_in_a_temporary])
def test_what_depends_on_the_host_or_an_earlier_run_gives_another_result(body):
    eager, graphed = replayed(body)
    assert any(not torch.equal(one, getattr(graphed, name)) for name, one in tensors(eager).items())


def test_memory_that_nothing_has_written_to_is_garbage():
    state = a_state()
    capture(lambda: reads_empty_memory(state)).replay()
    assert state.x.isnan().all()


def test_a_tensor_that_was_replaced_is_caught_at_replay():
    state = a_state()
    graph = capture(lambda: reassigns_its_state(state), persistent=lambda: tensors(state).values())
    with pytest.raises(CaptureError, match=r"aten.add.*test_fake_graph.py:\d+ state.x = state.x \+ 1.*not any more"):
        graph.replay()
    state = a_state()
    graph = capture(lambda: accumulate(state), persistent=lambda: tensors(state).values())
    graph.replay()
    state.y = state.y.clone()
    with pytest.raises(CaptureError, match="persistent at capture and is not any more"):
        graph.replay()


def test_a_replaced_tensor_gives_another_result_if_the_persistent_ones_are_a_list():
    for body in (reassigns_its_state, swaps_its_state):
        state, eager = a_state(), a_state()
        graph = capture(lambda body=body, state=state: body(state), persistent=list(tensors(state).values()))
        for _ in range(3):
            graph.replay()
            body(eager)
        assert not (torch.equal(state.x, eager.x) and torch.equal(state.y, eager.y))


def test_a_temporary_of_an_earlier_call_is_caught():
    state = a_state()

    def body():
        kept = getattr(state, "kept", None)
        state.kept = {"x": state.x * 2}  # not one of the persistent tensors
        if kept is not None:
            state.x.copy_(kept["x"])

    body()
    with pytest.raises(CaptureError, match=r"aten.copy_.*state.x.copy_\(kept\[.x.\]\).*neither persistent nor allocated"):
        capture(body, persistent=tensors(state).values())


def test_another_graphs_memory_is_caught():
    state, first = a_state(), []
    capture(lambda: first.append(state.x + 1), persistent=tensors(state).values())
    with pytest.raises(CaptureError, match="neither persistent nor allocated"):
        capture(lambda: state.x.copy_(first[0]), persistent=tensors(state).values())


def keeps_writing(state):
    state.x.add_(1)
    state.x.sum().item()


REFUSED = {
    "item": keeps_writing,
    "tolist": lambda state: state.x.tolist(),
    "numpy": lambda state: state.x.numpy(),
    "cpu": lambda state: state.x.cpu(),
    "bool": lambda state: bool(state.done.any()),
    "index": lambda state: state.x[int(state.count)],
    "format": lambda state: f"{state.count}",
    "nonzero": lambda state: state.x.nonzero(),
    "equal": lambda state: torch.equal(state.x, state.x),
    "unique": lambda state: state.x.unique(),
    "masked_select": lambda state: state.x.masked_select(state.x > 1),
    "mask": lambda state: state.x[state.done],
    "assignment by mask": lambda state: state.x.__setitem__(state.done, 0.0),
    "repeat_interleave": lambda state: state.x.repeat_interleave(state.index, 0),
    "values of the host": lambda state: state.x.add_(torch.tensor([1.0, 2.0, 3.0, 4.0])),
    "a number of the host as a tensor": lambda state: state.x.add_(torch.tensor(1.0)),
    "a list as an index": lambda state: state.x[[0, 2]],
    "exponential_": lambda state: torch.empty_like(state.x).exponential_(),
    "rand": lambda state: torch.rand(3),
    "multinomial": lambda state: state.x.softmax(-1).multinomial(1),
    "dropout": lambda state: torch.nn.functional.dropout(state.x, 0.5),
    "squeeze_": lambda state: (state.x * 1).unsqueeze_(0),
    "resize_": lambda state: state.x.resize_(2, 2),
    "set_": lambda state: state.x.set_(state.y),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_a_graph_cannot_do_is_refused_with_its_line(name):
    state = a_state()
    with pytest.raises(CaptureError, match=r"in test_fake_graph.py:\d+ "):
        capture(lambda: REFUSED[name](state), persistent=tensors(state).values())
    for field, one in tensors(state).items():
        assert torch.equal(one, getattr(a_state(), field)), "a capture that fails changes nothing"


def test_attention_without_dropout_is_no_random_number():
    q = torch.randn(1, 2, 5, 8)
    out = torch.zeros_like(q)
    graph = capture(lambda: out.copy_(torch.nn.functional.scaled_dot_product_attention(q, q, q)), persistent=[q, out])
    graph.replay()
    torch.testing.assert_close(out, torch.nn.functional.scaled_dot_product_attention(q, q, q))


# --- a decode step of the small model --------------------------------------------------------------------------------------------


@pytest.fixture
def step(monkeypatch):
    """A decode step of the small model after prompts of random keys, the tensors that it may use, and its inputs and result."""
    monkeypatch.setenv(CHOICE, "triton")
    model, device = small_model(), torch.device("cpu")
    cache = PagedCache(model.config.text_config, 3, dtype=torch.float32, device=device, page_size=16)
    prompts = cache.begin(Segments((5, 16, 20), device))
    rng = torch.Generator().manual_seed(2)
    for layer in range(2):
        prompts.write(layer, *(torch.randn(41, 2, 8, generator=rng) for _ in range(2)))
    rows = Segments((1,) * 3, device)
    given = SimpleNamespace(tokens=torch.tensor([3, 4, 5]), positions=torch.tensor([5, 16, 20]), logits=torch.zeros(3, 96))
    layout = Tokens(
        segments=rows,
        positions=given.positions,
        adapter_index=torch.tensor([0, -1, 0], dtype=torch.int32),
        step=cache.begin(rows),
    )

    @torch.no_grad()
    def body():
        given.logits.copy_(model.language_model.logits(model.language_states(model.embed_tokens(given.tokens), layout)))
        given.positions.add_(1)

    return body, lambda: [*tensors_of(model, cache, layout), *tensors(given).values()], given


def test_a_decode_step_is_replayed_with_other_tokens(step):
    body, persistent, given = step
    expected, start = [], given.positions.clone()
    batches = [torch.tensor(ids) for ids in ([3, 4, 5], [17, 0, 90], [60, 61, 17])]
    for tokens in batches:
        given.tokens.copy_(tokens)
        body()
        expected.append(given.logits.clone())
    given.positions.copy_(start)
    graph = capture(body, persistent)
    for tokens, logits in zip(batches, expected, strict=True):
        given.tokens.copy_(tokens)
        graph.replay()
        assert torch.equal(given.logits, logits)
    assert not torch.equal(expected[0], expected[1])
    ours = {str(one.func) for one in graph.operations if str(one.func).startswith("granite_kernels")}
    assert ours == {"granite_kernels.lora_linear.default", "granite_kernels.paged_attention.default"}


def test_a_decode_step_that_was_not_warmed_up_is_caught(step):
    """Its first run makes tensors from numbers of the host."""
    body, persistent, _ = step
    with pytest.raises(CaptureError, match=r"aten.lift_fresh.*transfers.py"):
        capture(body, persistent)


def test_a_decode_step_of_the_references_is_caught(step, monkeypatch):
    body, persistent, _ = step
    body()
    monkeypatch.setenv(CHOICE, "torch")
    with pytest.raises(CaptureError, match="reads a value on the host"):
        capture(body, persistent)
