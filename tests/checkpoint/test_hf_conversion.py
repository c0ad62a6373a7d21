"""Hugging Face weights in megatron-core models: the same logits under every layout, and the same bytes back."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file

from distill_pretrain.checkpoint.hf import hf_config, load_hf_weights, read_hf_model, save_hf_model
from distill_pretrain.checkpoint.hf.files import Tensor, WeightFiles, plan_files
from distill_pretrain.checkpoint.hf.registry import correspondence
from distill_pretrain.errors import CheckpointError
from distill_pretrain.mcore.model.config import ModelConfig, ParallelConfig
from distill_pretrain.planning.parameters import num_parameters
from distill_pretrain.processes.process import process_group, released_groups
from tests.support.distributed import REPOSITORY, run_distributed

transformers = pytest.importorskip("transformers")

VOCAB_SIZE, SEQ_LEN = 150, 48  # not a multiple of the vocabulary divisor: padding rows exist
LAYOUTS: dict[str, dict[str, int]] = {
    "tp1": {},
    "tp2": {"tensor": 2},
    "pp2": {"pipeline": 2},
    "tp2 pp2": {"tensor": 2, "pipeline": 2},
}
MORE_LAYOUTS: dict[str, dict[str, int]] = {
    "tp4": {"tensor": 4},
    "pp2 vp2": {"pipeline": 2, "virtual_pipeline": 2},
}
FAMILIES_OF_MORE = ("gpt2-untied", "llama-tied")
EXPERT_LAYOUTS: dict[str, dict[str, int]] = {
    "ep2": {"expert": 2},
    "tp2 ep4": {"tensor": 2, "expert": 4},
    "pp2 ep2": {"pipeline": 2, "expert": 2},
}
FAMILIES_WITH_EXPERTS = ("qwen3_moe", "qwen3_moe-all", "gpt_oss")
EVERY_LAYOUT = {**LAYOUTS, **MORE_LAYOUTS, **EXPERT_LAYOUTS}
SHAPE = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": SEQ_LEN,
    "initializer_range": 0.1,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 12,
    "beta_fast": 4.0,
}
MINISTRAL_ROPE = {**YARN, "mscale": 1.0, "mscale_all_dim": 0.5, "llama_4_scaling_beta": 0.1}
GEMMA3 = {
    "head_dim": 16,
    "sliding_window": 7,
    "query_pre_attn_scalar": 24,
    "pad_token_id": 0,
    "layer_types": ["sliding_attention", "sliding_attention", "full_attention"] * 2,
    "rope_parameters": {
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1000000.0},
        "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
    },
}
GEMMA3["layer_types"] = GEMMA3["layer_types"][:4]
GEMMA2 = {
    "head_dim": 16,
    "sliding_window": 7,
    "query_pre_attn_scalar": 2,
    "pad_token_id": 0,
    # Scores and logits of these models are of this size.
    "attn_logit_softcapping": 1.5,
    "final_logit_softcapping": 4.0,
}
PHI3 = {"pad_token_id": 0, "sliding_window": 11, "head_dim": 16}
PHI3_ROPE = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.75}
EXPERTS = {
    "head_dim": 16,
    "num_experts": 8,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 24,
}
GPT_OSS = {
    "head_dim": 16,
    "num_local_experts": 8,
    "num_experts_per_tok": 3,
    "sliding_window": 7,
    "swiglu_limit": 0.3,
    "rope_parameters": {**YARN, "truncate": False},
}
OLMO3_ROPE = {
    "rope_parameters": {
        "full_attention": {**YARN, "attention_factor": 1.2},
        "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
    }
}


def rope(parameters: dict[str, Any]) -> dict[str, Any]:
    """RoPE's settings under the names that this transformers knows."""
    if transformers.__version__ >= "5":
        return {"rope_parameters": parameters}
    scaling = {key: value for key, value in parameters.items() if key != "rope_theta"}
    is_scaled = parameters["rope_type"] != "default"
    return {
        "rope_theta": parameters["rope_theta"],
        "rope_scaling": scaling if is_scaled else None,
    }


