"""Files of a data set on the Hugging Face hub, read over the network where they lie, without copies on disk."""

from __future__ import annotations

import fnmatch
import glob
import io
from collections.abc import Callable
from typing import Any, BinaryIO, cast

from remit_megatron.data.inputs import BESIDE_DATA, KNOWN_SUFFIXES, fits
from remit_megatron.data.recipe import HubPlace
from remit_megatron.runtime.errors import UserError

_PLACE_PARTS = 3  # datasets/owner/name comes before the path inside the data set


class HubFiles:
    """The data files of one place on the hub; a `readers.FileStore`.

    Listing happens here, once; opening a file reads it in blocks as they are needed.

    Args:
        place: data set, files in it, and revision.
        filesystem: an fsspec file system with the hub's paths; None connects to the hub. The token, the cache and
            offline mode are those of ``huggingface_hub``.

    Raises:
        UserError: the data set cannot be listed, or an entry of ``place.files`` means no data file.
    """

    def __init__(self, place: HubPlace, *, filesystem: Any = None):
        if filesystem is None:
            import huggingface_hub

            filesystem = huggingface_hub.HfFileSystem()
        self._filesystem = filesystem
        self._paths: dict[str, tuple[str, int]] = {}
        revision = "" if place.revision is None else "@" + place.revision.replace("/", "%2F")
        root = f"datasets/{place.name}{revision}"
        for item in place.files:
            item = "" if item == "." else item.removeprefix("./")
            found = self._list(f"{root}/{_before_pattern(item)}".rstrip("/"), str(place))
            matching = {file: entry for file, entry in found.items() if _means(item, file)}
            if not matching:
                expected = f"files ending in {', '.join(KNOWN_SUFFIXES)}"
                raise UserError(f"hub {place.name}", f"no data file at {item or 'any place'}", expected)
            self._paths |= matching

    @property
    def files(self) -> list[str]:
        """Paths inside the data set, sorted."""
        return sorted(self._paths)

    def open(self, file: str) -> BinaryIO:
        stream = _with_os_errors(lambda: self._filesystem.open(self._paths[file][0], "rb"))
        return cast(BinaryIO, io.BufferedReader(_RemoteFile(stream), 1 << 20))

    def size(self, file: str) -> int:
        return self._paths[file][1]

    def _list(self, path: str, place: str) -> dict[str, tuple[str, int]]:
        try:
            found = _with_os_errors(lambda: self._filesystem.find(path, detail=True))
        except OSError as error:
            expected = "a data set that can be reached; or its files below --root"
            raise UserError(f"hub {place}", _first_line(error), expected) from None
        return {
            full.split("/", _PLACE_PARTS)[_PLACE_PARTS]: (full, int(entry["size"]))
            for full, entry in found.items()
            if full.endswith(KNOWN_SUFFIXES) and full.rsplit("/", 1)[-1] not in BESIDE_DATA
        }


class _RemoteFile(io.RawIOBase):
    """Gives every failure of the network as an OSError, which is what readers expect of files."""

    def __init__(self, stream: Any):
        self._stream = stream

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = _with_os_errors(lambda: self._stream.read(len(buffer)))
        buffer[: len(data)] = data
        return len(data)

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        return self._stream.seek(offset, whence)

    def tell(self) -> int:
        return self._stream.tell()

    def close(self) -> None:
        self._stream.close()
        super().close()


def _with_os_errors[T](action: Callable[[], T]) -> T:
    try:
        return action()
    except OSError:
        raise
    except Exception as error:  # the HTTP library's own, which is not ours to know
        raise OSError(f"{type(error).__name__}: {_first_line(error)}") from error


def _before_pattern(item: str) -> str:
    """The folders of ``item`` before the first that is a pattern."""
    parts = item.split("/")
    plain = next((number for number, part in enumerate(parts) if glob.has_magic(part)), len(parts))
    return "/".join(parts[:plain])


def _means(item: str, file: str) -> bool:
    """Whether an entry means a file, by the rules for files of this machine (`inputs.expand_inputs`): ``*`` stops at a
    folder's end, folders that match are read with all below them, hidden ones are not."""
    pattern, names = item.split("/"), file.split("/")
    if not item:  # the whole data set
        pattern = []
    if names[: len(pattern)] == pattern:  # a name, whatever signs are in it
        return not any(map(_hidden, names[len(pattern) :]))
    fixed = pattern.index("**") if "**" in pattern else len(pattern)
    if len(names) < fixed or not all(map(_matches, names, pattern[:fixed])):
        return False
    below = names[fixed:]
    return not any(map(_hidden, below)) and (fixed == len(pattern) or fits(below, pattern[fixed:]))


def _matches(name: str, pattern: str) -> bool:
    return fnmatch.fnmatchcase(name, pattern) and (not _hidden(name) or _hidden(pattern))


def _hidden(name: str) -> bool:
    return name.startswith(".")


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), "") or type(error).__name__
