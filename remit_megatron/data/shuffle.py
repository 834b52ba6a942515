"""Orders that never change: permutations from integer arithmetic alone.

A cache of reference scores lives for years and names its samples by number, so the order of documents in a corpus may
not depend on the version of a random number library. Everything here is fixed by the equations below (64-bit unsigned,
wrapping):

    mix(x):  x ^= x >> 30;  x *= 0xBF58476D1CE4E5B9;  x ^= x >> 27;  x *= 0x94D049BB133111EB;  x ^= x >> 31

which is the output function of SplitMix64 (Steele, Lea, Flood, 2014) and a bijection.
"""

from __future__ import annotations

import hashlib

import numpy as np

_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15
_ROUNDS = 8
_TABLE_SIZE = 4096


def mix64(value: int) -> int:
    """The bijection of the module docstring on one integer in [0, 2^64)."""
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)


def mix64_array(values: np.ndarray) -> np.ndarray:
    """`mix64` of every element of a uint64 array; a new array of the same shape."""
    values = values ^ (values >> np.uint64(30))
    values *= np.uint64(0xBF58476D1CE4E5B9)
    values ^= values >> np.uint64(27)
    values *= np.uint64(0x94D049BB133111EB)
    values ^= values >> np.uint64(31)
    return values


def stream_key(*parts: str | int) -> int:
    """A 64-bit key for a named stream: the first eight bytes of SHA-256 over the parts, big-endian."""
    text = "\x1f".join(f"{type(part).__name__}:{part}" for part in parts)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


def keyed_order(count: int, *, key: int) -> np.ndarray:
    """A permutation as an array: element i sorts by mix(key + (i + 1) * golden).

    The sort keys are all different (mix and the multiplication by an odd number are bijections), so the order does not
    depend on the sorting algorithm either.

    Returns:
        A permutation of 0 ... count - 1, int32 [count] (int64 from 2^31 on). Working memory is 24 bytes an element.
    """
    keys = np.arange(1, count + 1, dtype=np.uint64)
    keys *= np.uint64(_GOLDEN)
    keys += np.uint64(key)
    order = np.argsort(mix64_array(keys))
    return order.astype(np.int32 if count <= np.iinfo(np.int32).max else np.int64)


class Permutation:
    """A permutation of 0 ... size - 1 that needs next to no memory: position in, element out, in constant time.

    An alternating Feistel network over the smallest power of two that holds ``size``; results outside are fed in again
    until one is inside (cycle walking: fewer than two passes on average), which keeps it a bijection. Over a handful of
    elements such a network prefers some orders to others, so up to 4096 elements it is `keyed_order`.

    Args:
        size: how many elements; at least one.
        key: which permutation, from `stream_key`.
    """

    def __init__(self, size: int, *, key: int):
        assert size >= 1, size
        self.size = size
        self._table = keyed_order(size, key=key) if size <= _TABLE_SIZE else None
        bits = (size - 1).bit_length()
        self._low_bits = bits - bits // 2
        self._low_mask = (1 << self._low_bits) - 1
        self._high_mask = (1 << (bits // 2)) - 1
        self._keys = [mix64((key + (i + 1) * _GOLDEN) & _MASK) for i in range(_ROUNDS)]

    def __call__(self, position: int) -> int:
        """The element at ``position``, 0 <= position < size."""
        assert 0 <= position < self.size, (position, self.size)
        if self._table is not None:
            return int(self._table[position])
        value = position
        while True:
            value = self._network(value)
            if value < self.size:
                return value

    def elements(self, first: int, last: int) -> np.ndarray:
        """The elements at positions ``first`` to ``last - 1``, int64; working memory is some 40 bytes an element."""
        assert 0 <= first <= last <= self.size, (first, last, self.size)
        if self._table is not None:
            return self._table[first:last].astype(np.int64)
        values = np.arange(first, last, dtype=np.uint64)
        outside = np.ones(len(values), dtype=bool)
        while outside.any():
            values[outside] = self._network_array(values[outside])
            outside = values >= self.size
        return values.astype(np.int64)

    def _network_array(self, values: np.ndarray) -> np.ndarray:
        shift, low_mask, high_mask = (np.uint64(n) for n in (self._low_bits, self._low_mask, self._high_mask))
        keys = [np.uint64(key) for key in self._keys]
        high, low = values >> shift, values & low_mask
        for i in range(0, _ROUNDS, 2):
            high = high ^ (mix64_array(keys[i] ^ low) & high_mask)
            low = low ^ (mix64_array(keys[i + 1] ^ high) & low_mask)
        return high << shift | low

    def _network(self, value: int) -> int:
        high, low = value >> self._low_bits, value & self._low_mask
        keys = self._keys
        for i in range(0, _ROUNDS, 2):
            high ^= mix64(keys[i] ^ low) & self._high_mask
            low ^= mix64(keys[i + 1] ^ high) & self._low_mask
        return high << self._low_bits | low
