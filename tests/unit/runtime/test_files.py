"""Digests that are taken while a file grows."""

import hashlib
import random

import pytest

from remit_megatron.runtime.files import FollowingDigest, sha256_file


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
