"""`distill-pretrain export`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from distill_pretrain.cli.console import say
from distill_pretrain.cli.recipe import Recipe
from distill_pretrain.errors import DistillPretrainError, TokenizerMismatch

if TYPE_CHECKING:
    from distill_pretrain.checkpoint.store import Checkpoint

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
    torchrun --nproc-per-node=4 -m distill_pretrain export runs/student exported --tensor 2 --pipeline 2 --dtype bf16
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of this verb."""
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


def run(recipe: Recipe | None, args: argparse.Namespace) -> None:
    """Exports a checkpoint."""
    from distill_pretrain.checkpoint.identity import trained_model
    from distill_pretrain.checkpoint.store import find_checkpoint

    checkpoint = find_checkpoint(Path(args.checkpoint))
    trained = trained_model(checkpoint.identity, checkpoint.folder)
    dtype = args.dtype or trained.precision
    tokenizer, eod_id = _tokenizer_of_run(checkpoint, required=args.tokenizer is None)
    if args.tokenizer is not None and args.tokenizer != "none":
        tokenizer, eod_id = _named_tokenizer(Path(args.tokenizer), trained.vocab_size)
    elif args.tokenizer == "none":
        tokenizer = None
    from distill_pretrain.checkpoint.hf.export import export_checkpoint
    from distill_pretrain.checkpoint.ownership import job_owning
    from distill_pretrain.files.ownership import owner_beside
    from distill_pretrain.processes.process import process_group, set_cpu_threads

    set_cpu_threads(0)
    folder = Path(args.folder)
    owner = owner_beside(folder)
    remedy = "wait for it, or name another folder"
    with process_group(), job_owning(owner, what=folder, remedy=remedy):
        export_checkpoint(
            checkpoint,
            folder,
            dtype=dtype,
            tensor=args.tensor,
            pipeline=args.pipeline,
            tokenizer=tokenizer,
            eod_id=eod_id,
        )
    say(f"step {checkpoint.step} of {args.checkpoint} is in {args.folder}, weights in {dtype}")


def _named_tokenizer(path: Path, vocab_size: int) -> tuple[Path, int]:
    """The tokenizer of --tokenizer and the id that ends its documents.

    Raises:
        ConfigError: there is none.
        TokenizerMismatch: it has ids that the model does not.
    """
    from distill_pretrain.corpus.tokenizers import load_tokenizer

    found = load_tokenizer("hf" if path.is_dir() else "sentencepiece", path)
    if found.vocab_size > vocab_size:
        raise TokenizerMismatch(
            "the tokenizer has ids that the model does not",
            where=f"--tokenizer {path}",
            found=f"{found.vocab_size:,} ids",
            expected=f"at most {vocab_size:,}, the model's vocabulary",
            remedy="name the tokenizer of the model's corpus, or --tokenizer none",
        )
    return path, found.eod_id


def _tokenizer_of_run(checkpoint: Checkpoint, *, required: bool) -> tuple[Path | None, int | None]:
    """Tokenizer and end-of-document id of the tokens that a run was trained on, where they are still there.

    Args:
        checkpoint: in its run folder, or copied elsewhere.
        required: raise where the tokens have been made again with another tokenizer, rather than leave it out.

    Raises:
        TokenizerMismatch: the tokens are no longer those of the run.
    """
    from distill_pretrain.config import load_recipe
    from distill_pretrain.corpus.tokens_record import TokensRecord

    path = checkpoint.folder.parent.parent / "recipe.yaml"
    try:
        data = load_recipe(Recipe, path).data if path.is_file() else None
        record = None if data is None else TokensRecord.beside(data.tokens)
    except DistillPretrainError as error:
        say(f"no tokenizer: {error}")
        return None, None
    if data is None or record is None:
        if required:
            say("no tokenizer: the run's tokens have no tokens.json; name one with --tokenizer")
        return None, None
    expected, found = checkpoint.identity.get("tokenizer_sha256"), record.tokenizer_digests
    if expected is not None and expected not in found:
        if not required:
            return None, None
        raise TokenizerMismatch(
            "the tokens of the run were made again with another tokenizer",
            where=data.tokens.parent,
            found=f"tokenizer {found[0][:12]}",
            expected=f"{expected[:12]}, recorded in the checkpoint",
            remedy="name the right one with --tokenizer, or --tokenizer none",
        )
    return data.tokens.parent / record.tokenizer["file"], record.eod_id
