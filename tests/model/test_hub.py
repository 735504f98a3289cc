"""Models by name from a hub on this machine: what is downloaded, what is kept, what goes wrong."""

import shutil

import pytest
from hub import commit_of, running_hub, use_hub

from vidlada.checkpoint.load import base_of, describe
from vidlada.errors import InputError, VidLaDAError
from vidlada.model.hub import is_hub_name, local_folder, model_folder, with_revision
from vidlada.training.origin import origin


@pytest.fixture
def hub(monkeypatch, tmp_path):
    with running_hub() as server:
        use_hub(monkeypatch, server.endpoint, tmp_path / "cache")
        yield server


FILES = {"config.json": b"{}", "tokenizer.json": b"{}", "model.safetensors": b"weights", "README.md": b"card",
         "pytorch_model.bin": b"pickles", "global_step7/model.safetensors": b"state"}  # fmt: skip


def test_a_snapshot_holds_what_a_model_needs(hub):
    hub.repositories["owner/name", "main"] = FILES
    folder = local_folder("owner/name")
    assert {path.name for path in folder.rglob("*")} == {"config.json", "tokenizer.json", "model.safetensors"}
    fetched = len(hub.fetched)
    assert local_folder("owner/name") == folder
    assert len(hub.fetched) == fetched  # nothing is fetched twice


def test_pickles_where_there_is_nothing_else(hub):
    hub.repositories["owner/name", "main"] = {"config.json": b"{}", "pytorch_model.bin": b"pickles"}
    assert (local_folder("owner/name") / "pytorch_model.bin").read_bytes() == b"pickles"


def test_revisions(hub):
    for revision in ("main", "v2"):
        hub.repositories["owner/name", revision] = {"model.safetensors": revision.encode()}
    assert (model_folder("owner/name") / "model.safetensors").read_text() == "main"
    for folder in (
        model_folder("owner/name@v2"),
        model_folder("owner/name", "v2"),
        local_folder(f"owner/name@{commit_of('v2')}"),
    ):
        assert (folder / "model.safetensors").read_text() == "v2"
    with pytest.raises(InputError, match="owner/name has no revision 'v3' at http://127.0.0.1"):
        local_folder("owner/name@v3")


def test_names_with_revisions(tmp_path):
    assert with_revision("owner/name", None) == "owner/name"
    assert with_revision("owner/name", "refs/pr/1") == "owner/name@refs/pr/1"
    with pytest.raises(InputError, match="names a revision already"):
        with_revision("owner/name@v1", "v2")
    for local in (str(tmp_path), "tiny"):
        with pytest.raises(InputError, match="no model of the hub"):
            with_revision(local, "v2")


NO_NAMES = ["", "nowhere", "a/b/c", "/a/b", "./a", "../b", "~/b", "a/b@", "a b/c", "a/b\0", "@", "a/@b"]


@pytest.mark.parametrize("name", NO_NAMES)
def test_what_is_no_name_of_the_hub(name):
    assert not is_hub_name(name)
    with pytest.raises(InputError, match="no such adapter folder, and no name of the hub"):
        local_folder(name, "adapter")


def test_a_folder_goes_first(hub, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "owner" / "name").mkdir(parents=True)
    assert str(local_folder("owner/name")) == "owner/name"
    assert not is_hub_name("owner/name")


def test_tokens_and_terms(hub, monkeypatch):
    hub.repositories["owner/name", "main"] = FILES
    hub.token = "secret"
    with pytest.raises(InputError, match="owner/name: no such model folder, and http.* keeps it private.*HF_TOKEN"):
        local_folder("owner/name")
    monkeypatch.setenv("HF_TOKEN", "secret")
    assert (local_folder("owner/name") / "config.json").is_file()
    hub.gated = True
    hub.repositories["owner/gated", "main"] = FILES
    with pytest.raises(VidLaDAError, match=f"accept its terms: do so at {hub.endpoint}/owner/gated, then log in"):
        local_folder("owner/gated")


def test_unknown_to_the_hub(hub):
    with pytest.raises(InputError, match="owner/other: no such model folder, and http://127.0.0.1.* has no such"):
        local_folder("owner/other")


def test_without_a_network(hub, monkeypatch, tmp_path):
    hub.repositories["owner/name", "main"] = FILES
    folder = local_folder("owner/name")
    use_hub(monkeypatch, "http://127.0.0.1:9", tmp_path / "cache")
    assert local_folder("owner/name") == folder  # what is complete is used
    with pytest.raises(VidLaDAError, match="owner/other: no such model folder, .* downloaded from http://127.0.0.1:9"):
        local_folder("owner/other")
    shutil.rmtree(folder.parents[1] / "blobs")
    with pytest.raises(VidLaDAError, match="could not be downloaded"):
        local_folder("owner/name")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(VidLaDAError, match="owner/other: .* HF_HUB_OFFLINE forbids"):
        local_folder("owner/other")


def test_a_run_may_start_from_the_model_in_the_package(tmp_path):
    assert origin("tiny") == model_folder("tiny") and describe(origin("tiny")).layout == "vidlada"
    (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": "tiny"}')
    assert base_of(tmp_path) == model_folder("tiny")
