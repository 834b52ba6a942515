"""Tiny post-training runs: data, models, and runs in a forked child that is killed where a test wants it."""

from __future__ import annotations

import json
import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.tiny import make_llama, make_tokenizer

TINY_MODEL: dict[str, Any] = {"num_hidden_layers": 1, "hidden_size": 32, "intermediate_size": 48, "head_dim": 8}


def make_tiny(directory: Path, **changes: Any) -> Path:
    """A one-layer Llama with a tokenizer of characters."""
    tokenizer = make_tokenizer(directory / "tokenizer")
    return make_llama(directory / "model", seed=3, tokenizer=tokenizer, **(TINY_MODEL | changes))


def write_lines(path: Path, lines: list[dict[str, Any]]) -> Path:
    """JSON lines."""
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def sums(count: int, seed: int = 0) -> list[tuple[str, str]]:
    """Problems and answers: ``3+4=`` and ``7``; the last digit only."""
    generator = random.Random(seed)
    pairs = [(generator.randint(0, 9), generator.randint(0, 9)) for _ in range(count)]
    return [(f"{a}+{b}=", str((a + b) % 10)) for a, b in pairs]


def lines_of(stage: str, count: int = 12) -> list[dict[str, Any]]:
    """Lines of a stage about the sums."""
    if stage == "sft":
        return [{"prompt": problem, "completion": answer} for problem, answer in sums(count)]
    if stage == "dpo":
        return [
            {"prompt": problem, "chosen": answer, "rejected": str((int(answer) + 3) % 10)}
            for problem, answer in sums(count)
        ]
    return [{"prompt": problem, "answer": answer} for problem, answer in sums(count)]


def content_of(stage: str, model: Path, folder: Path, **trl: Any) -> dict[str, Any]:
    """What the YAML file of a tiny run would say."""
    data = write_lines(folder / f"{stage}.jsonl", lines_of(stage))
    arguments = {
        "learning_rate": 1e-2,
        "max_steps": 8,
        "per_device_train_batch_size": 4,
        "gradient_checkpointing": False,
    }
    if stage == "rlvr":
        arguments |= {"num_generations": 4, "max_completion_length": 3, "per_device_train_batch_size": 16}
    return {
        "model": str(model),
        "run_dir": str(folder / "run"),
        "data": {"train": [str(data)]},
        "chat_template": "none",
        "trl": arguments | trl,
        "seed": 5,
        **({"verifier": "number_at_end"} if stage == "rlvr" else {}),
    }


def in_child(function: Callable[[], int]) -> int:
    """Runs ``function`` in a fork of this process; its result, or 128 + the number of the signal that ended it.

    The child has what this process has imported, and takes no time to start.
    """
    return ended(start_child(function))


def start_child(function: Callable[[], int]) -> int:
    """Starts ``function`` in a fork of this process; returns its process number."""
    import torch

    torch.set_num_threads(1)  # a fork has none of the threads of its parent
    child = os.fork()
    if child == 0:
        code = 99
        signal.signal(signal.SIGHUP, signal.SIG_DFL)  # under nohup it is ignored, and stays so in whoever is started
        try:
            code = function()
        except BaseException:
            import traceback

            traceback.print_exc()
        finally:
            os._exit(code)
    return child


def ended(child: int) -> int:
    """Waits for a child; its exit code, or 128 + the number of the signal that ended it."""
    _, status = os.waitpid(child, 0)
    return 128 + os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status)


def run_content(content: dict[str, Any], stage: str, before: Callable[[], None] | None = None) -> int:
    """A whole run of TRL in a child; ``before`` is called in it first."""
    from remit_megatron.posttrain import trl_engine
    from remit_megatron.posttrain.configuration import settings_of

    def work() -> int:
        if before is not None:
            before()
        return trl_engine.run(settings_of(content, stage=stage))

    return in_child(work)


def killed_from_outside(content: dict[str, Any], stage: str, *, step: int, seconds: float) -> int:
    """Starts a run and kills it ``seconds`` after it has written the figures of ``step``; returns how it ended."""
    from remit_megatron.posttrain import trl_engine
    from remit_megatron.posttrain.configuration import settings_of

    metrics = Path(content["run_dir"]) / "metrics.jsonl"
    child = start_child(lambda: trl_engine.run(settings_of(content, stage=stage)))
    deadline = time.monotonic() + 300
    while not metrics.exists() or f'"iteration": {step},' not in metrics.read_text():
        assert time.monotonic() < deadline
        time.sleep(0.002)
    time.sleep(seconds)
    os.kill(child, signal.SIGKILL)  # where it has ended it is not waited for yet, and nothing happens
    return ended(child)


def killed_in(step: int, *, where: str, number: int = signal.SIGKILL) -> Callable[[], None]:
    """Makes the run kill its own process in ``step``: before it, after it, or while it saves.

    Args:
        where: ``begin``, ``end`` or ``save``.
    """

    def arrange() -> None:
        from remit_megatron.posttrain import trl_callbacks, trl_trainers

        def kill() -> None:
            os.kill(os.getpid(), number)

        if where == "save":
            original = trl_trainers.describe_files

            def describe(directory: Path) -> Any:
                if directory.name == f"checkpoint-{step}":
                    kill()
                return original(directory)

            trl_trainers.describe_files = describe
            return
        name = {"begin": "on_step_begin", "end": "on_step_end"}[where]
        method = getattr(trl_callbacks.MetricsWriter, name, None)

        def hook(self: Any, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == step:
                kill()
            if method is not None:
                method(self, args, state, control, **kwargs)

        setattr(trl_callbacks.MetricsWriter, name, hook)

    return arrange


def metrics_of(run_dir: Path) -> list[dict[str, Any]]:
    """Lines of metrics.jsonl without what a clock said."""
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name != "step_seconds"} for line in lines]
