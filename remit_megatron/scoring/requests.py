"""Requests of an evaluation through a model on any layout: no generation, no export, the run's own forward pass.

Requests are laid end to end in rows of the run's sequence length, each a document of its own that attention does not
leave, so that a row wastes little. Where documents cannot be kept apart (Transformer Engine under context parallelism,
or with several sequences per pipeline microbatch) a row holds one request. Replicas share the rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from remit_megatron.data.special_tokens import own_special_tokens
from remit_megatron.data.tokenizer import Tokenizer
from remit_megatron.evaluation.requests import RequestSuite, requests_of, score_question, summarize
from remit_megatron.models.forward import Item, ModelForward
from remit_megatron.reference.cached import whole_scores
from remit_megatron.reference.live import LiveReference
from remit_megatron.runtime import parallel
from remit_megatron.runtime.errors import DoNotRestart, UserError
from remit_megatron.runtime.progress import Progress
from remit_megatron.scoring.batches import round_size, score_samples


@dataclass(frozen=True)
class EncodedRequest:
    """A request as tokens.

    Attributes:
        tokens: context and continuation, its beginning cut where it is longer than the model's sequence.
        counted: how many of them, at the end, are the continuation's.
    """

    tokens: tuple[int, ...]
    counted: int


@dataclass(frozen=True)
class Row:
    """Requests laid end to end, padded on the right.

    Attributes:
        item: ``tokens``, ``labels``, ``document_ids`` [s] int64 and ``loss_mask`` [s] float32 (1 at continuations).
        places: (number of the request, first and last + 1 position of its continuation in ``labels``).
    """

    item: Item
    places: tuple[tuple[int, int, int], ...]


@dataclass
class EncodedSuite:
    """A suite in a run's tokens: what is scored, and where the answers of each question are."""

    suite: RequestSuite
    requests: list[EncodedRequest]
    cut: int  # requests whose beginning did not fit


def encode_suite(suite: RequestSuite, tokenizer: Tokenizer, *, sequence_length: int, vocab_size: int) -> EncodedSuite:
    """Encodes every request: context and continuation each by itself, after what the tokenizer puts before a text.

    Args:
        vocab_size: rows of the model's embedding.

    Raises:
        UserError: a continuation alone is longer than a sequence, or gives no token; or the model has no row for one.
    """
    around = own_special_tokens(tokenizer)
    before = () if around is None else around.before
    requests, cut = [], 0
    for task in suite.tasks:
        asked = [choice for question in task.questions for choice in requests_of(question)]
        contexts = tokenizer.encode_batch([choice.context for choice in asked])
        continuations = tokenizer.encode_batch([choice.continuation for choice in asked])
        for choice, context, continuation in zip(asked, contexts, continuations, strict=True):
            if not 0 < len(continuation) <= sequence_length:
                expected = f"1 to {sequence_length} (megatron.seq_length)"
                raise UserError(f"{task.name}: {choice.continuation[:40]!r}", f"{len(continuation)} tokens", expected)
            tokens = [*before, *context, *continuation]
            if len(tokens) == len(continuation):
                raise UserError(task.name, "a request without context", "one token or more before the answer")
            if max(tokens) >= vocab_size:
                expected = f"below {vocab_size}, the rows of the model's embedding"
                raise UserError(f"{task.name}: {choice.continuation[:40]!r}", f"ids up to {max(tokens)}", expected)
            cut += len(tokens) > sequence_length + 1
            requests.append(EncodedRequest(tuple(tokens[-sequence_length - 1 :]), len(continuation)))
    return EncodedSuite(suite, requests, cut)


def lay_out(requests: Sequence[EncodedRequest], *, sequence_length: int, together: bool) -> list[Row]:
    """Requests to rows, longest first, each into the first row that has room (or each into a row of its own)."""
    order = sorted(range(len(requests)), key=lambda number: (-len(requests[number].tokens), number))
    rows: list[list[int]] = []
    room: list[int] = []
    open_from = 0  # rows before it are full: a short request must not look at all of them
    for number in order:
        length = len(requests[number].tokens) - 1
        candidates = range(open_from, len(rows)) if together else ()
        row = next((index for index in candidates if room[index] >= length), None)
        if row is None:
            rows.append([])
            room.append(sequence_length)
            row = len(rows) - 1
        rows[row].append(number)
        room[row] -= length
        while open_from < len(rows) and room[open_from] < len(requests[order[-1]].tokens) - 1:
            open_from += 1
    return [_row(requests, numbers, sequence_length) for numbers in rows]


