"""On-disk layouts with numpy at the interface; FORMAT.md specifies the sparse-logit cache."""

from distill_pretrain.formats.atomic import canonical_json, publish_bytes, sha256_file
from distill_pretrain.formats.cache_plan import CachePlan
from distill_pretrain.formats.cache_reader import CacheReader
from distill_pretrain.formats.cache_verify import VerifyResult, verify_cache
from distill_pretrain.formats.cache_writer import CacheWriter, ShardWriter
from distill_pretrain.formats.codecs import codec_number
from distill_pretrain.formats.sequence_plan import SequenceOutOfRange, SequencePlan
from distill_pretrain.formats.token_index import TokenFingerprint, TokenIndex
from distill_pretrain.formats.token_writer import TokenIndexWriter
from distill_pretrain.formats.tokens_record import TokensRecord

__all__ = [
    "CachePlan",
    "CacheReader",
    "CacheWriter",
    "SequenceOutOfRange",
    "SequencePlan",
    "ShardWriter",
    "TokenFingerprint",
    "TokenIndex",
    "TokenIndexWriter",
    "TokensRecord",
    "VerifyResult",
    "canonical_json",
    "codec_number",
    "publish_bytes",
    "sha256_file",
    "verify_cache",
]
