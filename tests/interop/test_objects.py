"""Copies, replicas, threads and memory of an accelerated model, and what somebody else does to its class."""

import copy
import gc
import io
import pickle
import warnings
import weakref
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from torch import nn

from granite_speech import accelerate, restore
from granite_speech.interop.accelerate import acceleration_of
from tests.support.live_models import LIVE_SPECS, batch, speech
from tests.support.reference_models import build_reference, clip_inputs, features


def close(ours: torch.Tensor, theirs: torch.Tensor, tolerance: float = 2e-5) -> bool:
    return float((ours - theirs).abs().max()) <= tolerance * float(theirs.abs().max())


def test_what_somebody_kept_of_an_accelerated_model_still_works():
    spec = LIVE_SPECS[0]
    live, x = build_reference(spec), features(20)
    with accelerate(live):
        kept = speech(live).encoder.forward
        generate = live.generate
    with torch.no_grad():
        expected = speech(live).encoder(x)
        assert torch.equal(kept(x)[0], expected[0])
        assert torch.equal(generate(**clip_inputs(spec, 20)), live.generate(**clip_inputs(spec, 20)))


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda one: pickle.loads(pickle.dumps(one)), "torch.save"], ids=["deepcopy", "pickle", "save"]
)
def test_a_copy_is_not_accelerated_and_shares_nothing(copied: Any):
    spec = LIVE_SPECS[0]
    live = accelerate(build_reference(spec))
    if copied == "torch.save":
        file = io.BytesIO()
        torch.save(live, file)
        file.seek(0)
        other = torch.load(file, weights_only=False)
    else:
        other = copied(live)
    assert type(other).__mro__ == type(restore(live)).__mro__
    inputs = clip_inputs(spec, 45)
    with torch.no_grad():
        expected = live(**inputs).logits
        for one in live.parameters():
            one.zero_()
        assert torch.equal(other(**inputs).logits, expected)
        accelerate(other)
        assert close(other(**inputs).logits, expected)
        assert other.generate(**inputs, max_new_tokens=3).shape[1] == inputs["input_ids"].shape[1] + 3


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda one: pickle.loads(pickle.dumps(one))], ids=["deepcopy", "pickle"])
def test_a_copy_of_a_model_of_peft_is_not_accelerated_either(copied: Any):
    config = LoraConfig(r=3, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    model = accelerate(get_peft_model(build_reference(LIVE_SPECS[-1]), config).eval())
    other, inputs = copied(model), clip_inputs(LIVE_SPECS[-1], 45)
    assert acceleration_of(other) is None
    expected = model.generate(**inputs, max_new_tokens=3)
    assert torch.equal(accelerate(other).generate(**inputs, max_new_tokens=3), expected)
    assert acceleration_of(other).live is other.get_base_model()


def test_saving_and_loading(tmp_path):
    spec = LIVE_SPECS[-1]
    live = build_reference(spec)
    live.save_pretrained(tmp_path / "plain")
    accelerate(live).save_pretrained(tmp_path / "accelerated")
    for file in sorted((tmp_path / "plain").iterdir()):
        assert file.read_bytes() == (tmp_path / "accelerated" / file.name).read_bytes(), file.name
    loaded = type(live).from_pretrained(tmp_path / "accelerated")
    assert list(loaded.state_dict()) == list(live.state_dict())


def test_a_replica_of_data_parallel_runs_its_own_weights():
    live = accelerate(build_reference(LIVE_SPECS[0]))
    encoder, x = speech(live).encoder, features(20)
    replica = encoder._replicate_for_data_parallel()
    replica.input_linear = nn.Linear(160, 32)
    with torch.no_grad():
        assert not close(replica(x)[0], encoder(x)[0], 1e-2)
    assert not {"generate", "forward"} & vars(live._replicate_for_data_parallel()).keys()


def test_a_shallow_copy_has_its_own_settings():
    live = accelerate(build_reference(LIVE_SPECS[0]))
    other = copy.copy(live)
    other.generation_config = transformers.GenerationConfig(max_new_tokens=2)
    inputs = clip_inputs(LIVE_SPECS[0], 20)
    assert other.generate(**inputs).shape[1] == inputs["input_ids"].shape[1] + 2


def test_memory_is_freed():
    live = accelerate(build_reference(LIVE_SPECS[0]))
    inputs = clip_inputs(LIVE_SPECS[0], 20)
    live.generate(**inputs, max_new_tokens=2)
    twin, encoder = weakref.ref(acceleration_of(live).twin), weakref.ref(speech(live).encoder)
    speech(live).encoder = copy.deepcopy(encoder())
    live.generate(**inputs, max_new_tokens=2)
    gc.collect()
    assert encoder() is None and twin() is not None
    restore(live)
    gc.collect()
    assert twin() is None
    model = weakref.ref(accelerate(live))
    live.generate(**inputs, max_new_tokens=2)
    del live
    gc.collect()
    assert model() is None


def test_another_default_device():
    live, inputs = build_reference(LIVE_SPECS[0]), batch(LIVE_SPECS[0])
    with torch.no_grad():
        theirs = live(**inputs).logits, live.generate(**inputs, max_new_tokens=4)
        accelerate(live)
        with torch.device("meta"):
            assert close(live(**inputs).logits, theirs[0])
            assert torch.equal(live.generate(**inputs, max_new_tokens=4), theirs[1])


def test_threads_at_once():
    live, inputs = build_reference(LIVE_SPECS[0]), [batch(LIVE_SPECS[0], seed=seed) for seed in range(4)]
    theirs = [live.generate(**one, max_new_tokens=8) for one in inputs]
    accelerate(live)
    filters = list(warnings.filters)
    with ThreadPoolExecutor(4) as threads:
        found = list(threads.map(lambda one: live.generate(**one, max_new_tokens=8), inputs * 4))
    assert all(torch.equal(one, expected) for one, expected in zip(found, theirs * 4, strict=True))
    assert warnings.filters == filters


def test_a_class_that_somebody_set_while_accelerated_stays():
    live = build_reference(LIVE_SPECS[0])
    inputs = clip_inputs(LIVE_SPECS[0], 20)
    expected = live.generate(**inputs, max_new_tokens=2)

    class Mine(type(live)):
        pass

    accelerate(live).__class__ = Mine
    assert torch.equal(live.generate(**inputs, max_new_tokens=2), expected)
    assert type(restore(live)) is Mine and type(restore(accelerate(live))) is Mine


def test_torch_jit_traces_transformers_own_code():
    live, x = build_reference(LIVE_SPECS[0]), features(26)

    class States(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = speech(live).encoder

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.encoder(x)[0]

    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore", torch.jit.TracerWarning)
        theirs = torch.jit.trace(States(), x, check_trace=False)
        accelerate(live)
        ours = torch.jit.trace(States(), x, check_trace=False)
        for one in (x, torch.cat((x, x.flip(1)))):
            assert torch.equal(ours(one), theirs(one))
