"""`distill-pretrain prune`."""

from __future__ import annotations

import argparse

from distill_pretrain.jobs.recipe import Recipe

SECTIONS = ("data", "prune")

HELP = """
Makes smaller models of a trained one: whole layers go, or heads, feed-forward channels and channels of the residual
stream, those that matter least on a sample of the corpus. The result is a Hugging Face folder of the same family, for
`train.start_from`, with the tokenizer that lies beside the source.

Reads   prune.source (a Hugging Face folder of llama, mistral, qwen2 or qwen3, or a run or checkpoint), data.tokens, and
        data.held_out_tokens for the losses in the report
Writes  prune.output_dir/TARGET/ for every target, whole or not at all, with prune.json: where it came from and what it
        kept; prune.output_dir/report.md, scores.png (with matplotlib) and scores.json

All targets are cut by the scores of one pass. Sizes that a target does not give stay; with `parameters` they are
searched for: what each costs alone is measured, then the best combinations are. The losses are those before any
training. One process does it, on a GPU where there is one; the model must fit in its memory.

Example
  distill-pretrain prune recipe.yaml
  distill-pretrain prune recipe.yaml --to-parameters 70M
  distill-pretrain train student.yaml train.start_from=runs/pruned/half_depth model.num_layers=15

  with recipe.yaml:
    data: {tokens: runs/tokens/train, held_out_tokens: runs/tokens/held_out, seq_len: 512}
    prune:
      source: models/SmolLM2-135M
      output_dir: runs/pruned
      targets:
        half_depth: {num_layers: 15}
        narrow: {hidden_size: 384, ffn_hidden_size: 1024}
        half: {parameters: 70M}
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of this verb."""
    parser.add_argument(
        "--to-parameters",
        action="append",
        default=[],
        metavar="N",
        help="one more target, named N: search for a shape with at most so many parameters, such as 70M",
    )


def run(recipe: Recipe, args: argparse.Namespace) -> None:
    """Prunes the model of a recipe."""
    from distill_pretrain.jobs.prune import prune

    prune(recipe, to_parameters=args.to_parameters)
