"""Zstandard files: long windows, frames of all kinds, and files that are not whole."""

from __future__ import annotations

import gzip
import json
import random
import struct
from pathlib import Path

import pytest
import zstandard

from remit_megatron.data.readers import iter_documents
from remit_megatron.data.zstandard_stream import ZstandardStream
from remit_megatron.runtime.errors import UserError

RANDOM = random.Random(3)
TEXTS = ["".join(RANDOM.choices("abcdefghijklmnop ", k=RANDOM.randint(1, 3000))) for _ in range(400)]
DATA = b"".join(json.dumps({"text": text}).encode() + b"\n" for text in TEXTS)


def compressed(data: bytes, *, window_log: int = 0, checksum: bool = True) -> bytes:
    """One frame that does not say how long it is, as a pipe gives it: its window is then the one asked for."""
    settings = zstandard.ZstdCompressionParameters.from_level(1, window_log=window_log, write_checksum=checksum)
    stream = zstandard.ZstdCompressor(compression_params=settings).compressobj()
    return stream.compress(data) + stream.flush()


def skippable(data: bytes) -> bytes:
    return struct.pack("<II", 0x184D2A53, len(data)) + data


def texts(path: Path) -> list[str]:
    return [document.text for document in iter_documents([path])]


@pytest.mark.parametrize("window_log", [27, 28, 31])
def test_long_windows(tmp_path, window_log):
    path = tmp_path / "x.jsonl.zst"
    path.write_bytes(compressed(DATA, window_log=window_log))
    assert zstandard.get_frame_parameters(path.read_bytes()).window_size == 1 << window_log
    assert texts(path) == TEXTS


def test_a_window_that_nothing_reads(tmp_path):
    """Half a terabyte, as the header says it: nobody writes that, but nobody should have to guess either."""
    path = tmp_path / "x.jsonl.zst"
    path.write_bytes(b"\x28\xb5\x2f\xfd\x00" + bytes([29 << 3]) + b"\x01\x00\x00" * 10)
    with pytest.raises(UserError, match=r"a Zstandard window of over 2 GiB; compress it again with zstd --long=31"):
        texts(path)


def test_frames_of_all_kinds(tmp_path):
    """A frame a line, empty frames, skippable ones in all places, and the reads that cut them anywhere."""
    lines = DATA.splitlines(keepends=True)
    frames = [skippable(b"seek table"), compressed(b"", checksum=False)]
    for number, line in enumerate(lines):
        frames.append(compressed(line, window_log=28 if number % 50 == 0 else 0, checksum=number % 2 == 0))
        frames += [skippable(b"x" * number)] if number % 7 == 0 else []
    frames += [compressed(b""), skippable(b"")]
    path = tmp_path / "x.jsonl.zst"
    path.write_bytes(b"".join(frames))
    assert texts(path) == TEXTS


@pytest.mark.parametrize("piece", [1, 7, 100_000])
def test_reads_of_any_size(tmp_path, monkeypatch, piece):
    monkeypatch.setattr("remit_megatron.data.zstandard_stream._PIECE_BYTES", piece)
    path = tmp_path / "x.zst"
    path.write_bytes(skippable(b"abc") + compressed(DATA[:9000]) + compressed(DATA[9000:30000]))
    with open(path, "rb") as raw:
        assert ZstandardStream(raw).read() == DATA[:30000]


@pytest.mark.parametrize("suffix", ["zst", "zstd", "gz"])
def test_nothing_is_some_bytes_when_compressed(tmp_path, suffix):
    """A download that broke off before its first byte, which the programs gzip and zstd do not take for a file either;
    plain JSON lines may be empty."""
    path = tmp_path / f"x.jsonl.{suffix}"
    path.write_bytes(gzip.compress(b"") if suffix == "gz" else compressed(b""))
    assert texts(path) == []
    path.write_bytes(b"")
    with pytest.raises(UserError, match=r"cannot be read \(0 bytes, ") as caught:
        texts(path)
    assert caught.value.field == str(path)
    (tmp_path / "x.jsonl").write_bytes(b"")
    assert texts(tmp_path / "x.jsonl") == []


def test_files_that_are_not_whole(tmp_path):
    path = tmp_path / "x.jsonl.zst"
    first, second = compressed(DATA[:30000]), compressed(DATA[30000:], window_log=28)
    whole = first + second
    cuts = {1, 4, 10, len(first) - 1, len(first) + 1, len(first) + 6, len(whole) // 2, len(whole) - 1}
    for cut in sorted(cuts):
        path.write_bytes(whole[:cut])
        with pytest.raises(UserError, match="cannot be read") as caught:
            texts(path)
        assert caught.value.field == str(path) and "\n" not in str(caught.value)
    for damaged in (whole + b"behind", skippable(b"0123456789")[:-3], whole[: len(first)] + b"\0" * 64):
        path.write_bytes(damaged)
        with pytest.raises(UserError, match="cannot be read"):
            texts(path)
    path.write_bytes(whole)
    assert texts(path) == TEXTS


def test_a_dictionary_that_is_not_there_is_named(tmp_path):
    dictionary = zstandard.train_dictionary(2000, [b'{"text": "abc%d"}' % number for number in range(3000)])
    path = tmp_path / "x.jsonl.zst"
    path.write_bytes(zstandard.ZstdCompressor(dict_data=dictionary).compress(DATA))
    with pytest.raises(UserError, match="compressed with a dictionary, which is not in the file"):
        texts(path)
