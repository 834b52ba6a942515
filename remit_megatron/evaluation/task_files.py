"""From a suite to task files that lm-eval runs: the built-in file included, with the suite's shots and local data.

What cannot be done as asked is found here, before a model is loaded.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from remit_megatron.evaluation import definitions
from remit_megatron.evaluation.definitions import Found, Leaf
from remit_megatron.evaluation.suites import Entry, Suite
from remit_megatron.runtime.errors import UserError
from remit_megatron.runtime.files import sha256_file

# Ending of a data file -> the loader of `datasets` for it.
_LOADERS = {".jsonl": "json", ".jsonl.gz": "json", ".parquet": "parquet"}


@dataclass(frozen=True)
class Splits:
    """Which splits of a task's data play which part.

    Attributes:
        items: what is evaluated.
        examples: where shots come from; None where there are none or the task's file brings them along.
    """

    items: str
    examples: str | None

    @property
    def shared(self) -> bool:
        """Whether an item could be its own example."""
        return self.items == self.examples


@dataclass(frozen=True)
class Planned:
    """An entry of a suite, ready to be written as task files.

    Attributes:
        shots: of each item, as the suite or else the task's file says.
        metric, filter: what the score is.
        files: of each leaf, split -> data file; empty without ``--data``.
        weight_by_size: whether a group's items all count alike.
    """

    entry: Entry
    leaves: tuple[Leaf, ...]
    aggregate: tuple[dict[str, Any], ...]
    shots: int
    metric: str
    filter: str
    files: tuple[dict[str, Path], ...]

    @property
    def unsafe(self) -> bool:
        """Whether it runs code that a model wrote."""
        return any(leaf["unsafe_code"] for leaf in self.leaves)

    def generation(self) -> dict[str, Any] | None:
        """How answers are generated: ``generation_kwargs`` of its tasks with the suite's values, by task where they
        differ; None where nothing is generated."""
        found = {
            leaf.name: _generation(leaf, self.entry)
            for leaf in self.leaves
            if leaf["output_type"] in (None, "generate_until")  # which is lm-eval's default
        }
        first, *others = found.values() or [None]
        return first if all(other == first for other in others) else found

    def digest(self) -> str:
        """SHA-256 of what decides the items and their scores: the task files as merged, shots, the data's contents."""
        content = {
            "entry": [self.shots, self.metric, self.filter, self.entry.item_key, self.entry.generation],
            "leaves": [[leaf.name, leaf.values, leaf.overrides] for leaf in self.leaves],
            "data": [{split: sha256_file(path) for split, path in files.items()} for files in self.files],
        }
        # Functions are text with the path of lm-eval's installation, which is no property of a task.
        text = json.dumps(content, sort_keys=True, default=str).replace(str(_tasks_folder()), "")
        return hashlib.sha256(text.encode()).hexdigest()


def plan_suite(suite: Suite, *, data: Path | None, code: bool = True) -> list[Planned]:
    """Looks up every task of a suite and its local files.

    Args:
        data: folder with a folder per task, or None for the Hugging Face hub.
        code: whether tasks that run what a model wrote will be run; without, their files may be missing.

    Raises:
        UserError: an unknown task; shots that a task cannot have; files that are missing (all of them are named).
    """
    planned = []
    missing: list[str] = []
    count = 0
    for entry in suite.entries:
        found = [definitions.find(name, folder=suite.folder) for name in entry.tasks]
        leaves = tuple(leaf for part in found for leaf in part.leaves)
        if len({leaf.name for leaf in leaves}) < len(leaves):
            raise UserError(f"task {entry.name}", "one of its tasks twice", "each task once")
        shots = _shots(entry, leaves)
        metric, filter_name = _reading(entry, leaves)
        files: list[dict[str, Path]] = []
        gone: list[Path] = []
        for leaf in leaves:
            here, absent = _local_files(entry, leaf, splits_of(leaf, shots), data) if data else ({}, [])
            files.append(here)
            gone += absent if code or not leaf["unsafe_code"] else []
        if gone:
            count += len(set(gone))
            missing.append(_missing(entry, leaves, shots, gone))
        aggregate = _aggregate(found, metric, filter_name) if len(leaves) > 1 else ()
        planned.append(Planned(entry, leaves, aggregate, shots, metric, filter_name, tuple(files)))
    if missing:
        raise UserError(
            f"--data {data}",
            f"{count} file{'s' * (count > 1)} missing: {'; '.join(missing)}",
            "a file with the hub's rows as JSON lines for each split that a task uses",
        )
    return planned