def _row(requests: Sequence[EncodedRequest], numbers: Sequence[int], sequence_length: int) -> Row:
    tokens, labels, documents = (torch.zeros(sequence_length, dtype=torch.int64) for _ in range(3))
    mask = torch.zeros(sequence_length)
    places, start = [], 0
    for document, number in enumerate(numbers):
        ids = torch.tensor(requests[number].tokens)
        end = start + len(ids) - 1
        tokens[start:end], labels[start:end], documents[start:end] = ids[:-1], ids[1:], document
        first = end - requests[number].counted
        mask[first:end] = 1.0
        places.append((number, first, end))
        start = end
    documents[start:] = len(numbers)  # padding is a document that nothing else sees
    item = {"tokens": tokens, "labels": labels, "loss_mask": mask, "document_ids": documents}
    return Row(item, tuple(places))


class RequestScorer:
    """Scores an encoded suite with whatever model it is given; collective over all ranks of the job.

    Args:
        encoded: of :func:`encode_suite`, the same on every rank.
        arguments: Megatron's: layout, sequence length, micro-batch size, kind of layers.
        groups: gives Megatron's process groups, once they exist.
        vocab_size: true size of the vocabulary.
    """

    def __init__(self, encoded: EncodedSuite, arguments: Any, *, groups: Callable[[], Any], vocab_size: int):
        self.encoded, self._arguments = encoded, arguments
        self._groups, self._vocab_size = groups, vocab_size
        packed = arguments.transformer_impl == "transformer_engine"
        alone = arguments.context_parallel_size > 1 or (
            arguments.pipeline_model_parallel_size > 1 and arguments.micro_batch_size > 1
        )
        together = not (packed and alone)
        self._forward = ModelForward(
            eod_id=-1, groups=groups, document_mask=together, packed_attention=packed and together
        )
        self._rows = lay_out(encoded.requests, sequence_length=arguments.seq_length, together=together)

    def logprobs(self, chunks: Sequence[torch.nn.Module]) -> list[float]:
        """Log-probability (natural) of each request's continuation, on every rank.

        Args:
            chunks: the model's chunks on this rank, in evaluation mode.

        Raises:
            DoNotRestart: one of them is not finite; on all ranks.
        """
        groups = self._groups()
        model = LiveReference(chunks, vocab_size=self._vocab_size, forward=self._forward)
        share = self._rows[groups.dp.rank() :: groups.dp.size()]
        found: dict[int, float] = {}
        size = round_size(self._arguments)
        # Most take seconds and show nothing; one of minutes is not silent.
        progress = Progress("evaluation", total=len(share), unit="rows", interval=10.0, delay=10.0)
        for first in range(0, len(share), size):
            rows = share[first : first + size]
            scores = score_samples(model, [row.item for row in rows], self._arguments, chunks=len(chunks))
            losses = [row for score in whole_scores(scores, groups) for row in score]  # none but on the last stage
            for row, loss in zip(rows, losses, strict=False):
                sums = _sums(loss, row)
                found.update(zip((number for number, _, _ in row.places), sums, strict=True))
            if dist.get_rank() == 0:  # the other replicas are about as far
                progress.update(first + len(rows))
        progress.end()
        leads = groups.pp.rank() == groups.pp.size() - 1 and groups.tp.rank() == 0 and groups.cp.rank() == 0
        together: dict[int, float] = {}
        for part in parallel.gather_objects(found if leads else {}):
            together |= part
        values = [together[number] for number in range(len(self.encoded.requests))]
        if not all(map(math.isfinite, values)):
            bad = sum(not math.isfinite(value) for value in values)
            raise DoNotRestart(
                f"evaluation: {bad} of {len(values)} log-probabilities are not finite; the model's weights, or what it "
                "computes with them, are broken, and the same start would find the same"
            )
        return values

    def questions(self, logprobs: Sequence[float]) -> dict[str, list[dict[str, float]]]:
        """:func:`score_question` of each question of each task, in their order."""
        found, start = {}, 0
        for task in self.encoded.suite.tasks:
            scores = found[task.name] = []
            for question in task.questions:
                end = start + len(requests_of(question))
                lengths = [request.counted for request in self.encoded.requests[start:end]]
                scores.append(score_question(question, logprobs[start:end], lengths, metric=task.metric))
                start = end
        return found

    def results(self, logprobs: Sequence[float]) -> dict[str, dict[str, Any]]:
        """Figures of each task: ``score``, ``stderr``, ``bits_per_byte``, ``items``, ``metric``, ``shots``."""
        scores = self.questions(logprobs)
        return {
            task.name: {**summarize(scores[task.name]), "metric": task.metric, "shots": task.shots}
            for task in self.encoded.suite.tasks
        }


def _sums(losses: Tensor, row: Row) -> list[float]:
    """Log-probability of each continuation of a row, summed in float64 in one transfer from the device."""
    ends = losses.double().cumsum(0)
    starts = torch.cat((ends.new_zeros(1), ends))
    bounds = torch.tensor([(first, end) for _, first, end in row.places], device=losses.device)
    return (starts[bounds[:, 0]] - starts[bounds[:, 1]]).tolist()
