"""The frozen model that scores every token, and the cache of its scores."""

from remit_megatron.reference.cache import CacheIdentity, ReferenceCache

__all__ = ["CacheIdentity", "ReferenceCache"]
