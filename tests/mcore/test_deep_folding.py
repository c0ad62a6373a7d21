"""What stock transformers computes from a deep student whose branch coefficients were folded into its weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from distill_pretrain.checkpoint.hf import save_hf_model
from distill_pretrain.mcore.init.deep import residual_scaling
from distill_pretrain.mcore.model.config import ModelConfig, ParallelConfig
from distill_pretrain.processes.process import process_group
from tests.support.layouts import GPT2, LLAMA, SEQ_LEN, VOCAB_SIZE, make_job, take_step

transformers = pytest.importorskip("transformers")

MODELS: dict[str, dict[str, Any]] = {
    "llama, 96 layers": {**LLAMA, "num_layers": 96, "init": "deepscale"},
    "llama, 48 layers, completep": {**LLAMA, "num_layers": 48, "init": "completep"},
    "gpt2, 48 layers": {**GPT2, "num_layers": 48, "init": "deepscale"},
}


def some_tokens(num_sequences: int = 2) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, VOCAB_SIZE, (num_sequences, SEQ_LEN), generator=generator)


def logits_of(gpt: Any, tokens: torch.Tensor) -> torch.Tensor:
    """[B, L, V]."""
    logits: torch.Tensor = gpt(tokens, torch.arange(SEQ_LEN).expand_as(tokens), None)
    return logits[..., :VOCAB_SIZE]


@pytest.mark.parametrize("name", MODELS)
def test_transformers_computes_what_a_deep_student_does(tmp_path: Path, name: str) -> None:
    """After a step at a rate that moves every weight, norms and biases too; and it generates the same token."""
    from distill_pretrain.mcore.model.chunks import unwrap
    from distill_pretrain.mcore.runtime.parallel import model_parallel

    torch.set_num_threads(1)
    tokens = some_tokens()
    with process_group(), model_parallel(ParallelConfig(), seed=1) as groups:
        student, batches = make_job(
            MODELS[name],
            ParallelConfig(),
            groups,
            kd=True,
            steps=1,
            optimizer={"lr": 0.02, "warmup_steps": 0},
        )
        take_step(student, batches, 0)
        gpt = unwrap(student.chunks[0]).eval()
        with torch.no_grad():
            own = logits_of(gpt, tokens)
        save_hf_model(
            [gpt],
            model=ModelConfig(**MODELS[name]),
            vocab_size=VOCAB_SIZE,
            max_positions=SEQ_LEN,
            folder=tmp_path / "folded",
            dtype="fp32",
            tokenizer=None,
        )
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "folded").eval()
    with torch.no_grad():
        assert float((theirs(tokens).logits - own).abs().max()) <= 1e-4
        prompt = tokens[:, :-1]
        text = theirs.generate(
            prompt, max_new_tokens=1, do_sample=False, eos_token_id=None, pad_token_id=0
        )
    assert torch.equal(text[:, -1], own[:, -2].argmax(-1))


def test_what_epsilon_changes_at_192_layers() -> None:
    """Folding leaves the norms' epsilon as it is, and the paper's stream is lambda^l times ours."""
    from distill_pretrain.mcore.model.chunks import build_model_chunks, unwrap
    from distill_pretrain.mcore.runtime.parallel import model_parallel

    torch.set_num_threads(1)
    model = ModelConfig(
        **{**LLAMA, "num_layers": 192, "init": "deepscale", "norm_epsilon": 1e-5, "hidden_size": 64}
    )
    scaling, tokens = residual_scaling(model), some_tokens()
    with process_group(), model_parallel(ParallelConfig(), seed=1), torch.no_grad():
        chunks = build_model_chunks(
            model,
            ParallelConfig(),
            vocab_size=VOCAB_SIZE,
            seq_len=SEQ_LEN,
            precision="fp32",
            seed=1,
        )
        gpt = unwrap(chunks[0]).double().eval()
        ours = logits_of(gpt, tokens)
        norms = [
            norm
            for layer in gpt.decoder.layers
            for norm in (layer.input_layernorm, layer.pre_mlp_layernorm)
        ]
        for sublayer, norm in enumerate([*norms, gpt.decoder.final_layernorm]):
            norm.eps = 1e-5 / scaling.stream_scale(sublayer) ** 2
        papers = logits_of(gpt, tokens)
    assert 1e-7 < float((ours - papers).abs().max()) <= 6e-5
