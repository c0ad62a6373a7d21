"""Families as published: sizes, attention beyond windows and contexts, documents, targets of two engines, pruning."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from distill_pretrain.checkpoint.hf import read_hf_model
from distill_pretrain.checkpoint.hf.registry import correspondence, families
from distill_pretrain.errors import CheckpointError, ConfigError
from distill_pretrain.mcore.model.config import ModelConfig, ParallelConfig
from distill_pretrain.mcore.model.flops import training_flops_per_token
from distill_pretrain.planning.parameters import num_parameters
from distill_pretrain.processes.process import process_group
from distill_pretrain.sampling.samplers import sample_targets
from distill_pretrain.teacher.engines import open_engine

transformers = pytest.importorskip("transformers")

OLMO_YARN = {
    "rope_type": "yarn",
    "factor": 8.0,
    "original_max_position_embeddings": 8192,
    "attention_factor": 1.2079441541679836,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
}
MINISTRAL_YARN = {
    "type": "yarn",
    "rope_theta": 1000000.0,
    "factor": 16.0,
    "original_max_position_embeddings": 16384,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
    "llama_4_scaling_beta": 0.1,
}


def facts(
    model_type: str, vocabulary: int, sizes: tuple[int, ...], positions: int, **more: Any
) -> dict[str, Any]:
    """config.json of a published model: layers, hidden, inner, heads and key/value heads."""
    layers, hidden, inner, heads, groups = sizes
    return {
        "model_type": model_type,
        "vocab_size": vocabulary,
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_attention_heads": heads,
        "num_key_value_heads": groups,
        "max_position_embeddings": positions,
        "hidden_act": "silu",
        "torch_dtype": "bfloat16",
        **more,
    }


def gpt2(layers: int, width: int, heads: int) -> dict[str, Any]:
    """config.json of OpenAI's models."""
    return {
        "model_type": "gpt2",
        "activation_function": "gelu_new",
        "vocab_size": 50257,
        "n_positions": 1024,
        "n_layer": layers,
        "n_embd": width,
        "n_head": heads,
    }


