"""The rehearsal without a GPU: what the double of a GPU counts, and the figures that the model must keep.

The models here have the released widths and few layers. That is enough: every layer makes the same launches.
"""

import json
from collections import Counter

import pytest
import torch

from bench import launches, rehearse, results
from bench.counting_gpu import CountingGPU
from bench.launches import UnknownOperationError
from bench.rehearse import Rehearsal

# Profiles of these calls on an H200 at commit cdd1619a: launches, without cuBLAS's reductions and fills (see bench/launches.py).
PROFILE = "whole-model-nvidia-h200-2026-11-26-cdd1619a.json"
WITHOUT = ("splitKreduce", "Memset")


@pytest.fixture(scope="module")
def committed():
    return json.loads(rehearse.FILE.read_text())


def figures(entries, work, name="4.1-2b", clips=1):
    (found,) = (one for one in entries if (one["work"], one["model"], one["clips"]) == (work, name, clips))
    return found


def counted(work, name, clips, layers=2):
    return rehearse.count(work, name, clips, layers)


# --- the model -------------------------------------------------------------------------------------------------------------------


# Rows of a step, the most launches of a layer and outside of the layers, and bytes moved over the fewest possible.
STEPS = {1: (5, 4, 1.01), 8: (5, 4, 1.01), 16: (8, 5, 1.05), 128: (8, 5, 1.15)}


@pytest.mark.parametrize("name", rehearse.MODELS)
def test_a_decode_step_waits_for_nothing_and_launches_little(name, committed):
    layers, counts = 40, {rows: counted(rehearse.STEP, name, rows) for rows in STEPS}
    three = {rows: counted(rehearse.STEP, name, rows, layers=3).launches for rows in (1, 16)}
    for rows, (of_layer, outside, ratio) in STEPS.items():
        found = counts[rows]
        assert found.waits == [] and found.late_reads == 0
        assert found.launches.total() == counts[1 if rows <= 8 else 16].launches.total()
        more = three[1 if rows <= 8 else 16].total() - found.launches.total()
        assert more <= of_layer and found.launches.total() - 2 * more <= outside
        recorded = figures(committed["measurements"], rehearse.STEP, name, rows)
        assert recorded["launches_per_layer"] == more
        assert recorded["launches"] == found.launches.total() + more * (layers - 2)
        assert 1 <= recorded["moved"] / recorded["least_moved"] <= ratio


def test_a_step_of_modules_launches_the_same_for_any_number_of_rows_except_for_merging_shared_keys(committed):
    one, many = (counted(rehearse.STEP_OF_MODULES, "4.1-2b", rows) for rows in (1, 128))
    assert one.launches == many.launches + Counter({"_paged_attention_merge_kernel": 2}) and one.waits == many.waits == []
    recorded = [figures(committed["measurements"], rehearse.STEP_OF_MODULES, "4.1-2b", rows)["launches_per_layer"] for rows in STEPS]
    assert max(recorded) <= min(recorded) + 1 and min(recorded) > 20


def test_int8_weights_halve_the_bytes_of_a_layer(committed):
    plain, int8 = (figures(committed["measurements"], rehearse.STEP, name) for name in ("4.1-2b", f"4.1-2b{rehearse.INT8}"))
    assert int8["launches"] == plain["launches"]
    sixteen = [figures(committed["measurements"], rehearse.STEP, name, 16) for name in ("4.1-2b", f"4.1-2b{rehearse.INT8}")]
    assert sixteen[1]["moved"] < sixteen[0]["moved"], "two blocks of rows read the weights twice"
    head = 2 * 2048 * 100353
    assert (int8["moved"] - head) / (plain["moved"] - head) < 0.51


@pytest.mark.parametrize("name", rehearse.MODELS)
def test_no_allocation_of_a_decode_step_depends_on_a_length(name):
    sizes = []
    with CountingGPU() as gpu, torch.no_grad():
        for context in (100, 400):  # both in a block table of 8 pages
            step = Rehearsal(gpu, name, 4, 2).step(context)
            step()
            with gpu.counting() as counts:
                step()
            sizes.append((counts.bytes, counts.launches))
    assert sizes[0] == sizes[1]
    assert sizes[0][0] > 0


@pytest.mark.parametrize("name", rehearse.MODELS)
def test_a_prefill_and_generate_wait_once(name, committed):
    for work in ("encoder, projector and prefill", f"generate, {rehearse.NEW_TOKENS} tokens"):
        counts = counted(work, name, 2)
        assert len(counts.waits) == 1 and "transfers.py" in counts.waits[0], counts.waits
        assert figures(committed["measurements"], work, name)["waits"] == 1
    assert counts.late_reads == rehearse.NEW_TOKENS