def splits_of(leaf: Leaf, shots: int) -> Splits:
    """Which splits a task reads, by the rules of lm-eval."""
    items = leaf["test_split"] or leaf["validation_split"]
    if not items:
        raise UserError(f"task {leaf.name}", "neither test_split nor validation_split", "a task with items")
    fixed = leaf["fewshot_config"] or {}
    named = fixed.get("split") or leaf["fewshot_split"]
    if shots == 0 or (fixed.get("samples") and not named):
        return Splits(items, None)
    return Splits(items, named or leaf["training_split"] or leaf["validation_split"] or leaf["test_split"])


def write_task_files(planned: Planned, folder: Path, *, cache: Path) -> str:
    """Writes the task files of one entry into ``folder``, which is emptied first.

    They work with ``lm_eval --include_path`` too.

    Args:
        cache: where ``datasets`` keeps what it makes of local files.

    Returns:
        The name to run: of the task, or of the group of tasks.
    """
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for leaf, files in zip(planned.leaves, planned.files, strict=True):
        content = _task_file(planned, leaf, files, cache)
        (folder / f"{leaf.name.replace('/', '_')}.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    if len(planned.leaves) == 1:
        return planned.leaves[0].name
    group = {
        "group": planned.entry.name,
        "task": [leaf.name for leaf in planned.leaves],
        "aggregate_metric_list": list(planned.aggregate),
    }
    (folder / f"{planned.entry.name}.group.yaml").write_text(yaml.safe_dump(group, sort_keys=False))
    return planned.entry.name


def _task_file(planned: Planned, leaf: Leaf, files: dict[str, Path], cache: Path) -> dict[str, Any]:
    splits = splits_of(leaf, planned.shots)
    content: dict[str, Any] = {"include": str(leaf.path.resolve()), "task": leaf.name}
    # Functions in what a group says otherwise would be text here; lm-eval has none such.
    content |= leaf.overrides
    content["num_fewshot"] = planned.shots
    if planned.entry.generation:
        content["generation_kwargs"] = _generation(leaf, planned.entry)
    if splits.shared:
        # Only so does lm-eval leave the item out of its own examples.
        content |= {"test_split": splits.items, "validation_split": None, "fewshot_split": splits.items}
    if files:
        ending = next(iter(_LOADERS[_ending(path)] for path in files.values()))
        content |= {
            "dataset_path": ending,
            "dataset_name": None,
            "dataset_kwargs": {
                "data_files": {split: str(path.resolve()) for split, path in files.items()},
                "cache_dir": str(cache.resolve()),
            },
        }
        for key in ("training_split", "validation_split", "test_split", "fewshot_split"):
            wanted = content.get(key, leaf[key])
            if wanted is not None and wanted not in files:
                content[key] = None
    return content


def _generation(leaf: Leaf, entry: Entry) -> dict[str, Any]:
    return {**(leaf["generation_kwargs"] or {}), **entry.generation}


def _shots(entry: Entry, leaves: Iterable[Leaf]) -> int:
    """The shots to write into the task files; lm-eval takes a number there as it is, unlike one on its command line."""
    found = set()
    for leaf in leaves:
        shots = entry.shots if entry.shots is not None else int(leaf["num_fewshot"] or 0)
        constant = isinstance(leaf["doc_to_target"], int) and leaf["doc_to_choice"] is None
        if shots and (constant or leaf["output_type"] == "loglikelihood_rolling"):
            raise UserError(
                f"task {leaf.name}: shots", shots, "0: its items have no answer that could be shown as an example"
            )
        fixed = (leaf["fewshot_config"] or {}).get("samples")
        if isinstance(fixed, list) and not leaf["fewshot_split"] and shots > len(fixed):
            raise UserError(f"task {leaf.name}: shots", shots, f"at most {len(fixed)}: its examples are fixed")
        found.add(shots)
    if len(found) > 1:
        raise UserError(f"task {entry.name}: shots", " and ".join(map(str, sorted(found))), "one number: set shots")
    return found.pop()


def _reading(entry: Entry, leaves: tuple[Leaf, ...]) -> tuple[str, str]:
    """Metric and filter of an entry, by default the first ones of its task's file."""
    leaf = leaves[0]
    filters = [item["name"] for item in leaf["filter_list"] or [{"name": "none"}]]
    if entry.filter is not None and entry.filter not in filters:
        raise UserError(f"task {entry.name}: filter", entry.filter, f"one of {', '.join(filters)}")
    defaults = {"multiple_choice": "acc", "loglikelihood": "acc", "loglikelihood_rolling": "word_perplexity"}
    metrics = [_metric_name(item["metric"]) for item in leaf["metric_list"] or []]
    metric = entry.metric or next(iter(metrics), defaults.get(leaf["output_type"], "exact_match"))
    if metrics and metric not in metrics and not (metric.startswith("pass@") and "pass@1" in metrics):
        raise UserError(f"task {entry.name}: metric", metric, f"one of {', '.join(metrics)}")
    return metric, entry.filter or filters[0]


def _metric_name(metric: str) -> str:
    """The name under which lm-eval reports it; of a function that is ``pass_at_k`` it is only known from a result."""
    name = metric.rsplit(".", 1)[-1] if "/" in metric else metric
    return {"pass_at_k": "pass@1"}.get(name, name)


def _aggregate(found: list[Found], metric: str, filter_name: str) -> tuple[dict[str, Any], ...]:
    """How lm-eval sums up a group: as the built-in group says, else all items alike."""
    given = found[0].aggregate if len(found) == 1 else ()
    by_size = all(item.get("weight_by_size", True) for item in given)
    names = [item["metric"] for item in given if isinstance(item.get("metric"), str)]
    return tuple(
        {"metric": name, "aggregation": "mean", "weight_by_size": by_size, "filter_list": filter_name}
        for name in dict.fromkeys([metric, *names])
    )


def _missing(entry: Entry, leaves: tuple[Leaf, ...], shots: int, gone: list[Path]) -> str:
    """All files that one entry lacks: ``bbh: bbh/{navigate,snarks}/test.jsonl (SaylorTwift/bbh)``."""
    folders: dict[tuple[Path, str], list[str]] = {}
    for path in dict.fromkeys(gone):
        folders.setdefault((path.parent.parent, path.name), []).append(path.parent.name)
    files = []
    for (above, name), inside in folders.items():
        one = inside[0] if len(inside) == 1 else "{" + ",".join(inside) + "}"
        files.append(str(above / one / name))
    hub = str(leaves[0]["dataset_path"])
    gated = ", gated on the hub" if "gpqa" in hub.lower() else ""
    items = {splits_of(leaf, shots).items for leaf in leaves}
    examples = "" if any(path.stem in items for path in gone) else f", for {shots} shots"
    return f"{entry.name}: {' '.join(files)} ({hub}{gated}{examples})"


def _local_files(entry: Entry, leaf: Leaf, splits: Splits, data: Path) -> tuple[dict[str, Path], list[Path]]:
    """Data files by split; and those that are missing, below ``data``."""
    folders = _folders(entry, leaf)
    wanted = [splits.items, *([splits.examples] if splits.examples and not splits.shared else [])]
    for folder in folders:
        files = {split: path for split in wanted if (path := _file_of(data / folder, split))}
        if splits.items not in files:
            continue
        if gone := [split for split in wanted if split not in files]:
            return {}, [Path(folder, f"{split}.jsonl") for split in gone]
        if len({_LOADERS[_ending(path)] for path in files.values()}) > 1:
            raise UserError(f"--data {data / folder}", "JSON lines and Parquet", "one kind of file for a task")
        return files, []
    return {}, [Path(folders[0], f"{split}.jsonl") for split in wanted]


def _folders(entry: Entry, leaf: Leaf) -> list[str]:
    """Where a task's files may be below ``--data``, the likeliest first."""
    alone = entry.tasks == (leaf.name,)
    part = leaf["dataset_name"]
    hub = str(leaf["dataset_path"]).rsplit("/", 1)[-1]
    shared = [name for name in (entry.data, *entry.tasks, entry.name, hub) if name and "/" not in name]
    # One folder for several subtasks would give each of them the same items, where the hub keeps them apart.
    shared = [f"{name}/{part}" for name in shared] if part else shared
    own = [name for name in (entry.data, leaf.name, entry.name) if name] if alone else [leaf.name]
    return list(dict.fromkeys(own + shared if alone else shared + own))


def _file_of(folder: Path, split: str) -> Path | None:
    for ending in _LOADERS:
        if (path := folder / f"{split}{ending}").is_file():
            return path
    return None


def _ending(path: Path) -> str:
    return next(ending for ending in _LOADERS if path.name.endswith(ending))


def _tasks_folder() -> Path:
    import lm_eval.tasks

    return Path(lm_eval.tasks.__file__).parent