def family_configs() -> dict[str, Any]:
    default = {"rope_type": "default", "rope_theta": 500000.0}
    llama, qwen2, qwen3 = (getattr(transformers, f"{n}Config") for n in ("Llama", "Qwen2", "Qwen3"))
    gpt2 = {
        "vocab_size": VOCAB_SIZE,
        "n_embd": 64,
        "n_layer": 4,
        "n_head": 8,
        "n_inner": 96,
        "n_positions": SEQ_LEN,
        "activation_function": "gelu",
        "initializer_range": 0.1,
    }
    own_class = {
        "smollm3": ("SmolLM3", {"pad_token_id": None, "tie_word_embeddings": False}),
        "ministral3": ("Ministral3", {"head_dim": 16, **rope(MINISTRAL_ROPE)}),
        "olmo2": ("Olmo2", {"attention_bias": True, "head_dim": 16}),
        "gemma2": ("Gemma2", GEMMA2),
        "gemma3": ("Gemma3Text", GEMMA3),
        "phi3": ("Phi3", {**PHI3, "rope_parameters": PHI3_ROPE}),
        "olmo3": ("Olmo3", {"sliding_window": 7, **OLMO3_ROPE}),
        "qwen3_moe": ("Qwen3Moe", {**EXPERTS, "norm_topk_prob": True}),
        "gpt_oss": ("GptOss", GPT_OSS),
        "qwen3_moe-all": ("Qwen3Moe", {**EXPERTS, "attention_bias": True}),
    }
    biases = {"attention_bias": True, "mlp_bias": True}
    return {
        **{
            family: getattr(transformers, f"{name}Config")(**{**SHAPE, **more})
            for family, (name, more) in own_class.items()
            if hasattr(transformers, f"{name}Config")
        },
        "llama-biased": llama(**SHAPE, **biases, **rope({**default, "rope_theta": 1234.5})),
        "llama-yarn": llama(**SHAPE, **rope(YARN)),
        "mistral-window": transformers.MistralConfig(**SHAPE, sliding_window=11),
        "qwen3-biased": qwen3(**SHAPE, attention_bias=True, head_dim=8, **rope(YARN)),
        "gpt2-published": transformers.GPT2Config(**{**gpt2, "activation_function": "gelu_new"}),
        "llama": llama(**SHAPE, tie_word_embeddings=False),
        "llama-tied": llama(**SHAPE, tie_word_embeddings=True, **rope(default)),
        "llama3-rope": llama(**SHAPE, tie_word_embeddings=True, **rope(LLAMA3_ROPE)),
        "mistral": transformers.MistralConfig(**SHAPE, head_dim=16, sliding_window=None),
        "qwen2": qwen2(**SHAPE, tie_word_embeddings=True),
        "qwen3": qwen3(**SHAPE, tie_word_embeddings=False, head_dim=16),
        "gpt2": transformers.GPT2Config(**gpt2),
        "gpt2-untied": transformers.GPT2Config(**gpt2, tie_word_embeddings=False),
    }


def sample_tokens() -> torch.Tensor:
    draw = torch.Generator().manual_seed(1)
    return torch.randint(0, VOCAB_SIZE, (2, SEQ_LEN), generator=draw)


@pytest.fixture(scope="module")
def families(tmp_path_factory) -> Path:
    """A folder per family, with random weights, norms and biases, and the logits of transformers."""
    root = tmp_path_factory.mktemp("families")
    for name, config in family_configs().items():
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(config).eval()
        with torch.no_grad():
            for parameter_name, parameter in model.named_parameters():
                if parameter.dim() == 1 or "norm" in parameter_name:
                    parameter.add_(0.2 * torch.randn_like(parameter))
            logits = model(sample_tokens()).logits
        model.save_pretrained(root / name, max_shard_size="60KB" if name == "qwen2" else "1GB")
        torch.save(logits, root / f"{name}.pt")
    return root


def build(path: Path, parallel: ParallelConfig, precision: str = "fp32") -> list[torch.nn.Module]:
    """Chunks for a folder, with junk in every weight."""
    from distill_pretrain.mcore.model.chunks import build_model_chunks

    found = read_hf_model(path)
    chunks = build_model_chunks(
        found.model.model_copy(update={"vocab_divisor": 32}),
        parallel,
        vocab_size=found.vocab_size,
        seq_len=found.max_positions,
        precision=precision,
        seed=None,
    )
    with torch.no_grad():
        for chunk in chunks:
            for parameter in chunk.parameters():
                parameter.fill_(7.0)
    if parallel == ParallelConfig():
        found_here = sum(p.numel() for chunk in chunks for p in chunk.parameters())
        assert found_here == num_parameters(
            found.model.model_copy(update={"vocab_divisor": 32}),
            vocab_size=found.vocab_size,
            seq_len=found.max_positions,
        )
    return [chunk.eval() for chunk in chunks]