PUBLISHED: dict[str, tuple[dict[str, Any], int]] = {
    "gpt2": (gpt2(12, 768, 12), 124_439_808),
    "gpt2-xl": (gpt2(48, 1600, 25), 1_557_611_200),
    "Llama-3.1-8B": (
        facts(
            "llama",
            128256,
            (32, 4096, 14336, 32, 8),
            131072,
            rope_theta=500000.0,
            rope_scaling={
                "rope_type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 8192,
            },
        ),
        8_030_261_248,
    ),
    "Mistral-7B-v0.1": (
        facts("mistral", 32000, (32, 4096, 14336, 32, 8), 32768, sliding_window=4096),
        7_241_732_096,
    ),
    "Qwen2.5-7B-Instruct, 128k": (
        facts(
            "qwen2",
            152064,
            (28, 3584, 18944, 28, 4),
            131072,
            rope_theta=1000000.0,
            rope_scaling={
                "type": "yarn",
                "factor": 4.0,
                "original_max_position_embeddings": 32768,
            },
        ),
        7_615_616_512,
    ),
    "Qwen3-8B": (
        facts("qwen3", 151936, (36, 4096, 12288, 32, 8), 40960, rope_theta=1000000, head_dim=128),
        8_190_735_360,
    ),
    "phi-4": (
        facts("phi3", 100352, (40, 5120, 17920, 40, 10), 16384, rope_theta=250000),
        14_659_507_200,
    ),
    "Phi-3-mini-4k-instruct": (
        facts("phi3", 32064, (32, 3072, 8192, 32, 32), 4096, sliding_window=2047),
        3_821_079_552,
    ),
    "SmolLM3-3B": (
        facts(
            "smollm3",
            128256,
            (36, 2048, 11008, 16, 4),
            65536,
            rope_theta=5000000.0,
            rms_norm_eps=1e-6,
            no_rope_layers=[1, 1, 1, 0] * 9,
            layer_types=["full_attention"] * 36,
            tie_word_embeddings=True,
        ),
        3_075_098_624,
    ),
    "Ministral-3-8B-Base-2512, its text model": (
        facts(
            "ministral3",
            131072,
            (34, 4096, 14336, 32, 8),
            262144,
            head_dim=128,
            rms_norm_eps=1e-5,
            rope_parameters=MINISTRAL_YARN,
            sliding_window=None,
        ),
        8_489_553_920,
    ),
    "gemma-3-1b-pt": (
        facts(
            "gemma3_text",
            262144,
            (26, 1152, 6912, 4, 1),
            32768,
            head_dim=256,
            query_pre_attn_scalar=256,
            hidden_act="gelu_pytorch_tanh",
            hidden_activation="gelu_pytorch_tanh",
            rope_theta=1000000,
            rope_local_base_freq=10000,
            sliding_window=512,
            sliding_window_pattern=6,
        ),
        999_885_952,
    ),
    "gemma-2-2b": (
        facts(
            "gemma2",
            256000,
            (26, 2304, 9216, 8, 4),
            8192,
            head_dim=256,
            query_pre_attn_scalar=256,
            hidden_act="gelu_pytorch_tanh",
            hidden_activation="gelu_pytorch_tanh",
            rms_norm_eps=1e-6,
            rope_theta=10000.0,
            sliding_window=4096,
            attn_logit_softcapping=50.0,
            final_logit_softcapping=30.0,
        ),
        2_614_341_888,
    ),
    "gpt-oss-20b, dequantised": (
        facts(
            "gpt_oss",
            201088,
            (24, 2880, 2880, 64, 8),
            131072,
            head_dim=64,
            attention_bias=True,
            rms_norm_eps=1e-5,
            rope_theta=150000,
            rope_scaling={
                "rope_type": "yarn",
                "factor": 32.0,
                "beta_fast": 32.0,
                "beta_slow": 1.0,
                "truncate": False,
                "original_max_position_embeddings": 4096,
            },
            layer_types=["sliding_attention", "full_attention"] * 12,
            sliding_window=128,
            num_local_experts=32,
            num_experts_per_tok=4,
            swiglu_limit=7.0,
            router_aux_loss_coef=0.9,
            tie_word_embeddings=False,
        ),
        20_914_757_184,
    ),
    "Qwen3-30B-A3B": (
        facts(
            "qwen3_moe",
            151936,
            (48, 2048, 6144, 32, 4),
            40960,
            head_dim=128,
            rope_theta=1000000.0,
            rms_norm_eps=1e-6,
            num_experts=128,
            num_experts_per_tok=8,
            moe_intermediate_size=768,
            norm_topk_prob=True,
            decoder_sparse_step=1,
            mlp_only_layers=[],
            router_aux_loss_coef=0.001,
            use_sliding_window=False,
            max_window_layers=48,
        ),
        30_532_122_624,
    ),
    "OLMo-2-1124-7B": (
        facts(
            "olmo2",
            100352,
            (32, 4096, 11008, 32, 32),
            4096,
            rope_theta=500000,
            rms_norm_eps=1e-6,
            attention_bias=False,
            tie_word_embeddings=False,
        ),
        7_298_617_344,
    ),
    "Olmo-3-1025-7B": (
        facts(
            "olmo3",
            100278,
            (32, 4096, 11008, 32, 32),
            65536,
            rope_theta=500000,
            rope_scaling=OLMO_YARN,
            sliding_window=4096,
            layer_types=(["sliding_attention"] * 3 + ["full_attention"]) * 8,
        ),
        7_298_011_136,
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_models_are_accepted_in_their_size(name, tmp_path):
    raw, published = PUBLISHED[name]
    (tmp_path / "config.json").write_text(json.dumps(raw))
    found = read_hf_model(tmp_path)
    sizes = {"vocab_size": found.vocab_size, "max_positions": found.max_positions}
    shapes = correspondence(found.model, **sizes, family=found.family).shapes()
    assert sum(map(math.prod, shapes.values())) == pytest.approx(published, rel=1e-3)
    foreseen = num_parameters(
        found.model.model_copy(update={"vocab_divisor": 1}),
        vocab_size=found.vocab_size,
        seq_len=found.max_positions,
    )
    assert foreseen == sum(map(math.prod, shapes.values()))
    if raw["model_type"] not in transformers.CONFIG_MAPPING:
        pytest.skip(f"transformers {transformers.__version__} has no {raw['model_type']}")
    with torch.device("meta"):
        config = transformers.AutoConfig.from_pretrained(tmp_path)
        model = transformers.AutoModelForCausalLM.from_config(config)
    theirs = {n: tuple(t.shape) for n, t in model.state_dict().items()}
    if config.tie_word_embeddings:
        theirs.pop("lm_head.weight")
    if found.model.experts is not None:
        # Experts are one tensor in memory, and many in files.
        assert sum(map(math.prod, theirs.values())) == sum(map(math.prod, shapes.values()))
        theirs = {n: shape for n, shape in theirs.items() if ".experts." not in n}
        shapes = {n: shape for n, shape in shapes.items() if ".experts." not in n}
    assert theirs == shapes


PIECES: dict[str, dict[str, Any]] = {
    "window": {"attention_layers": "wf", "sliding_window": 5},
    "temperature": {"attention_temperature": 0.5, "attention_temperature_positions": 6},
    "no rope": {"attention_layers": "fn"},
    "yarn": {"yarn": {"factor": 4.0, "original_positions": 8}},
    "gemma": {
        "attention_layers": "wf",
        "sliding_window": 5,
        "norm_placement": "sandwich",
        "zero_centred_norms": True,
        "embedding_scale": 5.0,
        "windowed_rotary_base": 50.5,
    },
    "experts": {"experts": {"number": 6, "per_token": 2}},
    "sinks": {"attention_sinks": True, "attention_layers": "wf", "sliding_window": 5},
    "caps": {
        "attention_layers": "wf",
        "sliding_window": 5,
        "attention_logit_cap": 1.0,
        "logit_cap": 2.0,
    },
    "all": {
        "attention_layers": "wfn",
        "attention_logit_cap": 1.0,
        "sliding_window": 5,
        "attention_temperature": 0.5,
        "attention_temperature_positions": 6,
        "yarn": {"factor": 4.0, "original_positions": 8, "full_layers_only": True},
        "norm_placement": "reordered",
        "qk_norm_whole": True,
    },
}


def section(**pieces: Any) -> ModelConfig:
    return ModelConfig(
        num_layers=3,
        hidden_size=32,
        ffn_hidden_size=48,
        num_attention_heads=4,
        num_query_groups=2,
        init_std=0.3,
        vocab_divisor=1,
        **pieces,
    )


@pytest.fixture(scope="module")
def one_process() -> Iterator[None]:
    from distill_pretrain.mcore.runtime.parallel import model_parallel

    with process_group(), model_parallel(ParallelConfig(), seed=0):
        yield


@pytest.mark.parametrize("pieces", PIECES)
@torch.no_grad()
def test_separate_documents_are_computed_as_if_each_were_alone(one_process, pieces):
    from distill_pretrain.mcore.model.chunks import build_model_chunks

    (chunk,) = build_model_chunks(
        section(**PIECES[pieces]),
        ParallelConfig(),
        vocab_size=50,
        seq_len=24,
        precision="fp32",
        seed=3,
    )
    chunk.eval()
    tokens = torch.randint(0, 50, (1, 24), generator=torch.Generator().manual_seed(0))
    places = torch.arange(24)[None]
    apart = chunk(tokens, places, torch.tensor([[0, 0, 10], [0, 10, 24]]))
    alone = [chunk(part, places[:, : part.size(1)], None) for part in tokens.split([10, 14], dim=1)]
    torch.testing.assert_close(apart, torch.cat(alone, dim=1), rtol=0, atol=2e-5)
    joined = chunk(tokens, places, None)
    assert (joined - apart)[:, 10:].abs().max() > 1e-3


CONFIGS: dict[str, dict[str, Any]] = {
    "GPT2Config": {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 64},
    "LlamaConfig": {"attention_bias": True, "mlp_bias": True},
    "MistralConfig": {"sliding_window": 11},
    "Qwen2Config": {},
    "Qwen3Config": {"head_dim": 8},
    "SmolLM3Config": {"pad_token_id": None},
    "Ministral3Config": {"head_dim": 8, "rope_parameters": {**MINISTRAL_YARN}},
    "Olmo2Config": {},
    "Olmo3Config": {"sliding_window": 7},
    "Phi3Config": {
        "pad_token_id": 0,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 10000.0,
            "partial_rotary_factor": 0.5,
        },
    },
    "GptOssConfig": {
        "head_dim": 8,
        "num_local_experts": 8,
        "num_experts_per_tok": 3,
        "sliding_window": 7,
        "swiglu_limit": 0.5,
        "pad_token_id": 0,
    },
    "Qwen3MoeConfig": {"head_dim": 8, "num_experts": 8, "num_experts_per_tok": 3},
    "Gemma3TextConfig": {"sliding_window": 7, "head_dim": 8, "pad_token_id": 0},
    "Gemma2Config": {
        "sliding_window": 7,
        "head_dim": 8,
        "pad_token_id": 0,
        "query_pre_attn_scalar": 8,
        "attn_logit_softcapping": 2.0,
        "final_logit_softcapping": 5.0,
    },
}
LIKE_LLAMA = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}


