"""What a save that failed says of itself, and which manifests are none."""

from __future__ import annotations

import errno
import json

import pytest
from torch.distributed.checkpoint.api import CheckpointException, _wrap_exception

from remit_megatron.runtime.checkpoints import (
    MANIFEST,
    DamagedCheckpoint,
    iteration_directory,
    newest_complete,
    read_manifest,
    write_error,
    write_manifest,
)


def failed(error: Exception) -> CheckpointException:
    """As torch raises it on all ranks."""
    try:
        raise RuntimeError(f"Worker failure: {error}") from error
    except RuntimeError as caught:
        return CheckpointException("write", {1: _wrap_exception(caught)})


def test_an_error_of_the_file_system_is_one_again():
    found = write_error(failed(OSError(errno.ENOSPC, "No space left on device", "iter_0000004/__0_0.distcp")), "runs/a")
    assert isinstance(found, OSError) and found.errno == errno.ENOSPC
    assert (found.strerror, found.filename) == ("No space left on device", "runs/a")


def test_any_other_is_said_in_one_line():
    found = write_error(failed(ValueError("no such tensor")), "runs/a")
    assert isinstance(found, RuntimeError)
    assert str(found) == "saving into runs/a: RuntimeError: Worker failure: no such tensor"


@pytest.mark.parametrize("name", ["a" * 300, "/etc/hostname", "../outside", "hf//config.json", "", "\ud800", "a\0b"])
def test_a_manifest_of_files_that_cannot_be_below_it_is_damaged(name, tmp_path):
    """An older checkpoint is taken then: a name that is too long must not end the search with an error."""
    for iteration in (1, 2):
        directory = iteration_directory(tmp_path, iteration)
        directory.mkdir()
        write_manifest(directory, iteration=iteration)
    files = {name: {"size": 1, "sha256": "0"}}
    (directory / MANIFEST).write_text(json.dumps({"version": 1, "files": files, "properties": {"iteration": 2}}))
    with pytest.raises(DamagedCheckpoint, match=r"below a directory|surrogates"):
        read_manifest(directory)
    assert newest_complete(tmp_path) == 1
