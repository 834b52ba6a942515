"""Rows of Parquet and Arrow files."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from remit_megatron.data.inputs import LOCAL_FILES, FileStore
from remit_megatron.data.table_ends import check_arrow_file, check_parquet, check_stream
from remit_megatron.runtime.errors import UserError


def iter_batches(file: str, fields: Sequence[str], store: FileStore) -> Iterator[tuple[Any, float]]:
    """Record batches with the columns ``fields``, each with the share of the file that is read after it.

    Raises:
        UserError: a column is missing, there twice, or not of strings.
        pyarrow.ArrowException, OSError: a file that cannot be read.
    """
    import pyarrow
    import pyarrow.parquet

    local = store is LOCAL_FILES and _can_be_named(file)  # Arrow reads these itself, without the detour over Python
    if file.endswith(".parquet"):
        source = file if local else store.open(file)
        # Many writers leave checksums out, and Arrow's own reader does not look at those that are there.
        with pyarrow.parquet.ParquetFile(source, pre_buffer=False, page_checksum_verification=True) as table:
            _check_columns(file, table.schema_arrow, fields)
            with store.open(file) as whole:
                check_parquet(file, whole)
            rows, done = max(table.metadata.num_rows, 1), 0
            for batch in table.iter_batches(batch_size=1024, columns=list(fields), use_threads=False):
                done += batch.num_rows
                yield batch.select(list(fields)), done / rows
        return
    with pyarrow.memory_map(file) if local else pyarrow.PythonFile(store.open(file), mode="r") as source:
        try:
            stream = pyarrow.ipc.open_stream(source)
        except pyarrow.ArrowInvalid:  # the other of Arrow's two layouts, with a footer
            reader = pyarrow.ipc.open_file(source)
            _check_columns(file, reader.schema, fields)
            check_arrow_file(file, source)
            for index in range(reader.num_record_batches):
                yield reader.get_batch(index).select(list(fields)), (index + 1) / reader.num_record_batches
            return
        _check_columns(file, stream.schema, fields)
        for batch in stream:
            yield batch.select(list(fields)), source.tell() / max(source.size(), 1)
        check_stream(file, source)


def _can_be_named(file: str) -> bool:
    """Whether Arrow can open a file by its name, which to Linux is bytes and to Arrow is UTF-8."""
    try:
        file.encode()
    except UnicodeEncodeError:
        return False
    return True


def _check_columns(file: str, schema: Any, fields: Sequence[str]) -> None:
    import pyarrow.types as kinds

    for name in fields:
        if name not in schema.names:
            expected = f"a column {name!r} (--text-key names another column, --template joins several)"
            raise UserError(file, f"columns {', '.join(map(repr, schema.names))}", expected)
        if (count := schema.names.count(name)) > 1:
            raise UserError(file, f"{count} columns {name!r}", "one: nothing says which of them is meant")
        kind = schema.field(name).type
        kind = kind.value_type if kinds.is_dictionary(kind) else kind
        text = kinds.is_string(kind) or kinds.is_large_string(kind) or kinds.is_string_view(kind)
        if not (text or kinds.is_null(kind)):  # a column of nothing but nulls may have no other type
            raise UserError(file, f"column {name!r} of type {kind}", "a column of strings")


def check_offsets(batch: Any) -> None:
    """Refuses strings that lie outside of their buffer, as in a damaged Arrow file: reading one ends the process.

    Raises:
        pyarrow.ArrowInvalid: there is one.
    """
    import pyarrow
    import pyarrow.types as kinds

    for column in batch.columns:
        if kinds.is_dictionary(column.type):
            values = _as_bytes(column.dictionary)
            values.validate(full=True)
            pyarrow.DictionaryArray.from_arrays(column.indices, values)  # whose numbers are compared with its length
        else:
            _as_bytes(column).validate(full=True)


def _as_bytes(column: Any) -> Any:
    """The same buffers without the claim that they are UTF-8, which is looked at string by string."""
    import pyarrow
    import pyarrow.types as kinds

    if kinds.is_string(column.type):
        return column.view(pyarrow.binary())
    if kinds.is_large_string(column.type):
        return column.view(pyarrow.large_binary())
    return column.view(pyarrow.binary_view()) if kinds.is_string_view(column.type) else column


def columns_of(batch: Any) -> dict[str, list[Any]]:
    """The values of a record batch by column; a string that is not UTF-8, which nothing in these formats prevents, as
    bytes."""
    try:
        return batch.to_pydict()
    except UnicodeDecodeError:
        return {name: _values(batch.column(name)) for name in batch.schema.names}


def _values(column: Any) -> list[Any]:
    import pyarrow
    import pyarrow.types as kinds

    if kinds.is_dictionary(column.type):
        column = column.dictionary_decode()
    if kinds.is_null(column.type):
        return column.to_pylist()
    wide = kinds.is_large_string(column.type)
    return [_decoded(value) for value in column.cast(pyarrow.large_binary() if wide else pyarrow.binary()).to_pylist()]


def _decoded(value: bytes | None) -> str | bytes | None:
    try:
        return None if value is None else value.decode()
    except UnicodeDecodeError:
        return value
