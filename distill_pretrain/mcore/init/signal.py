"""The signal of a model on a batch: what `deep_theory` predicts, measured by one forward and one backward pass.

Shapes: B sequences, T positions, H hidden width; megatron-core's streams are float[T, B, H].
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from distill_pretrain.contracts import TokenBatch
from distill_pretrain.mcore.init.deep import residual_scaling
from distill_pretrain.mcore.init.theory import Signal
from distill_pretrain.mcore.model.chunks import unwrap
from distill_pretrain.mcore.model.config import ModelConfig
from distill_pretrain.mcore.runtime.core import get_forward_backward_func, parallel_state

Figures = dict[str, dict[int, float]]


def measure(chunks: list[torch.nn.Module], model: ModelConfig, batch: TokenBatch) -> Signal:
    """Run a batch through the model chunks of this rank and gather every rank's figures.

    Args:
        chunks: the one of `build_model_chunks` with a loss function, without sequence parallelism or interleaving, not
            wrapped for training.
        model: their section.
        batch: one micro-batch, the same on every rank; the processes are tensor x pipeline parallel alone.
    """
    found: Figures = {"variance": {}, "correlation": {}, "gradient": {}, "weight_gradient": {}}
    hooks = [hook for chunk in chunks for hook in _watch(chunk, found)]
    try:
        _forward_backward(chunks, batch)
    finally:
        for hook in hooks:
            hook.remove()
    for chunk in chunks:
        _add_weight_gradients(chunk, found["weight_gradient"])
        chunk.zero_grad(set_to_none=True)
    found = _gathered(found)
    scaling = residual_scaling(model)
    points = range(model.num_layers + 1)
    scale = np.array([scaling.stream_scale(2 * point) ** 2 for point in points])
    return Signal(
        variance=np.array([found["variance"][p] for p in points]) * scale,
        correlation=np.array([found["correlation"][p] for p in points]),
        gradient=np.array([found["gradient"][p] for p in points]) / scale,
        weight_gradient=np.array([found["weight_gradient"][p] for p in points[1:]]),
    )


def _watch(chunk: torch.nn.Module, found: Figures) -> list[Any]:
    """Hooks that note the embedding's output as point 0 and that of layer i as point i."""
    gpt = unwrap(chunk)

    def note(point: int, _module: Any, _inputs: Any, output: Any) -> None:
        stream = output[0] if isinstance(output, tuple) else output
        seen = stream.detach().double()
        squares = float((seen**2).sum())
        sums = float((seen.sum(0) ** 2).sum())
        found["variance"][point] = squares / seen.numel()
        found["correlation"][point] = (sums - squares) / max(1, len(seen) - 1) / squares

        def note_gradient(gradient: torch.Tensor) -> None:
            found["gradient"][point] = float(gradient.detach().double().pow(2).mean())

        stream.register_hook(note_gradient)

    hooks = []
    if gpt.pre_process:
        hooks.append(gpt.embedding.register_forward_hook(partial(note, 0)))
    for layer in gpt.decoder.layers:
        hooks.append(layer.register_forward_hook(partial(note, layer.layer_number)))
    return hooks


def _mean_loss(num_tokens: torch.Tensor, terms: torch.Tensor) -> Any:
    return terms[0] / num_tokens, num_tokens, {}


def _forward_step(data_iterator: Iterator[TokenBatch], model: torch.nn.Module) -> Any:
    batch = next(data_iterator)
    positions = torch.arange(batch.tokens.size(1), device=batch.tokens.device)
    output = model(batch.tokens, positions.expand_as(batch.tokens), None, labels=batch)
    return output, partial(_mean_loss, (batch.labels >= 0).sum().to(torch.int))


def _forward_backward(chunks: list[torch.nn.Module], batch: TokenBatch) -> None:
    get_forward_backward_func()(
        forward_step_func=_forward_step,
        data_iterator=iter([batch]),
        model=chunks,
        num_microbatches=1,
        seq_length=batch.tokens.size(1),
        micro_batch_size=batch.tokens.size(0),
        forward_only=False,
    )


def _add_weight_gradients(chunk: torch.nn.Module, found: dict[int, float]) -> None:
    """Norm over a layer's matrices, all of them split over the tensor-parallel group."""
    for layer in unwrap(chunk).decoder.layers:
        grads = [p.grad for p in layer.parameters() if p.dim() > 1 and p.grad is not None]
        squares = torch.stack([g.double().pow(2).sum() for g in grads]).sum()
        dist.all_reduce(squares, group=parallel_state.get_tensor_model_parallel_group())
        found[layer.layer_number] = math.sqrt(float(squares))


def _gathered(found: Figures) -> Figures:
    everyones: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyones, found)
    return {
        name: {point: value for figures in everyones for point, value in figures[name].items()}
        for name in found
    }
