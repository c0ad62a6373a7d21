"""Initial weights that do not depend on the parallel layout.

Megatron-core restarts its random stream on every pipeline stage and slices by tensor-parallel rank, so its initial
weights differ between layouts. Here each full matrix is drawn from a generator keyed by (seed, global parameter
name) and then sliced, so that any TP x PP x VPP layout starts, and can be compared, from the same weights.
"""

from __future__ import annotations

import hashlib

import torch

from distill_pretrain.mcore.init.deep import initial_stds, row_stds
from distill_pretrain.mcore.model.config import ModelConfig
from distill_pretrain.mcore.model.expert_names import is_of_expert
from distill_pretrain.mcore.model.experts import global_expert_name
from distill_pretrain.mcore.runtime.core import GPTModel, parallel_state

_JOINED_NORMS = {
    "self_attention.linear_qkv.layer_norm_": "input_layernorm.",
    "mlp.linear_fc1.layer_norm_": "pre_mlp_layernorm.",
}
"""Norms that Transformer Engine joins to the projection after them, and their names in the local spec."""


def global_name(gpt: GPTModel, name: str) -> str:
    """Return a parameter's name with the numbers, in the whole model, of its layer and expert.

    A tied head is under the embedding's name.

    It is the same whatever computes the layers.
    """
    if gpt.share_embeddings_and_output_weights and name == "output_layer.weight":
        return "embedding.word_embeddings.weight"
    prefix, _, rest = name.partition("decoder.layers.")
    if prefix or not rest:
        return name
    if is_of_expert(name):
        rest = global_expert_name(rest, gpt.config.num_moe_experts)
    local, _, tail = rest.partition(".")
    for joined, apart in _JOINED_NORMS.items():
        tail = tail.replace(joined, apart)
    return f"decoder.layers.{gpt.decoder.layers[int(local)].layer_number - 1}.{tail}"


def _generator(seed: int, name: str) -> torch.Generator:
    key = hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(key, "little") >> 1)


def _column_of_stds(runs: list[tuple[int, float]], num_rows: int) -> torch.Tensor:
    """Runs of rows of one std each, repeated over a matrix: float32[num_rows, 1]."""
    stds = torch.cat([torch.full((rows, 1), std) for rows, std in runs])
    return stds.repeat(num_rows // len(stds), 1)


@torch.no_grad()
def initialize_weights(gpt: GPTModel, model: ModelConfig, *, vocab_size: int, seed: int) -> None:
    """Draw every matrix N(0, std^2) in place, with the stds of `deep.initial_stds`.

    Norms stay 1 (but for the final gain), biases 0, vocabulary padding rows 0.
    """
    rank = parallel_state.get_tensor_model_parallel_rank()
    size = parallel_state.get_tensor_model_parallel_world_size()
    for name, parameter in gpt.named_parameters():
        if parameter.dim() < 2:
            if name == "decoder.final_layernorm.weight":
                gain = initial_stds(model).final_gain
                parameter.fill_(gain - 1 if model.zero_centred_norms else gain)
            continue
        whole_name = global_name(gpt, name)
        shape = list(parameter.shape)
        shared_out = parameter.tensor_model_parallel and not is_of_expert(name)
        dim = parameter.partition_dim if shared_out else -1
        if dim >= 0:
            shape[dim] *= size
        is_vocabulary = name.endswith(("word_embeddings.weight", "output_layer.weight"))
        drawn_shape = [vocab_size, *shape[1:]] if is_vocabulary else shape
        full = torch.empty(drawn_shape).normal_(generator=_generator(seed, whole_name))
        full *= _column_of_stds(row_stds(model, whole_name), len(full))
        if is_vocabulary:
            full = torch.cat((full, full.new_zeros(shape[0] - vocab_size, *shape[1:])))
        if dim >= 0 and size > 1:
            # Gate and up projection are sliced separately. Transformer Engine does not note so in `partition_stride`.
            gated = gpt.config.gated_linear_unit and name.endswith("linear_fc1.weight")
            stride = 2 if gated else 1
            pieces = full.split(parameter.size(dim) // stride, dim=dim)
            full = torch.cat(pieces[rank::size], dim=dim)
        parameter.copy_(full)
