"""How far checkpoints are from each other and from the reference: distribution shift (Figure 2) and KL divergence over
the full vocabulary (Figure 6b).

Shift counts positions by where the other model's most likely token stands in the model's own order (the classes of Lin
et al., arXiv 2312.01552): first (unshifted), second or third (marginal), lower (shifted).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from remit_megatron.analysis.measure import Comparison, Mean, compare, mean_over_tokens
from remit_megatron.analysis.models import (
    TextModel,
    bits_per_byte,
    name_of,
    open_sources,
    require_same_vocabulary,
    tokenized,
)
from remit_megatron.analysis.parts import Block, Chart, Part, Series, Table, Text, number, write_analysis
from remit_megatron.analysis.sharded import Layout, pair_scores
from remit_megatron.analysis.texts import CLASSES, TokenizedText
from remit_megatron.runtime.exported import HuggingFaceModel
from remit_megatron.runtime.progress import Progress


class ShardedComparison(NamedTuple):
    """What of a :class:`Comparison` is known of models that are spread over ranks."""

    first_logprob: Tensor
    second_logprob: Tensor
    kl_first: Tensor
    kl_second: Tensor


# name -> what a comparison of (model, other) gives per token.
MEASURES: dict[str, Callable[[Any], Tensor]] = {
    "unshifted": lambda c: c.rank == 1,
    "marginal": lambda c: (c.rank == 2) | (c.rank == 3),
    "shifted": lambda c: c.rank > 3,
    "total_variation": lambda c: c.variation,
    "kl_from_model": lambda c: c.kl_first,
    "kl_to_model": lambda c: c.kl_second,
    "logprob_distance": lambda c: (c.second_logprob - c.first_logprob).abs(),
}


_ALONE = Layout()
# Of these, what two models that are spread over ranks say of each other.
SHARDED_MEASURES = ("kl_from_model", "kl_to_model", "logprob_distance")


class PairSums:
    """Sums of the measures of one pair of models, by text and by token class."""

    def __init__(self, measures: Iterable[str] = tuple(MEASURES)) -> None:
        self._by_text: dict[str, list[float]] = {name: [] for name in measures}
        self._by_class: dict[str, list[dict[str, float]]] = {name: [] for name in ("kl_from_model", "kl_to_model")}
        self._counts: list[int] = []
        self._class_counts: list[dict[str, int]] = []
        self.logprobs = [0.0, 0.0]

    def add(self, text: TokenizedText, comparison: Comparison | ShardedComparison) -> None:
        """Takes one text's comparison in."""
        self._counts.append(len(text.ids) - 1)
        self.logprobs[0] += float(comparison.first_logprob.double().sum())
        self.logprobs[1] += float(comparison.second_logprob.double().sum())
        classes = text.classes[1:]
        self._class_counts.append({name: classes.count(name) for name in CLASSES})
        for name in self._by_text:
            values = MEASURES[name](comparison).double()
            self._by_text[name].append(float(values.sum()))
            if name in self._by_class:
                sums = dict.fromkeys(CLASSES, 0.0)
                for kind, value in zip(classes, values.tolist(), strict=True):
                    sums[kind] += value
                self._by_class[name].append(sums)

    def mean(self, measure: str) -> Mean:
        """Over all tokens, with its interval over texts."""
        return mean_over_tokens(self._by_text[measure], self._counts)

    def class_mean(self, measure: str, kind: str) -> Mean:
        """The same over the tokens of one class."""
        return mean_over_tokens(
            [sums[kind] for sums in self._by_class[measure]], [counts[kind] for counts in self._class_counts]
        )

    def data(self) -> dict[str, Any]:
        """All means, and the two divergences by text and by class."""
        means = {name: self.mean(name)._asdict() for name in self._by_text}
        by_text = {name: self._by_text[name] for name in self._by_class}
        by_class = {
            name: {
                kind: self.class_mean(name, kind)._asdict() for kind in CLASSES if self.class_mean(name, kind).tokens
            }
            for name in self._by_class
        }
        return {"means": means, "sums_by_text": by_text, "tokens_by_text": self._counts, "by_class": by_class}


