"""``remit data build``: documents to Megatron's token files, with a manifest."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from remit_megatron.data.encode import EncodedChunk, EncodeSettings, encode_chunks
from remit_megatron.data.indexed import token_dtype
from remit_megatron.data.input_notes import noticed
from remit_megatron.data.inputs import LOCAL_FILES, FileStore, expand_inputs
from remit_megatron.data.manifest import Manifest
from remit_megatron.data.readers import TextFormat, iter_chunks, total_bytes
from remit_megatron.data.special_tokens import NOTHING, notice, special_tokens
from remit_megatron.data.tokenizer import load_tokenizer
from remit_megatron.data.writer import DatasetWriter
from remit_megatron.runtime.errors import UserError
from remit_megatron.runtime.progress import Progress, format_count

logger = logging.getLogger(__name__)

_SKIPPED_LINES_SHOWN = 20


def build_dataset(
    inputs: Sequence[str | os.PathLike],
    tokenizer: str | os.PathLike,
    output: str | os.PathLike,
    *,
    workers: int = 1,
    text_key: str = "text",
    template: str | None = None,
    on_error: str = "stop",
    append_eod: bool = True,
    add_special_tokens: bool = False,
    max_documents: int | None = None,
    overwrite: bool = False,
    progress: bool = False,
) -> Manifest:
    """Tokenizes ``inputs`` into ``output.bin``, ``output.idx`` and ``output.json``, complete or not at all.

    The files depend on the texts and the tokenizer only: not on ``workers``, nor on how the inputs are stored.

    Args:
        inputs: see `readers.expand_inputs`.
        tokenizer: see `load_tokenizer`.
        output: path of the three files without their endings.
        workers: processes that tokenize; 1 works in this process.
        text_key, template: see `TextFormat`.
        on_error: "stop" at the first bad line, or "skip" and count.
        append_eod: append the end-of-document token to each document.
        add_special_tokens: put the tokens around each text that the tokenizer's post-processor adds, as
            ``AutoTokenizer`` does by default.
        max_documents: stop after so many.
        overwrite: replace an existing data set.
        progress: show progress on standard error.

    Raises:
        UserError: anything wrong with the arguments, the input or the disk; nothing is left behind.
    """
    left_out: list[str] = []
    files = expand_inputs(inputs, left_out=left_out)
    for line in (*left_out, *noticed(files)):
        logger.warning("%s", line)
    return build_files(
        files,
        tokenizer,
        output,
        workers=workers,
        text_key=text_key,
        template=template,
        on_error=on_error,
        append_eod=append_eod,
        add_special_tokens=add_special_tokens,
        max_documents=max_documents,
        overwrite=overwrite,
        progress="tokenizing" if progress else None,
    )


def build_files(
    files: Sequence[str],
    tokenizer: str | os.PathLike,
    output: str | os.PathLike,
    *,
    workers: int = 1,
    text_key: str = "text",
    template: str | None = None,
    on_error: str = "stop",
    append_eod: bool = True,
    add_special_tokens: bool = False,
    max_documents: int | None = None,
    max_tokens: int | None = None,
    overwrite: bool = False,
    progress: str | None = None,
    announce: bool = True,
    store: FileStore = LOCAL_FILES,
    origin: dict[str, Any] | None = None,
) -> Manifest:
    """`build_dataset` for files that have been found already, wherever they are.

    Args:
        files: read in this order.
        max_tokens: stop with the document that brings them to so many, end-of-document tokens included.
        progress: what progress on standard error says it is; None shows none.
        announce: say what the tokenizer would add to each text.
        store: where the files are.
        origin: goes into the manifest.
        tokenizer, output, workers, text_key, template, on_error, append_eod, add_special_tokens, max_documents,
            overwrite: as there.

    Raises:
        UserError: as there.
    """
    _check_options(on_error, {"--workers": workers, "--max-documents": max_documents, "--tokens": max_tokens})
    opened = load_tokenizer(tokenizer, field="--tokenizer")
    text_format = TextFormat(text_key=text_key, template=template)
    eod_id = opened.eod_id if append_eod else None
    around = special_tokens(opened) if add_special_tokens else NOTHING
    if announce and (line := notice(opened, around if add_special_tokens else None, eod_id)):
        logger.warning("%s", line)
    if store is LOCAL_FILES:
        _refuse_own_input(files, os.fspath(output))
    dtype = token_dtype(opened.vocab_size)
    settings = EncodeSettings(
        tokenizer=os.fspath(tokenizer),
        text_key=text_key,
        template=template,
        eod_id=eod_id,
        dtype=dtype.str,
        stop_at_bad=on_error == "stop",
        before=around.before,
        after=around.after,
    )
    with DatasetWriter(output, dtype=dtype, overwrite=overwrite) as writer:
        chunks = iter_chunks(files, fields=text_format.fields, store=store)
        encoded = encode_chunks(chunks, settings, workers=workers, tokenizer=opened)
        try:
            shown = Progress(progress, total=total_bytes(files, store=store), unit="B") if progress else None
            limits = (sys.maxsize if limit is None else limit for limit in (max_documents, max_tokens))
            ends = _Ends(None if around.after[-1:] == (eod_id,) else eod_id)
            skipped = _write_all(encoded, writer, ends, *limits, stop_at_bad=settings.stop_at_bad, progress=shown)
        finally:
            encoded.close()  # ends the workers before the output is renamed or removed
        if not writer.documents:
            found = f"no document in {', '.join(files[:3])}{' …' if len(files) > 3 else ''}"
            found += f" ({skipped} bad lines)" if skipped else ""
            raise UserError("--input", found, "at least one record with text")
        if ends.twice:
            found = f"{ends.twice} of {writer.documents} documents end in two of {opened.decode([ends.eod_id or 0])}"
            logger.warning("%s: their texts spell one, and the build appends one (--no-eod does not)", found)
        return writer.commit(
            tokenizer_digest=opened.digest,
            vocab_size=opened.vocab_size,
            eod_id=eod_id,
            skipped=skipped,
            inputs=tuple(map(os.path.basename, files)),
            origin=origin,
            special_tokens=(around.before, around.after) if any(around) else None,
        )


def _check_options(on_error: str, counts: dict[str, int | None]) -> None:
    if on_error not in ("stop", "skip"):
        raise UserError("--on-error", on_error, "stop or skip")
    for option, value in counts.items():
        if value is not None and value < 1:
            raise UserError(option, value, "1 or more")


@dataclass
class _Ends:
    """Counts documents whose texts end in the end-of-document token already.

    Attributes:
        eod_id: what was appended; None where nothing was, or where that is known to be the second.
        twice: documents so far.
    """

    eod_id: int | None
    twice: int = 0

    def count(self, tokens: np.ndarray, lengths: np.ndarray) -> None:
        """Takes in documents as `DatasetWriter.append` does."""
        if self.eod_id is not None:
            last = np.cumsum(lengths, dtype=np.int64)[lengths > 1] - 2
            self.twice += int((tokens[last] == self.eod_id).sum())


def _write_all(
    encoded: Iterator[EncodedChunk],
    writer: DatasetWriter,
    ends: _Ends,
    max_documents: int,
    max_tokens: int,
    *,
    stop_at_bad: bool,
    progress: Progress | None,
) -> int:
    """Writes ``encoded`` until it ends or a limit is reached; returns the number of lines skipped."""
    skipped = 0
    for chunk in encoded:
        # The document that crosses max_tokens is the last one.
        enough = int(np.searchsorted(np.cumsum(chunk.lengths, dtype=np.int64), max_tokens - writer.tokens)) + 1
        room = min(max_documents - writer.documents, enough)
        lengths = chunk.lengths[:room]
        writer.append(chunk.tokens[: lengths.sum()], lengths)
        ends.count(chunk.tokens, lengths)
        for bad in chunk.bad:
            if bad.documents_before >= room:
                break  # behind the last document that was asked for
            if stop_at_bad:
                raise UserError(f"{chunk.file}:{bad.number}", bad.found, bad.expected)
            skipped += 1
            if skipped <= _SKIPPED_LINES_SHOWN:
                last = "; more are counted, not shown" if skipped == _SKIPPED_LINES_SHOWN else ""
                logger.warning("skipped %s:%d: found %s%s", chunk.file, bad.number, bad.found, last)
        if progress:
            progress.update(chunk.end, note=f"{format_count(writer.tokens)} tokens")
        if writer.documents >= max_documents or writer.tokens >= max_tokens:
            break
    if progress:
        progress.finish(note=f"{format_count(writer.tokens)} tokens")
    return skipped


def _refuse_own_input(files: Sequence[str], output: str) -> None:
    outputs = {Path(f"{output}{suffix}").resolve() for suffix in (".bin", ".idx", ".json")}
    for file in files:
        if Path(file).resolve() in outputs:
            raise UserError("--output", f"{output}, which would replace the input {file}", "another prefix")
