"""Tables of one run of `python -m bench kernels` on a GPU, including an older run that timed each call with CUDA events."""

from collections import defaultdict
from typing import Any

__all__ = ["LIBRARY", "cell", "summary", "table", "without_host_times"]

COLUMNS = {"triton": "Triton", "torch": "reference", "compiled": "compiled reference", "library": "library", "warm": "library, L2 warm"}
# A short time measured with events may be the launch on the host. A longer time counts as the device's only if it is also clearly longer
# than those of much smaller shapes, which take as long to launch.
SHORTEST, CLEARLY = 250e-6, 2
# The nearest library call of each operation does only part of the kernel's work.
LIBRARY = {
    "add_layer_norm": "the first LayerNorm alone",
    "add_rms_norm": "RMSNorm alone",
    "attention_blocks": "searchsorted alone",
    "begin_step": "the embedding alone",
    "block_attention": "SDPA on padded blocks, position bias already in memory",
    "ctc_greedy": "argmax alone",
    "decode_attention": "SDPA on keys and values already gathered",
    "depthwise_conv": "conv1d alone, on gated frames",
    "exponential_noise": "exponential_ with one generator for all rows",
    "finish_step": "argmax alone",
    "fused_linear": "the matrix product alone, with the weight in the dtype of x",
    "head_argmax": "the matrix product alone, which writes the logits",
    "lora_linear": "the matrix product without adapters",
    "paged_attention": "SDPA on keys and values already gathered",
    "rotary_write": "a copy of q, k and v",
    "silu_linear": "the product with its bias, without SiLU",
    "silu_product": "SiLU alone",
    "split_linear": "the matrix product, summed and in the dtype of x",
    "window_attention": "SDPA on q, k and v copied with the heads first",
}
# The operations' names in `sweep.json`.
SWEEPS = {
    "block": "block_attention",
    "conv": "depthwise_conv",
    "paged": "paged_attention",
    "lora1": "lora_linear",
    "lora128": "lora_linear",
}


def table(result: dict[str, Any]) -> str:
    """Markdown of one run. A cell is "–" if that call was not timed; a line under the table gives the reason."""
    measurements = result["measurements"]
    variants = [name for name in COLUMNS if any(name in entry["seconds"] or name in entry["not_timed"] for entry in measurements)]
    # A backward has no bound and no library call, so without a time its line would be all dashes.
    shown = [entry for entry in measurements if entry["direction"] == "forward" or entry["seconds"] or "wrong" in entry]
    notes = [f"{text}." for text in (*result["method"], _library_note(measurements))] + _reasons(measurements, variants)
    if len(shown) < len(measurements):
        notes.append(f"{len(measurements) - len(shown)} backward calls were not timed and are not listed.")
    return "\n".join(
        [
            f"{_head(result)}; median µs:",
            "",
            f"| operation | case | | bound | {' | '.join(COLUMNS[name] for name in variants)} | bound / Triton |",
            "|---" * (5 + len(variants)) + "|",
            *(_line(entry, variants) for entry in shown),
            "",
            *(f"- {note}" for note in notes),
        ]
    )


def cell(text: str) -> str:
    """Text in a Markdown table."""
    return text.replace("|", r"\|")


def _head(result: dict[str, Any]) -> str:
    run, rates = result["run"], result["rates"]
    versions = ", ".join(f"{name} {run['versions'][name]}" for name in ("torch", "triton"))
    return (
        f"Kernels, {result['dtype']}, shapes of the released models: {run['machine']}, {versions}, commit {run['commit'][:8]}; measured "
        f"ceilings {rates['bytes_a_second'] / 1e12:.2f} TB/s and {rates['flops_a_second'] / 1e12:.0f} TFLOP/s"
    )


def _line(entry: dict[str, Any], variants: list[str]) -> str:
    times, bound = _medians(entry), entry.get("bound_seconds")
    cells = [f"{times[name] * 1e6:.1f}" if name in times else "–" for name in variants]
    share = "wrong" if "wrong" in entry else f"{bound / times['triton']:.0%}" if bound and "triton" in times else "–"
    left = [f"`{entry['operation']}`", cell(entry["case"]), entry["direction"], f"{bound * 1e6:.1f}" if bound else "–"]
    return f"| {' | '.join([*left, *cells, share])} |"


def _medians(entry: dict[str, Any]) -> dict[str, float]:
    return {name: seconds["median"] for name, seconds in entry["seconds"].items()}


def _library_note(measurements: list[dict[str, Any]]) -> str:
    measured = {entry["operation"] for entry in measurements}
    calls = (f"`{name}`: {call}" for name, call in LIBRARY.items() if name in measured)
    return f"A library call does only part of its kernel's work: {'; '.join(calls)}"


