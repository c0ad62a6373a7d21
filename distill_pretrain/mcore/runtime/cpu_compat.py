"""Runs megatron-core's own code on a machine without CUDA: `cuda` means `cpu`.

megatron-core 0.16 calls `torch.cuda.current_device()`, hard-codes `device="cuda"` in its schedules and compares
`Tensor.type()` strings, so configuration flags alone do not make it run on CPU. `enable()` replaces a closed list
of `torch.cuda` functions, enters one `TorchFunctionMode` that redirects devices, and mends megatron-core's RNG
tracker, whose private CUDA hook would otherwise silently do nothing. Where CUDA exists it does nothing at all.

This is the only file of the project that knows about the difference, but for `importing.py`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

_CPU = torch.device("cpu")
_CUDA_TYPE_NAMES = {
    "torch.FloatTensor": "torch.cuda.FloatTensor",
    "torch.HalfTensor": "torch.cuda.HalfTensor",
    "torch.BFloat16Tensor": "torch.cuda.BFloat16Tensor",
}


def _names_cuda(device: object) -> bool:
    if isinstance(device, bool):
        return False
    if isinstance(device, int):
        return True
    if isinstance(device, str):
        return device.startswith("cuda")
    return isinstance(device, torch.device) and device.type == "cuda"


class _CudaMeansCpu(TorchFunctionMode):
    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if func is torch.Tensor.cuda:
            return args[0]
        if func is torch.Tensor.type and len(args) == 1 and not kwargs:
            name = func(args[0])
            return _CUDA_TYPE_NAMES.get(name, name)
        if kwargs and _names_cuda(kwargs.get("device")):
            kwargs = {**kwargs, "device": _CPU}
        if kwargs and kwargs.get("pin_memory"):
            kwargs = {**kwargs, "pin_memory": False}
        if func is torch.Tensor.to and len(args) > 1 and _names_cuda(args[1]):
            args = (args[0], _CPU, *args[2:])
        return func(*args, **(kwargs or {}))


class _NullStream:
    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *args, **kwargs: None

    def __enter__(self) -> _NullStream:
        return self

    def __exit__(self, *exc: object) -> None:
        return None


class _NullCopies(_NullStream):
    """The stream on which megatron-core copies numbers of tokens to the host; here they are there."""

    def record_event(self) -> _NullStream:
        return _NullStream()


def _no_op() -> Callable[..., None]:
    """A new function each time: torch.compile refuses one object under two names."""
    return lambda *args, **kwargs: None


_REPLACED: dict[str, Callable[..., Any]] = {
    "current_device": lambda: _CPU,
    "synchronize": _no_op(),
    "set_device": _no_op(),
    "empty_cache": _no_op(),
    "manual_seed": torch.manual_seed,
    "get_rng_state": lambda device=None: torch.get_rng_state(),
    "set_rng_state": lambda state, device=None: torch.set_rng_state(state),
    "current_stream": lambda *args, **kwargs: _NullStream(),
    "default_stream": lambda *args, **kwargs: _NullStream(),
    "stream": lambda stream=None: contextlib.nullcontext(),
}

_mode: _CudaMeansCpu | None = None
_originals: list[tuple[ModuleType | type, str, Any]] = []


def _set_tracker_state(new_state: torch.Tensor, device: int = -1, graph_safe: bool = False) -> None:
    torch.set_rng_state(new_state)


def _counts_on_host(counts: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
    """Numbers of tokens as megatron-core hands them to collectives; its own function leaves tensors of CPUs alone."""
    return counts.numpy() if as_numpy and torch.is_tensor(counts) else counts


def enable() -> None:
    """Make megatron-core run on this process's CPU; does nothing where CUDA is available. Idempotent."""
    global _mode
    if torch.cuda.is_available() or _mode is not None:
        return
    from distill_pretrain.mcore.runtime.core import megatron_random, token_dispatcher

    for name, function in _REPLACED.items():
        _replace(torch.cuda, name, function)
    _replace(torch.cuda.random, "get_rng_state", torch.cuda.get_rng_state)
    _replace(megatron_random, "_set_cuda_rng_state", _set_tracker_state)
    _replace(token_dispatcher, "maybe_move_tensor_to_cpu", _counts_on_host)
    _replace(token_dispatcher.MoEAlltoAllTokenDispatcher, "cuda_dtoh_stream", _NullCopies())
    _mode = _CudaMeansCpu()
    _mode.__enter__()


def _replace(module: ModuleType | type, name: str, function: Any) -> None:
    _originals.append((module, name, getattr(module, name)))
    setattr(module, name, function)


@contextlib.contextmanager
def disabled_at_the_end() -> Iterator[None]:
    """Undo at the end of the block what `enable` does inside it.

    This is for a job in a process that goes on with something else.

    Where it was enabled before, it stays so. No model of the block can be used after it without a GPU.
    """
    global _mode
    was_enabled = _mode is not None
    try:
        yield
    finally:
        if _mode is not None and not was_enabled:
            _mode.__exit__(None, None, None)
            _mode = None
            while _originals:
                setattr(*_originals.pop())


def transformer_overrides() -> dict[str, Any]:
    """Return TransformerConfig settings that differ on CPU: init there, keep pipeline outputs (gloo sends late)."""
    if torch.cuda.is_available():
        return {}
    return {"use_cpu_initialization": True, "deallocate_pipeline_outputs": False}
