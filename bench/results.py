"""Result files: one JSON a run, named by what ran, machine, date and commit."""

import json
import math
import platform
import subprocess
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

__all__ = ["FOLDER", "README", "describe_run", "newest", "replace_section", "time_text", "write"]

FOLDER = Path(__file__).parent / "results"
README = FOLDER.parents[1] / "README.md"
_PACKAGES = ("torch", "torchaudio", "triton", "transformers", "numpy")


def describe_run() -> dict[str, Any]:
    """Where and with what a run happens: commit, machine, versions, threads."""
    import torch

    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": _git("rev-parse", "HEAD"),
        "uncommitted_changes": bool(_git("status", "--porcelain")),
        "machine": _processor(),
        "cores": torch.multiprocessing.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in _PACKAGES},
    }


def _git(*arguments: str) -> str:
    done = subprocess.run(("git", *arguments), cwd=FOLDER.parent, capture_output=True, text=True, check=False)
    return done.stdout.strip()


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def write(folder: Path, kind: str, result: dict[str, Any]) -> Path:
    """Write one run; the name tells kind, machine, day and commit."""
    folder.mkdir(parents=True, exist_ok=True)
    run = result["run"]
    machine = "-".join(run["machine"].lower().split()).replace("/", "-")
    file = folder / f"{kind}-{machine}-{run['date'][:10]}-{run['commit'][:8] or 'uncommitted'}.json"
    file.write_text(json.dumps(result, indent=2) + "\n")
    return file


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
    """Three significant digits in the unit that suits them: "11.7 s", "26.4 ms", "8.78 µs"."""
    rounded = float(f"{seconds:.3g}")
    value, unit = next(((rounded * scale, unit) for scale, unit in ((1, "s"), (1e3, "ms")) if rounded * scale >= 1), (rounded * 1e6, "µs"))
    return f"{value:.{max(0, 2 - math.floor(math.log10(value))) if value > 0 else 0}f} {unit}"


def replace_section(file: Path, command: str, text: str) -> None:
    """Write `text` into a Markdown file, between `<!-- python -m bench <command> -->` and `<!-- end of <command> -->`.

    Raises:
        ValueError: the file has no such pair of lines.
    """
    begin, end = f"<!-- python -m bench {command} -->", f"<!-- end of {command} -->"
    before, found, rest = file.read_text().partition(begin)
    _, closed, after = rest.partition(end)
    if not found or not closed:
        raise ValueError(f"{file} has no section between {begin} and {end}")
    file.write_text(f"{before}{begin}\n{text}\n{end}{after}")
