"""The model as transformers computes it: loading, leaving layers out, building a smaller one, and its loss."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from distill_pretrain.checkpoint.hf.files import DTYPES
from distill_pretrain.contracts import IGNORED_LABEL
from distill_pretrain.errors import CheckpointError, MissingDependency
from distill_pretrain.teacher.engines.known_head import finish_of
from distill_pretrain.teacher.engines.weights import quiet

_HEAD_CHUNK = 1024

Batch = tuple[torch.Tensor, torch.Tensor]
"""Tokens and labels, int64[B, L]; -100 where there is no label."""


def import_transformers() -> Any:
    """Import the package, or name the line that installs it.

    Raises:
        MissingDependency: it is not there.
    """
    try:
        import transformers
    except ImportError:
        raise MissingDependency("transformers", extra="hf", needed_for="pruning") from None
    return transformers


def load_model(folder: Path, dtype: str, device: torch.device) -> Any:
    """Load the causal LM of a folder that `check_hf_weights` has checked, ready to be run.

    Args:
        folder: with safetensors files.
        dtype: "fp32" or "bf16", of the arithmetic.
        device: where it will be.

    Raises:
        CheckpointError: transformers refuses it.
    """
    automatic = import_transformers().AutoModelForCausalLM
    try:
        with quiet():
            model = automatic.from_pretrained(
                folder, dtype=DTYPES[dtype], local_files_only=True, use_safetensors=True
            )
    except Exception as error:  # transformers raises nearly anything here
        raise CheckpointError(
            "transformers cannot load the model",
            where=folder,
            found=f"{type(error).__name__}: {error}",
        ) from error
    return model.to(device).eval()


def build_model(
    config: Mapping[str, Any], tensors: Mapping[str, torch.Tensor], dtype: str, device: torch.device
) -> Any:
    """Build the causal LM of a config.json with these weights, ready to be run; nothing is written."""
    transformers = import_transformers()
    settings = transformers.AutoConfig.for_model(**config)
    with torch.device("meta"):
        kind = type(transformers.AutoModelForCausalLM.from_config(settings))
    with quiet():
        model = kind.from_pretrained(
            None, config=settings, state_dict=dict(tensors), dtype=DTYPES[dtype]
        )
    return model.to(device).eval()


@contextmanager
def without_layers(model: Any, removed: Sequence[int]) -> Iterator[None]:
    """Leave layers out of a model inside the block; the others keep their kind of attention."""
    trunk = model.model
    layers, config = trunk.layers, trunk.config
    kinds = getattr(config, "layer_types", None)
    kept = [number for number in range(len(layers)) if number not in set(removed)]
    trunk.layers = torch.nn.ModuleList([layers[number] for number in kept])
    if kinds:
        # Some classes look a layer's kind up by its place.
        config.layer_types = [kinds[number] for number in kept]
    try:
        yield
    finally:
        trunk.layers = layers
        if kinds:
            config.layer_types = kinds


@torch.no_grad()
def mean_loss(model: Any, batches: Sequence[Batch], *, vocab_size: int) -> float:
    """Return the cross-entropy in nats per labelled position, added up in float64.

    Args:
        model: causal LM of transformers.
        batches: micro-batches with at least one label.
        vocab_size: V of the corpus; further columns are padding and left out of the softmax.
    """
    total, count = 0.0, 0
    finish = finish_of(model.config) or (lambda logits: logits)
    for tokens, labels in batches:
        hidden = model.model(input_ids=tokens.to(model.device), use_cache=False)[0].flatten(0, 1)
        expected = labels.to(model.device).flatten()
        for start in range(0, len(hidden), _HEAD_CHUNK):
            stop = start + _HEAD_CHUNK
            logits = finish(model.lm_head(hidden[start:stop])[:, :vocab_size]).float()
            losses = F.cross_entropy(
                logits, expected[start:stop], reduction="none", ignore_index=IGNORED_LABEL
            )
            total += float(losses.double().sum())
        count += int((expected != IGNORED_LABEL).sum())
    return total / count
