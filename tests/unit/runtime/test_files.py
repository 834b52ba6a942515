"""Digests that are taken while a file grows, and files that others replace."""

import errno
import hashlib
import os
import random
import shutil
from pathlib import Path

import pytest

from remit_megatron.runtime.files import (
    FollowingDigest,
    fsync_directory,
    read_whole,
    remove_tree,
    sha256_file,
    write_atomic,
)


@pytest.mark.parametrize("sizes", [[], [1], [5_000_000, 0, 3, 1 << 20, 7_654_321]])
def test_digest_of_a_file_that_grows(tmp_path, sizes):
    content = hashlib.sha256()
    with open(tmp_path / "file", "wb") as file, FollowingDigest(tmp_path / "file") as digest:
        for size in sizes:
            piece = random.Random(size).randbytes(size)
            content.update(piece)
            file.write(piece)
        file.flush()
        assert digest.hexdigest() == content.hexdigest() == sha256_file(tmp_path / "file")


def test_leaving_ends_the_thread_and_failures_are_told(tmp_path):
    (tmp_path / "file").write_bytes(b"some")
    with FollowingDigest(tmp_path / "file"):
        pass
    with pytest.raises(FileNotFoundError), FollowingDigest(tmp_path / "absent") as digest:
        digest.hexdigest()


def test_a_file_that_another_node_replaces_is_read_again(tmp_path, monkeypatch):
    """GlusterFS and NFS answer so where the file that had the name is gone."""
    path, original, answers = tmp_path / "file", Path.read_bytes, [errno.ESTALE, errno.ESTALE]
    path.write_bytes(b"new")

    def read_bytes(self: Path) -> bytes:
        if answers:
            number = answers.pop()
            raise OSError(number, os.strerror(number))
        return original(self)

    monkeypatch.setattr(Path, "read_bytes", read_bytes)
    assert read_whole(path) == b"new" and not answers
    answers.append(errno.EIO)
    with pytest.raises(OSError, match="Input/output error"):
        read_whole(path)


def failing(number: int):
    def call(*_, **__):
        raise OSError(number, os.strerror(number))

    return call


def test_a_file_system_that_syncs_no_directories(tmp_path, monkeypatch):
    original = os.fsync

    def fsync(descriptor: int) -> None:
        if not os.path.isfile(f"/proc/self/fd/{descriptor}"):
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        original(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    write_atomic(tmp_path / "file", b"some")
    assert (tmp_path / "file").read_bytes() == b"some"
    monkeypatch.setattr(os, "fsync", failing(errno.EIO))
    with pytest.raises(OSError, match="Input/output error"):
        fsync_directory(tmp_path)


def test_a_directory_of_which_something_is_open_over_nfs(tmp_path, monkeypatch, caplog):
    (tmp_path / "whole" / "part").mkdir(parents=True)
    assert remove_tree(tmp_path / "whole") and not os.listdir(tmp_path)
    monkeypatch.setattr(shutil, "rmtree", failing(errno.ENOTEMPTY))
    assert not remove_tree(tmp_path) and f"{tmp_path} cannot be removed to its end" in caplog.text
    monkeypatch.setattr(shutil, "rmtree", failing(errno.EACCES))
    with pytest.raises(PermissionError):
        remove_tree(tmp_path)
