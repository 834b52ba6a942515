"""Documents to samples of fixed length, the same samples for ever.

The documents of a corpus are laid end to end in an order that depends on a packing seed alone, and the stream is cut
into samples of ``sequence_length + 1`` tokens: sample i covers tokens i * L ... i * L + L, so neighbors share one token
and every token but the first is predicted once. The rest that fills no sample is dropped.

What Megatron's GPT data set does differently: there, the order of documents follows the run's seed, several passes are
packed as one stream, and samples straddle their ends. Here sample i holds the same tokens whatever the run's seed,
length, parallel layout and blend are, so a score computed for it once is good for every run.

A data set of selected samples (`Manifest.sample_length`) is not laid end to end when it is read with the sequence
length that it was selected with: sample i is document i, L + 1 tokens.
"""

from __future__ import annotations

import hashlib
import logging
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from remit_megatron.data.indexed import IndexedTokens
from remit_megatron.data.manifest import Manifest, read_manifest
from remit_megatron.data.shuffle import keyed_order, stream_key
from remit_megatron.runtime.errors import UserError
from remit_megatron.runtime.files import fsync_directory

logger = logging.getLogger(__name__)

_PACKING_VERSION = 1  # part of every identity: a change of the rules above makes other samples


class PackedDataset:
    """Samples of one tokenized corpus: map-style, torch-free, safe to open in many processes and to pickle.

    The index holds 12 bytes a document (16 from 2^31 documents on): 600 MB for 50 million. With ``cache_dir`` it is
    written once and memory-mapped, so processes of one machine share it and only the touched pages are resident.
    Reading a sample is one binary search, and touches its own documents only.

    Args:
        prefix: data set as `remit data build` writes it, without an ending.
        sequence_length: tokens that a sample predicts, L.
        packing_seed: the order of documents; part of `identity`.
        cache_dir: folder for the index; None keeps it in memory.
        tokenizer_digest: `Tokenizer.digest` that the data must have been made with, or several of which one must fit
            (`Tokenizer.digests`); None does not check.
        verify: check the SHA-256 of the data and recompute the index; reads everything.

    Attributes:
        manifest: facts about the corpus.
        identity: hex digest of what decides the tokens of every sample: contents of the corpus, packing seed, sequence
            length and the packing rules. Not its name or place.

    Raises:
        UserError: the data set is missing, damaged, of another tokenizer, or too short for one sample.
    """

    def __init__(
        self,
        prefix: str | os.PathLike,
        *,
        sequence_length: int,
        packing_seed: int = 0,
        cache_dir: str | os.PathLike | None = None,
        tokenizer_digest: str | Sequence[str] | None = None,
        verify: bool = False,
    ):
        if sequence_length < 1:
            raise ValueError(f"sequence_length: found {sequence_length}; expected 1 or more")
        self.prefix = os.fspath(prefix)
        self.sequence_length, self.packing_seed = sequence_length, packing_seed
        self._cache_dir = None if cache_dir is None else Path(cache_dir)
        self.manifest: Manifest = read_manifest(self.prefix, verify=verify)
        check_corpus(self.prefix, self.manifest, sequence_length=sequence_length, tokenizer_digest=tokenizer_digest)
        self._documents = IndexedTokens(self.prefix)
        if len(self._documents) != self.manifest.documents:
            found = f"{len(self._documents)} documents in the index"
            raise UserError(self.prefix, found, f"{self.manifest.documents}, as the manifest says")
        self.identity = sample_identity(self.manifest, sequence_length=sequence_length, packing_seed=packing_seed)
        self._whole_samples = self.manifest.sample_length == sequence_length
        if self._whole_samples:
            self._check_whole_samples(verify=verify)
        else:
            if self.manifest.sample_length is not None:
                found = f"{self.prefix}: samples of sequence length {self.manifest.sample_length}, packed as texts"
                logger.warning("%s for %d: no token tells where one ends and the next begins", found, sequence_length)
            key = _digest(*_corpus(self.manifest, packing_seed))[:24]
            self._order, self._starts = self._index(key, verify=verify)

    def __len__(self) -> int:
        """Samples in one pass over the corpus."""
        if self._whole_samples:
            return self.manifest.documents
        return (self.manifest.tokens - 1) // self.sequence_length

    def __getitem__(self, sample: int) -> np.ndarray:
        """Tokens of one sample, int64 [sequence_length + 1]: a new array."""
        if not 0 <= sample < len(self):
            raise IndexError(f"sample {sample} of {len(self)}")
        if self._whole_samples:
            return self._documents.read(sample).astype(np.int64)
        begin = sample * self.sequence_length
        tokens = np.empty(self.sequence_length + 1, dtype=np.int64)
        place = int(np.searchsorted(self._starts, np.int64(begin), side="right")) - 1
        inside, filled = begin - int(self._starts[place]), 0
        while filled < len(tokens):
            document = self._document(place, inside)
            stop = min(inside + len(tokens) - filled, int(self._documents.lengths[document]))
            piece = self._documents.read(document, inside, stop)
            tokens[filled : filled + len(piece)] = piece
            filled += len(piece)
            place, inside = place + 1, 0
        return tokens

    def _document(self, place: int, inside: int) -> int:
        """The document at a place of the stream. What the index says of it, which may lie in a file for years, must fit
        the data: tokens of another place would be in range as well."""
        count = len(self._documents)
        document = int(self._order[place]) if 0 <= place < count else -1
        room = int(self._starts[place + 1]) - int(self._starts[place]) if document >= 0 else 0
        if not (0 <= document < count and 0 <= inside <= room == int(self._documents.lengths[document])):
            found = f"an index with {room} tokens for document {document}, read from {inside}"
            raise UserError(self.prefix, found, f"that of this data; remove packing-*.npy in {self._cache_dir}")
        return document

    @property
    def dropped_tokens(self) -> int:
        """Tokens at the end of the stream that no sample covers."""
        if self._whole_samples:
            return 0
        return self.manifest.tokens - 1 - len(self) * self.sequence_length

    def __getstate__(self) -> dict[str, Any]:
        # Pickled memory maps would travel as contents; another process opens the files itself.
        return {
            "prefix": self.prefix,
            "sequence_length": self.sequence_length,
            "packing_seed": self.packing_seed,
            "cache_dir": self._cache_dir,
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state.pop("prefix"), **state)

    def _check_whole_samples(self, *, verify: bool) -> None:
        """Every document has L + 1 tokens, as the manifest says; each length is looked at with ``verify`` only."""
        tokens, length = self.manifest.tokens, self.sequence_length + 1
        if tokens != self.manifest.documents * length or (verify and (self._documents.lengths != length).any()):
            found = f"{self.manifest.documents} documents of {tokens} tokens in all"
            raise UserError(self.prefix, found, f"documents of {length} tokens each, as sample_length says")

    def _index(self, key: str, *, verify: bool) -> tuple[np.ndarray, np.ndarray]:
        """Document numbers in their order [documents], and where each begins in the stream, int64 [documents + 1]."""
        if self._cache_dir is None:
            return self._compute_index()
        paths = [self._cache_dir / f"packing-{key}.{name}.npy" for name in ("order", "starts")]
        cached = self._load_index(*paths)
        if cached is None or (verify and not all(map(np.array_equal, cached, self._compute_index()))):
            logger.info("packing %s: indexing %d documents", self.prefix, self.manifest.documents)
            try:
                self._cache_dir.mkdir(parents=True, exist_ok=True)
                for path, array in zip(paths, self._compute_index(), strict=True):
                    _save_atomic(path, array)
            except OSError as error:
                found = f"{self._cache_dir} ({error.strerror})"
                raise UserError("data.cache_dir", found, "a folder with room for the index of the data") from None
            cached = self._load_index(*paths)
            assert cached is not None, paths
        return cached

    def _compute_index(self) -> tuple[np.ndarray, np.ndarray]:
        order = keyed_order(self.manifest.documents, key=stream_key("documents", self.packing_seed))
        starts = np.zeros(len(order) + 1, dtype=np.int64)
        np.cumsum(self._documents.lengths[order], dtype=np.int64, out=starts[1:])
        if starts[-1] != self.manifest.tokens:
            expected = f"{self.manifest.tokens}, as the manifest says"
            raise UserError(self.prefix, f"documents of {starts[-1]} tokens in all", expected)
        return order, starts

    def _load_index(self, order_path: Path, starts_path: Path) -> tuple[np.ndarray, np.ndarray] | None:
        """The cached index, or None where there is none that fits: it can always be computed again."""
        try:
            order, starts = (np.load(path, mmap_mode="r", allow_pickle=False) for path in (order_path, starts_path))
        except (OSError, ValueError, EOFError):
            return None
        count = self.manifest.documents
        if order.shape != (count,) or order.dtype.kind != "i" or starts.shape != (count + 1,):
            return None
        if starts.dtype != np.int64 or starts[0] != 0 or starts[-1] != self.manifest.tokens:
            return None
        return order, starts


