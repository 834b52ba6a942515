"""Chunks of records to token ids, in this process or in several, always in the order of the input."""

from __future__ import annotations

import os
import time
from bisect import bisect_left
from collections.abc import Generator, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import chain

import numpy as np

from remit_megatron.data.readers import BadRecord, Chunk, TextFormat, parse_chunk
from remit_megatron.data.tokenizer import Tokenizer, load_tokenizer
from remit_megatron.data.workers import WorkerDied, map_in_processes
from remit_megatron.runtime.errors import UserError


@dataclass(frozen=True)
class EncodeSettings:
    """What a worker needs to know; travels to it once.

    Attributes:
        tokenizer: path for `load_tokenizer`.
        text_key, template: as for `TextFormat`.
        eod_id: appended to each document; None for nothing.
        dtype: numpy name of the token type to return.
        stop_at_bad: leave the rest of a chunk after its first bad record.
        before, after: ids put around each text, ``after`` in front of ``eod_id``.
    """

    tokenizer: str
    text_key: str
    template: str | None
    eod_id: int | None
    dtype: str
    stop_at_bad: bool
    before: tuple[int, ...] = ()
    after: tuple[int, ...] = ()


@dataclass(frozen=True)
class BadLine:
    """A record without text: its line or row, both halves of the message, and how many good documents of its chunk
    come before it."""

    number: int
    found: str
    expected: str
    documents_before: int


@dataclass(frozen=True)
class EncodedChunk:
    """The documents of one chunk.

    Attributes:
        file, end: as in `Chunk`.
        tokens: all documents end to end, `EncodeSettings.dtype` [sum of lengths].
        lengths: int32 [documents].
        bad: in order of their numbers.
    """

    file: str
    end: int
    tokens: np.ndarray
    lengths: np.ndarray
    bad: list[BadLine]


class Encoder:
    """Encodes chunks in this process."""

    def __init__(self, settings: EncodeSettings, tokenizer: Tokenizer | None = None):
        self._settings = settings
        self._tokenizer = tokenizer or load_tokenizer(settings.tokenizer)
        self._format = TextFormat(text_key=settings.text_key, template=settings.template)

    def __call__(self, chunk: Chunk) -> EncodedChunk:
        settings = self._settings
        numbers, texts, bad = [], [], []
        for number, text in parse_chunk(chunk, self._format):
            if not isinstance(text, BadRecord):
                numbers.append(number)
                texts.append(text)
                continue
            bad.append((number, text))
            if settings.stop_at_bad:
                break
        documents = []
        for number, ids in zip(numbers, self._tokenizer.encode_each(texts), strict=True):
            if ids:
                documents.append((number, ids))
            elif ids is None:
                bad.append((number, BadRecord("text that the tokenizer has no ids for", "text that it encodes")))
            else:  # a normalizer may leave nothing of a text of spaces
                bad.append((number, BadRecord("text that gives no token", "text that gives at least one")))
        bad.sort(key=lambda item: item[0])
        if bad and settings.stop_at_bad:
            del bad[1:]
            documents = [item for item in documents if item[0] < bad[0][0]]
        return self._result(chunk, documents, bad)

    def _result(
        self, chunk: Chunk, documents: list[tuple[int, list[int]]], bad: list[tuple[int, BadRecord]]
    ) -> EncodedChunk:
        numbers = [number for number, _ in documents]
        begin, end = self._settings.before, self._settings.after
        end += () if self._settings.eod_id is None else (self._settings.eod_id,)
        around = len(begin) + len(end)
        lengths = np.fromiter((len(ids) + around for _, ids in documents), dtype=np.int32, count=len(documents))
        stream = chain.from_iterable(chain(begin, ids, end) for _, ids in documents)
        tokens = np.fromiter(stream, dtype=self._settings.dtype, count=int(lengths.sum(dtype=np.int64)))
        lines = [BadLine(number, text.found, text.expected, bisect_left(numbers, number)) for number, text in bad]
        return EncodedChunk(chunk.file, chunk.end, tokens, lengths, lines)


@contextmanager
def _single_threaded_tokenizer() -> Iterator[None]:
    """In this process and in those started meanwhile: they share the cores already."""
    before = os.environ.get("TOKENIZERS_PARALLELISM")
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    try:
        yield
    finally:
        if before is None:
            del os.environ["TOKENIZERS_PARALLELISM"]
        else:
            os.environ["TOKENIZERS_PARALLELISM"] = before


def encode_chunks(
    chunks: Iterable[Chunk], settings: EncodeSettings, *, workers: int, tokenizer: Tokenizer | None = None
) -> Generator[EncodedChunk]:
    """Encodes ``chunks``, in order.

    With one worker the work is done in this process, with more as `map_in_processes` does it.

    Args:
        tokenizer: the one of ``settings`` where it is open already; saves opening it again. Workers get it whole.

    Raises:
        UserError: a worker process died.
    """
    with _single_threaded_tokenizer():
        if workers == 1:
            yield from map(Encoder(settings, tokenizer), chunks)
            return
        try:
            yield from map_in_processes(partial(Encoder, settings, tokenizer), chunks, workers=workers)
        except WorkerDied:
            # A signal to the whole group ends the workers too; give the handler of this process the chance to say so.
            time.sleep(0.2)
            found = "a worker process that ended before its work was done (out of memory, or killed)"
            raise UserError("--workers", found, f"all {workers} to live; fewer of them need less memory") from None
