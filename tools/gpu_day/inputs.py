"""Writes to $WORK what the jobs of a call read: a corpus of bytes, an untrained Hugging Face teacher, two recipes.

The corpus is the source of Python's standard library as bytes, in a vocabulary as large as a real tokenizer's; the
teacher's weights are random. Speed and memory are those of a real capture and a real training; what is learned is not.
"""

from __future__ import annotations

import os
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import yaml
from figures import is_tiny, record

from distill_pretrain.corpus.token_writer import TokenIndexWriter

FULL = {
    "vocab_size": 128_256,
    "seq_len": 1024,
    "num_sequences": 1024,
    "steps": 40,
    "micro_batch_size": 4,
    "global_batch_size": 16,
    "precision": "bf16",
    "teacher": {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 16},
    "student": {"num_layers": 24, "hidden_size": 1024, "ffn_hidden_size": 2816},
    "heads": (16, 8),
}
"""A student of 0.41 billion parameters, as launch/recipes/cluster/model_300m.yaml; a teacher of 0.37 billion."""

TINY = {
    "vocab_size": 300,
    "seq_len": 32,
    "num_sequences": 32,
    "steps": 3,
    "micro_batch_size": 2,
    "global_batch_size": 4,
    "precision": "fp32",
    "teacher": {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1},
    "student": {"num_layers": 1, "hidden_size": 32, "ffn_hidden_size": 64},
    "heads": (4, 2),
}


def documents(num_tokens: int) -> Iterator[npt.NDArray[np.int64]]:
    """Files of the standard library as bytes, until there are tokens enough."""
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        if text := path.read_bytes()[:num_tokens]:
            yield np.frombuffer(text, np.uint8).astype(np.int64)
            num_tokens -= len(text)
    assert num_tokens == 0, f"the standard library is {num_tokens} bytes too short"


def write_corpus(prefix: Path, size: dict[str, Any]) -> None:
    with TokenIndexWriter(prefix, size["vocab_size"]) as writer:
        for document in documents(num_tokens(size)):
            writer.add_document(document)


def num_tokens(size: dict[str, Any]) -> int:
    """Of the corpus: a sequence more than is used."""
    wanted: int = (size["num_sequences"] + 1) * (size["seq_len"] + 1)
    return wanted


def write_teacher(folder: Path, size: dict[str, Any]) -> int:
    """An untrained Llama; the number of its parameters."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    heads, groups = size["heads"]
    config = LlamaConfig(
        **size["teacher"],
        vocab_size=size["vocab_size"],
        num_attention_heads=heads,
        num_key_value_heads=groups,
        max_position_embeddings=size["seq_len"],
        tie_word_embeddings=True,
    )
    model = LlamaForCausalLM(config).to(torch.bfloat16)
    model.save_pretrained(folder)
    return sum(parameter.numel() for parameter in model.parameters())


def recipes(work: Path, size: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Of the capture, and of the student that reads its cache."""
    heads, groups = size["heads"]
    is_bf16 = size["precision"] == "bf16"
    data = {
        "tokens": str(work / "tokens"),
        "vocab_size": size["vocab_size"],
        "seq_len": size["seq_len"],
        "num_sequences": size["num_sequences"],
    }
    capture = {
        "data": data,
        "teacher": {
            "kind": "hf",
            "path": str(work / "teacher"),
            "dtype": "bf16" if is_bf16 else "fp32",
        },
        # An untrained teacher is what the gate is there to refuse.
        "capture": {
            "output_dir": str(work / "cache"),
            "micro_batch_size": 8,
            "shard_sequences": 128,
            "sanity_gate": "warn",
            "threads": min(8, os.cpu_count() or 1),
        },
    }
    student = {
        "data": {**data, "cache": str(work / "cache"), "canary": "warn"},
        "model": {
            **size["student"],
            "num_attention_heads": heads,
            "num_query_groups": groups,
            "tie_embeddings": True,
        },
        "optimizer": {"lr": 4.0e-4, "warmup_steps": 2},
        "objective": {"ce_weight": 0.3, "kd_weight": 0.7},
        "train": {
            "output_dir": str(work / "student"),
            "steps": size["steps"],
            "micro_batch_size": size["micro_batch_size"],
            "global_batch_size": size["global_batch_size"],
            "precision": size["precision"],
            "log_interval": 5,
            "checkpoint_interval": size["steps"],
        },
    }
    return {"capture": capture, "student": student}


def main() -> None:
    work, size = Path(os.environ["WORK"]), TINY if is_tiny() else FULL
    write_corpus(work / "tokens", size)
    for name, recipe in recipes(work, size).items():
        (work / f"{name}.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))
    parameters = write_teacher(work / "teacher", size)
    shape = {"vocab_size": size["vocab_size"], "seq_len": size["seq_len"]}
    record("inputs", teacher_parameters=parameters, **shape)


if __name__ == "__main__":
    main()
