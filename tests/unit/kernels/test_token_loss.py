"""token_loss and token_logprob in one process, against a definition in float64 written here with numpy."""

import weakref

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from remit_megatron.kernels import reference_token_loss, token_logprob, token_loss
from remit_megatron.kernels import token_loss as exported
from remit_megatron.kernels.token_loss import token_loss as from_module
from remit_megatron.kernels.vocab_shard import equal_chunk

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
EPS32 = torch.finfo(torch.float32).eps


def definition(logits, labels, incoming):
    """Loss [T] and gradient [T, V] in float64, one row at a time."""
    x, labels = logits.detach().double().numpy(), labels.numpy()
    loss, gradient = np.zeros(len(x)), np.zeros_like(x)
    for t, row in enumerate(x):
        shifted = row - row.max()
        total = np.exp(shifted).sum()
        loss[t] = np.log(total) - shifted[labels[t]]
        gradient[t] = np.exp(shifted) / total
        gradient[t, labels[t]] = np.expm1(-loss[t])
        gradient[t] *= float(incoming[t])
    return torch.from_numpy(loss), torch.from_numpy(gradient)


def plain(logits, labels, incoming):
    """What autograd makes of the formula in float32, with the gradient in the dtype of the logits."""
    leaf = logits.detach().clone().requires_grad_()
    loss = torch.nn.functional.cross_entropy(leaf.float(), labels, reduction="none")
    (gradient,) = torch.autograd.grad(loss, leaf, incoming)
    return loss.detach(), gradient


def run(logits, labels, incoming, **settings):
    """Loss and gradient of token_loss on a copy that is no leaf."""
    leaf = logits.detach().clone().requires_grad_()
    x = leaf * 1
    loss = token_loss(x, labels, **settings)
    (gradient,) = torch.autograd.grad(loss, x, incoming)
    assert gradient.data_ptr() == x.data_ptr(), "the gradient is written over the logits"
    return loss.detach(), gradient.detach()


def assert_as_exact_as_plain(logits, labels, incoming, loss, gradient):
    """At most the plain computation's error plus a margin, in roundings of float32 and of the logits' dtype.

    Loss: four float32 roundings. Gradient: one rounding to its dtype and, from float32, a relative 100 roundings (the
    argument of exp is rounded, and is up to about 100 before exp underflows) and at the label four roundings of the
    incoming gradient (p - 1, p near 1).
    """
    true_loss, true_gradient = definition(logits, labels, incoming)
    plain_loss, plain_gradient = plain(logits, labels, incoming)
    loss_margin = 4 * EPS32 * true_loss.abs().clamp(min=1)
    assert ((loss - true_loss).abs() <= (plain_loss - true_loss).abs() + loss_margin).all()
    info = torch.finfo(logits.dtype)
    margin = (info.eps + 100 * EPS32) * true_gradient.abs() + info.smallest_normal * info.eps
    margin[torch.arange(len(labels)), labels] += 4 * EPS32 * incoming.abs()
    error, plain_error = (gradient - true_gradient).abs(), (plain_gradient - true_gradient).abs()
    assert (error <= plain_error + margin).all()


def uneven_weights(tokens, generator):
    weights = torch.rand(tokens, generator=generator) * 3 - 1
    weights[0] = 0.0
    return weights


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(20260203)


@pytest.fixture(params=[None, 64], ids=["one-block", "many-blocks"])
def blocks(request, monkeypatch):
    """With a buffer of 64 elements every shape here needs several blocks, or rows longer than the buffer."""
    if request.param is not None:
        import sys

        monkeypatch.setitem(sys.modules[from_module.__module__]._BUFFER_ELEMENTS, "cpu", request.param)


