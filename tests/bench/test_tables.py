"""Tables of result files: units, slower results, missing measurements, and the host times in an older file."""

import json

import pytest

from bench import accelerated, encoder, kernels_table, report, results, whole_model

RUN = {
    "date": "2026-01-01",
    "machine": "a GPU",
    "threads": 4,
    "versions": {"torch": "2", "triton": "3", "transformers": "5"},
    "commit": "0123456789abcdef",
}
RATES = {"bytes_a_second": 4e12, "flops_a_second": 8e14}


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (111.4, "111 s"),
        (11.67, "11.7 s"),
        (1.0, "1.00 s"),
        (0.99999, "1.00 s"),
        (0.0264, "26.4 ms"),
        (0.00091, "910 µs"),
        (538.3e-6, "538 µs"),
        (8.776e-6, "8.78 µs"),
        (99.96e-6, "100 µs"),
        (0.0, "0 µs"),
        (1234.0, "1230 s"),
    ],
)
def test_times_have_three_digits_and_a_fitting_unit(seconds, text):
    assert results.time_text(seconds) == text


def measurement(case, direction="forward", *, seconds=(), not_timed=(), bytes_moved=4_000_000, **more):
    entry = {"operation": "o", "case": case, "direction": direction, "not_timed": dict(not_timed)}
    if direction == "forward":
        entry |= {"bytes": bytes_moved, "bound_seconds": bytes_moved / 4e12}
    return entry | {"seconds": {variant: {"median": value * 1e-6} for variant, value in dict(seconds).items()}} | more


def kernels_run(*measurements, **more):
    return {
        "kind": "kernels",
        "run": RUN,
        "dtype": "bfloat16",
        "timing": "graph",
        "method": ["In graphs"],
        "rates": RATES,
        "measurements": [*measurements],
    } | more


def test_the_kernels_table_shows_slow_wrong_and_missing_results():
    table = kernels_table.table(
        kernels_run(
            measurement("c", seconds={"triton": 4, "torch": 40, "library": 2}),
            measurement("d", seconds={"library": 2}, not_timed={"triton": "OutOfMemoryError: no memory", "torch": "it waits"}),
            measurement("e", wrong="RMS error"),
            measurement("c", "backward", seconds={"triton": 9}, not_timed={"torch": "it waits"}),
            measurement("e", "backward", not_timed={"torch": "it waits"}),
        )
    )
    head, _, titles, _, *lines = table.splitlines()
    for text in ("bfloat16", "a GPU", "torch 2", "triton 3", "commit 01234567", "4.00 TB/s and 800 TFLOP/s"):
        assert text in head
    assert titles == "| operation | case | | bound | Triton | reference | library | bound / Triton |"
    assert lines[:4] == [
        "| `o` | c | forward | 1.0 | 4.0 | 40.0 | 2.0 | 25% |",
        "| `o` | d | forward | 1.0 | – | – | 2.0 | – |",
        "| `o` | e | forward | 1.0 | – | – | – | wrong |",
        "| `o` | c | backward | – | 9.0 | – | – | – |",
    ]
    assert "- In graphs." in lines
    assert "- – for Triton, forward of `o` (1): OutOfMemoryError: no memory." in lines
    assert "- – for reference, forward of `o` (1); reference, backward of `o` (2): it waits." in lines
    assert lines[-1].startswith("- 1 backward call")


def events_run():
    """A run timed with events: launching takes up to 260 µs whatever the work; only in the last case does the device take longer."""
    cases = {"one": (80, 1e6), "two": (140, 8e6), "eight": (260, 32e6), "many": (700, 512e6)}
    forward = [measurement(case, seconds={"triton": time, "library": time / 2}, bytes_moved=moved) for case, (time, moved) in cases.items()]
    backward = [measurement(case, "backward", seconds={"triton": 900 if case != "many" else 5000, "torch": 6000}) for case in cases]
    run = kernels_run(*forward, *backward)
    del run["timing"], run["method"]
    for entry in run["measurements"]:
        del entry["not_timed"]
    return run


def times(run, variant="triton", direction="forward"):
    return {
        entry["case"]: round(entry["seconds"][variant]["median"] * 1e6, 1)
        for entry in run["measurements"]
        if entry["direction"] == direction and variant in entry["seconds"]
    }


