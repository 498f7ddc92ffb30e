"""How many threads the command line takes: the option, the user's OMP_NUM_THREADS, or the cores that are there and free."""

import ast
import os
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch

from granite_speech import Transcriber
from granite_speech.cli import main
from granite_speech.command_line import threads
from granite_speech.command_line import transcribe as command
from granite_speech.command_line.threads import Load, available_cores, no_slower, thread_count
from tests.support.paths import ROOT
from tests.support.scripted_transcriber import ScriptedTranscriber, transcript

CORES = {0, 1, 2, 3, 8, 9, 10, 11}  # of the affinity mask


@pytest.fixture(autouse=True)
def affinity(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: CORES, raising=False)
    monkeypatch.setattr(os, "process_cpu_count", lambda: len(CORES), raising=False)


@pytest.fixture
def set_threads(monkeypatch) -> list[int]:
    """What PyTorch is told, in place of telling it."""
    told = []
    monkeypatch.setattr(torch, "set_num_threads", told.append)
    return told


# --- what this process may use ----------------------------------------------------------------------------------------------------


def tree(root, membership: str, **files: str):
    """A file system with control groups: "a/b" of the file cpu.max of the group a/b."""
    for path, content in {"proc/self/cgroup": membership, **files}.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(content)
    return root


V2, UNIFIED, V1 = "sys/fs/cgroup", "sys/fs/cgroup/unified", "sys/fs/cgroup/cpu"
TREES = {
    "no limit": ("0::/app\n", {f"{V2}/app/cpu.max": "max 100000\n"}, 8),
    "a group": ("0::/app\n", {f"{V2}/app/cpu.max": "300000 100000\n"}, 3),
    "the smallest of a group and those around it": (
        "0::/pod/app/job\n",
        {f"{V2}/cpu.max": "max 100000", f"{V2}/pod/cpu.max": "200000 100000", f"{V2}/pod/app/cpu.max": "500000 100000"},
        2,
    ),
    "a container, whose group is mounted as the root": ("0::/docker/0123/app\n", {f"{V2}/cpu.max": "150000 50000\n"}, 3),
    "a group outside the container": ("0::/../other\n", {f"{V2}/cpu.max": "400000 100000\n", "sys/fs/other/cpu.max": "100000 100000"}, 4),
    "a path with colons": ("0::/a:b:c\n", {f"{V2}/a:b:c/cpu.max": "300000 100000\n"}, 3),
    "a quota of two and a half cores": ("0::/\n", {f"{V2}/cpu.max": "250000 100000\n"}, 2),
    "less than a core": ("0::/\n", {f"{V2}/cpu.max": "20000 100000\n"}, 1),
    "more than there are": ("0::/\n", {f"{V2}/cpu.max": "9900000 100000\n"}, 8),
    "version 1": (
        "5:cpuset:/x\n4:cpu,cpuacct:/job\n0::/\n",
        {f"{V1}/job/cpu.cfs_quota_us": "600000\n", f"{V1}/job/cpu.cfs_period_us": "100000\n"},
        6,
    ),
    "version 1 without a quota": ("4:cpu:/\n", {f"{V1}/cpu.cfs_quota_us": "-1\n", f"{V1}/cpu.cfs_period_us": "100000\n"}, 8),
    "version 1 with both names of the folder": (
        "4:cpu,cpuacct:/\n",
        {f"{V1},cpuacct/cpu.cfs_quota_us": "100000\n", f"{V1},cpuacct/cpu.cfs_period_us": "50000\n"},
        2,
    ),
    "a limit of another controller": ("4:cpuset:/job\n", {f"{V1}/job/cpu.cfs_quota_us": "1\n", f"{V1}/job/cpu.cfs_period_us": "1\n"}, 8),
    "both versions": ("1:name=systemd:/\n0::/app\n", {f"{UNIFIED}/app/cpu.max": "500000 100000\n"}, 5),
    "nonsense": ("0\n\n0::/\n", {f"{V2}/cpu.max": "many 0\n"}, 8),
    "a period of zero": ("0::/\n", {f"{V2}/cpu.max": "100000 0\n"}, 8),
}


