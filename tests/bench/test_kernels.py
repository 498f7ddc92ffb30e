"""The benchmark of the kernels: the captured calls and their inputs, failures, and the result file.

Only the capture itself needs a GPU. Here `FakeCapture` makes the calls that would be captured and keeps their results.
"""

import contextlib
import dataclasses
import json
import os
import time
from typing import ClassVar

import pytest
import torch
from granite_kernels import OPERATIONS

from bench import graphs, kernels, kernels_table
from bench.worker import Outcome, Worker

RATES = {"bytes_a_second": 4e12, "flops_a_second": 8e14}
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


class FakeCapture:
    """Replaces `graphs.CapturedCalls`: makes every call once, and reports 1 ms of device time for each."""

    made: ClassVar[list["FakeCapture"]] = []
    launch = 0.0

    def __init__(self, calls):
        self.calls, self.results = calls, [call() for call in calls]
        self.made.append(self)

    def replay(self):
        self.results[:] = [call() for call in self.calls]

    def replay_seconds(self, replays):
        return [1e-3 * len(self.results)] * replays

    def launch_seconds(self):
        return self.launch


@pytest.fixture
def on_cpu(monkeypatch):
    """The operations, each with one small case marked as released."""
    small = {name: dataclasses.replace(op, cases=(dataclasses.replace(smallest(op), released=True),)) for name, op in OPERATIONS.items()}
    monkeypatch.setattr(kernels, "OPERATIONS", small)
    monkeypatch.setattr(kernels, "DEVICE", "cpu")
    monkeypatch.setattr(graphs, "CapturedCalls", FakeCapture)
    monkeypatch.setattr(graphs, "side_stream", contextlib.nullcontext)
    monkeypatch.setattr(graphs, "l2_bytes", lambda: 1000)
    monkeypatch.setattr(FakeCapture, "made", [])
    kernels._inputs.cache_clear()
    kernels._fault.cache_clear()
    yield small
    kernels._inputs.cache_clear()
    kernels._fault.cache_clear()


def smallest(op):
    """The case with the least nonzero work: the interpreter is slow."""
    flops = [op.cost(**case.sizes(torch.float32)).flops for case in op.cases]
    return op.cases[flops.index(min(filter(None, flops)))]


def inline(function, *arguments):
    """Replaces `Worker.call`."""
    return function(*arguments)


def measured(operations, *, compiled=False, call=inline):
    entries = []
    for _ in kernels.measure(entries, operations, torch.float32, compiled, RATES, call):
        pass
    return entries


def test_every_variant_and_direction_is_timed(on_cpu):
    entries = measured(list(on_cpu))
    assert [(entry["operation"], entry["direction"]) for entry in entries] == [
        (name, direction) for name, op in on_cpu.items() for direction in ("forward", "backward")[: 1 + bool(op.differentiable)]
    ]
    for entry in entries:
        variants = {"triton", "torch"} | ({"library"} if entry["direction"] == "forward" else set())
        assert set(entry["seconds"]) == variants and not entry["not_timed"]
        assert all(seconds["median"] == pytest.approx(1e-3) for seconds in entry["seconds"].values())
        assert entry["direction"] == "backward" or entry["bound_seconds"] > 0