def test_event_times_are_shown_only_if_the_device_was_slower_than_the_host():
    run = events_run()
    shown = kernels_table.without_host_times(run, None)
    assert times(shown) == {"many": 700}
    assert times(shown, "library") == {"many": 350}
    assert times(shown, direction="backward") == {"many": 5000}
    assert "torch" not in {variant for entry in shown["measurements"] for variant in entry["seconds"]}
    assert "| `o` | eight | forward | 8.0 | – | – | – |" in kernels_table.table(shown)
    run["measurements"][2]["seconds"]["triton"]["median"] = 351e-6  # more than twice "two", and more than half of "many"
    assert times(kernels_table.without_host_times(run, None)) == {"eight": 351}


def test_graph_times_from_both_files_replace_event_times():
    run = events_run()
    run["measurements"][0]["seconds"]["triton in a graph"] = {"median": 8e-6}
    sweep = {"cases": ["one", "many"], "rows": {"default": [8.5, 690.0], "(1, 2)": [1.0, 2.0]}, "library (warm)": [3.0, 300.0]}
    for entry in run["measurements"]:
        entry["operation"] = "block_attention"
    shown = kernels_table.without_host_times(run, {"sweep.json": {"block": sweep}})
    assert times(shown) == {"one": 8, "many": 690}
    assert times(shown, "warm") == {"one": 3, "many": 300}
    assert "library, L2 warm" in kernels_table.table(shown)


def test_no_host_time_of_the_committed_run_is_shown():
    """A host time is up to thirty times the kernel's."""
    (run,) = [json.loads(file.read_text()) for file in results.FOLDER.glob("kernels-nvidia-h200-2026-11-26-cdd1619a.json")]
    (experiments,) = [json.loads(file.read_text()) for file in results.FOLDER.glob("experiments-nvidia-h200-2026-11-26-cdd1619a.json")]
    seconds = [entry["seconds"] for entry in run["measurements"]]
    in_graphs = {found["triton in a graph"]["median"] for found in seconds if "triton in a graph" in found}
    in_graphs |= {time / 1e6 for sweep in experiments["sweep.json"].values() for time in sweep["rows"]["default"]}
    shown = kernels_table.without_host_times(run, experiments)
    medians = [
        (entry["operation"], variant, found["median"]) for entry in shown["measurements"] for variant, found in entry["seconds"].items()
    ]
    assert len(medians) > 20
    for operation, variant, median in medians:
        assert variant == "warm" or median in in_graphs or median >= 250e-6
        # On that machine a launch of this operation took 250 to 350 µs, and its kernels 7 to 15 µs.
        assert operation != "lora_linear" or median < 20e-6


def test_the_kernels_summary_compares_with_the_cold_library_call_if_it_was_timed():
    run = kernels_run(
        measurement("a", seconds={"triton": 4, "library": 2, "warm": 1}),
        measurement("b", seconds={"triton": 2, "warm": 4}),
        measurement("c", seconds={"triton": 10}),
        measurement("d", seconds={"library": 2}),
        measurement("a", "backward", seconds={"triton": 9}),
    )
    head, *_, line = kernels_table.summary(run).splitlines()
    assert "a GPU" in head and "commit 01234567" in head
    assert line == "| `o` | – | 0.50 to 2.00 | 2 | 10% to 50% | 3 |"


def encoder_run(**share):
    measured = {"what": "one clip", "seconds": 0.0264, "reference_seconds": 0.0351, "ratio": 1.33} | share
    return {
        "kind": "encoder",
        "run": RUN,
        "shape": {"layers": 16, "hidden_dim": 1024, "dtype": "bfloat16"},
        "rounds": 3,
        "measurements": [measured],
    }


def test_the_encoder_table_has_a_dash_for_an_unmeasured_share():
    assert encoder.table(encoder_run(matmul_share=0.325)).endswith("| one clip | 26.4 ms | 35.1 ms | 1.33x | 32% |")
    text = encoder.table(encoder_run())
    assert text.endswith("| one clip | 26.4 ms | 35.1 ms | 1.33x | – |")
    assert all(part in text for part in ("16 x 1024", "bfloat16", "a GPU", "torch 2, transformers 5", "commit 01234567", "median of 3"))


