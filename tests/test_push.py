"""Upload to a Hub that is not there: what is refused before any work, and how to go on after a failed upload."""

import json
import os
import shutil
import sys
from pathlib import Path

import pytest

from biote import cli, convert, export, push
from biote.files import WEIGHTS

ADDRESS = "https://huggingface.co/me/tiny"


class Hub:
    """Remembers what was asked of it; `failing` is the request that it answers with an error."""

    def __init__(self):
        self.asked, self.failing = [], None

    def answer(self, request, *details):
        self.asked.append((request, *details))
        if request == self.failing:
            raise RuntimeError("403 Forbidden:\nyou may not")  # whatever the HTTP library raises

    def create_repo(self, repo_id, exist_ok):
        self.answer("create", repo_id, exist_ok)
        return ADDRESS

    def upload_folder(self, repo_id, folder_path):
        self.answer("upload", repo_id, Path(folder_path))


@pytest.fixture
def hub(monkeypatch):
    made = Hub()
    monkeypatch.setattr(push, "HfApi", lambda: made)
    monkeypatch.setattr(push, "get_token", lambda: "hf_secret")
    return made


@pytest.fixture
def biote(monkeypatch, capsys):
    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["biote", *map(str, arguments)])
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        captured = capsys.readouterr()
        return stopped.value.code or 0, captured.out, captured.err

    return call


@pytest.fixture(scope="module")
def exported(tmp_path_factory, tiny_original):
    folder = tmp_path_factory.mktemp("exported")
    shutil.copytree(tiny_original, folder / "source", ignore=shutil.ignore_patterns("golden*"))
    export.export(str(folder / "source"), folder / "out")
    return folder / "out"


@pytest.fixture
def folder(exported, tmp_path):
    """A copy of an exported folder that a test may damage."""
    return Path(shutil.copytree(exported, tmp_path / "folder"))


def test_export_opens_the_repository_before_the_work_and_uploads_after_it(
    biote, hub, tiny_original, tmp_path, monkeypatch
):
    work = export.convert_into
    monkeypatch.setattr(
        export, "convert_into", lambda *given, **more: (hub.asked.append("work"), work(*given, **more))
    )
    status, out, _ = biote("export", tiny_original, tmp_path / "out", "--push", "me/tiny")
    assert status == 0
    assert hub.asked == [("create", "me/tiny", True), "work", ("upload", "me/tiny", tmp_path / "out")]
    assert out.endswith(f"wrote {tmp_path / 'out'}\nuploaded to {ADDRESS}\n")
    assert 'from_pretrained("me/tiny", trust_remote_code=True)' in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parametrize("name", ["a/b/c", "", "a b/c", "../x", "https://huggingface.co/a/b", "x" * 200])
def test_a_bad_name_is_found_out_before_any_work(biote, hub, tiny_original, folder, tmp_path, monkeypatch, name):
    monkeypatch.setattr(export, "locate", lambda *_: pytest.fail("this may download for an hour"))
    for command in (["export", tiny_original, tmp_path / "out", "--push", name], ["push", folder, name]):
        status, _, error = biote(*command)
        assert (status, error.count("\n")) == (1, 1)
        assert error.startswith("error: Repo id must ")
    assert hub.asked == []
    assert not (tmp_path / "out").exists()


def test_a_missing_token_is_found_out_before_any_work(biote, hub, tiny_original, folder, tmp_path, monkeypatch):
    monkeypatch.setattr(push, "get_token", lambda: None)
    monkeypatch.setattr(export, "locate", lambda *_: pytest.fail("this may download for an hour"))
    for command in (["export", tiny_original, tmp_path / "out", "--push", "me/tiny"], ["push", folder, "me/tiny"]):
        status, _, error = biote(*command)
        assert (status, error) == (
            1, "error: no token to upload to me/tiny with: run `hf auth login` or set HF_TOKEN\n",
        )  # fmt: skip
    assert hub.asked == []


def test_a_repository_that_may_not_be_written_to(biote, hub, tiny_original, folder, tmp_path, monkeypatch):
    hub.failing = "create"
    monkeypatch.setattr(export, "convert_into", lambda *_, **__: pytest.fail("no work before the repository is there"))
    for command in (["export", tiny_original, tmp_path / "out", "--push", "me/tiny"], ["push", folder, "me/tiny"]):
        status, _, error = biote(*command)
        reason = "403 Forbidden: you may not"
        assert (status, error) == (1, f"error: the Hub has no repository me/tiny to upload to: {reason}\n")
    assert not (tmp_path / "out").exists()


def test_a_source_that_is_no_checkpoint_makes_no_repository(biote, hub, tmp_path):
    (tmp_path / "empty").mkdir()
    assert biote("export", tmp_path / "empty", tmp_path / "out", "--push", "me/tiny")[0] == 1
    assert hub.asked == []


def test_after_a_failed_upload_push_goes_on(biote, hub, tiny_original, tmp_path):
    hub.failing = "upload"
    destination = tmp_path / "my model"
    status, _, error = biote("export", tiny_original, destination, "--push", "me/tiny")
    command = f"biote push '{destination}' me/tiny"
    assert status == 1
    said = f"error: {destination} is whole but not uploaded, try again with `{command}`: 403 Forbidden: you may not"
    assert error.splitlines()[-1] == said
    assert command in biote("push", destination, "me/tiny")[2]  # fails in the same way
    hub.failing, hub.asked = None, []
    assert biote("push", destination, "me/tiny") == (0, f"uploaded to {ADDRESS}\n", "")
    assert hub.asked == [("create", "me/tiny", True), ("upload", "me/tiny", destination)]


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def test_push_names_the_repository_in_the_card(biote, hub, folder):
    before = files_of(folder)
    assert b'from_pretrained("YOUR_NAME/source"' in before["README.md"]
    assert biote("push", folder, "me/tiny")[0] == 0
    after = files_of(folder)
    assert b'from_pretrained("me/tiny"' in after["README.md"]
    assert b"YOUR_NAME" not in after["README.md"]
    assert after | {"README.md": b""} == before | {"README.md": b""}


def without_code(folder):
    config = json.loads((folder / "config.json").read_text())
    del config["auto_map"]
    (folder / "config.json").write_text(json.dumps(config))


NO_EXPORTS = {
    "no folder": (shutil.rmtree, "config.json does not exist"),
    "no config": (lambda folder: (folder / "config.json").unlink(), "config.json does not exist"),
    "no code": (without_code, "is not an exported folder: its config.json has no auto_map"),
    "no weights": (lambda folder: (folder / WEIGHTS).unlink(), "holds neither"),
    "half the weights": (lambda folder: os.truncate(folder / WEIGHTS, 2000), "is truncated"),
    "no card": (lambda folder: (folder / "README.md").unlink(), "README.md does not exist"),
}


@pytest.mark.parametrize("name", NO_EXPORTS)
def test_push_refuses_what_is_no_export(biote, hub, folder, name):
    damage, message = NO_EXPORTS[name]
    damage(folder)
    status, out, error = biote("push", folder, "me/tiny")
    assert (status, out, error.count("\n")) == (1, "", 1)
    assert message in error
    assert hub.asked == []


def test_a_conversion_is_no_export(biote, hub, tiny_original, tmp_path):
    """It has the code that it needs, but nothing that says what it is and that it was verified."""
    convert.convert_folder(tiny_original, tmp_path / "te", "te")
    assert "README.md does not exist" in biote("push", tmp_path / "te", "me/tiny")[2]
    assert hub.asked == []
