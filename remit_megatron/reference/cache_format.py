"""What a score cache says about itself (manifest, data set records) and how it writes a score and a checksum.

``docs/score_cache.md`` describes every byte.
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from remit_megatron.runtime.errors import UserError, show
from remit_megatron.runtime.files import create_once, parse_json, read_whole

FORMAT = "remit-scores"
FORMAT_VERSION = 1
STEPS_PER_NAT = 2048
NOT_FINITE = 65535
DTYPES = {"uint16": np.dtype("<u2"), "float32": np.dtype("<f4")}

_IDENTITY_TYPES = {
    "reference": str,
    "tokenizer": str,
    "sequence_length": int,
    "packing_seed": int,
    "document_mask": bool,
    "eod_id": int | None,
}


@dataclass(frozen=True)
class CacheIdentity:
    """What decides a score besides the sample. Two caches with equal identities hold the same scores.

    Attributes:
        reference: hex digest of the reference's weights and configuration.
        tokenizer: `Tokenizer.digest`.
        sequence_length: tokens that a sample predicts, L.
        packing_seed: order in which documents are packed into samples.
        document_mask: whether attention stays within documents.
        eod_id: the end-of-document token; None where there is none.
    """

    reference: str
    tokenizer: str
    sequence_length: int
    packing_seed: int
    document_mask: bool
    eod_id: int | None

    def __post_init__(self) -> None:
        for name, expected in _IDENTITY_TYPES.items():
            value = getattr(self, name)
            if not isinstance(value, expected) or (isinstance(value, bool) and expected is not bool):
                raise ValueError(f"{name}: found {value!r}; expected {expected}")
        if self.sequence_length < 1:
            raise ValueError(f"sequence_length: found {self.sequence_length}; expected 1 or more")


class DatasetRecord(NamedTuple):
    """A declared data set: the name of its files, and how many samples it has."""

    name: str
    samples: int


def encode(losses: np.ndarray, dtype: str) -> bytes:
    """Scores as they are stored.

    Args:
        losses: float32 [L], nats.
        dtype: "uint16": round(2048 x loss) clipped to 0 ... 65534, and 65535 for what is not finite, so that losses of
            0 to 31.999 nats are off by 2^-12 at most. "float32": the number itself, NaN for what is not finite.
    """
    finite = np.isfinite(losses)
    if dtype == "float32":
        return np.where(finite, losses, np.float32(np.nan)).astype("<f4").tobytes()
    # The product is exact in float32 (a power of two), so this rounds once.
    codes = np.rint(np.where(finite, losses, np.float32(0)) * np.float32(STEPS_PER_NAT))
    codes = np.clip(codes, 0, NOT_FINITE - 1).astype("<u2")
    codes[~finite] = NOT_FINITE
    return codes.tobytes()


def decode(stored: bytes, dtype: str) -> np.ndarray:
    """Inverse of `encode`: float32 [L], NaN for what is not finite."""
    codes = np.frombuffer(stored, dtype=DTYPES[dtype])
    losses = codes.astype(np.float32)
    if dtype == "uint16":
        losses *= np.float32(1 / STEPS_PER_NAT)
        losses[codes == NOT_FINITE] = np.nan
    return losses


def as_stored(losses: np.ndarray, dtype: str) -> np.ndarray:
    """Losses, floating point [n], as a cache of ``dtype`` gives them back, float32 [n]."""
    return decode(encode(losses, dtype), dtype)


def token_hash(tokens: np.ndarray) -> bytes:
    """8 bytes of BLAKE2b over the tokens of a sample as little-endian 32-bit numbers."""
    return hashlib.blake2b(tokens.astype("<u4").tobytes(), digest_size=8).digest()


def checksum(dataset: bytes, sample: int, tokens: bytes, scores: bytes) -> bytes:
    """8 bytes of BLAKE2b over data set identity, number of the sample, hash of its tokens, and its scores."""
    digest = hashlib.blake2b(dataset, digest_size=8)
    digest.update(int(sample).to_bytes(8, "little"))
    digest.update(tokens)
    digest.update(scores)
    return digest.digest()


def write_all(descriptor: int, data: bytes, offset: int) -> None:
    """``pwrite`` of all of ``data``."""
    view = memoryview(data)
    while view:
        written = os.pwrite(descriptor, view, offset)
        view, offset = view[written:], offset + written


# Manifest and data set records.


def manifest_digest(identity: CacheIdentity, dtype: str) -> str:
    """Hex digest of everything that a manifest says; every other file of the cache carries it."""
    return _digest(_manifest_content(identity, dtype))


def create_manifest(path: Path, identity: CacheIdentity, dtype: str) -> None:
    """Writes the manifest unless there is one."""
    create_once(path, _text_writer(_manifest_content(identity, dtype)))


def read_manifest(path: Path) -> tuple[CacheIdentity, str]:
    """Identity and dtype of a cache.

    Raises:
        UserError: no manifest, of another version, or damaged.
    """
    try:
        content = _read_json(path)
    except FileNotFoundError:
        raise UserError(str(path), "no such file", "the manifest of a score cache, as `remit score` makes it") from None
    version = content.get("format"), content.get("format_version")
    if version != (FORMAT, FORMAT_VERSION):
        found = f"format {version[0]!r}, version {version[1]!r}"
        raise UserError(str(path), found, f"format {FORMAT!r}, version {FORMAT_VERSION}")
    _check_digest(path, content)
    try:
        identity, dtype = CacheIdentity(**content["identity"]), content["dtype"]
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(str(path), f"{type(error).__name__}: {error}", "the fields of a score cache") from None
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise UserError(f"{path} (dtype)", dtype, " or ".join(DTYPES))
    return identity, dtype


def create_dataset_record(path: Path, *, dataset: str, record: DatasetRecord, cache: str) -> None:
    """Writes the record of a data set unless there is one; ``cache`` is the `manifest_digest`."""
    create_once(path, _text_writer(_dataset_content(dataset, record, cache)))


def read_dataset_record(path: Path, *, dataset: str, cache: str) -> DatasetRecord | None:
    """The record of a data set, or None where there is none.

    Raises:
        UserError: damaged, or of another data set or cache.
    """
    try:
        content = _read_json(path)
    except (FileNotFoundError, NotADirectoryError):
        return None
    _check_digest(path, content)
    for field, expected in (("cache", cache), ("dataset", dataset)):
        if content.get(field) != expected:
            raise UserError(f"{path} ({field})", content.get(field), f"{expected}, of the cache and folder it is in")
    name, samples = content.get("name"), content.get("samples")
    if not isinstance(name, str) or type(samples) is not int or not 1 <= samples < 2**48:
        found = f"name {show(name)}, samples {show(samples)}"
        raise UserError(str(path), found, "the name of a data set and the number of its samples")
    return DatasetRecord(name, samples)


def _manifest_content(identity: CacheIdentity, dtype: str) -> dict[str, Any]:
    return {"format": FORMAT, "format_version": FORMAT_VERSION, "dtype": dtype, "identity": asdict(identity)}


def _dataset_content(dataset: str, record: DatasetRecord, cache: str) -> dict[str, Any]:
    return {"cache": cache, "dataset": dataset, "name": record.name, "samples": record.samples}


def _digest(content: dict[str, Any]) -> str:
    """SHA-256 of a JSON object without its field "digest", keys sorted, no spaces, ASCII."""
    content = {key: value for key, value in content.items() if key != "digest"}
    return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _text_writer(content: dict[str, Any]):
    data = (json.dumps({**content, "digest": _digest(content)}, indent=1) + "\n").encode()
    return lambda descriptor: write_all(descriptor, data, 0)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = parse_json(read_whole(path))
    except ValueError as error:
        expected = "a file in JSON; remove it, and filling the cache makes it again"
        raise UserError(str(path), f"a damaged file ({error})", expected) from None
    if not isinstance(content, dict):
        raise UserError(str(path), "a damaged file (no JSON object)", "an object in JSON")
    return content


def _check_digest(path: Path, content: dict[str, Any]) -> None:
    digest = _digest(content)
    if content.get("digest") != digest:
        found = f"a damaged file (its contents have the digest {digest})"
        expected = f"{content.get('digest')}, as it says itself; remove the file, and filling the cache makes it again"
        raise UserError(str(path), found, expected)