@torch.no_grad()
def whole_logits(chunks: list[torch.nn.Module], tokens: torch.Tensor) -> torch.Tensor:
    """Logits [B, L, V_pad] of chunks that are spread over tensor and pipeline ranks, on every rank."""
    from distill_pretrain.mcore.model.chunks import unwrap
    from distill_pretrain.mcore.runtime.parallel import current_groups

    groups = current_groups()
    stages = dist.get_process_group_ranks(groups.pipeline)
    config = unwrap(chunks[0]).config
    positions = torch.arange(tokens.size(1)).expand_as(tokens)
    hidden = torch.zeros(tokens.size(1), tokens.size(0), config.hidden_size)
    for number, chunk in enumerate(chunks):
        for rank in stages:
            is_last = number == len(chunks) - 1 and rank == stages[-1]
            if rank == dist.get_rank():
                unwrap(chunk).set_input_tensor(hidden)
                out = chunk(tokens, positions, None)
                hidden = hidden if is_last else out.clone()
            if not is_last:
                dist.broadcast(hidden, rank, group=groups.pipeline)
    if dist.get_rank() != stages[-1]:
        width = -(-VOCAB_SIZE // 32) * 32 // dist.get_world_size(groups.tensor)
        out = torch.empty(*tokens.shape, width)
    out = out.contiguous()
    dist.broadcast(out, stages[-1], group=groups.pipeline)
    parts = [torch.empty_like(out) for _ in range(dist.get_world_size(groups.tensor))]
    dist.all_gather(parts, out, group=groups.tensor)
    return torch.cat(parts, -1)


def families_of(layout: str) -> list[str]:
    if layout in EXPERT_LAYOUTS:
        return [name for name in FAMILIES_WITH_EXPERTS if name in family_configs()]
    return list(family_configs() if layout in LAYOUTS else FAMILIES_OF_MORE)


def convert_all(root: str, out: str) -> dict[str, Any]:
    """Load every family under every layout, compare logits, export; train one.

    Returns the largest differences by layout and family, and the curves of `train_alike`.
    """
    from distill_pretrain.mcore.runtime.parallel import model_parallel

    torch.set_num_threads(1)
    found: dict[str, dict[str, float]] = {}
    with process_group():
        curves = train_alike()
        for layout, sizes in EVERY_LAYOUT.items():
            parallel = ParallelConfig(**sizes)
            with released_groups(), model_parallel(parallel, seed=0):
                found[layout] = {
                    family: _convert(Path(root), family, parallel, Path(out, layout))
                    for family in families_of(layout)
                }
            dist.barrier()
    return {"differences": found, "curves": curves}


CURVE_MODELS: dict[str, dict[str, Any]] = {
    "qwen": {"qkv_bias": True, "qk_norm": True, "rope_scaling_factor": 8, "rotary_fraction": 0.5},
    "olmo3": {
        "norm_placement": "reordered",
        "qk_norm_whole": True,
        "attention_layers": "wf",
        "sliding_window": 7,
        "yarn": {"factor": 4.0, "original_positions": 8, "full_layers_only": True},
    },
    "gemma3": {
        "norm_placement": "sandwich",
        "qk_norm": True,
        "activation": "gelu_tanh",
        "zero_centred_norms": True,
        "embedding_scale": 5.5,
        "attention_scale_width": 12,
        "attention_layers": "wf",
        "sliding_window": 7,
        "windowed_rotary_base": 100,
        "rope_linear_factor": 2.0,
        "tie_embeddings": True,
    },
    "gemma2": {
        "norm_placement": "sandwich",
        "activation": "gelu_tanh",
        "zero_centred_norms": True,
        "embedding_scale": 5.5,
        "attention_layers": "wf",
        "sliding_window": 7,
        "attention_logit_cap": 2.0,
        "logit_cap": 3.0,
        "tie_embeddings": True,
    },
    # SmolLM3's layers, Ministral 3's queries and Llama's biases.
    "rest": {
        "attention_layers": "fn",
        "attention_temperature": 0.3,
        "attention_temperature_positions": 8,
        "yarn": {"factor": 4.0, "original_positions": 8},
        "rotary_fraction": 0.5,
        "qkv_bias": True,
        "attention_output_bias": True,
        "mlp_bias": True,
        "activation": "gelu_tanh",
    },
}
CURVE_LAYOUTS: dict[str, dict[str, Any]] = {
    "data": {},
    "tensor, context": {"tensor": 2, "sequence_parallel": True, "context": 2},
    "tensor, pipeline": {"tensor": 2, "pipeline": 2, "recompute": "full"},
}


def train_alike() -> dict[str, dict[str, dict[str, list[float]]]]:
    """Curves of every model under every layout, of 20 steps or of 4."""
    from tests.support.layouts import LLAMA, train_curves

    return {
        name: {
            layout: train_curves(
                model={**LLAMA, "num_layers": 2, **pieces},
                parallel=parallel,
                kd=False,
                steps=4 if name in ("qwen", "gemma2") or "context" in parallel else 20,
            )
            for layout, parallel in CURVE_LAYOUTS.items()
        }
        for name, pieces in CURVE_MODELS.items()
    }


def _convert(root: Path, family: str, parallel: ParallelConfig, out: Path) -> float:
    path = root / family
    chunks = build(path, parallel)
    load_hf_weights(chunks, path)
    logits = whole_logits(chunks, sample_tokens())
    assert logits[..., VOCAB_SIZE:].abs().max() == 0, "padding rows are zero"
    difference = logits[..., :VOCAB_SIZE] - torch.load(root / f"{family}.pt")
    found = read_hf_model(path)
    save_hf_model(
        chunks,
        model=found.model,
        vocab_size=found.vocab_size,
        max_positions=found.max_positions,
        folder=out / family,
        dtype="fp32",
        tokenizer=None,
        max_shard_bytes=60_000 if family == "llama-tied" else 10**9,
    )
    worst = torch.tensor(difference.abs().max().item())
    dist.all_reduce(worst, dist.ReduceOp.MAX)
    return float(worst)


@pytest.fixture(scope="module")
def converted(families, tmp_path_factory) -> tuple[dict[str, Any], Path]:
    out = tmp_path_factory.mktemp("exports")
    return run_distributed(convert_all, 4, root=str(families), out=str(out)), out


def stored(folder: Path) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(file)
    return tensors


def test_logits_are_those_of_transformers_under_every_layout(converted):
    differences = converted[0]["differences"]
    assert set(differences) == set(EVERY_LAYOUT)
    for layout, families in differences.items():
        assert list(families) == families_of(layout)
        for family, difference in families.items():
            assert difference <= 1e-5, f"{layout}, {family}: {difference}"


@pytest.mark.parametrize("layout", EVERY_LAYOUT)
def test_an_export_holds_the_bytes_that_were_loaded(converted, families, layout):
    for family in families_of(layout):
        source, export = stored(families / family), stored(converted[1] / layout / family)
        assert set(source) == set(export), f"{layout}, {family}"
        for name, tensor in source.items():
            assert export[name].dtype == tensor.dtype
            assert torch.equal(export[name], tensor), f"{layout}, {family}, {name}"


@pytest.mark.parametrize("family", family_configs())
def test_transformers_loads_an_export_to_the_same_logits(converted, families, family):
    exported, wanted = converted[1] / "tp2 pp2" / family, torch.load(families / f"{family}.pt")
    model = transformers.AutoModelForCausalLM.from_pretrained(exported).eval()
    with torch.no_grad():
        assert torch.equal(model(sample_tokens()).logits, wanted)
        # Greedy, with a cache of keys and values, beyond windows and original contexts.
        said = model.generate(sample_tokens()[:, :20], max_new_tokens=27, do_sample=False)
        assert torch.equal(said[:, 20:], model(said).logits[:, 19:-1].argmax(-1))
    expected = "LlamaForCausalLM" if family == "mistral" else type(model).__name__
    assert json.loads((exported / "config.json").read_text())["architectures"] == [expected]
    again = read_hf_model(exported).model.model_dump(exclude={"vocab_divisor"})
    assert again == read_hf_model(families / family).model.model_dump(exclude={"vocab_divisor"})


def test_pipeline_stages_write_files_of_their_own(converted):
    names = sorted(p.name for p in (converted[1] / "pp2" / "llama").glob("*.safetensors"))
    assert names == ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    assert len(list((converted[1] / "tp2" / "llama").glob("*.safetensors"))) == 1
    small = list((converted[1] / "tp1" / "llama-tied").glob("*.safetensors"))
    assert len(small) > 3 and max(file.stat().st_size for file in small) < 70_000


@pytest.mark.parametrize("name", CURVE_MODELS)
def test_the_pieces_of_the_families_train_alike_under_every_layout(converted, name):
    curves = converted[0]["curves"][name]
    data = curves["data"]
    assert data["loss"][-1] < data["loss"][0] - (0.3 if len(data["loss"]) == 20 else 0)
    assert len(curves["tensor, pipeline"]["loss"]) == len(data["loss"])
    for layout in CURVE_LAYOUTS:
        # Adam's first steps are as long for the smallest gradients, whose rounding differs, as for any.
        for term, tolerance in {"loss": 1e-4, "grad_norm": 1e-3}.items():
            found = curves[layout][term]
            assert found == pytest.approx(data[term][: len(found)], abs=tolerance), (layout, term)


@pytest.fixture(scope="module")
def one_process():
    from distill_pretrain.mcore.runtime.parallel import model_parallel

    with process_group(), model_parallel(ParallelConfig(), seed=0):
        yield


def copy_folder(source: Path, target: Path, **config: Any) -> Path:
    target.mkdir()
    for file in source.iterdir():
        if file.suffix in {".json", ".safetensors"}:
            (target / file.name).write_bytes(file.read_bytes())
    raw = json.loads((target / "config.json").read_text())
    (target / "config.json").write_text(json.dumps({**raw, **config}))
    return target


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_weights_are_read_as_they_are(one_process, families, tmp_path, dtype):
    path = copy_folder(families / "qwen3", tmp_path / "half", dtype=dtype)
    half = {n: t.to(getattr(torch, dtype)) for n, t in stored(path).items()}
    save_file(half, path / "model.safetensors", metadata={"format": "pt"})
    assert read_hf_model(path).dtype == {"bfloat16": "bf16", "float16": "fp16"}[dtype]
    chunks = build(path, ParallelConfig())
    load_hf_weights(chunks, path)
    model = read_hf_model(path).model
    sizes = {"model": model, "vocab_size": VOCAB_SIZE, "max_positions": SEQ_LEN}
    save_hf_model(chunks, **sizes, folder=tmp_path / "out", dtype="fp32", tokenizer=None)
    for name, tensor in stored(tmp_path / "out").items():
        assert torch.equal(tensor, half[name].float()), name
    save_hf_model(chunks, **sizes, folder=tmp_path / "bf16", dtype="bf16", tokenizer=None)
    for name, tensor in stored(tmp_path / "bf16").items():
        assert torch.equal(tensor, half[name].to(torch.bfloat16)), name


def test_a_phi_that_turns_all_channels_is_a_llama(one_process, tmp_path):
    torch.manual_seed(0)
    config = transformers.Phi3Config(**SHAPE, pad_token_id=0)
    own = transformers.Phi3ForCausalLM(config).eval()
    own.save_pretrained(tmp_path / "phi")
    chunks = build(tmp_path / "phi", ParallelConfig())
    load_hf_weights(chunks, tmp_path / "phi")
    found = read_hf_model(tmp_path / "phi")
    assert found.family == "phi3"
    sizes = {"model": found.model, "vocab_size": VOCAB_SIZE, "max_positions": SEQ_LEN}
    save_hf_model(chunks, **sizes, folder=tmp_path / "out", dtype="fp32", tokenizer=None)
    exported = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert type(exported) is transformers.LlamaForCausalLM
    with torch.no_grad():
        expected = own(sample_tokens()).logits
        torch.testing.assert_close(exported(sample_tokens()).logits, expected, rtol=0, atol=1e-6)
    found_logits = whole_logits(chunks, sample_tokens())[..., :VOCAB_SIZE]
    torch.testing.assert_close(found_logits, expected, rtol=0, atol=1e-5)


def weights_problem(folder: Path) -> str:
    found = read_hf_model(folder)
    names = correspondence(
        found.model, vocab_size=found.vocab_size, max_positions=found.max_positions
    )
    tied = names.tied_tensors if found.model.tie_embeddings else None
    with pytest.raises(CheckpointError) as error:
        WeightFiles.open(folder, names.shapes(), tied=tied)
    return str(error.value)


def test_wrong_tensors_are_named_all_at_once(families, tmp_path):
    path = copy_folder(families / "llama", tmp_path / "wrong")
    tensors = stored(path)
    del tensors["model.layers.3.mlp.up_proj.weight"]
    tensors["model.layers.4.mlp.up_proj.weight"] = torch.zeros(96, 64)
    tensors["model.norm.weight"] = torch.zeros(63)
    tensors["lm_head.weight"] = torch.zeros(VOCAB_SIZE, 64, dtype=torch.int8)
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(4)
    save_file(tensors, path / "model.safetensors")
    message = weights_problem(path)
    assert "model.layers.3.mlp.up_proj.weight is missing" in message
    assert "model.layers.4.mlp.up_proj.weight is not of this model" in message
    assert "model.norm.weight has shape [63], not [64]" in message
    assert "lm_head.weight is stored as I8" in message
    assert "inv_freq" not in message


def test_a_tied_head_may_be_stored_only_if_it_is_the_embedding(families, tmp_path):
    path = copy_folder(families / "llama-tied", tmp_path / "tied")
    tensors = stored(path)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, path / "model.safetensors")
    found = read_hf_model(path)
    names = correspondence(found.model, vocab_size=VOCAB_SIZE, max_positions=SEQ_LEN)
    WeightFiles.open(path, names.shapes(), tied=names.tied_tensors)
    tensors["lm_head.weight"][0, 0] += 1
    save_file(tensors, path / "model.safetensors")
    message = weights_problem(path)
    assert "lm_head.weight and model.embed_tokens.weight differ, though config.json" in message
    assert "tie_word_embeddings: false" in message
    path = copy_folder(families / "llama", tmp_path / "headless")
    tensors = stored(path)
    del tensors["lm_head.weight"]
    save_file(tensors, path / "model.safetensors")
    message = weights_problem(path)
    assert "lm_head.weight is missing" in message and "tie_word_embeddings: true" in message


