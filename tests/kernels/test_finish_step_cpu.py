"""The end of a decode step as a CPU computes it: everything is exactly what the reference gives."""

import copy

import pytest
import torch
from granite_kernels import finish_step
from granite_kernels.finish_step import OPERATION
from granite_kernels.op import CHOICE, Case
from hypothesis import given, settings
from hypothesis import strategies as st


def outcome(function, given_values: dict) -> dict[str, torch.Tensor]:
    """The result, and what the arguments are afterwards."""
    values = copy.deepcopy(given_values)
    return {"chosen": function(**values)} | {name: values[name] for name in OPERATION.mutates}


def check(values: dict) -> None:
    found, expected = outcome(OPERATION.cpu, values), outcome(OPERATION.reference, values)
    for name, one in expected.items():
        assert found[name].dtype == one.dtype and torch.equal(found[name].nan_to_num(9), one.nan_to_num(9)), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", [one for one in OPERATION.cases if not one.released], ids=lambda one: one.name)
def test_every_case(case: Case, dtype: torch.dtype):
    check(case.inputs(dtype))


@settings(max_examples=60, deadline=None)
@given(data=st.data(), rows=st.integers(0, 70), columns=st.integers(1, 5), ends=st.integers(0, 3))
def test_any_state(data: st.DataObject, rows: int, columns: int, ends: int):
    rng = torch.Generator().manual_seed(data.draw(st.integers(0, 999)))

    def integers(low: int, high: int, *shape: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
        return torch.randint(low, high, shape, generator=rng, dtype=dtype)

    check(
        {
            "scores": integers(-2, 3, rows, columns).float(),  # many are equal: the first of them counts
            "ids": data.draw(st.sampled_from([None, integers(0, 4, rows, columns)])),
            "logits": None,
            "tokens": integers(0, 4, rows, dtype=torch.int64),
            "history": integers(0, 4, rows, dtype=torch.int64),
            "logprobs": torch.zeros(rows),
            "active": integers(0, 2, rows),
            "kv_lens": integers(0, 5, rows),
            "limits": integers(0, 5, rows),
            "ends": integers(-1, 4, rows, ends, dtype=torch.int64),
            "divisor": 8.0,
        }
    )


def test_it_is_what_a_call_on_a_cpu_runs(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv(CHOICE, raising=False)
    called, own = [], OPERATION.cpu
    monkeypatch.setitem(vars(OPERATION), "cpu", lambda *values, **named: called.append(len(values)) or own(*values, **named))
    values = next(one for one in OPERATION.cases if not one.released).inputs(torch.float32)
    finish_step(**values)
    assert called