# Of one layer: clips, the most launches, and bytes moved over those of before its glue was fused.
LAYERS = {
    (rehearse.ENCODER, 1): (16, 0.96),  # SiLU is a launch of its own
    (rehearse.ENCODER, 128): (14, 0.73),
    (rehearse.PREFILL, 1): (10, 0.90),
    (rehearse.PREFILL, 128): (9, 0.43),
}


@pytest.mark.parametrize("name", rehearse.MODELS)
def test_a_layer_of_the_encoder_and_of_a_prefill_launches_little_and_moves_each_tensor_once(name, committed):
    before = {(one["work"], one["clips"]): one for one in committed["layers_before"]["measurements"] if one["model"] == name}
    for (work, clips), (most, ratio) in LAYERS.items():
        recorded = figures(committed["measurements"], work, name, clips)
        found = rehearse.of_a_layer(work, name, clips)
        assert {one: recorded[one] for one in found} == found
        assert found["launches_per_layer"] <= most
        assert found["moved_per_layer"] <= ratio * before[work, clips]["moved_per_layer"]


def test_the_encoder_launches_the_same_for_any_number_of_clips_of_one_path(committed):
    # Above one clip, SiLU is in the epilogue of the product before it.
    one, four, many = (counted(rehearse.ENCODER, "4.1-2b", clips) for clips in (1, 4, 128))
    assert one.launches == four.launches and one.waits == many.waits == []
    assert one.launches["silu_"] == many.launches["_silu_linear_kernel"] == one.launches.total() - many.launches.total() == 4
    recorded = figures(committed["measurements"], rehearse.ENCODER)
    assert one.launches.total() + recorded["launches_per_layer"] * (16 - 2) == recorded["launches"]


@pytest.mark.parametrize(("clips", "most"), [(1, 16), (128, 14)])
def test_turboctc_waits_for_nothing_and_a_block_launches_little(clips, most, committed):
    counts = counted(rehearse.PATH, rehearse.TURBOCTC, clips, layers=4)
    assert counts.waits == [] and counts.late_reads == 0
    assert counts.launches["_ctc_best_kernel"] == counts.launches["_ctc_collapse_kernel"] == 1
    recorded = figures(committed["measurements"], rehearse.PATH, rehearse.TURBOCTC, clips)
    found = rehearse.of_a_layer(rehearse.PATH, rehearse.TURBOCTC, clips)
    assert {one: recorded[one] for one in found} == found
    assert found["launches_per_layer"] <= most and recorded["waits"] == 0
    assert counts.launches.total() + recorded["launches_per_layer"] * (16 - 4) == recorded["launches"]


@pytest.mark.parametrize(
    ("profile", "work"), [("4.1-2b decode step, batch 1", "decode step"), ("encoder+projector 1 x 10 s", "encoder and projector")]
)
def test_the_counts_before_the_engine_are_those_of_a_profiler(profile, work, committed):
    """The map of launches is right: at the commit of these counts, the code was nearly that of the profile."""
    kernels = json.loads((results.FOLDER / PROFILE).read_text())["profiles"][profile]["top"]
    measured = sum(one["count"] for one in kernels)
    without = sum(one["count"] for one in kernels if not any(part in one["kernel"] for part in WITHOUT))
    found = figures(committed["before"]["measurements"], work)["launches"]
    assert abs(found - measured) <= 0.05 * measured
    assert abs(found - without) <= 0.02 * without


def test_the_check_names_what_differs(committed, capsys, monkeypatch, tmp_path):
    changed = json.loads(json.dumps(committed))
    figures(changed["measurements"], "decode step")["launches"] += 1
    monkeypatch.setattr(rehearse, "FILE", tmp_path / "rehearsal.json")
    rehearse.FILE.write_text(json.dumps(changed))
    monkeypatch.setattr(rehearse, "measurements", lambda: iter(committed["measurements"]))
    assert rehearse.run(check=True) == 1
    lines = [line for line in capsys.readouterr().out.splitlines() if "in the file" in line]
    launched = figures(committed["measurements"], "decode step")["launches"]
    assert lines == [f"('4.1-2b', 'decode step', 1): launches is {launched}, in the file {launched + 1}"]
    assert json.loads(rehearse.FILE.read_text()) == changed, "--check writes nothing"
    assert rehearse.run(check=False) == rehearse.run(check=True) == 0
    assert json.loads(rehearse.FILE.read_text())["before"] == committed["before"]


