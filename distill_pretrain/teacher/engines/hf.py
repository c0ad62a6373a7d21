"""Scores with any Hugging Face causal LM from a local folder, whole on the CPU or one GPU."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from distill_pretrain.contracts import LogitsChunk, Replica
from distill_pretrain.errors import TeacherError
from distill_pretrain.processes.env import launch_rank, launch_world_size
from distill_pretrain.processes.process import local_device, on_first_rank
from distill_pretrain.teacher.config import NO_TRUST, Trust
from distill_pretrain.teacher.engines.folder import (
    DTYPES,
    cannot_be_loaded,
    files_identity,
    import_transformers,
    read_config,
)
from distill_pretrain.teacher.engines.head import ChunkedHead, trunk_of
from distill_pretrain.teacher.engines.known_head import finish_of, require_known_head
from distill_pretrain.teacher.engines.text_part import causal_class, key_mapping
from distill_pretrain.teacher.engines.weights import (
    meta_model,
    require_all_loaded,
    require_own_weights,
    require_plain_head,
)


class HFEngine:
    """A Hugging Face causal LM, whole in this process; see `open_engine` and `open_teacher_engine`.

    Nothing is downloaded; what may run is in `Trust`.
    """

    def __init__(
        self,
        path: Path,
        dtype: str,
        *,
        vocab_size: int,
        seq_len: int,
        head_chunk_tokens: int = 1024,
        trust: Trust = NO_TRUST,
    ) -> None:
        config = read_config(path, vocab_size=vocab_size, seq_len=seq_len, trust=trust)
        files = on_first_rank(
            lambda: require_own_weights(path, meta_model(path, config, trust), trust)
        )
        mapping = key_mapping(path, config)
        # Else transformers reads the folder's own configuration again, as it is.
        nested: dict[str, Any] = {"config": config, "key_mapping": mapping} if mapping else {}
        try:
            model, info = causal_class(import_transformers(), config).from_pretrained(
                path,
                **nested,
                dtype=DTYPES[dtype],
                local_files_only=True,
                trust_remote_code=trust.remote_code,
                use_safetensors=files[0].suffix == ".safetensors",
                weights_only=True,
                output_loading_info=True,
            )
        except Exception as error:  # transformers raises nearly anything here
            raise cannot_be_loaded(path, error) from error
        require_all_loaded(path, info, mapping=mapping)
        self.vocab_size = vocab_size
        self.device = local_device()
        # Each process has a copy of its own.
        self.replica = Replica(
            leader=launch_rank(), number=launch_rank(), count=launch_world_size()
        )
        self._path, self._config, self._trust = path, config, trust
        self._head_chunk_tokens = head_chunk_tokens
        self._head: ChunkedHead | None = None
        self._model = model.to(self.device).eval()
        self._identity = {
            "kind": "hf",
            "dtype": dtype,
            "model_type": str(model.config.model_type),
            "files": files_identity(path, files, trust),
            "head_chunk_tokens": head_chunk_tokens,
        }

    @property
    def identity(self) -> dict[str, Any]:
        """Engine, arithmetic and weights."""
        return self._identity

    @torch.no_grad()
    def logits(self, tokens: torch.Tensor) -> torch.Tensor:
        """Compute logits float32[B, L, V] for tokens int64[B, L]."""
        output = self._model(input_ids=tokens, use_cache=False)
        return output.logits[..., : self.vocab_size].float()

    @cached_property
    def has_chunks(self) -> bool:
        """Whether `chunks` can be called: the LM head can be applied to a part of the positions."""
        try:
            self._require_chunks()
        except TeacherError:
            return False
        return True

    def _require_chunks(self) -> None:
        require_known_head(self._path, meta_model(self._path, self._config, self._trust))
        require_plain_head(self._path, self._model.get_output_embeddings().weight)

    def chunks(self, tokens: torch.Tensor) -> Iterator[LogitsChunk]:
        """See `TeacherEngine`."""
        # Only capture needs a head that can be applied to a part of the positions.
        if self._head is None:
            self._require_chunks()
            linear = self._model.get_output_embeddings()
            self._head = ChunkedHead(
                linear.weight.detach(),
                linear.bias,
                vocab_size=self.vocab_size,
                chunk_tokens=self._head_chunk_tokens,
                finish=finish_of(self._model.config),
            )
        with torch.no_grad():
            hidden = trunk_of(self._model)(input_ids=tokens, use_cache=False)[0]
        yield from self._head.chunks(hidden)
