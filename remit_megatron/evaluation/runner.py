"""An evaluation from top to bottom: tasks loaded and checked, then each model loaded and every task run and written."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import math
import os
import random
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from remit_megatron.evaluation import lm, results
from remit_megatron.evaluation.code_runner import code_metric, warn_where_not_isolated
from remit_megatron.evaluation.models import Model, chat_template, forget_export, hugging_face_directory
from remit_megatron.evaluation.request_cache import RequestCache
from remit_megatron.evaluation.shots import check_shots, hold_items, read_anew
from remit_megatron.evaluation.suites import Suite, known_suites
from remit_megatron.evaluation.task_files import Planned, plan_suite, write_task_files
from remit_megatron.runtime.errors import UserError, show_error
from remit_megatron.runtime.files import sha256_file
from remit_megatron.runtime.locks import DirectoryLock

logger = logging.getLogger(__name__)

# lm-eval's own: of Python, NumPy and torch, and of the choice of shots.
_SEEDS = (0, 1234, 1234, 1234)
_BOOTSTRAP = 1000  # for standard errors of metrics that are no mean


@dataclass(frozen=True)
class Request:
    """What an evaluation is asked for.

    Attributes:
        output: where everything goes.
        cache: exported models, answers, and what ``datasets`` makes of local files.
        data: folder with local files, or None for the hub.
        limit: items of each task (of each subtask of a group), or None for all.
        chat: whether prompts go through the chat template; None as the suite says.
        allow_code: whether tasks that run what a model wrote are run.
        keep_exported: whether models that were exported stay in the cache.
    """

    suite: Suite
    output: Path
    cache: Path
    backend: lm.Backend
    data: Path | None = None
    limit: int | None = None
    chat: bool | None = None
    allow_code: bool = False
    keep_exported: bool = False

    @property
    def apply_chat_template(self) -> bool:
        """Whether prompts go through the model's chat template."""
        return self.suite.chat_template if self.chat is None else self.chat


@dataclass(frozen=True)
class Ready:
    """The tasks of a request, found, and what was left out.

    Attributes:
        planned: what will run.
        skipped: column -> why it will not.
    """

    planned: list[Planned]
    skipped: dict[str, str]


def prepare(request: Request, models: list[Model]) -> Ready:
    """Everything that can be found wrong before a model is loaded, but for what is in the data.

    Raises:
        UserError: what is wrong.
    """
    planned = plan_suite(request.suite, data=request.data, code=request.allow_code)
    skipped = {}
    if not request.allow_code:
        skipped = {
            item.entry.column: "runs code that the model writes, which --allow-code permits"
            for item in planned
            if item.unsafe
        }
        planned = [item for item in planned if not item.unsafe]
        if not planned:
            raise UserError("--suite", f"{request.suite.name}, which runs code that the model writes", "--allow-code")
    _check_ifeval(planned, request.data)
    _, details = results.read_output(request.output)
    if details and details["setting"] != (setting := _setting(request)):
        different = [name for name in setting if details["setting"].get(name) != setting[name]]
        raise UserError(
            f"--output {request.output}",
            f"results with {different[0]} {details['setting'].get(different[0])}",
            f"{setting[different[0]]}, or another directory",
        )
    for model in models:
        if model.path == request.output.resolve():
            found = f"{model.path}, the model {model.name} itself"
            raise UserError("--output", found, "another directory: results are not part of a model")
        if request.apply_chat_template and not model.checkpoint and chat_template(model.path) is None:
            raise UserError(f"MODEL {model.name}", "no chat template in its tokenizer", "one, or --chat-template no")
    return Ready(planned, skipped)


def evaluate(request: Request, ready: Ready, models: list[Model]) -> dict[str, Any]:
    """Runs every task on every model, on this process or, started on all of them, on its share of the items.

    Returns:
        As in results.json: model -> task -> score, stderr, metric, filter, shots, items, ….
    """
    rank = int(os.environ.get("RANK", "0"))
    terminal = sys.stderr
    request.output.mkdir(parents=True, exist_ok=True)
    with _only_one(request.output, rank), _quiet(request.output, rank):
        tasks = [_load_tasks(request, item, rank) for item in ready.planned]
        if any(item.unsafe for item in ready.planned):
            warn_where_not_isolated()
        for model in models:
            _evaluate_model(request, ready, model, tasks, rank, terminal)
    return results.read_json(request.output / results.RESULTS)


