"""Models are known by what is in their files."""

from __future__ import annotations

import shutil

import pytest

from remit_megatron.evaluation.models import find_models, forget_export, hugging_face_directory
from remit_megatron.runtime import checkpoints
from remit_megatron.runtime.errors import UserError


def test_the_digest_follows_the_contents(models, tmp_path):
    copied = tmp_path / "first"
    shutil.copytree(models["first"], copied)
    digests = [find_models([str(path)])[0].digest for path in (models["first"], copied, models["second"])]
    assert digests[0] == digests[1] != digests[2]
    (copied / "README.md").write_text("no part of it")
    assert find_models([str(copied)])[0].digest == digests[0]
    (copied / "generation_config.json").write_text("{}")
    assert find_models([str(copied)])[0].digest != digests[0]


def checkpoint(folder, content: str):
    folder.mkdir(parents=True)
    (folder / "weights").write_text(content)
    checkpoints.write_manifest(folder)
    return folder


def test_a_run_is_its_newest_whole_checkpoint(tmp_path):
    root = tmp_path / "run" / "checkpoints"
    checkpoint(root / "iter_0000010", "a")
    newest = checkpoint(root / "iter_0000020", "b")
    (root / "iter_0000030").mkdir()  # half a checkpoint
    (run,) = find_models([str(tmp_path / "run")])
    assert (run.name, run.path, run.checkpoint) == ("run", newest, True)
    named, other = find_models([f"best={root / 'iter_0000020'}", str(root / "iter_0000010")])
    assert (named.name, other.name) == ("best", "run-iter_0000010")
    assert named.digest == run.digest != other.digest


def test_the_folder_of_a_runs_checkpoints_is_the_run(tmp_path):
    root = tmp_path / "run" / "checkpoints"
    newest = checkpoint(root / "iter_0000020", "b")
    (found,) = find_models([str(root)])
    assert (found.name, found.path) == ("run", newest)


def test_an_export_that_is_being_removed_is_not_taken_for_one(models, tmp_path, monkeypatch):
    """Killed in between, the removal leaves files under a name that nobody looks for."""
    (model,) = find_models([str(checkpoint(tmp_path / "ckpt", "a"))])
    directory = tmp_path / "exported" / model.digest[:32]
    shutil.copytree(models["first"], directory)
    monkeypatch.setattr(shutil, "rmtree", lambda *args, **kwargs: None)  # it gets no further
    assert hugging_face_directory(model, tmp_path / "exported") == directory
    forget_export(model, tmp_path / "exported")
    assert not directory.exists()


def test_what_is_no_model_is_refused(models, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    for word, said in (("nowhere", "nowhere"), ("empty", "empty"), ("run", "without a complete checkpoint")):
        with pytest.raises(UserError, match=said):
            find_models([str(tmp_path / word)])
    with pytest.raises(UserError, match="NAME that can be a folder"):
        find_models([f"a/b={models['first']}"])


def test_a_checkpoint_that_cannot_be_exported_is_said_in_the_exports_words(tmp_path):
    (model,) = find_models([str(checkpoint(tmp_path / "ckpt", "nonsense"))])
    with pytest.raises(UserError, match="MODEL ckpt") as caught:
        hugging_face_directory(model, tmp_path / "exported")
    assert "Traceback" not in str(caught.value)
    assert not [path for path in (tmp_path / "exported").iterdir() if not path.name.startswith(".")]
