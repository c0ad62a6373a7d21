"""A plain PyTorch loop: a tiny model of one's own learns from a cache, and from the text alone, in as many steps.

python examples/own_teacher.py FOLDER
python examples/plain_pytorch.py FOLDER
"""

import sys
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import DataLoader

from distill_pretrain import (
    DistillationDataset,
    SequencePlan,
    TokenIndex,
    collate_distillation,
    linear_sparse_kd_loss,
)

FOLDER, SEQ_LEN, VOCAB_SIZE, WIDTH, EPOCHS = Path(sys.argv[1]), 32, 64, 48, 5


def sequences(name, cache=None):
    """The sequences of a corpus, with their targets where there is a cache."""
    plan = SequencePlan(TokenIndex.open(FOLDER / name), seq_len=SEQ_LEN, seed=1)
    return DistillationDataset(plan, cache)


class TinyModel(nn.Module):
    """One layer; `forward` gives hidden states [B, L, H], of which the loss makes logits bit by bit."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(VOCAB_SIZE, WIDTH)
        self.layer = nn.TransformerEncoderLayer(WIDTH, 4, 96, 0.0, batch_first=True)
        self.head = nn.Linear(WIDTH, VOCAB_SIZE, bias=False)

    def forward(self, tokens):
        """Hidden states before the head."""
        mask = nn.Transformer.generate_square_subsequent_mask(tokens.size(1))
        return self.layer(self.embedding(tokens), src_mask=mask, is_causal=True)


def loss_of(model, batch, kd_weight):
    """Distillation loss where `kd_weight` is 1, cross-entropy where it is 0; no logits are held."""
    return linear_sparse_kd_loss(
        model(batch["tokens"]),
        model.head.weight,
        batch["labels"],
        batch.get("ids"),
        batch.get("probs"),
        ce_weight=1 - kd_weight,
        kd_weight=kd_weight,
    )


def train(kd_weight):
    """Held-out cross-entropy of a model after `EPOCHS`; only the loss differs from call to call."""
    torch.manual_seed(0)
    model = TinyModel()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    data = sequences("train", FOLDER / "cache")
    loader = DataLoader(data, batch_size=16, shuffle=True, collate_fn=collate_distillation)
    for _ in range(EPOCHS):
        for batch in loader:
            optimizer.zero_grad()
            loss_of(model, batch, kd_weight).backward()
            optimizer.step()
    held_out = DataLoader(sequences("held_out"), batch_size=128, collate_fn=collate_distillation)
    with torch.no_grad():
        return loss_of(model, next(iter(held_out)), kd_weight=0).item()


for name, kd_weight in (("cross-entropy", 0.0), ("cached targets", 1.0)):
    print(f"held-out cross-entropy after training on {name}: {train(kd_weight):.4f}")
