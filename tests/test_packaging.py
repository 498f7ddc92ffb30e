"""The installed files, the cost and side effects of importing, and which module may import which."""

import ast
import importlib.util
import os
import pkgutil
import shutil
import subprocess
import sys
import zipfile
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import granite_speech
from granite_speech.checkpoints.hub import EMBEDDED_FOLDER
from tests.support.paths import ROOT

SOURCES = {"granite_speech": ROOT / "granite_speech", "granite_kernels": ROOT / "kernels" / "granite_kernels"}
JFK, SAMPLE = "granite_speech/assets/jfk.flac", "granite_speech/assets/sample.flac"

# Prepended to a script to hide installed packages.
BLOCK = """
import sys
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in BLOCKED:
            raise ModuleNotFoundError(f"No module named {name!r} (blocked)", name=name)
sys.meta_path.insert(0, Blocker())
"""


def python(script, *arguments, path=(ROOT, ROOT / "kernels"), cwd=None, blocked=None, options=()):
    """Run a script in a new interpreter that finds only these source roots and installed packages."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "TRITON"))}
    environment["PYTHONPATH"] = os.pathsep.join(map(str, path))
    environment["OMP_NUM_THREADS"] = "1"
    text = (f"BLOCKED = {blocked!r}\n{BLOCK}" if blocked else "") + script
    command = [sys.executable, *options, "-c", text, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=cwd, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return done


# --- importing -------------------------------------------------------------------------------------------------------------------


def test_the_kernels_folder_is_not_a_package():
    """Hugging Face has an import package `kernels`, which transformers imports. With an __init__.py, this folder would be
    imported instead by anything run from the root, and an installation would overwrite Hugging Face's files."""
    assert not (ROOT / "kernels" / "__init__.py").exists(), "it would replace Hugging Face's package `kernels`"
    found = importlib.util.find_spec("kernels")
    if found is not None and found.origin is not None:
        assert Path(found.origin).parent != ROOT / "kernels"


def test_importing_the_package_is_fast(tmp_path):
    script = """
import sys, time
begin = time.perf_counter()
import granite_speech
print(time.perf_counter() - begin)
heavy = {"torch", "numpy", "av", "triton", "safetensors", "tokenizers", "huggingface_hub", "importlib.metadata"} & set(sys.modules)
assert not heavy, heavy
granite_speech.ConfigError
assert "torch" not in sys.modules
assert "Blip2QFormerConfig" in dir(granite_speech)
try:
    granite_speech.nothing
except AttributeError as error:
    assert "nothing" in str(error)
else:
    raise AssertionError
"""
    assert float(python(script, cwd=tmp_path, options=["-S"]).stdout) < 0.25


def test_every_module_imports_without_transformers(tmp_path):
    """Run where these packages are installed and could be imported by mistake."""
    script = """
import pkgutil, sys
from importlib import import_module
import granite_speech, granite_kernels
packages = granite_speech, granite_kernels
names = [one.name for package in packages for one in pkgutil.walk_packages(package.__path__, package.__name__ + ".")]
for name in names:
    import_module(name)
for name in granite_speech.__all__:
    getattr(granite_speech, name)
pulled_in = {"transformers", "peft", "torchaudio", "av", "accelerate", "datasets"} & set(sys.modules)
assert not pulled_in, pulled_in
print(len(names))
"""
    modules = sum(len(list(folder.rglob("*.py"))) for folder in SOURCES.values())
    assert int(python(script, cwd=tmp_path).stdout) >= modules - 4


def test_every_public_name_can_be_imported():
    for name in granite_speech.__all__:
        assert getattr(granite_speech, name) is not None
    for module in pkgutil.iter_modules(granite_speech.__path__):
        loaded = importlib.import_module(f"granite_speech.{module.name}")
        for name in getattr(loaded, "__all__", ()):
            assert hasattr(loaded, name), f"granite_speech.{module.name}.__all__ names {name}, which does not exist"