def _evaluate_model(
    request: Request, ready: Ready, model: Model, tasks: list[Any], rank: int, terminal: TextIO
) -> None:
    directory = hugging_face_directory(model, request.cache / "exported")
    template = chat_template(directory) if request.apply_chat_template else None
    if request.apply_chat_template and template is None:
        raise UserError(f"MODEL {model.name}", "no chat template in its tokenizer", "one, or --chat-template no")
    identity = {"model": model.digest, **request.backend.identity()}
    keys = [_key(request, item, identity, template) for item in ready.planned]
    left = [i for i, item in enumerate(ready.planned) if not _is_done(request, model, item, keys[i])]
    if left:
        watched = lm.Watched(
            lm.load(directory, request.backend), RequestCache(_cache_folder(request, identity), rank=rank), terminal
        )
        for number, i in enumerate(left, 1):
            item = ready.planned[i]
            watched.label = f"{model.name} {item.entry.column} ({number} of {len(left)})"
            found = _run(request, item, tasks[i], watched, template is not None)
            if found is not None:
                _write(request, ready, model, item, keys[i], found, template)
        watched.cache.close()
    if rank == 0:
        _write_table(request, ready)
        if not request.keep_exported:
            forget_export(model, request.cache / "exported")


def _run(request: Request, item: Planned, loaded: Any, watched: lm.Watched, chat: bool) -> dict[str, Any] | None:
    """One entry on one model. Returns lm-eval's results on rank 0, None on the others."""
    from lm_eval.evaluator import evaluate as run

    _seed()
    for task in loaded["tasks"].values():
        task.set_fewshot_seed(seed=_SEEDS[3])
    build = _Counting(loaded["tasks"], watched)
    found = run(
        lm=watched.model,
        task_dict=loaded,
        limit=request.limit,
        bootstrap_iters=_BOOTSTRAP,
        apply_chat_template=chat,
        fewshot_as_multiturn=chat,
        confirm_run_unsafe_code=request.allow_code,
    )
    return None if found is None else {**found, "cut": build.cut, "dtype": watched.dtype}


class _Counting:
    """Counts prompts that do not fit when lm-eval has built them, which it does inside of its evaluation."""

    def __init__(self, tasks: dict[str, Any], watched: lm.Watched):
        self.cut = 0
        for name, task in tasks.items():
            built = type(task).build_all_requests

            def build(*args: Any, _task: Any = task, _name: str = name, _built: Any = built, **kwargs: Any) -> None:
                _built(_task, *args, **kwargs)
                self.cut += watched.count_cut({_name: _task})

            task.build_all_requests = build


def _load_tasks(request: Request, item: Planned, rank: int) -> Any:
    """lm-eval's task objects of an entry, their shots counted."""
    from lm_eval.tasks import TaskManager

    folder = request.output / "tasks" / item.entry.name
    if rank == 0 or not os.environ.get("RANK"):
        name = write_task_files(item, folder, cache=request.cache / "datasets")
    else:
        folder = request.cache / "tasks" / f"rank_{rank}" / item.entry.name
        name = write_task_files(item, folder, cache=request.cache / "datasets")
    _seed()
    try:
        with read_anew(), code_metric() if item.unsafe else contextlib.nullcontext():
            loaded = TaskManager(include_path=str(folder), include_defaults=False).load([name])
            for task in loaded["tasks"].values():
                hold_items(task)
    except UserError:
        raise
    except Exception as error:
        where = "its files in --data" if request.data else "data that can be had from here; --data takes local files"
        first: BaseException = error  # `datasets` says what was wrong with a row only in what it began with
        while first.__cause__ is not None:
            first = first.__cause__
        raise UserError(f"task {item.entry.name}", show_error(first, empty="no items"), where) from error
    for task in loaded["tasks"].values():
        task.set_fewshot_seed(seed=_SEEDS[3])
    check_shots(item, loaded["tasks"])
    return loaded


