"""A corpus that leaves tokens out of the loss: one cache serves any mask, and no label or target of them is trained."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from distill_pretrain import DistillationDataset, SequencePlan, TokenIndex, collate_distillation
from distill_pretrain.checkpoint.identity import differences
from distill_pretrain.corpus.token_writer import TokenIndexWriter
from distill_pretrain.data.batches import StudentBatches
from distill_pretrain.data.config import DataConfig
from distill_pretrain.data.sources import open_sources
from distill_pretrain.errors import TokenDataError
from distill_pretrain.train.config import TrainConfig
from distill_pretrain.train.evaluation import open_held_out

SEQ_LEN = 32


@pytest.fixture(scope="module")
def corpora(folder, tmp_path_factory) -> dict[str, Path]:
    """The text of the cache's corpus: whole, with a mask, and with weights too."""
    whole = TokenIndex.open(folder / "train")
    found = {}
    for name in ("whole", "masked", "weighted"):
        prefix = tmp_path_factory.mktemp(name) / "train"
        draw = np.random.default_rng(2)
        with TokenIndexWriter(prefix, vocab_size=64) as writer:
            for number, length in enumerate(whole.document_lengths.tolist()):
                masked = draw.random(length) < 0.5
                writer.add_document(
                    whole.read(number, 0, length),
                    masked=None if name == "whole" else masked,
                    weight=[0.5, 1.0, 4.0][number % 3] if name == "weighted" else 1.0,
                )
        found[name] = prefix
    return found


def plan_of(prefix: Path) -> SequencePlan:
    return SequencePlan(TokenIndex.open(prefix), seq_len=SEQ_LEN, seed=1)


def test_one_cache_serves_every_mask_and_what_is_left_out_is_not_trained(corpora, folder):
    whole, masked, weighted = (
        DistillationDataset(plan_of(corpora[name]), folder / "cache")
        for name in ("whole", "masked", "weighted")
    )
    shares = []
    for number in (0, 7, 100, 191):
        item, other, third = whole[number], masked[number], weighted[number]
        out = other["labels"] != item["labels"]
        assert (other["labels"][out] == -100).all()
        assert (other["ids"][out] == -1).all() and (other["probs"][out] == 0).all()
        for key in ("ids", "probs"):
            assert torch.equal(other[key][~out], item[key][~out])
        assert set(third) == {*other, "weights"}
        kept = third["labels"] >= 0
        assert set(third["weights"][kept].tolist()) <= {0.5, 1.0, 4.0}
        shares.append(float(out.double().mean()))
    assert 0.4 < np.mean(shares) < 0.6
    batch = collate_distillation([weighted[3], whole[4]])
    assert torch.equal(batch["weights"][0], weighted[3]["weights"])
    assert (batch["weights"][1] == 1).all()


def test_what_a_capture_writes_does_not_depend_on_the_mask(corpora, own_teacher, tmp_path):
    from distill_pretrain import write_cache

    def score(tokens: torch.Tensor) -> torch.Tensor:
        g = torch.Generator().manual_seed(int(tokens.sum()))
        return torch.randn(*tokens.shape, 64, generator=g)

    written = []
    for name in ("whole", "weighted"):
        target = tmp_path / name
        settings = {"vocab_size": 64, "teacher": {"name": "random"}, "sanity_gate": "off"}
        write_cache(target, plan_of(corpora[name]), score, num_sequences=8, **settings)
        written.append({path.name: path.read_bytes() for path in target.glob("*.*")})
    assert written[0].keys() == written[1].keys() and len(written[0]) > 3
    for name, content in written[0].items():
        assert content == written[1][name] or name in ("manifest.json", "recipe.yaml"), name


def test_training_sources_hand_it_on_and_a_run_goes_on_with_the_same_alone(corpora, folder):
    identities, batches = {}, {}
    for name, prefix in corpora.items():
        data = DataConfig(
            tokens=prefix, seq_len=SEQ_LEN, seed=1, vocab_size=64, cache=str(folder / "cache")
        )
        with open_sources(data, kd_weight=1.0) as (source,):
            identities[name] = source.identity
            found = StudentBatches(
                [source.for_batches],
                seed=0,
                global_batch_size=4,
                micro_batch_size=4,
                data_rank=0,
                data_size=1,
                device=torch.device("cpu"),
            )
            (batches[name],) = found.step_batches(0, with_targets=True)
    whole, masked, weighted = batches.values()
    out = (masked.labels < 0) & (whole.labels >= 0)
    assert out.double().mean() > 0.4
    assert (masked.targets.ids[out] == -1).all() and (whole.targets.ids[out] >= 0).any()
    assert masked.weights is None and len(weighted.weights.unique()) > 2
    assert torch.equal(weighted.labels, masked.labels)
    assert "loss_sha256" not in identities["whole"]
    lines = differences(identities["whole"], identities["weighted"], "here")
    assert len(lines) == 1
    assert lines[0].startswith("what data.tokens leaves out of the loss: checkpoint nothing, this")


def test_held_out_figures_leave_the_same_out_and_weigh_the_rest_alike(corpora):
    data = DataConfig(
        tokens=corpora["whole"],
        held_out_tokens=corpora["weighted"],
        seq_len=SEQ_LEN,
        vocab_size=64,
    )
    train = TrainConfig(
        output_dir="unused", steps=1, global_batch_size=2, micro_batch_size=2, eval_interval=1
    )
    with (
        open_sources(data, kd_weight=0.0) as (source,),
        open_held_out(data, train, source.sequences) as held_out,
    ):
        _, labels = held_out.plan.read(np.arange(4))
        assert 0.4 < (labels < 0).mean() < 0.6
        assert held_out.label_weights is None


def test_a_damaged_file_is_found_when_a_dataset_is_opened(corpora, tmp_path):
    for path in corpora["masked"].parent.iterdir():
        shutil.copy(path, tmp_path)
    content = bytearray((tmp_path / "train.loss").read_bytes())
    content[-1] ^= 4
    (tmp_path / "train.loss").write_bytes(content)
    with pytest.raises(TokenDataError, match="the loss weights are damaged"):
        DistillationDataset(plan_of(tmp_path / "train"))
