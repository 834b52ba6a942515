"""``remit logprobs``: log-probability of every token of a text, through Megatron, on any tensor and pipeline layout.

Lines are taken in windows; inside a window, texts of similar length share a microbatch, padded on the right, where
causal attention does not see it. A window goes through the pipeline schedule at once. Data-parallel replicas share its
microbatches.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from remit_megatron.conversion.source import ModelSource
from remit_megatron.data.readers import BadRecord, TextFormat, iter_chunks, parse_chunk
from remit_megatron.runtime.errors import UserError
from remit_megatron.runtime.files import temporary_sibling
from remit_megatron.runtime.progress import Progress

if TYPE_CHECKING:
    from torch import Tensor

    from remit_megatron.data.tokenizer import Tokenizer

type Head = Callable[[Tensor, Any, Tensor, Tensor, Any], Tensor]

_WINDOW_LINES = 2048
IGNORED = -100  # label of a position that is not scored


@dataclass(frozen=True)
class Microbatch:
    """Texts of similar length.

    Attributes:
        lines: position of each text in its window.
        tokens: [b, s] int64, each text without its last token, padded on the right.
        labels: [b, s] int64, each text without its first token; -100 where padded.
    """

    lines: tuple[int, ...]
    tokens: Tensor
    labels: Tensor


def microbatches(texts: Sequence[Sequence[int]], *, batch_tokens: int) -> list[Microbatch]:
    """Groups token ids by length into microbatches of at most ``batch_tokens`` padded positions (or one text).

    Texts of fewer than two tokens have nothing to predict and are left out.
    """
    import torch

    batches: list[Microbatch] = []
    order = sorted((i for i, ids in enumerate(texts) if len(ids) > 1), key=lambda i: len(texts[i]), reverse=True)
    while order:
        length = len(texts[order[0]]) - 1
        taken = max(1, batch_tokens // length)
        lines, order = order[:taken], order[taken:]
        tokens = torch.zeros(len(lines), length, dtype=torch.int64)
        labels = torch.full((len(lines), length), IGNORED, dtype=torch.int64)
        for row, line in enumerate(lines):
            ids = torch.tensor(texts[line], dtype=torch.int64)
            tokens[row, : len(ids) - 1] = ids[:-1]
            labels[row, : len(ids) - 1] = ids[1:]
        batches.append(Microbatch(tuple(lines), tokens, labels))
    return batches


def score_file(
    source: ModelSource,
    input_path: str | Path,
    output_path: str | Path,
    *,
    reference: ModelSource | None = None,
    tp: int = 1,
    pp: int = 1,
    dtype: str = "fp32",
    batch_tokens: int = 8192,
) -> None:
    """Writes ``token_ids``, ``tokens`` and ``logprobs`` (natural log; the first is null) for each line; whole or not at
    all. With a reference also ``reference_logprobs`` and ``kl``, KL(reference || model) over the whole vocabulary.

    Runs on every rank of the layout; rank 0 writes.

    Raises:
        UserError: a line that is not ``{"text": ...}``, a text longer than the model, a layout that does not fit, a
            reference of other tokens, or a model that gives log-probabilities that are not finite.
    """
    from remit_megatron.conversion.processes import process_groups
    from remit_megatron.data.tokenizer import load_tokenizer
    from remit_megatron.models.build import megatron_arguments
    from remit_megatron.runtime.parallel import gather_objects, rank_environment
    from remit_megatron.scoring.pairs import PairScorer

    sources = [source] if reference is None else [source, reference]
    assert all(one.tokenizer is not None for one in sources)
    tokenizer, *others = [load_tokenizer(one.tokenizer) for one in sources if one.tokenizer is not None]
    vocab_sizes = [int(one.hf_config["vocab_size"]) for one in sources]
    if len(set(vocab_sizes)) > 1:
        raise UserError("--reference", f"a vocabulary of {vocab_sizes[1]}", f"{vocab_sizes[0]}, as {source.path} has")
    _refuse_unknown_ids(tokenizer, Path(input_path), vocab_sizes[0])
    longest = min(megatron_arguments(one.hf_config)["max_position_embeddings"] for one in sources)
    writer = rank_environment().rank == 0
    with process_groups(tensor_model_parallel_size=tp, pipeline_model_parallel_size=pp) as groups:
        scorers = [Scorer(one, groups, tp=tp, pp=pp, dtype=dtype) for one in sources]
        scorer: Any = scorers[0] if reference is None else PairScorer(*scorers)
        progress = Progress("logprobs", total=Path(input_path).stat().st_size, unit="B")
        target = temporary_sibling(output_path) if writer else nullcontext("/dev/null")
        with target as temporary, open(temporary, "w", encoding="utf-8") as stream:
            for window, done in _windows(Path(input_path)):
                texts = tokenizer.encode_batch([text for _, text in window])
                for other in others:
                    _refuse_other_tokens(window, texts, other, input_path)
                _refuse_long(window, texts, longest, input_path)
                scored = scorer.score(microbatches(texts, batch_tokens=batch_tokens))
                parts: dict[int, list[list[float]]] = {}
                for part in gather_objects(scored):
                    parts |= {line: values if reference is not None else [values] for line, values in part.items()}
                for number, one in enumerate(sources):
                    _refuse_not_finite(window, {line: v[number] for line, v in parts.items()}, input_path, one)
                if writer:
                    for line, ids in enumerate(texts):
                        columns = parts.get(line, [[] for _ in range(2 * len(sources) - 1)])
                        stream.write(_record(ids, tokenizer, columns) + "\n")
                    progress.update(done)
        if writer:
            progress.finish()


def _record(ids: Sequence[int], tokenizer: Tokenizer, columns: Sequence[Sequence[float]]) -> str:
    record: dict[str, Any] = {"token_ids": list(ids), "tokens": [tokenizer.token(i) for i in ids]}
    for name, values in zip(("logprobs", "reference_logprobs", "kl"), columns, strict=False):
        assert len(values) == max(0, len(ids) - 1)
        record[name] = [None, *values] if ids else []
    return json.dumps(record, ensure_ascii=False, allow_nan=False)


def _windows(path: Path) -> Iterator[tuple[list[tuple[int, str]], int]]:
    """Windows of (line number, text), each with the bytes read so far."""
    lines = _lines(path)
    while window := list(islice(lines, _WINDOW_LINES)):
        yield [(number, text) for number, text, _ in window], window[-1][2]


def _lines(path: Path) -> Iterator[tuple[int, str, int]]:
    """Line number, text, and the bytes read so far, by the rules of `remit data build`. Only there a blank line is
    passed over: here it would move every line of the output behind it."""
    text_format = TextFormat(allow_empty=True, hint="")
    before = 0
    for chunk in iter_chunks([str(path)], fields=text_format.fields):
        for number, text in parse_chunk(chunk, text_format):
            if number > before + 1:
                raise UserError(f"{path}:{before + 1}", "a blank line", 'a line like {"text": "..."}')
            if isinstance(text, BadRecord):
                raise UserError(f"{path}:{number}", text.found, text.expected)
            before = number
            yield number, text, chunk.end


def _refuse_unknown_ids(tokenizer: Tokenizer, path: Path, rows: int) -> None:
    """Before the model is built; the texts are read for it only where the tokenizer has more entries than that."""
    for window, _ in _windows(path) if tokenizer.vocab_size > rows else ():
        for (number, _), ids in zip(window, tokenizer.encode_batch([text for _, text in window]), strict=True):
            if max(ids, default=0) >= rows:
                expected = f"below {rows}, the rows of the model's embedding"
                raise UserError(f"{path}:{number}", f"ids up to {max(ids)}", expected)


def _refuse_long(
    window: Sequence[tuple[int, str]], texts: Sequence[Sequence[int]], longest: int, path: str | Path
) -> None:
    for (number, _), ids in zip(window, texts, strict=True):
        if len(ids) > longest:
            raise UserError(f"{path}:{number}", f"{len(ids)} tokens", f"at most {longest}, the model's positions")


def _refuse_other_tokens(
    window: Sequence[tuple[int, str]], texts: Sequence[Sequence[int]], tokenizer: Tokenizer, path: str | Path
) -> None:
    others = tokenizer.encode_batch([text for _, text in window])
    for (number, _), ids, other in zip(window, texts, others, strict=True):
        if list(ids) != list(other):
            raise UserError("--reference", f"other tokens of {path}:{number} than the model's", "the same tokens")


def _refuse_not_finite(
    window: Sequence[tuple[int, str]], logprobs: dict[int, list[float]], path: str | Path, source: ModelSource
) -> None:
    for line in sorted(logprobs):
        for place, value in enumerate(logprobs[line], start=1):
            if not math.isfinite(value):
                found = f"a log-probability of {value} at token {place} of {path}:{window[line][0]}"
                raise UserError(str(source.path), found, "a model that gives finite ones (its weights may not be)")


class Scorer:
    """A frozen model on this rank's part of the layout.

    Args:
        source: weights and config.json.
        groups: process groups of the layout.
        tp, pp: sizes of ``groups``.
        dtype: ``fp32`` or ``bf16``, of weights and activations; log-probabilities are float32 either way.
    """

    def __init__(self, source: ModelSource, groups: Any, *, tp: int, pp: int, dtype: str = "fp32"):
        import logging

        import torch

        from remit_megatron.conversion.loading import load_weights
        from remit_megatron.models.build import build_chunks, default_arguments, model_config
        from remit_megatron.runtime.parallel import device

        logging.getLogger("megatron").setLevel(logging.ERROR)
        arguments = default_arguments(
            tensor_model_parallel_size=tp,
            pipeline_model_parallel_size=pp,
            params_dtype={"fp32": torch.float32, "bf16": torch.bfloat16}[dtype],
            use_cpu_initialization=not torch.cuda.is_available(),
            # Rows of 16 bytes at a time on a GPU; padding never enters the softmax.
            make_vocab_size_divisible_by=64 if torch.cuda.is_available() else 1,
        )
        config = model_config(source.hf_config, arguments)
        config.transformer.variable_seq_lengths = True  # microbatches of a window have different shapes
        self.groups, self._device = groups, device()
        self.vocab_size: int = source.hf_config["vocab_size"]
        self._chunks: list[torch.nn.Module] = list(build_chunks(config, groups))
        load_weights(self._chunks, source)

    def score(self, batches: Sequence[Microbatch]) -> dict[int, list[float]]:
        """Log-probabilities of this replica's share of ``batches``, by line; empty on ranks that do not hold the head's
        result.

        Collective over the ranks of a replica.
        """
        share = list(batches[self.groups.dp.rank() :: self.groups.dp.size()])
        if not share:
            return {}
        results = self.run(share, [None] * len(share), self._logprobs)
        if self.groups.tp.rank() != 0:
            return {}  # the same numbers as rank 0
        scored: dict[int, list[float]] = {}
        for batch, logprob in zip(share, results, strict=False):  # no results except on the last stage
            for row, line in enumerate(batch.lines):
                counted = int((batch.labels[row] != IGNORED).sum())
                scored[line] = logprob[row, :counted].tolist()
        return scored

    def run(self, batches: Sequence[Microbatch], beside: Sequence[Any], head: Head) -> list[Tensor]:
        """Microbatches through the pipeline; collective over the ranks of a replica.

        Args:
            batches: the same on every rank of it; at least one.
            beside: what ``head`` gets with each of them.
            head: on the last stage, takes hidden states [s, b, h], the output layer, its weight of this rank, labels
                [b, s] and the entry of ``beside``.

        Returns:
            What ``head`` gave of each, float32 on the CPU; nothing before the last stage.
        """
        import torch
        from megatron.core.pipeline_parallel import get_forward_backward_func

        with torch.no_grad():
            return get_forward_backward_func()(
                forward_step_func=partial(self._forward, head),
                data_iterator=iter(zip(batches, beside, strict=True)),
                model=self._chunks[0],
                num_microbatches=len(batches),
                seq_length=1,  # the schedules exchange the true shapes
                micro_batch_size=1,
                forward_only=True,
                collect_non_loss_data=True,
            )

    def _forward(self, head: Head, batches: Iterator[tuple[Microbatch, Any]], model: Any) -> tuple[Tensor, Any]:
        """What the schedule calls: the head's result on the last stage, hidden states before it."""
        import torch

        batch, beside = next(batches)
        tokens, labels = batch.tokens.to(self._device), batch.labels.to(self._device)
        positions = torch.arange(tokens.shape[1], device=self._device).expand_as(tokens)

        def processor(*, hidden_states: Tensor, output_layer: Any, output_weight: Tensor | None, **_: Any) -> Tensor:
            weight = output_layer.weight if output_weight is None else output_weight
            return head(hidden_states, output_layer, weight, labels, beside)

        output = model(tokens, positions, None, output_processor=processor)
        return output, partial(_keep, output)

    def _logprobs(self, hidden: Tensor, output_layer: Any, weight: Tensor, labels: Tensor, _: Any) -> Tensor:
        """[b, s] float32."""
        from remit_megatron.kernels import token_logprob

        shared = dict(tp_group=self.groups.tp, vocab_size=self.vocab_size, ignore_index=IGNORED)
        return token_logprob(hidden, weight, labels.t(), **shared).t()


def _keep(output: Tensor, *_: Any, **__: Any) -> Tensor:
    return output.float().cpu()
