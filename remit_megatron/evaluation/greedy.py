"""Greedy generation on a CPU: shared examples are read once, finished answers leave the batch.

``transformers.generate`` under lm-eval 0.4.13 costs several times as much there: each row reads the same worked
examples again, all keys and values are copied for every token, and a batch runs on to the most tokens allowed, because
lm-eval ends it only when one stop string has come up in every row.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

# Settings of a model's generation that greedy choice does not read, and what others are when they do nothing.
_WITHOUT_EFFECT = {
    "_from_model_config",
    "bos_token_id",
    "do_sample",
    "eos_token_id",
    "max_length",
    "max_new_tokens",
    "pad_token_id",
    "temperature",
    "top_k",
    "top_p",
    "transformers_version",
    "use_cache",
}
_NEUTRAL: dict[str, Any] = {"num_beams": 1, "num_return_sequences": 1, "repetition_penalty": 1.0, "length_penalty": 1.0}
# Position encodings that give a token the same keys whatever follows it.
_PLAIN_ROPE = {"default", "linear", "llama3", "yarn"}
# Finished rows leave when they are at least this share of a batch; leaving copies what stays.
_LEAVE = 0.25


def can_decode(model: Any) -> str | None:
    """Why :func:`decode` does not do for a model what its own ``generate`` would; None where it does."""
    settings = model.generation_config.to_diff_dict()
    for name, value in settings.items():
        if name not in _WITHOUT_EFFECT and value not in (None, False, _NEUTRAL.get(name)):
            return f"its generation settings have {name}"
    if any(type(layer) is not DynamicLayer for layer in DynamicCache(config=model.config).layers):
        return "its layers keep something else than all keys and values"
    forward = inspect.signature(model.forward).parameters
    if missing := [name for name in ("position_ids", "past_key_values", "logits_to_keep") if name not in forward]:
        return f"its forward pass takes no {missing[0]}"
    rope = getattr(model.config, "rope_parameters", None) or {}
    if rope.get("rope_type", "default") not in _PLAIN_ROPE:
        return f"its position encoding is {rope['rope_type']}"
    return None


def cache_bytes(model: Any) -> int:
    """Bytes of keys and values that a token of one sequence takes, measured on a forward pass over one token."""
    cache = DynamicCache(config=model.config)
    with torch.inference_mode():
        model(input_ids=torch.zeros(1, 1, dtype=torch.long), past_key_values=cache, use_cache=True)
    return sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)  # type: ignore[union-attr]


class _Roomy(DynamicLayer):
    """Keys and values of a layer in a buffer with room for the whole answer."""

    def __init__(self, room: int):
        super().__init__()
        self._room, self._length = room, 0

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self._buffers = [
            states.new_empty(*states.shape[:2], self._room, states.shape[3]) for states in (key_states, value_states)
        ]
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        start, end = self._length, self._length + key_states.shape[-2]
        for buffer, states in zip(self._buffers, (key_states, value_states), strict=True):
            buffer[:, :, start:end] = states
        self._length = end
        self.keys, self.values = (buffer[:, :, :end] for buffer in self._buffers)
        return self.keys, self.values

    def get_seq_length(self) -> int:
        return self._length

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        self._buffers = [buffer[indices] for buffer in self._buffers]
        self.keys, self.values = (buffer[:, :, : self._length] for buffer in self._buffers)


@dataclass
class Prefix:
    """The beginning that the last batch's prompts had in common, and its keys and values (``[1, h, n, d]`` a layer)."""

    tokens: list[int]
    layers: list[tuple[torch.Tensor, torch.Tensor]]


def _common(rows: list[list[int]]) -> int:
    low, high = min(rows), max(rows)
    length = min(len(low), len(high))
    return next((i for i in range(length) if low[i] != high[i]), length)


def read_prefix(model: Any, tokens: list[int], known: Prefix | None) -> Prefix:
    """Keys and values of ``tokens``, of which those that ``known`` begins with are taken from there."""
    same = _common([tokens, known.tokens]) if known else 0
    if known and same == len(tokens):
        return Prefix(tokens, [(keys[:, :, :same], values[:, :, :same]) for keys, values in known.layers])
    cache = DynamicCache(config=model.config)
    if known and same:
        for number, (keys, values) in enumerate(known.layers):
            cache.update(keys[:, :, :same], values[:, :, :same], number)
    model(
        input_ids=torch.tensor([tokens[same:]]),
        position_ids=torch.arange(same, len(tokens))[None],
        past_key_values=cache,
        use_cache=True,
        logits_to_keep=1,
    )
    return Prefix(tokens, [(layer.keys, layer.values) for layer in cache.layers])  # type: ignore[union-attr]


@torch.inference_mode()
def decode(
    model: Any,
    prompts: list[list[int]],
    *,
    tokens: int,
    ends: set[int],
    stops: list[Any],
    known: Prefix | None = None,
) -> tuple[list[list[int]], Prefix]:
    """The most likely token again and again, for a batch of prompts.

    Args:
        model: a ``transformers`` causal language model on the CPU, of which :func:`can_decode` says None.
        prompts: token ids, at least one each.
        tokens: at most so many new ones.
        ends: ids that end an answer, which they are part of.
        stops: for each prompt what is asked after each token: called with the new ids ``[1, n]``, True ends the answer.
        known: what the call before returned.

    Returns:
        The new token ids of each prompt, and the common beginning of the prompts.
    """
    common = min(_common(prompts), min(map(len, prompts)) - 1)
    prefix = read_prefix(model, prompts[0][:common], known) if common else Prefix([], [])
    rest = [prompt[common:] for prompt in prompts]
    width = max(map(len, rest))
    layers = [_Roomy(common + width + tokens) for _ in DynamicCache(config=model.config).layers]
    cache = Cache(layers=layers)  # type: ignore[arg-type]
    for number, (keys, values) in enumerate(prefix.layers):
        shape = (len(prompts), -1, -1, -1)
        cache.update(keys.expand(shape), values.expand(shape), number)
    # A row is: common beginning, padding, the rest of its prompt, its answer.
    ids = torch.zeros(len(prompts), width, dtype=torch.long)
    mask = torch.ones(len(prompts), common + width + tokens, dtype=torch.long)
    positions = torch.zeros_like(ids)
    for row, part in enumerate(rest):
        ids[row, width - len(part) :] = torch.tensor(part)
        mask[row, common : common + width - len(part)] = 0
        positions[row, width - len(part) :] = torch.arange(common, common + len(part))
    answers: list[list[int]] = [[] for _ in prompts]
    live, done = list(range(len(prompts))), set[int]()
    for step in range(tokens):
        logits = model(
            input_ids=ids,
            attention_mask=mask[:, : common + width + step],
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        ).logits[:, -1]
        ids = logits.float().argmax(-1)[:, None]
        positions = positions[:, -1:] + 1
        for row, token in zip(live, ids[:, 0].tolist(), strict=True):
            if row not in done:
                answers[row].append(token)
                if token in ends or stops[row](torch.tensor([answers[row]])):
                    done.add(row)
        if len(done & set(live)) >= _LEAVE * len(live):
            stay = [place for place, row in enumerate(live) if row not in done]
            if not stay:
                break
            live = [live[place] for place in stay]
            kept = torch.tensor(stay)
            ids, positions, mask = ids[kept], positions[kept], mask[kept]
            for layer in layers:
                layer.batch_select_indices(kept)
    return answers, prefix