@pytest.mark.parametrize(
    ("variant", "direction"),
    [("triton", "forward"), ("torch", "forward"), ("library", "forward"), ("triton", "backward"), ("torch", "backward")],
)
def test_calls_cycle_through_enough_copies_for_a_cold_cache(on_cpu, monkeypatch, variant, direction):
    """All copies are used, each as often as the others."""
    (case,) = on_cpu["lora_linear"].cases
    bytes_moved = on_cpu["lora_linear"].cost(**case.sizes(torch.float32)).bytes
    monkeypatch.setattr(graphs, "l2_bytes", lambda: bytes_moved // 2)
    used = []

    def recording(calls):
        if direction == "forward":
            partials = [getattr(call, "__wrapped__", call) for call in calls]  # without no_grad
            used.extend(call.keywords["x"].data_ptr() if variant != "library" else call.args[0].data_ptr() for call in partials)
        else:
            used.extend(call.args[1][0].data_ptr() for call in calls)
        return FakeCapture(calls)

    monkeypatch.setattr(graphs, "CapturedCalls", recording)
    outcome = kernels.time_variant("lora_linear", case.name, direction, variant, torch.float32)
    assert outcome.values["copies"] == 4 and outcome.values["calls"] == len(used) == 12 >= graphs.LEAST_CALLS
    assert len(set(used)) == 4 and {used.count(address) for address in used} == {3}


def test_copies_exceed_the_cache_without_waste():
    l2 = 50_000_000
    for bytes_moved in (600_000, 4_200_000, 50_000_000, 786_000_000):
        count = graphs.copies_needed(bytes_moved, l2)
        assert count * bytes_moved >= 5 * l2
        assert count == 1 or (count - 1) * bytes_moved < graphs.COLD * l2
    assert graphs.copies_needed(786_000_000, l2) == 1


def test_copies_fit_into_memory():
    assert graphs.copies_needed(1000, 50_000_000) == graphs.MOST_COPIES
    assert graphs.copies_needed(1000, 50_000_000, 411_000_000) == 38
    assert graphs.copies_needed(1000, 50_000_000, 10**12) == 1


@pytest.mark.parametrize("op", [pytest.param(op, id=op.name) for op in OPERATIONS.values()])
def test_the_cache_is_cold_for_library_calls_too(op):
    """A library call touches fewer bytes than the kernel, and the number of copies follows from the kernel's."""
    for case in op.cases:
        if case.released:
            sizes = case.sizes(torch.bfloat16)
            call, moved = op.library(**sizes), op.cost(**sizes).bytes
            tensors = [value for value in (*call.args, *call.keywords.values(), call()) if isinstance(value, torch.Tensor)]
            touched = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
            if moved * graphs.MOST_COPIES >= graphs.COLD * 50_000_000:
                assert graphs.copies_needed(moved, 50_000_000) * touched >= 1.2 * 50_000_000


def test_every_library_call_is_described():
    assert kernels_table.LIBRARY.keys() == OPERATIONS.keys()


@pytest.mark.parametrize("op", [pytest.param(op, id=op.name) for op in OPERATIONS.values()])
def test_copies_keep_strides_and_shared_storage(op):
    """Other strides would compile to other loads."""
    case = next(case for case in op.cases if not case.released)
    inputs = case.inputs(torch.float32)
    first, second = kernels.input_copies(inputs, 2)
    assert first is inputs
    storages = {}
    for name, value in inputs.items():
        if isinstance(value, torch.Tensor):
            copied = second[name]
            assert copied.stride() == value.stride() and copied.data_ptr() != value.data_ptr()
            assert torch.equal(copied.nan_to_num(), value.nan_to_num())
            storage = storages.setdefault(value.untyped_storage().data_ptr(), copied.untyped_storage().data_ptr())
            assert storage == copied.untyped_storage().data_ptr()


def test_a_reference_that_waits_for_the_device_is_neither_timed_nor_compiled(on_cpu, monkeypatch):
    def captured(calls):
        if getattr(calls[0], "__wrapped__", calls[0]).func is on_cpu["depthwise_conv"].reference:
            raise graphs.HostWaitError("it reads an index tensor")
        return FakeCapture(calls)

    timed = []

    def call(function, *arguments):
        timed.append(arguments[2:4])
        return inline(function, *arguments)

    monkeypatch.setattr(graphs, "CapturedCalls", captured)
    forward, backward = measured(["depthwise_conv"], compiled=True, call=call)
    assert forward["not_timed"]["torch"] == "HostWaitError: it reads an index tensor"
    assert {"triton", "library"} == set(forward["seconds"]) and {"triton", "torch"} == set(backward["seconds"])
    assert ("forward", "compiled") not in timed and ("backward", "compiled") not in timed
    assert forward["not_timed"]["compiled"] == backward["not_timed"]["compiled"] == kernels.NOT_COMPILED


def test_a_failed_capture_names_its_cause_and_makes_the_process_unusable(on_cpu, monkeypatch):
    def captured(calls):
        try:
            raise RuntimeError("operation not permitted when stream is capturing\nCompile with TORCH_USE_CUDA_DSA")
        finally:
            raise ValueError("capture_end() failed")

    monkeypatch.setattr(graphs, "CapturedCalls", captured)
    (case,) = on_cpu["lora_linear"].cases
    outcome = kernels.time_variant("lora_linear", case.name, "forward", "library", torch.float32)
    assert outcome.unusable and not outcome.values
    assert outcome.not_timed == "RuntimeError: operation not permitted when stream is capturing; then ValueError: capture_end() failed"


def test_the_process_stays_usable_if_the_host_is_too_slow(on_cpu, monkeypatch):
    monkeypatch.setattr(FakeCapture, "launch", 1.0)
    (case,) = on_cpu["lora_linear"].cases
    outcome = kernels.time_variant("lora_linear", case.name, "forward", "library", torch.float32)
    assert outcome.not_timed.startswith("HostBoundError") and not outcome.unusable and not outcome.values


def test_a_wrong_kernel_is_not_timed(on_cpu, monkeypatch):
    op = on_cpu["lora_linear"]

    def wrong(*, impl, **inputs):
        return op.reference(**inputs) * 1.01

    monkeypatch.setitem(on_cpu, "lora_linear", dataclasses.replace(op, call=wrong))
    forward, backward = measured(["lora_linear"])
    assert "RMS error" in forward["wrong"] and "RMS error" in backward["wrong"]
    assert forward["seconds"] == backward["seconds"] == {} and not FakeCapture.made


@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_a_graph_with_other_results_is_not_timed(on_cpu, monkeypatch, direction):
    def captured(calls):
        made = FakeCapture(calls)
        last = made.results[-1] if direction == "forward" else made.results[-1][0]
        last.view(-1)[-1] += 1
        return made

    monkeypatch.setattr(graphs, "CapturedCalls", captured)
    (case,) = on_cpu["lora_linear"].cases
    outcome = kernels.time_variant("lora_linear", case.name, direction, "triton", torch.float32)
    assert outcome.values == {"wrong": f"{direction}: the results inside a CUDA graph differ from those outside"}


@pytest.mark.parametrize("name", [name for name, op in OPERATIONS.items() if op.mutates])
def test_a_graph_that_leaves_other_values_in_its_arguments_is_not_timed(on_cpu, monkeypatch, name):
    class Captured(FakeCapture):
        def replay(self):
            super().replay()
            inputs = getattr(self.calls[-1], "__wrapped__", self.calls[-1]).keywords
            inputs[on_cpu[name].mutates[0]].fill_(7)

    (case,) = on_cpu[name].cases
    assert kernels.time_variant(name, case.name, "forward", "triton", torch.float32).values["copies"] >= graphs.LEAST_CALLS
    monkeypatch.setattr(graphs, "CapturedCalls", Captured)
    outcome = kernels.time_variant(name, case.name, "forward", "triton", torch.float32)
    assert outcome.values == {"wrong": "forward: the results inside a CUDA graph differ from those outside"}


def test_arguments_are_as_before_after_every_variant(on_cpu):
    """The next variant is timed on them."""
    (case,) = on_cpu["begin_step"].cases
    inputs = kernels._inputs("begin_step", case.name, torch.float32)
    before = {name: inputs[name].clone() for name in on_cpu["begin_step"].mutates}
    for variant in ("triton", "library", "torch"):
        assert kernels.time_variant("begin_step", case.name, "forward", variant, torch.float32).values["median"] > 0
        assert all(torch.equal(inputs[name], one) for name, one in before.items())


def test_released_shapes_are_compiled_in_advance(on_cpu, monkeypatch):
    compiled = []
    monkeypatch.setattr("granite_kernels.launch.precompile", lambda launches, device: compiled.extend(launches))
    monkeypatch.setattr("granite_kernels.launch.architecture", lambda device: 90)
    for name in ("begin_step", "fused_linear", "lora_linear"):
        kernels._compile(name, on_cpu[name].cases[0].name, torch.bfloat16)
    assert {"_begin_step_kernel", "_fused_linear_kernel"} < {one.kernel.__name__ for one in compiled}
    kernels._compile("begin_step", "no such case", torch.bfloat16)  # what cannot be compiled is reported where it is timed


def test_a_run_writes_a_file_and_its_table(on_cpu, monkeypatch, tmp_path):
    monkeypatch.setattr(kernels, "compile_kernels", lambda operations, dtype: None)
    monkeypatch.setattr(graphs, "copy_rate", lambda: 4e12)
    monkeypatch.setattr(graphs, "matmul_rate", lambda dtype: 8e14)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    monkeypatch.setattr(Worker, "call", lambda self, *arguments: inline(*arguments))
    text = kernels.run(operations=["paged_attention"], dtype=torch.float32, compiled=False, out=tmp_path)
    (file,) = tmp_path.glob("kernels-a-gpu-*.json")
    result = json.loads(file.read_text())
    assert result["timing"] == "graph" and result["measurements"][0]["seconds"]["triton"]["copies"] >= 1
    assert text.startswith(kernels_table.table(result)) and "a GPU" in text


def test_each_shape_is_compiled_as_one_graph(on_cpu, monkeypatch):
    """PyTorch keeps eight compiled shapes of a function, and runs the ninth uncompiled."""
    events = []
    monkeypatch.setattr(torch, "compile", lambda function, **options: events.append(options) or function)
    monkeypatch.setattr(torch.compiler, "reset", lambda: events.append("reset"))
    forward, backward = measured(["lora_linear"], compiled=True)
    assert forward["seconds"]["compiled"] and backward["seconds"]["compiled"]
    assert events == ["reset", {"dynamic": False, "fullgraph": True}] * 2


def test_a_worker_keeps_its_process_until_it_is_unusable():
    with Worker() as worker:
        first, second = worker.call(process_id), worker.call(process_id)
        assert first == second != process_id()
        assert worker.call(Outcome, {}, "failed", True).not_timed == "failed"
        assert worker.call(process_id) != first


def test_a_worker_survives_the_death_of_its_process():
    with Worker() as worker:
        assert worker.call(os._exit, 3) == Outcome(not_timed="its process ended with exit code 3", unusable=True)
        assert worker.call(process_id).values["process"] != os.getpid()
        assert worker.call(time.sleep, 100, seconds=0.1) == Outcome(not_timed="stopped after 0 s", unusable=True)


def process_id() -> Outcome:
    return Outcome({"process": os.getpid()})


class FakeCuda:
    """The parts of torch.cuda that a capture uses; records what happens, in order."""

    def __init__(self, monkeypatch):
        self.events = []
        self.clock = 0.0
        cuda = self

        class Event:
            def __init__(self, enable_timing):
                assert enable_timing

            def record(self):
                self.time = cuda.clock

            def synchronize(self):
                cuda.events.append("wait")

            def elapsed_time(self, other):
                return (other.time - self.time) * 1e3

        class Graph:
            def replay(self):
                cuda.events.append("replay")
                cuda.clock += 0.5

        @contextlib.contextmanager
        def capturing(graph, stream):
            cuda.events.append("begin")
            yield
            cuda.events.append("end")

        for name, value in {
            "Event": Event,
            "CUDAGraph": Graph,
            "graph": capturing,
            "current_stream": lambda: None,
            "synchronize": lambda: cuda.events.append("wait"),
            "set_sync_debug_mode": lambda mode: cuda.events.append(f"waits: {mode}"),
        }.items():
            monkeypatch.setattr(torch.cuda, name, value)


def test_calls_are_warmed_up_and_checked_for_waits_before_capture(monkeypatch):
    cuda = FakeCuda(monkeypatch)
    calls = [lambda: cuda.events.append("a"), lambda: cuda.events.append("b")]
    captured = graphs.CapturedCalls(calls)
    assert cuda.events == ["a", "a", "waits: error", "a", "b", "waits: default", "begin", "a", "b", "end"]
    cuda.events.clear()
    assert captured.replay_seconds(4) == [0.5] * 4
    assert cuda.events == ["replay"] * (4 + graphs.WARM_UP) + ["wait"]
    assert captured.launch_seconds() >= 0


def test_a_wait_is_refused_before_the_capture_begins(monkeypatch):
    cuda = FakeCuda(monkeypatch)

    def waits():
        if "waits: error" in cuda.events:
            raise RuntimeError("called a synchronizing CUDA operation")

    with pytest.raises(graphs.HostWaitError, match="waits for the device"):
        graphs.CapturedCalls([waits])
    assert cuda.events == ["waits: error", "waits: default"]


def test_other_failures_are_not_reported_as_waits(monkeypatch):
    cuda = FakeCuda(monkeypatch)

    def fails():
        if "waits: error" in cuda.events:
            raise RuntimeError("an illegal memory access was encountered")

    with pytest.raises(RuntimeError, match="illegal memory access"):
        graphs.CapturedCalls([fails])
    assert cuda.events[-1] == "waits: default"


def test_percentiles_are_per_call(monkeypatch):
    class Uneven(FakeCapture):
        def replay_seconds(self, replays):
            return [number * 1e-3 for number in range(100, 0, -1)]

    monkeypatch.setattr(graphs, "CapturedCalls", Uneven)
    seconds, results = graphs.time_calls([lambda: 7] * 20)
    assert results == [7] * 20
    assert {name: round(value * 20e3) for name, value in seconds.items()} == {"median": 51, "p20": 21, "p80": 80}


@pytest.mark.gpu
@needs_gpu
def test_the_gpu_times_the_next_call_after_a_refused_wait():
    index = torch.arange(8, device="cuda")
    x = torch.randn(2**24, device="cuda")
    with graphs.side_stream(), pytest.raises(graphs.HostWaitError):
        graphs.time_calls([index.tolist])
    with graphs.side_stream():
        seconds, results = graphs.time_calls([lambda: x + 1] * 20)
        assert torch.equal(results[-1], x + 1) and 0 < seconds["median"] < 1e-3
        torch.randn(8, device="cuda")


@pytest.mark.gpu
@needs_gpu
def test_a_broken_capture_on_the_gpu_does_not_affect_the_next_call():
    case = next(case for case in OPERATIONS["lora_linear"].cases if case.released)
    with Worker() as worker:
        assert worker.call(break_a_capture).unusable
        for direction, variant in (("forward", "triton"), ("backward", "triton"), ("forward", "library"), ("forward", "torch")):
            outcome = worker.call(kernels.time_variant, "lora_linear", case.name, direction, variant, torch.bfloat16)
            assert 0 < outcome.values["median"] < 1e-3, outcome


def break_a_capture() -> Outcome:
    """Waits for the device in a way that the check before the capture does not detect."""
    try:
        with graphs.side_stream():
            graphs.time_calls([torch.cuda.synchronize])
    except RuntimeError as error:
        return Outcome(not_timed=str(error), unusable=True)
    return Outcome()