def test_torn_and_missing_files_are_named(families, tmp_path):
    path = copy_folder(families / "qwen2", tmp_path / "torn")
    file = sorted(path.glob("*.safetensors"))[1]
    whole = file.read_bytes()
    for size in (len(whole) - 1, 100, 5, 0):
        file.write_bytes(whole[:size])
        message = weights_problem(path)
        assert "damaged or cut short" in message and file.name in message
    file.unlink()
    assert f"files of the weights are missing; where: {path}; found: {file.name}" in (
        weights_problem(path)
    )
    index = path / "model.safetensors.index.json"
    index.write_text("{}")
    assert "index of the weights is damaged" in weights_problem(path)
    index.write_text('{"weight_map": {"a": "../other"}}')
    assert "index of the weights is damaged" in weights_problem(path)
    index.unlink()
    assert "no weights found" in weights_problem(path)


def test_chunks_of_another_model_are_refused(one_process, families, tmp_path):
    chunks = build(families / "llama", ParallelConfig())
    with pytest.raises(CheckpointError, match=r"built differently.*linear_qkv\.bias"):
        load_hf_weights(chunks, families / "qwen2")
    wide = copy_folder(families / "llama", tmp_path / "wide", intermediate_size=128)
    tensors = stored(wide)
    for name in tensors:
        if "mlp.gate" in name or "mlp.up" in name:
            tensors[name] = torch.zeros(128, 64)
        elif "mlp.down" in name:
            tensors[name] = torch.zeros(64, 128)
    save_file(tensors, wide / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"other sizes.*gate_proj"):
        load_hf_weights(chunks, wide)


