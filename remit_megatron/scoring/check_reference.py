"""``remit check reference``: student and reference over held-out text and a suite, before a run follows the one."""

from __future__ import annotations

import dataclasses
import json
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from remit_megatron.conversion.processes import process_groups
from remit_megatron.conversion.source import ModelSource
from remit_megatron.data.blend import parse_blend
from remit_megatron.models.batch import document_ids_of
from remit_megatron.models.forward import Item, ModelForward
from remit_megatron.objectives import token_weights
from remit_megatron.reference.cached import whole_scores
from remit_megatron.reference.live import LiveReference
from remit_megatron.run.checks import read_suite
from remit_megatron.run.configuration import ObjectiveConfig, RunConfig
from remit_megatron.run.prepare import Prepared
from remit_megatron.run.samples import check_document_ends, open_datasets
from remit_megatron.runtime import parallel
from remit_megatron.runtime.errors import EXIT_DONE, DoNotRestart, UserError
from remit_megatron.runtime.files import write_atomic
from remit_megatron.runtime.progress import Progress
from remit_megatron.scoring.batches import round_size, score_samples
from remit_megatron.scoring.command import forward_layout, prepare_forward
from remit_megatron.scoring.finite import Scored
from remit_megatron.scoring.guidance import Difference, TextGuidance, compare_text, mean_difference, verdict
from remit_megatron.scoring.requests import EncodedSuite, RequestScorer, encode_suite

_MODELS = ("student", "reference")


@dataclasses.dataclass(frozen=True)
class TaskDifference:
    """A task of the suite: both scores, and the difference in the direction in which the reference is ahead."""

    task: str
    metric: str
    student: float
    reference: float
    difference: Difference


def check_reference(config: RunConfig, *, samples: int, output: str | None = None) -> int:
    """Compares on this rank (start it on all ranks of the job); rank 0 prints. Returns the exit code.

    Args:
        config: the run. Its ``init`` is the student, ``data.valid`` the text (``data.train`` where there is none) of
            which those tokens count that count in the run, ``evaluation`` the suite, ``objective`` gives epsilon and
            centering.
        samples: of the text, each a sequence of the run.
        output: JSON file that receives all figures.

    Raises:
        UserError: the input is wrong.
        DoNotRestart: one of the models gives losses that are not finite.
    """
    if config.init is None:
        raise UserError("init", "nothing", "the student that is compared")
    text = dataclasses.replace(config.data, train=config.data.valid or config.data.train, valid=[])
    environment = parallel.rank_environment()
    prepared = prepare_forward(
        dataclasses.replace(config, data=text), world_size=environment.world_size, rank=environment.rank
    )
    assert prepared.init is not None and prepared.reference is not None
    with process_groups(**forward_layout(prepared.arguments)) as groups:
        with parallel.same_fate("looking for the ends of documents"):
            # What is prepared is a job that scores, and knows nothing of the objective.
            prefixes = [entry.prefix for entry in parse_blend(text.train, field="data.train")]
            check_document_ends(dataclasses.replace(config, data=text), prefixes, prepared.tokenizer)
        comparison = _Comparison(prepared, config.objective, groups)
        guidance = comparison.text(samples, environment)
        tasks = comparison.suite() if config.evaluation is not None else []
    if environment.rank == 0:
        sentence = verdict(guidance, [task.difference for task in tasks], held_out=bool(config.data.valid))
        source = (
            "data.valid" if config.data.valid else "data.train (there is no data.valid: this text is the corpus's own)"
        )
        sys.stdout.write(_table(guidance, tasks, source=source) + sentence + "\n")
        if output is not None:
            record = {
                "text": guidance.record(),
                "source": source,
                "tasks": [dataclasses.asdict(task) for task in tasks],
            }
            write_atomic(Path(output), json.dumps(record | {"verdict": sentence}, indent=2) + "\n")
    return EXIT_DONE


