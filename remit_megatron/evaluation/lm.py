"""The model as lm-eval has it: loaded, batch size found, answers kept, prompts that do not fit counted."""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TextIO

from remit_megatron.evaluation.request_cache import RequestCache, through_cache
from remit_megatron.runtime.errors import UserError, show_error
from remit_megatron.runtime.exported import model_digest
from remit_megatron.runtime.extras import is_installed, require
from remit_megatron.runtime.files import sha256_file
from remit_megatron.runtime.float32 import exact_float32
from remit_megatron.runtime.progress import Progress
from remit_megatron.runtime.whole_model import check_whole

logger = logging.getLogger(__name__)

BACKENDS = ("hf", "vllm")


@dataclass(frozen=True)
class Backend:
    """How a model is run.

    Attributes:
        name: ``hf`` or ``vllm``.
        batch_size: a number, or ``auto``.
        dtype: as lm-eval takes it; ``auto`` is the model's own.
        max_length: positions that are used; None for the model's own.
        arguments: more arguments of lm-eval's model class.
        nproc: processes of this machine that share the items.
    """

    name: str = "hf"
    batch_size: str = "auto"
    dtype: str = "auto"
    max_length: int | None = None
    arguments: tuple[tuple[str, str], ...] = ()
    nproc: int = 1

    def identity(self) -> dict[str, Any]:
        """What may change an answer; batch size and number of processes change its last digits at most."""
        versions = {name: _version(name) for name in ("lm_eval", "transformers", "torch")}
        return {
            "backend": self.name,
            "dtype": self.dtype,
            "max_length": self.max_length,
            "arguments": dict(self.arguments),
            "versions": versions | ({"vllm": _version("vllm")} if self.name == "vllm" else {}),
            **({"argument_files": self._argument_files} if self._argument_files else {}),
        }

    @cached_property
    def _argument_files(self) -> dict[str, str]:
        """Digests of what arguments name; read once, as it may be a model."""
        return {name: digest for name, value in self.arguments if (digest := _content(value)) is not None}


def _content(value: str) -> str | None:
    """Digest of the file, or of the model, adapter or tokenizer, that an argument names; None where it names none."""
    path = Path(value)
    try:
        return model_digest(path) if path.is_dir() else sha256_file(path) if path.is_file() else None
    except OSError:  # no text for a path, or a file that the library may not read either
        return None


def check_backend(backend: Backend) -> None:
    """Raises :class:`UserError` where the backend is not installed, or cannot be run as asked."""
    require("lm_eval", "scipy", field="remit evaluate")
    if backend.name == "vllm" and not is_installed("vllm"):
        raise UserError("--backend", "vllm, which is not installed", "an environment of its own: docs/evaluation.md")
    if backend.name == "hf" and backend.dtype != "auto":
        import torch

        if not isinstance(getattr(torch, backend.dtype, None), torch.dtype):
            raise UserError("--dtype", backend.dtype, "auto, float32, bfloat16 or float16")
    if backend.batch_size != "auto" and not (backend.batch_size.isdigit() and int(backend.batch_size)):
        raise UserError("--batch-size", backend.batch_size, "auto, or 1 or more")


def load(directory: Path, backend: Backend) -> Any:
    """An lm-eval ``LM`` of a Hugging Face directory.

    Raises:
        UserError: its files or the arguments are not such that it can be loaded, in the library's own words; or it
            would be loaded as another model than its files say.
    """
    import torch

    check_whole(directory, field=f"MODEL {directory}", any_kind=True)
    exact_float32()
    arguments: dict[str, Any] = {"pretrained": str(directory), "dtype": backend.dtype, **dict(backend.arguments)}
    if backend.max_length:
        positions = _positions(directory)
        if positions is not None and backend.max_length > positions:
            raise UserError("--max-length", backend.max_length, f"at most {positions}, the positions of {directory}")
        arguments["max_length"] = backend.max_length
    gpu = torch.cuda.is_available()
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if gpu and backend.name == "hf" and world > torch.cuda.device_count():
        raise UserError("--nproc", world, f"at most {torch.cuda.device_count()}, one process for each GPU")
    if world > 1 and not gpu:
        os.environ["ACCELERATE_USE_CPU"] = "true"  # else accelerate sees one process where it sees no GPU
    batch = backend.batch_size
    if backend.name == "vllm" and backend.nproc > 1:
        arguments["data_parallel_size"] = backend.nproc
    device = "cuda" if gpu else "cpu"
    on_cpu = backend.name == "hf" and not gpu
    first = "1" if on_cpu and batch == "auto" else batch
    extra = {"batch_size": first, "max_batch_size": None if backend.name == "vllm" else 64, "device": device}
    try:
        model: Any = _class(backend.name, on_cpu).create_from_arg_obj(arguments, extra)
    except Exception as error:  # whatever the library's classes make of these files and arguments
        given = " ".join(f"--model-arg {name}={value}" for name, value in backend.arguments)
        expected = "a directory that transformers loads" + (f" with {given}" if given else "")
        raise UserError(f"MODEL {directory}", show_error(error), expected) from error
    if on_cpu:
        model.find_batch = batch == "auto"
    if backend.name == "hf" and world > 1:
        # lm-eval takes its place among the processes from the number of GPUs.
        model._rank, model._world_size = model.accelerator.process_index, model.accelerator.num_processes
        if batch == "auto" and gpu:
            # It would look for the size in each task, all processes together; one that has its answers is not there.
            model.batch_size_per_gpu = model._detect_batch_size()
    return model


