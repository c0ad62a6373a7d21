"""Folders that nest a text model beside a vision model: the text model's targets, and nothing read of the rest."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from distill_pretrain.errors import DistillPretrainError
from distill_pretrain.processes.process import process_group
from distill_pretrain.teacher.config import TeacherConfig
from distill_pretrain.teacher.engines import check_model_folder, open_teacher_engine
from tests.support.distributed import run_distributed

transformers = pytest.importorskip("transformers")
safetensors = pytest.importorskip("safetensors.torch")

VOCAB_SIZE, SEQ_LEN = 150, 40  # of 200 ids: the rest is padding
TEXT: dict[str, Any] = {
    "vocab_size": 200,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "head_dim": 8,
    "pad_token_id": 0,
}
EYES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
QWEN_EYES: dict[str, Any] = {
    "depth": 1,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_heads": 2,
    "out_hidden_size": 32,
    "patch_size": 4,
    "spatial_merge_size": 1,
    "temporal_patch_size": 1,
    "num_position_embeddings": 16,
    "deepstack_visual_indexes": [],
}
CAPPED = {**TEXT, "final_logit_softcapping": 1.0}
GEMMA4 = {"num_global_key_value_heads": 2, "global_head_dim": 8, "hidden_size_per_layer_input": 0}
GEMMA4 |= {"layer_types": ["sliding_attention", "full_attention"], "num_kv_shared_layers": 0}
DELTA = {f"linear_{name}": 2 for name in ("num_value_heads", "num_key_heads")}
DELTA |= {f"linear_{name}_head_dim": 8 for name in ("key", "value")}
KINDS: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "gemma3": (CAPPED, EYES, {}),
    "gemma4": ({**CAPPED, **GEMMA4}, {**EYES, "head_dim": 16, "global_head_dim": 16}, {}),
    "llama4": (
        {**TEXT, "num_local_experts": 2, "intermediate_size_mlp": 64, "num_experts_per_tok": 1},
        {**EYES, "vision_output_dim": 32, "projector_input_dim": 32, "projector_output_dim": 32},
        {},
    ),
    "mistral3": (
        {**TEXT, "model_type": "ministral3"},
        {**EYES, "model_type": "pixtral"},
        {"tie_word_embeddings": False},
    ),
    "qwen3_5": (
        {**TEXT, **DELTA, "layer_types": ["linear_attention", "full_attention"]},
        QWEN_EYES,
        {},
    ),
    "qwen3_vl": (TEXT, QWEN_EYES, {}),
}
OLD_NAMES = {
    "model.language_model.": "language_model.model.",
    "lm_head.": "language_model.lm_head.",
}


def given() -> torch.Tensor:
    return torch.randint(3, VOCAB_SIZE, (2, SEQ_LEN), generator=torch.Generator().manual_seed(0))


def nested(kind: str) -> Any:
    """A random model with its vision part."""
    if kind not in transformers.CONFIG_MAPPING:
        pytest.skip(f"transformers {transformers.__version__} has no {kind}")
    text, eyes, more = KINDS[kind]
    config = transformers.CONFIG_MAPPING[kind](text_config=text, vision_config=eyes, **more)
    whole = transformers.AutoModelForImageTextToText._model_mapping[type(config)]
    torch.manual_seed(0)
    model = whole(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(3)
    return model


def text_model_of(model: Any) -> Any | None:
    """The text model in its own class, by its own names; None where transformers has none with a head."""
    text = model.config.get_text_config(decoder=True)
    alone_class = transformers.AutoModelForCausalLM
    if type(text) not in alone_class._model_mapping:
        return None
    alone = alone_class.from_config(text).eval()
    inner = next(m for n, m in model.named_modules() if n.endswith("language_model"))
    if hasattr(inner, "lm_head"):
        alone.load_state_dict(inner.state_dict())
    else:
        alone.model.load_state_dict(inner.state_dict())
        alone.lm_head.load_state_dict(model.lm_head.state_dict())
    return alone


def change_files(folder: Path, change: Any) -> None:
    file = folder / "model.safetensors"
    tensors = change({name: t.clone() for name, t in safetensors.load_file(file).items()})
    safetensors.save_file(tensors, file, metadata={"format": "pt"})


def without_eyes(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Vision tensors that no model could load."""
    seeing = ("vis", "multi_modal", "embed_vision")
    return {n: t.new_zeros(1) if any(s in n for s in seeing) else t for n, t in tensors.items()}


