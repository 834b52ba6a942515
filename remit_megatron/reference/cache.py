"""A score cache: the reference's loss of every token of every sample, computed once and read by every later run.

Scores are named by what they are scores of, data set identity (`PackedDataset.identity`) and number of the sample, and
guarded by a hash of the sample's tokens. So parallel layout, batch sizes, blend weights, order and resume point may all
change. What does decide a score, the `CacheIdentity`, is in the manifest, and a difference is refused.

    DIRECTORY/manifest.json                           format, identity, dtype
    DIRECTORY/IDENTITY OF A DATA SET/dataset.json     its name and number of samples
    DIRECTORY/IDENTITY OF A DATA SET/00000000.scores  a shard: 256 MiB of scores

Any number of processes on any number of hosts may read and write one cache at once. Every score is checked when it is
read; one that is damaged, or was being written when its writer was killed, counts as missing. Needs numpy only.
"""

from __future__ import annotations

import logging
import os
import re
import resource
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np

from remit_megatron.reference.cache_format import (
    DTYPES,
    CacheIdentity,
    DatasetRecord,
    create_dataset_record,
    create_manifest,
    decode,
    encode,
    manifest_digest,
    read_dataset_record,
    read_manifest,
    token_hash,
)
from remit_megatron.reference.cache_shard import Shard, ShardKey, samples_per_shard
from remit_megatron.runtime.errors import UserError
from remit_megatron.runtime.files import fsync_file

__all__ = ["CacheIdentity", "DatasetRecord", "ReferenceCache"]

logger = logging.getLogger(__name__)


