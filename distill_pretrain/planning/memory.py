"""Memory of one rank of a student's job, by formula.

Weights, gradients and optimizer state follow from the code and are exact up to a few hundred bytes per tensor. The rest
is an estimate of what autograd keeps and of the largest temporaries, for the layers of `mcore` (SDPA attention, norms
composed of plain operations, no fused kernels) and the PyTorch loss; fused kernels need less.

Shapes: T positions of a micro-batch on one rank, H hidden, F feed-forward, n heads and g key/value groups of width d, V
vocabulary, K target entries of a position, t tensor- and c context-parallel size, e bytes of an activation.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from distill_pretrain.mcore.model.layout import padded_vocab_size, stage_layers
from distill_pretrain.planning.parameters import (
    dense_shapes,
    head_width,
    rank_expert_shapes,
    stages,
)
from distill_pretrain.planning.student_job import StudentJob

MOMENT_BYTES = 8
MASTER_BYTES = 4
AVERAGE_BYTES = 4
GRADIENT_BYTES = 4
PARAMETER_ALIGNMENT = 64
"""Elements at whose multiples megatron-core's distributed optimizer starts each parameter."""
GLIBC_KEEPS = 64 << 20
"""Freed memory that malloc keeps: twice the largest threshold above which it maps blocks one by one (mallopt(3))."""
BUCKET_ALIGNMENT = 128

LOSS_CHUNK_ELEMENTS = 1 << 18
"""Of the loss's temporaries in plain PyTorch: `CHUNK_ELEMENTS` of its reference."""
CAPPED_SCORES = 1 << 24
"""Scores of soft-capped attention that are there at a time: `BLOCK_ELEMENTS` of mcore/model/capped_attention.py."""


@dataclass(frozen=True, kw_only=True)
class RankMemory:
    """Bytes on one rank of a pipeline stage at the moment of a step when they are most.

    Attributes:
        stage: pipeline rank.
        weights: in the precision of the model.
        gradients: megatron-core's fp32 buffer.
        optimizer: moments, and fp32 master weights beside bf16 ones.
        batch: tokens, labels and targets of a whole step, on the device at once.
        activations: of all micro-batches in flight.
        loss: what the loss keeps for its gradient, on the last stage.
        temporaries: the largest on top of these.
        step_temporaries: of the update, when activations are gone.
    """

    stage: int
    weights: int
    gradients: int
    optimizer: int
    batch: int
    activations: int
    loss: int
    temporaries: int
    step_temporaries: int

    @property
    def states(self) -> int:
        """The bytes of weights, gradients and optimizer state."""
        return self.weights + self.gradients + self.optimizer

    @property
    def total(self) -> int:
        """The bytes at the peak."""
        passing = self.activations + self.loss + self.temporaries
        return self.states + self.batch + max(passing, self.step_temporaries)