def test_type_checkers_see_the_same_names():
    tree = ast.parse((SOURCES["granite_speech"] / "__init__.py").read_text())
    block = next(node for node in tree.body if isinstance(node, ast.If) and getattr(node.test, "id", "") == "TYPE_CHECKING")
    shown = {alias.asname: f"{node.module}.{alias.name}" for node in block.body for alias in node.names}
    assert shown == {name: f"granite_speech.{home}.{name}" for home, names in granite_speech._HOMES.items() for name in names}


# --- IBM's package of the same import name ---------------------------------------------------------------------------------------

WARNINGS = """
import sys, warnings
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import granite_speech
    import granite_speech.errors
for one in caught:
    print(one.category.__name__, one.filename, one.message)
"""


def installed(folder, name, version):
    """Write the files of an installed distribution that importlib.metadata reads."""
    info = folder / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")


def test_ibms_package_is_warned_about(tmp_path):
    installed(tmp_path, "granite-speech", "0.0.3")
    warned = python(WARNINGS, path=(ROOT, ROOT / "kernels", tmp_path), cwd=tmp_path).stdout.splitlines()
    assert len(warned) == 1 and warned[0].startswith("RuntimeWarning <string>"), warned
    for part in ("granite-speech 0.0.3", "granite-speech-triton", "granite_speech", "pip uninstall"):
        assert part in warned[0]


def test_this_package_alone_gives_no_warning(tmp_path):
    installed(tmp_path, "granite-speech-triton", "0.1.0")
    installed(tmp_path, "granite-speechless", "1.0")
    path = (ROOT, ROOT / "kernels", tmp_path, tmp_path / "absent", ROOT / "setup.py")
    assert python(WARNINGS, path=path, cwd=tmp_path, options=["-S"]).stdout == ""


# --- the wheel -------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """A wheel built from a copy of the sources, so that files of earlier builds are not included and none are left here."""
    folder = tmp_path_factory.mktemp("wheel")
    source, built = folder / "source", folder / "built"
    source.mkdir()
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        if (ROOT / name).exists():
            shutil.copy(ROOT / name, source)
    for name in ("granite_speech", "kernels", "tests", "bench"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__", "results", "*.egg-info"))
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(built), str(source)]
    # Older versions of setuptools need the package `wheel`; without it pip must use an isolated build.
    setuptools = int(importlib.import_module("setuptools").__version__.partition(".")[0])
    if setuptools >= 71 or importlib.util.find_spec("wheel"):
        command.append("--no-build-isolation")
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder, check=False)
    assert done.returncode == 0, done.stderr
    (path,) = built.iterdir()
    return path


