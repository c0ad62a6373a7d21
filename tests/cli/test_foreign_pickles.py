"""No file of a cache, and no weights of a model's folder, run code when they are read."""

from __future__ import annotations

import io
import os
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from distill_pretrain.cli.main import main


class Evil:
    """Unpickled, it leaves a mark."""

    def __init__(self, mark: Path) -> None:
        self.mark = str(mark)

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (self.mark,)


def crafted(mark: Path) -> list[bytes]:
    zipped = io.BytesIO()
    torch.save({"x": Evil(mark)}, zipped)
    return [pickle.dumps(Evil(mark)), zipped.getvalue()]


def test_no_file_of_a_cache_runs_code(small_cache, tmp_path, capsys):
    mark = tmp_path / "mark"
    names = sorted(p.name for p in small_cache.folder.iterdir())
    assert {"plan.json", "manifest.json"} < set(names)
    for content in crafted(mark):
        for name in names:
            copy = tmp_path / "copy"
            shutil.rmtree(copy, ignore_errors=True)
            shutil.copytree(small_cache.folder, copy)
            (copy / name).write_bytes(content)
            status = main(["verify", str(copy)])
            assert "Traceback" not in capsys.readouterr().err, name
            assert status == 2, name
            assert not mark.exists(), name


def test_no_weights_of_a_models_folder_run_code(tmp_path):
    transformers = pytest.importorskip("transformers")
    from distill_pretrain.errors import DistillPretrainError
    from distill_pretrain.teacher.engines.hf import HFEngine

    mark, folder = tmp_path / "mark", tmp_path / "model"
    config = transformers.LlamaConfig(
        vocab_size=50,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    (folder / "model.safetensors").rename(tmp_path / "sound")
    for name in ("pytorch_model.bin", "model.safetensors"):
        for content in crafted(mark):
            (folder / name).write_bytes(content)
            with pytest.raises(DistillPretrainError):
                HFEngine(folder, "fp32", vocab_size=50, seq_len=8)
            assert not mark.exists(), name
        (folder / name).unlink()