@pytest.mark.parametrize("name", TREES)
def test_the_smaller_of_the_affinity_mask_and_the_quota_counts(tmp_path, name):
    membership, files, expected = TREES[name]
    assert available_cores(tree(tmp_path, membership, **files)) == expected


def test_without_control_groups_the_affinity_mask_counts(tmp_path, monkeypatch):
    assert available_cores(tmp_path) == 8
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.delattr(os, "process_cpu_count")
    monkeypatch.setattr(os, "cpu_count", lambda: 3)
    assert available_cores(tmp_path) == 3
    assert Load(tmp_path).free_cores() == 3, "as on macOS and Windows"


# --- what others leave free -------------------------------------------------------------------------------------------------------


class Machine:
    """A /proc/stat that says what a test wants, and a clock."""

    def __init__(self, root, monkeypatch, cores=range(12)):
        self.root, self.seconds, self.own = root, 1000.0, 5.0
        self.busy = dict.fromkeys(cores, 70.0)
        monkeypatch.setattr(time, "monotonic", lambda: self.seconds)
        monkeypatch.setattr(time, "process_time", lambda: self.own)
        tree(root, "0::/\n")
        self.write()

    def write(self):
        ticks = {core: round(busy * os.sysconf("SC_CLK_TCK")) for core, busy in self.busy.items()}
        lines = [f"cpu{core} {count // 2} 0 {count - count // 2} 12345 678 0 0 0 0 0" for core, count in ticks.items()]
        (self.root / "proc/stat").write_text("\n".join(["cpu  1 2 3 4 5 6 7 8 9 0", *lines, "intr 1 2 3", "ctxt 5\n"]))

    def run(self, seconds: float, busy: dict[int, float], own: float = 0.0) -> None:
        """Time passes, in which cores were busy for a part of it, with work of this process too."""
        self.seconds += seconds
        self.own += seconds * own
        for core, part in busy.items():
            self.busy[core] += seconds * part
        self.write()


@pytest.mark.parametrize(
    "busy, own, expected",
    [
        ({}, 0.0, 8),
        ({0: 1.0, 1: 0.5}, 1.5, 8),  # only this process
        ({0: 1.0, 1: 0.3}, 1.0, 8),
        ({0: 1.0, 1: 1.0}, 1.0, 7),
        ({0: 1.0, 1: 1.0, 2: 1.0, 3: 1.0}, 0.5, 4),
        (dict.fromkeys(CORES, 1.0), 0.6, 1),  # never less than one
        ({4: 1.0, 5: 1.0, 6: 1.0}, 0.0, 8),  # cores that this process may not use
    ],
)
def test_cores_that_other_processes_use_are_left_to_them(tmp_path, monkeypatch, busy, own, expected):
    machine = Machine(tmp_path, monkeypatch)
    load = Load(tmp_path)
    machine.run(2.0, busy, own)
    assert load.free_cores() == expected


def test_a_quota_limits_the_free_cores_but_is_not_reduced_by_others(tmp_path, monkeypatch):
    machine = Machine(tmp_path, monkeypatch)
    tree(tmp_path, "0::/\n", **{f"{V2}/cpu.max": "300000 100000"})
    load = Load(tmp_path)
    machine.run(2.0, {0: 1.0, 1: 1.0})
    assert load.free_cores() == 3


def test_a_moment_says_nothing_about_the_load(tmp_path, monkeypatch):
    machine = Machine(tmp_path, monkeypatch)
    load = Load(tmp_path)
    machine.run(0.1, dict.fromkeys(CORES, 1.0))
    assert load.free_cores() == 8
    machine.run(0.9, dict.fromkeys(CORES, 1.0))
    assert load.free_cores() == 1