class _Comparison:
    """Both models on this rank's part of the layout."""

    def __init__(self, prepared: Prepared, objective: ObjectiveConfig, groups: Any):
        logging.getLogger("megatron").setLevel(logging.ERROR)
        self._objective = objective  # the run's own; what is prepared is a job that scores
        self._prepared, self._groups, self._arguments = prepared, groups, prepared.arguments
        self._forward = ModelForward(
            eod_id=prepared.tokenizer.eod_id,
            groups=lambda: groups,
            document_mask=prepared.config.data.document_mask,
            packed_attention=prepared.arguments.transformer_impl == "transformer_engine",
        )
        self._suite: EncodedSuite | None = None
        if (settings := prepared.config.evaluation) is not None:
            with parallel.same_fate("reading the evaluation's requests"):
                self._suite = encode_suite(
                    read_suite(settings),
                    prepared.tokenizer,
                    sequence_length=prepared.arguments.seq_length,
                    vocab_size=prepared.hf_config["vocab_size"],
                )
        sources: tuple[ModelSource | None, ...] = (prepared.init, prepared.reference)
        self._models: list[LiveReference] = []
        for name, source in zip(_MODELS, sources, strict=True):
            assert source is not None
            with parallel.same_fate(f"loading the {name}"):
                self._models.append(LiveReference.load(source, self._arguments, forward=self._forward))

    def text(self, samples: int, environment: parallel.RankEnvironment) -> TextGuidance:
        """Figures of the held-out text; the same on every rank."""
        blend: Any = None
        for turn in (environment.rank == 0, environment.rank != 0):
            with parallel.same_fate("opening the data"):
                if turn:
                    blend, _ = open_datasets(self._prepared, samples)
        numbers = list(range(self._groups.dp.rank(), samples, self._groups.dp.size()))
        size = round_size(self._arguments)
        progress = Progress("compare", total=samples, unit="samples")
        found: dict[int, list[np.ndarray]] = {}
        for first in range(0, len(numbers), size):
            taken = numbers[first : first + size]
            scores = [self._losses(model, [blend[number] for number in taken]) for model in self._models]
            for number, *losses in zip(taken, *scores, strict=False):  # none but on the last stage
                found[number] = losses
            if environment.rank == 0:
                progress.update(min(samples, (first + size) * self._groups.dp.size()))
        if environment.rank == 0:
            progress.finish()
        leads = self._groups.tp.rank() == 0 and self._groups.cp.rank() == 0
        together: dict[int, list[np.ndarray]] = {}
        for part in parallel.gather_objects(found if leads else {}):
            together |= part
        items = [blend[number] for number in range(samples)]
        student, reference = (np.stack([together[number][model] for number in range(samples)]) for model in (0, 1))
        return self._figures(items, student, reference)

    def _figures(self, items: Sequence[Item], student: np.ndarray, reference: np.ndarray) -> TextGuidance:
        tokens = torch.stack([torch.cat((item["tokens"], item["labels"][-1:])) for item in items])
        mask = torch.stack([item["loss_mask"] for item in items])
        self._refuse_not_finite(mask.numpy() > 0, student, reference)
        documents = document_ids_of(tokens[:, :-1], self._prepared.tokenizer.eod_id)
        objective = self._objective
        weights = token_weights(
            torch.from_numpy(student),
            torch.from_numpy(reference),
            mask,
            epsilon=objective.epsilon,
            centering=objective.centering,
            document_ids=documents,
        )
        arrays = (weights.numpy(), (mask > 0).numpy(), documents.numpy(), tokens.numpy())
        return compare_text(student, reference, *arrays, epsilon=objective.epsilon, seed=self._prepared.config.seed)

    def _refuse_not_finite(self, counted: np.ndarray, student: np.ndarray, reference: np.ndarray) -> None:
        """Of the student no loss may be missing, of the reference as many as a run allows; on all ranks alike."""
        settings = self._prepared.config.reference
        assert settings is not None
        total = int(counted.sum())
        for name, losses, limit in (("init", student, 0.0), ("reference.checkpoint", reference, settings.max_dropped)):
            found = Scored(total, int((counted & ~np.isfinite(losses)).sum()))
            if found.share > limit:
                raise DoNotRestart(f"{name}: found {found}; expected at most {limit:.2%}")

    def _losses(self, model: LiveReference, items: Sequence[Item]) -> list[np.ndarray]:
        """[s] float32 losses of each item on the last stage; nothing before it."""
        scores = score_samples(model, items, self._arguments, chunks=len(model.chunks))
        return [row.float().cpu().numpy() for score in whole_scores(scores, self._groups) for row in score]

    def suite(self) -> list[TaskDifference]:
        """Figures of the configuration's suite; the same on every rank."""
        assert self._suite is not None
        vocab_size = self._prepared.hf_config["vocab_size"]
        scorer = RequestScorer(self._suite, self._arguments, groups=lambda: self._groups, vocab_size=vocab_size)
        scores = [scorer.questions(scorer.logprobs(model.chunks)) for model in self._models]
        found = []
        for task in self._suite.suite.tasks:
            student, reference = (np.array([score["score"] for score in of[task.name]]) for of in scores)
            gain = student - reference if task.metric == "bits_per_byte" else reference - student
            difference = mean_difference(gain, np.arange(len(gain)), seed=self._prepared.config.seed)
            means = float(student.mean()), float(reference.mean())
            found.append(TaskDifference(task.name, task.metric, *means, difference))
        return found


def _table(text: TextGuidance, tasks: Sequence[TaskDifference], *, source: str) -> str:
    loss = text.loss_difference
    rows = [
        ("text", f"{source}: {text.tokens:,} tokens of {text.documents:,} documents"),
        ("loss of the student", f"{text.student_loss:.4f} nats a token"),
        ("loss of the reference", f"{text.reference_loss:.4f}"),
        ("reference ahead by", f"{loss.value:.4f} [{loss.low:.4f}, {loss.high:.4f}] (95%, documents resampled)"),
        ("tokens where it is ahead", f"{text.tokens_ahead:.1%}"),
        ("spread of the weights", f"{text.weight_std:.4f}, {text.clipped:.1%} at the clip"),
        ("of it reproducible", f"{text.signal:.1%} by kind of token, alike in both halves of the documents"),
    ]
    for task in tasks:
        gain = task.difference
        figures = f"student {task.student:.4f}, reference {task.reference:.4f}, ahead by {gain.value:.4f}"
        rows.append((task.task, f"{figures} [{gain.low:.4f}, {gain.high:.4f}] ({task.metric})"))
    width = max(len(name) for name, _ in rows)
    return "".join(f"{name:<{width}}  {value}\n" for name, value in rows)