def _seed() -> None:
    import numpy as np
    import torch

    random.seed(_SEEDS[0])
    np.random.seed(_SEEDS[1])
    torch.manual_seed(_SEEDS[2])


def _write(
    request: Request, ready: Ready, model: Model, item: Planned, key: str, found: dict[str, Any], template: str | None
) -> None:
    """Samples first, then the result that says they are complete."""
    entry, name = item.entry, item.entry.name
    group = len(item.leaves) > 1
    lines: list[dict[str, Any]] = []
    for leaf in item.leaves:
        samples = found["samples"][leaf.name]
        _check_metric(item, leaf.name, samples)
        subtask = leaf.name if group else None
        lines += results.sample_lines(samples, subtask=subtask, metric=item.metric, filter_name=item.filter)
    path = results.samples_path(request.output, model.name, name)
    results.write_samples(path, lines)
    numbers = found["results"][name if group else item.leaves[0].name]
    content = {
        "score": numbers[f"{item.metric},{item.filter}"],
        "stderr": _number(numbers.get(f"{item.metric}_stderr,{item.filter}")),
        "metric": item.metric,
        "filter": item.filter,
        "shots": item.shots,
        "items": len(lines),
        "cut": found["cut"],
        "dtype": found["dtype"],
        "column": entry.column,
        "chat_template": template is not None,
        "higher_is_better": item.metric not in results.LOWER_IS_BETTER,
        "metrics": _all_metrics(numbers),
    }
    if (generation := item.generation()) is not None:
        content["generation"] = generation
    if group:
        content["subtasks"] = {leaf.name: _all_metrics(found["results"][leaf.name]) for leaf in item.leaves}
    content |= {"prompt_examples": entry.prompt_examples} if entry.prompt_examples else {}
    content |= {"note": entry.note} if entry.note else {}
    if content["stderr"] is None and len(lines) > 1:
        import scipy.stats

        content["stderr"] = float(scipy.stats.sem([line["score"] for line in lines]))
    details: dict[str, Any] = results.read_json(request.output / results.DETAILS)
    details = details or {"setting": _setting(request), "models": {}}
    suite_file = request.suite.folder / f"{request.suite.name}.yaml"
    if request.suite.name not in known_suites() and suite_file.is_file():  # no suite's name, but a file's
        details["suite_file"] = str(suite_file.resolve())
    about: dict[str, Any] = details["models"].get(model.name) or {}
    if about.get("digest") != model.digest:
        about = {"tasks": {}}
    details["models"][model.name] = about
    about |= {
        "path": str(model.path),
        "digest": model.digest,
        **request.backend.identity(),
        "chat_template_sha256": template and hashlib.sha256(template.encode()).hexdigest(),
    }
    about["tasks"][name] = {"key": key, "samples_sha256": sha256_file(path), "version": found["versions"]}
    everything = results.read_json(request.output / results.RESULTS)
    # What is of another model that had the name goes, with what said so.
    of_model = {task: found for task, found in everything.get(model.name, {}).items() if task in about["tasks"]}
    everything[model.name] = {**of_model, name: content}
    results.write_json(request.output / results.RESULTS, everything)
    results.write_json(request.output / results.DETAILS, details)
    logger.info("%s %s: %s", model.name, name, content["score"])
    _write_table(request, ready)


def _write_table(request: Request, ready: Ready) -> None:
    everything = results.read_json(request.output / results.RESULTS)
    order = [item.entry.name for item in ready.planned]
    everything = {model: {task: found[task] for task in order if task in found} for model, found in everything.items()}
    limit = f" Only the first {request.limit} items of each task: no measurement." if request.limit else ""
    about = f"Suite {request.suite.name}{', with chat template' if request.apply_chat_template else ''}."
    about = " ".join(part for part in (about, request.suite.about.strip(), limit.strip()) if part)
    text = results.markdown(everything, about=about, skipped=ready.skipped)
    (request.output / results.TABLE).write_text(text, encoding="utf-8")


