"""The contestants of bench_kernels.py: every way to compute a loss per token that is at hand, behind one signature.

An arm is a function of the problem's tensors. Where a package is missing, or the machine is not one it runs on, the
arm is a `Missing` with the reason instead.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist
from torch.nn import functional

from remit_megatron.kernels import linear_token_loss, rms_norms, token_logprob, token_loss


@dataclass(frozen=True)
class Missing:
    """An arm that cannot run here, and why."""

    reason: str


# logits [T, V] and labels [T] to losses [T]; differentiable where gradients are on.
LossArm = Callable[[Tensor, Tensor], Tensor]
# hidden [b, s, h], weight [V, h], labels [b, s], token weights [b, s] to the weighted sum and losses [b, s].
LinearArm = Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
# logits [T, V], labels [T], reference's hidden states [T, h] and output weight [V, h] to divergences [T].
DivergenceArm = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
# Queries and keys [T, n, d], and weights [n * d] of each, to the normed queries and keys [T, n, d]; differentiable.
NormArm = Callable[[tuple[Tensor, ...], tuple[Tensor, ...]], tuple[Tensor, ...]]

OURS = "ours"
NORM_EPS = 1e-6  # OLMo 2's
OTHER_BLOCK = "ours, blocks of 4096"  # forward takes 8192 columns at a time


def one_rank_group(device: torch.device) -> dist.ProcessGroup:
    """A process group of this process alone, which Megatron's losses ask for."""
    if not dist.is_initialized():
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    assert dist.group.WORLD is not None
    return dist.group.WORLD


def _gpu_package(module: str, device: torch.device) -> Missing | None:
    """Why a package of Triton kernels cannot run, or None."""
    if device.type != "cuda":
        return Missing("needs a GPU")
    if importlib.util.find_spec(module.split(".", maxsplit=1)[0]) is None:
        return Missing(f"{module.split('.', maxsplit=1)[0]} is not installed")
    try:
        importlib.import_module(module)
    except Exception as error:  # whatever the import of an optional package raises, it is not at hand
        return Missing(f"{module}: {type(error).__name__}")
    return None


def _ours(impl: str) -> LossArm:
    return lambda logits, labels: token_loss(logits, labels, impl=impl)  # type: ignore[arg-type]


def _other_block(columns: int, device: torch.device) -> LossArm | Missing:
    """Ours with another number of columns at a time in forward, where that is more parallel and reduces more often."""
    if device.type != "cuda":
        return Missing("needs a GPU")
    from remit_megatron.kernels import token_loss_triton

    def loss(logits: Tensor, labels: Tensor) -> Tensor:
        own = token_loss_triton._FORWARD_BLOCK
        token_loss_triton._FORWARD_BLOCK = columns
        try:
            return token_loss(logits, labels, impl="triton")
        finally:
            token_loss_triton._FORWARD_BLOCK = own

    return loss


def _plain(logits: Tensor, labels: Tensor) -> Tensor:
    return functional.cross_entropy(logits.float(), labels, reduction="none")


def _compiled(function: Callable[..., Tensor], wanted: bool) -> Callable[..., Tensor] | Missing:
    if not wanted:
        return Missing("takes a C++ compiler and about a minute: --compile")
    before = os.environ.get("TORCHDYNAMO_DISABLE")
    os.environ["TORCHDYNAMO_DISABLE"] = "0"  # patches/ turns it off on a CPU; it is read when a function is wrapped
    try:
        return torch.compile(function)
    finally:
        os.environ["TORCHDYNAMO_DISABLE"] = before or "0"


def _megatron(device: torch.device) -> tuple[LossArm, LossArm]:
    from megatron.core.fusions.fused_cross_entropy import fused_vocab_parallel_cross_entropy
    from megatron.core.tensor_parallel.cross_entropy import vocab_parallel_cross_entropy

    group = one_rank_group(device)

    def native(logits: Tensor, labels: Tensor) -> Tensor:
        return vocab_parallel_cross_entropy(logits, labels, tp_group=group)

    def fused(logits: Tensor, labels: Tensor) -> Tensor:
        return fused_vocab_parallel_cross_entropy(logits, labels, group)

    return native, fused


