"""Qwen3.5, Qwen3-Next and DeepSeek-V3: captured by kind hf as they are; a student of them is refused by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from distill_pretrain.cli.main import main
from distill_pretrain.contracts import RaggedTargets
from distill_pretrain.data.config import DataConfig
from distill_pretrain.data.sources import open_cache, open_sequences
from tests.support.small_corpus import SEQ_LEN, VOCAB_SIZE, write_small_corpus

transformers = pytest.importorskip("transformers")
safetensors = pytest.importorskip("safetensors.torch")

SIZES: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE + 24,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
DELTA = {f"linear_num_{name}_heads": heads for name, heads in (("key", 2), ("value", 4))}
DELTA |= {f"linear_{name}_head_dim": 8 for name in ("key", "value")}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
EXPERTS |= {"shared_expert_intermediate_size": 16}
LATENT = {"num_key_value_heads": 4, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8}
LATENT |= {"qk_nope_head_dim": 8, "v_head_dim": 12, "n_routed_experts": 4, "n_group": 2}
LATENT |= {"num_experts_per_tok": 2, "topk_group": 1, "moe_intermediate_size": 16}
KINDS: dict[str, dict[str, Any]] = {
    "qwen3_5_text": {**SIZES, **DELTA, "head_dim": 16},
    "qwen3_5_moe_text": {**SIZES, **DELTA, **EXPERTS, "head_dim": 16},
    "qwen3_next": {**SIZES, **DELTA, **EXPERTS, "head_dim": 16},
    "deepseek_v3": {**SIZES, **LATENT, "first_k_dense_replace": 1},
}
EYES = {"depth": 1, "hidden_size": 32, "intermediate_size": 32, "num_heads": 2, "patch_size": 4}
EYES |= {"out_hidden_size": 32, "num_position_embeddings": 16}
UNUSED = {
    "qwen3_5_text": "mtp.layers.0.mlp.up_proj.weight",
    "qwen3_5_moe_text": "mtp.norm.weight",
    "qwen3_next": "mtp.norm.weight",
    "deepseek_v3": "model.layers.61.shared_head.norm.weight",
}
"""A tensor of the published folders that predicts later tokens, and is not of the model."""


def made(kind: str) -> Any:
    if kind not in transformers.CONFIG_MAPPING:
        pytest.skip(f"transformers {transformers.__version__} has no {kind}")
    torch.manual_seed(0)
    config = transformers.CONFIG_MAPPING[kind](**KINDS[kind])
    return transformers.AutoModelForCausalLM.from_config(config).eval()


def nested(text: Any, kind: str) -> Any:
    """The same text model beside a vision model."""
    config = transformers.CONFIG_MAPPING[kind](
        text_config=KINDS[f"{kind}_text"], vision_config=EYES
    )
    whole = transformers.AutoModelForImageTextToText.from_config(config)
    whole.model.language_model.load_state_dict(text.model.state_dict())
    whole.lm_head.load_state_dict(text.lm_head.state_dict())
    return whole


@pytest.fixture(scope="module")
def tokens(tmp_path_factory) -> Path:
    return write_small_corpus(tmp_path_factory.mktemp("tokens") / "train")


def job(tokens: Path, model: Path, cache: Path, kind: str) -> list[str]:
    return [
        "capture",
        f"data.tokens={tokens}",
        f"data.vocab_size={VOCAB_SIZE}",
        f"data.seq_len={SEQ_LEN}",
        f"teacher.kind={kind}",
        f"teacher.path={model}",
        f"capture.output_dir={cache}",
        "capture.micro_batch_size=3",
        "capture.sanity_gate=off",
    ]


def captured(tokens: Path, model: Path, cache: Path) -> list[tuple[torch.Tensor, RaggedTargets]]:
    """Capture with the real verb; ids [1, L] of every sequence, and its targets."""
    assert main(job(tokens, model, cache, "hf")) == 0
    data = open_sequences(DataConfig(tokens=tokens, vocab_size=VOCAB_SIZE, seq_len=SEQ_LEN))
    reader = open_cache(cache, data)
    found = []
    for sequence in range(data.plan.num_sequences):
        ids, _ = data.plan.read(np.array([sequence]))
        found.append((torch.from_numpy(ids.astype(np.int64)), reader.read(sequence, ids[0])))
    return found


def require_own(own: Any, sequences: list[tuple[torch.Tensor, RaggedTargets]]) -> None:
    """Systematic sampling of 50 draws stores each id as often as 50 times its probability, rounded down or up."""
    for ids, targets in sequences:
        with torch.no_grad():
            logits = own(input_ids=ids, use_cache=False).logits[0, :, :VOCAB_SIZE]
        expected = 50 * torch.softmax(logits.double(), -1).numpy()
        rows = np.repeat(np.arange(SEQ_LEN), targets.entries_per_token)
        stored = np.zeros_like(expected)
        stored[rows, targets.ids] = targets.values
        used = targets.entries_per_token > 0
        assert used.sum() >= SEQ_LEN - 1
        assert np.abs(stored - expected)[used].max() < 1.001


@pytest.mark.parametrize("kind", KINDS)
def test_a_capture_stores_the_models_own_targets(kind, tokens, tmp_path):
    own = made(kind)
    own.save_pretrained(tmp_path / "model")
    file = tmp_path / "model" / "model.safetensors"
    tensors = {**safetensors.load_file(file), UNUSED[kind]: torch.zeros(3)}
    safetensors.save_file(tensors, file, metadata={"format": "pt"})
    alone = captured(tokens, tmp_path / "model", tmp_path / "cache")
    require_own(own, alone)
    outer = kind.removesuffix("_text")
    if outer == kind:
        return
    nested(own, outer).save_pretrained(tmp_path / "nested")
    beside = captured(tokens, tmp_path / "nested", tmp_path / "cache of nested")
    for (_, one), (_, other) in zip(alone, beside, strict=True):
        for name in ("entries_per_token", "ids", "values"):
            assert np.array_equal(getattr(one, name), getattr(other, name)), name


@pytest.mark.parametrize("kind", KINDS)
def test_a_student_and_a_teacher_of_kind_megatron_are_refused_with_the_remedy(
    kind, tokens, tmp_path, capsys
):
    from distill_pretrain.checkpoint.hf.registry import teachers_only

    made(kind).save_pretrained(tmp_path / "model")
    training = [
        "train",
        f"data.tokens={tokens}",
        f"data.vocab_size={VOCAB_SIZE}",
        f"data.seq_len={SEQ_LEN}",
        *(f"model.{name}=4" for name in ("num_layers", "num_attention_heads")),
        *(f"model.{name}=32" for name in ("hidden_size", "ffn_hidden_size")),
        "optimizer.lr=0.01",
        "train.steps=1",
        "train.global_batch_size=1",
        f"train.output_dir={tmp_path / 'run'}",
        f"train.start_from={tmp_path / 'model'}",
    ]
    for command in (training, job(tokens, tmp_path / "model", tmp_path / "cache", "megatron")):
        for more in (["--dry-run"], []):
            assert main([*command, *more]) == 2
            said = capsys.readouterr().err
            assert "Traceback" not in said and "teacher.kind=hf" in said
            assert f"{kind} is not supported: {teachers_only()[kind].reason}" in said
