"""lm-eval's Hugging Face model on a CPU: batches that fit into memory, and generation by :mod:`.greedy`."""

from __future__ import annotations

import logging
from typing import Any

import psutil
import torch
from lm_eval.models import huggingface
from lm_eval.models.utils_hf import stop_sequences_criteria

from remit_megatron.evaluation.greedy import Prefix, cache_bytes, can_decode, decode

logger = logging.getLogger(__name__)

# Of the memory that is free, for what a batch needs.
_SHARE = 0.25
# More sequences make a batch uneven, and a core is busy with fewer.
_LARGEST_BATCH = 32
_Parent: Any = huggingface.HFLM  # whose registration hides its type


class CpuLM(_Parent):
    """As its parent, answer for answer but for rounding; only the order of the work differs.

    ``find_batch`` (batch size `auto`): the batch is what fits of the requests at hand, of likelihoods and of generated
    answers each by itself; lm-eval's own search tries batches until one fails, which without a GPU ends the process.
    """

    find_batch = False
    _own_reason: str | None = ""
    _prefix: Prefix | None = None

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        if self.find_batch and requests:
            longest = max(len(self.tok_encode(request.args[0])) for request in requests)
            new = max(int((request.args[1] or {}).get("max_gen_toks", self.max_gen_toks)) for request in requests)
            self.batch_size_per_gpu = self._fitting(min(longest + new, self.max_length) * cache_bytes(self.model))
        return super().generate_until(requests, disable_tqdm=disable_tqdm)

    def _loglikelihood_tokens(
        self,
        requests: list[tuple[tuple[str, str], list[int], list[int]]],
        disable_tqdm: bool = False,
        override_bs: int | None = None,
    ) -> list[tuple[float, bool]]:
        if self.find_batch and requests:
            longest = max(min(len(context) + len(rest), self.max_length) for _, context, rest in requests)
            # Logits and their softmax, at float32.
            self.batch_size_per_gpu = self._fitting(2 * 4 * longest * self.model.config.get_text_config().vocab_size)
        return super()._loglikelihood_tokens(requests, disable_tqdm=disable_tqdm, override_bs=override_bs)

    def _fitting(self, each: int) -> int:
        free = psutil.virtual_memory().available // self.world_size
        return max(1, min(_LARGEST_BATCH, int(_SHARE * free / each)))

    def _model_generate(
        self, context: torch.Tensor, max_length: int, stop: list[str], **generation_kwargs: Any
    ) -> torch.Tensor:
        """``[b, s]`` prompts, padded on the left, to ``[b, s + n]`` with their answers, padded on the right."""
        mask = generation_kwargs.get("attention_mask")
        if mask is None or not self._by_greedy(generation_kwargs):
            return super()._model_generate(context, max_length, stop, **generation_kwargs)
        prompts = [row[kept.bool()].tolist() for row, kept in zip(context, mask, strict=True)]
        ends = self.model.generation_config.eos_token_id
        answers, self._prefix = decode(
            self.model,
            prompts,
            tokens=max_length - context.shape[1],
            ends=set(ends if isinstance(ends, list) else [] if ends is None else [ends]),
            # lm-eval's own criterion, for each row by itself: as it works in a batch of one.
            stops=[self._stop(stop) for _ in prompts],
            known=self._prefix,
        )
        padded = context.new_full((len(prompts), max(map(len, answers))), self.tokenizer.pad_token_id)
        for row, answer in enumerate(answers):
            padded[row, : len(answer)] = torch.tensor(answer)
        return torch.cat([context, padded], dim=1)

    def _stop(self, stop: list[str]) -> Any:
        criteria = stop_sequences_criteria(self.tokenizer, stop, 0, 1)
        return lambda ids: bool(criteria(ids, None).item())  # type: ignore[arg-type]

    def _by_greedy(self, settings: dict[str, Any]) -> bool:
        if self._own_reason == "":
            self._own_reason = can_decode(self.model)
            if self._own_reason:
                logger.warning("generating by transformers' own, slower loop: %s", self._own_reason)
        greedy = not settings.get("do_sample") and not settings.get("temperature")
        other = set(settings) - {"attention_mask", "do_sample", "temperature"}
        plain = self.backend == "causal" and self.mixed_precision_dtype is None
        return self._own_reason is None and greedy and not other and plain