def _liger(device: torch.device) -> LossArm | Missing:
    if missing := _gpu_package("liger_kernel.ops.cross_entropy", device):
        return missing
    from liger_kernel.transformers import LigerCrossEntropyLoss  # type: ignore[import-not-found]

    return LigerCrossEntropyLoss(reduction="none")


def _liger_parallel(device: torch.device) -> LossArm | Missing:
    if missing := _gpu_package("liger_kernel.ops.vocab_parallel_cross_entropy", device):
        return missing
    from liger_kernel.ops.vocab_parallel_cross_entropy import (  # type: ignore[import-not-found]
        LigerVocabParallelCEFunction,
    )

    def loss(logits: Tensor, labels: Tensor) -> Tensor:
        settings = (one_rank_group(device), -100, 0.0, "megatron", "global")
        return LigerVocabParallelCEFunction.apply(logits.unsqueeze(1), labels.unsqueeze(1), *settings).squeeze(1)

    return loss


def _transformer_engine(device: torch.device) -> LossArm | Missing:
    if missing := _gpu_package("transformer_engine.pytorch.cross_entropy", device):
        return missing
    from transformer_engine.pytorch.cross_entropy import parallel_cross_entropy  # type: ignore[import-not-found]

    def loss(logits: Tensor, labels: Tensor) -> Tensor:
        return parallel_cross_entropy(logits.unsqueeze(1), labels.unsqueeze(1), 0.0, False, None).view(-1)

    return loss


def loss_arms(device: torch.device, *, compiled: bool) -> dict[str, LossArm | Missing]:
    """Losses from logits. The first is ours, by the implementation that "auto" takes on this device."""
    native, fused = _megatron(device)
    gpu = device.type == "cuda"
    return {
        OURS: _ours("auto"),
        "ours, torch": _ours("torch") if gpu else Missing('is "ours" here'),
        "ours, Triton": Missing('is "ours" here') if gpu else Missing("needs a GPU"),
        OTHER_BLOCK: _other_block(4096, device),
        "Megatron native": native,
        "Megatron fused": fused,
        "Liger": _liger(device),
        "Liger vocabulary-parallel": _liger_parallel(device),
        "Transformer Engine": _transformer_engine(device),
        "torch.compile": _compiled(_plain, compiled),
        "plain torch": _plain,
    }


def logprob_arms(device: torch.device) -> dict[str, LossArm | Missing]:
    """Losses from logits without gradient."""
    return {
        OURS: _ours("auto"),
        OTHER_BLOCK: _other_block(4096, device),
        "Liger": _liger(device),
        "plain torch": _plain,
    }