@pytest.mark.parametrize("content", [None, "", "cpu  1 2 3\n", "cpu0 1 2\n", "cpu0 a b c d e f g h\n"])
def test_a_load_that_cannot_be_read_changes_nothing(tmp_path, monkeypatch, content):
    machine = Machine(tmp_path, monkeypatch)
    load = Load(tmp_path)
    machine.run(2.0, dict.fromkeys(CORES, 1.0))
    (tmp_path / "proc/stat").unlink()
    if content is not None:
        (tmp_path / "proc/stat").write_text(content)
    assert load.free_cores() == 8 and Load(tmp_path).free_cores() == 8


def test_cores_with_other_numbers_than_in_the_affinity_mask_change_nothing(tmp_path, monkeypatch):
    """As in a container that shows its own cores as 0 to 7."""
    machine = Machine(tmp_path, monkeypatch, cores=range(8))
    load = Load(tmp_path)
    machine.run(2.0, dict.fromkeys(range(8), 1.0))
    assert load.free_cores() == 8


# --- what products say ------------------------------------------------------------------------------------------------------------

MODEL = SimpleNamespace(config=SimpleNamespace(encoder_config=SimpleNamespace(hidden_dim=8, feedforward_mult=4)), dtype=torch.bfloat16)


@pytest.mark.parametrize(
    "one, several, expected",
    [(1.0, 0.3, 4), (1.0, 1.4, 4), (1.0, 1.6, 1), (0.1, 16.0, 1)],
)
def test_several_threads_that_are_clearly_slower_are_not_used(monkeypatch, one, several, expected):
    asked = []
    monkeypatch.setattr(threads, "_compare", lambda *given: asked.append(given) or (one, several))
    assert no_slower(4, MODEL) == expected and asked == [(4, (8, 32), torch.bfloat16)]
    assert no_slower(1, MODEL) == 1 and len(asked) == 1, "nothing to compare"


def test_products_are_timed_with_one_thread_and_with_several(monkeypatch, set_threads):
    told, linear = [], torch.nn.functional.linear
    monkeypatch.setattr(torch.nn.functional, "linear", lambda *given: told.append(set_threads[-1]) or linear(*given))
    one, several = threads._compare(2, (8, 32), torch.float32)
    assert one > 0 and several > 0 and set_threads == [1, 2] and told.count(1) == told.count(2) == 13
    no_slower(2, MODEL)
    assert torch.get_num_threads() == 1, "of this thread"