def test_the_package_exports_the_function_not_the_module():
    assert exported is from_module


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens, vocab", [(1, 1), (1, 7), (13, 1), (6, 2), (11, 37), (5, 1031)])
def test_loss_and_gradient_are_as_exact_as_plain(tokens, vocab, dtype, generator, blocks):
    logits = (torch.randn(tokens, vocab, generator=generator) * 4).to(dtype)
    labels = torch.randint(vocab, (tokens,), generator=generator)
    incoming = uneven_weights(tokens, generator)
    loss, gradient = run(logits, labels, incoming)
    assert loss.dtype == torch.float32 and gradient.dtype == dtype
    assert_as_exact_as_plain(logits, labels, incoming, loss, gradient)
    assert not gradient[0].any(), "a token of weight 0 gets no gradient"


def test_each_row_is_scaled_by_its_own_incoming_gradient(generator):
    logits, labels = torch.randn(5, 19, generator=generator), torch.arange(5)
    ones = run(logits, labels, torch.ones(5))[1]
    incoming = torch.tensor([0.0, 1.0, -2.0, 0.5, 64.0])  # powers of two: exact
    assert torch.equal(run(logits, labels, incoming)[1], ones * incoming[:, None])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["huge", "negative", "equal", "large-negative", "minus-infinity", "confident"])
def test_extreme_logits(kind, dtype, generator, blocks):
    tokens, vocab = 6, 33
    logits = torch.randn(tokens, vocab, generator=generator)
    labels = torch.randint(1, vocab, (tokens,), generator=generator)
    lowest = -6e4 if dtype == torch.float16 else -1e30
    if kind == "huge":
        logits = logits * 1e4
    elif kind == "negative":
        logits = logits - 1e4
    elif kind == "equal":
        logits = torch.full((tokens, vocab), 1e4)
    elif kind == "large-negative":
        logits[:, ::2] = lowest
        labels[0] = 0  # a label that the model gives no chance
    elif kind == "minus-infinity":
        logits[:, ::2] = -torch.inf
        labels = torch.ones_like(labels)
    else:
        logits[torch.arange(tokens), labels] += 18.0
    logits = logits.clamp(max=6e4).to(dtype)
    incoming = uneven_weights(tokens, generator)
    loss, gradient = run(logits, labels, incoming)
    assert loss.isfinite().all() and gradient.isfinite().all()
    assert_as_exact_as_plain(logits, labels, incoming, loss, gradient)
    if kind == "equal":
        torch.testing.assert_close(loss, torch.full((tokens,), float(np.log(vocab))), rtol=2 * EPS32, atol=0)


def test_shape_of_the_leading_axes_is_kept(generator):
    logits = torch.randn(3, 2, 4, 17, generator=generator)
    labels = torch.randint(17, (3, 2, 4), generator=generator)
    loss = token_loss(logits, labels)
    assert loss.shape == labels.shape
    assert torch.equal(loss.flatten(), token_loss(logits.view(-1, 17), labels.flatten()))
    assert torch.equal(token_loss(logits[0, 0, 0], labels[0, 0, 0]), loss[0, 0, 0])
    assert token_loss(torch.empty(0, 5), torch.empty(0, dtype=torch.int64)).shape == (0,)
    # Labels may be any view: Megatron's are [b, s], its logits [s, b, V].
    assert torch.equal(token_loss(logits[0], labels[0].t().contiguous().t()), loss[0])