def whole_run():
    def stages(factor):
        return {
            "encoder_projector_s": 0.03 * factor,
            "first_token_s": 0.1 * factor,
            "decode_step_s": 0.05,
            "whole_s": 2 * factor,
            "rtfx": 5 / factor,
        }

    return {
        "kind": "whole-model",
        "run": RUN,
        "shape": {"dtype": "bfloat16", "weights": "random weights", "clip_seconds": 10, "new_tokens": 40},
        "ours a x1": stages(1),
        "ours a x128": stages(2) | {"rtfx": 581.3},
        "ours b lora x1": stages(1),
        "ours b lora x16": {"error": "OutOfMemoryError()"},
        "transformers a x1": stages(0.5),
        "transformers b lora x1": {"error": "OutOfMemoryError()"},
        "graph a x1": {"eager_step_s": 0.0462, "captured_step_s": 0.00491},
        "graph b lora x1": {"eager_step_s": 0.0734, "captured_step_s": 0.00626},
        "profiles": {"a decode step, batch 1": {"launches": 1669, "device_ms": 4.217}},
    }


def test_an_older_file_has_no_captured_times():
    lines = whole_model.table(whole_run()).splitlines()
    assert all(
        part in lines[0] for part in ("bfloat16", "clips of 10 s", "40 new tokens", "a GPU", "torch 2", "transformers 5", "01234567")
    )
    assert "captured in CUDA graphs / eager / transformers" in lines[0]
    assert lines[4:7] == [
        "| a | 1 | – / 30.0 ms / 15.0 ms | – / 100 ms / 50.0 ms | – / 50.0 ms / 50.0 ms | – / 2.00 s / 1.00 s "
        "| – / 5.0 / 10.0 | – / – / – |",
        "| a | 128 | – / 60.0 ms / – | – / 200 ms / – | – / 50.0 ms / – | – / 4.00 s / – | – / 581 / – | – / – / – |",
        "| b with adapter | 1 | – / 30.0 ms / – | – / 100 ms / – | – / 50.0 ms / – | – / 2.00 s / – | – / 5.0 / – | – / – / – |",
    ]
    assert lines[7] == ""
    assert "captured in a CUDA graph (an experiment)" in lines[8]
    assert lines[-2:] == [
        "| a | 1 | 1,669 | 4.22 ms | 46.2 ms | 4.91 ms |",
        "| b with adapter | 1 | – | – | 73.4 ms | 6.26 ms |",
    ]


def captured_run():
    """As `python -m bench model --part whole` writes it: one model on one clip, captured and eager; 128 clips failed when captured."""
    run = whole_run()
    for name in [name for name in run if name.startswith(("graph", "ours"))]:
        del run[name]
    eager = {"encoder_projector_s": 0.03, "first_token_s": 0.1, "decode_step_s": 0.05, "whole_s": 2.0, "rtfx": 5.0, "peak_extra_GB": 0.25}
    run["eager a x1"] = run["eager a x128"] = eager
    run["captured a x1"] = eager | {"decode_step_s": 0.005, "whole_s": 0.25, "rtfx": 40.0, "peak_extra_GB": 0.5}
    run["captured a x128"] = {"error": "OutOfMemoryError()"}
    run["profiles"] = {"captured a x1": {"decode step": {"launches": 1651.25, "device_s": 0.0042, "host_calls": 3.1}}}
    return run


def test_the_whole_model_table_has_captured_eager_and_transformers():
    lines = whole_model.table(captured_run()).splitlines()
    assert lines[4:6] == [
        "| a | 1 | 30.0 ms / 30.0 ms / 15.0 ms | 100 ms / 100 ms / 50.0 ms | 5.00 ms / 50.0 ms / 50.0 ms | 250 ms / 2.00 s / 1.00 s "
        "| 40.0 / 5.0 / 10.0 | 0.50 / 0.25 / – |",
        "| a | 128 | – / 30.0 ms / – | – / 100 ms / – | – / 50.0 ms / – | – / 2.00 s / – | – / 5.0 / – | – / 0.25 / – |",
    ]
    assert lines[-1] == "| a | 1 | captured | decode step | 1,651 | 4.20 ms | 3 |"
    assert whole_model.comparisons(captured_run()) == ["| whole run of a, 1 clip of 10 s | 250 ms | 1.00 s | 4.00x |"]


def accelerated_run(*measured, seconds=(0.5, 2.75)):
    shape = {"model": "a checkpoint", "dtype": "float32", "clip_seconds": [*seconds]}
    return {"kind": "accelerated", "run": RUN, "shape": shape, "rounds": 5, "measurements": [*measured]}