WITH_TEAM = """
import os, sys, torch
from granite_speech.command_line.threads import set_threads
from granite_speech.engine import cpu_threads
torch.set_num_threads(int(sys.argv[1]))  # starts threads of another pool
before = len(os.listdir("/proc/self/task"))
set_threads(int(sys.argv[1]))
print(len(os.listdir("/proc/self/task")) - before, torch.get_num_threads(), cpu_threads._gnu_openmp() is not None)
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/task"), reason="no list of threads")
@pytest.mark.parametrize("count", [1, 3])
def test_the_first_thread_has_a_team_so_that_waiting_threads_sleep(count):
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    command = [sys.executable, "-c", WITH_TEAM, str(count)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    new, threads, is_gnu = done.stdout.split()
    assert int(threads) == count and (is_gnu == "False" or int(new) == count - 1)


# --- which wins -------------------------------------------------------------------------------------------------------------------


class Free:
    """A load that leaves five cores."""

    def free_cores(self) -> int:
        return 5


@pytest.mark.parametrize(
    "variable, asked, expected",
    [
        (None, None, 5),
        (None, 3, 3),
        (None, 9, 9),
        ("2", None, None),
        ("2,1", None, None),
        (" 2 ", None, None),
        ("2", 3, 3),
        ("", None, 5),
        ("0", None, 5),
        ("many", None, 5),
    ],
)
def test_the_option_wins_over_the_users_variable_and_that_over_the_default(monkeypatch, variable, asked, expected):
    monkeypatch.delenv("OMP_NUM_THREADS")
    if variable is not None:
        monkeypatch.setenv("OMP_NUM_THREADS", variable)
    assert thread_count(asked, Free()) == expected


@pytest.fixture
def transcriber(monkeypatch):
    scripted = ScriptedTranscriber({"a.wav": transcript("one")})
    monkeypatch.setattr(Transcriber, "from_pretrained", scripted.from_pretrained)
    return scripted


def test_the_command_sets_the_threads_before_it_loads_the_model(transcriber, monkeypatch, set_threads):
    monkeypatch.setattr(torch, "set_num_threads", lambda count: set_threads.append((count, len(transcriber.loaded))))
    assert main(["a.wav", "--threads", "3"]) == 0
    assert main(["a.wav"]) == 0
    monkeypatch.delenv("OMP_NUM_THREADS")
    monkeypatch.setattr(threads, "_quota", lambda root: 4)
    monkeypatch.setattr(command, "no_slower", lambda count, model: count - 1)
    assert main(["a.wav", "--threads", "0"]) == 0, "whisper's default"
    assert set_threads == [(3, 0), (1, 1), (4, 2), (3, 3)], "OMP_NUM_THREADS is 1 in tests"


def test_the_first_line_says_why_there_are_fewer_threads_than_cores(transcriber, monkeypatch, set_threads, capfd):
    monkeypatch.delenv("OMP_NUM_THREADS")
    monkeypatch.setattr(Load, "free_cores", lambda self: 2)
    monkeypatch.setattr(command, "no_slower", lambda count, model: count)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    assert main(["a.wav", "--model", "m"]) == 0
    line = "granite-speech: m, bfloat16 on cpu, 2 threads, because more would be slower now (--threads 8 uses all cores)\n"
    assert capfd.readouterr().err == line and set_threads == [2, 2]
    assert main(["a.wav", "--model", "m", "--threads", "2"]) == 0
    assert capfd.readouterr().err == "granite-speech: m, bfloat16 on cpu, 2 threads\n"


# --- the library ------------------------------------------------------------------------------------------------------------------

# silero-vad sets one thread when it is imported, and its importer sets the earlier number again.
RESTORES = {"granite_speech/transcription/silero.py": ["torch.set_num_threads(threads)"]}
SETTING = ("set_num_threads", "set_num_interop_threads", "putenv", "unsetenv")


def test_the_library_never_sets_threads_or_environment_variables():
    found = {}
    for file in [*(ROOT / "granite_speech").rglob("*.py"), *(ROOT / "kernels/granite_kernels").rglob("*.py")]:
        name = file.relative_to(ROOT).as_posix()
        if name == "granite_speech/cli.py" or name.startswith("granite_speech/command_line/"):
            continue
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                is_set = node.func.attr in SETTING or (
                    node.func.attr in ("update", "setdefault", "pop", "clear", "popitem") and "environ" in ast.unparse(node.func.value)
                )
            else:
                targets = getattr(node, "targets", [getattr(node, "target", None)])
                is_set = any(isinstance(one, ast.Subscript) and "environ" in ast.unparse(one.value) for one in targets)
                is_set |= isinstance(node, ast.AugAssign) and "environ" in ast.unparse(node.target)
            if is_set:
                found.setdefault(name, []).append(ast.unparse(node))
    assert found == RESTORES


def test_transcribing_leaves_threads_and_environment_as_they_were(set_threads):
    from tests.support.spoken import SPEECH, sentences

    before, environment = torch.get_num_threads(), dict(os.environ)
    with Transcriber.from_pretrained("embedded", device="cpu") as transcriber:
        assert transcriber.transcribe(SPEECH / sentences()[0].audio) == sentences()[0].text
    assert (set_threads, torch.get_num_threads(), dict(os.environ)) == ([], before, environment)
