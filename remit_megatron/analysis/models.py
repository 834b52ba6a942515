"""Hugging Face models that say how likely each token of a text is; float32, never all logits at once."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Iterator
from typing import Any

import torch
import transformers
from torch import Tensor

from remit_megatron.analysis.texts import TextTokenizer, TokenizedText, read_texts, tokenize_all
from remit_megatron.runtime.errors import UserError, show_error
from remit_megatron.runtime.exported import HuggingFaceModel, huggingface_model
from remit_megatron.runtime.float32 import exact_float32
from remit_megatron.runtime.whole_model import refuse_adapter

_BLOCK_BYTES = 64 << 20  # of one block of logits, float32
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class TextModel:
    """A frozen causal language model of transformers on this machine's device.

    Args:
        source: what :func:`open_sources` found.
        field: how messages name it.
        dtype: ``fp32`` or ``bf16``, of weights and activations; log-probabilities are float32 either way.

    Raises:
        UserError: it cannot be loaded, or its logits are more than the output layer of its hidden states.
    """

    def __init__(self, source: HuggingFaceModel, *, field: str, dtype: str = "fp32"):
        self.source, self.name = source, name_of(source)
        self._field = field
        refuse_adapter(source.path, field=field)
        exact_float32()
        logging.getLogger("transformers").setLevel(logging.ERROR)
        transformers.utils.logging.disable_progress_bar()
        try:
            loaded: Any = transformers.AutoModelForCausalLM.from_pretrained(
                self.source.path,
                dtype=_DTYPES[dtype],
                local_files_only=True,
                trust_remote_code=False,  # None asks on the terminal
                use_safetensors=True,
                output_loading_info=True,
            )
        except Exception as error:  # whatever its classes make of these files
            found = f"{self.source.path}, which transformers cannot load ({show_error(error)})"
            raise UserError(field, found, "a causal language model") from None
        self._model: Any = loaded[0]
        if missing := sorted(loaded[1]["missing_keys"]):  # which transformers draws at random
            raise UserError(field, f"no {missing[0]} in {self.source.path}", "every weight that config.json implies")
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._model.eval().requires_grad_(False).to(self._device)
        self._head = self._model.get_output_embeddings()
        self.vocab_size: int = self._head.weight.shape[0]
        self._check_head()

    @torch.no_grad()
    def hidden(self, ids: list[int]) -> Tensor:
        """[s - 1, h] final hidden states from which tokens 1 to s - 1 are predicted.

        Raises:
            UserError: they are not finite.
        """
        tokens = torch.tensor([ids[:-1]], dtype=torch.int64, device=self._device)
        hidden = self._model.base_model(input_ids=tokens, use_cache=False).last_hidden_state[0]
        self._refuse_not_finite(hidden)
        return hidden

    @torch.no_grad()
    def logits(self, hidden: Tensor) -> Tensor:
        """[c, h] to [c, V] float32."""
        return self._head(hidden).float()

    def blocks(self, length: int) -> Iterator[slice]:
        """Positions whose logits may exist at once."""
        step = max(1, _BLOCK_BYTES // (4 * self.vocab_size))
        for first in range(0, length, step):
            yield slice(first, min(first + step, length))

    @torch.no_grad()
    def logprobs(self, ids: list[int]) -> Tensor:
        """[s - 1] float32 on the CPU: log p of tokens 1 to s - 1, each given those before it."""
        hidden = self.hidden(ids)
        labels = torch.tensor(ids[1:], dtype=torch.int64, device=self._device)
        values = [
            torch.log_softmax(self.logits(hidden[block]), -1).gather(1, labels[block].unsqueeze(1)).squeeze(1)
            for block in self.blocks(len(labels))
        ]
        return torch.cat(values).cpu()

    def _refuse_not_finite(self, values: Tensor) -> None:
        if not values.isfinite().all():
            found = f"{self.source.path}, which gives numbers that are not finite"
            raise UserError(self._field, found, "a model that gives finite ones (its weights may not be)")

    @torch.no_grad()
    def _check_head(self) -> None:
        # Some families scale or cap their logits after the output layer; without this the numbers would be others'.
        ids = torch.arange(1, min(9, self.vocab_size), device=self._device).unsqueeze(0)
        ours = self.logits(self._model.base_model(input_ids=ids, use_cache=False).last_hidden_state[0])
        theirs = self._model(input_ids=ids, use_cache=False).logits[0].float()
        self._refuse_not_finite(theirs)
        if ours.shape != theirs.shape or not torch.allclose(ours, theirs, rtol=1e-3, atol=1e-3):
            kind = type(self._model).__name__
            found = f"{kind}, whose logits are not the output layer of its hidden states"
            raise UserError(self._field, found, "a family without scaled or capped logits")


def name_of(source: HuggingFaceModel) -> str:
    """A short name for tables: the run and the step of a checkpoint, else the directory's name."""
    if source.iteration and source.run_dir is not None:
        return f"{source.run_dir.absolute().name} step {source.iteration}"
    return source.source.absolute().name


def open_sources(named: list[tuple[str, str]]) -> list[HuggingFaceModel]:
    """The models behind (option, path) pairs, exported where they must be; nothing is loaded yet.

    Raises:
        UserError: one is no complete model.
    """
    return [huggingface_model(path, field=option) for option, path in named]


def tokenized(
    sources: list[HuggingFaceModel], path: str, *, text_key: str, max_texts: int | None, max_tokens: int | None
) -> list[TokenizedText]:
    """The texts of a JSONL file as the tokens of all ``sources``, those that have something to predict.

    Raises:
        UserError: the file cannot be read, a text is too long, or two tokenizers make different tokens of a text: the
            log-probabilities would be of different things.
    """
    texts = read_texts(path, text_key=text_key, max_texts=max_texts)
    first, *others = [TextTokenizer(source.path, field=f"tokenizer of {name_of(source)}") for source in sources]
    for source, other in zip(sources[1:], others, strict=True):
        if other.content == first.content:
            continue
        for line, text in texts:
            if other.tokenize(line, text).ids != first.tokenize(line, text).ids:
                found = f"other tokens in {name_of(source)} than in {name_of(sources[0])} ({path} line {line})"
                raise UserError("tokenizer", found, "models with the same tokens")
    longest = min(_number(source, "max_position_embeddings") for source in sources)
    found = tokenize_all(texts, first, longest=longest, max_tokens=max_tokens, path=path)
    rows = min(_number(source, "vocab_size") for source in sources)
    for text in found:
        if (largest := max(text.ids)) >= rows:
            expected = f"below {rows}, the rows of the models' embeddings"
            raise UserError(f"{path} line {text.line}", f"ids up to {largest}", expected)
    return found


def _number(source: HuggingFaceModel, name: str) -> int:
    """Of config.json; a large one where it says none."""
    config = json.loads((source.path / "config.json").read_text())
    return int(config.get(name) or 1 << 30)


def require_same_vocabulary(first: TextModel, other: TextModel) -> None:
    """For what compares whole distributions.

    Raises:
        UserError: the output layers have different heights.
    """
    if first.vocab_size != other.vocab_size:
        found = f"{first.vocab_size} in {first.name}, {other.vocab_size} in {other.name}"
        raise UserError("vocabulary", found, "output layers of the same size")


def bits_per_byte(logprob_sum: float, texts: list[TokenizedText]) -> float:
    """Negative log-probability of the predicted tokens in bits, over the UTF-8 bytes of their text."""
    size = sum(text.bytes_predicted for text in texts)
    return -logprob_sum / math.log(2) / size if size else math.nan