@pytest.mark.parametrize("dtype", DTYPES)
def test_masked_rows_are_never_used(dtype, generator, blocks):
    tokens, vocab = 23, 41
    logits = torch.randn(tokens, vocab, generator=generator).to(dtype)
    labels = torch.randint(vocab, (tokens,), generator=generator)
    mask = torch.rand(tokens, generator=generator) * (torch.rand(tokens, generator=generator) > 0.4)
    labels[3], labels[17] = -100, -100
    counted = (mask > 0) & (labels != -100)
    assert 3 < counted.sum() < 20
    incoming = uneven_weights(tokens, generator) + 1
    dirty, dirty_labels, dirty_incoming = logits.clone(), labels.clone(), incoming.clone()
    dirty[~counted] = torch.nan
    dirty_labels[~counted & (labels != -100)] = 1 << 40
    dirty_incoming[~counted] = torch.inf
    loss, gradient = run(dirty, dirty_labels, dirty_incoming, loss_mask=mask)
    assert not loss[~counted].any() and not gradient[~counted].any()
    clean_loss, clean_gradient = run(logits[counted], labels[counted], incoming[counted])
    assert torch.equal(loss[counted], clean_loss) and torch.equal(gradient[counted], clean_gradient)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_broken_logit_shows_in_its_own_row_only(bad, blocks):
    logits, labels = torch.zeros(5, 9), torch.arange(5)
    logits[2, 7] = bad
    loss, gradient = run(logits, labels, torch.ones(5))
    assert loss[2].isnan() and gradient[2].isnan().any(), "not a silent value"
    others = torch.arange(5) != 2
    assert loss[others].isfinite().all() and gradient[others].isfinite().all()


def test_a_microbatch_without_counted_tokens(generator):
    logits, labels = torch.full((4, 9), torch.nan), torch.zeros(4, dtype=torch.int64)
    loss, gradient = run(logits, labels, torch.ones(4), loss_mask=torch.zeros(4))
    assert torch.equal(loss, torch.zeros(4)) and torch.equal(gradient, torch.zeros(4, 9))
    loss, gradient = run(logits, torch.full((4,), -7), torch.ones(4), ignore_index=-7)
    assert torch.equal(loss, torch.zeros(4)) and torch.equal(gradient, torch.zeros(4, 9))


@pytest.mark.parametrize("dtype", DTYPES)
def test_padding_of_the_vocabulary_never_enters(dtype, generator, blocks):
    logits = torch.randn(7, 50, generator=generator).to(dtype)
    labels, incoming = torch.randint(43, (7,), generator=generator), uneven_weights(7, generator)
    padded = logits.clone()
    padded[:, 43:] = torch.nan
    loss, gradient = run(padded, labels, incoming, vocab_size=43)
    true_loss, true_gradient = run(logits[:, :43].contiguous(), labels, incoming)
    assert torch.equal(loss, true_loss) and torch.equal(gradient[:, :43], true_gradient)
    assert not gradient[:, 43:].any()


@pytest.mark.parametrize("label", [-1, 43, 49, 50, 1 << 40, -(1 << 40)])
def test_labels_out_of_range_are_an_error(label):
    logits, labels = torch.zeros(2, 3, 50), torch.zeros(2, 3, dtype=torch.int64)
    labels[1, 1] = label
    with pytest.raises(ValueError, match=rf"found {label} at flat position 4; expected 0 to 42"):
        token_loss(logits, labels, vocab_size=43)
    mask = torch.ones(2, 3)
    mask[1, 1] = 0
    assert torch.isfinite(token_loss(logits, labels, vocab_size=43, loss_mask=mask)).all()


@pytest.mark.parametrize(
    "change, message",
    [
        ({"labels": torch.zeros(4, dtype=torch.int32)}, r"labels: found torch.int32; expected torch.int64"),
        ({"labels": torch.zeros(5, dtype=torch.int64)}, r"labels: found shape \(5,\); expected \(4,\)"),
        ({"logits": torch.zeros(4, 9, dtype=torch.float64)}, r"logits: found torch.float64"),
        ({"logits": torch.zeros(9, 4).t()}, r"logits: found strides \(1, 4\)"),
        ({"loss_mask": torch.zeros(4, 1)}, r"loss_mask: found shape \(4, 1\); expected \(4,\)"),
        ({"vocab_size": 10}, r"vocab_size: found 10; expected 1 to 9"),
        ({"vocab_size": 0}, r"vocab_size: found 0; expected 1 to 9"),
        ({"vocab_start": 3}, r"vocab_size: found None"),
        ({"impl": "cuda"}, r"impl: found 'cuda'; expected 'auto', 'torch' or 'triton'"),
    ],
)
def test_wrong_arguments_are_named(change, message):
    arguments = {"logits": torch.zeros(4, 9), "labels": torch.zeros(4, dtype=torch.int64)} | change
    with pytest.raises(ValueError, match=message):
        token_loss(arguments.pop("logits"), arguments.pop("labels"), **arguments)


