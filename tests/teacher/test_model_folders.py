"""A teacher's folder is used as it is meant or refused by name: all weights and no others, no code, no pickles."""

from __future__ import annotations

import builtins
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from distill_pretrain.cli.main import main
from distill_pretrain.errors import DistillPretrainError
from distill_pretrain.teacher.config import TeacherConfig
from distill_pretrain.teacher.engines import check_model_folder, open_engine, open_teacher_engine
from tests.support.small_corpus import SEQ_LEN, VOCAB_SIZE, write_small_corpus

transformers = pytest.importorskip("transformers")
safetensors = pytest.importorskip("safetensors.torch")

SIZES: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
Tensors = dict[str, torch.Tensor]


def save_llama(folder: Path, **changes: Any) -> Path:
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**SIZES, **changes})).save_pretrained(
        folder
    )
    return folder


@pytest.fixture(scope="module")
def sound(tmp_path_factory) -> Path:
    return save_llama(tmp_path_factory.mktemp("sound"))


@pytest.fixture
def model(sound, tmp_path) -> Path:
    return Path(shutil.copytree(sound, tmp_path / "model"))


def change_weights(folder: Path, change: Callable[[Tensors], object]) -> None:
    file = folder / "model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in safetensors.load_file(file).items()}
    change(tensors)
    safetensors.save_file(tensors, file, metadata={"format": "pt"})


