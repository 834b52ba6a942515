"""Folders that other programs made: of `datasets` the data and nothing beside it, of tables with a log nothing."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from remit_megatron.data.inputs import expand_inputs
from remit_megatron.data.readers import iter_documents
from remit_megatron.runtime.errors import UserError

TEXTS = [f"document {number}" for number in range(6)]


def texts(folder: Path) -> list[str]:
    return [document.text for document in iter_documents([folder])]


def test_a_cache_of_datasets(tmp_path):
    """As `load_dataset` leaves it, and ``map`` after that: the data once, and not what was made of it."""
    datasets = pytest.importorskip("datasets")
    pq.write_table(pa.table({"text": TEXTS}), tmp_path / "x.parquet")
    loaded = datasets.load_dataset(
        "parquet", data_files=str(tmp_path / "x.parquet"), split="train", cache_dir=str(tmp_path / "cache")
    )
    loaded.map(lambda row: {"text": row["text"].upper()})
    folder = Path(loaded.cache_files[0]["filename"]).parent
    made = {path.name.split("-")[0] for path in folder.iterdir()}
    assert {"cache", "dataset_info.json"} <= made, "the files that this is about"
    notes: list[str] = []
    expand_inputs([folder], left_out=notes)
    assert any("passed over 2 files beside a data set's own, such as " in note for note in notes), notes
    assert texts(folder) == texts(tmp_path / "cache") == TEXTS


def test_data_sets_in_a_folder(tmp_path):
    """Those of `save_to_disk` are read there as they are by themselves."""
    datasets = pytest.importorskip("datasets")
    folder = tmp_path / "all" / "one"
    data = datasets.Dataset.from_dict({"text": TEXTS})
    data.save_to_disk(str(folder), num_shards=2)
    first, second = sorted(folder.glob("*.arrow"))
    shutil.copy(first, folder / "cache-0123.arrow")
    shutil.copy(first, folder / "older.arrow")
    datasets.DatasetDict({"train": data}).save_to_disk(str(tmp_path / "all" / "split"))
    assert texts(folder) == TEXTS and texts(tmp_path / "all") == TEXTS * 2
    second.unlink()
    with pytest.raises(UserError, match=rf"{folder}: found no {second.name}, which state.json names"):
        texts(tmp_path / "all")


def test_descriptions_are_no_data(tmp_path):
    """As in a data set that was downloaded from the hub."""
    (tmp_path / "data").mkdir()
    pq.write_table(pa.table({"text": TEXTS}), tmp_path / "data" / "train-00000-of-00001.parquet")
    for name in ("dataset_infos.json", "config.json", "README.md"):
        (tmp_path / name).write_text('{"default": {}}')
    assert texts(tmp_path) == TEXTS
    with pytest.raises(UserError, match="no field 'text'"):  # asked for by its name, it is a file like any other
        texts(tmp_path / "config.json")


@pytest.mark.parametrize(
    ("names", "found"),
    [
        (("_delta_log/00000000000000000000.json", "part-0.parquet"), "{}, a Delta Lake table: its log decides which"),
        ((".hoodie/hoodie.properties", "2024/x_0_1.parquet"), "{}, a Hudi table: its log decides which"),
        (("metadata/v1.metadata.json", "data/00000-0.parquet"), "{}, an Iceberg table: its log decides which"),
        (("_temporary/0/task_1/part-0.parquet", "part-0.parquet"), "{}, the output of a Spark job that has not ended"),
    ],
    ids=["delta", "hudi", "iceberg", "spark"],
)
@pytest.mark.parametrize("below", ["", "table"])
def test_a_folder_whose_files_are_not_all_meant(tmp_path, names, found, below):
    table = tmp_path / below
    for name in names:
        (table / name).parent.mkdir(parents=True, exist_ok=True)
        (table / name).write_bytes(b"")
    with pytest.raises(UserError) as refused:
        expand_inputs([tmp_path])
    assert str(refused.value).startswith(f"--input: found {found.format(table)}")
    wanted = str(table / names[1])
    assert expand_inputs([wanted]) == expand_inputs([f"{Path(wanted).parent}/*.parquet"]) == [wanted]


def test_metadata_may_be_the_name_of_a_folder(tmp_path):
    for name in ("metadata/x.jsonl", "data/y.jsonl"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_bytes(b"")
    assert len(expand_inputs([tmp_path])) == 2


def test_rows_that_an_early_datasets_chose(tmp_path):
    """It kept the choice and order of ``select``, ``shuffle`` and ``filter`` beside rows that are all still there."""
    datasets = pytest.importorskip("datasets")
    datasets.Dataset.from_dict({"text": TEXTS}).save_to_disk(tmp_path / "saved")
    assert texts(tmp_path / "saved") == TEXTS
    state = json.loads((tmp_path / "saved/state.json").read_text())
    for nothing in ([], None):
        (tmp_path / "saved/state.json").write_text(json.dumps(state | {"_indices_data_files": nothing}))
        assert texts(tmp_path / "saved") == TEXTS
    chosen = {"_indices_data_files": [{"filename": "indices.arrow"}]}
    (tmp_path / "saved/state.json").write_text(json.dumps(state | chosen))
    with pytest.raises(UserError, match=r"found rows with a choice and order of their own beside them"):
        texts(tmp_path / "saved")
