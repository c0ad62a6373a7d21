"""`distill-pretrain export`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from distill_pretrain.jobs.recipe import Recipe


SECTIONS = ()

HELP = """
Writes a trained model as a Hugging Face folder that transformers, vLLM and the like load without code of this project:
safetensors without padding, config.json, generation_config.json and the tokenizer.

Reads   RUN_OR_CHECKPOINT: a run folder (its newest checkpoint) or a folder checkpoints/step-*
Writes  FOLDER, whole or not at all; one that exists is replaced only if it is an export of the same step of the run

arch llama becomes LlamaForCausalLM, Qwen2ForCausalLM (qkv_bias) or Qwen3ForCausalLM (qk_norm); gpt2 becomes
GPT2LMHeadModel with the exact GELU. Scaled branches (model.init) are multiplied into the weights that write them.
--dtype fp32 takes the optimizer's fp32 weights of a bf16 run. The tokenizer is that of the run's data.tokens; a
sentencepiece model becomes tokenizer.json. Beside a Qwen2 model AutoTokenizer builds Qwen2's own tokenizer whatever the
files say: another one goes into FOLDER/tokenizer, to be loaded from there.

A model that one process cannot hold is exported by several, under any layout:

    distill-pretrain export runs/student exported
    distill-pretrain export runs/student averaged --weights ema
    torchrun --nproc-per-node=4 -m distill_pretrain export runs/student exported --tensor 2 --pipeline 2 --dtype bf16
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of this verb."""
    parser.add_argument(
        "checkpoint", metavar="RUN_OR_CHECKPOINT", help="run folder or checkpoint folder"
    )
    parser.add_argument("folder", metavar="FOLDER", help="to be written")
    parser.add_argument(
        "--dtype",
        choices=("fp32", "bf16"),
        help="of the weights (default: the precision of the training run)",
    )
    parser.add_argument(
        "--tokenizer",
        metavar="PATH",
        help="folder of a Hugging Face tokenizer, sentencepiece model file, or `none` to leave it out "
        "(default: the one that made the run's data.tokens)",
    )
    parser.add_argument("--tensor", type=int, default=1, metavar="N", help="tensor-parallel size")
    parser.add_argument(
        "--pipeline", type=int, default=1, metavar="N", help="pipeline-parallel size"
    )
    parser.add_argument(
        "--weights",
        choices=("last", "ema"),
        default="last",
        help="the last weights, or their moving average (optimizer.ema_decay)",
    )
    parser.add_argument(
        "--mean-of",
        type=int,
        default=1,
        metavar="N",
        help="the mean of the last weights of the newest N checkpoints of a run folder",
    )


def run(recipe: Recipe | None, args: argparse.Namespace) -> None:
    """Exports a checkpoint."""
    from distill_pretrain.jobs.export import export

    export(
        Path(args.checkpoint),
        Path(args.folder),
        dtype=args.dtype,
        tokenizer=args.tokenizer,
        tensor=args.tensor,
        pipeline=args.pipeline,
        weights=args.weights,
        mean_of=args.mean_of,
    )