def shift(*, models: list[str], reference: str | None, input_path: str, output: Path, **options: Any) -> dict[str, Any]:
    """Compares each checkpoint with the one before it and with the reference; writes shift.json, .png, .part.json.

    Raises:
        UserError: a model or the input cannot be used, or vocabularies differ.
    """
    sources, texts = _inputs("--models", models, reference, input_path, options)
    found = _compare_all(sources, texts, has_reference=reference is not None, steps=True, label="shift", **_of(options))
    names = [name_of(source) for source in sources]
    data = {
        "reference": names[-1] if reference is not None else None,
        "texts": len(texts),
        "pairs": [
            {"model": names[i], "other": names[j], "iteration": sources[i].iteration, **sums.data()}
            for (i, j), sums in found.items()
        ],
    }
    write_analysis(output, _shift_part(found, names, texts, reference is not None), data)
    return data


def kl(
    *,
    models: list[str],
    reference: str,
    input_path: str,
    output: Path,
    layout: Layout = _ALONE,
    **options: Any,
) -> dict[str, Any]:
    """KL divergence of each model to the reference over the full vocabulary; writes kl.json, kl.png, kl.part.json.

    Args:
        layout: ranks that the models are spread over, through Megatron.

    Raises:
        UserError: a model or the input cannot be used, or vocabularies differ.
    """
    sources, texts = _inputs("--student", models, reference, input_path, options)
    if layout.alone:
        found = _compare_all(sources, texts, has_reference=True, steps=False, label="kl", **_of(options))
    else:
        found = _compare_sharded(sources, texts, layout, **_of(options))
    names = [name_of(source) for source in sources]
    data = {
        "reference": names[-1],
        "texts": len(texts),
        "models": [
            {
                "model": names[i],
                "iteration": sources[i].iteration,
                "bits_per_byte": bits_per_byte(sums.logprobs[0], texts),
                "reference_bits_per_byte": bits_per_byte(sums.logprobs[1], texts),
                "kl_reference_model": sums.mean("kl_to_model")._asdict(),
                "kl_model_reference": sums.mean("kl_from_model")._asdict(),
                **sums.data(),
            }
            for (i, _), sums in found.items()
        ],
    }
    write_analysis(output, _kl_part(found, names, texts), data)
    return data


def _inputs(
    option: str, models: list[str], reference: str | None, input_path: str, options: dict[str, Any]
) -> tuple[list[HuggingFaceModel], list[TokenizedText]]:
    named = [(option, path) for path in models]
    sources = open_sources(named if reference is None else [*named, ("--reference", reference)])
    reading = {name: options.get(name) for name in ("max_texts", "max_tokens")}
    return sources, tokenized(sources, input_path, text_key=options.get("text_key", "text"), **reading)


def _of(options: dict[str, Any]) -> dict[str, str]:
    return {"dtype": options.get("dtype", "fp32")}


def _compare_all(
    sources: list[HuggingFaceModel],
    texts: list[TokenizedText],
    *,
    has_reference: bool,
    steps: bool,
    label: str,
    dtype: str,
) -> dict[tuple[int, int], PairSums]:
    """Sums of (model, other) pairs by their positions in ``sources``; the reference is the last. At most three models
    are in memory at once.

    Args:
        steps: compare each model with the one before it, too.
    """
    last = len(sources) - has_reference
    reference = TextModel(sources[-1], field="--reference", dtype=dtype) if has_reference else None
    before: TextModel | None = None
    found: dict[tuple[int, int], PairSums] = {}
    size = sum(len(text.ids) for text in texts)
    progress = Progress(label, total=last * size, unit="tokens")
    for position in range(last):
        model = TextModel(sources[position], field=f"model {position + 1}", dtype=dtype)
        others = {}
        if before is not None:
            others[position - 1] = before
        if reference is not None:
            others[last] = reference
        for other in others.values():
            require_same_vocabulary(model, other)
        done = position * size
        for text in texts:
            own = model.hidden(text.ids) if others else None
            for index, other in others.items():
                assert own is not None
                result = compare(model, other, text.ids, hidden=(own, other.hidden(text.ids)))
                found.setdefault((position, index), PairSums()).add(text, result)
            done += len(text.ids)
            progress.update(done)
        before = model if steps else None
    progress.finish()
    return found


def _compare_sharded(
    sources: list[HuggingFaceModel], texts: list[TokenizedText], layout: Layout, *, dtype: str
) -> dict[tuple[int, int], PairSums]:
    """Sums of (model, reference) pairs; each pair is scored in both directions."""
    found = {}
    last = len(sources) - 1
    for position in range(last):
        sums = found[position, last] = PairSums(SHARDED_MEASURES)
        there = pair_scores(sources[position], sources[last], texts, layout, dtype=dtype)
        back = pair_scores(sources[last], sources[position], texts, layout, dtype=dtype)
        for text, one, other in zip(texts, there, back, strict=True):
            sums.add(text, ShardedComparison(one.logprob, one.reference_logprob, other.kl, one.kl))
    return found


