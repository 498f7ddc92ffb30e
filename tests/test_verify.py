"""`granite-speech verify` passes for equal models, and names the first stage of one that was altered."""

import json
import sys
import threading
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from granite_speech import (
    GraniteSpeechFeatureExtractor,
    GraniteSpeechForConditionalGeneration,
    GraniteSpeechProcessor,
    verify,
    verify_runs,
    verify_speech,
)
from granite_speech.cli import main
from granite_speech.inputs.tokenizer import GraniteSpeechTokenizer
from tests.bench.test_audit import compiled
from tests.support.random_checkpoint import write_checkpoint
from tests.support.reference_models import SPECS, Spec, build_reference, write_released_layout
from tests.support.small_tokenizer import write_tokenizer

WITH_ADAPTER, PLUS = SPECS[1], SPECS[3]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Weights in bfloat16, so that both dtypes are compared."""
    folder = tmp_path_factory.mktemp("checkpoint")
    write_checkpoint(folder).to(torch.bfloat16).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def float32_folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("float32-checkpoint")
    write_checkpoint(folder)
    return folder


def write_whole(spec: Spec, folder: Path) -> Path:
    """A reference checkpoint with a processor."""
    vocab_size, audio_token_index = write_tokenizer(folder)
    spec = replace(spec, text=spec.text | {"vocab_size": vocab_size}, top=spec.top | {"audio_token_index": audio_token_index})
    write_released_layout(build_reference(spec), folder)
    window, rate = spec.top.get("window_size", 15), spec.top.get("downsample_rate", 5)
    extractor = GraniteSpeechFeatureExtractor(projector_window_size=window, projector_downsample_rate=rate)
    GraniteSpeechProcessor(extractor, GraniteSpeechTokenizer.from_folder(folder)).save_pretrained(folder)
    return folder


def run(capfd, folder) -> tuple[int, str, str]:
    status = main(["verify", str(folder), "--device", "cpu"])
    return status, *capfd.readouterr()


def alter(monkeypatch, change) -> None:
    """Apply `change` to our model whenever it is loaded."""
    load = GraniteSpeechForConditionalGeneration.from_pretrained

    @torch.no_grad()
    def altered(*args, **kwargs):
        model = load(*args, **kwargs)
        change(model)
        return model

    monkeypatch.setattr(GraniteSpeechForConditionalGeneration, "from_pretrained", altered)


def test_a_good_checkpoint_passes_in_both_dtypes(folder, capfd):
    status, out, _ = run(capfd, folder)
    assert status == 0, out
    assert "MISS" not in out and out.count("all stages within") == 2
    lines = out.splitlines()
    assert "float32" in lines and "bfloat16" in lines
    for stage in ("features", "encoder.layers.3", "projector", "language_model.model.layers.3", "logits", "greedy ids"):
        assert sum(line.startswith(stage + " ") for line in lines) == 2, stage
    assert sum(line.startswith(("granite_speech: ", "transformers: ")) for line in lines) == 4


@pytest.mark.parametrize("spec", [WITH_ADAPTER, PLUS], ids=lambda spec: spec.name)
def test_different_checkpoints_pass(spec, tmp_path):
    comparison, *more = verify.verify(write_whole(spec, tmp_path), device="cpu", max_new_tokens=12)
    assert comparison.first_miss is None and not more, verify.report([comparison])
    assert comparison.words["granite_speech"] == comparison.words["transformers"]
    assert len(comparison.stages) == len({stage.name for stage in comparison.stages}) > 12


ALTERED = {
    "features": None,
    "encoder.input_linear": "encoder.input_linear.weight",
    "encoder.layers.0": "encoder.layers.0.attn.rel_pos_emb.weight",
    "encoder.out_mid": "encoder.out_mid.weight",
    "encoder.layers.2": "encoder.layers.2.conv.batch_norm.running_var",
    "projector": "projector.qformer.encoder.layer.1.output_query.dense.weight",
    "language_model.model.layers.1": "language_model.model.layers.1.self_attn.v_proj.lora_B.weight",
    "language_model.model.layers.3": "language_model.model.layers.3.mlp.down_proj.weight",
    "logits": "language_model.lm_head.weight",
}


@pytest.mark.parametrize("stage, weight", ALTERED.items(), ids=ALTERED)
def test_the_first_wrong_stage_is_named(float32_folder, monkeypatch, stage, weight):
    """One weight is 5 % larger, or the feature extractor amplifies the audio by 1 %."""
    if weight is None:
        call = GraniteSpeechFeatureExtractor.__call__

        def amplified(self, clips, **device):
            return call(self, [1.01 * clip for clip in clips], **device)

        monkeypatch.setattr(GraniteSpeechFeatureExtractor, "__call__", amplified)
    else:
        alter(monkeypatch, lambda model: model.state_dict()[weight].mul_(1.05))
    (comparison,) = verify.verify(float32_folder, device="cpu", max_new_tokens=2)
    assert comparison.first_miss.name == stage, verify.report([comparison])


def test_a_miss_sets_the_exit_status(folder, capfd, monkeypatch):
    alter(monkeypatch, lambda model: model.decoder.layers[2].mlp.down_proj.weight.mul_(1.05))
    status, out, _ = run(capfd, folder)
    assert status == 1
    assert out.count("first stage that misses: language_model.model.layers.2\n") >= 1
    missing = [line.split()[0] for line in out.splitlines() if line.endswith("MISS")]
    assert missing[0] == "language_model.model.layers.2"


def test_undivided_logits_are_a_miss(float32_folder, monkeypatch):
    alter(monkeypatch, lambda model: setattr(model.language_model.config, "logits_scaling", 1.0))
    first_miss = verify.verify(float32_folder, device="cpu", max_new_tokens=2)[0].first_miss
    assert first_miss is not None and first_miss.name == "logits"


def test_nan_and_a_wrong_shape_miss():
    assert verify.Stage("x", float("nan"), 1.0).missed and verify.Stage("x", float("inf"), 1.0).missed
    assert not verify.Stage("x", 0.0, 0.0).missed
    assert verify_runs.relative_rms(torch.ones(2, 3), torch.ones(3, 3)) == float("inf") == verify_runs.relative_rms(None, torch.ones(2))


def test_only_ties_may_be_broken_differently():
    logits = torch.tensor([1.0, 1.0 - 1e-6, 0.5])
    theirs = verify_runs.Run({}, torch.tensor([2, 0, 1]), [torch.tensor([0.0, 0.0, 9.0]), logits, logits], 0.0, "")
    assert verify_speech.regret(torch.tensor([2, 0, 1]), theirs) == 0.0
    assert 0 < verify_speech.regret(torch.tensor([2, 1, 2]), theirs) < verify_runs.TIE, "tokens after a tie are not compared"
    assert verify_speech.regret(torch.tensor([2, 2, 1]), theirs) == 0.5
    assert verify_speech.regret(torch.tensor([2, 0]), theirs) == float("inf")


@pytest.mark.parametrize("absent", ["transformers", "peft"])
def test_without_transformers_or_peft_it_cannot_run(folder, capfd, monkeypatch, absent):
    monkeypatch.setitem(sys.modules, absent, None)
    status, out, err = run(capfd, folder)
    assert (status, out) == (2, "")
    assert err.startswith("granite-speech: no GraniteSpeechForConditionalGeneration") and "pip install" in err and absent in err


@pytest.mark.parametrize(
    "error, message",
    [(RuntimeError("no kernel"), "transformers failing"), (torch.OutOfMemoryError("40 GB"), "does not fit on cpu")],
    ids=repr,
)
def test_a_failed_run_is_not_a_miss(float32_folder, capfd, monkeypatch, error, message):
    def fail(side, device):
        raise error

    monkeypatch.setattr(verify_speech, "_stage_values", fail)
    status, out, err = run(capfd, float32_folder)
    assert (status, out) == (2, "")
    assert message in err and str(error) in err


def test_without_a_checkpoint_it_cannot_run(capfd, tmp_path):
    status, out, err = run(capfd, tmp_path / "nowhere")
    assert (status, out) == (2, "") and "nowhere" in err


def test_an_incompletely_loaded_reference_is_refused(folder, tmp_path, capfd):
    """transformers invents weights that it does not find and only warns; that must not be reported as our error."""
    from safetensors.torch import load_file, save_file

    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        (tmp_path / name).unlink()
    tensors = load_file(tmp_path / "model.safetensors")
    renamed = {name.replace("q_proj.weight", "q_proj.base_layer.weight"): tensor for name, tensor in tensors.items()}
    save_file(renamed, tmp_path / "model.safetensors", {"format": "pt"})
    config = json.loads((tmp_path / "config.json").read_text()) | {"has_lora_adapter": False}
    (tmp_path / "config.json").write_text(json.dumps(config))
    status, out, err = run(capfd, tmp_path)
    assert (status, out) == (2, "")
    assert "did not load" in err and "q_proj" in err


# --- compilation in advance ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_kernel_is_predicted_and_compiled_once(dtype):
    """Kernels of the layers module by module, of a fused prompt and of the end of a step. Compiling them took most of the time on a GPU."""
    done = compiled("-m", "tests.support.precompilation", dtype)
    assert done.returncode == 0, done.stderr[-2000:]
    counts = json.loads(done.stdout)
    assert counts["unpredicted"] == counts["later"] == []
    kernels = Counter(counts["precompiled"])
    # LayerNorm with and without a second norm, and of two widths; the Q-Former's queries attend to themselves and to frames.
    assert kernels - Counter(set(kernels)) == {"_add_layer_norm_fwd_kernel": 2, "_window_attention_fwd_kernel": 1}
    assert len(kernels) == 16
    assert {"_rotary_write_kernel", "_add_rms_norm_kernel", "_silu_product_kernel"} < kernels.keys()


def test_kernels_are_compiled_while_transformers_runs(monkeypatch, folder):
    compiling, transformers_has_run = threading.Event(), threading.Event()
    launches = []

    def compile_launches(recorded, device):
        compiling.set()
        assert transformers_has_run.wait(60)
        launches.append(([one.kernel.__name__ for one in recorded], device))

    def run(load, measure, dtype, device):
        assert compiling.wait(60), "a model ran before the compilation began"
        transformers_has_run.set()
        return verify_runs.Run({"logits": torch.zeros(1, 2)}, torch.zeros(1, dtype=torch.int64), [torch.zeros(2)], 0.0, "")

    monkeypatch.setattr(verify, "choose_device", lambda *given: torch.device("cuda"))
    monkeypatch.setattr(verify, "architecture", lambda device: 90)
    monkeypatch.setattr(verify, "precompile_launches", compile_launches)
    monkeypatch.setattr(verify, "run", run)
    assert len(verify.verify(folder)) == len(launches) == 2
    for names, device in launches:
        assert device.type == "cuda" and {"_block_attention_fwd_kernel", "_paged_attention_decode_kernel"} <= set(names)


def test_nothing_is_compiled_if_the_references_run(monkeypatch, folder):
    run = verify_runs.Run({"logits": torch.zeros(1, 2)}, torch.zeros(1, dtype=torch.int64), [torch.zeros(2)], 0.0, "")
    monkeypatch.setenv("GRANITE_SPEECH_KERNELS", "torch")
    monkeypatch.setattr(verify, "choose_device", lambda *given: torch.device("cuda"))
    monkeypatch.setattr(verify, "architecture", lambda device: 90)
    monkeypatch.setattr(verify, "precompile_launches", lambda launches, device: pytest.fail("compiled"))
    monkeypatch.setattr(verify, "run", lambda *given: run)
    assert len(verify.verify(folder)) == 2