def _reasons(measurements: list[dict[str, Any]], variants: list[str]) -> list[str]:
    """One sentence per reason for a "–", with the calls it applies to."""
    calls: dict[str, dict[str, int]] = defaultdict(lambda: defaultdict(int))
    for entry in measurements:
        for name in variants:
            if name in entry["not_timed"]:
                calls[entry["not_timed"][name]][f"{COLUMNS[name]}, {entry['direction']} of `{entry['operation']}`"] += 1
    return [f"– for {'; '.join(f'{call} ({count})' for call, count in counts.items())}: {why}." for why, counts in calls.items()]


def summary(result: dict[str, Any]) -> str:
    """Markdown of one run's forward calls, one line per operation: its kernel against the bound and the library call."""
    lines = [
        f"{_head(result)}:",
        "",
        "| operation | library call | Triton time / library time (above 1: slower) | cases | bound / Triton | cases |",
        "|---|---|---|---|---|---|",
    ]
    forward = [entry for entry in result["measurements"] if entry["direction"] == "forward" and "triton" in entry["seconds"]]
    for operation in dict.fromkeys(entry["operation"] for entry in forward):
        entries = [entry for entry in forward if entry["operation"] == operation]
        shares = [entry["bound_seconds"] / entry["seconds"]["triton"]["median"] for entry in entries]
        ratios = [ratio for entry in entries if (ratio := _library_ratio(entry))]
        compared, bounded = f"{_range(ratios, '.2f')} | {len(ratios)}", f"{_range(shares, '.0%')} | {len(shares)}"
        lines.append(f"| `{operation}` | {LIBRARY.get(operation, '–')} | {compared} | {bounded} |")
    return "\n".join(lines)


def _library_ratio(entry: dict[str, Any]) -> float | None:
    """The kernel's time over the library's, with a cold L2 cache if that was timed; a warm one makes the library look faster."""
    times = _medians(entry)
    library = times.get("library", times.get("warm"))
    return times["triton"] / library if library else None


def _range(values: list[float], form: str) -> str:
    return f"{min(values):{form}} to {max(values):{form}}" if values else "–"


def without_host_times(result: dict[str, Any], experiments: dict[str, Any] | None) -> dict[str, Any]:
    """Convert a run that timed each call with events to the form of one timed in graphs, dropping times that may be the host's.

    Args:
        result: measurements whose "seconds" hold times with events, and for some "triton in a graph".
        experiments: a run on the same machine at the same commit, whose "sweep.json" has graph times of the same kernels with their
            default tiles, and of the library calls with a warm L2 cache.
    """
    swept = _swept(experiments)
    measurements = []
    for entry in result["measurements"]:
        found, graph = entry["seconds"], {}
        if entry["direction"] == "forward":
            graph = swept.get((entry["operation"], entry["case"]), {})
        if "triton in a graph" in found:
            graph = graph | {"triton": found["triton in a graph"]}
        events = {name: found[name] for name in ("triton", "library") if name in found and _is_device_time(result, entry, name)}
        measurements.append(entry | {"seconds": events | graph, "not_timed": {}})
    method = [
        "Triton: in CUDA graphs with a cold L2 cache, or with events if no graph was timed. Library: with events, L2 flushed before "
        "each call. Library, L2 warm: in graphs, always on the same inputs, which flatters it",
        f"A time with events includes the launch on the host unless the device is slower, so it is shown only if it is at least "
        f"{SHORTEST * 1e6:.0f} µs and {CLEARLY} times that of every case with less than half the bytes. – means no other time exists",
        "The ceilings are a copy of 1 GiB and a product of 8192 x 8192 matrices, timed with events; both take longer than their launches",
        "The references are not shown: their loops run on the host, so that is what their times measure",
        "Pages of paged attention hold 16 tokens here, 64 in the model",
    ]
    return result | {"method": method, "measurements": measurements}


def _is_device_time(result: dict[str, Any], entry: dict[str, Any], variant: str) -> bool:
    same_operation = [other for other in result["measurements"] if other["operation"] == entry["operation"]]
    moved = {other["case"]: other["bytes"] for other in same_operation if "bytes" in other}  # a backward's are not declared
    smaller = [
        other["seconds"][variant]["median"]
        for other in same_operation
        if other["direction"] == entry["direction"] and 2 * moved[other["case"]] < moved[entry["case"]] and variant in other["seconds"]
    ]
    median = entry["seconds"][variant]["median"]
    return median >= SHORTEST and bool(smaller) and median >= CLEARLY * max(smaller)


def _swept(experiments: dict[str, Any] | None) -> dict[tuple[str, str], dict[str, dict[str, float]]]:
    """Graph times by operation and case: "triton" with the default tiles, and "warm" of the library."""
    found = {}
    for name, sweep in experiments["sweep.json"].items() if experiments else ():
        for case, default, library in zip(sweep["cases"], sweep["rows"]["default"], sweep["library (warm)"], strict=True):
            found[SWEEPS[name], case] = {"triton": {"median": default / 1e6}, "warm": {"median": library / 1e6}}
    return found