REFUSALS: list[tuple[str, dict[str, Any], str]] = [
    ("llama", {"hidden_act": "gelu"}, "hidden_act: gelu"),
    ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor: 0.5"),
    ("llama", {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, "yarn .* factor None"),
    ("llama", {"rope_scaling": {"type": "linear", "factor": 0}}, "linear rope scaling with fact"),
    ("gemma3", {"final_logit_softcapping": 30.0}, "final_logit_softcapping: 30.0"),
    ("gemma3", {"hidden_activation": "relu"}, "hidden_activation: relu"),
    ("gemma2", {"final_logit_softcapping": -1}, "final_logit_softcapping: -1"),
    ("gemma2", {"attn_logit_softcapping": "x"}, "attn_logit_softcapping: x"),
    ("gemma2", {"use_bidirectional_attention": True}, "use_bidirectional_attention: True"),
    ("llama", {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "dynamic rope scaling"),
    ("llama", {"rope_scaling": {"rope_type": "longrope"}}, "longrope rope scaling"),
    ("llama", {"rope_scaling": {**LLAMA3_ROPE, "high_freq_factor": 2}}, "high_freq_factor 2"),
    ("llama", {"rope_scaling": {**LLAMA3_ROPE, "low_freq_factor": 2}}, "low_freq_factor 2"),
    ("llama", {"rope_scaling": {**LLAMA3_ROPE, "factor": None}}, "with factor None"),
    (
        "llama",
        {"rope_scaling": {**LLAMA3_ROPE, "original_max_position_embeddings": 4096}},
        "original_max_position_embeddings 4096",
    ),
    ("llama", {"rope_scaling": {"full_attention": LLAMA3_ROPE}}, "different ones for different"),
    ("llama", {"rope_scaling": None, "rope_theta": 0.5}, "rope_theta: 0.5"),
    ("llama", {"rope_scaling": {**YARN, "factor": "four"}}, "yarn rope scaling with factor four"),
    ("olmo3", {"layer_types": ["chunked_attention"] * 4}, "layer_types: chunked_attention"),
    ("olmo3", {"layer_types": ["sliding_attention"] * 3}, "3 of them for 4 layers"),
    ("olmo3", {"sliding_window": None}, r"sliding_window: None \(layers have one"),
    (
        "olmo3",
        {
            "rope_parameters": {
                "full_attention": {"rope_type": "default", "rope_theta": 1e4},
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e5},
            }
        },
        "in layers with a window",
    ),
    ("phi3", {"rope_parameters": {"rope_type": "longrope"}}, "longrope rope scaling"),
    ("phi3", {"rope_parameters": {**PHI3_ROPE, "partial_rotary_factor": 2}}, "partial_rotary_fac"),
    ("phi3", {"rope_parameters": {**PHI3_ROPE, "partial_rotary_factor": 0.2}}, "rotary_fraction"),
    ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor: 0.5.*turns all channels"),
    ("smollm3", {"no_rope_layers": [1, 0]}, r"no_rope_layers: \[1, 0\] \(0 or 1 for each of 4"),
    ("smollm3", {"use_sliding_window": True, "sliding_window": 9}, "sliding_window: 9 is in use"),
    ("ministral3", {"rope_parameters": YARN}, "llama_4_scaling_beta: None"),
    ("ministral3", {"sliding_window": 9}, "sliding_window: 9 is in use"),
    ("llama", {"quantization_config": {"quant_method": "gptq"}}, r"quantised \(gptq\)"),
    ("llama", {"dtype": "float8_e4m3fn"}, "dtype: float8_e4m3fn"),
    ("llama", {"auto_map": {"AutoModelForCausalLM": "m.M"}}, "its own code"),
    ("llama", {"architectures": ["LlamaForSequenceClassification"]}, "is no causal LM"),
    ("llama", {"num_hidden_layers": None}, "num_hidden_layers is missing"),
    (
        "qwen2",
        {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 2},
        "layer 2",
    ),
    ("qwen3", {"layer_types": ["full_attention", "sliding_attention"]}, "sliding_attention"),
    ("llama", {"model_type": "mixtral", "num_local_experts": 8}, "mixtral is not supported"),
    ("llama", {"num_local_experts": 8}, "mixture of experts"),
    ("llama", {"head_dim": 7}, "head_dim: 7 is odd"),
    ("llama", {"head_dim": None, "num_attention_heads": 5}, "64 is no multiple of num_attention"),
    ("llama", {"num_key_value_heads": 3}, "num_key_value_heads: 3 does not divide"),
    ("gpt2", {"activation_function": "relu"}, "activation_function: relu"),
    ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx"),
]


@pytest.mark.parametrize(("family", "changed", "reason"), REFUSALS, ids=lambda v: str(v)[:40])
def test_what_megatron_core_cannot_represent_is_refused_by_name(
    families, tmp_path, family, changed, reason
):
    if not (families / family).exists():
        pytest.skip(f"transformers {transformers.__version__} has no {family}")
    raw = json.loads((families / family / "config.json").read_text())
    if "rope_scaling" in changed:
        raw.pop("rope_parameters", None)
    if "use_sliding_window" in changed:
        raw.pop("layer_types", None)
    (tmp_path / "config.json").write_text(json.dumps({**raw, **changed}))
    with pytest.raises(CheckpointError, match=reason):
        read_hf_model(tmp_path)


def test_every_reason_is_listed_at_once(families, tmp_path):
    raw = json.loads((families / "llama" / "config.json").read_text())
    raw |= {"partial_rotary_factor": 0.5, "num_experts": 8, "hidden_act": "relu"}
    (tmp_path / "config.json").write_text(json.dumps(raw))
    with pytest.raises(CheckpointError) as error:
        read_hf_model(tmp_path)
    assert str(error.value).count("\n  - ") == 3
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match="no valid JSON"):
        read_hf_model(tmp_path)
    with pytest.raises(CheckpointError, match="not a Hugging Face model folder"):
        read_hf_model(tmp_path / "none")


