"""Result files: one JSON file per run, named by kind, machine, date and commit."""

import json
import math
import platform
import re
import subprocess
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

__all__ = ["FOLDER", "describe_run", "file_of", "newest", "processor_text", "replace_section", "time_text", "write"]

FOLDER = Path(__file__).parent / "results"
# Of a processor's flags, those that decide how fast matrix products are.
_FLAGS = ("avx2", "avx512f", "avx_vnni", "avx512_vnni", "avx512_bf16", "avx512_fp16", "amx_bf16", "amx_int8")
_PACKAGES = ("torch", "torchaudio", "triton", "transformers", "numpy")


def describe_run() -> dict[str, Any]:
    """Commit, machine, versions and threads of this run."""
    import torch

    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": _git("rev-parse", "HEAD"),
        "uncommitted_changes": bool(_git("status", "--porcelain")),
        "machine": _processor().get("model name") or platform.processor() or platform.machine(),
        "processor": _described(_processor()),
        "cores": torch.multiprocessing.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in _PACKAGES},
    }


def _git(*arguments: str) -> str:
    done = subprocess.run(("git", *arguments), cwd=FOLDER.parent, capture_output=True, text=True, check=False)
    return done.stdout.strip()


def _processor() -> dict[str, str]:
    """Linux's description of the first core; empty elsewhere."""
    try:
        first = Path("/proc/cpuinfo").read_text().partition("\n\n")[0]
    except OSError:
        return {}
    pairs = (line.partition(":") for line in first.splitlines())
    return {name.strip(): value.strip() for name, _, value in pairs}


def _described(cpuinfo: dict[str, str]) -> dict[str, Any]:
    names = {"vendor": "vendor_id", "family": "cpu family", "model": "model", "stepping": "stepping"}
    found: dict[str, Any] = {name: cpuinfo[key] for name, key in names.items() if key in cpuinfo}
    flags = cpuinfo.get("flags", "").split()
    return found | {"flags": [flag for flag in _FLAGS if flag in flags]}


def processor_text(run: dict[str, Any]) -> str:
    """The machine of a run of `describe_run` with its family, model, stepping and flags, as far as the file has them."""
    known = run.get("processor", {})
    numbers = " ".join(f"{name} {known[name]}" for name in ("family", "model", "stepping") if name in known)
    details = ", ".join(one for one in (known.get("vendor", ""), numbers, " ".join(known.get("flags", ()))) if one)
    return f"{run['machine']} ({details})" if details else run["machine"]


def write(folder: Path, kind: str, result: dict[str, Any]) -> Path:
    """Write one run to a file named by kind, machine, date and commit; returns the file."""
    folder.mkdir(parents=True, exist_ok=True)
    file = file_of(folder, kind, result["run"])
    file.write_text(json.dumps(result, indent=2) + "\n")
    return file


def file_of(folder: Path, kind: str, run: dict[str, Any]) -> Path:
    """The file that `write` writes for a run, of `describe_run`."""
    machine = "-".join(re.findall(r"[a-z0-9.]+", run["machine"].lower().replace("(r)", "")))
    return folder / f"{kind}-{machine}-{run['date'][:10]}-{run['commit'][:8] or 'uncommitted'}.json"


def newest() -> list[dict[str, Any]]:
    """The newest committed run of each kind on each machine."""
    found: dict[tuple[str, str], dict[str, Any]] = {}
    for file in sorted(FOLDER.glob("*.json")):
        result = json.loads(file.read_text())
        key = (result["kind"], result["run"]["machine"])
        if key not in found or found[key]["run"]["date"] < result["run"]["date"]:
            found[key] = result
    return [found[key] for key in sorted(found)]


def time_text(seconds: float) -> str:
    """Three significant digits and a unit: "11.7 s", "26.4 ms", "8.78 µs"."""
    rounded = float(f"{seconds:.3g}")
    scale, unit = (1, "s") if rounded >= 1 else (1e3, "ms") if rounded * 1e3 >= 1 else (1e6, "µs")
    value = rounded * scale
    decimals = max(0, 2 - math.floor(math.log10(value))) if value > 0 else 0
    return f"{value:.{decimals}f} {unit}"


def replace_section(file: Path, command: str, text: str) -> None:
    """Replace the text between `<!-- python -m bench <command> -->` and `<!-- end of <command> -->` in a Markdown file.

    Raises:
        ValueError: the file does not have both markers.
    """
    begin, end = f"<!-- python -m bench {command} -->", f"<!-- end of {command} -->"
    before, found, rest = file.read_text().partition(begin)
    _, closed, after = rest.partition(end)
    if not found or not closed:
        raise ValueError(f"{file} has no section between {begin} and {end}")
    file.write_text(f"{before}{begin}\n{text}\n{end}{after}")
