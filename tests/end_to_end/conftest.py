"""A small real corpus, tokenised, with a trained teacher and a captured cache, made once."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from tests.support.jobs import Job, run_cli


@pytest.fixture(scope="session")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prefix folder of a tokenised corpus: the source of one standard-library package."""
    folder = tmp_path_factory.mktemp("corpus")
    run_cli(
        "tokenize",
        f"corpus.paths=[{Path(ast.__file__).with_name('asyncio')}]",
        "corpus.include=['*.py']",
        f"corpus.output_dir={folder}",
        "corpus.held_out_fraction=0.2",
        "tokenizer.vocab_size=512",
    )
    return folder


@pytest.fixture(scope="session")
def job(tokens: Path, tmp_path_factory: pytest.TempPathFactory) -> Job:
    """A trained teacher and its cache, in one process."""
    job = Job(tmp_path_factory.mktemp("job"), tokens)
    job.cli("train", "train.output_dir=" + str(job.teacher), "train.steps=25")
    job.cli("capture")
    return job