def test_windows_that_are_not_in_use_are_no_obstacle(families, tmp_path):
    for family, changed in (
        ("qwen2", {"use_sliding_window": False, "sliding_window": 16, "layer_types": None}),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 4}),
        ("mistral", {"sliding_window": SEQ_LEN}),
    ):
        raw = json.loads((families / family / "config.json").read_text())
        (tmp_path / "config.json").write_text(json.dumps({**raw, **changed}))
        assert read_hf_model(tmp_path) == read_hf_model(families / family)


def test_keys_that_older_folders_lack_mean_what_transformers_takes_them_for(tmp_path):
    old = {"model_type": "llama", **SHAPE, "rope_theta": 1e6, "torch_dtype": "float16"}
    del old["num_key_value_heads"]
    (tmp_path / "config.json").write_text(json.dumps(old))
    found = read_hf_model(tmp_path)
    assert found.model.num_query_groups == 8 and found.model.kv_channels == 8
    assert found.model.rotary_base == 1000000 and found.model.norm_epsilon == 1e-6
    assert (found.dtype, found.family, found.vocab_size) == ("fp16", "llama", VOCAB_SIZE)
    # Qwen3's own default of 32 key-value heads is refused beside 8 heads.
    qwen3 = {**old, "model_type": "qwen3", "num_key_value_heads": 8}
    (tmp_path / "config.json").write_text(json.dumps(qwen3))
    assert read_hf_model(tmp_path).model.kv_channels == 128
    (tmp_path / "config.json").write_text(json.dumps({**old, "model_type": "mistral"}))
    assert read_hf_model(tmp_path).model.num_query_groups == 8  # and a window of 4096, not in use


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"qkv_bias": True, "qk_norm": True}, "qkv_bias, model.qk_norm"),
        ({"norm_placement": "post"}, "norm_placement"),
        ({"norm_placement": "reordered"}, "norm_placement: reordered"),
        ({"attention_output_bias": True}, "attention_output_bias: True; this family has both"),
        ({"attention_layers": "fw", "sliding_window": 9}, "several kinds of attention"),
        ({"rotary_fraction": 0.5, "rope_linear_factor": 2.0}, "rope_linear_factor: 2.0"),
        ({"arch": "gpt2", "activation": "silu"}, "activation: silu"),
        ({"arch": "gpt2", "num_query_groups": 2}, "gpt2"),
        ({"arch": "gpt2", "kv_channels": 32}, "gpt2"),
    ],
)
def test_models_that_no_class_computes_are_not_exported(changed, reason):
    sizes = {"num_layers": 2, "hidden_size": 64, "ffn_hidden_size": 96, "num_attention_heads": 8}
    with pytest.raises(CheckpointError, match=reason):
        hf_config(ModelConfig(**{**sizes, **changed}), vocab_size=9, max_positions=9, dtype="fp32")


