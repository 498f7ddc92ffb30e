"""Result files: one JSON a run, named by what ran, machine, date and commit; and the tables drawn from them."""

import json
import platform
import subprocess
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

__all__ = ["FOLDER", "README", "describe_run", "replace_section", "report", "write"]

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


SPEEDS = ("encoder", "kernels", "kernels-cpu")


def report(kinds: Sequence[str] = SPEEDS) -> str:
    """Markdown of the newest run of each of these kinds on each machine."""
    newest: dict[tuple[str, str], dict[str, Any]] = {}
    for file in FOLDER.glob("*.json"):
        result = json.loads(file.read_text())
        key = (result["kind"], result["run"]["machine"])
        if key[0] in kinds and (key not in newest or newest[key]["run"]["date"] < result["run"]["date"]):
            newest[key] = result
    return "\n\n".join(_tables()[newest[key]["kind"]](newest[key]) for key in sorted(newest))


def _tables() -> dict[str, Callable[[dict[str, Any]], str]]:
    from bench import kernels, kernels_cpu, words

    return {"encoder": table, "kernels": kernels.table, "kernels-cpu": kernels_cpu.table, "words": words.table}


def table(result: dict[str, Any]) -> str:
    """Markdown of one run."""
    run = result["run"]
    versions = ", ".join(f"{name} {run['versions'][name]}" for name in ("torch", "transformers"))
    head = f"{run['machine']}, {run['threads']} threads, {versions}, commit {run['commit'][:8]}, median of {result['rounds']}:"
    rows = ["| what | here, s | transformers, s | ratio | share of the matmul rate |", "|---|---|---|---|---|"]
    for one in result["measurements"]:
        row = (
            one["what"],
            f"{one['seconds']:.2f}",
            f"{one['reference_seconds']:.2f}",
            f"{one['ratio']:.2f}x",
            f"{one['matmul_share']:.0%}",
        )
        rows.append(f"| {' | '.join(row)} |")
    return "\n".join([head, "", *rows])


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
