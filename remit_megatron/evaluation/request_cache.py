"""Answers of a model that are kept as they come: a killed evaluation goes on where it was.

One file per rank of JSON lines, appended to. The folder's name holds the model's digest and whatever else decides an
answer; lm-eval's own cache knows requests only, and would hand one model's answers to another of the same path.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from remit_megatron.runtime.errors import UserError, show

METHODS = ("loglikelihood", "loglikelihood_rolling", "generate_until")


def request_key(method: str, arguments: Any) -> str:
    """SHA-256 of a request: the method, the prompt as the model gets it, the generation settings."""
    return hashlib.sha256(json.dumps([method, *arguments], sort_keys=True).encode()).hexdigest()


class RequestCache:
    """The kept answers of one model under one setting.

    Args:
        folder: of these answers; created.
        rank: which file this process appends to. All files are read.

    Attributes:
        broken: whether the model has given logits that are not numbers; asked before an answer is kept.
    """

    broken: Callable[[], bool] = staticmethod(lambda: False)

    def __init__(self, folder: Path, *, rank: int = 0):
        folder.mkdir(parents=True, exist_ok=True)
        self._answers: dict[str, Any] = {}
        for path in sorted(folder.glob("rank_*.jsonl")):
            self._read(path)
        path = folder / f"rank_{rank}.jsonl"
        self._file = open(path, "ab")  # noqa: SIM115 - open as long as the evaluation
        if self._file.tell() and not path.read_bytes().endswith(b"\n"):
            self._file.write(b"\n")  # a killed process left half a line

    def _read(self, path: Path) -> None:
        for line in path.read_bytes().splitlines():
            try:
                check, key, answer = json.loads(line)
            except (ValueError, TypeError):
                continue  # cut off by a kill; the request is made again
            if check == _checksum(key, answer):
                self._answers[key] = answer

    def __len__(self) -> int:
        return len(self._answers)

    def close(self) -> None:
        """Makes all answers durable."""
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()

    def add(self, method: str, arguments: Any, answer: Any) -> None:
        """Keeps one answer: in the file before the next one is made.

        Raises:
            UserError: it is no number, which would be ranked among others as if it was, or was made from none.
        """
        value = answer[0] if isinstance(answer, tuple | list) else answer
        nan = isinstance(value, float) and math.isnan(value)
        if nan or (isinstance(value, str) and self.broken()):
            found = f"a log-probability of {value}" if nan else f"{show(value)} from logits that are not finite,"
            expected = "a model that gives numbers (its weights may not be)"
            raise UserError("MODEL", f"{found} of {show(arguments)}", expected)
        if _random(arguments):
            return
        key = request_key(method, arguments)
        if key in self._answers:
            return
        answer = list(answer) if isinstance(answer, tuple) else answer
        self._answers[key] = answer
        self._file.write(json.dumps([_checksum(key, answer), key, answer]).encode() + b"\n")
        self._file.flush()

    def get(self, method: str, arguments: Any) -> Any:
        """The answer, or None."""
        if _random(arguments):
            return None
        answer = self._answers.get(request_key(method, arguments))
        return tuple(answer) if isinstance(answer, list) else answer


def through_cache(model: Any, cache: RequestCache, *, progress: Callable[[str, list[Any]], Callable[[], None]]) -> None:
    """Makes an lm-eval model ask the cache first and keep every answer at once.

    Args:
        model: an lm-eval ``LM``; its three methods are replaced on this object.
        progress: told the method and the requests that are left; returns what to call after each answer.
    """
    # Windows of a long text are padded to the same number on all processes, which must all be there.
    for method in METHODS if model.world_size == 1 else [name for name in METHODS if name != "loglikelihood_rolling"]:
        setattr(model, method, _cached(model, method, getattr(model, method), cache, progress))


def _cached(model: Any, method: str, ask: Callable, cache: RequestCache, progress: Callable) -> Callable:
    def answer(requests: list[Any], disable_tqdm: bool = True) -> list[Any]:
        answers = [cache.get(method, request.args) for request in requests]
        left = [request for request, known in zip(requests, answers, strict=True) if known is None]
        step = progress(method, left)
        hook = _Hook(cache, step)
        model.set_cache_hook(hook)
        new = iter(ask(left, disable_tqdm=True) if left else [])
        for position, known in enumerate(answers):
            if known is None:
                answers[position] = next(new)
                cache.add(method, requests[position].args, answers[position])
        return answers

    return answer


class _Hook:
    """What lm-eval's models call with each answer, as soon as they have it."""

    def __init__(self, cache: RequestCache, step: Callable[[], None]):
        self._cache, self._step = cache, step

    def add_partial(self, method: str, arguments: Any, answer: Any) -> None:
        self._cache.add(method, arguments, answer)
        self._step()


def _random(arguments: Any) -> bool:
    """Whether the same request may be answered differently: sampling."""
    return any(isinstance(value, dict) and value.get("do_sample") for value in arguments)


def _checksum(key: str, answer: Any) -> int:
    return zlib.crc32(json.dumps([key, answer]).encode())
