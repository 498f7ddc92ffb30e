"""`granite-speech verify` for TurboCTC."""

from collections import Counter
from pathlib import Path

import pytest
import torch

from granite_speech import GraniteSpeech5FeatureExtractor, GraniteSpeech5ForCTC, GraniteSpeech5Processor, verify
from granite_speech.checkpoints.folder import Checkpoint
from granite_speech.cli import main
from granite_speech.config_ctc import GraniteSpeech5CTCConfig
from granite_speech.inputs.ctc_tokenizer import GraniteSpeech5Tokenizer
from granite_speech.verify_ctc import CTCTask
from granite_speech.verify_runs import Run
from tests.support.ctc_models import SPECS, CTCSpec, build_reference
from tests.support.ctc_tokenizers import write_ctc_tokenizer


def write(spec: CTCSpec, folder: Path, *, dtype: torch.dtype = torch.float32) -> Path:
    """A checkpoint of transformers with a processor; its vocabulary is the tokenizer's."""
    vocab_size = write_ctc_tokenizer(folder)
    encoder = spec.encoder | {"vocab_size": vocab_size, "num_mel_bins": 20}
    build_reference(CTCSpec(spec.name, encoder, spec.top)).to(dtype).save_pretrained(folder)
    extractor = GraniteSpeech5FeatureExtractor(num_mel_bins=20)
    GraniteSpeech5Processor(extractor, GraniteSpeech5Tokenizer.from_folder(folder)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return write(SPECS[0], tmp_path_factory.mktemp("checkpoint"))


def test_a_good_checkpoint_passes_in_both_dtypes(tmp_path, capfd):
    status = main(["verify", str(write(SPECS[0], tmp_path, dtype=torch.bfloat16)), "--device", "cpu"])
    out = capfd.readouterr().out
    assert status == 0 and "MISS" not in out and out.count("all stages within") == 2, out
    for stage in ("features", "encoder.input_linear", "encoder.layers.3", "encoder.out_mid", "logits", "loss", "greedy ids"):
        assert sum(line.startswith(stage + " ") for line in out.splitlines()) == 2, stage


@pytest.mark.parametrize("spec", SPECS[1:], ids=lambda spec: spec.name)
def test_different_checkpoints_pass(spec, tmp_path):
    [comparison] = verify.verify(write(spec, tmp_path), device="cpu")
    assert comparison.first_miss is None, verify.report([comparison])
    assert comparison.words["granite_speech"] == comparison.words["transformers"] != ""


ALTERED = {
    "features": None,
    "encoder.input_linear": "encoder.input_linear.weight",
    "encoder.layers.0": "encoder.layers.0.self_attn.rel_pos_emb.weight",
    "encoder.out_mid": "encoder.out_mid.weight",
    "encoder.layers.2": "encoder.layers.2.conv.norm.running_var",
    "logits": "ctc_head.weight",
}


@pytest.mark.parametrize("stage, weight", ALTERED.items(), ids=ALTERED)
def test_the_first_wrong_stage_is_named(tmp_path, monkeypatch, stage, weight):
    """One weight is 5 % larger, or the audio is louder by 1 %."""
    folder = write(CTCSpec("two heads", {}, {"tie_word_embeddings": False}), tmp_path)
    if weight is None:
        call = GraniteSpeech5FeatureExtractor.__call__
        monkeypatch.setattr(GraniteSpeech5FeatureExtractor, "__call__", lambda self, clips, **others: call(self, 1.01 * clips[0], **others))
    else:
        load = GraniteSpeech5ForCTC.from_pretrained

        @torch.no_grad()
        def altered(*given, **options):
            model = load(*given, **options)
            model.state_dict()[weight].mul_(1.05)
            return model

        monkeypatch.setattr(GraniteSpeech5ForCTC, "from_pretrained", altered)
    [comparison] = verify.verify(folder, device="cpu")
    assert comparison.first_miss.name == stage, verify.report([comparison])


def test_a_wrong_loss_and_wrong_tokens_are_misses(folder, monkeypatch):
    import granite_speech.model_ctc as model_ctc

    loss = model_ctc.ctc_loss
    monkeypatch.setattr(model_ctc, "ctc_loss", lambda *given: 1.001 * loss(*given))
    generate = GraniteSpeech5ForCTC.generate
    monkeypatch.setattr(GraniteSpeech5ForCTC, "generate", lambda self, **inputs: generate(self, **inputs).roll(1, 1))
    [comparison] = verify.verify(folder, device="cpu")
    assert [stage.name for stage in comparison.stages if stage.missed] == ["loss", "greedy ids"]


def test_only_ties_may_be_broken_differently():
    logits = torch.tensor([[1.0, 1.0 - 1e-6, 0.5], [0.0, 3.0, 1.0]])
    theirs = Run({"logits": logits}, torch.tensor([0, 1]), list(logits), 0.0, "")
    assert CTCTask.regret(torch.tensor([0, 1]), theirs) == 0
    assert 0 < CTCTask.regret(torch.tensor([1, 1]), theirs) < 1e-4
    assert CTCTask.regret(torch.tensor([1, 2]), theirs) == 2
    assert CTCTask.regret(torch.tensor([1]), theirs) == float("inf")


def test_kernels_are_known_in_advance(folder):
    """Those of the packed path alone, which norms and sums are part of, and those of blocks whose outputs are kept."""
    config = GraniteSpeech5CTCConfig.from_pretrained(folder)
    task = CTCTask.of(folder, torch.device("cuda"), config, Checkpoint.open(folder), verify.RECORDING, verify.WORDS)
    names = Counter(one.kernel.__name__ for one in task.launches(torch.bfloat16, 90))
    layers = config.encoder_config.num_hidden_layers
    assert names["_block_attention_fwd_kernel"] == names["_depthwise_conv_fwd_kernel"] == 2 * layers
    assert "_add_layer_norm_fwd_kernel" in names


def test_an_older_transformers_is_named(folder, capfd, monkeypatch):
    import transformers

    monkeypatch.delattr(transformers, "GraniteSpeech5ForCTC")
    monkeypatch.setattr(type(transformers), "__getattr__", lambda self, name: (_ for _ in ()).throw(AttributeError(name)))
    assert main(["verify", str(folder), "--device", "cpu"]) == 2
    err = capfd.readouterr().err
    assert "no GraniteSpeech5ForCTC to compare with" in err and "transformers>=5.23" in err
