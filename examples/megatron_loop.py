"""A loop of megatron-core's own: its GPTModel, DDP, schedule and optimizer learn from a cache, and from the text alone.

    python examples/own_teacher.py FOLDER
    torchrun --nproc-per-node=1 examples/megatron_loop.py FOLDER

Data parallel over the processes. For tensor, pipeline and context parallelism, where the loss is split over ranks,
`distill-pretrain train` has the whole trainer.
"""

import sys
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from megatron.core.transformer import TransformerConfig
from torch.utils.data import DataLoader
from torch.utils.data.distributed import DistributedSampler

from distill_pretrain import (
    DistillationDataset,
    SequencePlan,
    TokenIndex,
    collate_distillation,
    sparse_kd_loss,
)

FOLDER, SEQ_LEN, VOCAB_SIZE, EPOCHS = Path(sys.argv[1]), 32, 64, 5
ON_GPU = torch.cuda.is_available()


def sequences(name, cache=None):
    """The sequences of a corpus, with their targets where there is a cache."""
    plan = SequencePlan(TokenIndex.open(FOLDER / name), seq_len=SEQ_LEN, seed=1)
    return DistillationDataset(plan, cache)


def build_model():
    """A GPTModel of one layer, wrapped for data parallelism."""
    model_parallel_cuda_manual_seed(0)
    torch.manual_seed(0)
    config = TransformerConfig(
        num_layers=1,
        hidden_size=48,
        num_attention_heads=4,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        use_cpu_initialization=not ON_GPU,
        pipeline_dtype=torch.float32,
        gradient_accumulation_fusion=False,
        finalize_model_grads_func=finalize_model_grads,
    )
    model = GPTModel(
        config,
        get_gpt_layer_local_spec(),
        vocab_size=VOCAB_SIZE,
        max_sequence_length=SEQ_LEN,
        position_embedding_type="rope",
    ).to(torch.cuda.current_device())
    return DistributedDataParallel(config, DistributedDataParallelConfig(), model)


def forward_step(batches, model, kd_weight):
    """What megatron-core's schedules call: logits of a micro-batch, and what makes its loss of them."""
    batch = {name: x.to(torch.cuda.current_device()) for name, x in next(batches).items()}
    positions = torch.arange(SEQ_LEN, device=batch["tokens"].device).expand_as(batch["tokens"])
    # Without labels the model returns logits [B, L, V].
    logits = model(batch["tokens"], positions, None)

    def loss_of(logits):
        loss = sparse_kd_loss(
            logits,
            batch["labels"],
            batch.get("ids"),
            batch.get("probs"),
            ce_weight=1 - kd_weight,
            kd_weight=kd_weight,
        )
        return loss, {"loss": loss.detach()}

    return logits, loss_of


def run_step(model, batches, kd_weight, *, forward_only=False):
    """Losses of one micro-batch, its gradients left in the model unless `forward_only`."""
    return get_forward_backward_func()(
        forward_step_func=partial(forward_step, kd_weight=kd_weight),
        data_iterator=batches,
        model=[model],
        num_microbatches=1,
        seq_length=SEQ_LEN,
        micro_batch_size=16,
        forward_only=forward_only,
    )


def train(kd_weight):
    """Held-out cross-entropy of a model after `EPOCHS`; the batch is of 16 sequences over all processes."""
    model = build_model()
    optimizer = get_megatron_optimizer(OptimizerConfig(lr=1e-2, weight_decay=0.0), [model])
    data = sequences("train", FOLDER / "cache")
    ranks = DistributedSampler(data)
    loader = DataLoader(
        data,
        batch_size=16 // dist.get_world_size(),
        sampler=ranks,
        collate_fn=collate_distillation,
    )
    for epoch in range(EPOCHS):
        ranks.set_epoch(epoch)
        batches = iter(loader)
        for _ in range(len(loader)):
            model.zero_grad_buffer()
            optimizer.zero_grad()
            run_step(model, batches, kd_weight)
            optimizer.step()
    model.eval()
    held_out = DataLoader(sequences("held_out"), batch_size=128, collate_fn=collate_distillation)
    return run_step(model, iter(held_out), 0.0, forward_only=True)[0]["loss"].item()


def main():
    """Train on either loss."""
    if not ON_GPU:
        # Megatron-core calls for a GPU by name; this makes it run without one.
        from distill_pretrain.mcore.runtime import cpu_compat

        cpu_compat.enable()
    dist.init_process_group("nccl" if ON_GPU else "gloo")
    torch.cuda.set_device(dist.get_rank() % max(1, torch.cuda.device_count()))
    parallel_state.initialize_model_parallel()
    for name, kd_weight in (("cross-entropy", 0.0), ("cached targets", 1.0)):
        loss = train(kd_weight)
        if dist.get_rank() == 0:
            print(f"held-out cross-entropy after training on {name}: {loss:.4f}", flush=True)
    parallel_state.destroy_model_parallel()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
