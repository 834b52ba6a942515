"""Which files are meant by what a command was given: files, patterns, folders, and Hugging Face data sets on disk."""

from __future__ import annotations

import fnmatch
import glob
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO, NoReturn, Protocol

from remit_megatron.data.input_notes import splits
from remit_megatron.runtime.errors import UserError
from remit_megatron.runtime.files import parse_json

LINE_SUFFIXES = (".jsonl", ".ndjson", ".json")
KNOWN_SUFFIXES = (
    *(suffix + packed for suffix in LINE_SUFFIXES for packed in ("", ".gz", ".zst", ".zstd")),
    ".parquet",
    ".arrow",
)


# Beside data, and none of it: `load_dataset` leaves these names out of a folder, too.
BESIDE_DATA = frozenset(("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "config.json"))
# Where a table keeps which of its files count; rows that were changed or removed are still in the others.
_LOGS_OF_TABLES = {"_delta_log": "Delta Lake", ".hoodie": "Hudi"}


class FileStore(Protocol):
    """Where files are read from."""

    def open(self, file: str) -> BinaryIO:
        """The file's bytes, seekable. Errors of reading are OSErrors."""
        ...

    def size(self, file: str) -> int:
        """Its bytes, as stored."""
        ...


class LocalFiles:
    """The file system of this machine."""

    def open(self, file: str) -> BinaryIO:
        return open(file, "rb")

    def size(self, file: str) -> int:
        return os.path.getsize(file)


LOCAL_FILES = LocalFiles()


def expand_inputs(inputs: Sequence[str | os.PathLike], *, left_out: list[str] | None = None) -> list[str]:
    """Files behind ``inputs``, in a fixed order: files, glob patterns, directories of such files, and directories that
    ``datasets.Dataset.save_to_disk`` wrote.

    Of a directory, and of the directories that a pattern without ``**`` matches, all folders below are read, also those
    behind symbolic links, and each of them once: a link that leads back is no loop. Hidden files and folders are not,
    nor what `datasets` keeps beside its data: descriptions, and results of ``map`` in its cache.

    Args:
        left_out: receives a line for each input of which something was left out: files with another ending, and links
            to folders that are read under another name; and for one that mixes data for training and for tests.

    Raises:
        UserError: something does not exist, matches nothing, cannot be listed, or has an ending that nothing reads; or
            a folder whose files are not all meant, as of a table with a log.
    """
    notes: list[str] = []
    files: list[str] = []
    for item in (os.fspath(item) for item in inputs):
        before = len(files)
        if os.path.isdir(item):
            files += _files_of_directories([item], item, notes)
        elif os.path.exists(item):
            files.append(item)
        elif glob.has_magic(item):
            matches = _matches(item, notes)
            if not matches:
                raise UserError("--input", f"pattern {item}, which matches no file", "at least one file")
            folders = [match for match in matches if os.path.isdir(match)]
            plain = [match for match in matches if not os.path.isdir(match)]
            taken = {_place(file) for file in plain}  # a link in a folder may lead back to where the pattern looks
            below = _files_of_directories(folders, item, notes)
            files += [*plain, *(file for file in below if not plain or _place(file) not in taken)]
        elif os.path.islink(item):
            _refuse_broken_link(item)
        else:
            raise UserError("--input", f"{item}, which does not exist", "a file, a pattern or a directory")
        if len(files) == before:
            raise UserError("--input", f"{item} without data files", f"files ending in {', '.join(KNOWN_SUFFIXES)}")
        if not os.path.isfile(item):
            notes += splits(item, files[before:])
    for file in files:
        if not file.endswith(KNOWN_SUFFIXES):
            raise UserError("--input", file, f"a file ending in {', '.join(KNOWN_SUFFIXES)}")
    if not files:  # there was no item
        raise UserError("--input", "no file", "at least one file")
    if left_out is not None:
        left_out += notes
    return files


def is_there(item: str) -> bool:
    """Whether a file, a directory or a pattern means anything."""
    return os.path.lexists(item) or bool(_matches(item, []))


def _matches(pattern: str, notes: list[str]) -> list[str]:
    """Files and folders that a pattern matches, sorted; with ``**``, which enters folders by itself, files only."""
    parts = pattern.split("/")
    if "**" in parts:
        # Not by the glob module: it goes through a link that leads back forty times, through two for ever.
        start = parts.index("**")
        before = "/".join(parts[:start])
        tops = sorted(glob.glob(before)) if before else ["/" if pattern.startswith("/") else "."]
        matches = [path for top in tops if os.path.isdir(top) for path in _below(top, parts[start:], notes)]
        return sorted(path.removeprefix("./") for path in matches) if tops == ["."] else sorted(matches)
    found = sorted(glob.glob(pattern))
    for path in found:
        if not os.path.exists(path):
            _refuse_broken_link(path)
    return [path for path in found if os.path.isfile(path) or os.path.isdir(path)]


def _below(top: str, pattern: Sequence[str], notes: list[str]) -> Iterator[str]:
    again: list[Path] = []
    for path in _walk([Path(top)], again):
        if fits(path.relative_to(top).parts, pattern):
            if path.is_file():
                yield os.path.join(top, path.relative_to(top))
            elif path.is_symlink():
                _refuse_broken_link(path)
    _note_links(top, again, notes)


def fits(names: Sequence[str], pattern: Sequence[str]) -> bool:
    """Whether a path fits a pattern, both in parts; ``**`` stands for any number of folders."""
    if not pattern or (not names and pattern[0] != "**"):
        return not names and not pattern
    if pattern[0] == "**":
        rest = pattern[1:]
        return not rest or any(fits(names[skipped:], rest) for skipped in range(len(names)))
    return fnmatch.fnmatchcase(names[0], pattern[0]) and fits(names[1:], pattern[1:])


def _refuse_broken_link(path: str | os.PathLike) -> NoReturn:
    target = os.readlink(path) if os.path.islink(path) else "nowhere"
    found = f"{os.fspath(path)}, a link to {target}, which cannot be followed"
    raise UserError("--input", found, "a link to a file that is there")


def _files_of_directories(directories: Sequence[str], item: str, notes: list[str]) -> list[str]:
    """Data files of what ``item`` means: the folder of that name, or those that match it."""
    saved = {directory: _files_of_data_set(Path(directory)) for directory in directories}
    files = [file for found in saved.values() if found for file in found]
    plain = [Path(directory) for directory, found in saved.items() if found is None]
    again: list[Path] = []
    others, odd = [], []
    data_sets = _DataSets()
    for path in sorted(_walk(plain, again, check=_refuse_table)):
        if not path.name.endswith(KNOWN_SUFFIXES):
            others.append(path)
        elif not data_sets.has(path):
            data_sets.left_out.append(path)
        elif path.is_file():
            files.append(str(path))
        elif path.is_symlink():
            _refuse_broken_link(path)
        else:
            odd.append(path)
    data_sets.check_complete(files)
    if data_sets.left_out:
        count, example = len(data_sets.left_out), data_sets.left_out[0]
        notes.append(f"{item}: passed over {_counted(count, 'file')} beside a data set's own, such as {example}")
    if odd:
        notes.append(
            f"{item}: passed over {_counted(len(odd), 'pipe or device', 'pipes or devices')}, such as {odd[0]}"
        )
    if others:
        notes.append(f"{item}: passed over {_counted(len(others), 'file')} for the ending, such as {others[0]}")
    _note_links(item, again, notes)
    return files


class _DataSets:
    """Folders of the library `datasets` below an input: those of its cache, and those that ``save_to_disk`` wrote.

    Attributes:
        left_out: for whoever asks, to collect what is not of them.
    """

    def __init__(self) -> None:
        self.left_out: list[Path] = []
        self._listed: dict[Path, list[str] | None] = {}

    def has(self, path: Path) -> bool:
        """Whether a file is data, and not a description of it or something that was computed from it."""
        if path.name in BESIDE_DATA:
            return False
        folder = path.parent
        if not (folder / "dataset_info.json").exists():
            return True
        if folder not in self._listed:
            self._listed[folder] = _files_of_data_set(folder)
        listed = self._listed[folder]
        return not fnmatch.fnmatchcase(path.name, "cache-*.arrow") if listed is None else str(path) in listed

    def check_complete(self, files: Sequence[str]) -> None:
        """Refuses a data set of which a file is not among ``files``."""
        there = set(files)
        for folder, listed in self._listed.items():
            for file in listed or ():
                if file not in there:
                    found = f"no {os.path.basename(file)}, which state.json names"
                    raise UserError(str(folder), found, "a whole data set written by save_to_disk")


def _refuse_table(place: str, folders: Sequence[str]) -> None:
    """Refuses a folder of which a log says what is in it: its files hold rows that are no longer meant."""
    found = next((f"{place}, a {kind} table" for name, kind in _LOGS_OF_TABLES.items() if name in folders), None)
    if "metadata" in folders and glob.glob(os.path.join(glob.escape(place), "metadata", "*.metadata.json")):
        found = f"{place}, an Iceberg table"
    if "_temporary" in folders:
        raise UserError("--input", f"{place}, the output of a Spark job that has not ended", "one without _temporary")
    if found:
        expected = "files written from the table, or a pattern for those that are meant"
        raise UserError("--input", f"{found}: its log decides which files count", expected)


def _files_of_data_set(root: Path) -> list[str] | None:
    """Files that ``save_to_disk`` wrote; None for any other folder."""
    if (root / "dataset_dict.json").exists():
        try:
            splits = parse_json((root / "dataset_dict.json").read_bytes())["splits"]
            example, names = root / splits[0], ", ".join(splits)
        except (ValueError, LookupError, TypeError) as error:
            found = f"dataset_dict.json without a list of splits ({type(error).__name__}: {error})"
            raise UserError(str(root), found, "data sets written by save_to_disk") from None
        raise UserError("--input", f"{root} with splits {names}", f"one split, as {example}")
    if (root / "state.json").exists():
        try:
            state = parse_json((root / "state.json").read_bytes())
            files = [str(root / item["filename"]) for item in state["_data_files"]]
            chosen = state.get("_indices_data_files")
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            found = f"state.json without a list of data files ({type(error).__name__}: {error})"
            raise UserError(str(root), found, "a data set written by save_to_disk") from None
        if chosen:
            found = "rows with a choice and order of their own beside them (_indices_data_files in state.json)"
            raise UserError(str(root), found, "one that a later `datasets` has saved, which has no such choice")
        return files
    return None


def _note_links(item: str, again: Sequence[Path], notes: list[str]) -> None:
    if again:
        links = _counted(len(again), "link")
        notes.append(f"{item}: passed over {links} to a folder that is read already, such as {again[0]}")


def _walk(
    roots: Sequence[Path], again: list[Path], *, check: Callable[[str, Sequence[str]], None] | None = None
) -> Iterator[Path]:
    """Everything below ``roots`` that is no folder and not hidden; each folder once, by its own name before a link's.

    Args:
        again: receives the links to folders that were there already.
        check: called with each folder and the names of those in it, hidden ones too.
    """
    entered: set[tuple[int, int]] = set()
    pending = [*roots]
    for top in pending:  # grows behind: links are followed when all that needs no link has been read
        if _identity(top) in entered:
            again.append(top)
            continue
        for place, folders, names in os.walk(top, onerror=_refuse_unlisted):
            entered.add(_identity(place))
            if check is not None:
                check(place, folders)
            visible = sorted(name for name in folders if not name.startswith("."))
            links = [name for name in visible if os.path.islink(os.path.join(place, name))]
            pending += [Path(place, name) for name in links]
            folders[:] = [name for name in visible if _identity(os.path.join(place, name)) not in entered]
            yield from (Path(place, name) for name in names if not name.startswith("."))


def _place(file: str) -> tuple[str, str]:
    """A file whatever links lead to its folder; a link to a file is a file of its own."""
    folder, name = os.path.split(file)
    return os.path.realpath(folder), name


def _identity(folder: str | os.PathLike) -> tuple[int, int]:
    try:
        status = os.stat(folder)
    except OSError as error:
        _refuse_unlisted(error)
    return status.st_dev, status.st_ino


def _refuse_unlisted(error: OSError) -> NoReturn:
    raise UserError("--input", f"{error.filename}, which cannot be listed ({error.strerror})", "a folder to read")


def _counted(number: int, what: str, several: str | None = None) -> str:
    return f"{number} {what if number == 1 else several or f'{what}s'}"
