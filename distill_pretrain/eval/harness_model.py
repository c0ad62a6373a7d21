"""A scoring engine as a model of lm-evaluation-harness. Imported only where lm_eval is installed; see `tasks`.

Shapes: B requests of a forward pass, L the longest of them, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from lm_eval.api.model import TemplateLM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from distill_pretrain.contracts import IGNORED_LABEL, LogitsEngine
from distill_pretrain.errors import ConfigError
from distill_pretrain.eval.chunks import logits_chunks, row_slices, together


class TextTokenizer(Protocol):
    """What scoring text needs of a tokenizer."""

    bos_id: int | None
    """Token that begins a document; None where documents begin with their text."""
    eod_id: int
    """Token that ends a document, and stands before the first where none begins it."""

    def encode(self, texts: list[str]) -> list[list[int]]:
        """Return the token ids of each text, with nothing added."""
        ...


class HarnessModel(TemplateLM):  # type: ignore[misc, unused-ignore]
    """Scores continuations; text without context follows the end-of-document token.

    Where the documents of the models' corpus begin with a BOS token, every text does.

    Args:
        engine: causal model, so that padding on the right changes nothing.
        tokenizer: the one the engine was trained with.
        max_length: L, tokens of context and continuation that the model sees; of longer ones it sees the end.
        batch_size: B.
    """

    def __init__(
        self, engine: LogitsEngine, tokenizer: TextTokenizer, *, max_length: int, batch_size: int
    ) -> None:
        super().__init__()
        self._engine = engine
        self._text_tokenizer = tokenizer
        self.max_length = max_length
        self.batch_size = batch_size

    @property
    def eot_token_id(self) -> int:
        """The id of the end-of-document token."""
        return self._text_tokenizer.eod_id

    @property
    def prefix_token_id(self) -> int:
        """The id that stands before a text without context."""
        bos = self._text_tokenizer.bos_id
        return self.eot_token_id if bos is None else bos

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
    ) -> list[int]:
        """Return the token ids, after the BOS token that begins the documents of the corpus, if one does."""
        ids = self._text_tokenizer.encode([string])[0]
        bos = self._text_tokenizer.bos_id
        return ids if bos is None or add_special_tokens is False else [bos, *ids]

    def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> list[float]:
        """Score whole texts by their log-likelihood in nats, in windows where they are longer than `max_length`.

        Every token is scored once, the first after `prefix_token_id` (lm_eval's `get_rolling_token_windows`).
        """
        pairs: list[tuple[None, list[int], list[int]]] = []
        owners = []
        for owner, request in enumerate(requests):
            windows = get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0], add_special_tokens=False),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            for context, continuation in map(make_disjoint_window, windows):
                pairs.append((None, context, continuation))
                owners.append(owner)
        totals = [0.0] * len(requests)
        for owner, (logprob, _) in zip(owners, self._loglikelihood_tokens(pairs), strict=True):
            totals[owner] += logprob
        return totals

    def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
        """Refuse to generate: the engines keep no state between tokens."""
        raise ConfigError(
            "a task generates text, which the scoring engines cannot",
            where="eval.tasks",
            expected="tasks that score given texts (multiple_choice, loglikelihood, loglikelihood_rolling)",
            remedy="remove it, or run it on the exported model with lm_eval itself",
        )

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        results: list[tuple[float, bool]] = [(0.0, True)] * len(requests)
        # Alike in length, a batch wastes little on padding; longest first, memory runs out at once or never.
        order = sorted(range(len(requests)), key=lambda i: -len(requests[i][1] + requests[i][2]))
        for start in range(0, len(order), self.batch_size):
            chosen = order[start : start + self.batch_size]
            pairs = [requests[i][1:] for i in chosen]
            for number, result in zip(chosen, self._score(pairs), strict=True):
                results[number] = result
        return results

    def _score(self, pairs: Sequence[tuple[list[int], list[int]]]) -> list[tuple[float, bool]]:
        """Sum of log-probabilities, and whether greedy decoding gives it, of each (context, continuation)."""
        # The last token is only predicted, never read.
        whole = [
            (context + continuation)[-(self.max_length + 1) :] for context, continuation in pairs
        ]
        tokens = torch.full((len(pairs), max(map(len, whole)) - 1), self.eot_token_id)
        for row, ids in zip(tokens, whole, strict=True):
            row[: len(ids) - 1] = torch.tensor(ids[:-1])
        wanted = torch.full_like(tokens, IGNORED_LABEL)
        for row, ids, (_, continuation) in zip(wanted, whole, pairs, strict=True):
            kept = continuation[-(len(ids) - 1) :]
            row[len(ids) - 1 - len(kept) : len(ids) - 1] = torch.tensor(kept)
        device = self._engine.device
        with torch.no_grad():
            logprobs, hits = _scored(self._engine, tokens.to(device), wanted.to(device))
        return list(zip(logprobs.sum(1).tolist(), hits.all(1).tolist(), strict=True))


def _scored(
    engine: LogitsEngine, tokens: torch.Tensor, wanted: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probability float64[B, L] of each wanted id, and bool[B, L], whether it is the likeliest.

    Where none is wanted (`wanted` int64[B, L] is negative) they are 0 and True.
    """
    labels = wanted.flatten()
    logprobs = torch.zeros_like(labels, dtype=torch.float64)
    hits = torch.ones_like(labels, dtype=torch.bool)
    for first, (logits,) in together([logits_chunks(engine, tokens)]):
        for rows in row_slices(*logits.shape):
            places = first + rows.start + torch.nonzero(labels[first:][rows] >= 0).flatten()
            if len(places):
                some = torch.log_softmax(logits[places - first].float(), -1)
                logprobs[places] = some.gather(-1, labels[places, None]).squeeze(-1).double()
                hits[places] = some.argmax(-1) == labels[places]
        del logits
    return logprobs.view(tokens.shape), hits.view(tokens.shape)
