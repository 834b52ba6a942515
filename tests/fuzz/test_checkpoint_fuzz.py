"""Manifests of checkpoints: whole, or called damaged; a search for the newest passes over a bad one."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from remit_megatron.conversion.source import resolve
from remit_megatron.runtime.checkpoints import (
    MANIFEST,
    DamagedCheckpoint,
    iteration_directory,
    newest_complete,
    read_manifest,
    verify,
    write_manifest,
)
from tests.fuzz.damage import REFUSED, altered, damaged, examples, handled

CONFIG = {"model_type": "llama", "vocab_size": 9}


@pytest.fixture(scope="module")
def pristine(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("checkpoints") / "root"
    for iteration in (1, 2):
        directory = iteration_directory(root, iteration)
        (directory / "hf").mkdir(parents=True)
        (directory / "hf" / "config.json").write_text(json.dumps(CONFIG))
        (directory / "__0_0.distcp").write_bytes(b"weights" * 9)
        write_manifest(directory, iteration=iteration, tokenizer="abc", consumed_train_samples=4)
    return root


def use(root: Path) -> int | None:
    """What a run, and every command that takes a checkpoint, does with the newest iteration's manifest."""
    newest = newest_complete(root)
    assert newest in (1, 2), "the older one is whole"
    directory = iteration_directory(root, 2)
    if handled(lambda: read_manifest(directory), DamagedCheckpoint) is REFUSED:
        assert newest == 1
    if handled(lambda: verify(directory), DamagedCheckpoint) is REFUSED:
        assert newest == 1
    assert resolve(root).hf_config == CONFIG
    source = handled(lambda: resolve(directory))
    return None if source is REFUSED else source.iteration


def copy_of(pristine: Path, folder: Path) -> tuple[Path, Path]:
    root = folder / "root"
    shutil.rmtree(root, ignore_errors=True)
    shutil.copytree(pristine, root)
    return root, iteration_directory(root, 2) / MANIFEST


def test_whole(pristine):
    assert newest_complete(pristine) == 2 and use(pristine) == 2


@examples(150)
@given(data=st.data())
def test_altered_manifest(pristine, tmp_path, data):
    root, manifest = copy_of(pristine, tmp_path)
    manifest.write_text(json.dumps(data.draw(altered(json.loads(manifest.read_text())))))
    use(root)


@examples(100)
@given(data=st.data())
def test_damaged_manifest(pristine, tmp_path, data):
    root, manifest = copy_of(pristine, tmp_path)
    manifest.write_bytes(data.draw(damaged(manifest.read_bytes())))
    use(root)