def test_a_leaf_keeps_its_values(generator):
    leaf = torch.randn(4, 9, generator=generator).requires_grad_()
    before, labels = leaf.detach().clone(), torch.arange(4)
    token_loss(leaf, labels).sum().backward()
    assert torch.equal(leaf, before)
    assert leaf.grad is not None and torch.equal(leaf.grad, run(before, labels, torch.ones(4))[1])


def test_gradients_reach_what_made_the_logits(generator):
    hidden = torch.randn(6, 8, generator=generator, dtype=torch.float64).requires_grad_()
    weight = torch.randn(21, 8, generator=generator, dtype=torch.float64).requires_grad_()
    labels, incoming = torch.randint(21, (6,), generator=generator), uneven_weights(6, generator)
    inputs = (hidden, weight)
    expected = torch.autograd.grad(reference_token_loss(hidden @ weight.t(), labels), inputs, incoming.double())
    found = torch.autograd.grad(token_loss(hidden.float() @ weight.float().t(), labels), inputs, incoming)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_backward_twice_and_double_backward_are_refused():
    labels, leaf = torch.arange(4), torch.zeros(4, 9, requires_grad=True)
    loss = token_loss(leaf * 1, labels).sum()
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="second backward"):
        loss.backward()
    x = leaf * 1
    with pytest.raises(RuntimeError, match="create_graph=True"):
        torch.autograd.grad(token_loss(x, labels).sum(), x, create_graph=True)


def test_another_user_of_the_logits_is_stopped_not_fooled():
    logits = torch.zeros(4, 9, requires_grad=True) * 1
    other = logits.square().sum()  # keeps the logits for its backward
    token_loss(logits, torch.arange(4)).sum().backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        other.backward()


@pytest.mark.parametrize("how", ["no_grad", "needs none"])
def test_without_gradient_nothing_is_kept(how):
    logits = torch.zeros(4, 9, requires_grad=how == "no_grad") * 1
    alive = weakref.ref(logits)
    with torch.set_grad_enabled(how != "no_grad"):
        loss = token_loss(logits, torch.arange(4))
    assert not loss.requires_grad and loss.grad_fn is None
    del logits
    assert alive() is None


def test_repeated_runs_give_the_same_bits(generator):
    logits = torch.randn(64, 501, generator=generator).bfloat16()
    labels, incoming = torch.randint(501, (64,), generator=generator), torch.rand(64, generator=generator)
    first, second = (run(logits, labels, incoming, loss_mask=incoming > 0.3) for _ in range(2))
    assert torch.equal(first[0], second[0]) and torch.equal(first[1], second[1])


class LargestTensor(TorchDispatchMode):
    """Bytes of the largest storage that any operation makes, storages in ``known`` aside."""

    def __init__(self, *known):
        super().__init__()
        self.known, self.bytes = {t.untyped_storage().data_ptr() for t in known}, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().data_ptr() not in self.known:
                self.bytes = max(self.bytes, tensor.untyped_storage().nbytes())
        return out


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("masked", [False, True])
def test_nothing_of_the_size_of_the_logits_is_made(dtype, masked):
    tokens, vocab = 288, 32768
    logits = torch.zeros(tokens, vocab, dtype=dtype, requires_grad=True) * 1
    labels = torch.zeros(tokens, dtype=torch.int64)
    mask = torch.arange(tokens) % 3 if masked else None
    with LargestTensor(logits) as seen:
        torch.autograd.grad(token_loss(logits, labels, loss_mask=mask).sum(), logits)
    assert 0 < seen.bytes <= 4 << 20 < logits.nbytes / 2


