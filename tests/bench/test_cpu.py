"""`python -m bench model` on a CPU: every section in small shapes, its checks, and the tables of a run."""

import json
import time
from functools import partial
from pathlib import Path

import pytest
import torch
from granite_kernels.cpu import has_int8

from bench import (
    checkpoints_cpu,
    cpu,
    cpu_busy,
    cpu_ctc,
    cpu_decode,
    cpu_encoder,
    cpu_memory,
    cpu_table,
    cpu_words,
    embedded,
    results,
    turns,
)
from bench.turns import OURS, SYSTEMS
from granite_speech.modules import int8_layers, int8_weight
from tests.bench.test_model import SMALL
from tests.support.spoken import SPEECH

FLOATS = tuple(system for system in SYSTEMS if system != "ours int8")


def tiny(name: str = "", part: int = 1):
    """Has the arguments of `checkpoints_cpu.decoder`, and no answer ends early."""
    values = {key: dict(value) if isinstance(value, dict) else value for key, value in SMALL.items()}
    values["text_config"] |= {"eos_token_id": None, "logits_scaling": 8.0}
    return values


# --- turns -----------------------------------------------------------------------------------------------------------------------


def test_each_round_begins_with_another_call_and_every_second_one_runs_backwards():
    made = []
    taken = turns.seconds_in_turns({name: partial(made.append, name) for name in "abc"}, 3)
    assert "".join(made) == "cba" + "bca" + "bac"
    assert {name: len(seconds) for name, seconds in taken.items()} == {"a": 3, "b": 3, "c": 3}


def test_speedups_are_medians_of_the_rounds():
    found = turns.compared({"ours": [1.0, 2.0, 1.0], "reference": [2.0, 2.0, 4.0]}, ["reference"])
    assert found["seconds"] == {"ours": 1.0, "reference": 2.0}
    assert found["ratios"]["ours"] == {"reference": [2.0, 1.0, 4.0]} and found["speedup"]["ours"] == {"reference": 2.0}
    assert found["speedup"]["reference"] == {}


def test_int8_has_activations_of_the_fastest_dtype(monkeypatch):
    for has_bfloat16, dtype in ((True, torch.bfloat16), (False, torch.float32)):
        monkeypatch.setattr(turns, "has_bfloat16", lambda known=has_bfloat16: known)
        assert turns.torch_dtype("ours int8") == dtype == getattr(torch, turns.fastest())
    assert turns.torch_dtype("transformers bfloat16") == torch.bfloat16


# --- sections --------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def small_encoders(monkeypatch):
    from transformers import GraniteSpeechEncoderConfig as ReferenceConfig
    from transformers.models.granite_speech.modeling_granite_speech import GraniteSpeechCTCEncoder as Reference

    from granite_speech import GraniteSpeechCTCEncoder, GraniteSpeechEncoderConfig

    shape = {"num_layers": 2, "hidden_dim": 32, "num_heads": 2}
    reference = Reference(ReferenceConfig(**shape)).eval()
    ours = GraniteSpeechCTCEncoder(GraniteSpeechEncoderConfig(**shape)).eval()
    ours.load_state_dict(reference.state_dict())
    monkeypatch.setattr(cpu_encoder, "encoders", lambda layers: (ours, reference))
    monkeypatch.setattr(cpu_encoder, "CLIP_SECONDS", (1, 2, 3))
    return ours


def test_the_encoder_is_timed_in_every_dtype(small_encoders, monkeypatch):
    monkeypatch.setattr(int8_weight, "_FEWEST", 1)  # values of a matrix that is worth rounding
    rounded = []
    round_to_int8 = int8_layers.round_to_int8
    monkeypatch.setattr(int8_layers, "round_to_int8", lambda model: rounded.append(model) or round_to_int8(model))
    found = cpu_encoder.measure(2, 3)
    (model,) = rounded
    assert model["encoder"].input_linear.weight.dtype == turns.torch_dtype("ours int8")
    packed = [one for one in model.modules() if getattr(one, "packed", None) is not None]
    assert bool(packed) == has_int8()
    assert set(found["errors"]) == {"ours bfloat16", "transformers bfloat16", "ours int8"}
    assert 0 < found["errors"]["ours bfloat16"] < 0.03
    assert [(one["what"], one["audio_seconds"], one["rounds"]) for one in found["measurements"]] == [
        ("one clip of 3 s", 3.0, 3),
        ("3 clips of 1 to 3 s", 6.0, 2),
    ]
    for one in found["measurements"]:
        assert set(one["seconds"]) == set(SYSTEMS) and all(len(ratios) == one["rounds"] for ratios in one["ratios"]["ours int8"].values())
        rate = one["machine_matmul_flops_a_second"]["bfloat16"]
        assert one["matmul_share"]["ours bfloat16"] == one["matmul_flops"] / one["seconds"]["ours bfloat16"] / rate


