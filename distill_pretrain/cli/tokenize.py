"""`distill-pretrain tokenize`."""

from __future__ import annotations

import argparse

from distill_pretrain.config import require
from distill_pretrain.jobs.console import progress, say
from distill_pretrain.jobs.recipe import Recipe
from distill_pretrain.processes.env import launch_rank

SECTIONS = ("corpus", "tokenizer")

HELP = """
Turns raw text into the token files that everything else reads.

Reads   corpus.paths: text files (one document each), JSONL files (one document a line, under corpus.text_key),
        Parquet files (one document a row, in the column corpus.text_key), folders of these, or folders that Hugging
        Face's Dataset.save_to_disk wrote. Text and JSONL may be packed with gzip or zstd, which is seen in their
        contents; any of these may be a URL (s3://, gs://, https:// and what else fsspec reaches). Text is UTF-8.
        Parquet, datasets and zstd need the extra `corpora`.
Writes  corpus.output_dir, complete or not at all:
          train.bin/.idx, held_out.bin/.idx   tokens in Megatron's format, each document closed by an
                                              end-of-document token
          train.loss, held_out.loss           what the loss leaves out of them, where corpus.masked_key or
                                              corpus.weight_key names keys of the JSON lines that say so
          tokenizer.model or tokenizer/       the tokenizer: the one given, or one trained on this corpus
          tokens.json, sources.json           fingerprints of all of these, and of what was read
          recipe.yaml                         the settings that made it

A .json file whose first line is an object with corpus.text_key is read as JSONL. Linked folders are searched too,
each once. Packed files and those behind URLs are read by one process, which hands their text to corpus.workers others.

Running it again with the same recipe does nothing; with another recipe, or a corpus of other contents, it refuses to
overwrite.

Example
  distill-pretrain tokenize recipe.yaml corpus.paths=[texts/] corpus.output_dir=runs/tokens

  with recipe.yaml:
    corpus:
      paths: [texts/, more.jsonl]
      output_dir: runs/tokens
    tokenizer:
      vocab_size: 8192
"""


def run(recipe: Recipe, args: argparse.Namespace) -> None:
    """Tokenise the corpus; one process does it, with its own worker processes."""
    require(recipe, "tokenize", "corpus")
    if launch_rank() != 0:
        return
    from distill_pretrain.corpus.build import tokenize_corpus

    assert recipe.corpus is not None
    with progress(None, "tokenising", unit="bytes") as bar:

        def on_progress(done: int, total: int, documents: int) -> None:
            bar.reach(done, total, documents=f"{documents:,}")

        result = tokenize_corpus(recipe.corpus, recipe.tokenizer, on_progress=on_progress)
    if result.already_done:
        say("already done:", result.output_dir)
    skipped = result.sources
    if skipped.num_empty:
        say(f"left out {skipped.num_empty:,} empty files")
    if skipped.num_repeated:
        say(f"left out {skipped.num_repeated:,} files that corpus.paths names more than once")
    if skipped.left_out:
        kinds = ", ".join(f"{count:,} {kind}" for kind, count in skipped.left_out.most_common(8))
        more = ", ..." if len(skipped.left_out) > 8 else ""
        say(f"left out files that corpus.include does not match: {kinds}{more}")
    lines = sum(file.holds_json_lines for file in skipped.files)
    plain = sum(file.suffix == ".json" for file in skipped.files) - lines
    if lines:
        say(f"{lines:,} .json files hold JSON lines: every line is a document")
    if plain:
        say(f"{plain:,} .json files are read as text: every file is a document")
    for name, documents in result.num_documents.items():
        say(f"{name}: {documents:,} documents, {result.num_tokens[name]:,} tokens")
    say("tokens are in", result.output_dir)
