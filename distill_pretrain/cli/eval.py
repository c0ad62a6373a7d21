"""`distill-pretrain eval`."""

from __future__ import annotations

import argparse

from distill_pretrain.cli.eval_table import print_table
from distill_pretrain.jobs.console import say
from distill_pretrain.jobs.recipe import Recipe

SECTIONS = ("data", "eval", "teacher")

HELP = """
Scores trained models on held-out text: cross-entropy, perplexity, top-1 accuracy and its calibration; with a teacher
also KL(teacher || model) over the whole vocabulary, how often both find the same token likeliest, and how many of the
model's drafts the teacher would accept in speculative decoding.

Reads   data.held_out_tokens (.bin/.idx), eval.models (run or checkpoint folders), teacher.path if there is a teacher
Writes  eval.output (JSON), and eval.output.recipe.yaml: the settings that made it

The teacher is scored too, under the name `teacher`. Under torchrun the sequences are divided among the processes; the
figures are the same. Logits are made by eval.head_chunk_tokens positions at a time. Models too large for one device are
in parts over eval.tensor x eval.pipeline processes, whatever they were trained with, and a teacher as its section says;
`distill-pretrain plan` foresees the memory. Figures that eval.output already holds for the same models on the same
sequences are kept.

On request also:
  eval.out_of_domain_tokens   the same figures on a second held-out corpus, of the same tokenizer
  eval.copying    cross-entropy on random ids of the held-out text when they come a second time in a sequence, beside
                  that on their first time: how well models copy from context ({} takes the defaults)
  eval.cache      scores against a cache of the held-out text, without the teacher; make it with
                  `distill-pretrain capture recipe.yaml data.tokens=HELD_OUT data.cache=null capture.output_dir=...`.
                  cross_entropy_cache estimates the teacher's CE without bias where targets are sampled; kl_cache is
                  too high by one amount for all models, since the entropy of a sample is below the teacher's
  eval.gradients  angle and size of the gradient under cached targets, against that under the teacher's whole
                  distribution, over more and more micro-batches of data.tokens
  eval.tasks      zero-shot tasks of lm-evaluation-harness (pip install 'distill-pretrain[tasks]')

Example
  distill-pretrain eval recipe.yaml
  torchrun --nproc-per-node=2 -m distill_pretrain eval recipe.yaml

  with recipe.yaml:
    data: {tokens: runs/tokens/train, held_out_tokens: runs/tokens/held_out, seq_len: 256}
    teacher: {path: runs/teacher}
    eval:
      models: {ce: runs/ce, kd: runs/kd}
      output: runs/eval.json
      out_of_domain_tokens: runs/tokens_code/train
      copying: {num_sequences: 64}
      gradients: {model: runs/ce, caches: {systematic: runs/cache, top12: runs/cache_top12}}
      tasks: [piqa, my_tasks/colours.yaml]
"""


def run(recipe: Recipe, args: argparse.Namespace) -> None:
    """Scores the models of a recipe."""
    from distill_pretrain.jobs.evaluate import evaluate_models

    results = evaluate_models(recipe)
    assert recipe.eval
    print_table(results)
    say("figures are in", recipe.eval.output)
