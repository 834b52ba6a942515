"""Digests that are taken while a file grows, and files that others replace."""

import errno
import hashlib
import os
import random
from pathlib import Path

import pytest

from remit_megatron.runtime.files import FollowingDigest, read_whole, sha256_file


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