def _shift_part(
    found: dict[tuple[int, int], PairSums], names: list[str], texts: list[TokenizedText], has_reference: bool
) -> Part:
    rows = []
    for (i, j), sums in found.items():
        shares = [f"{100 * sums.mean(name).value:.1f}%" for name in ("unshifted", "marginal", "shifted")]
        kl_mean, distance = sums.mean("kl_to_model"), sums.mean("logprob_distance")
        variation = sums.mean("total_variation")
        rows.append([names[i], names[j], *shares, number(variation.value), _with_half(kl_mean), number(distance.value)])
    columns = ["model", "compared with", "same first choice", "2nd or 3rd", "lower", "total variation"]
    columns += ["KL(other ‖ model), nats", "|Δ log p|"]
    blocks: list[Block] = [Table(columns, rows, note="± is half of the 95% interval over texts.")]
    to_reference = [(i, sums) for (i, j), sums in found.items() if has_reference and j == len(names) - 1]
    if len(to_reference) > 1:
        positions = [float(i + 1) for i, _ in to_reference]
        shares_of = {
            "same first choice": "unshifted",
            "2nd or 3rd": "marginal",
            "lower": "shifted",
        }
        series = [
            _series(label, positions, [s.mean(name) for _, s in to_reference]) for label, name in shares_of.items()
        ]
        blocks.insert(0, Chart("Where the reference's first choice stands", "checkpoint, in order", "share", series))
        distances = [_series("total variation", positions, [s.mean("total_variation") for _, s in to_reference])]
        blocks.insert(1, Chart("Distance to the reference", "checkpoint, in order", "total variation", distances))
    what = "the share of positions where the other model's most likely token is also the model's own."
    blocks.append(Text(f"“Same first choice” is {what}"))
    tokens = sum(len(text.ids) - 1 for text in texts)
    reach = f" and with {names[-1]}" if has_reference else ""
    summary = f"Each checkpoint compared with the one before{reach}, on {tokens} predictions of {len(texts)} texts."
    return Part("shift", "Distribution shift", summary, blocks)


def _kl_part(found: dict[tuple[int, int], PairSums], names: list[str], texts: list[TokenizedText]) -> Part:
    rows, by_class = [], []
    for (i, _), sums in found.items():
        bits = [number(bits_per_byte(value, texts)) for value in sums.logprobs]
        rows.append([names[i], _with_half(sums.mean("kl_to_model")), _with_half(sums.mean("kl_from_model")), *bits])
        means = [sums.class_mean("kl_to_model", kind) for kind in CLASSES]
        by_class.append([names[i], *(number(mean.value) if mean.tokens else "–" for mean in means)])
    columns = ["model", "KL(reference ‖ model)", "KL(model ‖ reference)", "bits per byte", "the reference's"]
    blocks: list[Block] = [
        Table(columns, rows, note="Nats per token; ± is half of the 95% interval over texts."),
        Table(["KL(reference ‖ model) by class", *CLASSES], by_class),
    ]
    if len(found) > 1:
        x = [float(i + 1) for i, _ in found]
        series = [
            _series("KL(reference ‖ model)", x, [sums.mean("kl_to_model") for sums in found.values()]),
            _series("KL(model ‖ reference)", x, [sums.mean("kl_from_model") for sums in found.values()]),
        ]
        blocks.insert(0, Chart("KL divergence to the reference", "model, in order", "nats per token", series))
    tokens = sum(len(text.ids) - 1 for text in texts)
    summary = f"Over the full vocabulary, to {names[-1]}, on {tokens} predictions of {len(texts)} texts."
    return Part("kl", "KL divergence to the reference", summary, blocks)


def _series(name: str, x: list[float], means: list[Mean]) -> Series:
    return Series(name, x, [m.value for m in means], [m.low for m in means], [m.high for m in means])


def _with_half(mean: Mean) -> str:
    # A divergence is not negative; that of models that agree is rounding of either sign.
    return f"{number(max(mean.value, 0.0))} ± {number(mean.half, 2)}"