def hidden_arms() -> dict[str, LinearArm]:
    """Losses from hidden states without gradient, and the product alone that any of them needs."""

    def ours(hidden: Tensor, weight: Tensor, labels: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        losses = -token_logprob(hidden, weight, labels)
        return losses.sum(), losses

    def through_logits(hidden: Tensor, weight: Tensor, labels: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        losses = token_loss((hidden.view(-1, hidden.shape[-1]) @ weight.t()), labels.reshape(-1)).view(labels.shape)
        return losses.sum(), losses

    return {OURS: ours, "logits, then ours": through_logits}


def linear_arms(device: torch.device) -> dict[str, LinearArm | Missing]:
    """Weighted loss from hidden states, with gradients of hidden states and weight."""

    def ours(hidden: Tensor, weight: Tensor, labels: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        def weighting(losses: Tensor, sequences: slice) -> Tensor:
            return (losses * weights[sequences]).sum()

        return linear_token_loss(hidden, weight, labels, weighting)

    def through(loss: LossArm) -> LinearArm:
        def arm(hidden: Tensor, weight: Tensor, labels: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
            logits = functional.linear(hidden.view(-1, hidden.shape[-1]), weight)
            losses = loss(logits, labels.reshape(-1)).view(labels.shape)
            return (losses * weights).sum(), losses.detach()

        return arm

    def liger(hidden: Tensor, weight: Tensor, labels: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        from liger_kernel.ops.fused_linear_cross_entropy import (  # type: ignore[import-not-found]
            LigerFusedLinearCrossEntropyFunction,
        )

        arguments: tuple[Any, ...] = (None, None, -100, 0.0, 0.0, "none")
        flat = hidden.view(-1, hidden.shape[-1])
        losses = LigerFusedLinearCrossEntropyFunction.apply(flat, weight, labels.reshape(-1), *arguments)[0]
        losses = losses.view(labels.shape)
        return (losses * weights).sum(), losses.detach()

    native, _ = _megatron(device)
    return {
        OURS: ours,
        "logits, then ours": through(_ours("auto")),
        "logits, then Megatron native": through(native),
        "Liger fused linear": _gpu_package("liger_kernel.ops.fused_linear_cross_entropy", device) or liger,
    }


def divergence_arms(device: torch.device, *, compiled: bool) -> dict[str, DivergenceArm | Missing]:
    """kd's divergence. No package at hand has one for each token that takes the reference by its hidden states."""
    from remit_megatron.kernels.kl_divergence import distillation_loss

    def ours(impl: str) -> DivergenceArm:
        def arm(logits: Tensor, labels: Tensor, hidden: Tensor, weight: Tensor) -> Tensor:
            return distillation_loss(logits, labels, hidden, weight, impl=impl)[0]  # type: ignore[arg-type]

        return arm

    def plain(logits: Tensor, labels: Tensor, hidden: Tensor, weight: Tensor) -> Tensor:
        log_p = torch.log_softmax((hidden @ weight.t()).float(), -1)
        return functional.kl_div(torch.log_softmax(logits.float(), -1), log_p, reduction="none", log_target=True).sum(
            -1
        )

    gpu = device.type == "cuda"
    return {
        OURS: ours("auto"),
        "ours, torch": ours("torch") if gpu else Missing('is "ours" here'),
        "torch.compile": _compiled(plain, compiled),
        "plain torch": plain,
    }


def norm_arms(device: torch.device, *, compiled: bool) -> dict[str, NormArm | Missing]:
    """Norms of queries and keys on one rank; "as on several ranks" has the launches of those, and no reduction."""
    from remit_megatron.kernels import rms_norm

    gpu = device.type == "cuda"

    def ours(impl: str) -> NormArm:
        def arm(vectors: tuple[Tensor, ...], weights: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            sizes = [(len(weight), NORM_EPS) for weight in weights]
            return rms_norms(vectors, weights, sizes=sizes, impl=impl)  # type: ignore[arg-type]

        return arm

    def as_several(vectors: tuple[Tensor, ...], weights: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        own = rms_norm._reduction
        rms_norm._reduction = lambda group: lambda sums: None
        try:
            outputs = ours("auto")(vectors, weights)
        finally:
            rms_norm._reduction = own
        return outputs

    def each(norm: Callable[[Tensor, Tensor], Tensor]) -> NormArm:
        def arm(vectors: tuple[Tensor, ...], weights: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            pairs = zip(vectors, weights, strict=True)
            return tuple(norm(x.flatten(1), weight).view(x.shape) for x, weight in pairs)

        return arm

    def transformers(x: Tensor, weight: Tensor) -> Tensor:
        wide = x.float()
        scale = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + NORM_EPS)
        return (weight * (wide * scale)).to(x.dtype)

    def torch_norm(x: Tensor, weight: Tensor) -> Tensor:
        return functional.rms_norm(x, weight.shape, weight, NORM_EPS)

    arms: dict[str, NormArm | Missing] = {
        OURS: ours("auto"),
        "ours, torch": ours("torch") if gpu else Missing('is "ours" here'),
        "ours, as on several ranks": as_several if gpu else Missing("needs a GPU"),
        "torch's rms_norm": each(torch_norm),
        "as transformers": each(transformers),
    }
    one = _compiled(transformers, compiled)
    arms["torch.compile"] = one if isinstance(one, Missing) else each(one)
    return arms
