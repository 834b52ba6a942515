"""Which tokens weigh most, by text and by class, and how weights move over training: the method's own weights (Eq. 3 to
5) of real checkpoints on real text."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from remit_megatron.analysis.measure import Mean, mean_over_tokens
from remit_megatron.analysis.models import TextModel, name_of, open_sources, tokenized
from remit_megatron.analysis.parts import Bars, Block, Chart, Part, Series, Table, number, write_analysis
from remit_megatron.analysis.texts import CLASSES, TokenizedText
from remit_megatron.objectives import token_weights
from remit_megatron.runtime.errors import UserError
from remit_megatron.runtime.files import temporary_sibling
from remit_megatron.runtime.progress import Progress

_TOP = 15  # tokens in each list of the part; the data has all


def weights(
    *,
    models: list[str],
    reference: str,
    input_path: str,
    output: Path,
    text_key: str = "text",
    max_texts: int | None = None,
    max_tokens: int | None = None,
    dtype: str = "fp32",
    epsilon: float | None = 0.2,
    min_count: int = 5,
) -> dict[str, Any]:
    """Writes weights.json, weights.jsonl (per text: tokens, classes, weights under each model), .png, .part.json.

    Each text is a sequence of its own, over which the differences are centered.

    Args:
        models: checkpoints, in order of training.
        min_count: a token that occurs less often is in no list of heaviest or lightest.

    Raises:
        UserError: a model or the input cannot be used.
    """
    if epsilon is not None and not 0 <= epsilon <= 1:
        raise UserError("--epsilon", epsilon, "a number from 0 to 1, or none for no clip")
    sources = open_sources([*(("--student", path) for path in models), ("--reference", reference)])
    texts = tokenized(sources, input_path, text_key=text_key, max_texts=max_texts, max_tokens=max_tokens)
    names = [name_of(source) for source in sources]
    progress = Progress("weights", total=len(sources) * sum(len(text.ids) for text in texts), unit="tokens")
    done, found, reference_losses = 0, [], []
    for source in [sources[-1], *sources[:-1]]:
        model = TextModel(source, field="--reference" if source is sources[-1] else "--student", dtype=dtype)
        rows = []
        for position, text in enumerate(texts):
            loss = -model.logprobs(text.ids)
            if source is sources[-1]:
                reference_losses.append(loss)
            else:
                rows.append(_weigh(loss, reference_losses[position], epsilon))
            done += len(text.ids)
            progress.update(done)
        if source is not sources[-1]:
            found.append(rows)
        del model
    progress.finish()
    with temporary_sibling(output / "weights.jsonl") as temporary, open(temporary, "w", encoding="utf-8") as stream:
        for position, text in enumerate(texts):
            under_each = [[None, *rows[position][0].tolist()] for rows in found]
            line = {"tokens": text.tokens, "classes": text.classes, "weights": under_each}
            stream.write(json.dumps(line, ensure_ascii=False) + "\n")
    data = {
        "reference": names[-1],
        "epsilon": epsilon,
        "texts": len(texts),
        "models": [
            {"model": names[i], "iteration": sources[i].iteration, **_statistics(rows, texts, epsilon, min_count)}
            for i, rows in enumerate(found)
        ],
        "correlation_with_first": [_correlation(found[0], rows) for rows in found],
    }
    write_analysis(output, _part(data), data)
    return data


def _weigh(loss: Tensor, reference_loss: Tensor, epsilon: float | None) -> tuple[Tensor, Tensor]:
    """[s - 1] weights and differences of the losses of one text."""
    mask = torch.ones(1, len(loss))
    weight = token_weights(loss.unsqueeze(0), reference_loss.unsqueeze(0), mask, epsilon=epsilon)
    return weight.squeeze(0), loss - reference_loss


def _statistics(
    rows: list[tuple[Tensor, Tensor]], texts: list[TokenizedText], epsilon: float | None, min_count: int
) -> dict[str, Any]:
    flat = torch.cat([weight for weight, _ in rows]).double()
    low, high = (0.0, 2.0) if epsilon is None else (1 - epsilon, 1 + epsilon)
    sums: dict[str, list[float]] = {name: [] for name in CLASSES}
    counts: dict[str, list[int]] = {name: [] for name in CLASSES}
    by_token: dict[str, list[float]] = defaultdict(list)
    text_of: dict[str, str] = {}
    for text, (weight, _) in zip(texts, rows, strict=True):
        text_of |= zip(text.tokens, text.pieces, strict=True)
        by_class: dict[str, list[float]] = defaultdict(list)
        for kind, token, value in zip(text.classes[1:], text.tokens[1:], weight.tolist(), strict=True):
            by_class[kind].append(value)
            by_token[token].append(value)
        for name in CLASSES:
            sums[name].append(sum(by_class[name]))
            counts[name].append(len(by_class[name]))
    means = {name: mean_over_tokens(sums[name], counts[name]) for name in CLASSES}
    listed = sorted(
        (
            {"token": token, "text": text_of[token], "count": len(values), "weight": sum(values) / len(values)}
            for token, values in by_token.items()
            if len(values) >= min_count
        ),
        key=lambda row: -row["weight"],
    )
    edge = 1e-6
    return {
        "tokens": len(flat),
        "mean": float(flat.mean()),
        "std": float(flat.std(correction=0)),
        "at_lower_bound": float((flat <= low + edge).double().mean()),
        "at_upper_bound": float((flat >= high - edge).double().mean()),
        "delta_mean": float(torch.cat([delta for _, delta in rows]).double().mean()),
        "by_class": {name: mean._asdict() for name, mean in means.items() if mean.tokens},
        "by_token": listed,
    }


def _correlation(first: list[tuple[Tensor, Tensor]], other: list[tuple[Tensor, Tensor]]) -> float:
    pair = torch.stack([torch.cat([weight for weight, _ in rows]).double() for rows in (first, other)])
    return float(torch.corrcoef(pair)[0, 1]) if bool((pair.std(1) > 0).all()) else math.nan


def _part(data: dict[str, Any]) -> Part:
    last = data["models"][-1]
    kinds = {name: Mean(**mean) for name, mean in last["by_class"].items()}
    order = sorted(kinds, key=lambda name: -kinds[name].value)
    bars = Bars(
        f"Mean weight by class of token, {last['model']}",
        [f"{name} ({100 * kinds[name].tokens / last['tokens']:.0f}%)" for name in order],
        [kinds[name].value for name in order],
        baseline=1.0,
        low=[kinds[name].low for name in order],
        high=[kinds[name].high for name in order],
        note="In brackets the share of the tokens; whiskers are 95% intervals over texts.",
    )
    heavy, light = last["by_token"][:_TOP], last["by_token"][::-1][:_TOP]
    pairs = [
        [
            *(_cells(heavy[i]) if i < len(heavy) else ["", "", ""]),
            *(_cells(light[i]) if i < len(light) else ["", "", ""]),
        ]
        for i in range(max(len(heavy), len(light)))
    ]
    blocks: list[Block] = [bars, Table(["heaviest", "weight", "times", "lightest", "weight", "times"], pairs)]
    rows = [
        [
            model["model"],
            number(model["std"]),
            f"{100 * model['at_lower_bound']:.1f}%",
            f"{100 * model['at_upper_bound']:.1f}%",
            f"{model['delta_mean']:+.4f}",
            number(correlation, 3),
        ]
        for model, correlation in zip(data["models"], data["correlation_with_first"], strict=True)
    ]
    columns = ["student", "spread (std)", "at the lower bound", "at the upper bound", "mean Δ, nats"]
    blocks.append(Table([*columns, "correlation with the first"], rows))
    if len(data["models"]) > 1:
        x = [float(i + 1) for i in range(len(data["models"]))]
        series = [
            Series(name, x, [model["by_class"].get(name, {}).get("value") for model in data["models"]])
            for name in order
        ]
        blocks.insert(1, Chart("Mean weight by class over training", "checkpoint, in order", "weight", series))
    clip = "not clipped" if data["epsilon"] is None else f"epsilon {data['epsilon']}"
    summary = (
        f"Weights of the remit objective ({clip}) against {data['reference']}, {last['tokens']} tokens of "
        f"{data['texts']} texts, each text a sequence: standard deviation {last['std']:.4f}."
    )
    return Part("weights", "Which tokens weigh most", summary, blocks)


def _cells(row: dict[str, Any]) -> list[str]:
    shown = row["text"].replace(" ", "␣").replace("\n", "⏎").replace("\t", "⇥") or row["token"]
    return [shown, f"{row['weight']:.3f}", str(row["count"])]
