from __future__ import annotations

from types import SimpleNamespace

import pytest

from scbin._errors import ScbinInputError, ScbinModelError
from scbin.io import directory
from scbin.io.directory import local_directory
from scbin.model import Model


@pytest.fixture
def asked(tmp_path, monkeypatch):
    """What was asked of the hub, of which nothing is in the cache before it was fetched."""
    calls, cached = [], set()

    def snapshot_download(repo_id, *, revision, allow_patterns, local_files_only=False):
        assert set(allow_patterns) >= {"config.json", "model.safetensors", "network.json", "manifest.json"}
        assert not any("*" in name or name.endswith((".py", ".bin")) for name in allow_patterns)
        if repo_id == "no/route" or (local_files_only and (repo_id, revision or "main") not in cached):
            raise OSError("no route to host")
        if not local_files_only:
            calls.append((repo_id, revision))
            cached.add((repo_id, revision))
        return str(tmp_path / "download")

    monkeypatch.setattr(directory, "snapshot_download", snapshot_download)
    monkeypatch.chdir(tmp_path)
    return calls


def test_it_is_asked_only_for_an_id_with_a_revision(asked, tmp_path):
    with pytest.raises(ScbinModelError, match=r"M01.*revision="):
        local_directory("owner/name")
    assert asked == []
    assert local_directory("owner/name", "main") == tmp_path / "download"
    assert asked == [("owner/name", "main")]
    assert local_directory("owner/name") == tmp_path / "download"  # from the cache
    assert len(asked) == 1
    (tmp_path / "owner" / "name").mkdir(parents=True)
    assert str(local_directory("owner/name")) == "owner/name"  # a path on this machine goes first
    (tmp_path / "owner" / "name").rename(tmp_path / "owner" / ".tmp-old-name")  # killed while it was replaced
    assert str(local_directory("owner/name")) == "owner/.tmp-old-name"
    wrong = ("owner/name", "a/b/c", "../name", tmp_path / "x" / "y")
    for path in wrong:
        with pytest.raises(ScbinInputError, match="A03"):
            local_directory(path, "main")
    with pytest.raises(ScbinModelError, match=r"M01.*no route"):
        local_directory("no/route", "main")


def test_a_folder_of_geneformer_is_fetched_with_the_dictionaries(tmp_path, monkeypatch):
    asked = {}
    monkeypatch.setattr(directory, "snapshot_download", lambda *a, **k: asked.update(k, id=a[0]) or str(tmp_path))
    name = "ctheodoris/Geneformer/Geneformer-V2-104M"
    assert local_directory(name, "0123abc", geneformer=True) == tmp_path / "Geneformer-V2-104M"
    files = ["Geneformer-V2-104M/config.json", "Geneformer-V2-104M/model.safetensors", "geneformer/*.pkl"]
    assert asked == {
        "id": "ctheodoris/Geneformer",
        "revision": "0123abc",
        "allow_patterns": files,
        "local_files_only": False,
    }
    for path in ("ctheodoris/Geneformer", "a/b/c/d", tmp_path):
        with pytest.raises(ScbinInputError, match="A03.*folder"):
            Model.from_geneformer(path, revision="main")


def test_a_model_is_pushed_as_it_is_saved(trained):
    """The upload goes to an api that may be any; what it gets is a directory that loads, with a card."""

    class Api:
        def create_repo(self, repo_id, **options):
            self.made = repo_id, options

        def upload_folder(self, *, repo_id, folder_path, commit_message):
            self.model, self.card = Model.load(folder_path), (folder_path / "README.md").read_text()
            return SimpleNamespace(oid="0123abc")

    api, model = Api(), trained[1]
    assert model.push_to_hub("me/mine", api=api) == "0123abc"
    assert api.made == ("me/mine", {"private": True, "exist_ok": True})
    assert api.model.fingerprint == model.fingerprint
    for text in ("| trained | on ", "| saved with | scbin ", "## How to use it", "- bert\n"):
        assert text in api.card
