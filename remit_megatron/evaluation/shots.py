"""What an item really is and gets: read once, its worked examples counted in the prompts, not read from a setting."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from remit_megatron.evaluation.task_files import Planned, Splits, splits_of
from remit_megatron.runtime.errors import UserError

# Prompts that are looked at. Every item of a task gets as many shots as any other.
_LOOKED_AT = 3


@contextmanager
def read_anew() -> Iterator[None]:
    """While tasks are loaded, `datasets` takes nothing from its cache of processed items.

    A task that shuffles choices with a generator of its own (GPQA) would draw other orders where some of its steps come
    from the cache: other prompts for a second model, or after a kill.
    """
    import datasets

    enabled = datasets.is_caching_enabled()
    datasets.disable_caching()
    try:
        yield
    finally:
        if enabled:
            datasets.enable_caching()


def hold_items(task: Any) -> None:
    """Makes a task keep its items as they were first read.

    lm-eval 0.4.13 processes them again each time it looks: GPQA's choices are shuffled once for the prompts and once
    more for the scoring, which then looks for the right answer in another place.
    """
    items = task.eval_docs
    setattr(task, "test_docs" if task.has_test_docs() else "validation_docs", lambda: items)


def check_shots(planned: Planned, tasks: dict[str, Any]) -> None:
    """Counts the examples in the first prompts of each task and compares with what was asked for.

    Also sees to it that no item is its own example, where examples come from the items.

    Args:
        tasks: lm-eval's task objects of the entry, by name.

    Raises:
        UserError: another number; or items that could be their own examples.
    """
    for leaf in planned.leaves:
        task = tasks[leaf.name]
        found = effective_shots(task)
        if found != planned.shots:
            raise UserError(
                f"task {leaf.name}: shots", f"{found} in its prompts", f"{planned.shots}, as the suite says"
            )
        splits = splits_of(leaf, planned.shots)
        if splits.shared:
            _never_its_own_example(planned, task, splits)


def effective_shots(task: Any) -> int:
    """Examples in the prompts of a task, counted as answers before the question (all of the first prompts agree)."""
    counts: set[int] = set()

    def count(messages: list[dict[str, str]], **_: object) -> str:
        if any(not str(message["content"]).strip() for message in messages if message["role"] == "assistant"):
            raise UserError(f"task {task.config.task}: shots", "an example without an answer", "examples with answers")
        counts.add(sum(message["role"] == "assistant" for message in messages))
        return ""

    if task.OUTPUT_TYPE == "loglikelihood_rolling":
        return 0
    documents = task.eval_docs
    for position in range(min(_LOOKED_AT, len(documents))):
        task.fewshot_context(
            documents[position],
            num_fewshot=task.config.num_fewshot or 0,
            apply_chat_template=True,
            fewshot_as_multiturn=True,
            chat_template=count,
        )
    if len(counts) != 1:
        raise UserError(f"task {task.config.task}: shots", f"{sorted(counts)}", "the same number for every item")
    return counts.pop()


def _never_its_own_example(planned: Planned, task: Any, splits: Splits) -> None:
    """lm-eval leaves out the example that equals the item. Where reading the data changes items at random, none does
    (GPQA shuffles its choices): then a column that tells them apart takes the place of equality."""
    from lm_eval.api.samplers import ContextSampler

    key = planned.entry.item_key
    items, examples = list(task.eval_docs), list(task.sampler.df)
    if key is None:
        if items != examples:
            raise UserError(
                f"task {task.config.task}",
                f"examples from the evaluated split ({splits.items}), which changes each time it is read",
                "item_key in the suite, a column that tells its items apart",
            )
        return
    if absent := [name for name in (key,) if name not in items[0]]:
        raise UserError(f"task {task.config.task}: item_key", absent[0], f"one of {', '.join(sorted(items[0]))}")

    class OtherItems(ContextSampler):
        """Examples at random among all items but the one that is asked."""

        def sample(self, n: int, eval_doc: Any = None, df: Any = None, **_: Any) -> Any:
            pool = [document for document in self.fewshot_docs() if eval_doc is None or document[key] != eval_doc[key]]
            return self.rnd.sample(pool, n)

    task.sampler = OtherItems(examples)
