"""``PREFIX.json``: what a tokenized data set is made of, written last, so that its presence means completeness."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from typing import Any

from remit_megatron.runtime.errors import UserError
from remit_megatron.runtime.files import parse_json, sha256_file, whole

FORMAT = "remit-data"
FORMAT_VERSION = 1
_DTYPES = {name: name for name in ("uint16", "int32")}


@dataclass(frozen=True)
class FileRecord:
    """Size in bytes and SHA-256 (hex) of one file."""

    size: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """Facts about one tokenized data set.

    Attributes:
        tokenizer_digest: `Tokenizer.digest` of the tokenizer that made the tokens.
        vocab_size: largest token id + 1 of that tokenizer.
        eod_id: the token after each document; None where none was appended.
        dtype: numpy name of the stored token type.
        documents, tokens: how many, tokens with the end-of-document tokens.
        skipped: bad lines that were counted and left out.
        bin, idx: the two files beside the manifest.
        inputs: file names that the text came from, in order, without folders.
        sample_length: None for text. L where every document is one sample of sequence length L, that is L + 1 tokens
            (`remit data select`): packing with this sequence length gives the documents, untouched and in their order.
        origin: what `remit data mix` built it from, so that it knows what is finished; None elsewhere.
        largest_id: of the stored tokens; None in data of older versions.
        special_tokens: ids that were put before and after each text, the end-of-document token not among them; None
            where nothing was.
    """

    tokenizer_digest: str
    vocab_size: int
    eod_id: int | None
    dtype: str
    documents: int
    tokens: int
    skipped: int
    bin: FileRecord
    idx: FileRecord
    inputs: tuple[str, ...]
    sample_length: int | None = None
    origin: dict[str, Any] | None = None
    largest_id: int | None = None
    special_tokens: tuple[tuple[int, ...], tuple[int, ...]] | None = None

    def to_json(self) -> str:
        """The text of the file."""
        content = {"format": FORMAT, "format_version": FORMAT_VERSION, **asdict(self)}
        for optional in ("sample_length", "origin", "largest_id", "special_tokens"):
            if content[optional] is None:
                del content[optional]
        return json.dumps(content, indent=1) + "\n"


def manifest_path(prefix: str | os.PathLike) -> str:
    """``PREFIX.json``."""
    return f"{os.fspath(prefix)}.json"


def read_manifest(prefix: str | os.PathLike, *, verify: bool = False) -> Manifest:
    """Reads the manifest of ``prefix`` and checks that the two data files have the sizes that it names.

    Args:
        verify: compare the SHA-256 of both files too; reads them whole.

    Raises:
        UserError: nothing at this prefix, a manifest missing or damaged, a file missing, short, long or changed.
    """
    prefix = os.fspath(prefix)
    path = manifest_path(prefix)
    try:
        with open(path, encoding="utf-8") as file:
            content = parse_json(file.read())
    except FileNotFoundError:
        parts = [part for part in (f"{prefix}.bin", f"{prefix}.idx") if os.path.exists(part)]
        found = (
            f"no {os.path.basename(path)} beside {' and '.join(map(os.path.basename, parts))}" if parts else "nothing"
        )
        expected = "PREFIX.json, PREFIX.bin and PREFIX.idx as `remit data build` writes them"
        raise UserError(prefix, found, expected) from None
    except (OSError, ValueError) as error:
        raise UserError(path, str(error), "a readable manifest in JSON") from None
    manifest = _parse(path, content)
    for name in ("bin", "idx"):
        _check_file(f"{prefix}.{name}", getattr(manifest, name), verify=verify)
    return manifest


def _parse(path: str, content: Any) -> Manifest:
    found = (content.get("format"), content.get("format_version")) if isinstance(content, dict) else None
    if found != (FORMAT, FORMAT_VERSION):
        text = f"format {found[0]!r}, version {found[1]!r}" if found else "no JSON object"
        raise UserError(path, text, f"format {FORMAT!r}, version {FORMAT_VERSION}")
    try:
        return Manifest(
            tokenizer_digest=str(content["tokenizer_digest"]),
            vocab_size=whole(content["vocab_size"]),
            eod_id=None if content["eod_id"] is None else whole(content["eod_id"]),
            dtype=_DTYPES[content["dtype"]],
            documents=whole(content["documents"]),
            tokens=whole(content["tokens"]),
            skipped=whole(content["skipped"]),
            bin=FileRecord(size=whole(content["bin"]["size"]), sha256=str(content["bin"]["sha256"])),
            idx=FileRecord(size=whole(content["idx"]["size"]), sha256=str(content["idx"]["sha256"])),
            inputs=tuple(map(str, content["inputs"])),
            sample_length=None if content.get("sample_length") is None else whole(content["sample_length"]),
            origin=None if content.get("origin") is None else dict(content["origin"]),
            largest_id=None if content.get("largest_id") is None else whole(content["largest_id"]),
            special_tokens=_sides(content.get("special_tokens")),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(path, f"a damaged manifest ({type(error).__name__}: {error})", "all fields") from None


def _sides(content: Any) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
    if content is None:
        return None
    before, after = (tuple(map(whole, ids)) for ids in content)
    return before, after


def _check_file(path: str, record: FileRecord, *, verify: bool) -> None:
    try:
        size = os.path.getsize(path)
    except OSError as error:
        raise UserError(path, error.strerror, f"a file of {record.size} bytes, as the manifest says") from None
    if size != record.size:
        raise UserError(path, f"{size} bytes", f"{record.size} bytes, as the manifest says")
    if verify and (digest := sha256_file(path)) != record.sha256:
        raise UserError(path, f"contents with SHA-256 {digest}", f"{record.sha256}, as the manifest says")