def test_settings_of_the_llama_family_are_refused_for_gpt2():
    sizes = {"num_layers": 2, "hidden_size": 64, "ffn_hidden_size": 96, "num_attention_heads": 8}
    with pytest.raises(ValueError, match="qk_norm: only for arch: llama"):
        ModelConfig(**sizes, arch="gpt2", qk_norm=True)


def test_an_existing_folder_is_replaced_only_by_the_same_export(one_process, families, tmp_path):
    chunks = build(families / "llama", ParallelConfig())
    load_hf_weights(chunks, families / "llama")
    settings: dict[str, Any] = {
        "model": read_hf_model(families / "llama").model,
        "vocab_size": VOCAB_SIZE,
        "max_positions": SEQ_LEN,
        "folder": tmp_path / "out",
        "tokenizer": None,
    }
    save_hf_model(chunks, **settings, dtype="fp32", source={"step": 5})
    save_hf_model(chunks, **settings, dtype="bf16", source={"step": 5})
    assert read_hf_model(tmp_path / "out").dtype == "bf16"
    for source in ({"step": 6}, None):
        with pytest.raises(CheckpointError, match="not an export of this checkpoint"):
            save_hf_model(chunks, **settings, dtype="fp32", source=source)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out"]
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes").touch()
    with pytest.raises(CheckpointError, match="found: other files"):
        save_hf_model(chunks, **{**settings, "folder": tmp_path / "mine"}, dtype="fp32")
    assert (tmp_path / "mine" / "notes").exists()


def test_files_are_cut_between_tensors_and_stages():
    tensors = [Tensor(name=str(i), shape=(100,)) for i in range(5)]
    files = plan_files([tensors[:3], tensors[3:]], dtype="bf16", max_shard_bytes=400)
    assert [[t.name for t in f.tensors] for f in files] == [["0", "1"], ["2"], ["3", "4"]]
    assert [f.stage for f in files] == [0, 0, 1]
    assert files[0].name == "model-00001-of-00003.safetensors"
    assert [f.name for f in plan_files([tensors], dtype="bf16", max_shard_bytes=1000)] == [
        "model.safetensors"
    ]
    assert len(plan_files([tensors], dtype="fp32", max_shard_bytes=1)) == 5


LLAMA_8B = {
    "model_type": "llama",
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
    "rope_theta": 500000.0,
    "rope_scaling": {key: LLAMA3_ROPE[key] for key in LLAMA3_ROPE if key != "rope_theta"},
    "torch_dtype": "bfloat16",
}

