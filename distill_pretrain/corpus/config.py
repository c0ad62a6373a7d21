"""Recipe sections `corpus` and `tokenizer`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pydantic import Field, StrictInt, field_validator

from distill_pretrain.config import Section, nameable
from distill_pretrain.files.storage import is_remote

if TYPE_CHECKING:
    from distill_pretrain.corpus.loss_marks import MarkKeys

BosMode = Literal["auto", "always", "never"]


class CorpusConfig(Section):
    """Which text is tokenised, and where its Megatron .bin/.idx go."""

    paths: tuple[Path | str, ...] = Field(min_length=1)
    """Files (text, JSONL, Parquet, Arrow), directories searched recursively, folders of Hugging Face datasets
    (save_to_disk), or URLs of these such as s3://bucket/texts/; gzip and zstd are unpacked on the way."""
    include: tuple[str, ...] = (
        *("*.txt", "*.md", "*.jsonl"),
        *("*.jsonl.gz", "*.jsonl.zst", "*.parquet"),
    )
    """Glob patterns on file names, used inside directories only."""
    exclude: tuple[str, ...] = ()
    """Glob patterns on paths below a directory (and on each folder name) to leave out."""
    text_key: str = "text"
    """Key of the text in a JSONL object, or column of it in a table."""
    masked_key: str | None = None
    """Key of a JSONL object that says what the loss leaves out of its text, which stays in the context of the rest:
    true for all of it, or a list of [start, end) pairs of characters. Lines without it are whole in the loss."""
    weight_key: str | None = None
    """Key of a JSONL object with the weight of its tokens in the training loss, beside those of other documents; lines
    without it weigh 1, and 0 leaves them out."""
    held_out_fraction: float = Field(default=0.01, ge=0.0, lt=1.0)
    """Share of documents kept out of training, chosen by a hash of their position and `seed`."""
    seed: int = Field(default=1234, ge=0, lt=1 << 64)
    """Seed of the train / held-out split."""
    workers: int = Field(default=0, ge=0, le=1 << 16)
    """Tokenising processes; 0 means one per CPU core."""
    output_dir: Path
    """Folder that receives train.bin/.idx, held_out.bin/.idx, tokens.json and the tokenizer."""

    @property
    def mark_keys(self) -> MarkKeys:
        """What is looked for beside the text."""
        # Here, since --help of a verb loads no numpy.
        from distill_pretrain.corpus.loss_marks import MarkKeys

        return MarkKeys(self.masked_key, self.weight_key)

    @field_validator("paths")
    @classmethod
    def _paths_or_urls(cls, paths: tuple[Path | str, ...]) -> tuple[Path | str, ...]:
        urls = {str(path) for path in paths if is_remote(path)}
        for url in urls:
            nameable(url)
        return tuple(str(path) if str(path) in urls else Path(path) for path in paths)


class TokenizerConfig(Section):
    """Which tokenizer is used; it is trained from the corpus when no path is given (sentencepiece only)."""

    kind: Literal["sentencepiece", "hf"] = "sentencepiece"
    """Tokenizer library."""
    path: Path | None = None
    """sentencepiece .model file, or folder of a Hugging Face tokenizer; null trains a sentencepiece one."""
    vocab_size: int = Field(default=32000, ge=64, le=1 << 20)
    """Size of a tokenizer trained here; ignored when `path` is given."""
    model_type: Literal["bpe", "unigram"] = "bpe"
    """sentencepiece algorithm of a tokenizer trained here."""
    training_bytes: int = Field(default=20_000_000, ge=1, le=1 << 50)
    """At most this much text, spread over the corpus, trains the tokenizer."""
    bos: BosMode = "auto"
    """Whether every document begins with the tokenizer's BOS token. auto: where the tokenizer itself begins a text
    with it (its post-processor; a sentencepiece model never does), and a folder that an earlier version tokenised
    without one stays as it is."""
    end_of_document: StrictInt | str | None = None
    """Token, or id, that ends every document; null takes the tokenizer's eos token (in sentencepiece `</s>`)."""


class TokenizeRecipe(Section):
    """What `tokenize` was asked to do; kept beside its output as recipe.yaml."""

    corpus: CorpusConfig
    """Raw text."""
    tokenizer: TokenizerConfig
    """Tokenizer."""
