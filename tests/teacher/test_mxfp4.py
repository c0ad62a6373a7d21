"""gpt-oss as it is published, with experts in MXFP4: transformers gives a teacher of kind hf their values in bf16."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from distill_pretrain.checkpoint.hf import read_hf_model
from distill_pretrain.errors import CheckpointError
from distill_pretrain.teacher.engines import open_engine

transformers = pytest.importorskip("transformers")

FP4 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
"""Values of codes 0 to 7; 8 to 15 are their negatives."""
LAYOUT = {
    "vocab_size": 150,
    "hidden_size": 64,
    "intermediate_size": 32,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "sliding_window": 7,
    "pad_token_id": 0,
    "initializer_range": 0.2,
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> tuple[Path, Path]:
    """The same model with experts in bf16, and in MXFP4: blocks of 32 codes of 4 bits, with an exponent each."""
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(
        transformers.GptOssConfig(**LAYOUT), dtype=torch.bfloat16
    )
    packed = {}
    for name, parameter in model.named_parameters():
        if not name.endswith(("gate_up_proj", "down_proj")):
            continue
        experts, rows, columns = parameter.shape
        codes = torch.randint(0, 16, (experts, columns, rows // 32, 32))
        exponents = torch.randint(120, 126, (experts, columns, rows // 32))
        values = torch.cat((FP4, -FP4))[codes] * torch.exp2(exponents - 127.0)[..., None]
        parameter.data.copy_(values.reshape(experts, columns, rows).transpose(1, 2))
        blocks = codes[..., 0::2] | (codes[..., 1::2] << 4)
        packed |= {
            f"{name}_blocks": blocks.to(torch.uint8),
            f"{name}_scales": exponents.to(torch.uint8),
        }
    plain, quantised = (tmp_path_factory.mktemp(name) for name in ("plain", "mxfp4"))
    for folder in (plain, quantised):
        model.save_pretrained(folder)
    weights = quantised / "model.safetensors"
    rest = {k: v for k, v in load_file(weights).items() if f"{k}_blocks" not in packed}
    save_file(rest | packed, weights, metadata={"format": "pt"})
    config = json.loads((quantised / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "mxfp4",
        "modules_to_not_convert": [
            "model.layers.*.self_attn",
            "model.layers.*.mlp.router",
            "model.embed_tokens",
            "lm_head",
        ],
    }
    (quantised / "config.json").write_text(json.dumps(config))
    return plain, quantised


def test_a_teacher_in_mxfp4_has_the_logits_of_its_values(folders):
    tokens = torch.randint(0, 150, (2, 20), generator=torch.Generator().manual_seed(1))
    engines = (open_engine("hf", path, "bf16", vocab_size=150, seq_len=20) for path in folders)
    plain, quantised = (engine.logits(tokens) for engine in engines)
    assert plain.abs().max() > 1
    assert torch.equal(plain, quantised)


def test_a_student_of_weights_in_mxfp4_is_refused_with_what_undoes_it(folders):
    assert read_hf_model(folders[0]).family == "gpt_oss"
    with pytest.raises(CheckpointError, match=r"quantised \(mxfp4\).*Mxfp4Config"):
        read_hf_model(folders[1])
