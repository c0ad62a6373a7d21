"""Training with separate documents, beside a plain loop of transformers and torch over the documents one by one."""

from __future__ import annotations

import itertools

import pytest
import torch

from distill_pretrain.contracts import TokenBatch
from distill_pretrain.mcore.model.config import ModelConfig, OptimizerConfig, ParallelConfig
from distill_pretrain.processes.process import process_group, released_groups
from tests.support.layouts import LLAMA, SEQ_LEN, VOCAB_SIZE, make_job

transformers = pytest.importorskip("transformers")

END, STEPS = 5, 20
SETTINGS = {"lr": 3e-3, "warmup_steps": 3, "weight_decay": 0.1}


class PlainLoop:
    """AdamW on a model of transformers, which is shown every document alone."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.model = model.train()
        matrices = [p for p in model.parameters() if p.ndim > 1]
        others = [p for p in model.parameters() if p.ndim == 1]
        config = OptimizerConfig(**SETTINGS)
        self.adam = torch.optim.AdamW(
            [{"params": matrices}, {"params": others, "weight_decay": 0.0}],
            betas=(config.beta1, config.beta2),
            eps=config.epsilon,
            weight_decay=config.weight_decay,
        )

    def step(self, batches: list[TokenBatch], learning_rate: float) -> float:
        """One step; the mean loss before it."""
        count = sum(int((batch.labels >= 0).sum()) for batch in batches)
        total = 0.0
        for batch in batches:
            for tokens, labels in zip(batch.tokens, batch.labels, strict=True):
                ends = (torch.nonzero(tokens == END).flatten() + 1).tolist()
                borders = sorted({0, *ends, len(tokens)})
                for start, stop in itertools.pairwise(borders):
                    logits = self.model(tokens[None, start:stop]).logits[0]
                    loss = torch.nn.functional.cross_entropy(
                        logits, labels[start:stop], reduction="sum", ignore_index=-100
                    )
                    (loss / count).backward()
                    total += float(loss.detach())
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for group in self.adam.param_groups:
            group["lr"] = learning_rate
        self.adam.step()
        self.adam.zero_grad()
        return total / count


def test_twenty_steps_equal_a_plain_loop(tmp_path):
    from distill_pretrain.checkpoint.hf.save import save_hf_model
    from distill_pretrain.mcore.runtime.parallel import model_parallel

    torch.set_num_threads(1)
    layout = ParallelConfig()
    with process_group(), released_groups(), model_parallel(layout, seed=1) as groups:
        student, batches = make_job(
            *(LLAMA, layout, groups),
            kd=False,
            steps=STEPS,
            optimizer=SETTINGS,
            document_end=END,
        )
        save_hf_model(
            student.chunks,
            model=ModelConfig(**LLAMA),
            vocab_size=VOCAB_SIZE,
            max_positions=SEQ_LEN,
            folder=tmp_path / "start",
            dtype="fp32",
            tokenizer=None,
        )
        loaded = transformers.AutoModelForCausalLM.from_pretrained(
            tmp_path / "start", dtype=torch.float32
        )
        loop = PlainLoop(loaded)
        curves = []
        for step in range(STEPS):
            read = batches.step_batches(step, with_targets=False)
            result = student.step([iter(read)])
            curves.append((float(result.terms[0]), loop.step(read, result.learning_rate)))
        pieces = sum(len(batch.pieces) for batch in read)
    assert pieces > 8  # documents end within sequences
    ours, theirs = zip(*curves, strict=True)
    assert ours == pytest.approx(theirs, abs=1e-4)
    assert ours[-1] < ours[0] - 0.2
