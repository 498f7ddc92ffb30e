"""Uploads, with huggingface_hub's functions replaced by recorders: no test reaches the network."""

import sys
from types import SimpleNamespace

import httpx
import huggingface_hub
import pytest
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError

from granite_speech.checkpoints.upload import PushToHub, saving, upload
from granite_speech.errors import CheckpointError, InputError, MissingDependencyError, UnsupportedError


@pytest.fixture
def calls(monkeypatch):
    """Record the calls. The account is "me"."""
    made = []

    def create_repo(repo_id, **options):
        made.append(("create_repo", repo_id, options))
        return SimpleNamespace(repo_id=repo_id if "/" in repo_id else f"me/{repo_id}")

    def upload_folder(**options):
        made.append(("upload_folder", options.pop("repo_id"), options))
        return "https://hub/commit/1"

    monkeypatch.setattr(huggingface_hub, "create_repo", create_repo)
    monkeypatch.setattr(huggingface_hub, "upload_folder", upload_folder)
    monkeypatch.setattr(huggingface_hub, "create_branch", lambda repo_id, **options: made.append(("create_branch", repo_id, options)))
    return made


def test_an_upload_creates_the_repository_and_returns_the_commit(calls, tmp_path):
    url = upload(tmp_path, "model", commit_message="words", private=True, token="t", create_pr=True, commit_description="more")
    assert url == "https://hub/commit/1"
    (create, _, created), (send, repo_id, sent) = calls
    assert (create, send, repo_id) == ("create_repo", "upload_folder", "me/model")
    assert created == {"private": True, "token": "t", "exist_ok": True}
    expected = {"folder_path": tmp_path, "commit_message": "words", "commit_description": "more", "token": "t", "create_pr": True}
    assert expected.items() <= sent.items()


def test_a_branch_is_created(calls, tmp_path):
    upload(tmp_path, "me/model", revision="dev")
    assert [name for name, _, _ in calls] == ["create_repo", "create_branch", "upload_folder"]
    assert calls[1][2]["branch"] == calls[2][2]["revision"] == "dev"


@pytest.mark.parametrize("existing", [None, ["speech", "old"]])
def test_tags_are_added_to_the_model_card(calls, tmp_path, monkeypatch, existing):
    pushed = []

    def load(repo_id, **_):
        if existing is None:
            raise EntryNotFoundError("none")
        return huggingface_hub.ModelCard(f"---\ntags: {existing}\n---\nbody\n")

    monkeypatch.setattr(huggingface_hub.ModelCard, "load", load)
    monkeypatch.setattr(huggingface_hub.ModelCard, "push_to_hub", lambda card, repo_id, **_: pushed.append((repo_id, card)))
    upload(tmp_path, "me/model", tags=["speech", "new"])
    ((repo_id, card),) = pushed
    assert repo_id == "me/model" and card.data.tags == ([*existing, "new"] if existing else ["speech", "new"])
    assert ("body" in card.text) == bool(existing)


@pytest.mark.parametrize(
    ("error", "expected", "message"),
    [
        (HfHubHTTPError("no", response=httpx.Response(403, request=httpx.Request("POST", "http://hub"))), CheckpointError, "hf auth login"),
        (httpx.ConnectError("refused"), CheckpointError, "failed with ConnectError: refused"),
        (HFValidationError("bad name"), InputError, "bad name"),
    ],
    ids=["forbidden", "no connection", "a bad name"],
)
def test_a_failed_upload(calls, tmp_path, monkeypatch, error, expected, message):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(huggingface_hub, "create_repo", fail)
    with pytest.raises(expected, match=message) as caught:
        upload(tmp_path, "me/model")
    assert caught.value.__cause__ is error


def test_an_upload_needs_huggingface_hub(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(MissingDependencyError, match="pip install huggingface_hub"):
        upload(tmp_path, "me/model")


class Saved(PushToHub):
    def save_pretrained(self, save_directory, **options):
        with saving(save_directory, "save_pretrained", options=options) as self.folder:
            self.options = options


def test_saving_uploads_only_what_was_written(calls, tmp_path):
    (tmp_path / "private.txt").write_text("x")
    with saving(
        tmp_path, "save_pretrained", push_to_hub=True, options={"repo_id": "me/model", "private": True, "safe_serialization": True}
    ):
        (tmp_path / "config.json").write_text("{}")
    assert calls[0][1:] == ("me/model", {"private": True, "token": None, "exist_ok": True})
    assert calls[1][2]["allow_patterns"] == ["config.json"]
    calls.clear()
    with saving(tmp_path / "new", "save_pretrained", push_to_hub=True):
        pass
    assert calls[0][1] == "new"
    calls.clear()
    with saving(tmp_path / "new", "save_pretrained", options={"repo_id": "me/model", "commit_message": "x"}):
        pass
    assert not calls


def test_saving_refuses_files_and_options(calls, tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(CheckpointError, match=r"file', which is a file; .*Pass another path"), saving(tmp_path / "file", "save_pretrained"):
        pass
    for bad in (None, 3, ""):
        with pytest.raises(InputError, match="save_directory"), saving(bad, "save_pretrained"):
            pass
    with pytest.raises(UnsupportedError, match="safe_serialization=False"), saving(tmp_path, "save", options={"safe_serialization": False}):
        pass
    with pytest.raises(InputError, match=r"unknown option 'comit_message'.*commit_message"):
        Saved().push_to_hub("me/model", comit_message="x")


def test_pushing_saves_into_a_temporary_folder(calls):
    thing = Saved()
    assert thing.push_to_hub("me/model", private=True, safe_serialization=True, max_shard_size="5GB", commit_message="words")
    assert calls[0][2]["private"] is True
    assert calls[1][2]["folder_path"] == str(thing.folder) and calls[1][2]["commit_message"] == "words"
    assert thing.options == {"safe_serialization": True, "max_shard_size": "5GB", "repo_id": "me/model"}
