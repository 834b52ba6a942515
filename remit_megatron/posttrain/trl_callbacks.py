"""What happens between the steps of a TRL run: figures, progress, signals, intermediate models."""

from __future__ import annotations

import json
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from transformers import TrainerCallback

from remit_megatron.runtime import stop
from remit_megatron.runtime.errors import DoNotRestart
from remit_megatron.runtime.files import write_atomic
from remit_megatron.runtime.parallel import leave_set_up_together, on_any_rank
from remit_megatron.runtime.progress import Progress, format_count

METRICS_FILE = "metrics.jsonl"
VALIDATION_FILE = "validation.jsonl"
# TRL's name -> ours; the other figures keep the names that TRL's documentation explains.
_NAMES = {"reward": "reward_mean", "completions/mean_length": "completion_length", "num_tokens": "consumed_tokens"}
_ORDER = (
    *("loss", "reward_mean", "reward_std", "completion_length", "learning_rate", "grad_norm"),
    *("step_seconds", "consumed_tokens"),
)
_LEFT_OUT = {"step_time", "num_input_tokens_seen", "total_flos"}
# Of fp16, as of a run of Megatron: one batch may overflow, ten do not.
_HOPELESS_STEPS = 10


class MetricsWriter(TrainerCallback):
    """A line of ``metrics.jsonl`` for every step, of ``validation.jsonl`` for every evaluation, and progress.

    Args:
        run_dir: where the files are; lines of steps after ``start`` are removed from them.
        label: what the progress line begins with.
        start: steps done before.
    """

    def __init__(self, run_dir: Path, *, label: str, start: int):
        self._run_dir, self._label, self._start = run_dir, label, start
        self._began = time.perf_counter()
        self._progress: Progress | None = None
        self._note = ""
        for name in (METRICS_FILE, VALIDATION_FILE):
            cut_after(run_dir / name, start)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Starts the step's clock."""
        self._began = time.perf_counter()

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """Takes TRL's figures of a step, or of an evaluation."""
        if not logs or "train_runtime" in logs:
            return
        evaluation = any(name.startswith("eval_") for name in logs)
        line: dict[str, Any] = {"iteration": state.global_step}
        named = {_NAMES.get(name, name): _number(value) for name, value in logs.items() if name not in _LEFT_OUT}
        if not evaluation:
            named["step_seconds"] = round(time.perf_counter() - self._began, 6)
            named.setdefault("consumed_tokens", state.num_input_tokens_seen)
            named["consumed_tokens"] = int(named["consumed_tokens"] or 0)
        line |= {name: named[name] for name in _ORDER if name in named}
        line |= {name: value for name, value in named.items() if name not in _ORDER}
        with open(self._run_dir / (VALIDATION_FILE if evaluation else METRICS_FILE), "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        if not evaluation:
            self._report(state, named)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The last line of progress."""
        if self._progress is not None:
            self._progress.finish(self._note)

    def _report(self, state: Any, named: dict[str, Any]) -> None:
        if self._progress is None:
            label = f"{self._label} from step {self._start}" if self._start else self._label
            self._progress = Progress(label, total=state.max_steps - self._start, unit="steps", interval=5.0)
        name = "reward_mean" if "reward_mean" in named else "loss"
        value = named.get(name)
        self._note = f"{name.removesuffix('_mean')} {'not finite' if value is None else f'{value:.4g}'}"
        self._note += f", {format_count(named['consumed_tokens'])} tokens"
        self._progress.update(state.global_step - self._start, self._note)


class StopOnSignal(TrainerCallback):
    """Saves and stops at the end of a step when any rank was asked to.

    Attributes:
        stopped: whether that has happened.
    """

    def __init__(self) -> None:
        self.stopped = False
        self._asked = False

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Takes the stop signals and SIGUSR1 while the block runs; outside of the main thread nothing can. Collective.

        Raises:
            StartAgain: a rank was asked to stop as the block was entered.
        """
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        leave_set_up_together()
        handlers = dict.fromkeys((signal.SIGUSR1, *stop.stop_signals()), self._ask)
        with stop.handled_by(handlers, to_the_end=True):
            yield

    def _ask(self, number: int, frame: FrameType | None) -> None:
        self._asked = True

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Agrees with the other ranks."""
        if on_any_rank(self._asked)[0] and state.global_step < state.max_steps:
            self.stopped = True
            control.should_save = control.should_training_stop = True


class StopWhereNotFinite(TrainerCallback):
    """Ends a run that has nothing left to save: its loss or its gradient is not finite, and so are its weights then.

    Stands behind the writer of the figures, and comes before a checkpoint is saved. Loss and norm are those of all
    ranks, which raise together.
    """

    def __init__(self) -> None:
        self._in_a_row = 0

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """Looks at TRL's figures of a step.

        Raises:
            DoNotRestart: they are not finite; with fp16, whose loss scale leaves such steps out, in ten steps.
        """
        if not logs or "loss" not in logs:
            return
        figures = {name: logs[name] for name in ("loss", "grad_norm") if isinstance(logs.get(name), float)}
        bad = next((name for name, value in figures.items() if not math.isfinite(value)), None)
        self._in_a_row = self._in_a_row + 1 if bad else 0
        if bad and self._in_a_row >= (_HOPELESS_STEPS if args.fp16 else 1):
            expected = "a finite one: model (its weights may not be finite), trl.learning_rate, data.train"
            raise DoNotRestart(f"step {state.global_step}: found {bad} {figures[bad]}; expected {expected}")


class ModelKeeper(TrainerCallback):
    """Writes the model every so many steps.

    Args:
        every: steps.
        write: writes the model of a step; called on every rank.
    """

    def __init__(self, every: int, write: Callable[[Any, int], None]):
        self._every, self._write = every, write

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Writes it where its turn has come."""
        if state.global_step % self._every == 0:
            self._write(model, state.global_step)


def learnt_nothing(run_dir: Path, *, entropy: bool) -> str | None:
    """What a run that is done has learnt nothing of; None where it has.

    As metrics.jsonl says, which has every step of the run, of before it was stopped too; without a figure, None.

    Args:
        entropy: whether the loss has a term of GRPO's that needs no rewards.
    """
    file = run_dir / METRICS_FILE
    lines = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()] if file.exists() else []

    def values(name: str) -> set[Any]:
        return {line[name] for line in lines if name in line}

    if values("frac_reward_zero_std") == {1.0} and not entropy:
        return (
            f"no group of completions with two different rewards in {len(lines)} steps; expected problems that the "
            "model solves at times (reward_mean in metrics.jsonl), and a verifier that fits them"
        )
    if values("grad_norm") == {0.0}:
        return f"a gradient of 0 in each of {len(lines)} steps; expected data with something to learn"
    return None


def cut_after(file: Path, step: int) -> None:
    """Removes the lines of steps after ``step``, and a last one that was not written to its end."""
    if not file.exists():
        return
    kept = []
    for line in file.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            if json.loads(line)["iteration"] <= step:
                kept.append(line + "\n")
        except (ValueError, KeyError, TypeError):
            continue
    write_atomic(file, "".join(kept))


def _number(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
