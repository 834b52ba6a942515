"""The problems of bench_kernels.py: data, what is timed of an arm, and its error against float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

_ROWS = 64  # tokens whose logits are at hand in float64 at once
_COLUMNS = 8192  # rows of the output weight, likewise


def token_weights_of(shape: tuple[int, ...], generator: torch.Generator, device: torch.device) -> Tensor:
    """Incoming gradients: different for every token, 0 for the first."""
    weights = torch.rand(shape, generator=generator, device=device) * 2
    weights.view(-1)[0] = 0.0
    return weights


class LogitsProblem:
    """Logits [T, V], labels [T] and incoming gradients [T].

    Args:
        gradient: whether arms also go backward.
    """

    def __init__(self, tokens: int, vocabulary: int, dtype: torch.dtype, device: torch.device, *, gradient: bool):
        generator = torch.Generator(device).manual_seed(vocabulary)
        self.gradient = gradient
        source = torch.empty(tokens, vocabulary, dtype=dtype, device=device).normal_(0, 2, generator=generator)
        self.source = source.requires_grad_(gradient)
        self.labels = torch.randint(vocabulary, (tokens,), generator=generator, device=device)
        self.weights = token_weights_of((tokens,), generator, device)
        self._target = torch.empty_like(source, requires_grad=False)

    def copy(self) -> None:
        """The yardstick."""
        self._target.copy_(self.source.detach())

    def prepare(self, arm: Callable[..., Any]) -> Callable[[], tuple[Tensor, Tensor | None]]:
        """A call that runs the arm once, over logits of its own: no leaf, as a model's; some arms overwrite them."""
        logits = self.source * 1 if self.gradient else self.source.clone()

        def call() -> tuple[Tensor, Tensor | None]:
            with torch.set_grad_enabled(self.gradient):
                losses = arm(logits, self.labels)
            if not self.gradient:
                return losses, None
            (gradient,) = torch.autograd.grad(losses, logits, self.weights.to(losses.dtype))
            return losses.detach(), gradient

        return call

    def errors(self, arm: Callable[..., Any]) -> tuple[float, float]:
        """Largest error of the losses, beside max(1, loss), and of the gradient, beside its row's incoming gradient."""
        losses, gradient = self.prepare(arm)()
        loss_error, gradient_error = 0.0, 0.0
        least = float(self.weights.max()) * 1e-3  # a row of weight 0 must not have more than this beside its error
        for first in range(0, len(self.labels), _ROWS):
            rows = slice(first, first + _ROWS)
            labels, weights = self.labels[rows], self.weights[rows].double()
            log_p = torch.log_softmax(self.source.detach()[rows].double(), -1)
            true = -log_p.gather(1, labels.unsqueeze(1)).squeeze(1)
            error = (losses[rows].double() - true).abs() / true.clamp(min=1)
            loss_error = max(loss_error, float(error.max()))
            if gradient is not None:
                log_p.exp_()[torch.arange(len(labels)), labels] -= 1
                log_p.mul_(weights.unsqueeze(1)).sub_(gradient[rows].detach().double()).abs_()
                gradient_error = max(gradient_error, float((log_p.amax(1) / weights.clamp(min=least)).max()))
        return loss_error, gradient_error