def test_the_contents_of_the_wheel(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    top = {name.partition("/")[0] for name in names}
    info = f"granite_speech_triton-{granite_speech.__version__}.dist-info"
    assert top == {"granite_speech", "granite_kernels", info}, "no top-level kernels, tests or bench"
    assert {"granite_speech/py.typed", "granite_kernels/py.typed", JFK, SAMPLE, "granite_speech/assets/README.md"} <= names
    assert {f"granite_speech/assets/embedded/{file.name}" for file in EMBEDDED_FOLDER.iterdir()} <= names
    sources = {f"{package}/{one.relative_to(folder).as_posix()}" for package, folder in SOURCES.items() for one in folder.rglob("*.py")}
    recipe = {name for name in sources if name.startswith("granite_speech/training/bundled_checkpoint/")}
    assert recipe and {name for name in names if name.endswith(".py")} == sources - recipe
    entry_points = zipfile.ZipFile(wheel).read(f"{info}/entry_points.txt").decode()
    assert "granite-speech = granite_speech.cli:command" in entry_points.replace("=", " = ").replace("  ", " ")


def test_the_wheel_transcribes_outside_the_repository(wheel, tmp_path):
    site, elsewhere = tmp_path / "site", tmp_path / "elsewhere"
    elsewhere.mkdir()
    zipfile.ZipFile(wheel).extractall(site)
    script = """
import pathlib
import granite_kernels, granite_speech
site, sample = map(pathlib.Path, sys.argv[1:])
for package in (granite_speech, granite_kernels):
    assert pathlib.Path(package.__file__).is_relative_to(site), package.__file__
from granite_speech.cli import main
sys.exit(main(["transcribe", str(sample)]))
"""
    done = python(script, site, site / SAMPLE, path=(site,), cwd=elsewhere, blocked=["transformers", "peft", "kernels", "tests", "bench"])
    assert done.stdout == "open menu seven two five stop\n"
    first, second = done.stderr.splitlines()
    assert first.startswith("granite-speech: embedded, ") and "inside the package" in second
    assert not any(elsewhere.iterdir())


# --- which module may import which -----------------------------------------------------------------------------------------------

# Each may import those in its own row and in the rows above. A folder counts as one.
ORDER = (
    ("errors",),
    ("checkpoints",),
    ("config", "config_attributes", "config_base", "config_ctc", "config_files", "config_values"),
    ("inputs",),
    ("modules",),
    ("generation",),
    ("engine",),
    ("adapters",),
    ("embeddings", "model", "model_ctc", "pretrained", "saving", "trainer_checkpoints"),
    ("audio", "auto", "transcription"),
    ("training", "interop"),
    ("verify", "verify_ctc", "verify_runs", "verify_speech"),
    ("command_line",),
    ("cli", "server"),
)
RANK = {name: rank for rank, names in enumerate(ORDER) for name in names}


def modules(root, package):
    """Module name → file, for every module of a package."""
    files = (root / package).rglob("*.py")
    return {".".join(file.relative_to(root).with_suffix("").parts).removesuffix(".__init__"): file for file in files}


ALL = {**modules(ROOT, "granite_speech"), **modules(ROOT / "kernels", "granite_kernels"), **modules(ROOT, "bench")}


def imports(file):
    """Every module that a file imports at run time, at the top or in a function. `from a import b` may mean the module a.b."""
    found = set()
    tree = ast.parse(file.read_text())
    for_checkers = {
        node for one in ast.walk(tree) if getattr(getattr(one, "test", None), "id", "") == "TYPE_CHECKING" for node in ast.walk(one)
    }
    for node in ast.walk(tree):
        if node in for_checkers:
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file.name}: a relative import"
            found |= {one if (one := f"{node.module}.{alias.name}") in ALL else node.module for alias in node.names}
    return found


def part(module):
    """`granite_speech.inputs.audio` → `inputs`."""
    return module.split(".")[1] if "." in module else ""


@pytest.mark.parametrize("name", [name for name in ALL if name.startswith("granite_kernels")])
def test_kernels_import_only_torch_and_triton(name):
    allowed = {"torch", "triton", "granite_kernels", *sys.stdlib_module_names}
    assert {one.partition(".")[0] for one in imports(ALL[name])} <= allowed


@pytest.mark.parametrize("name", [name for name in ALL if name.startswith("granite_speech.")])
def test_modules_import_downwards(name):
    imported = imports(ALL[name])
    above = {one for one in imported if one.startswith("granite_speech.") and RANK[part(one)] > RANK[part(name)]}
    assert not above, f"{name} imports {sorted(above)}"
    if part(name) not in ("verify_runs", "interop"):  # they compare with transformers or extend it, and import it when called
        assert not {one.partition(".")[0] for one in imported} & {"transformers", "peft", "tests", "bench"}


def test_every_module_has_a_rank():
    assert {part(name) for name in ALL if name.startswith("granite_speech.")} <= RANK.keys()
    found = imports(ALL["granite_speech.modules.conformer_parts"])
    assert {"granite_kernels", "granite_speech.modules.packing"} <= found, "imports() finds imports"


def test_there_are_no_import_cycles():
    TopologicalSorter({name: imports(file) & ALL.keys() - {name} for name, file in ALL.items()}).prepare()


def test_only_the_package_itself_exports_names():
    """Subpackages export nothing, except `granite_speech.training`, whose names are documented."""
    for name, file in ALL.items():
        if file.name == "__init__.py" and name.count(".") and name != "granite_speech.training":
            assert not ast.parse(file.read_text()).body, name