def test_a_wrong_encoder_is_not_timed(small_encoders, monkeypatch):
    monkeypatch.setattr(cpu_encoder, "_measure", lambda *arguments: pytest.fail("it was timed"))
    monkeypatch.setattr(int8_layers, "round_to_int8", lambda model: torch.nn.init.normal_(model["encoder"].input_linear.weight))
    with pytest.raises(SystemExit, match="states of ours int8 have an error of"):
        cpu_encoder.measure(1, 1)
    with torch.no_grad():
        small_encoders.out_mid.bias.normal_()
    with pytest.raises(SystemExit, match="differs from transformers"):
        cpu_encoder.measure(1, 1, FLOATS)


@pytest.fixture
def tiny_decoder(monkeypatch):
    monkeypatch.setattr(checkpoints_cpu, "decoder", tiny)
    monkeypatch.setattr(cpu_decode, "PROMPT", 5)
    monkeypatch.setattr(cpu_decode, "NEW_TOKENS", 20)


def test_decode_steps_are_timed_in_every_dtype(tiny_decoder):
    (found,) = cpu_decode.measure(2, parts=(("a model", 3),))
    assert found["what"] == "1/3 of the layers and tokens of a model" and found["shape"]["vocab_size"] == 100
    assert set(found["seconds"]) == set(SYSTEMS) and len(found["ratios"]["ours float32"]["transformers float32"]) == 2
    assert found["errors"]["transformers float32"] < 1e-5 < found["errors"]["ours bfloat16"]


def test_wrong_logits_are_not_timed(tiny_decoder, monkeypatch):
    monkeypatch.setattr(cpu_decode, "seconds_in_turns", lambda *arguments: pytest.fail("it was timed"))
    load = checkpoints_cpu.load

    def damaged(system, folder):
        model = load(system, folder)
        if system == "ours bfloat16":
            torch.nn.init.normal_(model.get_output_embeddings().weight)
        return model

    monkeypatch.setattr(checkpoints_cpu, "load", damaged)
    with pytest.raises(SystemExit, match="logits of ours bfloat16 have an error of"):
        cpu_decode.measure(1, FLOATS, (("a model", 1),))


def test_parts_of_released_models_weigh_about_a_gigabyte():
    with torch.device("meta"):
        from granite_speech import GraniteSpeechConfig, GraniteSpeechForConditionalGeneration

        configurations = [checkpoints_cpu.decoder(*part) for part in cpu_decode.PARTS] + [checkpoints_cpu.whole(*cpu_memory.PART)]
        models = [GraniteSpeechForConditionalGeneration(GraniteSpeechConfig(**one)) for one in configurations]
    for model in models:
        assert 0.9e9 < sum(4 * weight.numel() for weight in model.parameters()) < 1.1e9
    assert {model.config.text_config.hidden_size for model in models} == {2048}
    assert [model.config.encoder_config.hidden_dim for model in models] == [64, 64, 1024]


def test_words_are_counted_and_a_loud_neighbor_changes_nothing(tmp_path):
    manifest = tmp_path / "manifest.jsonl"
    manifest.write_text("".join(json.dumps({"audio": str(SPEECH / "01.flac"), "text": text}) + "\n" for text in ("seven", "eight")))
    found = cpu_words.measure(cpu_words.held_out(manifest))
    assert [one["system"] for one in found] == list(OURS)
    for one in found:
        assert one["word_error_rate"] == {"recorded": 0.0, "held out": 0.5} and one["utterances"] == {"recorded": 12, "held out": 2}
        assert all(error < 1e-5 for error in one["errors"]["beside a loud clip"].values())
    assert set(found[0]["errors"]["from float32"].values()) == {0.0}
    assert all(0 < error < 0.05 for error in found[1]["errors"]["from float32"].values())


def test_a_loud_neighbor_that_changes_a_clip_is_seen(monkeypatch):
    """With one scale for all rows, as activations must not be rounded."""
    load = embedded.ours

    def rounded_together(system):
        model = load(system)
        levels = lambda module, inputs: (inputs[0].div(inputs[0].abs().max() / 127).round() * (inputs[0].abs().max() / 127),)  # noqa: E731
        model.encoder.layers[0].ff1.up_proj.register_forward_pre_hook(levels)
        return model

    monkeypatch.setattr(embedded, "ours", rounded_together)
    (found,) = cpu_words.measure([], ("ours float32",))
    assert all(error > 1e-4 for error in found["errors"]["beside a loud clip"].values())