def with_old_names(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    found = {}
    for name, tensor in tensors.items():
        for new, old in OLD_NAMES.items():
            if name.startswith(new):
                name = old + name.removeprefix(new)
                break
        found[name] = tensor
    return found


def logits_of(folder: Path) -> torch.Tensor:
    teacher = TeacherConfig(kind="hf", path=folder, head_chunk_tokens=10_000)
    check_model_folder(teacher, vocab_size=VOCAB_SIZE, seq_len=SEQ_LEN)
    engine: Any = open_teacher_engine(teacher, vocab_size=VOCAB_SIZE, seq_len=SEQ_LEN)
    assert not any("vis" in name for name, _ in engine._model.named_parameters())
    (chunk,) = engine.chunks(given())
    logits: torch.Tensor = chunk.logits.view(2, SEQ_LEN, VOCAB_SIZE)
    assert torch.equal(engine.logits(given()), logits)
    return logits


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_the_targets_are_the_text_models_own_and_the_rest_is_not_read(kind, tmp_path):
    model = nested(kind)
    model.save_pretrained(tmp_path / "nested")
    change_files(tmp_path / "nested", without_eyes)
    found = logits_of(tmp_path / "nested")
    alone = text_model_of(model)
    if alone is None:
        assert torch.equal(found, model(input_ids=given()).logits[..., :VOCAB_SIZE])
    else:
        assert torch.equal(found, alone(input_ids=given()).logits[..., :VOCAB_SIZE])
        alone.save_pretrained(tmp_path / "alone")
        assert torch.equal(logits_of(tmp_path / "alone"), found)
    if KINDS[kind][0].get("final_logit_softcapping"):
        assert 0.5 < found.abs().max() < 1, "capped at 1"
    for change in (with_old_names, with_old_names):
        change_files(tmp_path / "nested", change)
        assert torch.equal(logits_of(tmp_path / "nested"), found)


def test_tensors_of_the_text_model_are_missed_and_spare_ones_named(tmp_path):
    nested("gemma3").save_pretrained(tmp_path)

    def wrong(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        name = next(n for n in tensors if n.endswith("layers.1.mlp.up_proj.weight"))
        tensors[name.replace("layers.1", "layers.2")] = tensors.pop(name)
        return tensors

    change_files(tmp_path, wrong)
    with pytest.raises(DistillPretrainError) as error:
        logits_of(tmp_path)
    assert "model.layers.1.mlp.up_proj.weight is missing" in str(error.value)
    assert "layers.2.mlp.up_proj.weight is not of this model" in str(error.value)


def test_a_head_is_tied_where_config_json_says_so_or_where_there_is_none(tmp_path):
    model = nested("mistral3")
    model.save_pretrained(tmp_path)
    untied = logits_of(tmp_path)
    file = tmp_path / "config.json"
    raw = json.loads(file.read_text())
    for part in (raw, raw["text_config"]):
        part.pop("tie_word_embeddings", None)
    file.write_text(json.dumps(raw))
    assert torch.equal(logits_of(tmp_path), untied)
    file.write_text(json.dumps({**raw, "tie_word_embeddings": True}))
    with pytest.raises(DistillPretrainError, match="differ, though config"):
        logits_of(tmp_path)
    change_files(tmp_path, lambda tensors: {n: t for n, t in tensors.items() if "lm_head" not in n})
    for config in ({**raw, "tie_word_embeddings": True}, raw):
        file.write_text(json.dumps(config))
        assert not torch.allclose(logits_of(tmp_path), untied)
    file.write_text(json.dumps({**raw, "tie_word_embeddings": False}))
    with pytest.raises(DistillPretrainError, match=r"lm_head\.weight is missing.*tie_word_embeddi"):
        logits_of(tmp_path)


def test_kind_megatron_reads_the_text_model_and_prune_writes_it_alone(tmp_path):
    from distill_pretrain.mcore.model.config import ParallelConfig
    from distill_pretrain.mcore.runtime.parallel import model_parallel
    from distill_pretrain.pruning.folder import Source
    from distill_pretrain.teacher.engines import open_engine

    nested("mistral3").save_pretrained(tmp_path)
    change_files(tmp_path, without_eyes)
    expected = logits_of(tmp_path)
    sizes = {"vocab_size": VOCAB_SIZE, "seq_len": SEQ_LEN}
    for change in (dict, with_old_names):
        change_files(tmp_path, change)
        check_model_folder(TeacherConfig(kind="megatron", path=tmp_path), **sizes)
        with process_group(), model_parallel(ParallelConfig(), seed=0):
            engine = open_engine("megatron", tmp_path, "fp32", **sizes)
            torch.testing.assert_close(engine.logits(given()), expected, rtol=0, atol=1e-5)
    source = Source.open(tmp_path)
    assert source.config["architectures"] == ["Ministral3ForCausalLM"]
    assert source.config["model_type"] == "ministral3" and "vision_config" not in source.config
    change_files(
        tmp_path, lambda tensors: {n: t for n, t in tensors.items() if "layers.1.mlp" not in n}
    )
    with pytest.raises(
        DistillPretrainError, match=r"model\.layers\.1\.mlp\.up_proj\.weight is missing"
    ):
        check_model_folder(TeacherConfig(kind="megatron", path=tmp_path), **sizes)


def split_logits(folder: str, kinds: list[str]) -> dict[str, list[Any]]:
    """This rank's columns of each folder's logits, of two ranks that hold the teacher together."""
    torch.set_num_threads(1)
    found = {}
    with process_group():
        for kind in kinds:
            for way in ({"fsdp": 2}, {"tensor": 2}):
                teacher = TeacherConfig(kind="hf", path=Path(folder, kind), **way)
                engine = open_teacher_engine(teacher, vocab_size=VOCAB_SIZE, seq_len=SEQ_LEN)
                (chunk,) = engine.chunks(given())
                parts: list[Any] = [None, None]
                dist.all_gather_object(parts, chunk.logits)
                found[f"{kind} {next(iter(way))}"] = torch.cat(parts, -1).tolist()
    return found


def test_two_processes_hold_the_text_model_together(tmp_path):
    kinds = ["gemma3", "mistral3"]
    for kind in kinds:
        nested(kind).save_pretrained(tmp_path / kind)
        change_files(tmp_path / kind, without_eyes)
    found = run_distributed(split_logits, 2, folder=str(tmp_path), kinds=kinds)
    assert len(found) == 4
    for name, logits in found.items():
        expected = logits_of(tmp_path / name.split()[0]).flatten(0, 1)
        torch.testing.assert_close(torch.tensor(logits), expected, rtol=0, atol=1e-5)