MEASURE = """
import json, os, resource, sys, torch
import torch.distributed as dist
from pathlib import Path
from distill_pretrain.checkpoint.hf.config import read_hf_model
from distill_pretrain.checkpoint.hf.files import WeightFiles, plan_files
from distill_pretrain.checkpoint.hf.load import load_parameters
from distill_pretrain.checkpoint.hf.save import _Export
from distill_pretrain.checkpoint.hf.registry import correspondence
from distill_pretrain.processes.groups import ParallelGroups
from distill_pretrain.processes.process import process_group
from distill_pretrain.mcore.model.config import ModelConfig

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

def load(path, size=8, stages=4):
    found = read_hf_model(path)
    names = correspondence(
        found.model, vocab_size=found.vocab_size, max_positions=found.max_positions)
    pieces = names.pieces()
    files = WeightFiles.open(path, names.shapes(), tied=None)
    mine = [n for n in pieces if n.startswith("embedding.") or
            n.startswith("decoder.layers.") and int(n.split(".")[2]) < 32 // stages]

    def local(name):
        parts = pieces[name]
        shape = list(parts[0].shape)
        if parts[0].split == 0:
            shape[0] = sum(p.shape[0] for p in parts)
        if parts[0].split is not None:
            shape[parts[0].split] //= size
        return torch.empty(shape, dtype=torch.bfloat16)

    before = peak()
    parameters = {name: local(name) for name in mine}
    load_parameters(parameters, pieces, files, rank=3, size=size)
    return {"rise": peak() - before, "share": sum(p.numel() * 2 for p in parameters.values()),
            "zero": all(not p.any() for p in parameters.values())}

def save(path):
    model = ModelConfig(
        num_layers=16, hidden_size=1024, ffn_hidden_size=4096, num_attention_heads=8)
    pieces = correspondence(model, vocab_size=1000, max_positions=64).pieces()
    with process_group():
        world = dist.group.WORLD
        groups = ParallelGroups(
            tensor=world,
            pipeline=world,
            data=world,
            context=world,
            data_context=world,
            expert=world,
            expert_data=world,
            pipeline_last_rank=0,
        )
        parameters = {
            name: torch.ones(
                sum(p.shape[0] for p in parts), *parts[0].shape[1:], dtype=torch.bfloat16)
            for name, parts in pieces.items()
        }
        before = peak()
        export = _Export(parameters, pieces, groups, "bf16")
        files = plan_files(export.stages(), dtype="bf16", max_shard_bytes=10**12)
        export.write(files, path)
        return {"rise": peak() - before, "files": len(files)}

for action, path in zip((load, save), sys.argv[1:]):
    if not os.fork():
        (Path(path) / "answer.json").write_text(json.dumps(action(Path(path))))
        os._exit(0)
    assert os.wait()[1] == 0
"""


@pytest.fixture(scope="module")
def measured(tmp_path_factory) -> tuple[Path, Path]:
    """Folders with answer.json: peak memory of loading, and of saving, in processes of their own.

    Loaded is one TP8 x PP4 rank's share of a whole 8B model, stored in sparse files of zeros.
    """
    whole, export = tmp_path_factory.mktemp("whole"), tmp_path_factory.mktemp("export")
    (whole / "config.json").write_text(json.dumps(LLAMA_8B))
    files = plan_files([tensors_of_8b()], dtype="bf16", max_shard_bytes=5 * 10**9)
    for file in files:
        write_sparse(whole / file.name, file.tensors)
    index = {t.name: file.name for file in files for t in file.tensors}
    (whole / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(whole), str(export)],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return whole, export


def tensors_of_8b() -> list[Tensor]:
    model = ModelConfig(
        num_layers=32,
        hidden_size=4096,
        ffn_hidden_size=14336,
        num_attention_heads=32,
        num_query_groups=8,
    )
    shapes = correspondence(model, vocab_size=128256, max_positions=0).shapes()
    return [Tensor(name=name, shape=shape) for name, shape in shapes.items()]


def test_a_rank_of_a_large_layout_reads_its_share_of_an_8b_model(measured):
    tensors = tensors_of_8b()
    assert sum(t.num_bytes("bf16") for t in tensors) == 2 * 8_030_261_248
    found = json.loads((measured[0] / "answer.json").read_text())
    layer = sum(t.num_bytes("bf16") for t in tensors if t.name.startswith("model.layers.0."))
    assert found["zero"]
    assert 5e8 < found["share"] < 6e8
    assert found["rise"] < found["share"] + layer


def test_saving_holds_one_tensor_at_a_time(measured):
    found = json.loads((measured[1] / "answer.json").read_text())
    written = (measured[1] / "model.safetensors").stat().st_size
    assert found["files"] == 1 and written > 5e8
    # A layer is a sixteenth; the rest is what the allocator keeps.
    assert found["rise"] < written / 4


def write_sparse(path: Path, tensors: list[Tensor]) -> None:
    header, end = {}, 0
    for tensor in tensors:
        start, end = end, end + tensor.num_bytes("bf16")
        header[tensor.name] = {
            "dtype": "BF16",
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header).encode()
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