def _positions(directory: Path) -> int | None:
    """Of a model, where its config.json says so; what is wrong with the file is for the library to say."""
    try:
        found = json.loads((directory / "config.json").read_text()).get("max_position_embeddings")
    except (OSError, ValueError, AttributeError):
        return None
    return found if isinstance(found, int) else None


def _class(backend: str, on_cpu: bool) -> Any:
    from lm_eval.api.registry import get_model

    if not on_cpu:
        return get_model(backend)
    from remit_megatron.evaluation.cpu_lm import CpuLM

    return CpuLM


class Watched:
    """An lm-eval model with a cache and with progress lines, for one task after the other.

    Args:
        terminal: where progress goes; standard error itself is sent elsewhere while lm-eval works.
    """

    def __init__(self, model: Any, cache: RequestCache, terminal: TextIO):
        self._terminal = terminal
        self.model = model
        self.cache = cache
        self.label = ""
        loaded = getattr(model, "model", None)
        cache.broken = _watch_logits(loaded)
        self._rows = _rows(loaded)
        through_cache(model, cache, progress=self._progress)

    @property
    def dtype(self) -> str | None:
        """Of the weights as they are computed with (``float32``); None where the backend does not say."""
        dtype = getattr(getattr(self.model, "model", None), "dtype", None)
        return None if dtype is None else str(dtype).removeprefix("torch.")

    def count_cut(self, tasks: dict[str, Any]) -> int:
        """Items whose prompt is longer than what the model takes; lm-eval drops its beginning: the first shots.

        Args:
            tasks: lm-eval's task objects after their requests were built.

        Raises:
            UserError: a task that generates more tokens than the model has positions, or tokens that the model has no
                row for.
        """
        model = self.model
        cut = set()
        for name, task in tasks.items():
            for instance in task.instances:
                room = model.max_length
                if task.OUTPUT_TYPE == "generate_until":
                    tokens = int((instance.args[1] or {}).get("max_gen_toks", model.max_gen_toks))
                    room -= tokens
                    if room <= 0:
                        raise UserError(
                            f"task {name}: max_gen_toks",
                            f"{tokens}, with a model of {model.max_length} positions",
                            "generation: {max_gen_toks: …} in the suite, below that",
                        )
                    ids = model.tok_encode(instance.args[0])
                    length = len(ids)
                else:
                    ids = model.tok_encode("".join(instance.args))
                    length = len(ids) - 1
                self._refuse_unknown(ids, f"task {name} item {instance.doc_id}")
                # What is rolled over is taken in windows, whole.
                if length > room and task.OUTPUT_TYPE != "loglikelihood_rolling":
                    cut.add((name, instance.doc_id))
        return len(cut)

    def _refuse_unknown(self, ids: Sequence[int], place: str) -> None:
        if self._rows is not None and max(ids, default=0) >= self._rows:
            expected = f"below {self._rows}, the rows of the model's embedding"
            raise UserError(place, f"ids up to {max(ids)}", expected)

    def _progress(self, method: str, left: list[Any]) -> Any:
        if not left or self.model.rank != 0:
            return lambda: None
        progress = Progress(self.label, total=len(left), unit="requests", interval=10.0, stream=self._terminal)
        done = 0

        def step() -> None:
            nonlocal done
            done += 1
            progress.update(done)
            if done == len(left):
                progress.finish()

        return step


def _rows(model: Any) -> int | None:
    """Rows of a model's embedding; None where the backend does not show it."""
    embedding = model.get_input_embeddings() if hasattr(model, "get_input_embeddings") else None
    weight = getattr(embedding, "weight", None)
    return None if weight is None else int(weight.shape[0])


def _watch_logits(model: Any) -> Callable[[], bool]:
    """Whether a model has given a logit at the end of a sequence that is no number or infinite, from now on.

    A text that is made of such logits looks like any other. Of positions before the end some may be padding.
    """
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    if head is None:
        return lambda: False
    found: list[Any] = []

    def watch(_module: Any, _inputs: Any, logits: Any) -> None:
        bad = ~(logits[..., -1, :] < math.inf).all()  # stays on the device
        found[:] = [bad | found[0] if found else bad]

    head.register_forward_hook(watch)
    return lambda: bool(found) and bool(found[0])


def _version(package: str) -> str | None:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(package)
    except PackageNotFoundError:
        return None