GAINED = {
    "what": "forward, 8 clips",
    "timings": 30,
    "seconds": {"transformers": 0.1, "accelerated": 0.05, "ours": 0.2},
    "ratio": {"accelerated": 2.0, "ours": 0.5},
}


def test_the_accelerated_table_has_both_speedups():
    head, _, titles, _, line = accelerated.table(accelerated_run(GAINED)).splitlines()
    parts = ("a checkpoint, float32, clips of 0.5 to 2.8 s", "a GPU", "4 threads", "torch 2, transformers 5", "01234567", "median of 30")
    assert all(part in head for part in parts)
    assert titles == "| input | transformers | accelerated | speedup | our class | speedup |"
    assert line == "| forward, 8 clips | 100 ms | 50.0 ms | 2.00x | 200 ms | 0.50x |"


def test_the_accelerated_table_of_a_gpu_has_equal_ids_and_memory():
    whole = {"equal_ids": {"accelerated": 1.0, "ours": 0.925}, "peak_extra_GB": {"transformers": 0.05, "accelerated": 0.1, "ours": 0.2}}
    head, *_, forward, run = accelerated.table(accelerated_run(GAINED, GAINED | whole, seconds=(10.0,))).splitlines()
    assert "clips of 10.0 s" in head
    assert forward.endswith("| 0.50x | – | – |") and run.endswith("| 0.50x | 100% / 92% | 0.05 / 0.10 / 0.20 |")


def test_the_headline_shows_whole_runs_that_transformers_made_too():
    assert whole_model.comparisons(whole_run()) == ["| whole run of a, 1 clip of 10 s | 2.00 s | 1.00 s | 0.50x |"]


def test_the_headline_is_of_one_machine(monkeypatch, tmp_path):
    monkeypatch.setattr(results, "FOLDER", tmp_path)
    for name, run in (("a", whole_run()), ("b", encoder_run()), ("c", encoder_run(what="another") | {"run": RUN | {"machine": "a CPU"}})):
        (tmp_path / f"{name}.json").write_text(json.dumps(run))
    assert report.headline().splitlines() == [
        "| a GPU, bfloat16 | here | transformers 5 | speedup |",
        "|---|---|---|---|",
        "| encoder, one clip | 26.4 ms | 35.1 ms | 1.33x |",
        "| whole run of a, 1 clip of 10 s | 2.00 s | 1.00 s | 0.50x |",
    ]


def test_the_report_has_the_newest_run_of_each_machine(monkeypatch, tmp_path):
    monkeypatch.setattr(results, "FOLDER", tmp_path)
    for number, (machine, date, seconds) in enumerate([("a", "2026-01-01", 1), ("a", "2026-01-02", 2), ("b", "2026-01-01", 3)]):
        run = encoder_run(seconds=seconds)
        run["run"] = RUN | {"machine": machine, "date": date}
        (tmp_path / f"{number}.json").write_text(json.dumps(run))
    text = report.report("encoder")
    assert "| 2.00 s |" in text and "| 3.00 s |" in text and "| 1.00 s |" not in text
    graph = kernels_run(measurement("c", seconds={"triton": 4}))
    (tmp_path / "graph.json").write_text(json.dumps(graph))
    assert report.report("kernels") == kernels_table.table(graph)
    assert report.report("encoder", "kernels summary") == f"{text}\n\n{kernels_table.summary(graph)}"


def test_every_table_is_in_one_section(monkeypatch):
    shown = []
    monkeypatch.setattr(report, "report", lambda *tables: shown.extend(tables))
    report.sections()
    assert sorted(shown) == sorted(report._TABLES)


def test_an_event_run_is_completed_by_experiments_of_its_machine_and_commit(monkeypatch, tmp_path):
    monkeypatch.setattr(results, "FOLDER", tmp_path)
    run = events_run()
    for entry in run["measurements"]:
        entry["operation"] = "block_attention"
    sweep = {"cases": ["one"], "rows": {"default": [8.5]}, "library (warm)": [3.0]}
    experiments = {"kind": "experiments", "run": RUN, "sweep.json": {"block": sweep}}
    (tmp_path / "kernels.json").write_text(json.dumps(run))
    assert " 8.5 | " not in report.report("kernels")
    (tmp_path / "experiments.json").write_text(json.dumps(experiments))
    assert " 8.5 | " in report.report("kernels")
    (tmp_path / "experiments.json").write_text(json.dumps(experiments | {"run": RUN | {"commit": "f" * 16}}))
    assert " 8.5 | " not in report.report("kernels")