def _open_shards() -> int:
    """How many shards one object may have open: 1,024, or an eighth of the files that the process may open, if that is
    less (one that is written takes two), and never below 64."""
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return 1024 if limit == resource.RLIM_INFINITY else min(max(limit // 8, 64), 1024)


class ReferenceCache:
    """Reads and writes one score cache; made by `open`.

    Picklable: another process opens the files itself. May be used in forked data loader workers. Not for several
    threads at once. Memory does not depend on the size of the cache. At most 1,024 shards are open, fewer where the
    limit of open files is below 8,192.

    Attributes:
        directory: where it is.
        identity, dtype: as the manifest has them.
        damaged: samples that this object found damaged and reported as missing.
    """

    directory: Path
    identity: CacheIdentity
    dtype: str

    def __init__(self, directory: str | os.PathLike):
        """Opens a cache that exists, as it is; `open` compares it with what is wanted."""
        self.directory = Path(directory)
        self.identity, self.dtype = read_manifest(self.directory / "manifest.json")
        self._digest = manifest_digest(self.identity, self.dtype)
        self._per_shard = samples_per_shard(self.identity.sequence_length, self.dtype)
        self._records: dict[str, DatasetRecord] = {}
        self._shards: OrderedDict[tuple[str, int], Shard] = OrderedDict()  # open, the one used last at the end
        self._most_open = _open_shards()
        self._unsynced: set[Path] = set()  # closed shards with something written that is not durable yet
        self._damaged: set[tuple[str, int]] = set()

    @classmethod
    def open(
        cls,
        directory: str | os.PathLike,
        *,
        identity: CacheIdentity | None = None,
        dtype: str | None = None,
        create: bool = False,
    ) -> ReferenceCache:
        """Opens a cache.

        Args:
            directory: its folder.
            identity: what the cache must have been made with; None takes it as it is.
            dtype: how scores must be stored, "uint16" or "float32"; None takes it as it is, and makes "uint16".
            create: make it where there is none. Several processes may do so at once. Needs ``identity``.

        Raises:
            UserError: there is none, it is damaged, or it was made with something else; both values are named.
        """
        if dtype is not None and dtype not in DTYPES:
            raise UserError("reference.dtype", dtype, " or ".join(DTYPES))
        if create:
            if identity is None:
                raise ValueError("identity: found None; expected an identity with create=True")
            with _explained(Path(directory)):
                Path(directory).mkdir(parents=True, exist_ok=True)
                create_manifest(Path(directory) / "manifest.json", identity, dtype or "uint16")
        cache = cls(directory)
        cache._check(identity, dtype)
        return cache

    def add_dataset(self, dataset: str, *, samples: int, name: str) -> None:
        """Declares a data set; nothing happens if it has been declared.

        Args:
            dataset: `PackedDataset.identity`.
            samples: number of its samples.
            name: of its files, without endings; for people, and to notice when a text has changed.

        Raises:
            UserError: a data set of this name has been declared with another identity, so its text has changed.
        """
        _check_dataset_id(dataset)
        if samples < 1:
            raise ValueError(f"samples: found {samples}; expected 1 or more")
        for other, record in self.datasets().items():
            if record.name == name and other != dataset:
                expected = f"{other}, as in {self.directory}: the text changed, or it is another data set of this name"
                raise UserError(f"data set {name}", f"identity {dataset}", expected)
        path = self.directory / dataset / "dataset.json"
        with _explained(self.directory):
            path.parent.mkdir(exist_ok=True)
            create_dataset_record(path, dataset=dataset, record=DatasetRecord(name, samples), cache=self._digest)
        found = self._record(dataset)
        assert found is not None, path
        if found.samples != samples:
            raise UserError(str(path), f"{found.samples} samples", f"{samples}, as data set {name} has")

    def datasets(self) -> dict[str, DatasetRecord]:
        """The declared data sets by their identities, as the folder has them now.

        Raises:
            UserError: a record is damaged.
        """
        names = sorted(entry.name for entry in os.scandir(self.directory) if _DATASET_ID.fullmatch(entry.name))
        records = {name: self._record(name) for name in names}
        return {name: record for name, record in records.items() if record is not None}

    def read(self, dataset: str, sample: int, tokens: np.ndarray) -> np.ndarray | None:
        """The scores of a sample.

        Args:
            dataset: identity of its data set.
            sample: its number.
            tokens: its tokens, int64 [L + 1].

        Returns:
            Losses (-log p) in nats, float32 [L], NaN where the score is not finite. None: not scored yet (also where
            the data set has not been declared), or damaged, of which a warning is logged once per sample.

        Raises:
            UserError: the score is of other tokens than ``tokens``, or the shard is damaged as a whole.
        """
        self._check_tokens(tokens)
        stored = self._stored(dataset, sample)
        if stored is None:
            return None
        if (found := token_hash(tokens)) != stored[0]:
            expected = f"{stored[0].hex()}, the hash of the tokens that were scored: the text or its packing changed"
            raise UserError(f"{self._place(dataset, sample)}", f"tokens with hash {found.hex()}", expected)
        return decode(stored[1], self.dtype)

    def read_scores(self, dataset: str, sample: int) -> np.ndarray | None:
        """As `read`, without the comparison of tokens."""
        stored = self._stored(dataset, sample)
        return None if stored is None else decode(stored[1], self.dtype)

    def write(self, dataset: str, sample: int, tokens: np.ndarray, losses: np.ndarray) -> None:
        """Stores the scores of a sample, in place of what was there.

        Several processes may write at once, but two that write different scores of one sample at the same moment may
        leave it damaged, that is missing.

        Args:
            dataset: identity of a declared data set.
            sample: its number.
            tokens: its tokens, int64 [L + 1].
            losses: nats, floating point [L]. With dtype "uint16" they are rounded to 1/2048 and clipped to 0 ...
                31.999; what is not finite is stored as such.

        Raises:
            UserError: the disk is full, or the shard is damaged.
        """
        self._check_tokens(tokens)
        if tokens.min() < 0 or tokens.max() >> 32:
            raise ValueError(f"tokens: found {tokens.min()} to {tokens.max()}; expected 0 or more, below 2^32")
        losses = np.asarray(losses, dtype=np.float32)
        if losses.shape != (self.identity.sequence_length,):
            raise ValueError(f"losses: found shape {losses.shape}; expected ({self.identity.sequence_length},)")
        with _explained(self.directory):
            shard = self._shard(dataset, sample, create=True)
            if shard is None:
                raise ValueError(f"dataset: found {dataset}, which is not declared; expected add_dataset before write")
            shard.write(sample, token_hash(tokens), encode(losses, self.dtype))

    def completeness(self, dataset: str, samples: np.ndarray | None = None) -> np.ndarray:
        """Which samples have been scored, from the completeness maps alone.

        A damaged score counts as complete here until it is read.

        Args:
            dataset: identity of a declared data set.
            samples: integers [n], the samples in question; only their shards are looked at. None: all.

        Returns:
            bool [n], or bool [samples of the data set].

        Raises:
            UserError: the data set has not been declared, or a shard is damaged as a whole.
        """
        record = self._record(dataset)
        if record is None:
            known = ", ".join(other.name for other in self.datasets().values()) or "none"
            raise UserError(str(self.directory), f"no data set {dataset}", f"one that was scored (it has {known})")
        if samples is None:
            return self._table(dataset, record, range(-(-record.samples // self._per_shard)))
        places = samples // self._per_shard
        shards = np.unique(places).tolist()
        if len(samples) * len(shards) > record.samples:  # then one look-up in a map of all costs less
            return self._table(dataset, record, shards)[samples]
        complete = np.zeros(len(samples), dtype=bool)
        for index in shards:
            shard = self._shard(dataset, index * self._per_shard)
            if shard is not None:
                members = places == index
                complete[members] = shard.completeness()[samples[members] - shard.key.first]
        return complete

    def _table(self, dataset: str, record: DatasetRecord, shards: Iterable[int]) -> np.ndarray:
        """bool [samples of the data set]: what is complete in some of its shards."""
        complete = np.zeros(record.samples, dtype=bool)
        for index in shards:
            shard = self._shard(dataset, index * self._per_shard)
            if shard is not None:
                complete[shard.key.first : shard.key.first + shard.key.count] = shard.completeness()
        return complete

    def intact(self, dataset: str) -> np.ndarray:
        """As `completeness`, and with a right checksum: bool [samples]. Reads all scores.

        Raises:
            UserError: as `completeness`.
        """
        intact = self.completeness(dataset)
        for sample in np.flatnonzero(intact).tolist():
            intact[sample] = self._stored(dataset, sample) is not None
        return intact

    def forget(self, dataset: str, sample: int) -> None:
        """Marks a sample as not scored, so that whatever fills the cache scores it again."""
        with _explained(self.directory):
            shard = self._shard(dataset, sample)
            if shard is not None:
                shard.forget(sample)

    def forget_damaged(self, dataset: str, sample: int) -> bool:
        """`forget`, if what the cache has of the sample is damaged.

        Returns:
            True if it was. False: the cache has nothing of it, or by now a good score.

        Raises:
            UserError: the cache cannot be written, or the shard is damaged as a whole.
        """
        shard = self._shard(dataset, sample)
        if shard is None or shard.read(sample) is not True:
            return False
        self.forget(dataset, sample)
        return True

    @property
    def damaged(self) -> int:
        """Samples found damaged so far."""
        return len(self._damaged)

    def flush(self) -> None:
        """Makes durable what was written, and visible to other hosts (NFS holds writes back until then)."""
        with _explained(self.directory):
            for shard in self._shards.values():
                shard.flush()
            while self._unsynced:
                path = next(iter(self._unsynced))
                with suppress(FileNotFoundError):  # somebody removed it, and its scores with it
                    fsync_file(path)
                self._unsynced.remove(path)

    def close(self, *, sync: bool = True) -> None:
        """Flushes and closes the files, all of them also where that fails. The object may be used again.

        Args:
            sync: False leaves out the flush.

        Raises:
            UserError: something that was written could not be made durable.
        """
        with _explained(self.directory), ExitStack() as files:
            for shard in self._shards.values():
                files.callback(shard.close)
            files.callback(self._shards.clear)
            if sync:
                self.flush()

    def __enter__(self) -> ReferenceCache:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __getstate__(self) -> dict[str, Any]:
        return {"directory": self.directory, "identity": self.identity, "dtype": self.dtype}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["directory"])
        self._check(state["identity"], state["dtype"])

    def _check(self, identity: CacheIdentity | None, dtype: str | None) -> None:
        pairs = []
        if identity is not None:
            pairs = [(name, getattr(self.identity, name), value) for name, value in vars(identity).items()]
        if dtype is not None:
            pairs.append(("dtype", self.dtype, dtype))
        for name, found, expected in pairs:
            if found != expected:
                raise UserError(f"{self.directory} ({name})", found, f"{expected}, as this run has it")

    def _check_tokens(self, tokens: np.ndarray) -> None:
        expected = (self.identity.sequence_length + 1,)
        if tokens.shape != expected or tokens.dtype.kind not in "iu":
            raise ValueError(f"tokens: found {tokens.dtype} {tokens.shape}; expected integers {expected}")

    def _place(self, dataset: str, sample: int) -> str:
        record = self._records.get(dataset)
        return f"{self.directory}, sample {sample} of {dataset if record is None else record.name}"

    def _record(self, dataset: str) -> DatasetRecord | None:
        if dataset not in self._records:
            path = self.directory / dataset / "dataset.json"
            record = read_dataset_record(path, dataset=dataset, cache=self._digest)
            if record is None:
                return None
            self._records[dataset] = record
        return self._records[dataset]

    def _shard(self, dataset: str, sample: int, *, create: bool = False) -> Shard | None:
        """The open shard of a sample; None where there is none, or no such data set."""
        place = (dataset, sample // self._per_shard)
        shard = self._shards.get(place)
        if shard is None:
            _check_dataset_id(dataset)
        record = self._record(dataset)
        if record is None:
            return None
        if not 0 <= sample < record.samples:
            raise IndexError(f"sample {sample} of {record.samples} in data set {record.name}")
        if shard is None:
            shard = self._open_shard(place, record, create=create)
            if shard is None:
                return None
            self._shards[place] = shard
            while len(self._shards) > self._most_open:
                self._put_away(self._shards.popitem(last=False)[1])
        self._shards.move_to_end(place)
        return shard

    def _put_away(self, shard: Shard) -> None:
        """Closes a shard. What it has unsynced waits for `flush`: a sync of the file by another descriptor does."""
        if shard.unsynced:
            self._unsynced.add(shard.path)
        with _explained(self.directory):
            shard.close()

    def _open_shard(self, place: tuple[str, int], record: DatasetRecord, *, create: bool) -> Shard | None:
        dataset, index = place
        path = self.directory / dataset / f"{index:08d}.scores"
        key = ShardKey(
            cache=self._digest,
            dataset=dataset,
            index=index,
            samples=record.samples,
            sequence_length=self.identity.sequence_length,
            dtype=self.dtype,
        )
        try:
            return Shard(path, key)
        except FileNotFoundError:
            return Shard.create(path, key) if create else None

    def _stored(self, dataset: str, sample: int) -> tuple[bytes, bytes] | None:
        shard = self._shard(dataset, sample)
        if shard is None:
            return None
        stored = shard.read(sample)
        if not isinstance(stored, bool):
            return stored
        if stored and (dataset, sample) not in self._damaged:
            self._damaged.add((dataset, sample))
            logger.warning("%s: damaged (its checksum differs), so it counts as missing", self._place(dataset, sample))
        return None


_DATASET_ID = re.compile(r"[0-9a-f]{64}")


def _check_dataset_id(dataset: str) -> None:
    if not _DATASET_ID.fullmatch(dataset):
        raise ValueError(f"dataset: found {dataset!r}; expected 64 hexadecimal digits, as PackedDataset.identity")


@contextmanager
def _explained(directory: Path) -> Iterator[None]:
    """What somebody can mend, as a `UserError`."""
    try:
        yield
    except OSError as error:
        found = f"{error.strerror or error}" + (f" ({error.filename})" if error.filename else "")
        raise UserError(str(directory), found, "a folder with room to write scores to") from None
