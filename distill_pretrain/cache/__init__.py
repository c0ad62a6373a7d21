"""The sparse-logit cache, with numpy at the interface; FORMAT.md specifies its bytes."""

from distill_pretrain.cache.codec.registry import codec_number
from distill_pretrain.cache.plan import CachePlan
from distill_pretrain.cache.reader import CacheReader
from distill_pretrain.cache.shard_writer import ShardWriter
from distill_pretrain.cache.verify import VerifyResult, verify_cache
from distill_pretrain.cache.writer import CacheWriter

__all__ = [
    "CachePlan",
    "CacheReader",
    "CacheWriter",
    "ShardWriter",
    "VerifyResult",
    "codec_number",
    "verify_cache",
]