def _check_metric(item: Planned, leaf: str, samples: list[dict[str, Any]]) -> None:
    known = sorted({name for sample in samples for name in sample["metrics"]})
    if any(item.metric not in sample for sample in samples):
        raise UserError(f"task {leaf}: metric", item.metric, f"one of {', '.join(known)}")


def _all_metrics(numbers: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """``exact_match,strict-match`` -> score and standard error: all that lm-eval gives."""
    found = {}
    for key, value in numbers.items():
        metric, comma, filter_name = key.partition(",")
        if comma and not metric.endswith("_stderr"):
            found[key] = {"score": value, "stderr": _number(numbers.get(f"{metric}_stderr,{filter_name}"))}
    return found


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) and not math.isnan(value) else None


def _key(request: Request, item: Planned, identity: dict[str, Any], template: str | None) -> str:
    """SHA-256 of all that decides a result; one that is already there under the same key is not computed again."""
    content = [identity, item.digest(), request.limit, template]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _is_done(request: Request, model: Model, item: Planned, key: str) -> bool:
    name = item.entry.name
    about = results.read_json(request.output / results.DETAILS).get("models", {}).get(model.name, {})
    written = about.get("tasks", {}).get(name, {})
    path = results.samples_path(request.output, model.name, name)
    present = name in results.read_json(request.output / results.RESULTS).get(model.name, {})
    return present and written.get("key") == key and path.is_file() and sha256_file(path) == written["samples_sha256"]


def _cache_folder(request: Request, identity: dict[str, Any]) -> Path:
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
    return request.cache / "answers" / digest[:32]


def _setting(request: Request) -> dict[str, Any]:
    """What all numbers of one table have in common."""
    return {
        "suite": request.suite.name,
        "suite_sha256": request.suite.digest(),
        "limit": request.limit,
        "chat_template": request.apply_chat_template,
        "data": str(request.data.resolve()) if request.data else None,
        "seeds": list(_SEEDS),
    }


def _check_ifeval(planned: list[Planned], data: Path | None) -> None:
    """IFEval counts sentences with NLTK's punkt_tab. Offline, its download fails in silence, the count much later."""
    if not any(
        "ifeval" in str(leaf["process_results"]) or "ifeval" in leaf.name for item in planned for leaf in item.leaves
    ):
        return
    import nltk

    if data:
        nltk.data.path.insert(0, str((data / "nltk_data").resolve()))
        try:
            nltk.data.find("tokenizers/punkt_tab/english")
        except LookupError:
            raise UserError(
                "task ifeval",
                f"no punkt_tab of NLTK in {data / 'nltk_data'} or where NLTK looks",
                "nltk_data/tokenizers/punkt_tab there (python -m nltk.downloader -d DIR/nltk_data punkt_tab)",
            ) from None


@contextlib.contextmanager
def _only_one(output: Path, rank: int) -> Iterator[None]:
    """Two evaluations must not write into one directory. The lock goes with the process, however it ends."""
    if rank:
        yield
        return
    lock = DirectoryLock(output, field="--output")
    try:
        yield
    finally:
        lock.release()


@contextlib.contextmanager
def _quiet(output: Path, rank: int) -> Iterator[None]:
    """lm-eval, transformers and datasets talk much: into ``evaluate.log``, also prints and bars."""
    root = logging.getLogger()
    ours = logging.getLogger("remit_megatron")
    name = "evaluate.log" if rank == 0 else f"evaluate.rank_{rank}.log"
    handler = logging.FileHandler(output / name)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    levels = [(other, other.level) for other in root.handlers]

    def only_ours(record: logging.LogRecord) -> bool:
        return record.name.startswith("remit_megatron") and rank == 0

    for other, _ in levels:
        other.addFilter(only_ours)  # they hold the terminal's own stream
    root.addHandler(handler)
    before = root.level, ours.level
    root.setLevel(logging.INFO)
    logging.captureWarnings(True)
    try:
        with open(output / name, "a") as file, contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
            yield
    finally:
        logging.captureWarnings(False)
        root.setLevel(before[0])
        root.removeHandler(handler)
        handler.close()
        for other, _ in levels:
            other.removeFilter(only_ours)
