"""Tables of one run of `bench.cpu`."""

from typing import Any

from bench import results
from bench.turns import OURS, REFERENCES

__all__ = ["table"]

THEIR_FLOAT32, THEIR_BFLOAT16 = REFERENCES
STAGES = ("encoder", "projector", "first token")


def table(result: dict[str, Any]) -> str:
    """Markdown of one run: of its sections those that the file has."""
    run = result["run"]
    versions = ", ".join(f"{name} {run['versions'][name]}" for name in ("torch", "transformers"))
    threads = f"{run['threads']} thread{'s' * (run['threads'] > 1)}"
    lines = [
        f"On a CPU, in every dtype: {results.processor_text(run)}, {threads}, {versions}, commit {run['commit'][:8]}, median of "
        f"{result['rounds']} in turns (half as many for the encoder's batch and the busy machine); "
        f"speedups over transformers in float32; the fastest dtype here is {result['fastest']}:",
        "",
        *_times(result),
    ]
    for name, show in (("embedded", _floors), ("turboctc", _times_real), ("words", _accuracy), ("memory", _memory), ("busy", _busy)):
        if name in result:
            lines += ["", *show(result)]
    return "\n".join(lines)


def _times(result: dict[str, Any]) -> list[str]:
    lines = [
        f"| input | {' | '.join(REFERENCES)} | {' | '.join(OURS)} | ours over transformers, both bfloat16 |",
        "|---" * (2 + len(OURS) + len(REFERENCES)) + "|",
    ]
    for what, measured in _timed(result):
        cells = [_time(measured, system) for system in (*REFERENCES, *OURS)]
        both = measured["speedup"].get("ours bfloat16", {}).get(THEIR_BFLOAT16)
        lines.append(f"| {what} | {' | '.join(cells)} | {'–' if both is None else f'{both:.2f}x'} |")
    return lines


def _timed(result: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    encoder = result["encoder"]
    name = f"encoder, {encoder['layers']} x {encoder['hidden_dim']}"
    return [
        *((f"{name}, {one['what']}", one) for one in encoder["measurements"]),
        *((f"TurboCTC, {one['what']}", one) for one in result.get("turboctc", {}).get("measurements", ())),
        *((f"a token, {one['what']} ({one['float32_bytes'] / 1e9:.2f} GB in float32)", one) for one in result.get("decode", ())),
        *((f"bundled checkpoint, {one['what']}", one) for one in result.get("embedded", {}).get("measurements", ())),
    ]


def _time(measured: dict[str, Any], system: str) -> str:
    if system not in measured["seconds"]:
        return "–"
    text = results.time_text(measured["seconds"][system])
    return text if system == THEIR_FLOAT32 else f"{text}, {measured['speedup'][system][THEIR_FLOAT32]:.2f}x"


def _floors(result: dict[str, Any]) -> list[str]:
    lines = [
        f"Our times over their floors, the time of the matrix products alone, and what our time in {result['fastest']} goes into:",
        "",
        f"| input | {' | '.join(OURS)} | where it goes |",
        "|---" * (2 + len(OURS)) + "|",
    ]
    for what, measured in _timed(result):
        floors = _floor_of_each(measured)
        if floors:
            cells = [_over(measured["seconds"][system], floors[system]) if system in floors else "–" for system in OURS]
            shares = ", ".join(f"{name} {share:.0%}" for name, share in list(measured.get("profile", {}).items())[:4])
            lines.append(f"| {what} | {' | '.join(cells)} | {shares or '–'} |")
    return lines


def _times_real(result: dict[str, Any]) -> list[str]:
    """Of TurboCTC, whose errors are here too."""
    ctc = result["turboctc"]
    lines = [
        f"TurboCTC, {ctc['layers']} x {ctc['hidden_dim']}, random weights, from features to the best path: seconds of audio a second, and "
        "root mean square errors of the logits, relative to float32 here:",
        "",
        f"| input | {' | '.join((*REFERENCES, *OURS))} |",
        "|---" * (1 + len(OURS) + len(REFERENCES)) + "|",
    ]
    for one in ctc["measurements"]:
        cells = [f"{one['rtfx'][system]:.1f}" if system in one["rtfx"] else "–" for system in (*REFERENCES, *OURS)]
        lines.append(f"| {one['what']} | {' | '.join(cells)} |")
    return [*lines, f"| error | {' | '.join(_error(ctc['errors'].get(system)) for system in (*REFERENCES, *OURS))} |"]


def _floor_of_each(measured: dict[str, Any]) -> dict[str, float]:
    if "floors" in measured:
        return {system: floor["seconds"] for system, floor in measured["floors"].items()}
    return {system: share * measured["seconds"][system] for system, share in measured.get("matmul_share", {}).items()}


def _over(seconds: float, floor: float) -> str:
    return f"{results.time_text(seconds)} / {results.time_text(floor)}"


def _accuracy(result: dict[str, Any]) -> list[str]:
    counts = result["words"][0]["utterances"]
    lines = [
        "Word error rates of the bundled checkpoint, and root mean square errors: of its states for one clip (after the encoder, after the "
        "projector, the first token's logits), of the encoder and of the decode steps above:",
        "",
        f"| dtype | {counts['recorded']} recorded clips | {counts['held out']:,} of held-out voices | against float32 "
        "| beside a clip 20 times as loud, against alone | encoder above | decode steps above |",
        "|---" * 7 + "|",
    ]
    for one in result["words"]:
        rates = [f"{one['word_error_rate'][name]:.2%}" if name in one["word_error_rate"] else "–" for name in ("recorded", "held out")]
        errors = [", ".join(_error(each[stage]) for stage in STAGES) for each in one["errors"].values()]
        above = [_error(result["encoder"]["errors"].get(one["system"]))]
        above.append(" and ".join(_error(decode["errors"].get(one["system"])) for decode in result["decode"]))
        lines.append(f"| {one['system'].removeprefix('ours ')} | {' | '.join(rates + errors + above)} |")
    return lines


def _error(value: float | None) -> str:
    return "–" if value is None else "0" if value == 0 else f"{value:.2%}" if value >= 1e-4 else f"{value:.0e}"


def _memory(result: dict[str, Any]) -> list[str]:
    memory = result["memory"]
    clips = memory["clip_seconds"]
    lines = [
        f"Peak memory of a new process less its peak after the imports: {memory['what']}, {memory['float32_bytes'] / 1e9:.2f} GB in "
        f"float32, and a batch of {len(clips)} clips of {clips[0]} to {clips[-1]} s:",
        "",
        "| | after loading | after the batch | relative to transformers float32 |",
        "|---|---|---|---|",
    ]
    for system, one in memory["peaks"].items():
        sizes = [f"{one[name] / 1e9:.2f} GB" for name in ("loaded", "batch")]
        lines.append(f"| {system} | {' | '.join(sizes)} | {memory['relative'][system]:.2f} |")
    return lines


def _busy(result: dict[str, Any]) -> list[str]:
    busy = result["busy"]
    quiet, loaded = (results.time_text(busy["seconds"][name]) for name in ("quiet", "busy"))
    return [
        f"The command line on {busy['files']} files, from the first text to the last: {quiet} on a quiet machine, {loaded} with "
        f"{busy['spinning']} other processes that spin, {busy['ratio']:.2f} times as long."
    ]
