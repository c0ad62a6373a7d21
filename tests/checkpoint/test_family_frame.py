"""A family is one file: adding it touches nothing else, and the table of the pages is made from the files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from distill_pretrain.checkpoint.hf import families as modules
from distill_pretrain.checkpoint.hf import hf_config, read_hf_model, registry
from distill_pretrain.errors import CheckpointError
from distill_pretrain.mcore.model.config import ModelConfig
from tools import docs_site

SIZES = {
    "vocab_size": 100,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
NEW = '''"""A family that nobody knows."""

from distill_pretrain.checkpoint.hf.llama_like import llama_like

FAMILIES = (
    llama_like(
        model_type="newest",
        title="Newest",
        architecture="NewestForCausalLM",
        defaults={"head_dim": 16},
        keys={"newness": 1},
        always=frozenset({"qkv_bias", "qk_norm"}),
        section=lambda raw: {"qkv_bias": True, "qk_norm": True},
    ),
)
'''


@pytest.fixture
def newest(tmp_path, monkeypatch):
    """One more file among the families."""
    (tmp_path / "newest.py").write_text(NEW)
    monkeypatch.setattr(modules, "__path__", [*modules.__path__, str(tmp_path)])
    registry._everything.cache_clear()
    yield
    registry._everything.cache_clear()


def write_config(folder: Path, **raw: object) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps({**SIZES, **raw}))
    return folder


def test_a_file_more_is_a_family_more(newest, tmp_path):
    found = read_hf_model(write_config(tmp_path / "model", model_type="newest"))
    assert (found.family, found.model.kv_channels, found.model.qk_norm) == ("newest", 16, True)
    written = hf_config(found.model, vocab_size=100, max_positions=64, dtype="fp32")
    assert written["architectures"] == ["NewestForCausalLM"] and written["newness"] == 1
    assert "| Newest | `newest` | yes: `NewestForCausalLM` | yes | yes |" in (
        docs_site.families_table()
    )


def test_a_model_of_no_family_is_refused_by_its_pieces(tmp_path):
    with pytest.raises(CheckpointError, match="newest is not supported"):
        read_hf_model(write_config(tmp_path / "model", model_type="newest"))
    model = ModelConfig(
        num_layers=1,
        hidden_size=8,
        ffn_hidden_size=8,
        num_attention_heads=2,
        qkv_bias=True,
        qk_norm=True,
    )
    with pytest.raises(CheckpointError, match=r"qkv_bias, model\.qk_norm.*qwen2 \(qkv_bias\)"):
        hf_config(model, vocab_size=9, max_positions=9, dtype="fp32")


@pytest.mark.parametrize("model_type", registry.teachers_only())
def test_a_teacher_alone_is_refused_with_what_a_student_would_need(model_type, tmp_path):
    folder = write_config(tmp_path / "model", model_type=model_type)
    reason = registry.teachers_only()[model_type].reason
    with pytest.raises(CheckpointError, match=f"{model_type} is not supported: {reason}") as error:
        read_hf_model(folder)
    assert "teacher.kind=hf" in str(error.value)


def test_the_table_of_the_page_is_what_the_code_says():
    for page in docs_site.IN_PAGES:
        written = (docs_site.DOCS / page).read_text(encoding="utf-8")
        assert written == docs_site.with_parts(page), "run python -m tools.docs_site"