def save_random(name: str, folder: Path) -> None:
    if not hasattr(transformers, name):
        pytest.skip(f"transformers {transformers.__version__} has no {name}")
    more = CONFIGS[name]
    sizes = {} if name == "GPT2Config" else LIKE_LLAMA
    config = getattr(transformers, name)(vocab_size=150, initializer_range=0.3, **{**sizes, **more})
    if hasattr(config, "rope_parameters") and name == "Ministral3Config":
        config.rope_parameters["original_max_position_embeddings"] = 16
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.2 * torch.randn_like(parameter))
    model.save_pretrained(folder)


@pytest.mark.parametrize("name", CONFIGS)
def test_the_targets_of_kind_megatron_are_those_of_kind_hf(one_process, name, tmp_path):
    """Systematic sampling of 50 draws, the same random numbers: rounding moves few positions, a fault all of them."""
    save_random(name, tmp_path)
    tokens = torch.randint(0, 150, (8, 64), generator=torch.Generator().manual_seed(0))
    sampled = []
    for kind in ("hf", "megatron"):
        engine = open_engine(kind, tmp_path, "fp32", vocab_size=150, seq_len=64)
        logits = engine.logits(tokens).flatten(0, 1).numpy()
        targets = sample_targets(
            logits,
            np.arange(512, dtype=np.uint64),
            sampler="systematic",
            num_draws=50,
            seed=1,
        )
        ends = np.cumsum(targets.entries_per_token)[:-1]
        rows = zip(np.split(targets.ids, ends), np.split(targets.values, ends), strict=True)
        sampled.append([(ids.tolist(), counts.tolist()) for ids, counts in rows])
    moved = sum(one != other for one, other in zip(*sampled, strict=True))
    print(f"{name}: {moved} of 512 positions moved")
    assert moved <= 5


