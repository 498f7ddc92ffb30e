"""TurboCTC's benchmarks, on a CPU and for a GPU, in a small shape: results are checked before anything is timed."""

import json

import pytest
import torch

from bench import cpu_ctc, cpu_table, shapes, turboctc_gpu
from bench.turns import OURS, REFERENCES, SYSTEMS
from granite_speech.modules import int8_weight

SMALL = {
    "vocab_size": 40,
    "encoder_config": {
        "vocab_size": 40,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 4,
        "num_attention_heads": 2,
        "num_mel_bins": 8,
        "context_size": 16,
        "max_position_embeddings": 16,
    },
}


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_ctc, "CLIP_SECONDS", (1, 2, 3))
    monkeypatch.setattr(shapes, "CLIP_SECONDS", 1)
    monkeypatch.setattr(int8_weight, "_FEWEST", 1)


@pytest.fixture
def halved_head(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ours has other weights than transformers'."""
    own = cpu_ctc.pair

    def changed(configuration):
        ours, theirs = own(configuration)
        with torch.no_grad():
            ours.ctc_head.weight.mul_(0.5)
        return ours, theirs

    for module in (cpu_ctc, turboctc_gpu):
        monkeypatch.setattr(module, "pair", changed)


def test_every_system_is_timed_on_a_cpu():
    found = cpu_ctc.measure(3, configuration=SMALL)
    one, batch = found["measurements"]
    assert (one["audio_seconds"], one["rounds"], batch["audio_seconds"], batch["rounds"]) == (3, 3, 6, 2)
    assert set(one["seconds"]) == set(one["rtfx"]) == set(SYSTEMS) and set(one["floors"]) == set(OURS)
    assert one["rtfx"]["ours float32"] == pytest.approx(3 / one["seconds"]["ours float32"])
    assert set(found["errors"]) == set(SYSTEMS) - {"ours float32"}
    # Products of 150 frames, which two blocks halve, in float32 and as many in bfloat16.
    flops = {name: floor["matmul_flops"] for name, floor in one["floors"].items()}
    assert flops["ours float32"] > 2 * 150 * 32 * 64 * 2 and all(value >= 0.9 * flops["ours float32"] for value in flops.values())
    result = {"rounds": 3, "turboctc": found}
    lines = cpu_table._times_real(result)
    assert lines[0].startswith("TurboCTC, 4 x 32") and lines[-1].startswith("| error |") and len(lines) == 7
    assert all(len(line.split("|")) == 3 + len(REFERENCES) + len(OURS) for line in lines[2:])


def test_other_logits_are_not_timed(halved_head: None, tmp_path):
    with pytest.raises(SystemExit, match="the logits of transformers float32"):
        cpu_ctc.measure(1, configuration=SMALL)
    with pytest.raises(SystemExit, match="so nothing was timed"):
        turboctc_gpu.run(device="cpu", dtype="float32", out=tmp_path, clips=(1,), rounds=1, configuration=SMALL)
    assert not list(tmp_path.iterdir())


def test_batches_for_a_gpu_are_timed_beside_transformers(tmp_path):
    text = turboctc_gpu.run(device="cpu", dtype="float32", out=tmp_path, clips=(1, 3), rounds=2, configuration=SMALL)
    (file,) = tmp_path.iterdir()
    result = json.loads(file.read_text())
    assert [one["clips"] for one in result["measurements"]] == [1, 3] and result["kind"] == "turboctc"
    for one in result["measurements"]:
        assert set(one["seconds"]) == {"eager", "transformers"}  # nothing can be captured on a CPU
        assert one["error"] < 1e-4 and one["equal_ids"] == 1
        assert one["ratio"]["eager"] == pytest.approx(one["seconds"]["transformers"] / one["seconds"]["eager"])
    assert "| 3 | – | " in text and str(file) in text
