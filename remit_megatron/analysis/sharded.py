"""Two models on several ranks: ``remit logprobs`` runs them through Megatron, sharded, in processes of its own.

For models that one process cannot hold. What it gives of each token is enough for the heatmap, for the divergence over
the full vocabulary and for bits per byte; ranks and total variation need both models' logits in one place.
"""

from __future__ import annotations

import json
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from remit_megatron.analysis.texts import TokenizedText
from remit_megatron.runtime.errors import EXIT_BAD_INPUT, UserError
from remit_megatron.runtime.exported import HuggingFaceModel, run_remit


@dataclass(frozen=True)
class Layout:
    """Ranks of this machine that models are spread over.

    Attributes:
        tp, pp: tensor and pipeline parallel sizes.
        nproc: processes, a multiple of TP x PP; None for so many.
    """

    tp: int = 1
    pp: int = 1
    nproc: int | None = None

    @property
    def alone(self) -> bool:
        """Whether that is one process, which needs no Megatron."""
        return (self.nproc or self.tp * self.pp) == 1


class PairScores(NamedTuple):
    """Of one text's predictions; [s - 1] float32, in nats."""

    logprob: Tensor  # of the model
    reference_logprob: Tensor
    kl: Tensor  # KL(reference || model) over the whole vocabulary


def pair_scores(
    model: HuggingFaceModel, reference: HuggingFaceModel, texts: list[TokenizedText], layout: Layout, *, dtype: str
) -> list[PairScores]:
    """Scores of both models, for each text.

    Raises:
        UserError: what ``remit logprobs`` refuses; or a text that was cut (``--max-tokens``) has other tokens then.
    """
    with tempfile.TemporaryDirectory(prefix="remit_analyze_") as folder:
        source, target = Path(folder) / "texts.jsonl", Path(folder) / "scores.jsonl"
        source.write_text("".join(json.dumps({"text": "".join(text.pieces)}) + "\n" for text in texts))
        words = ["logprobs", "--hf", str(model.path), "--reference", str(reference.path), "--dtype", dtype]
        words += ["--input", str(source), "--output", str(target), "--tp", str(layout.tp), "--pp", str(layout.pp)]
        code, lines = run_remit([*words, "--nproc", str(layout.nproc or layout.tp * layout.pp)])
        if code == EXIT_BAD_INPUT:
            raise UserError("remit logprobs", lines[-1].removeprefix("error: "), "models and a layout that it takes")
        if code:
            raise RuntimeError(f"remit logprobs ended with {code}:\n" + "\n".join(lines[-20:]))
        records = [json.loads(line) for line in target.read_text(encoding="utf-8").split("\n") if line]
    for text, record in zip(texts, records, strict=True):
        if record["token_ids"] != text.ids:
            raise UserError("--max-tokens", f"a cut that changes the tokens of line {text.line}", "no cut on ranks")
    columns = ("logprobs", "reference_logprobs", "kl")
    return [PairScores(*(torch.tensor(record[name][1:]) for name in columns)) for record in records]
