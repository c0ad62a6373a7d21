"""Targets as DistillKit packs them, by its own code, and MaxText's records, re-made from its source.

MaxText's are what its `save_top_k_teacher_logits.py`, as public in August 2026, writes: one pickled dictionary per
batch in an ArrayRecord file, `group_size:1000`; float32 logits, int32 ids, and the columns that its trainer wants
beside them.
"""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rivals.kept import Chunk, Kept, Use

DISTILLKIT_RECOMMENDED = {
    "k": 128,
    "exact_k": 16,
    "polynomial_terms": [0, 1, 2, 3, 4, "sqrt"],
}
DISTILLKIT_NORMALIZED = {**DISTILLKIT_RECOMMENDED, "normalize_t": True}
"""A setting that its README leaves out: in fp32 on a CPU the fit is off by nats at some entries without it."""
DISTILLKIT_BUDGET = {"k": 50, "exact_k": 1, "polynomial_terms": [0, 1, "sqrt"]}
"""The two settings that DistillKit's README recommends; see `distillkit_settings`."""


def distillkit_settings(chosen: dict[str, Any], vocab_size: int) -> dict[str, Any]:
    """What the README says of both besides."""
    return {
        "d": vocab_size,
        "exact_dtype": "bfloat16",
        "term_dtype": "float32",
        "residual_bins": [],
        "delta_encoding": False,
        "error_diffusion": False,
        **chosen,
    }


def distillkit_bytes(chosen: dict[str, Any], vocab_size: int) -> float:
    """Bytes per token by arithmetic: ids of ceil(log2 V) bits, packed; exact values bf16; a polynomial in fp32."""
    id_bits = (vocab_size - 1).bit_length()
    packed = -(-chosen["k"] * id_bits // 8)
    return float(packed + 2 * chosen["exact_k"] + 4 * len(chosen["polynomial_terms"]))


class DistillKit:
    """Its packed format as DistillKit's own code makes and reads it, in a plain file.

    DistillKit puts the same bytes into Parquet; the file here is what they are without it. Its loss divides the kept
    probabilities by their sum, unless told otherwise.

    Args:
        chosen: one of the settings above.
        file: to write.
        vocab_size: V.

    Raises:
        ImportError: the package distillkit is not on PYTHONPATH.
    """

    use: Use = "renormalised"

    def __init__(self, chosen: dict[str, Any], file: Path, vocab_size: int) -> None:
        from distillkit.compression import DistributionQuantizationConfig, LogprobCompressor

        self.name = f"DistillKit {chosen['k']}" + ", normalize_t" * chosen.get("normalize_t", False)
        self.basis = "DistillKit's code"
        settings = DistributionQuantizationConfig(**distillkit_settings(chosen, vocab_size))
        self._compressor = LogprobCompressor(settings)
        self._k = chosen["k"]
        self._path, self._file = file, file.open("wb")
        self._shapes: list[list[tuple[str, tuple[int, ...]]]] = []

    def write(self, chunk: Chunk) -> None:
        """See `Layout`."""
        logits = torch.from_numpy(chunk.logits)
        values, ids = logits.topk(self._k, dim=-1)
        values = values - logits.logsumexp(-1, keepdim=True)
        packed = self._compressor.compress_from_sparse(ids, values)
        self._shapes.append([(name, tuple(part.shape)) for name, part in packed.items()])
        for part in packed.values():
            self._file.write(part.numpy().tobytes())

    def finish(self) -> int:
        """See `Layout`."""
        self._file.close()
        return self._path.stat().st_size

    def read(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """See `Layout`."""
        with self._path.open("rb") as file:
            for shapes in self._shapes:
                row = {}
                for name, shape in shapes:
                    data = bytearray(file.read(int(np.prod(shape))))
                    row[name] = torch.frombuffer(data, dtype=torch.uint8).view(shape)
                yield self._compressor.decompress_to_sparse(row)

    def kept(self, read: tuple[torch.Tensor, torch.Tensor]) -> Kept:
        """See `Layout`."""
        ids, values = read
        return Kept(ids.numpy(), values.float().exp().numpy())


class MaxText:
    """Its records of the k largest logits; its loss takes both softmaxes over the kept ids alone.

    Args:
        k: how many.
        file: to write.

    Raises:
        ImportError: the package array-record is not installed.
    """

    use: Use = "both renormalised"

    def __init__(self, k: int, file: Path) -> None:
        from array_record.python.array_record_module import ArrayRecordWriter

        self.name = f"MaxText {k}"
        self.basis = "re-made from MaxText's source"
        self._k, self._path = k, file
        self._writer = ArrayRecordWriter(str(file), "group_size:1000")

    def write(self, chunk: Chunk) -> None:
        """See `Layout`."""
        values, ids = torch.from_numpy(chunk.logits).topk(self._k, dim=-1)
        shape = (*chunk.tokens.shape, self._k)
        ones = np.ones_like(chunk.tokens)
        record = {
            "tokens": chunk.tokens,
            "top_k_logits": values.numpy().reshape(shape),
            "top_k_indices": ids.numpy().astype(np.int32).reshape(shape),
            "inputs_position": np.cumsum(ones, axis=1, dtype=np.int32) - 1,
            "inputs_segmentation": ones,
            "targets_segmentation": ones,
            "targets": np.roll(chunk.tokens, -1, axis=1),
        }
        self._writer.write(pickle.dumps(record))

    def finish(self) -> int:
        """See `Layout`."""
        self._writer.close()
        return self._path.stat().st_size

    def read(self) -> Iterator[dict[str, Any]]:
        """See `Layout`."""
        from array_record.python.array_record_module import ArrayRecordReader

        reader = ArrayRecordReader(str(self._path))
        for record in reader.read_all():
            yield pickle.loads(record)
        reader.close()

    def kept(self, read: dict[str, Any]) -> Kept:
        """See `Layout`; the kept ids' softmax, which is all that it keeps."""
        logits = read["top_k_logits"].reshape(-1, self._k).astype(np.float64)
        probs = np.exp(logits - logits.max(axis=1, keepdims=True))
        probs /= probs.sum(axis=1, keepdims=True)
        return Kept(read["top_k_indices"].reshape(-1, self._k), probs.astype(np.float32))
