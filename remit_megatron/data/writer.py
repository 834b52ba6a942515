"""Writes the three files of a data set so that they are complete or absent.

Tokens go to ``.NAME.bin.tmp`` beside the target, which is locked for as long as its writer lives. The index and the
manifest get temporary names too; everything is synced; then the three are renamed, the manifest last. What a killed
writer left under temporary names is removed by the next writer of the same prefix. A kill between the renames leaves
the temporary manifest, which is how the next writer knows that the files without a manifest are leftovers.
"""

from __future__ import annotations

import errno
import hashlib
import os
from array import array
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from remit_megatron.data.blend_file import is_blend_file
from remit_megatron.data.indexed import write_index
from remit_megatron.data.manifest import FileRecord, Manifest, manifest_path, read_manifest
from remit_megatron.runtime.errors import UserError
from remit_megatron.runtime.files import fsync_directory
from remit_megatron.runtime.locks import keep_out

_EXPECTED = "a prefix of its own for each build"
_OUT_OF_SPACE = {errno.ENOSPC: "no space left", errno.EDQUOT: "quota exceeded", errno.EFBIG: "file size limit reached"}


class DatasetWriter:
    """Takes documents and makes ``PREFIX.bin``, ``PREFIX.idx`` and ``PREFIX.json`` of them; a context manager that
    leaves nothing behind unless `commit` was reached.

    Args:
        prefix: path of the files without their endings; missing folders are created.
        dtype: type of the stored tokens.
        overwrite: replace a data set that is there already, once the new one is complete.

    Raises:
        UserError: the output exists, another process is writing it, or the folder cannot be written to.
    """

    def __init__(self, prefix: str | os.PathLike, *, dtype: np.dtype, overwrite: bool = False):
        self.prefix = os.fspath(prefix)
        if not os.path.basename(self.prefix) or os.path.isdir(self.prefix):
            raise UserError("--output", f"the folder {self.prefix}", "a folder and a name, as data/corpus")
        if is_blend_file(self.prefix):
            raise UserError("--output", self.prefix, "a prefix that does not end as a blend file does (.yaml, .yml)")
        self._dtype = dtype
        self._folder = Path(self.prefix).parent
        self._final = {kind: Path(f"{self.prefix}.{kind}") for kind in ("bin", "idx", "json")}
        self._temporary = {kind: path.with_name(f".{path.name}.tmp") for kind, path in self._final.items()}
        self._renamed: list[Path] = []
        self._done = False
        self._digest = hashlib.sha256()
        self._lengths = array("i")
        self._size, self._largest_id = 0, -1
        with self._explained():
            self._folder.mkdir(parents=True, exist_ok=True)
            self._data = self._locked_file()
        try:
            with self._explained():
                self._clear_leftovers()
            self._check_existing(overwrite)
            with self._explained():
                self._data.truncate(0)
        except BaseException:
            self._abort()
            raise

    def __enter__(self) -> DatasetWriter:
        return self

    def __exit__(self, *_: object) -> None:
        if not self._done:
            self._abort()

    @property
    def documents(self) -> int:
        """Documents so far."""
        return len(self._lengths)

    @property
    def tokens(self) -> int:
        """Tokens so far."""
        return self._size // self._dtype.itemsize

    def append(self, tokens: np.ndarray, lengths: np.ndarray) -> None:
        """Adds documents of ``lengths`` (int32 [documents]) whose ``tokens`` (dtype [all of them]) lie end to end."""
        assert tokens.dtype == self._dtype and len(tokens) == lengths.sum(), (tokens.dtype, len(tokens))
        data = tokens.tobytes()
        with self._explained():
            self._data.write(data)
        self._digest.update(data)
        self._size += len(data)
        if len(tokens):
            self._largest_id = max(self._largest_id, int(tokens.max()))
        self._lengths.frombytes(lengths.astype(np.int32).tobytes())

    def commit(
        self,
        *,
        tokenizer_digest: str,
        vocab_size: int,
        eod_id: int | None,
        skipped: int,
        inputs: tuple[str, ...],
        sample_length: int | None = None,
        origin: dict[str, Any] | None = None,
        special_tokens: tuple[tuple[int, ...], tuple[int, ...]] | None = None,
    ) -> Manifest:
        """Completes the data set; the arguments are fields of `Manifest`."""
        with self._explained():
            self._data.flush()
            os.fsync(self._data.fileno())
            self._check_is_alone()
            with open(self._temporary["idx"], "wb") as file:
                lengths = np.frombuffer(self._lengths, dtype=np.int32)
                index_size, index_digest = write_index(file, lengths, dtype=self._dtype)
                _sync(file)
            manifest = Manifest(
                tokenizer_digest=tokenizer_digest,
                vocab_size=vocab_size,
                eod_id=eod_id,
                dtype=self._dtype.name,
                documents=self.documents,
                tokens=self.tokens,
                skipped=skipped,
                bin=FileRecord(self._size, self._digest.hexdigest()),
                idx=FileRecord(index_size, index_digest),
                inputs=inputs,
                sample_length=sample_length,
                origin=origin,
                largest_id=self._largest_id,
                special_tokens=special_tokens,
            )
            with open(self._temporary["json"], "wb") as file:
                file.write(manifest.to_json().encode())
                _sync(file)
            fsync_directory(self._folder)
            self._check_is_alone()
            self._final["json"].unlink(missing_ok=True)  # from here the old data set is no longer whole
            fsync_directory(self._folder)
            for kind in ("bin", "idx", "json"):
                self._renamed.append(self._final[kind])
                os.replace(self._temporary[kind], self._final[kind])
                fsync_directory(self._folder)
            self._done = True
        self._data.close()
        return manifest

    def _locked_file(self) -> BinaryIO:
        """A new file under the temporary name. Never the one of a writer before: where locks do not reach other
        machines that may live on one of them, and must find its file gone, not another's tokens in it."""
        path = self._temporary["bin"]
        while True:
            new = True
            try:
                descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
            except FileExistsError:
                new = False
                try:
                    descriptor = os.open(path, os.O_RDWR)
                except FileNotFoundError:
                    continue
            file = os.fdopen(descriptor, "r+b")
            if not keep_out(file, what=self.prefix, second="build of it"):
                file.close()
                raise UserError("--output", f"{self.prefix}, which another process is writing", _EXPECTED)
            # The writer before may have renamed or removed the file between the opening and the lock.
            if self._has_name(file):
                if new:
                    return file
                path.unlink(missing_ok=True)
            file.close()

    def _has_name(self, file: BinaryIO) -> bool:
        """Whether the temporary name is this file's. It is opened for that: a question for its attributes alone a
        client of NFS answers by itself."""
        try:
            with open(self._temporary["bin"], "rb") as there:
                return os.path.samestat(os.fstat(there.fileno()), os.fstat(file.fileno()))
        except OSError as error:
            if error.errno not in (errno.ENOENT, errno.ESTALE):
                raise
            return False

    def _check_is_alone(self) -> None:
        """Also by size: to sshfs all files that ever had a name are one."""
        if not self._has_name(self._data) or os.stat(self._temporary["bin"]).st_size != self._size:
            raise UserError("--output", f"{self.prefix}, which another process has begun to write", _EXPECTED)

    def _clear_leftovers(self) -> None:
        self._temporary["idx"].unlink(missing_ok=True)
        if self._temporary["json"].exists():
            if not self._final["json"].exists():
                self._final["bin"].unlink(missing_ok=True)
                self._final["idx"].unlink(missing_ok=True)
            self._temporary["json"].unlink()

    def _check_existing(self, overwrite: bool) -> None:
        existing = [path for path in self._final.values() if path.exists()]
        if existing and not overwrite:
            raise UserError("--output", f"{existing[0]}, which exists", "another prefix, or --overwrite")
        if self._final["json"].exists():
            try:
                read_manifest(self.prefix)
            except UserError as error:
                # A damaged data set may be replaced; somebody's own JSON file of that name may not.
                if error.field == manifest_path(self.prefix):
                    expected = "another prefix: --overwrite replaces data sets only"
                    raise UserError("--output", f"{self._final['json']}, which is no manifest", expected) from None

    def _abort(self) -> None:
        # Removing comes before closing: closing gives up the lock, and then the names may be another writer's.
        ours = bool(self._renamed) or self._has_name(self._data)
        for path in (*self._renamed, *(self._temporary.values() if ours else ())):
            path.unlink(missing_ok=True)
        with suppress(OSError):  # what is still in the buffer may not fit on the disk
            self._data.close()

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            reason = _OUT_OF_SPACE.get(error.errno or 0, error.strerror or str(error))
            found = f"{reason} in {self._folder} after {self._size} bytes of tokens"
            raise UserError("--output", found, "a folder with room to write; nothing was left behind") from None


def _sync(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())
