"""Several packed corpora as one data set, in proportion to their weights.

A sample of the blend is decided by arithmetic on its number: which data set it comes from (a tree of two-way splits),
how many samples of that data set came before, and so its epoch and its place in the epoch's order (a keyed
permutation).
Nothing is stored per sample: opening costs nothing, memory does not depend on the number of samples (a few kilobytes,
for 12 million as for 12), and a run resumes anywhere for free.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from remit_megatron.data.blend_file import WEIGHTS, expand_entry, is_weight
from remit_megatron.data.manifest import Manifest, read_manifest
from remit_megatron.data.packing import PackedDataset, check_corpus, sample_identity
from remit_megatron.data.shuffle import Permutation, stream_key
from remit_megatron.runtime.errors import UserError, show


class BlendEntry(NamedTuple):
    """One data set of a blend; weight None: in proportion to its number of tokens."""

    weight: float | None
    prefix: str


class BlendOrder:
    """Which data set the i-th sample of a blend comes from, for weights that need not sum to 1.

    The data sets are the leaves of a binary tree. An inner node hands the m-th of its samples to the left child when
    floor(p * (m + 1) + 1/2) > floor(p * m + 1/2), with p the left child's share. After any number n of samples, the
    count c of a data set with weight w is off its ideal by |c - w * n| <= `deviation`: the largest e of a leaf, where
    e = 1/2 + p * e' with e' of the parent, and 0 at the root. That is below one sample for up to four data sets. It is
    below two for any number: halves are balanced until the larger holds two thirds at most or is a single data set.

    Args:
        weights: positive.
    """

    def __init__(self, weights: Sequence[float]):
        # Scaled first: the sum of numbers near the largest float would be none.
        largest = max(weights)
        weights = [weight / largest for weight in weights] if largest > 1e300 else weights
        total = math.fsum(weights)
        self.weights = [weight / total for weight in weights]
        self.deviation = 0.0
        self._tree = self._split(sorted(range(len(weights)), key=lambda i: (-self.weights[i], i)), 0.0)

    def __call__(self, index: int) -> tuple[int, int]:
        """Data set of sample ``index``, and how many samples of that data set come before it."""
        node = self._tree
        while not isinstance(node, int):
            share, left, right = node
            before = math.floor(share * index + 0.5)
            if math.floor(share * (index + 1) + 0.5) > before:
                node, index = left, before
            else:
                node, index = right, index - before
        return node, index

    def counts(self, samples: int) -> list[int]:
        """How many of the first ``samples`` come from each data set."""
        counts = [0] * len(self.weights)
        pending = [(self._tree, samples)]
        while pending:
            node, count = pending.pop()
            if isinstance(node, int):
                counts[node] = count
            else:
                share, left, right = node
                to_the_left = math.floor(share * count + 0.5)
                pending += [(left, to_the_left), (right, count - to_the_left)]
        return counts

    def _split(self, members: list[int], error: float) -> Any:
        """A leaf (the number of a data set), or (share of the left, left, right); ``members`` by falling weight."""
        if len(members) == 1:
            self.deviation = max(self.deviation, error)
            return members[0]
        halves: tuple[list[int], list[int]] = ([], [])
        if len(self.weights) == len(members) == 4:  # pairs keep the tree flat, and with it the deviation below one
            halves[0].extend((members[0], members[3]))
            halves[1].extend((members[1], members[2]))
        else:
            sums = [0.0, 0.0]
            for member in members:
                lighter = int(sums[1] < sums[0])
                halves[lighter].append(member)
                sums[lighter] += self.weights[member]
        left, right = (math.fsum(self.weights[member] for member in half) for half in halves)
        share = left / (left + right)
        return (
            share,
            self._split(halves[0], 0.5 + share * error),
            self._split(halves[1], 0.5 + (1 - share) * error),
        )


class BlendedDataset(torch.utils.data.Dataset):
    """``num_samples`` samples of several packed data sets, in proportion to their weights.

    Each data set is gone through epoch by epoch. An epoch is the whole of its samples, each once, in an order drawn
    from (seed, data set, epoch); a data set whose weight asks for less than an epoch gives the beginning of one.

    Args:
        datasets: the packed data sets, all of one sequence length.
        weights: their shares; positive, need not sum to 1.
        num_samples: length.
        seed: of the order.
        eod_id: end-of-document token; None where the data has none.
        mask_eod_loss: do not count the prediction of what follows an end of document.

    Raises:
        UserError: a weight that is not positive and finite, or the same data twice.
    """

    def __init__(
        self,
        datasets: Sequence[PackedDataset],
        weights: Sequence[float],
        *,
        num_samples: int,
        seed: int,
        eod_id: int | None,
        mask_eod_loss: bool = False,
    ):
        assert len(datasets) == len(weights) > 0, (len(datasets), len(weights))
        for dataset, weight in zip(datasets, weights, strict=True):
            if not (math.isfinite(weight) and weight > 0):
                raise UserError(f"weight of {dataset.prefix}", weight, "a finite number greater than 0")
        _check_distinct([(dataset.prefix, dataset.identity) for dataset in datasets])
        if mask_eod_loss and eod_id is None:
            raise UserError("data.mask_eod_loss", "true, with no end-of-document token", "a tokenizer that has one")
        self.datasets = list(datasets)
        self.order = BlendOrder(weights)
        self.seed = seed
        self._num_samples = num_samples
        self._masked_id = eod_id if mask_eod_loss else None
        self._permutations: list[tuple[int, Permutation] | None] = [None] * len(datasets)

    def __len__(self) -> int:
        return self._num_samples

    def locate(self, index: int) -> tuple[int, int]:
        """Data set (position in `datasets`) and sample of it that are number ``index`` of the blend."""
        if not 0 <= index < self._num_samples:
            raise IndexError(f"sample {index} of {self._num_samples}")
        dataset_id, before = self.order(index)
        epoch, position = divmod(before, len(self.datasets[dataset_id]))
        return dataset_id, self._permutation(dataset_id, epoch)(position)

    def samples_between(self, first: int, last: int) -> list[np.ndarray]:
        """What numbers ``first`` to ``last - 1`` of the blend are made of: for each data set its samples, int64, each
        once, in the order of their first use within an epoch."""
        begins, ends = self.order.counts(first), self.order.counts(last)
        return [self._between(number, *span) for number, span in enumerate(zip(begins, ends, strict=True))]

    def _between(self, dataset_id: int, begin: int, end: int) -> np.ndarray:
        size = len(self.datasets[dataset_id])
        if -(-begin // size) * size + size <= end:  # a whole epoch is among them
            begin, end = 0, size
        pieces = [np.empty(0, dtype=np.int64)]
        while begin < end:
            epoch, position = divmod(begin, size)
            taken = min(end - begin, size - position)
            pieces.append(self._permutation(dataset_id, epoch).elements(position, position + taken))
            begin += taken
        samples = np.concatenate(pieces)
        _, places = np.unique(samples, return_index=True)
        return samples[np.sort(places)]

    def _permutation(self, dataset_id: int, epoch: int) -> Permutation:
        latest = self._permutations[dataset_id]
        if latest is None or latest[0] != epoch:
            dataset = self.datasets[dataset_id]
            key = stream_key("samples", self.seed, dataset.identity, epoch)
            latest = self._permutations[dataset_id] = (epoch, Permutation(len(dataset), key=key))
        return latest[1]

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        """One sample.

        Returns:
            tokens, labels: int64 [s], labels[t] = tokens[t + 1].
            loss_mask: float32 [s], 1 where the prediction counts.
            dataset_id, sample_id: int64 [], as `locate`; ``datasets[dataset_id].identity`` and sample_id name the
            sample for ever.
        """
        dataset_id, sample_id = self.locate(int(index))
        sample = torch.from_numpy(self.datasets[dataset_id][sample_id])
        tokens, labels = sample[:-1], sample[1:].clone()
        loss_mask = torch.ones(len(tokens), dtype=torch.float32)
        if self._masked_id is not None:
            loss_mask[tokens == self._masked_id] = 0.0
        return {
            "tokens": tokens,
            "labels": labels,
            "loss_mask": loss_mask,
            "dataset_id": torch.tensor(dataset_id),
            "sample_id": torch.tensor(sample_id),
        }


def parse_blend(value: Any, *, field: str = "data.train") -> list[BlendEntry]:
    """What a configuration says about data: ``[[0.7, prefix], [0.3, prefix]]``, a prefix, or a list of prefixes.

    A blend file may stand for a prefix; its data sets share the weight in the proportions that it gives them.

    Raises:
        UserError: anything else, named as ``data.train[1]``.
    """
    if isinstance(value, str | os.PathLike):
        value = [value]
    if not isinstance(value, Sequence) or not value:
        expected = "a prefix, a list of prefixes, or a list of [weight, prefix] pairs"
        raise UserError(field, "nothing" if value is None else value, expected)
    entries = [_parse_entry(item, f"{field}[{number}]") for number, item in enumerate(value)]
    weighted = [entry.weight is not None for entry in entries]
    if any(weighted) and not all(weighted):
        number = weighted.index(False)
        found = f"{entries[number].prefix}, without a weight"
        raise UserError(f"{field}[{number}]", found, "a [weight, prefix] pair, as the others are")
    return [
        BlendEntry(weight, prefix)
        for number, entry in enumerate(entries)
        for weight, prefix in expand_entry(*entry, alone=len(entries) == 1, field=f"{field}[{number}]")
    ]


def _parse_entry(item: Any, field: str) -> BlendEntry:
    expected = "a [weight, prefix] pair, as [0.7, data/corpus]"
    if isinstance(item, str | os.PathLike):
        weight, prefix = None, os.fspath(item)
    elif isinstance(item, Sequence) and len(item) == 2:
        weight, prefix = item
        if not isinstance(prefix, str | os.PathLike):
            raise UserError(field, list(item), expected)
        prefix = os.fspath(prefix)
        if weight is not None:
            if not is_weight(weight):
                raise UserError(field, f"weight {show(weight)}", f"a finite number greater than 0 ({WEIGHTS})")
            weight = float(weight)
    else:
        raise UserError(field, item, expected)
    if not prefix:
        raise UserError(field, "an empty prefix", expected)
    return BlendEntry(weight, prefix)


class BlendSummary(NamedTuple):
    """What can be said of a blend without opening it.

    Attributes:
        datasets: prefix and identity of the samples of each data set.
        weights: their shares, which sum to 1.
    """

    datasets: list[tuple[str, str]]
    weights: list[float]


def summarize_blend(
    entries: Sequence[tuple[float | None, str]],
    *,
    sequence_length: int,
    packing_seed: int,
    tokenizer_digest: str | Sequence[str] | None,
    eod_id: int | None,
) -> BlendSummary:
    """Reads the manifests of a blend's data sets; arguments as for `open_blend`.

    Raises:
        UserError: as `open_blend`, as far as manifests tell.
    """
    manifests = [read_manifest(prefix) for _, prefix in entries]
    datasets = []
    for (_, prefix), manifest in zip(entries, manifests, strict=True):
        check_corpus(prefix, manifest, sequence_length=sequence_length, tokenizer_digest=tokenizer_digest)
        _check_end(prefix, manifest, eod_id)
        identity = sample_identity(manifest, sequence_length=sequence_length, packing_seed=packing_seed)
        datasets.append((prefix, identity))
    _check_distinct(datasets)
    return BlendSummary(datasets, BlendOrder(_weights(entries, manifests)).weights)


def _check_end(prefix: str, manifest: Manifest, eod_id: int | None) -> None:
    if None not in (manifest.eod_id, eod_id) and manifest.eod_id != eod_id:
        found = f"end-of-document token {manifest.eod_id}"
        raise UserError(prefix, found, f"{eod_id}, the tokenizer's of this run")


def _check_distinct(datasets: Sequence[tuple[str, str]]) -> None:
    """Prefix and identity of each."""
    first: dict[str, str] = {}
    for prefix, identity in datasets:
        if identity in first:
            found = f"the same contents as {first[identity]}"
            raise UserError(prefix, found, "each data set once, with the sum of the weights")
        first[identity] = prefix


def _weights(entries: Sequence[tuple[float | None, str]], manifests: Sequence[Manifest]) -> list[float]:
    return [
        manifest.tokens if weight is None else weight for (weight, _), manifest in zip(entries, manifests, strict=True)
    ]


def open_blend(
    entries: Sequence[tuple[float | None, str]],
    *,
    sequence_length: int,
    num_samples: int,
    seed: int,
    packing_seed: int = 0,
    cache_dir: str | os.PathLike | None = None,
    tokenizer_digest: str | Sequence[str] | None = None,
    eod_id: int | None = None,
    mask_eod_loss: bool = False,
) -> BlendedDataset:
    """Opens the data sets of a blend; arguments as for `PackedDataset` and `BlendedDataset`.

    Raises:
        UserError: as those; or a data set whose documents end in another token than ``eod_id``.
    """
    datasets = []
    for _, prefix in entries:
        dataset = PackedDataset(
            prefix,
            sequence_length=sequence_length,
            packing_seed=packing_seed,
            cache_dir=cache_dir,
            tokenizer_digest=tokenizer_digest,
        )
        _check_end(prefix, dataset.manifest, eod_id)
        datasets.append(dataset)
    weights = _weights(entries, [dataset.manifest for dataset in datasets])
    return BlendedDataset(
        datasets, weights, num_samples=num_samples, seed=seed, eod_id=eod_id, mask_eod_loss=mask_eod_loss
    )