def test_without_synthesizers_there_are_no_held_out_voices(monkeypatch, tmp_path, capsys):
    from granite_speech.training.bundled_checkpoint import synthesis

    monkeypatch.setattr(synthesis.shutil, "which", lambda program: None)
    assert cpu_words.held_out(tmp_path / "manifest.jsonl") == []
    assert "no word error rate of held-out voices" in capsys.readouterr().out


def test_a_new_process_measures_the_peak_of_each_system():
    found = cpu_memory.measure(tiny(), (1, 2), ("ours float32", "transformers float32"))
    for one in found["peaks"].values():
        assert one["imports"] > 2**27 and 0 <= one["loaded"] <= one["batch"] and one["batch"] > 0
    assert found["relative"]["transformers float32"] == 1.0
    assert found["relative"]["ours float32"] == found["peaks"]["ours float32"]["batch"] / found["peaks"]["transformers float32"]["batch"]


def test_the_batch_of_the_memory_is_the_same_in_both(tmp_path):
    checkpoints_cpu.write(tmp_path, tiny())
    logits = []
    for system in ("ours float32", "transformers float32"):
        model = checkpoints_cpu.load(system, tmp_path)
        inputs = cpu_memory.batch(system, model.config, (1, 4, 2))
        assert inputs["attention_mask"].sum(1).tolist() == [45 + tokens for tokens in (12, 42, 21)]
        with torch.no_grad():
            logits.append(model(**inputs).logits[1, -1])
    torch.testing.assert_close(logits[0] * 8, logits[1], atol=1e-4, rtol=1e-4)


def test_the_command_line_is_timed_on_a_quiet_and_a_busy_machine(monkeypatch):
    started = []
    popen = cpu_busy.subprocess.Popen

    def transcribe(files, expected):
        assert len(files) == len(expected) == 24
        busy = len([process for process in started if process.poll() is None])
        return 2.0 if busy == 0 else 5.0 if busy == len(cpu_busy.os.sched_getaffinity(0)) else 100.0

    monkeypatch.setattr(cpu_busy.subprocess, "Popen", lambda *arguments: started.append(popen(*arguments)) or started[-1])
    monkeypatch.setattr(cpu_busy, "_transcribe", transcribe)
    found = cpu_busy.measure(3, 2)
    assert found["files"] == 24 and found["seconds"] == {"quiet": 2.0, "busy": 5.0} and found["ratios"] == [2.5] * 3
    assert started and all(process.poll() is not None for process in started), "the spinning processes are ended"


def test_the_time_of_the_command_line_excludes_imports():
    files = [str(SPEECH / name) for name in ("01.flac", "02.flac")]
    start = time.perf_counter()
    assert 0 < cpu_busy._transcribe(files, ["seven", "zero nine"]) < (time.perf_counter() - start) / 2
    with pytest.raises(SystemExit, match="nothing was timed: exit status 0, 2 texts"):
        cpu_busy._transcribe(files, ["seven", "zero ten"])


# --- one run ---------------------------------------------------------------------------------------------------------------------


def timed(what: str, **more):
    """As `turns.compared` writes it."""
    seconds = dict(zip(SYSTEMS, (2.0, 0.5, 0.25, 2.5, 0.6), strict=True))
    speedup = {system: {one: seconds[one] / mine for one in turns.REFERENCES if one != system} for system, mine in seconds.items()}
    return {"what": what, "seconds": seconds, "speedup": speedup} | more


def sections():
    errors = {"ours bfloat16": 0.01, "ours int8": 0.02, "transformers bfloat16": 0.011}
    floors = {system: {"seconds": 0.1} for system in OURS}
    states = {"encoder": 0.0056, "projector": 0.00005, "first token": 0.0}
    rates = {"recorded": 0.0, "held out": 0.0321}
    return {
        "encoder": {
            "layers": 16,
            "hidden_dim": 1024,
            "errors": errors,
            "measurements": [timed("one clip", matmul_share={"ours float32": 0.9, "ours bfloat16": 0.5})],
        },
        "decode": [timed("a part", float32_bytes=1_010_000_000, errors=errors)],
        "embedded": {"measurements": [timed("12 clips", floors=floors, profile={"Python": 0.4, "norms": 0.3})]},
        "words": [
            {
                "system": system,
                "utterances": {"recorded": 12, "held out": 1500},
                "word_error_rate": rates,
                "errors": {"from float32": states, "beside a loud clip": dict.fromkeys(states, 0.0)},
            }
            for system in OURS
        ],
        "memory": {
            "what": "a part",
            "float32_bytes": 1_010_000_000,
            "clip_seconds": [3, 30],
            "peaks": {"ours int8": {"loaded": 300_000_000, "batch": 440_000_000}},
            "relative": {"ours int8": 0.34},
        },
        "busy": {"files": 480, "spinning": 2, "seconds": {"quiet": 2.0, "busy": 5.0}, "ratio": 2.5},
    }


