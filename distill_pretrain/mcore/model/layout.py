"""Does a parallel layout fit the model, the batch and the number of processes? Every misfit at once."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import math

from distill_pretrain.errors import ConfigError, LayoutError, MissingDependency
from distill_pretrain.mcore.model.config import ModelConfig, OptimizerConfig, ParallelConfig


def padded_vocab_size(vocab_size: int, divisor: int, tensor_parallel_size: int) -> int:
    """Return the least multiple of `divisor` and of the tensor-parallel size that holds the vocabulary."""
    multiple = math.lcm(divisor, tensor_parallel_size)
    return -(-vocab_size // multiple) * multiple


def replica_size(parallel: ParallelConfig) -> int:
    """Return the number of processes that train on the same sequences together."""
    return parallel.tensor * parallel.pipeline * parallel.context


def stage_layers(num_layers: int, parallel: ParallelConfig) -> list[int]:
    """Return the number of layers of every pipeline stage, of a layout that fits (`check_layout`)."""
    ends = (parallel.first_stage_layers, parallel.last_stage_layers)
    if parallel.pipeline == 1:
        return [num_layers]
    stages = parallel.pipeline - sum(layers is not None for layers in ends)
    share = (num_layers - sum(layers or 0 for layers in ends)) // max(1, stages)
    layers = [share] * parallel.pipeline
    for place, own in zip((0, -1), ends, strict=True):
        if own is not None:
            layers[place] = own
    return layers


def data_parallel_size(parallel: ParallelConfig, world_size: int) -> int:
    """Return the number of replicas of the model; raise LayoutError where the processes do not divide."""
    model_size = replica_size(parallel)
    if world_size % model_size:
        context = f" x context {parallel.context}" if parallel.context > 1 else ""
        raise LayoutError(
            "the number of processes is not tensor x pipeline x context x data parallel",
            where="parallel.tensor, parallel.pipeline, parallel.context",
            found=f"{world_size} processes, tensor {parallel.tensor} x pipeline {parallel.pipeline}{context}",
            expected=f"a multiple of {model_size} processes",
            remedy=f"start {model_size} (or a multiple) processes, or change the section `parallel`",
        )
    return world_size // model_size


def require_backend(optimizer: OptimizerConfig) -> None:
    """Raise MissingDependency where the package of `optimizer.backend` is not installed."""
    if optimizer.backend == "deepspeed" and importlib.util.find_spec("deepspeed") is None:
        raise MissingDependency(
            "deepspeed", extra="deepspeed", needed_for="optimizer.backend = deepspeed"
        )


def require_algorithm(optimizer: OptimizerConfig) -> None:
    """Raise ConfigError where `optimizer.algorithm: muon` is asked for: see docs/decisions/0020-muon.md."""
    if optimizer.algorithm == "adam":
        return
    found = []
    for package in ("megatron-core", "emerging-optimizers"):
        try:
            found.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            found.append(f"no {package}")
    raise ConfigError(
        "megatron-core's Muon is not supported: its state is not shared out by the distributed optimizer, so that a "
        "checkpoint could not be resumed under another layout or backend",
        where="optimizer.algorithm",
        found=f"muon, with {' and '.join(found)}",
        expected="adam",
        remedy="set optimizer.algorithm: adam. To try Muon in megatron-core's own training loop: Python 3.12, "
        "megatron-core 0.19 and `pip install git+https://github.com/NVIDIA-NeMo/Emerging-Optimizers@v0.4.0` (what PyPI "
        "has under that name is a placeholder)",
    )


def require_schedule(optimizer: OptimizerConfig, steps: int) -> None:
    """Raise ConfigError where a wsd decay would begin before the warm-up has ended.

    Args:
        optimizer: its section.
        steps: of the run.
    """
    length = optimizer.decay_steps or steps
    room = length - optimizer.warmup_steps
    if optimizer.wsd_decay_steps is not None and optimizer.wsd_decay_steps > room:
        raise ConfigError(
            "the decay would begin before the warm-up has ended",
            where="optimizer.wsd_decay_steps",
            found=optimizer.wsd_decay_steps,
            expected=f"at most {max(room, 0)}: optimizer.decay_steps (or train.steps) {length} less "
            f"optimizer.warmup_steps {optimizer.warmup_steps}",
        )


def require_spec(model: ModelConfig) -> None:
    """Raise MissingDependency where `model.spec: te` is asked for and Transformer Engine is not installed."""
    if model.spec == "te" and importlib.util.find_spec("transformer_engine") is None:
        raise MissingDependency("transformer_engine[pytorch]", needed_for="model.spec = te")


def require_implementation(model: ModelConfig) -> None:
    """Raise ConfigError where `model.implementation: hybrid` is asked for and megatron-core is too old for it."""
    if model.implementation != "hybrid":
        return
    found = importlib.metadata.version("megatron-core")
    if tuple(int(part) for part in found.split(".")[:2]) < (0, 19):
        raise ConfigError(
            "this megatron-core is too old for HybridModel in the place of GPTModel",
            where="model.implementation",
            found=f"hybrid, and megatron-core {found}",
            expected="megatron-core 0.19 or later, which needs Python 3.12 or later",
            remedy="set model.implementation: gpt (the same model, curve and checkpoints), or install a later one",
        )


def require_fusion(parallel: ParallelConfig) -> None:
    """Raise ConfigError where `parallel.fuse_gradient_accumulation` lacks its kernel."""
    kernel = "fused_weight_gradient_mlp_cuda"
    if parallel.fuse_gradient_accumulation and importlib.util.find_spec(kernel) is None:
        raise ConfigError(
            "the kernel that adds weight gradients to their buffer is not installed",
            where="parallel.fuse_gradient_accumulation",
            expected=f"the module {kernel} of NVIDIA's apex",
            remedy="build apex from its repository with its C++ and CUDA extensions, or set it to false",
        )


def deepspeed_misfits(parallel: ParallelConfig) -> list[str]:
    """List what of a layout DeepSpeed cannot train, each with the reason."""
    reasons = {
        "pipeline": "its engine runs no pipeline schedule of megatron-core",
        "virtual_pipeline": "its engine runs no pipeline schedule of megatron-core",
        "recompute": "its engine has an activation checkpointing of its own",
        "context": "ZeRO averages over data-parallel ranks alone",
        "distributed_optimizer": "ZeRO shards the optimizer state already (optimizer.zero_stage)",
        "overlap_grad_reduce": "ZeRO reduces gradients by itself",
        "fuse_gradient_accumulation": "ZeRO keeps gradients in buffers of its own",
    }
    return [
        f"parallel.{name} = {getattr(parallel, name)} does not work with optimizer.backend = deepspeed: {reason}"
        for name, reason in reasons.items()
        if getattr(parallel, name) != getattr(ParallelConfig(), name)
    ]


def check_layout(
    model: ModelConfig,
    parallel: ParallelConfig,
    *,
    world_size: int,
    micro_batch_size: int,
    global_batch_size: int,
    seq_len: int,
    optimizer: OptimizerConfig | None = None,
    online_teacher: bool = False,
) -> int:
    """Raise one LayoutError that lists every misfit; return the data-parallel size.

    Args:
        model: architecture.
        parallel: layout.
        world_size: processes.
        micro_batch_size: sequences per forward pass.
        global_batch_size: sequences per optimizer step.
        seq_len: L.
        optimizer: of a model that is trained.
        online_teacher: whether a teacher scores the student's own batches.
    """
    problems: list[str] = []
    if optimizer is not None and optimizer.backend == "deepspeed":
        problems += deepspeed_misfits(parallel)

    def must_divide(divisor: int, value: int, divisor_name: str, value_name: str) -> None:
        if value % divisor:
            problems.append(
                f"{value_name} = {value} is not divisible by {divisor_name} = {divisor}"
            )

    tp, pp, vpp = parallel.tensor, parallel.pipeline, parallel.virtual_pipeline
    groups = model.num_query_groups or model.num_attention_heads
    must_divide(tp, model.num_attention_heads, "parallel.tensor", "model.num_attention_heads")
    must_divide(
        groups, model.num_attention_heads, "model.num_query_groups", "model.num_attention_heads"
    )
    must_divide(tp, groups, "parallel.tensor", "model.num_query_groups")
    if model.experts is None:
        must_divide(tp, model.ffn_hidden_size, "parallel.tensor", "model.ffn_hidden_size")
    if model.kv_channels is None:
        must_divide(
            model.num_attention_heads,
            model.hidden_size,
            "model.num_attention_heads",
            "model.hidden_size",
        )
    problems += _head_misfits(model)
    problems += _expert_misfits(model, parallel, world_size, optimizer)
    if parallel.sequence_parallel:
        must_divide(tp, seq_len, "parallel.tensor", "data.seq_len (sequence_parallel)")
    if parallel.context > 1:
        split = "2 x parallel.context"
        ranks = 2 * parallel.context
        if parallel.sequence_parallel:
            split, ranks = f"{split} x parallel.tensor (sequence_parallel)", ranks * tp
        must_divide(ranks, seq_len, split, "data.seq_len")
        if online_teacher:
            problems.append(
                f"parallel.context = {parallel.context} does not work with objective.target = teacher: "
                "a teacher scores whole sequences, and each rank holds a part of them"
            )
    if vpp > 1 and pp == 1:
        problems.append("parallel.virtual_pipeline > 1 needs parallel.pipeline > 1")
    problems += _stage_misfits(model, parallel)
    if model.fp8 is not None:
        must_divide(16, model.hidden_size, "16 (model.fp8)", "model.hidden_size")
        must_divide(
            16 * tp,
            model.ffn_hidden_size,
            "16 x parallel.tensor (model.fp8)",
            "model.ffn_hidden_size",
        )
    data_parallel = 0
    try:
        data_parallel = data_parallel_size(parallel, world_size)
    except LayoutError as error:
        problems.append(str(error))
    if data_parallel:
        per_step = micro_batch_size * data_parallel
        must_divide(
            per_step,
            global_batch_size,
            f"train.micro_batch_size x data-parallel size ({micro_batch_size} x {data_parallel})",
            "train.global_batch_size",
        )
        if vpp > 1 and global_batch_size % per_step == 0:
            must_divide(
                pp,
                global_batch_size // per_step,
                "parallel.pipeline (interleaved schedule)",
                "micro-batches per step",
            )
    if problems:
        raise LayoutError(
            "the parallel layout does not fit:\n" + "\n".join(f"  - {p}" for p in problems)
        )
    return data_parallel


def _head_misfits(model: ModelConfig) -> list[str]:
    """What of the width of an attention head does not come out."""
    width = model.kv_channels or model.hidden_size // model.num_attention_heads
    is_whole = model.kv_channels or model.hidden_size % model.num_attention_heads == 0
    if model.arch != "llama" or not is_whole or width % 2 == 0:
        return []
    key = "model.kv_channels"
    if model.kv_channels is None:
        key = "model.hidden_size / model.num_attention_heads"
    return [f"{key} = {width} is odd; arch: llama rotates the channels of a head in pairs (RoPE)"]


def _expert_misfits(
    model: ModelConfig, parallel: ParallelConfig, world_size: int, optimizer: OptimizerConfig | None
) -> list[str]:
    """What of the way experts are shared out does not come out."""
    size = parallel.expert
    if model.experts is None:
        # What only scores a model without experts has a layout for any.
        lost = size > 1 and optimizer is not None
        return [f"parallel.expert = {size} needs experts (model.experts)"] if lost else []
    problems = []
    if model.experts.number % size:
        problems.append(
            f"model.experts.number = {model.experts.number} is not divisible by parallel.expert = {size}"
        )
    ranks, rest = divmod(world_size, parallel.pipeline)
    if not rest and ranks % size:
        problems.append(
            f"a pipeline stage's {ranks} processes are not divisible by parallel.expert = {size}"
        )
    if optimizer is None:
        return problems
    if parallel.tensor > 1 and not parallel.sequence_parallel:
        problems.append(
            f"parallel.tensor = {parallel.tensor} with model.experts needs parallel.sequence_parallel = true: each "
            "rank sends its own positions to the experts"
        )
    if optimizer.backend == "deepspeed":
        problems.append(
            "model.experts does not work with optimizer.backend = deepspeed: ZeRO averages the gradients of experts "
            "over the wrong ranks"
        )
    return problems


def scoring_layout(tensor: int, pipeline: int) -> ParallelConfig:
    """Return the layout of models that only score, or are written: tensor-parallel ranks share out experts, too."""
    return ParallelConfig(tensor=tensor, pipeline=pipeline, expert=tensor)


def _stage_misfits(model: ModelConfig, parallel: ParallelConfig) -> list[str]:
    """What of the division of layers into pipeline stages and chunks does not come out."""
    pp, vpp = parallel.pipeline, parallel.virtual_pipeline
    own = {
        f"parallel.{name}": getattr(parallel, name)
        for name in ("first_stage_layers", "last_stage_layers")
        if getattr(parallel, name) is not None
    }
    named = ", ".join(f"{name} = {layers}" for name, layers in own.items())
    if own and pp == 1:
        return [f"{named}: needs parallel.pipeline > 1"]
    problems = []
    left, stages = model.num_layers - sum(own.values()), pp - len(own)
    if not own:
        if left % (pp * vpp):
            problems.append(
                f"model.num_layers = {left} is not divisible by "
                f"parallel.pipeline x parallel.virtual_pipeline = {pp * vpp}"
            )
    elif left % max(1, stages * vpp) or (left > 0) != (stages > 0):
        problems.append(
            f"model.num_layers = {model.num_layers} leaves {left} layers besides {named}; the other stages, "
            f"{stages} of {vpp} chunks, need an equal number, at least one each"
        )
    problems += [
        f"{name} = {layers} is not divisible by parallel.virtual_pipeline = {vpp}"
        for name, layers in own.items()
        if layers % vpp
    ]
    group = parallel.recompute_num_layers
    if parallel.recompute == "full" and parallel.recompute_method == "uniform" and not problems:
        chunks = sorted({layers // vpp for layers in stage_layers(model.num_layers, parallel)})
        problems += [
            f"a chunk of {layers} layers is not divisible by parallel.recompute_num_layers = {group}"
            for layers in chunks
            if layers % group
        ]
    return problems