@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_separate_documents_are_what_transformers_computes_one_by_one(one_process, name, tmp_path):
    """Documents of 9, 1 and 38 tokens, the last beyond windows and original contexts, in one sequence of training."""
    from distill_pretrain.checkpoint.hf import load_hf_weights
    from distill_pretrain.mcore.model.chunks import build_model_chunks
    from distill_pretrain.mcore.student.base import piece_positions

    save_random(name, tmp_path)
    tokens = torch.randint(0, 150, (2, 48), generator=torch.Generator().manual_seed(0))
    (chunk,) = build_model_chunks(
        read_hf_model(tmp_path).model,
        ParallelConfig(),
        vocab_size=150,
        seq_len=64,
        precision="fp32",
        seed=None,
    )
    load_hf_weights([chunk.eval()], tmp_path)
    ends = [[0, 9, 10, 48], [0, 38, 47, 48]]
    pieces = torch.tensor(
        [[row, *span] for row in (0, 1) for span in itertools.pairwise(ends[row])]
    )
    places = torch.arange(48)
    found = chunk(tokens, piece_positions(pieces, 2, places), pieces)[..., :150]
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    for row, start, stop in pieces.tolist():
        alone = model(tokens[row : row + 1, start:stop]).logits[0]
        torch.testing.assert_close(found[row, start:stop], alone, rtol=1e-5, atol=2e-5)
    joined = chunk(tokens, places.expand(2, 48), None)[..., :150]
    assert (joined - found)[0, 9:].abs().max() > 1e-3


