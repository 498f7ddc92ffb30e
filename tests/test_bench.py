"""The benchmark runs, refuses to time wrong results, and the README shows what was measured."""

import json
import re
from pathlib import Path

import pytest
import torch

from bench import model, results

README = Path(__file__).parent.parent / "README.md"


def test_the_readme_shows_the_newest_results():
    shown = re.search(r"<!-- python -m bench report -->\n(.*)\n<!-- end of report -->", README.read_text(), re.DOTALL).group(1)
    assert shown == results.report()


def test_result_files_say_where_they_come_from():
    files = list(results.FOLDER.glob("*.json"))
    assert files
    for file in files:
        run = json.loads(file.read_text())["run"]
        assert re.fullmatch(r"[0-9a-f]{40}", run["commit"]) and run["machine"] and run["versions"]["torch"]


@pytest.fixture
def small(monkeypatch):
    """The benchmark's two encoders at a size that a test can wait for."""
    from transformers import GraniteSpeechEncoderConfig as ReferenceConfig
    from transformers.models.granite_speech.modeling_granite_speech import GraniteSpeechCTCEncoder as Reference

    from granite_speech import GraniteSpeechCTCEncoder, GraniteSpeechEncoderConfig

    shape = {"num_layers": 2, "hidden_dim": 32, "num_heads": 2}
    reference = Reference(ReferenceConfig(**shape)).eval()
    ours = GraniteSpeechCTCEncoder(GraniteSpeechEncoderConfig(**shape)).eval()
    ours.load_state_dict(reference.state_dict())
    monkeypatch.setattr(model, "_encoders", lambda layers: (ours, reference))
    return ours


def test_a_run_writes_its_result(small, tmp_path):
    table = model.run(layers=2, rounds=2, threads=None, out=tmp_path)
    (file,) = tmp_path.glob("*.json")
    result = json.loads(file.read_text())
    assert [one["audio_seconds"] for one in result["measurements"]] == [30.0, 126.0]
    assert all(one["seconds"] > 0 and len(one["ratios"]) == 2 for one in result["measurements"])
    assert "one clip of 30 s" in table


def test_a_wrong_encoder_is_not_timed(small, tmp_path):
    with torch.no_grad():
        small.out_mid.bias.normal_()
    with pytest.raises(SystemExit, match="differs from transformers"):
        model.run(layers=2, rounds=1, threads=None, out=tmp_path)
    assert not list(tmp_path.iterdir())


def test_matmul_flops_are_those_of_the_projections():
    """Counted by hand for one block: two feed-forwards, q, k, v and output, the convolution's two, and the ends."""
    from granite_speech import GraniteSpeechCTCEncoder, GraniteSpeechEncoderConfig

    encoder = GraniteSpeechCTCEncoder(GraniteSpeechEncoderConfig(num_layers=1, hidden_dim=32, num_heads=2, output_dim=10))
    block = 2 * (32 * 128 * 2) + 4 * 32 * 32 + 32 * 128 + 64 * 32
    assert model._matmul_flops(encoder, 7) == 2 * 7 * (block + 160 * 32 + 2 * 32 * 10)
