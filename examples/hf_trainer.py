"""A Hugging Face student in transformers' Trainer learns from a cache, and from the text alone, in as many steps.

    python examples/own_teacher.py FOLDER
    python examples/hf_trainer.py FOLDER
    accelerate launch --cpu --num_processes 2 examples/hf_trainer.py FOLDER

Needs `pip install 'distill-pretrain[hf]'`.
"""

import sys
import tempfile
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments, set_seed

from distill_pretrain import (
    DistillationDataset,
    SequencePlan,
    TokenIndex,
    collate_distillation,
    sparse_kd_loss,
)

FOLDER, SEQ_LEN, VOCAB_SIZE, STEPS = Path(sys.argv[1]), 32, 64, 60
CONFIG = LlamaConfig(
    vocab_size=VOCAB_SIZE,
    hidden_size=48,
    intermediate_size=96,
    num_hidden_layers=1,
    num_attention_heads=4,
    max_position_embeddings=SEQ_LEN,
)


def sequences(name, cache=None):
    """The sequences of a corpus, with their targets where there is a cache."""
    plan = SequencePlan(TokenIndex.open(FOLDER / name), seq_len=SEQ_LEN, seed=1)
    return DistillationDataset(plan, cache)


class DistillationTrainer(Trainer):
    """Learns from `ids` and `probs`; evaluated, and without a cache, by the cross-entropy."""

    # The loss is a mean of its batch: the Trainer divides by the batches that it accumulates.
    loss_is_scaled_for_ga = False

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """The labels are the next tokens already: nothing is shifted here."""
        outputs = model(input_ids=inputs["tokens"])
        learns = float(model.training and "ids" in inputs)
        loss = sparse_kd_loss(
            outputs.logits,
            inputs["labels"],
            inputs.get("ids"),
            inputs.get("probs"),
            ce_weight=1 - learns,
            kd_weight=learns,
        )
        return (loss, outputs) if return_outputs else loss


def train(cache):
    """Held-out cross-entropy of a student; the batch is of 16 sequences over all processes."""
    set_seed(0)
    with tempfile.TemporaryDirectory() as output_dir:
        arguments = TrainingArguments(
            output_dir,
            use_cpu=not torch.cuda.is_available(),
            max_steps=STEPS,
            learning_rate=1e-2,
            lr_scheduler_type="constant",
            per_device_eval_batch_size=64,
            # The Trainer would drop what the model's forward does not name: tokens, ids and probs.
            remove_unused_columns=False,
            save_strategy="no",
            logging_strategy="no",
            report_to="none",
            disable_tqdm=True,
        )
        arguments.per_device_train_batch_size = 16 // arguments.world_size
        trainer = DistillationTrainer(
            LlamaForCausalLM(CONFIG),
            arguments,
            data_collator=collate_distillation,
            train_dataset=sequences("train", cache),
            eval_dataset=sequences("held_out"),
        )
        trainer.train()
        return trainer.evaluate()["eval_loss"], trainer.is_world_process_zero()


for name, cache in (("cross-entropy", None), ("cached targets", FOLDER / "cache")):
    loss, is_first = train(cache)
    if is_first:
        print(f"held-out cross-entropy after training on {name}: {loss:.4f}", flush=True)
if torch.distributed.is_initialized():
    torch.distributed.destroy_process_group()