def test_a_layer_that_stays_keeps_its_kind_of_attention(tmp_path):
    from distill_pretrain.checkpoint.start import open_weights
    from distill_pretrain.pruning.choice import choose
    from distill_pretrain.pruning.folder import Source, write_folder
    from distill_pretrain.pruning.model import load_model, without_layers
    from distill_pretrain.pruning.scores import collect_scores
    from distill_pretrain.pruning.shapes import Shape, with_shape
    from distill_pretrain.pruning.slicing import cuts

    save_random("SmolLM3Config", tmp_path / "source")
    source = Source.open(tmp_path / "source")
    model = load_model(tmp_path / "source", "fp32", torch.device("cpu"))
    tokens = torch.randint(0, 150, (2, 32), generator=torch.Generator().manual_seed(0))
    shape = Shape(**{**vars(Shape.of(source.model)), "num_layers": 2})
    kept = choose(collect_scores(model, [tokens]), Shape.of(source.model), shape, (1, 3))
    smaller = with_shape(source.model, shape, kept.layers)
    assert (source.model.attention_layers, smaller.attention_layers) == ("fffn", "fn")
    of_source = {"source": source.model, "vocab_size": 150}
    pieces = list(cuts(smaller, kept, **of_source, norm_shares=None))
    write_folder(tmp_path / "out", source, source.config_of(smaller), pieces, {})
    assert read_hf_model(tmp_path / "out").model == smaller
    assert open_weights(tmp_path / "out", model=smaller, vocab_size=150, seq_len=32)
    pruned = load_model(tmp_path / "out", "fp32", torch.device("cpu"))
    with torch.no_grad(), without_layers(model, (0, 2)):
        expected = model(tokens, use_cache=False).logits
        assert torch.equal(pruned(tokens).logits, expected)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("Qwen3MoeConfig", r"found: Qwen3-MoE \(qwen3_moe\): what each expert does"),
        ("GptOssConfig", r"found: gpt-oss \(gpt_oss\): what each expert does"),
        ("GPT2Config", r"found: GPT-2 \(gpt2\): norms that subtract a mean"),
    ],
)
def test_a_family_that_is_not_pruned_is_refused_by_name_with_what_to_do(name, reason, tmp_path):
    from distill_pretrain.pruning.folder import Source

    save_random(name, tmp_path)
    with pytest.raises(CheckpointError, match=reason) as error:
        Source.open(tmp_path)
    assert "phi3, qwen2, qwen3, smollm3" in str(error.value)
    assert "sizes of a smaller student in the section model" in str(error.value)