def change_config(folder: Path, **changes: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def without(part: str) -> Callable[[Tensors], object]:
    return lambda tensors: [tensors.pop(name) for name in list(tensors) if part in name]


def renamed(tensors: Tensors) -> None:
    for name in list(tensors):
        tensors[f"_orig_mod.{name}"] = tensors.pop(name)


def open_with(kind: str, folder: Path) -> None:
    """Everything that reads a folder: the whole engine (of capture, eval and FullKD), a split one, a dry run."""
    sizes: dict[str, int] = {"vocab_size": VOCAB_SIZE, "seq_len": SEQ_LEN}
    if kind == "hf":
        open_engine("hf", folder, "fp32", **sizes)
    elif kind == "split":
        open_teacher_engine(TeacherConfig(kind="hf", path=folder, fsdp=2), **sizes)
    elif kind == "deepspeed":
        open_teacher_engine(TeacherConfig(kind="deepspeed", path=folder, zero=2), **sizes)
    else:
        check_model_folder(TeacherConfig(kind=kind.split()[0], path=folder), **sizes)  # type: ignore[arg-type]


WRONG: dict[str, tuple[Callable[[Tensors], object], str]] = {
    "a block is missing": (
        without("layers.1.mlp"),
        r"layers\.1\.mlp\.gate_proj\.weight is missing",
    ),
    "a layer is missing": (without("layers.2."), r"layers\.2\.\S+ is missing"),
    "the head is missing": (without("lm_head"), r"lm_head\.weight is missing"),
    "a tensor too many": (
        lambda t: t.update({"model.layers.3.mlp.up_proj.weight": torch.zeros(2)}),
        r"model\.layers\.3\.mlp\.up_proj\.weight is not of this model",
    ),
    "another shape": (
        lambda t: t.update({"model.norm.weight": torch.zeros(3)}),
        r"model\.norm\.weight has shape \[3\], not \[32\]",
    ),
    "names of a compiled model": (renamed, r"is missing"),
}


@pytest.mark.parametrize("kind", ["hf", "split", "deepspeed", "hf dry", "megatron dry"])
@pytest.mark.parametrize("fault", WRONG)
def test_weights_that_are_not_the_models_are_refused_by_name(fault, kind, model):
    change, expected = WRONG[fault]
    change_weights(model, change)
    with pytest.raises(DistillPretrainError, match=expected):
        open_with(kind, model)


def test_a_tied_head_may_be_absent_or_the_same_but_no_other(tmp_path):
    folder = save_llama(tmp_path, tie_word_embeddings=True)
    assert "lm_head.weight" not in safetensors.load_file(folder / "model.safetensors")
    open_with("hf", folder)
    change_weights(
        folder, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"] + 0})
    )
    open_with("hf", folder)
    change_weights(folder, lambda t: t["lm_head.weight"].add_(1))
    for kind in ("hf", "split", "megatron dry"):
        with pytest.raises(DistillPretrainError, match=r"lm_head\.weight.*(differ|not of this)"):
            open_with(kind, folder)


def broken(content: bytes | int) -> Callable[[Path], object]:
    def change(folder: Path) -> None:
        file = folder / "model.safetensors"
        file.write_bytes(file.read_bytes()[:content] if isinstance(content, int) else content)

    return change


def code_of_its_own(folder: Path) -> None:
    change_config(folder, model_type="own", auto_map={"AutoConfig": "own.Own"})
    (folder / "own.py").write_text("raise SystemExit('the code of the folder ran')")


def pickled(folder: Path) -> None:
    torch.save(safetensors.load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


FOLDERS: dict[str, tuple[Callable[[Path], object], str]] = {
    "cut short": (broken(3000), "damaged or cut short"),
    "empty": (broken(b""), "an empty file"),
    "a pointer": (broken(b"version https://git-lfs.github.com/spec/v1\n"), "git lfs pull"),
    "code": (code_of_its_own, r"own\.Own.*teacher\.trust_remote_code=true"),
    "code beside a known type": (
        lambda f: change_config(f, auto_map={"AutoModelForCausalLM": "own.Own"}),
        "remove auto_map",
    ),
    "a pickle": (pickled, r"teacher\.allow_pickle=true"),
    "an adapter": (lambda f: (f / "adapter_config.json").write_text("{}"), "adapter"),
    "weights twice": (lambda f: (f / "model.safetensors.index.json").write_text("{}"), "twice"),
    "gptq": (
        lambda f: change_config(f, quantization_config={"quant_method": "gptq", "bits": 4}),
        "gptq.*pip install gptqmodel",
    ),
    "bitsandbytes": (
        lambda f: change_config(
            f, quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True}
        ),
        "bitsandbytes.*pip install bitsandbytes",
    ),
    "no JSON": (lambda f: (f / "config.json").write_text("{"), "no valid JSON"),
    "words for numbers": (lambda f: change_config(f, hidden_size="wide"), "cannot be loaded"),
    "an unknown type": (
        lambda f: change_config(f, model_type="frobnicate"),
        r"does not know models of this type.*frobnicate.*pip install -U transformers",
    ),
    "no heads": (
        lambda f: change_config(f, num_attention_heads=0),
        r"cannot be loaded.*perhaps for num_attention_heads: 0 \(a whole number",
    ),
    "a quantisation in a word": (
        lambda f: change_config(f, quantization_config="fp8"),
        r"perhaps for quantization_config: 'fp8' \(an object is expected\)",
    ),
    "heads that do not divide": (
        lambda f: change_config(f, num_attention_heads=5, head_dim=None),
        "cannot be loaded",
    ),
}


@pytest.mark.parametrize("kind", ["hf", "hf dry"])
@pytest.mark.parametrize("fault", FOLDERS)
def test_what_cannot_be_used_of_a_folder_is_refused_without_a_question(
    fault, kind, model, monkeypatch
):
    monkeypatch.setattr(builtins, "input", lambda *_: pytest.fail("a question was asked"))
    change, expected = FOLDERS[fault]
    change(model)
    with pytest.raises(DistillPretrainError, match=f"(?s){expected}"):
        open_with(kind, model)


def test_pickled_weights_are_read_where_asked_for(model):
    given = torch.arange(SEQ_LEN)[None]
    sizes: dict[str, Any] = {"vocab_size": VOCAB_SIZE, "seq_len": SEQ_LEN}
    expected = open_engine("hf", model, "fp32", **sizes).logits(given)
    pickled(model)
    teacher = TeacherConfig(kind="hf", path=model, allow_pickle=True)
    found = open_teacher_engine(teacher, **sizes)
    assert torch.equal(found.logits(given), expected)  # type: ignore[attr-defined]
    assert set(found.identity["files"]) == {"config.json", "pytorch_model.bin"}
    change_weights_of_pickle(model)
    with pytest.raises(DistillPretrainError, match=r"model\.norm\.weight is missing"):
        open_teacher_engine(teacher, **sizes)


def change_weights_of_pickle(folder: Path) -> None:
    tensors = torch.load(folder / "pytorch_model.bin")
    del tensors["model.norm.weight"]
    torch.save(tensors, folder / "pytorch_model.bin")


def test_a_dry_run_and_a_capture_end_with_status_2(model, tmp_path, capsys):
    change_weights(model, without("layers.1.mlp"))
    tokens = write_small_corpus(tmp_path / "train")
    job = [
        f"data.tokens={tokens}",
        f"data.vocab_size={VOCAB_SIZE}",
        f"data.seq_len={SEQ_LEN}",
        "teacher.kind=hf",
        f"teacher.path={model}",
        f"capture.output_dir={tmp_path / 'cache'}",
    ]
    for extra in (["--dry-run"], []):
        assert main(["capture", *job, *extra]) == 2
        error = capsys.readouterr().err
        assert "model.layers.1.mlp.up_proj.weight is missing" in error and "Traceback" not in error
    assert not (tmp_path / "cache/manifest.json").exists()


def test_a_cache_that_cannot_be_written_is_found_before_the_teacher_is_looked_for(tmp_path, capsys):
    tokens = write_small_corpus(tmp_path / "train")
    (tmp_path / "note").write_text("")
    job = [f"data.tokens={tokens}", f"data.vocab_size={VOCAB_SIZE}", f"data.seq_len={SEQ_LEN}"]
    job += ["teacher.kind=hf", f"teacher.path={tmp_path / 'nowhere'}"]
    assert main(["capture", *job, f"capture.output_dir={tmp_path / 'note' / 'cache'}"]) == 2
    assert f"where: {tmp_path / 'note'};" in capsys.readouterr().err


def save_of(config: Any, folder: Path) -> Any:
    torch.manual_seed(0)
    made = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.dim() > 1:
                parameter.mul_(5)
    made.save_pretrained(folder)
    return made


GPT2 = {"vocab_size": 200, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "head_dim": 8}
LATENT = {"num_key_value_heads": 4, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8}
LATENT |= {"qk_nope_head_dim": 8, "v_head_dim": 8, "n_routed_experts": 4, "num_experts_per_tok": 2}
LATENT |= {"n_group": 1, "topk_group": 1, "moe_intermediate_size": 16, "first_k_dense_replace": 1}
ACCEPTED: dict[str, dict[str, Any]] = {
    "gpt2": GPT2,
    "mixtral": {**SIZES, "num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen2_moe": {**SIZES, **EXPERTS, "shared_expert_intermediate_size": 16},
    "qwen3_moe": {**SIZES, **EXPERTS},
    "olmoe": {**SIZES, **EXPERTS},
    "gpt_oss": {**SIZES, **EXPERTS, "num_local_experts": 4},
    "granitemoe": {**SIZES, "num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen3": {**SIZES, "head_dim": 8},
    "qwen3_next": {
        **SIZES,
        **EXPERTS,
        "shared_expert_intermediate_size": 16,
        "num_hidden_layers": 4,
        **{f"linear_num_{name}_heads": 2 for name in ("key", "value")},
        **{f"linear_{name}_head_dim": 8 for name in ("key", "value")},
    },
    "gemma2": {**SIZES, "head_dim": 8},
    "opt": {"vocab_size": 200, "hidden_size": 32, "ffn_dim": 64, "num_hidden_layers": 2}
    | {"num_attention_heads": 4, "max_position_embeddings": 64, "word_embed_proj_dim": 32},
    "gpt_neox": {key: SIZES[key] for key in SIZES if key != "num_key_value_heads"},
    "deepseek_v2": {**SIZES, **LATENT},
    "deepseek_v3": {**SIZES, **LATENT},
    # Whose heads ask the trunk for its factor, and multiply by the key by which others divide.
    "falcon_h1": {**SIZES, "head_dim": 8, "lm_head_multiplier": 0.5, "mamba_d_ssm": 64}
    | {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8},
    "hyperclovax": {**SIZES, "logits_scaling": 0.5},
    "llama4_text": {**SIZES, "head_dim": 8, "num_local_experts": 4, "intermediate_size_mlp": 64},
    "gemma3": {
        "text_config": {**SIZES, "head_dim": 8},
        "vision_config": {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
        | {"num_attention_heads": 2, "image_size": 28, "patch_size": 14},
        "mm_tokens_per_image": 4,
    },
}


@pytest.mark.parametrize("kind", ACCEPTED)
def test_the_targets_of_a_model_are_those_of_its_own_logits_bit_for_bit(kind, tmp_path):
    """Some classes for all of them: experts, cross-attention, caps, wrapped decoders, nested configurations."""
    if kind not in transformers.CONFIG_MAPPING:
        pytest.skip(f"transformers {transformers.__version__} has no {kind}")
    config = transformers.CONFIG_MAPPING[kind](**ACCEPTED[kind])
    for part in (config, config.get_text_config(decoder=True)):
        part.pad_token_id = part.bos_token_id = part.eos_token_id = 0
    own = save_of(config, tmp_path)
    teacher = TeacherConfig(kind="hf", path=tmp_path, head_chunk_tokens=10_000)
    check_model_folder(teacher, vocab_size=150, seq_len=SEQ_LEN)
    engine = open_teacher_engine(teacher, vocab_size=150, seq_len=SEQ_LEN)
    given = torch.from_numpy(np.random.default_rng(0).integers(3, 150, (2, SEQ_LEN)))
    (chunk,) = engine.chunks(given)
    with torch.no_grad():
        expected = own(input_ids=given, use_cache=False).logits[..., :150]
    assert torch.equal(chunk.logits.view_as(expected), expected)


@pytest.mark.parametrize("kind", ["cpmant", "xlm", "bert"])
def test_what_is_no_causal_lm_with_a_plain_head_is_refused_for_its_reason(kind, tmp_path):
    from distill_pretrain.teacher.engines.known_head import require_known_head
    from distill_pretrain.teacher.engines.weights import meta_model

    config = transformers.CONFIG_MAPPING[kind](vocab_size=200)
    expected = {"bert": "layers between its trunk and its head"}.get(kind, "is not causal")
    with pytest.raises(DistillPretrainError, match=expected):
        require_known_head(tmp_path, meta_model(tmp_path, config))


def test_a_trunk_that_is_not_loaded_without_its_head_is_not_split(tmp_path):
    config = transformers.BartConfig(vocab_size=VOCAB_SIZE, d_model=16, max_position_embeddings=64)
    for part in ("encoder", "decoder"):
        for name, value in {"layers": 1, "attention_heads": 2, "ffn_dim": 16}.items():
            setattr(config, f"{part}_{name}", value)
    config.num_hidden_layers = 1
    save_of(config, tmp_path)
    with pytest.raises(DistillPretrainError, match=r"BartModel where BartForCausalLM has.*kind=hf"):
        open_with("split", tmp_path)


def test_a_quantised_head_is_refused_whole_and_in_part(model):
    from distill_pretrain.processes.process import process_group
    from distill_pretrain.teacher.engines.split_hf import SplitHFEngine

    teacher = TeacherConfig(kind="hf", path=model)
    sizes: dict[str, Any] = {"vocab_size": VOCAB_SIZE, "seq_len": SEQ_LEN}
    whole: Any = open_teacher_engine(teacher, **sizes)
    head = whole._model.get_output_embeddings()
    # As the libraries leave it that quantise a model.
    head.weight = torch.nn.Parameter(head.weight.to(torch.int8), requires_grad=False)
    with pytest.raises(DistillPretrainError, match=r"head is quantised.*found: int8"):
        next(whole.chunks(torch.zeros(1, SEQ_LEN, dtype=torch.int64)))
    change_weights(model, lambda t: t.update({"lm_head.weight": t["lm_head.weight"].char()}))
    with (
        process_group(),
        pytest.raises(DistillPretrainError, match=r"head is quantised.*found: int8"),
    ):
        SplitHFEngine(teacher, open_trunk=lambda *_: whole, splits_sequences=False, **sizes)


def in_fp8(folder: Path, out: Path, block: int) -> Path:
    """The same model in blocks of FP8, as DeepSeek-V3 is published; the folder itself keeps the rounded weights."""
    shutil.copytree(folder, out)
    quantised: Tensors = {}

    def round_all(tensors: Tensors) -> None:
        for name, weight in list(tensors.items()):
            if "_proj" not in name:
                quantised[name] = weight
                continue
            rows, columns = (-(-size // block) for size in weight.shape)
            padded = torch.zeros(rows * block, columns * block)
            padded[: weight.size(0), : weight.size(1)] = weight
            blocks = padded.view(rows, block, columns, block)
            scales = blocks.abs().amax((1, 3)) / 448
            small = (blocks / scales[:, None, :, None]).to(torch.float8_e4m3fn)
            cut = tuple(slice(0, size) for size in weight.shape)
            quantised[name] = small.view_as(padded)[cut].contiguous()
            quantised[f"{name}_scale_inv"] = scales
            back = (small.float() * scales[:, None, :, None]).view_as(padded)
            tensors[name] = back[cut].contiguous()

    change_weights(folder, round_all)
    safetensors.save_file(quantised, out / "model.safetensors", metadata={"format": "pt"})
    change_config(
        out,
        quantization_config={
            "quant_method": "fp8",
            "activation_scheme": "dynamic",
            "weight_block_size": [block, block],
        },
    )
    return out


def test_weights_in_fp8_are_dequantised_or_refused(model, tmp_path):
    """Cut blocks would be taken for smaller ones: 24 rows in 2 blocks of 16."""
    whole = in_fp8(model, tmp_path / "whole", 16)
    given = torch.arange(SEQ_LEN)[None]
    sizes: dict[str, Any] = {"vocab_size": VOCAB_SIZE, "seq_len": SEQ_LEN}
    expected = open_engine("hf", model, "fp32", **sizes).logits(given)
    found = open_engine("hf", whole, "fp32", **sizes).logits(given)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    cut = in_fp8(save_llama(tmp_path / "narrow", intermediate_size=24), tmp_path / "cut in fp8", 16)
    for kind in ("hf", "hf dry"):
        with pytest.raises(
            DistillPretrainError,
            match=r"(?s)FP8.*layers\.0\.mlp\.down_proj\.weight \[32, 24\], \[2, 2\] blocks.*in bf16",
        ):
            open_with(kind, cut)


def test_a_tokenizer_that_brings_code_is_refused_without_a_question(tmp_path, monkeypatch):
    from distill_pretrain.corpus.tokenizers import load_tokenizer

    monkeypatch.setattr(builtins, "input", lambda *_: pytest.fail("a question was asked"))
    auto_map = {"AutoTokenizer": ["own.OwnTokenizer", None]}
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "OwnTokenizer", "auto_map": auto_map})
    )
    (tmp_path / "own.py").write_text("raise SystemExit('the code of the folder ran')")
    with pytest.raises(DistillPretrainError, match=r"tokenizer cannot be loaded.*custom code"):
        load_tokenizer("hf", tmp_path)