def rank_memory(job: StudentJob, stage: int) -> RankMemory:
    """Compute the memory of a rank of a pipeline stage."""
    shares = _shares(job, stage)
    states = [_states(job, numels, shards) for numels, shards in shares]
    weights, gradients, optimizer = map(sum, zip(*states, strict=True))
    is_last = stage == job.parallel.pipeline - 1
    loss, at_loss = _loss(job) if is_last else (0, 0)
    activations = round(_passes_in_flight(job, stage) * _chunk_bytes(job, stage) * job.positions)
    if is_last:
        activations += _head_bytes(job) * job.positions
    local = sum(sum(numels) // shards for numels, shards in shares)
    return RankMemory(
        stage=stage,
        weights=weights,
        gradients=gradients,
        optimizer=optimizer,
        batch=_batch(job, with_targets=is_last),
        activations=activations,
        loss=loss,
        # By the time a layer is computed again, what the loss kept is gone.
        temporaries=max(
            at_loss, _layer_temporaries(job) + _capped_scores(job), _recomputed_bytes(job) - loss
        ),
        step_temporaries=0 if job.optimizer.offload else MASTER_BYTES * local,
    )


def cpu_process_bytes(memory: RankMemory, base: float) -> float:
    """Return the peak resident memory of a process that trains on a CPU, in bytes.

    Args:
        memory: of its rank.
        base: of a process without a model: Python, PyTorch, megatron-core, their code and caches.
    """
    passing = memory.total - memory.states - memory.batch
    return base + memory.total + min(passing, GLIBC_KEEPS)


def fullest_rank(job: StudentJob) -> RankMemory:
    """Return the memory of the pipeline stage that needs most."""
    return max((rank_memory(job, stage) for stage in stages(job.parallel)), key=lambda r: r.total)


def _shares(job: StudentJob, stage: int) -> list[tuple[list[int], int]]:
    """Sizes of a rank's parameters, and the ranks that share out their optimizer state: of experts, and of the rest."""
    sizes = {"vocab_size": job.vocab_size, "seq_len": job.seq_len}
    rest = dense_shapes(job.model, job.parallel, stage=stage, **sizes)
    experts = rank_expert_shapes(job.model, job.parallel, stage=stage)
    sharded = _shards_optimizer(job)
    return [
        ([math.prod(shape) for shape in shapes], shards if sharded else 1)
        for shapes, shards in ((rest, job.optimizer_shards), (experts, job.expert_shards))
    ]


def _shards_optimizer(job: StudentJob) -> bool:
    return job.parallel.distributed_optimizer or job.optimizer.backend == "deepspeed"


def _states(job: StudentJob, numels: list[int], shards: int) -> tuple[int, int, int]:
    """Bytes of weights, gradients, and optimizer state.

    megatron-core: e, 4, and 8 (moments) + 4 (masters, bf16 only) + 4 (optimizer.ema_decay) bytes per parameter, the
    last divided by the data-parallel size under the distributed optimizer, whose buffers align each parameter.
    DeepSpeed (an estimate): the same with masters in fp32 too, gradients divided from ZeRO-2 on and weights under
    ZeRO-3.
    """
    total = sum(numels)
    weight, state = job.bytes_per_activation, MOMENT_BYTES
    if job.optimizer.backend == "deepspeed":
        stage, dp = job.optimizer.zero_stage or 1, job.data_parallel
        state = 0 if job.optimizer.offload else MOMENT_BYTES + MASTER_BYTES
        return (
            weight * total // (dp if stage == 3 else 1),
            GRADIENT_BYTES * total // (dp if stage >= 2 else 1),
            state * total // dp,
        )
    if job.precision != "fp32":
        state += MASTER_BYTES
    if job.optimizer.ema_decay is not None:
        state += AVERAGE_BYTES
    if not job.parallel.distributed_optimizer:
        return weight * total, GRADIENT_BYTES * total, state * total
    padded = _round_up(
        sum(_round_up(numel, PARAMETER_ALIGNMENT) for numel in numels),
        math.lcm(shards, BUCKET_ALIGNMENT),
    )
    return weight * padded, GRADIENT_BYTES * padded, state * padded // shards


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


def _passes_in_flight(job: StudentJob, stage: int) -> int:
    """Passes of a micro-batch through a chunk whose activations are kept at the fullest moment.

    Plain pipeline (1F1B): a stage holds as many micro-batches as there are stages from it on. Interleaved: it runs
    2 (pp - stage - 1) + (chunks - 1) pp passes ahead and one more, each of one chunk.
    """
    stages_, chunks = job.parallel.pipeline, job.parallel.virtual_pipeline
    if chunks == 1:
        return min(stages_ - stage, job.num_micro_batches)
    ahead = 2 * (stages_ - stage - 1) + (chunks - 1) * stages_ + 1
    return min(ahead, job.num_micro_batches * chunks)


def _chunk_bytes(job: StudentJob, stage: int) -> float:
    """What the layers of one model chunk keep for their backward pass, per position.

    Full recomputation keeps the input of every group of layers (uniform), or that of each layer it covers (block).
    """
    parallel = job.parallel
    layers = stage_layers(job.model.num_layers, parallel)[stage] // parallel.virtual_pipeline
    if parallel.recompute != "full":
        return layers * layer_bytes(job)
    stream = job.bytes_per_activation * job.model.hidden_size / job.sequence_split
    if parallel.recompute_method == "uniform":
        return layers // parallel.recompute_num_layers * stream
    covered = min(layers, parallel.recompute_num_layers)
    return covered * stream + (layers - covered) * layer_bytes(job)


def _recomputed_bytes(job: StudentJob) -> int:
    """What is there while a group of layers (full) or parts of one (selective) are computed again and differentiated.

    Their activations, and the first gradients: of the stream, twice, and of one inner vector of the feed-forward block.
    """
    parallel = job.parallel
    if parallel.recompute == "none":
        return 0
    if parallel.recompute == "selective":
        anew = _layer_bytes(job, frozenset()) - layer_bytes(job)
    else:
        grouped = parallel.recompute_method == "uniform"
        anew = (parallel.recompute_num_layers if grouped else 1) * layer_bytes(job)
    inner = _inner_width(job)
    gradients = job.bytes_per_activation * (2 * job.model.hidden_size + inner)
    return round((anew + gradients) * job.positions)


def _inner_width(job: StudentJob) -> float:
    """Columns inside the feed-forward block of a position on a rank; of all its experts, where they are in balance.

    A tensor-parallel rank has a share of the columns of a block, or of the positions that go to whole experts.
    """
    experts = job.model.experts
    taken = 1 if experts is None else experts.per_token
    return taken * job.model.ffn_hidden_size / job.parallel.tensor


def norm_bytes(job: StudentJob, width: float) -> float:
    """Return what a norm of `width` columns keeps per position, beside its output, in bytes.

    RMSNorm is composed of plain operations: an fp32 input, the normalised fp32 rows and a scale. LayerNorm is one
    operation: its input, mean and scale.
    """
    if job.model.arch == "llama":
        return 8 * width + 4
    return job.bytes_per_activation * (width + 2)


def layer_bytes(job: StudentJob) -> float:
    """Return the bytes per position that a transformer layer keeps for its backward pass.

    What is recomputed selectively is left out.
    """
    selective = job.parallel.recompute == "selective"
    return _layer_bytes(job, frozenset(job.parallel.recompute_modules if selective else ()))


def _layer_bytes(job: StudentJob, recomputed: frozenset[str]) -> float:
    model, e, t = job.model, job.bytes_per_activation, job.parallel.tensor
    llama, width = model.arch == "llama", head_width(job.model)
    groups = model.num_query_groups or model.num_attention_heads
    hidden = model.hidden_size / job.sequence_split
    query, key = model.num_attention_heads * width / t, groups * width / t
    mixed = query + 2 * key
    # Grouped heads in fp32 are repeated before attention (mcore/model/modules.py).
    repeated = job.precision == "fp32" and groups != model.num_attention_heads
    context = job.parallel.context
    softmax = 4 * model.num_attention_heads / t if model.attention_logit_cap is None else 0.0
    if "core_attn" in recomputed:
        kept = mixed + (query + key if llama else 0)
        softmax = 0.0
    elif context > 1:
        # Keys and values of the whole sequence, and the output once in its two pieces.
        kept = (query if llama else mixed) + query
        kept += 2 * context * (query if repeated else key)
    elif repeated:
        kept = 3 * query + (
            0 if llama and not (model.qk_norm or model.qk_norm_whole) else mixed - query
        )
    else:
        kept = mixed + (query + key if llama else 0)
    attention = e * (hidden + kept + query) + softmax + _window_bytes(job, query)
    if model.qk_norm or model.qk_norm_whole:
        attention += norm_bytes(job, query) + norm_bytes(job, key)
    columns = 8 if model.experts and model.experts.swiglu_limit else 5 if llama else 2
    inner = 0.0 if "mlp" in recomputed else columns * _inner_width(job)
    feed_forward = e * (hidden + inner)
    if model.experts is not None and "mlp" not in recomputed:
        # Every copy of a position on its way to an expert and back, and fp32 logits and probabilities of the router.
        feed_forward += 2 * e * model.experts.per_token * model.hidden_size / t
        feed_forward += 16 * model.experts.number / t
    dropout = 2 * e * hidden if model.dropout else 0.0
    norms = 4 if model.norm_placement == "sandwich" else 2
    return norms * norm_bytes(job, hidden) + attention + feed_forward + dropout


def _window_bytes(job: StudentJob, query: float) -> float:
    """Return what a layer with a window keeps besides, per position, on average over the layers.

    A window of queries at a time makes an output, all of them joined again, and a mask of twice as many keys.
    """
    model, window = job.model, job.model.sliding_window
    # Under a cap neither outputs nor masks of single blocks are kept.
    if window is None or window >= job.seq_len or model.attention_logit_cap is not None:
        return 0.0
    kinds = [model.attention_of(layer) for layer in range(model.num_layers)]
    masks = 2 * window * (1 + job.bytes_per_activation) / job.micro_batch_size
    return kinds.count("w") / len(kinds) * (job.bytes_per_activation * query + masks)


def _capped_scores(job: StudentJob) -> int:
    """Bytes of a block's scores in soft-capped attention, in fp32 and some six times, with their gradients."""
    if job.model.attention_logit_cap is None:
        return 0
    heads = job.model.num_attention_heads // job.parallel.tensor
    return 24 * min(CAPPED_SCORES, heads * job.positions * job.seq_len)


def _head_bytes(job: StudentJob) -> int:
    """Final norm and the input of the LM head, per position."""
    hidden = job.model.hidden_size / job.sequence_split
    norm = norm_bytes(job, hidden) if job.model.norm_placement != "post" else 0.0
    return round(norm + job.bytes_per_activation * hidden)


def _loss(job: StudentJob) -> tuple[int, int]:
    """Bytes the loss keeps for its gradient, and the largest temporaries beside them.

    Kept of logits [T, V/t]: themselves, which become the gradient in place, and some numbers per entry. A chunked head
    keeps the gradients by the hidden states [T, H] and by the head's weight [V/t, H], which it sums in fp32; the logits
    of one chunk are a temporary. Temporaries besides: fp32 copies of some rows in plain PyTorch (CUDA kernels need
    none), and the sums' inputs per entry.
    """
    e, t, hidden = job.bytes_per_activation, job.parallel.tensor, job.model.hidden_size
    padded = padded_vocab_size(job.vocab_size, job.model.vocab_divisor, t) // t
    per_entry = 12 * job.entries + 8 * (1 + job.entries) + 48
    head_gradient = e * padded * hidden
    if job.chunk_tokens is None:
        kept = job.positions * (e * padded + per_entry)
        return kept, max(_loss_temporaries(job, job.positions, padded), head_gradient)
    chunks = -(-job.positions // job.chunk_tokens)
    rows = -(-job.positions // chunks)
    kept = head_gradient + job.positions * (e * hidden + 16)
    sums = GRADIENT_BYTES * padded * hidden
    chunk = rows * (e * padded + per_entry) + _loss_temporaries(job, rows, padded)
    temporaries = sums + chunk + job.positions * 12 * job.entries
    if e < GRADIENT_BYTES:
        # The sums are rounded when the logits are still there.
        temporaries = max(temporaries, sums + head_gradient + rows * e * padded)
    return kept, temporaries - head_gradient


def _loss_temporaries(job: StudentJob, positions: int, columns: int) -> int:
    """Bytes of the temporaries of the loss over so many positions, in plain PyTorch."""
    copies = 2 if job.bytes_per_activation < 4 else 1
    chunk = 4 * min(LOSS_CHUNK_ELEMENTS, positions * columns) * copies
    return chunk + positions * 24 * (1 + job.entries)


def _layer_temporaries(job: StudentJob) -> int:
    """Gradients inside a feed-forward block while most activations are still there (a rough bound)."""
    inner = (4 if job.model.arch == "llama" else 2) * _inner_width(job)
    hidden = 2 * job.model.hidden_size
    return round(job.bytes_per_activation * (inner + hidden) * job.positions)


def _batch(job: StudentJob, *, with_targets: bool) -> int:
    """Tokens and labels of 8 bytes, target ids of 8 and probabilities of 4, for every micro-batch of a step."""
    per_position = 16 + (12 * job.entries if with_targets else 0)
    return job.positions * job.num_micro_batches * per_position