class LinearProblem:
    """Hidden states [b, s, h], output weight [V, h], labels [b, s] and token weights [b, s].

    Args:
        gradient: whether arms also go backward.
    """

    def __init__(
        self,
        tokens: int,
        sequences: int,
        vocabulary: int,
        hidden: int,
        dtype: torch.dtype,
        device: torch.device,
        *,
        gradient: bool,
    ):
        generator = torch.Generator(device).manual_seed(vocabulary)
        shape = (sequences, tokens // sequences)
        self.gradient = gradient
        self.hidden = torch.empty(*shape, hidden, dtype=dtype, device=device).normal_(generator=generator)
        self.weight = torch.empty(vocabulary, hidden, dtype=dtype, device=device).normal_(
            0, 2 / hidden**0.5, generator=generator
        )
        self.labels = torch.randint(vocabulary, shape, generator=generator, device=device)
        self.weights = token_weights_of(shape, generator, device)
        for leaf in (self.hidden, self.weight):
            leaf.requires_grad_(gradient)
        self._truth: tuple[Tensor, Tensor, Tensor, Tensor] | None = None

    def products(self) -> None:
        """The yardstick: the product that makes the logits, and the two of backward."""
        rows, weight = self.hidden.detach().view(-1, self.hidden.shape[-1]), self.weight.detach()
        logits = rows @ weight.t()
        if self.gradient:
            _ = logits @ weight, logits.t() @ rows

    def prepare(self, arm: Callable[..., Any]) -> Callable[[], tuple[Tensor, Tensor | None, Tensor | None]]:
        """A call that runs the arm once: losses, gradients of hidden states and weight."""

        def call() -> tuple[Tensor, Tensor | None, Tensor | None]:
            with torch.set_grad_enabled(self.gradient):
                loss_sum, losses = arm(self.hidden, self.weight, self.labels, self.weights)
            if not self.gradient:
                return losses, None, None
            return losses, *torch.autograd.grad(loss_sum, (self.hidden, self.weight))

        return call

    def errors(self, arm: Callable[..., Any]) -> tuple[float, float]:
        """Largest error of the losses, beside max(1, loss), and of the gradients, beside the largest entry of each."""
        losses, of_hidden, of_weight = self.prepare(arm)()
        if self._truth is None:
            self._truth = self._definition()
        true, true_of_hidden, rows, true_of_weight = self._truth
        loss_error = float(((losses.detach().view(-1).double() - true).abs() / true.clamp(min=1)).max())
        if of_hidden is None or of_weight is None:
            return loss_error, 0.0
        pairs = ((of_hidden.view_as(true_of_hidden), true_of_hidden), (of_weight[rows], true_of_weight))
        return loss_error, max(float((a.double() - b).abs().max() / b.abs().max()) for a, b in pairs)

    def _definition(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """In float64: losses [T], gradient of the hidden states [T, h], and of some rows of the weight (their ids).

        The vocabulary is taken in blocks, twice: the weight in float64 would be as large as all else together.
        """
        hidden = self.hidden.detach().view(-1, self.hidden.shape[-1]).double()
        weight, labels, vocabulary = self.weight.detach(), self.labels.view(-1), self.weight.shape[0]
        token, blocks = torch.arange(len(labels), device=labels.device), range(0, vocabulary, _COLUMNS)
        parts = [torch.logsumexp(hidden @ weight[first : first + _COLUMNS].double().t(), 1) for first in blocks]
        normalizer = torch.logsumexp(torch.stack(parts), 0)
        losses = normalizer - (hidden * weight[labels].double()).sum(1)
        if not self.gradient:
            return losses, hidden, labels, hidden
        scale = self.weights.view(-1, 1).double()
        of_hidden, rows, of_weight = torch.zeros_like(hidden), [], []
        chosen = torch.zeros(vocabulary, dtype=torch.bool, device=labels.device)
        chosen[labels], chosen[::61] = True, True
        for first in blocks:
            block = weight[first : first + _COLUMNS].double()
            gradient = (hidden @ block.t() - normalizer.unsqueeze(1)).exp_()
            inside = (labels >= first) & (labels < first + len(block))
            gradient[token[inside], labels[inside] - first] -= 1
            gradient *= scale
            of_hidden += gradient @ block
            local = chosen[first : first + _COLUMNS].nonzero().squeeze(1)
            rows.append(local + first)
            of_weight.append(gradient[:, local].t() @ hidden)
        return losses, of_hidden, torch.cat(rows), torch.cat(of_weight)


class DivergenceProblem:
    """Student's logits [T, V], reference's hidden states [T, h] and output weight [V, h], incoming gradients [T]."""

    def __init__(self, tokens: int, vocabulary: int, hidden: int, dtype: torch.dtype, device: torch.device):
        generator = torch.Generator(device).manual_seed(vocabulary)

        def normal(*shape: int, scale: float) -> Tensor:
            return torch.empty(shape, dtype=dtype, device=device).normal_(0, scale, generator=generator)

        self.source = normal(tokens, vocabulary, scale=2.0).requires_grad_()
        self.hidden = normal(tokens, hidden, scale=1.0)
        self.weight = normal(vocabulary, hidden, scale=2 / hidden**0.5)
        self.labels = torch.randint(vocabulary, (tokens,), generator=generator, device=device)
        self.weights = token_weights_of((tokens,), generator, device)

    def products(self) -> None:
        """The yardstick: the product that makes the reference's logits, twice, as forward and backward each need it."""
        for _ in range(2):
            _ = self.hidden @ self.weight.t()

    def prepare(self, arm: Callable[..., Any]) -> Callable[[], tuple[Tensor, Tensor]]:
        """A call that runs the arm once, over logits of its own, which may be overwritten."""
        logits = self.source * 1

        def call() -> tuple[Tensor, Tensor]:
            losses = arm(logits, self.labels, self.hidden, self.weight)
            (gradient,) = torch.autograd.grad(losses, logits, self.weights.to(losses.dtype))
            return losses.detach(), gradient

        return call

    def errors(self, arm: Callable[..., Any]) -> tuple[float, float]:
        """Largest error of the divergences, beside max(1, divergence), and of the gradient, beside the largest entry of
        its row (of a row of incoming gradient 0: beside a thousandth of the largest incoming one)."""
        losses, gradient = self.prepare(arm)()
        loss_error, gradient_error = 0.0, 0.0
        least = float(self.weights.max()) * 1e-3
        for first in range(0, len(self.labels), _ROWS):
            rows = slice(first, first + _ROWS)
            log_q = torch.log_softmax(self.source.detach()[rows].double(), -1)
            y = (self.hidden[rows].float() @ self.weight.float().t()).to(self.hidden.dtype)
            log_p = torch.log_softmax(y.double(), -1)
            true = (log_p.exp() * (log_p - log_q)).sum(-1)
            loss_error = max(loss_error, float(((losses[rows].double() - true).abs() / true.clamp(min=1)).max()))
            wanted = (log_q.exp() - log_p.exp()) * self.weights[rows].double().unsqueeze(1)
            error = (gradient[rows].detach().double() - wanted).abs().amax(1)
            gradient_error = max(gradient_error, float((error / wanted.abs().amax(1).clamp(min=least * 1e-3)).max()))
        return loss_error, gradient_error


class NormProblem:
    """Queries and keys of an attention layer [T, n, d], weights [n * d] and incoming gradients [T, n, d] of each.

    Both are views of one product, every third head of it, as Megatron has them. Forward and backward.
    """

    def __init__(self, tokens: int, hidden: int, dtype: torch.dtype, device: torch.device):
        generator = torch.Generator(device).manual_seed(hidden)
        channels = min(128, hidden // 2)
        heads = hidden // channels

        def normal(*shape: int) -> Tensor:
            return torch.empty(shape, dtype=dtype, device=device).normal_(generator=generator)

        product = normal(tokens, heads, 3, channels)
        self.vectors = tuple(product[:, :, part].requires_grad_() for part in (0, 1))
        self.weights = tuple(normal(heads * channels).requires_grad_() for _ in range(2))
        scale = token_weights_of((tokens,), generator, device).to(dtype).view(-1, 1, 1)
        self.incoming = tuple(normal(tokens, heads, channels) * scale for _ in range(2))
        self._target = torch.empty(2, tokens, heads, channels, dtype=dtype, device=device)

    def copy(self) -> None:
        """The yardstick: both read once and written once."""
        for target, x in zip(self._target, self.vectors, strict=True):
            target.copy_(x.detach())

    def prepare(self, arm: Callable[..., Any]) -> Callable[[], tuple[Any, Any]]:
        """A call that runs the arm once: outputs, and gradients of vectors and weights."""
        leaves = (*self.vectors, *self.weights)

        def call() -> tuple[Any, Any]:
            outputs = arm(self.vectors, self.weights)
            return outputs, torch.autograd.grad(outputs, leaves, self.incoming)

        return call

    def errors(self, arm: Callable[..., Any]) -> tuple[float, float]:
        """Largest error of the outputs and of the gradients, each beside the largest of its kind."""
        from kernel_arms import NORM_EPS

        outputs, gradients = self.prepare(arm)()
        exact = [leaf.detach().double().requires_grad_() for leaf in (*self.vectors, *self.weights)]
        true = []
        for x, weight in zip(exact[:2], exact[2:], strict=True):
            flat = x.flatten(1)
            true.append((flat * torch.rsqrt(flat.square().mean(-1, keepdim=True) + NORM_EPS) * weight).view(x.shape))
        of_true = torch.autograd.grad(true, exact, [one.double() for one in self.incoming])

        def largest(found: Any, wanted: Any) -> float:
            pairs = zip(found, wanted, strict=True)
            return max(float((a.detach().double() - b.detach()).abs().max() / b.detach().abs().max()) for a, b in pairs)

        return largest(outputs, true), largest(gradients, of_true)
