"""Token heatmap of log p_reference - log p_student: what the reference would have the student listen to (Figures 3, 10
and 11 of the paper)."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from remit_megatron.analysis.models import TextModel, bits_per_byte, name_of, open_sources, tokenized
from remit_megatron.analysis.parts import PART_SUFFIX, Heatmap, Part, Table, Text, finite, number, to_json
from remit_megatron.analysis.sharded import Layout, pair_scores
from remit_megatron.analysis.texts import TokenizedText
from remit_megatron.objectives import token_weights
from remit_megatron.runtime.exported import HuggingFaceModel
from remit_megatron.runtime.files import temporary_sibling, write_atomic
from remit_megatron.runtime.progress import Progress

# Tokens in the part for a report, which has room for so many; heatmap.html and heatmap.jsonl hold all.
PART_TOKENS = 2500
_ALONE = Layout()


def heatmap(
    *,
    student: str,
    reference: str,
    input_path: str,
    output: Path,
    text_key: str = "text",
    max_texts: int | None = None,
    max_tokens: int | None = None,
    dtype: str = "fp32",
    epsilon: float | None = 0.2,
    layout: Layout = _ALONE,
) -> dict[str, Any]:
    """Writes heatmap.jsonl, heatmap.html, heatmap.png, heatmap.json (a summary) and heatmap.part.json.

    Args:
        layout: ranks that the models are spread over, through Megatron.

    Returns:
        the summary.

    Raises:
        UserError: a model or the input cannot be used.
    """
    from remit_megatron.analysis.png import picture
    from remit_megatron.analysis.report.page import standalone

    sources = open_sources([("--student", student), ("--reference", reference)])
    texts = tokenized(sources, input_path, text_key=text_key, max_texts=max_texts, max_tokens=max_tokens)
    scores = _scores(sources, texts, layout, dtype)
    progress = Progress("heatmap", total=sum(len(text.ids) for text in texts), unit="tokens")
    records, done = [], 0
    with temporary_sibling(output / "heatmap.jsonl") as temporary, open(temporary, "w", encoding="utf-8") as stream:
        for text, (student_logprob, reference_logprob) in zip(texts, scores, strict=True):
            records.append(_record(student_logprob, reference_logprob, epsilon))
            stream.write(json.dumps(_line(text, records[-1]), ensure_ascii=False) + "\n")
            done += len(text.ids)
            progress.update(done)
    progress.finish()
    summary = {**_summary(texts, records, [name_of(source) for source in sources]), "epsilon": epsilon}
    part = _part(texts, records, summary, tokens=PART_TOKENS)
    whole = _part(texts, records, summary, tokens=None)
    write_atomic(output / "heatmap.json", json.dumps(finite(summary), indent=1, ensure_ascii=False) + "\n")
    write_atomic(output / "heatmap.png", picture(part))
    write_atomic(output / f"heatmap{PART_SUFFIX}", to_json(part))
    write_atomic(output / "heatmap.html", standalone(whole))
    return summary


def _scores(
    sources: list[HuggingFaceModel], texts: list[TokenizedText], layout: Layout, dtype: str
) -> Iterator[tuple[Tensor, Tensor]]:
    """[s - 1] log-probabilities of student and reference, text by text."""
    if not layout.alone:
        pairs = pair_scores(sources[0], sources[1], texts, layout, dtype=dtype)
        yield from ((pair.logprob, pair.reference_logprob) for pair in pairs)
        return
    models = [TextModel(s, field=f, dtype=dtype) for s, f in zip(sources, ("--student", "--reference"), strict=True)]
    for text in texts:
        yield models[0].logprobs(text.ids), models[1].logprobs(text.ids)


def _record(student: Tensor, reference: Tensor, epsilon: float | None) -> dict[str, list[float | None]]:
    """Per token: log-probabilities, their difference, and the weight that the objective would give it."""
    delta = reference - student
    mask = torch.ones(1, len(delta))
    weight = token_weights(-student.unsqueeze(0), -reference.unsqueeze(0), mask, epsilon=epsilon).squeeze(0)
    columns = {"delta": delta, "student": student, "reference": reference, "weight": weight}
    return {name: [None, *values.tolist()] for name, values in columns.items()}


def _line(text: TokenizedText, record: dict[str, list[float | None]]) -> dict[str, Any]:
    return {"tokens": text.tokens, "delta": record["delta"], "token_ids": text.ids, **_rest(record)}


def _rest(record: dict[str, list[float | None]]) -> dict[str, list[float | None]]:
    return {name: values for name, values in record.items() if name != "delta"}


def _summary(
    texts: list[TokenizedText], records: list[dict[str, list[float | None]]], names: list[str]
) -> dict[str, Any]:
    delta = torch.tensor([v for record in records for v in record["delta"] if v is not None], dtype=torch.float64)
    sums = {who: sum(v for record in records for v in record[who] if v is not None) for who in ("student", "reference")}
    return {
        "student": names[0],
        "reference": names[1],
        "texts": len(texts),
        "tokens": len(delta),
        "delta_mean": float(delta.mean()),
        "delta_std": float(delta.std(correction=0)),
        "reference_ahead": float((delta > 0).double().mean()),
        "student_bits_per_byte": bits_per_byte(sums["student"], texts),
        "reference_bits_per_byte": bits_per_byte(sums["reference"], texts),
    }


def _part(
    texts: list[TokenizedText],
    records: list[dict[str, list[float | None]]],
    summary: dict[str, Any],
    *,
    tokens: int | None,
) -> Part:
    shown, count = [], 0
    for text, record in zip(texts, records, strict=True):
        if tokens is not None and shown and count + len(text.ids) > tokens:
            break
        room = len(text.ids) if tokens is None else tokens - count
        shown.append({"pieces": text.pieces[:room], **{name: values[:room] for name, values in record.items()}})
        count += len(shown[-1]["pieces"])
    left = sum(len(text.ids) for text in texts) - count
    note = f"{len(shown)} of {len(texts)} texts; all of them are in heatmap.html" if left else ""
    table = Table(
        ["", "bits per byte"],
        [
            [f"student: {summary['student']}", number(summary["student_bits_per_byte"])],
            [f"reference: {summary['reference']}", number(summary["reference_bits_per_byte"])],
        ],
    )
    return Part(
        "heatmap",
        "What the reference finds more likely",
        f"log p of the reference less log p of the student, {summary['tokens']} tokens of {summary['texts']} texts: "
        f"mean {summary['delta_mean']:+.4f}, standard deviation {summary['delta_std']:.4f} nats; the reference is "
        f"ahead on {100 * summary['reference_ahead']:.1f}% of the tokens.",
        [
            Text(
                "Blue tokens are likelier under the reference and weigh more in training, red ones weigh less. Hover "
                f"or tap for the numbers; w is the weight of the remit objective (epsilon {summary['epsilon']}, each "
                "text a sequence)."
            ),
            Heatmap(shown, note),
            table,
        ],
    )
