"""Names of the parameters of experts, as megatron-core's sequence of experts has them; loads neither it nor torch."""

from __future__ import annotations

LOCAL = ".mlp.experts.local_experts."


def is_of_expert(name: str) -> bool:
    """Say whether a parameter belongs to one expert: ranks share these out, whatever the tensor-parallel size."""
    return LOCAL in f".{name}"
