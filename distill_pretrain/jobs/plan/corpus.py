"""A corpus as the planner sees it, from a recipe: sizes, and what becomes of its documents. No token is read."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from distill_pretrain.errors import ConfigError, TokenDataError
from distill_pretrain.jobs.recipe import Recipe
from distill_pretrain.planning.figures import Figure, Part

if TYPE_CHECKING:
    from distill_pretrain.corpus.sequence_plan import PlanShares, SequencePlan
    from distill_pretrain.data.config import DataConfig


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """What of a corpus decides the sizes of a job.

    Attributes:
        vocab_size: V.
        seq_len: L.
        num_sequences: that the recipe uses.
        shares: padding and cut documents; None where the corpus is not here.
    """

    vocab_size: int
    seq_len: int
    num_sequences: int
    shares: PlanShares | None = None


def plan_of(data: DataConfig) -> SequencePlan | None:
    """Open the sequences of the corpus, of which no token is read; None where it is not here."""
    from distill_pretrain.corpus.sequence_plan import SequencePlan
    from distill_pretrain.corpus.token_index import TokenIndex

    try:
        index = TokenIndex.open(data.tokens)
        return SequencePlan(index, seq_len=data.seq_len, seed=data.seed, packing=data.packing)
    except TokenDataError:  # nor is a short one, or part of one, what the recipe is for
        return None


def corpus_of(
    recipe: Recipe, open_plan: Callable[[DataConfig], SequencePlan | None] = plan_of
) -> Corpus:
    """Take the corpus's sizes from the section data, or from tokens.json beside the corpus.

    Args:
        recipe: with data.
        open_plan: gives the sequences of the corpus.

    Raises:
        ConfigError: neither says them.
    """
    assert recipe.data
    vocab_size, num_sequences = recipe.data.vocab_size, recipe.data.num_sequences
    plan = open_plan(recipe.data)
    if vocab_size is None or num_sequences is None:
        from distill_pretrain.corpus.tokens_record import TokensRecord

        tokens = recipe.data.tokens
        record = TokensRecord.beside(tokens)
        counts = record.corpora.get(tokens.name) if record else None
        if vocab_size is None and record is not None:
            vocab_size = record.vocab_size
        if num_sequences is None and plan is not None:
            num_sequences = plan.num_sequences
        if num_sequences is None and counts is not None:
            num_sequences = -(-int(counts["num_tokens"]) // recipe.data.seq_len)
    sizes = {"data.vocab_size": vocab_size, "data.num_sequences": num_sequences}
    unknown = [key for key, value in sizes.items() if value is None]
    if vocab_size is None or num_sequences is None:
        raise ConfigError(
            "the size of the corpus is unknown",
            where=", ".join(unknown),
            expected=f"numbers, or tokens.json beside {recipe.data.tokens}",
            remedy="set them: corpus tokens / data.seq_len is the number of sequences",
        )
    return Corpus(
        vocab_size=vocab_size,
        seq_len=recipe.data.seq_len,
        num_sequences=num_sequences,
        shares=None if plan is None else plan.shares,
    )


def corpus_part(corpus: Corpus) -> Part:
    """Show what becomes of the documents of a corpus that is here."""
    assert corpus.shares
    padding, cut, longer = (
        f"{share:.2%}" for share in (corpus.shares.padding, corpus.shares.cut, corpus.shares.longer)
    )
    how = "data.packing, data.seq_len and the lengths of the documents"
    return Part(
        title="Sequences",
        figures=[
            Figure(name="padding", value=padding, basis="exact", how=f"of positions; {how}"),
            Figure(name="documents cut", value=cut, basis="exact", how="in more than one sequence"),
            Figure(
                name="documents that must be", value=longer, basis="exact", how="longer than one"
            ),
        ],
    )
