"""The table of one run of `python -m bench kernels` on a GPU, and what may be shown of a run that timed each call with events."""

from typing import Any

__all__ = ["table", "without_host_times"]

COLUMNS = {"triton": "Triton", "torch": "reference", "compiled": "compiled reference", "library": "library", "warm": "library, L2 warm"}
# A time with events that is shorter may be that of the launch on the host. So may one that is longer, unless it is clearly longer than
# those of much smaller shapes, which are launched the same way.
SHORTEST, CLEARLY = 250e-6, 2
LIBRARY = (
    "A library call does part of its kernel's work: SDPA on padded blocks with the position bias ready in memory, conv1d alone on gated "
    "frames, the base product without adapters, SDPA on gathered keys"
)
# What `sweep.json` calls the operations.
SWEEPS = {
    "block": "block_attention",
    "conv": "depthwise_conv",
    "paged": "paged_attention",
    "lora1": "lora_linear",
    "lora128": "lora_linear",
}


def table(result: dict[str, Any]) -> str:
    """Markdown of one run. A cell is "–" if that call was not timed, and a line under the table says why."""
    run, rates = result["run"], result["rates"]
    versions = ", ".join(f"{name} {run['versions'][name]}" for name in ("torch", "triton"))
    head = (
        f"Kernels, {result['dtype']}, shapes of the released models: {run['machine']}, {versions}, commit {run['commit'][:8]}; measured "
        f"ceilings {rates['bytes_a_second'] / 1e12:.2f} TB/s and {rates['flops_a_second'] / 1e12:.0f} TFLOP/s; median µs:"
    )
    measurements = result["measurements"]
    ways = [way for way in COLUMNS if any(way in one["seconds"] or way in one["not_timed"] for one in measurements)]
    rows = [
        f"| operation | case | | bound | {' | '.join(COLUMNS[way] for way in ways)} | bound / Triton |",
        "|---" * (5 + len(ways)) + "|",
    ]
    # A backward has neither a bound nor a library call: a row of dashes would say nothing.
    shown = [one for one in measurements if one["direction"] == "forward" or one["seconds"] or "wrong" in one]
    for one in shown:
        times = {way: seconds["median"] for way, seconds in one["seconds"].items()}
        bound = one.get("bound_seconds")
        cells = [f"{times[way] * 1e6:.1f}" if way in times else "–" for way in ways]
        share = "wrong" if "wrong" in one else f"{bound / times['triton']:.0%}" if bound and "triton" in times else "–"
        named = f"| `{one['operation']}` | {one['case']} | {one['direction']} | {f'{bound * 1e6:.1f}' if bound else '–'} |"
        rows.append(f"{named} {' | '.join(cells)} | {share} |")
    notes = [f"{said}." for said in (*result["method"], LIBRARY)] + _reasons(measurements, ways)
    if len(shown) < len(measurements):
        notes.append(f"{len(measurements) - len(shown)} backward calls have no time in any column and no row.")
    return "\n".join([head, "", *rows, "", *(f"- {note}" for note in notes)])


def _reasons(measurements: list[dict[str, Any]], ways: list[str]) -> list[str]:
    """Why cells are "–": a sentence for each reason, with the calls that it is true of."""
    calls: dict[str, dict[str, int]] = {}
    for one in measurements:
        for way in ways:
            if way in one["not_timed"]:
                call = f"{COLUMNS[way]}, {one['direction']} of `{one['operation']}`"
                counts = calls.setdefault(one["not_timed"][way], {})
                counts[call] = counts.get(call, 0) + 1
    return [f"– for {'; '.join(f'{call} ({count})' for call, count in counts.items())}: {why}." for why, counts in calls.items()]


def without_host_times(result: dict[str, Any], experiments: dict[str, Any] | None) -> dict[str, Any]:
    """A run whose calls were timed one by one with events, in the form of one that was timed in graphs, without the times of the host.

    Args:
        result: "seconds" of its measurements hold times with events, and "triton in a graph" for some.
        experiments: a run on the same machine at the same commit, whose "sweep.json" has graph times of the same kernels with their
            default tiles, and of the library calls with a warm L2 cache.
    """
    swept = _swept(experiments)
    measurements = []
    for one in result["measurements"]:
        found, graph = one["seconds"], {}
        if one["direction"] == "forward":
            graph = swept.get((one["operation"], one["case"]), {})
        if "triton in a graph" in found:
            graph = graph | {"triton": found["triton in a graph"]}
        events = {way: found[way] for way in ("triton", "library") if way in found and _is_device_time(result, one, way)}
        measurements.append(one | {"seconds": events | graph, "not_timed": {}})
    method = [
        "Triton: in CUDA graphs with a cold L2 cache, or with events where no graph was timed. Library: with events, L2 flushed before "
        "each call. Library, L2 warm: in graphs, on the same inputs again and again, which flatters it",
        f"A time with events includes the launch on the host unless the device is slower: it is shown only if it is at least "
        f"{SHORTEST * 1e6:.0f} µs and {CLEARLY} times that of every case of less than half the bytes. – is what was not timed otherwise",
        "The ceilings are of a copy of 1 GiB and a product of 8192 x 8192 matrices, which take longer than their launches, with events",
        "The references are not shown: their time is that of their loops on the host",
        "Pages of paged attention hold 16 tokens here, and 64 in the model",
    ]
    return result | {"method": method, "measurements": measurements}


def _is_device_time(result: dict[str, Any], one: dict[str, Any], way: str) -> bool:
    alike = [other for other in result["measurements"] if other["operation"] == one["operation"]]
    moved = {other["case"]: other["bytes"] for other in alike if "bytes" in other}  # a backward's are not declared
    smaller = [
        other["seconds"][way]["median"]
        for other in alike
        if other["direction"] == one["direction"] and 2 * moved[other["case"]] < moved[one["case"]] and way in other["seconds"]
    ]
    median = one["seconds"][way]["median"]
    return median >= SHORTEST and bool(smaller) and median >= CLEARLY * max(smaller)


def _swept(experiments: dict[str, Any] | None) -> dict[tuple[str, str], dict[str, dict[str, float]]]:
    """Times in graphs by operation and case: "triton" with the default tiles, and "warm" of the library."""
    found = {}
    for name, sweep in experiments["sweep.json"].items() if experiments else ():
        for case, default, library in zip(sweep["cases"], sweep["rows"]["default"], sweep["library (warm)"], strict=True):
            found[SWEEPS[name], case] = {"triton": {"median": default / 1e6}, "warm": {"median": library / 1e6}}
    return found