# --- the double of a GPU ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def gpu():
    with CountingGPU() as gpu, torch.no_grad():
        yield gpu


COUNTS = {
    "a product": (lambda x: x @ x, 1, 64),
    "views": (lambda x: x.view(16)[2:].unsqueeze(0).expand(3, -1), 0, 0),
    "an allocation": (lambda x: torch.empty(8, device="cuda"), 0, 32),
    "in place": (lambda x: x.add_(1), 1, 0),
    "nothing to do": (lambda x: x[:0] + 1, 0, 0),
    "zeros": (lambda x: torch.zeros_like(x), 1, 64),
    "out of place, copied first": (lambda x: x.index_copy(0, torch.zeros(1, dtype=torch.int64, device="cuda"), x[:1]), 3, 64 + 8),
    "cat of 129": (lambda x: torch.cat([x] * 129), 2, 129 * 64),
    "a part of the result's memory": (lambda x: (x + 1)[0], 1, 64),
}


@pytest.mark.parametrize("name", COUNTS)
def test_launches_and_new_memory_are_counted(gpu, name):
    call, expected, new = COUNTS[name]
    x = torch.ones(4, 4, device="cuda")
    with gpu.counting() as counts:
        call(x)
    assert (counts.launches.total(), counts.bytes, counts.waits) == (expected, new, [])


def test_waits_follow_the_rules_of_the_stand_in(gpu):
    x = torch.ones(3, device="cuda")
    with gpu.counting() as counts:
        x + torch.ones(3).pin_memory().to("cuda", non_blocking=True)
        assert counts.waits == []
        x + torch.ones(3).to("cuda")
        x.sum().item()
    assert len(counts.waits) == 2 and all("test_rehearse.py:" in one for one in counts.waits), counts.waits


def test_an_operation_that_the_map_does_not_have_is_named(gpu):
    x = torch.ones(3, 3, device="cuda")
    with pytest.raises(UnknownOperationError, match=r"aten::\w*inv\w* makes"), gpu.counting():
        torch.linalg.inv(x)


def test_an_operation_is_in_the_map_once():
    groups = [launches.NONE, launches.ONE, launches.MANY.keys(), launches.COMPUTED.keys()]
    assert sum(map(len, groups)) == len(set().union(*groups))


def test_a_cpu_tensor_among_device_tensors_is_refused(gpu):
    x = torch.ones(3, device="cuda")
    assert (x + torch.tensor(1.0)).device.type == "cuda"
    with pytest.raises(RuntimeError, match="CPU tensor of shape"):
        x + torch.ones(3)


def test_integers_keep_their_values_until_something_unknown_is_written(gpu):
    ids = torch.tensor([[3, 1], [2, 5]]).pin_memory().to("cuda", non_blocking=True)
    row = ids[1]
    assert (ids.t() + 1).tolist() == [[4, 3], [2, 6]]
    ids.add_(1)
    assert row.tolist() == [3, 6], "a view has the values of its tensor"
    ids.copy_(torch.rand(2, 2, device="cuda").long())
    assert row.tolist() == [0, 0]


def test_our_operations_count_their_kernels(gpu):
    from granite_kernels import lora_linear

    x, weight, a, b = (torch.ones(*shape, device="cuda") for shape in ((3, 8), (4, 8), (1, 2, 8), (1, 4, 2)))
    scaling = torch.ones(1, device="cuda")
    with gpu.counting() as counts:
        lora_linear(x, weight, None, a, b, scaling, None)
    assert counts.launches.total() >= 1 and all(name.startswith("_lora") for name in counts.launches), counts.launches
    assert counts.bytes >= 3 * 4 * 4


@pytest.mark.parametrize(("rows", "gated"), [(64_000, False), (500, False), (500, True)])
def test_operations_of_pytorch_inside_of_ours_are_counted(gpu, rows, gated):
    from granite_kernels import silu_linear

    x, weight, bias = (torch.empty(size, dtype=torch.bfloat16, device="cuda") for size in ((rows, 64), (4096, 64), (4096,)))
    with gpu.counting() as counts:
        silu_linear(x, weight, bias, gated=gated)
    product, read = 2 * rows * 4096, 2 * (x.numel() + weight.numel() + bias.numel())
    expected = {
        (64_000, False): (["_silu_linear_kernel"], product, read + product),
        (500, False): (["addmm", "silu_"], product, read + 3 * product),
        (500, True): (["_silu_product_kernel", "addmm"], product * 3 // 2, read + product * 5 // 2),
    }
    assert (sorted(counts.launches.elements()), counts.bytes, counts.moved) == expected[rows, gated]
