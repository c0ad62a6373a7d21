"""Scores with any Hugging Face causal LM from a local folder, on the CPU or one GPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from distill_pretrain.dist.process import local_device, on_first_rank
from distill_pretrain.errors import MissingDependency, TeacherError, TokenizerMismatch
from distill_pretrain.formats.atomic import sha256_file

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
_IDENTITY_PATTERNS = ("config.json", "*.safetensors", "*.bin")


class HFEngine:
    """See `open_engine`. Nothing is downloaded and no remote code is run."""

    def __init__(self, path: Path, dtype: str, *, vocab_size: int, seq_len: int) -> None:
        try:
            from transformers import AutoModelForCausalLM
        except ImportError:
            raise MissingDependency(
                "transformers", extra="hf", needed_for="an hf teacher"
            ) from None
        if not (path / "config.json").exists():
            raise TeacherError(
                "not a Hugging Face model folder",
                where=path,
                expected="a local folder with config.json and weights",
                remedy="download the model first and set teacher.path to its folder",
            )
        try:
            model = AutoModelForCausalLM.from_pretrained(
                path, dtype=_DTYPES[dtype], local_files_only=True
            )
        except (OSError, ValueError, KeyError) as error:
            raise TeacherError("the model cannot be loaded", where=path, found=error) from None
        width = int(model.config.vocab_size)
        if width < vocab_size:
            raise TokenizerMismatch(
                "the model's vocabulary is smaller than the corpus's",
                where=path,
                found=f"{width} ids",
                expected=f"at least {vocab_size} ids",
                remedy="tokenise the corpus with the model's own tokenizer (tokenizer.kind=hf)",
            )
        longest = getattr(model.config, "max_position_embeddings", None)
        if longest is not None and seq_len > longest:
            raise TeacherError(
                "the sequences are longer than the model allows",
                where=path,
                found=f"data.seq_len = {seq_len}",
                expected=f"at most {longest}",
            )
        self.vocab_size = vocab_size
        self.device = local_device()
        self._model = model.to(self.device).eval()
        files = sorted({f for pattern in _IDENTITY_PATTERNS for f in path.glob(pattern)})
        digests = on_first_rank(lambda: {f.name: sha256_file(f) for f in files})
        self._identity = {
            "kind": "hf",
            "dtype": dtype,
            "model_type": str(model.config.model_type),
            "files": digests,
        }

    @property
    def identity(self) -> dict[str, Any]:
        """Engine, arithmetic and weights."""
        return self._identity

    @torch.no_grad()
    def logits(self, tokens: torch.Tensor) -> torch.Tensor:
        """float32[B, L, V] for tokens int64[B, L]."""
        output = self._model(input_ids=tokens, use_cache=False)
        return output.logits[..., : self.vocab_size].float()
