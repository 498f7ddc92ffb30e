"""Resolving names to folders, with a stand-in for the hub on the loopback interface."""

import functools
import hashlib
import json
import os
import socket
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import httpx
import huggingface_hub
import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import save

from granite_speech.checkpoints.folder import Checkpoint, resolve
from granite_speech.checkpoints.hub import EMBEDDED_FOLDER
from granite_speech.cli import main
from granite_speech.errors import CheckpointError, CheckpointNotFoundError, InputError, MissingDependencyError
from tests.support.paths import ROOT

MAIN, OLDER = "a" * 40, "b" * 40
WEIGHTS = {"encoder.out.bias": torch.arange(3.0), "projector.query": torch.ones(1, 3, 2)}


def index_of(*names):
    weight_map = {key: names[i % len(names)] for i, key in enumerate(WEIGHTS)}
    return json.dumps({"metadata": {}, "weight_map": weight_map}).encode()


SHARDED = {
    "config.json": b"{}",
    "model.safetensors.index.json": index_of("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"),
    "model-00001-of-00002.safetensors": save({"encoder.out.bias": WEIGHTS["encoder.out.bias"]}),
    "model-00002-of-00002.safetensors": save({"projector.query": WEIGHTS["projector.query"]}),
    "tokenizer.json": b"{}",
    "merges.txt": b"a b\n",
    "chat_template.jinja": b"x",
    "README.md": b"not wanted",
    "pytorch_model.bin": b"a pickle, not wanted",
    "onnx/config.json": b"{}",
}
SINGLE = {"config.json": b'{"model_type": "granite_speech"}', "model.safetensors": save(WEIGHTS)}
REPOS = {"ibm/sharded": {MAIN: SHARDED}, "ibm/single": {MAIN: SINGLE, OLDER: SINGLE | {"config.json": b'{"old": 1}'}}}