TURBOCTC = {"layers": 4, "hidden_dim": 32, "errors": {}, "measurements": []}


def test_a_run_writes_every_section_and_keeps_those_before_a_failure(monkeypatch, tmp_path):
    found = sections()
    for module, name in ((cpu_encoder, "encoder"), (cpu_decode, "decode"), (embedded, "embedded"), (cpu_words, "words")):
        monkeypatch.setattr(module, "measure", lambda *arguments, name=name: found[name])
    monkeypatch.setattr(cpu_ctc, "measure", lambda rounds: TURBOCTC)
    monkeypatch.setattr(cpu_memory, "measure", lambda: found["memory"])
    monkeypatch.setattr(cpu_busy, "measure", lambda rounds: found["busy"] | {"rounds": rounds})
    monkeypatch.setattr(cpu_words, "held_out", lambda manifest: [])
    run = partial(cpu.run, rounds=5, layers=16, threads=None, unseen=Path("none"), out=tmp_path)
    text = run()
    (file,) = tmp_path.glob("cpu-*.json")
    result = json.loads(file.read_text())
    assert [name for name in result if name in found] == list(found) and result["busy"]["rounds"] == 3
    assert result["run"]["processor"]["flags"] is not None and str(file) in text
    assert result["turboctc"] == TURBOCTC and "TurboCTC, 4 x 32, random weights" in text
    file.unlink()
    monkeypatch.setattr(embedded, "measure", lambda rounds: sys_exit())
    with pytest.raises(SystemExit):
        run()
    (file,) = tmp_path.glob("cpu-*.json")
    assert [name for name in json.loads(file.read_text()) if name in found] == ["encoder", "decode"]


def sys_exit():
    raise SystemExit("other words, so nothing was timed")


def test_the_tables_have_every_system_its_floor_its_errors_and_its_memory():
    run = {
        "machine": "a CPU",
        "processor": {"vendor": "AuthenticAMD", "family": "26", "model": "2", "stepping": "1", "flags": ["avx512f", "avx512_bf16"]},
        "threads": 2,
        "commit": "0123456789",
        "versions": {"torch": "2", "transformers": "5"},
    }
    text = cpu_table.table({"kind": "cpu", "run": run, "rounds": 5, "fastest": "bfloat16"} | sections())
    head = text.splitlines()[0]
    machine = "a CPU (AuthenticAMD, family 26 model 2 stepping 1, avx512f avx512_bf16)"
    assert all(part in head for part in (machine, "2 threads", "transformers 5", "01234567", "median of 5"))
    times = "| 2.50 s | 600 ms, 4.17x | 2.00 s, 1.25x | 500 ms, 5.00x | 250 ms, 10.00x | 1.20x |"
    assert f"| encoder, 16 x 1024, one clip {times}" in text
    assert f"| a token, a part (1.01 GB in float32) {times}" in text
    assert f"| bundled checkpoint, 12 clips {times}" in text
    assert "| encoder, 16 x 1024, one clip | 2.00 s / 1.80 s | 500 ms / 250 ms | – | – |" in text
    assert "| bundled checkpoint, 12 clips | 2.00 s / 100 ms | 500 ms / 100 ms | 250 ms / 100 ms | Python 40%, norms 30% |" in text
    assert "| int8 | 0.00% | 3.21% | 0.56%, 5e-05, 0 | 0, 0, 0 | 2.00% | 2.00% |" in text
    assert "| float32 | 0.00% | 3.21% | 0.56%, 5e-05, 0 | 0, 0, 0 | – | – |" in text
    assert "| ours int8 | 0.30 GB | 0.44 GB | 0.34 |" in text and "a batch of 2 clips of 3 to 30 s" in text
    assert "on 480 files" in text and "2.00 s on a quiet machine, 5.00 s with 2 other processes that spin, 2.50 times" in text


def test_a_machine_is_described_by_what_is_known_about_it(monkeypatch):
    assert results.processor_text({"machine": "an old one"}) == "an old one"
    cpuinfo = {"model name": "A", "model": "7", "flags": "avx2 sse amx_int8"}
    monkeypatch.setattr(results, "_processor", lambda: cpuinfo)
    run = results.describe_run()
    assert run["machine"] == "A" and run["processor"] == {"model": "7", "flags": ["avx2", "amx_int8"]}
    assert results.processor_text(run) == "A (model 7, avx2 amx_int8)"


def test_the_first_processor_of_this_machine_is_read():
    found = results._processor()
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    assert found["processor"] == "0" and next(line for line in lines if line.startswith("flags")).endswith(": " + found["flags"])