@pytest.mark.parametrize("name", ["Gemma2Config", "Gemma3TextConfig", "Olmo3Config", "Phi3Config"])
def test_a_pruned_folder_is_the_same_model_here(one_process, name, tmp_path):
    from distill_pretrain.pruning.choice import choose
    from distill_pretrain.pruning.folder import Source, write_folder
    from distill_pretrain.pruning.model import load_model
    from distill_pretrain.pruning.scores import collect_scores
    from distill_pretrain.pruning.shapes import Shape, with_shape
    from distill_pretrain.pruning.slicing import cuts

    save_random(name, tmp_path / "source")
    source = Source.open(tmp_path / "source")
    whole = load_model(tmp_path / "source", "fp32", torch.device("cpu"))
    tokens = torch.randint(0, 150, (2, 48), generator=torch.Generator().manual_seed(0))
    sizes = {"num_layers": 3, "hidden_size": 24, "num_query_groups": 1, "num_attention_heads": 2}
    shape = Shape(**{**vars(Shape.of(source.model)), **sizes})
    scores = collect_scores(whole, [tokens])
    kept = choose(scores, Shape.of(source.model), shape, (0, 1, 3))
    smaller = with_shape(source.model, shape, kept.layers)
    of_source = {"source": source.model, "vocab_size": 150}
    of_source["family"] = source.config["model_type"]
    pieces = list(cuts(smaller, kept, **of_source, norm_shares=scores.norm_shares))
    write_folder(tmp_path / "out", source, source.config_of(smaller), pieces, {})
    engine = open_engine("megatron", tmp_path / "out", "fp32", vocab_size=150, seq_len=64)
    with torch.no_grad():
        expected = load_model(tmp_path / "out", "fp32", torch.device("cpu"))(tokens).logits
    torch.testing.assert_close(engine.logits(tokens), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("chunk_tokens", [None, 20])
def test_training_and_scoring_see_the_capped_logits_of_transformers(
    one_process, chunk_tokens, tmp_path
):
    from distill_pretrain.checkpoint.hf import load_hf_weights
    from distill_pretrain.contracts import TokenBatch
    from distill_pretrain.losses.config import ObjectiveConfig
    from distill_pretrain.losses.sparse_kd import DistillationObjective
    from distill_pretrain.mcore.model.chunks import build_model_chunks

    save_random("Gemma2Config", tmp_path)
    tokens = torch.randint(0, 150, (2, 33), generator=torch.Generator().manual_seed(0))
    whole = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    logits = whole(tokens[:, :-1]).logits
    labels = tokens[:, 1:]
    expected = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), labels.flatten(), reduction="sum"
    )
    expected.backward()
    model = read_hf_model(tmp_path).model
    loss = DistillationObjective(
        ObjectiveConfig(),
        vocab_size=150,
        tensor_group=None,
        chunk_tokens=chunk_tokens,
        logit_cap=model.logit_cap,
    )
    (chunk,) = build_model_chunks(
        model,
        ParallelConfig(),
        vocab_size=150,
        seq_len=32,
        precision="fp32",
        seed=None,
        loss_function=loss,
    )
    load_hf_weights([chunk], tmp_path)
    places = torch.arange(32).expand(2, 32)
    batch = TokenBatch(tokens=tokens[:, :-1], labels=labels, targets=None)
    sums = chunk(tokens[:, :-1], places, None, labels=batch)
    sums[0].backward()
    torch.testing.assert_close(sums[0], expected, rtol=1e-6, atol=0)
    theirs = whole.model.layers[0].mlp.down_proj.weight.grad
    ours = dict(chunk.named_parameters())["decoder.layers.0.mlp.linear_fc2.weight"].grad
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)
    engine = open_engine("megatron", tmp_path, "fp32", vocab_size=150, seq_len=64)
    scored = torch.cat([part.logits for part in engine.chunks(tokens[:, :-1])])
    torch.testing.assert_close(scored.view_as(logits), logits, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(engine.logits(tokens[:, :-1]), logits, rtol=1e-5, atol=1e-5)


def test_dense_families_of_the_kind_of_llama_are_pruned():
    pruned = {name for name, family in families().items() if family.unpruned is None}
    likes = {"llama", "mistral", "ministral3", "phi3", "qwen2", "qwen3", "smollm3"}
    assert pruned == likes | {"gemma2", "gemma3_text", "olmo2", "olmo3"}


def test_a_window_shortens_the_sums_of_attention():
    full, windowed = section(), section(attention_layers="wwf", sliding_window=100)
    long, short = (training_flops_per_token(full, vocab_size=50, seq_len=n) for n in (400, 100))
    found = training_flops_per_token(windowed, vocab_size=50, seq_len=400)
    assert found == long - (long - short) * 2 // 3


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"norm_placement": "reordered", "init": "deepscale"}, "deepscale is not derived"),
        ({"norm_placement": "sandwich", "init": "completep"}, "completep is not derived"),
        ({"rotary_fraction": 0.45}, "rotary_fraction: 0.45 of 8 channels are 3"),
        ({"arch": "gpt2", "rotary_fraction": 0.5}, "rotary_fraction: only for arch: llama"),
        ({"embedding_scale": 8.0, "init": "fan_in"}, "fan_in is not derived for embedding_scale"),
        (
            {"attention_logit_cap": 5.0, "attention_sinks": True},
            "attention_sinks and attention_log",
        ),
        ({"logit_cap": 30.0, "init": "xavier"}, "xavier is not derived for logit_cap"),
        ({"attention_logit_cap": 50.0, "spec": "te"}, "spec: te has no layers with attention_log"),
        ({"attention_layers": "wf"}, "sliding_window: None"),
        ({"sliding_window": 9}, "attention_layers: f"),
        ({"attention_temperature": 0.1}, "set both or none"),
        (
            {"yarn": {"factor": 2.0, "original_positions": 8}, "rope_scaling_factor": 2.0},
            "only one",
        ),
        ({"qk_norm": True, "qk_norm_whole": True}, "only one"),
        ({"mlp_bias": True, "spec": "te"}, "spec: te has no layers with mlp_bias"),
        ({"norm_placement": "reordered", "spec": "te"}, "no layers with norm_placement"),
        ({"arch": "gpt2", "attention_layers": "n"}, "attention_layers: only for arch: llama"),
        ({"arch": "gpt2", "norm_placement": "reordered"}, "only for arch: llama"),
        ({"arch": "gpt2", **PIECES["experts"]}, "experts: only for arch: llama"),
        ({**PIECES["experts"], "spec": "te"}, "spec: te has no layers with experts"),
        ({**PIECES["experts"], "mlp_bias": True}, "mlp_bias: not of experts"),
        ({**PIECES["experts"], "init": "fan_in"}, "fan_in is not derived for experts"),
        ({"experts": {"number": 4, "per_token": 5}}, "per_token: 5 of number: 4 experts"),
        ({"experts": {"number": 4, "per_token": 1}}, "weight would be 1 whatever"),
    ],
)
def test_pieces_that_do_not_go_together_are_refused(settings, reason):
    sizes = {"num_layers": 2, "hidden_size": 64, "ffn_hidden_size": 96, "num_attention_heads": 8}
    with pytest.raises(ValueError, match=reason):
        ModelConfig(**{**sizes, **settings})


@pytest.mark.parametrize(
    "pieces", ["window", "temperature", "yarn", "experts", "sinks", "caps", "all"]
)
def test_the_signal_of_fresh_weights_is_not_predicted_where_it_is_not_derived(pieces):
    from distill_pretrain.mcore.init.theory import predict

    ids = np.zeros((1, 4), dtype=np.int64)
    with pytest.raises(ConfigError, match="not derived for this model"):
        predict(section(**PIECES[pieces]), ids, ids, vocab_size=9)


def test_a_base_that_is_no_whole_number_is_kept_and_others_stay_whole():
    assert section(rotary_base=1234.5).rotary_base == 1234.5
    whole = section(rotary_base=1e6).rotary_base
    assert whole == 1000000 and isinstance(whole, int)