class StandIn(BaseHTTPRequestHandler):
    """The three routes that a snapshot download uses: revision, tree and files."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        path = unquote(urlsplit(self.path).path).strip("/")
        self.server.paths.append(f"{self.command} {path}")
        api = path.startswith("api/models/")
        parts = path.removeprefix("api/models/").split("/")
        repo, verb, revision, name = "/".join(parts[:2]), parts[2], parts[3], "/".join(parts[4:])
        if repo == "ibm/gated":
            return self.answer(403, b"", {"X-Error-Code": "GatedRepo"})
        if repo not in REPOS:
            return self.answer(404, b"", {"X-Error-Code": "RepoNotFound"})
        sha = {"main": MAIN, "v1": OLDER}.get(revision, revision)
        if sha not in REPOS[repo]:
            return self.answer(404, b"", {"X-Error-Code": "RevisionNotFound"})
        files = REPOS[repo][sha]
        if api and verb == "revision":
            return self.answer(200, json.dumps({"id": repo, "sha": sha, "siblings": [{"rfilename": name} for name in files]}).encode())
        if api and verb == "tree":
            rows = [{"type": "file", "path": n, "size": len(b), "oid": hashlib.sha1(b).hexdigest()} for n, b in files.items()]
            return self.answer(200, json.dumps(rows).encode())
        body = files[name]
        return self.answer(200, body, {"ETag": f'"{hashlib.sha1(body).hexdigest()}"', "X-Repo-Commit": sha})

    def answer(self, status, body, headers=None):
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), "Content-Type": "application/json", **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)


@pytest.fixture
def hub(monkeypatch):
    server = ThreadingHTTPServer(("127.0.0.1", 0), StandIn)
    server.paths = []
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    endpoint = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", functools.partial(huggingface_hub.snapshot_download, endpoint=endpoint))
    yield server
    server.shutdown()
    server.server_close()


def test_an_existing_folder_is_returned_unchanged(tmp_path, monkeypatch):
    assert resolve(tmp_path) == tmp_path
    assert resolve(str(tmp_path)) == tmp_path
    (tmp_path / "ibm" / "single").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert resolve("ibm/single") == Path("ibm/single")


@pytest.mark.parametrize("found", ["nothing", "a file", "an empty folder", "another project's folder"])
def test_the_name_embedded_means_the_bundled_checkpoint(tmp_path, monkeypatch, found):
    monkeypatch.chdir(tmp_path)
    if found == "a file":
        Path("embedded").write_text("x")
    elif found != "nothing":
        Path("embedded").mkdir()
    if found == "another project's folder":
        Path("embedded/main.c").write_text("int main;")
    assert resolve("embedded") == EMBEDDED_FOLDER


def test_a_checkpoint_in_a_folder_named_embedded_takes_precedence(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("embedded").mkdir()
    Path("embedded/config.json").write_text("{}")
    assert resolve("embedded") == Path("embedded")


@pytest.mark.parametrize("path", ["./embedded", Path("embedded"), "embedded/", "{here}/embedded"])
def test_a_path_to_a_folder_named_embedded_means_that_folder(tmp_path, monkeypatch, path):
    monkeypatch.chdir(tmp_path)
    path = path if isinstance(path, Path) else path.format(here=tmp_path)
    with pytest.raises(CheckpointNotFoundError):
        resolve(path)
    Path("embedded").mkdir()
    assert resolve(path).samefile("embedded")


@pytest.mark.parametrize("loader", ["AutoConfig", "AutoProcessor", "AutoTokenizer", "AutoFeatureExtractor", "GraniteSpeechProcessor"])
def test_every_loader_finds_the_bundled_checkpoint_by_name(tmp_path, monkeypatch, loader):
    import granite_speech

    monkeypatch.chdir(tmp_path)
    Path("embedded").mkdir()
    assert getattr(granite_speech, loader).from_pretrained("embedded") is not None


@pytest.mark.parametrize("config", [None, "{}"])
def test_the_command_without_a_model_uses_the_bundled_checkpoint(tmp_path, monkeypatch, capfd, config):
    monkeypatch.chdir(tmp_path)
    Path("embedded").mkdir()
    if config is not None:
        Path("embedded/config.json").write_text(config)
    assert main(["transcribe", "absent.wav"]) == 1  # the model loads, but the recording does not exist
    assert "absent.wav" in capfd.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("name", [None, 3, b"folder", ["folder"]])
def test_a_name_of_another_type_is_refused(name):
    with pytest.raises(InputError, match=type(name).__name__):
        resolve(name)


def test_a_sharded_repository_is_downloaded_without_unwanted_files(hub, tmp_path):
    folder = resolve("ibm/sharded", cache_dir=tmp_path)
    wanted = SHARDED.keys() - {"README.md", "pytorch_model.bin", "onnx/config.json"}
    assert {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()} == wanted
    assert (folder / "model-00001-of-00002.safetensors").is_symlink()  # the cache's own layout
    assert Checkpoint.open(folder).entries.keys() == WEIGHTS.keys()


def test_the_second_time_the_cache_is_used(hub, tmp_path):
    first = resolve("ibm/single", cache_dir=tmp_path)
    downloads = [path for path in hub.paths if path.startswith("GET") and "resolve" in path]
    assert len(downloads) == len(SINGLE)
    assert resolve("ibm/single", cache_dir=tmp_path) == first
    assert [path for path in hub.paths if path.startswith("GET") and "resolve" in path] == downloads
    hub.paths.clear()
    assert resolve("ibm/single", cache_dir=tmp_path, local_files_only=True) == first
    assert hub.paths == []


def test_a_revision_is_downloaded(hub, tmp_path):
    folder = resolve("ibm/single", cache_dir=tmp_path, revision="v1")
    assert folder.name == OLDER
    assert json.loads((folder / "config.json").read_text()) == {"old": 1}
    assert resolve("ibm/single", cache_dir=tmp_path).name == MAIN


def unreachable(monkeypatch):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    download = functools.partial(huggingface_hub.snapshot_download, endpoint=f"http://127.0.0.1:{port}")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("ibm/unknown", {}, "neither a local folder nor a repository visible to this account.* Check the spelling"),
        ("ibm/gated", {}, "gated on the hub; .* Accept the terms"),
        ("ibm/single", {"revision": "v9"}, "revision 'v9', a revision that the hub does not have; .* Check revision="),
        ("ibm/single", {"local_files_only": True}, "not complete in the local cache, with local_files_only=True"),
        ("no-such-folder", {}, "'no-such-folder', which is not an existing folder; expected an existing folder, or a hub id"),
        ("./ibm/single", {}, "which is not an existing folder"),
        ("/no/such/folder", {}, "which is not an existing folder"),
        ("a/b/c", {}, "which is not an existing folder"),
        ("", {}, "which is not an existing folder"),
        (Path("ibm/single"), {}, "which is not an existing folder"),
    ],
)
def test_missing_folders_repositories_and_revisions(hub, tmp_path, name, options, message):
    with pytest.raises(CheckpointNotFoundError, match=message):
        resolve(name, cache_dir=tmp_path, **options)


def test_without_a_connection_or_cached_files(hub, tmp_path, monkeypatch):
    unreachable(monkeypatch)
    with pytest.raises(
        CheckpointNotFoundError, match=r"not complete in the local cache, and could not be downloaded .*refused.* with a connection"
    ):
        resolve("ibm/single", cache_dir=tmp_path)


def test_without_a_connection_the_cache_is_used(hub, tmp_path, monkeypatch):
    first = resolve("ibm/single", cache_dir=tmp_path)
    unreachable(monkeypatch)
    assert resolve("ibm/single", cache_dir=tmp_path) == first


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), httpx.ReadError("reset by peer"), RuntimeError("broken")])
def test_a_failed_download(monkeypatch, error):
    def fail(*args, **options):
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(CheckpointError, match=f"whose download failed with {type(error).__name__}: .*Try again") as caught:
        resolve("ibm/single")
    assert not isinstance(caught.value, CheckpointNotFoundError)
    assert caught.value.__cause__ is error


def test_a_file_is_not_a_folder(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"which is a file; .* Pass its folder"):
        resolve(tmp_path / "model.safetensors")


def test_a_hub_id_needs_huggingface_hub(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(MissingDependencyError, match="pip install huggingface_hub"):
        resolve("ibm/single")


def test_the_hubs_environment_variable_is_used(hub, tmp_path):
    """A new process finds the hub through HF_ENDPOINT, and imports neither transformers nor peft."""
    code = (
        "import sys; from granite_speech.checkpoints.folder import resolve; print(resolve('ibm/single', cache_dir=sys.argv[1]).name);"
        "assert not {'transformers', 'peft'} & sys.modules.keys()"
    )
    environment = os.environ | {"HF_ENDPOINT": f"http://127.0.0.1:{hub.server_port}", "HF_HUB_OFFLINE": "0"}
    root = ROOT
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], cwd=root, env=environment, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (0, MAIN + "\n"), done.stderr


def test_a_subfolder_of_a_folder_and_of_a_repository(hub, tmp_path):
    (tmp_path / "all" / "checkpoint-5").mkdir(parents=True)
    assert resolve(tmp_path / "all", subfolder="checkpoint-5") == tmp_path / "all" / "checkpoint-5"
    assert resolve(tmp_path / "all", subfolder="") == resolve(tmp_path / "all", subfolder=None) == tmp_path / "all"
    found = resolve("ibm/sharded", subfolder="onnx", cache_dir=tmp_path / "cache")
    assert found.name == "onnx" and {path.name for path in found.iterdir()} == {"config.json"}
    for name in (tmp_path / "all", "ibm/sharded"):
        with pytest.raises(CheckpointNotFoundError, match=r"subfolder='nowhere'.* Check subfolder="):
            resolve(name, subfolder="nowhere", cache_dir=tmp_path / "cache")
        for bad in ("../all", "/etc", 3):
            with pytest.raises(InputError, match="subfolder"):
                resolve(name, subfolder=bad)


def test_a_release_is_found_by_its_name_alone(hub, tmp_path, monkeypatch):
    monkeypatch.setitem(REPOS, "ibm-granite/granite-speech-9.9-2b", {MAIN: SINGLE})
    monkeypatch.chdir(tmp_path)
    folder = resolve("granite-speech-9.9-2b", cache_dir=tmp_path)
    assert folder == resolve("ibm-granite/granite-speech-9.9-2b", cache_dir=tmp_path, local_files_only=True)
    with pytest.raises(CheckpointNotFoundError, match=r"'ibm-granite/granite-speech-9\.8'"):
        resolve("granite-speech-9.8", cache_dir=tmp_path)
    with pytest.raises(CheckpointNotFoundError, match="not an existing folder"):
        resolve("./granite-speech-9.9-2b", cache_dir=tmp_path)
    (tmp_path / "granite-speech-9.9-2b").mkdir()
    assert resolve("granite-speech-9.9-2b", cache_dir=tmp_path) == Path("granite-speech-9.9-2b")


def test_the_command_downloads_a_checkpoint_ahead(hub, tmp_path, capfd):
    assert main(["download", "ibm/single", "--model_dir", str(tmp_path), "--revision", "v1"]) == 0
    folder = Path(capfd.readouterr().out.removesuffix("\n"))
    assert folder.is_relative_to(tmp_path) and json.loads((folder / "config.json").read_text()) == {"old": 1}
    hub.paths.clear()
    offline = ["--download-root", str(tmp_path), "--revision", "v1", "--local_files_only"]
    assert main(["download", "ibm/single", *offline]) == 0 and hub.paths == []
    assert capfd.readouterr().out == f"{folder}\n"
    assert main(["download", "ibm/nothing", *offline]) == 2
    out, err = capfd.readouterr()
    assert out == "" and err.startswith("granite-speech: 'ibm/nothing'") and err.count("\n") == 1


def test_files_can_be_downloaded_again(hub, tmp_path):
    resolve("ibm/single", cache_dir=tmp_path)
    hub.paths.clear()
    resolve("ibm/single", cache_dir=tmp_path, force_download=True)
    assert len([path for path in hub.paths if path.startswith("GET") and "/resolve/" in path]) == len(SINGLE)


def test_without_weights_only_the_small_files_are_downloaded(hub, tmp_path):
    folder = resolve("ibm/sharded", cache_dir=tmp_path, weights=False)
    names = {path.name for path in folder.iterdir()}
    assert "config.json" in names and "tokenizer.json" in names and not any(name.endswith(".safetensors") for name in names)
    assert resolve("ibm/sharded", cache_dir=tmp_path) == folder
    assert any(path.name.endswith(".safetensors") for path in folder.iterdir())


def test_a_configuration_is_read_from_the_hub_without_weights(hub, tmp_path):
    from granite_speech import AutoConfig, GraniteSpeechConfig

    for load in (AutoConfig.from_pretrained, GraniteSpeechConfig.from_pretrained):
        config = load("ibm/single", cache_dir=tmp_path, token=None, revision="main", force_download=True)
        assert config.model_type == "granite_speech" and config.name_or_path == "ibm/single"
    assert not any("safetensors" in path for path in hub.paths)


def test_the_environment_can_forbid_the_network(hub, tmp_path, monkeypatch):
    first = resolve("ibm/single", cache_dir=tmp_path)
    hub.paths.clear()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert resolve("ibm/single", cache_dir=tmp_path) == first and hub.paths == []
    with pytest.raises(CheckpointNotFoundError, match="not complete in the local cache"):
        resolve("ibm/sharded", cache_dir=tmp_path)