def check_corpus(
    prefix: str, manifest: Manifest, *, sequence_length: int, tokenizer_digest: str | Sequence[str] | None
) -> None:
    """What of a corpus can be wrong for samples of this length, by its manifest alone.

    Args: as for `PackedDataset`.

    Raises:
        UserError: it is of another tokenizer, or too short for one sample.
    """
    accepted = (tokenizer_digest,) if isinstance(tokenizer_digest, str) else tokenizer_digest
    if accepted is not None and manifest.tokenizer_digest not in accepted:
        found = f"data of the tokenizer with digest {manifest.tokenizer_digest[:16]}"
        raise UserError(prefix, found, f"{accepted[0][:16]}, the tokenizer of this run")
    if manifest.tokens < sequence_length + 1:
        expected = f"at least {sequence_length + 1}, one sample (sequence length {sequence_length} and one)"
        raise UserError(prefix, f"{manifest.tokens} tokens in all", expected)


def sample_identity(manifest: Manifest, *, sequence_length: int, packing_seed: int) -> str:
    """`PackedDataset.identity` of the corpus with this manifest."""
    whole = ("whole samples",) if manifest.sample_length == sequence_length else ()
    return _digest(*_corpus(manifest, packing_seed), sequence_length, *whole)


def _corpus(manifest: Manifest, packing_seed: int) -> tuple[str | int, ...]:
    return ("packing", _PACKING_VERSION, manifest.bin.sha256, manifest.idx.sha256, packing_seed)


def _digest(*parts: str | int) -> str:
    return hashlib.sha256("\n".join(map(str, parts)).encode()).hexdigest()


def _save_atomic(path: Path, array: np.ndarray) -> None:
    # Ranks of several machines may do this at once on a shared file system, where process ids are not unique.
    descriptor, temporary = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
    try:
        with os.fdopen(descriptor, "wb") as file:
            np.save(file, array)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    fsync_directory(path.parent)
