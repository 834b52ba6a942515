"""Kept answers: of the right model only, and whole ones only."""

from __future__ import annotations

import contextlib
import math
from types import SimpleNamespace
from typing import Any

import pytest

from remit_megatron.evaluation import lm
from remit_megatron.evaluation.request_cache import RequestCache, through_cache
from remit_megatron.evaluation.runner import _cache_folder
from remit_megatron.runtime.errors import UserError

GREEDY = {"until": ["\n"], "do_sample": False}


class Model:
    """Answers with the number of requests it has seen; told to die, it does after some of them."""

    rank, world_size = 0, 1

    def __init__(self, dies_after: int | None = None):
        self.asked: list[Any] = []
        self._dies_after = dies_after

    def set_cache_hook(self, hook: Any) -> None:
        self.hook = hook

    def _answer(self, method: str, requests: list[Any], answer: Any) -> list[Any]:
        given = []
        for request in requests:
            if self._dies_after is not None and len(self.asked) >= self._dies_after:
                raise KeyboardInterrupt
            self.asked.append(request.args)
            given.append(answer(len(self.asked)))
            self.hook.add_partial(method, request.args, given[-1])
        return given

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        return self._answer("generate_until", requests, lambda n: f"answer {n}")

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        return self._answer("loglikelihood", requests, lambda n: (-n / 3, n % 2 == 0))

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        return self._answer("loglikelihood_rolling", requests, lambda n: -n / 7)


def ask(model: Model, folder: Any, method: str, arguments: list[tuple]) -> list[Any]:
    cache = RequestCache(folder)
    through_cache(model, cache, progress=lambda method, left: lambda: None)
    try:
        return getattr(model, method)([SimpleNamespace(args=item) for item in arguments])
    finally:
        cache.close()


def test_a_stopped_evaluation_goes_on_where_it_was(tmp_path):
    requests = [(f"prompt {i}", GREEDY) for i in range(10)]
    stopped = Model(dies_after=4)
    with contextlib.suppress(KeyboardInterrupt):
        ask(stopped, tmp_path, "generate_until", requests)
    again = Model()
    answers = ask(again, tmp_path, "generate_until", requests)
    assert again.asked == requests[4:]
    assert answers[:4] == [f"answer {n}" for n in range(1, 5)] and answers[4:] == [f"answer {n}" for n in range(1, 7)]
    third = Model()
    assert ask(third, tmp_path, "generate_until", requests) == answers and third.asked == []


def test_numbers_come_back_to_the_last_bit(tmp_path):
    requests = [("context", f" choice {i}") for i in range(5)]
    first = ask(Model(), tmp_path, "loglikelihood", requests)
    assert ask(Model(), tmp_path, "loglikelihood", requests) == first
    assert all(isinstance(answer, tuple) for answer in first)


def test_half_a_line_and_a_damaged_one_are_asked_again(tmp_path):
    requests = [(f"prompt {i}", GREEDY) for i in range(3)]
    ask(Model(), tmp_path, "generate_until", requests)
    path = tmp_path / "rank_0.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(lines[0] + lines[1].replace(b"answer 2", b"answer 9") + lines[2][:-9])
    again = Model()
    ask(again, tmp_path, "generate_until", requests)
    assert again.asked == requests[1:]
    last = Model()
    ask(last, tmp_path, "generate_until", requests)
    assert last.asked == []


def test_sampled_answers_are_not_kept(tmp_path):
    requests = [("prompt", {"do_sample": True, "temperature": 1.0})]
    ask(Model(), tmp_path, "generate_until", requests)
    again = Model()
    ask(again, tmp_path, "generate_until", requests)
    assert again.asked == requests


def test_another_setting_of_the_prompt_or_the_model_is_another_answer(tmp_path):
    ask(Model(), tmp_path / "a", "generate_until", [("prompt", GREEDY)])
    longer = Model()
    ask(longer, tmp_path / "a", "generate_until", [("prompt", {**GREEDY, "max_gen_toks": 9})])
    assert len(longer.asked) == 1
    request: Any = SimpleNamespace(cache=tmp_path)
    folders = {
        _cache_folder(request, {"model": digest, **lm.Backend(dtype=dtype, max_length=length).identity()})
        for digest in ("x", "y")
        for dtype in ("auto", "float32")
        for length in (None, 128)
    }
    assert len(folders) == 8


def test_answers_are_of_the_files_that_an_argument_names(tmp_path):
    """An adapter that was trained on, a tokenizer that was changed: under the same path they are others."""
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_model.safetensors").write_bytes(b"a")
    arguments = (("peft", str(adapter)), ("trust_remote_code", "False"))
    before = lm.Backend(arguments=arguments).identity()
    assert before == lm.Backend(arguments=arguments).identity() and list(before["argument_files"]) == ["peft"]
    (adapter / "adapter_model.safetensors").write_bytes(b"b")
    assert lm.Backend(arguments=arguments).identity() != before
    assert "argument_files" not in lm.Backend(arguments=(("parallelize", "False"),)).identity()


@pytest.mark.parametrize("method", ["loglikelihood", "loglikelihood_rolling"])
def test_an_answer_that_is_no_number_is_refused(tmp_path, method):
    """It would be ranked among others as if it was one, and every accuracy be that of the first choice."""

    class Broken(Model):
        def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
            return self._answer("loglikelihood", requests, lambda n: (math.nan if n == 3 else -1.0, False))

        def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
            return self._answer("loglikelihood_rolling", requests, lambda n: math.nan if n == 3 else -1.0)

    requests = [(f"context {number}", " answer") for number in range(5)]
    with pytest.raises(UserError, match=r"MODEL: found a log-probability of nan of \('context 2'"):
        ask(Broken(), tmp_path, method, requests)
    good = Model()
    ask(good, tmp_path, method, requests)
    assert len(good.asked) == 3, "what was whole is kept, the other is not"