# -- token_logprob
# ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("chunk_tokens", [1, 4, 5, 100, None])
def test_logprob_is_that_of_the_logits(dtype, chunk_tokens, generator):
    hidden = torch.randn(3, 7, 16, generator=generator).to(dtype)
    weight = torch.randn(45, 16, generator=generator).to(dtype)
    labels = torch.randint(41, (3, 7), generator=generator)
    mask = torch.rand(3, 7, generator=generator) > 0.2
    found = token_logprob(hidden, weight, labels, vocab_size=41, chunk_tokens=chunk_tokens, loss_mask=mask)
    assert found.dtype == torch.float32 and found.shape == labels.shape and not found[~mask].any()
    logits = hidden @ weight[:41].t()  # in the low precision of the model
    expected = -reference_token_loss(logits, labels, loss_mask=mask)
    # A product of another height may be summed in another order: one rounding of the largest logit, in the low
    # precision.
    torch.testing.assert_close(
        found.double(), expected, rtol=1e-6, atol=float(logits.abs().max()) * torch.finfo(dtype).eps
    )


def test_logprob_holds_one_chunk_of_logits(generator):
    hidden, weight = torch.randn(640, 8, requires_grad=True), torch.randn(8192, 8, requires_grad=True)
    labels = torch.randint(8192, (640,), generator=generator)
    with LargestTensor(hidden, weight) as seen:
        found = token_logprob(hidden, weight, labels, chunk_tokens=32)
    assert not found.requires_grad
    assert seen.bytes <= 2 << 20 < 640 * 8192 * 4 / 8
    torch.testing.assert_close(found, -token_loss((hidden @ weight.t()).detach(), labels), rtol=1e-5, atol=1e-5)


def test_logprob_names_wrong_arguments():
    hidden, weight, labels = torch.zeros(4, 8), torch.zeros(9, 8), torch.zeros(4, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"weight: found shape \(9, 7\); expected \[V, 8\]"):
        token_logprob(hidden, weight[:, :7], labels)
    with pytest.raises(ValueError, match=r"hidden, weight: found torch.float32, torch.bfloat16"):
        token_logprob(hidden, weight.bfloat16(), labels)
    with pytest.raises(ValueError, match=r"labels: found shape \(3,\); expected \(4,\)"):
        token_logprob(hidden, weight, labels[:3])
    with pytest.raises(ValueError, match=r"chunk_tokens: found 0; expected at least 1"):
        token_logprob(hidden, weight, labels, chunk_tokens=0)
    with pytest.raises(ValueError, match=r"labels: found 9 at flat position 0"):
        token_logprob(hidden, weight, labels + 9)


def test_reference_is_the_definition(generator):
    logits = torch.randn(5, 11, generator=generator).requires_grad_()
    labels, incoming = torch.randint(9, (5,), generator=generator), uneven_weights(5, generator).double()
    loss = reference_token_loss(logits, labels, vocab_size=9)
    true_loss, true_gradient = definition(logits[:, :9], labels, incoming)
    torch.testing.assert_close(loss.detach(), true_loss, rtol=1e-12, atol=1e-12)
    (gradient,) = torch.autograd.grad(loss, logits, incoming)
    torch.testing.assert_close(gradient[:, :9].double(), true_gradient, rtol=1e-6, atol=1e-7)
    assert not gradient[:, 9:].any()


@pytest.mark.parametrize(
    ("tokens", "at_most", "size"),
    [
        (8192, 1337, 1280),
        (8192, 5000, 4096),
        (100, 4096, 128),
        (8192, 83, 83),
        (10, 4, 4),
        (10, 5, 5),
        (9, 8, 5),
        (0, 7, 1),
    ],
)
def test_chunks_are_equal_and_fill_the_tiles_of_a_product(tokens, at_most, size):
    assert equal_chunk(tokens, at_most) == size
    chunks = [min(size, tokens - first) for first in range(0, tokens, size)]
    assert len(chunks) <= -(-tokens // (at_most - at_most % 128 or at_most))
