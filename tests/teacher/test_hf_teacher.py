"""Hugging Face teachers: the cache holds what the model says; what cannot be used is refused by name."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from distill_pretrain.cli.main import main
from distill_pretrain.data.config import DataConfig
from distill_pretrain.data.sources import open_cache, open_sequences
from distill_pretrain.errors import TeacherError, TokenizerMismatch
from distill_pretrain.teacher.engines import open_engine
from tests.support.small_corpus import SEQ_LEN, VOCAB_SIZE, write_small_corpus

transformers = pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def tokens(tmp_path_factory) -> Path:
    return write_small_corpus(tmp_path_factory.mktemp("tokens") / "train")


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory) -> Path:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=VOCAB_SIZE + 24,  # padded, as checkpoints often are
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        initializer_range=0.3,
    )
    folder = tmp_path_factory.mktemp("model")
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def arguments(tokens: Path, model: Path, cache: Path) -> list[str]:
    return [
        f"data.tokens={tokens}",
        f"data.vocab_size={VOCAB_SIZE}",
        f"data.seq_len={SEQ_LEN}",
        "teacher.kind=hf",
        f"teacher.path={model}",
        f"capture.output_dir={cache}",
        "capture.micro_batch_size=3",
        "capture.shard_sequences=5",
    ]


def test_the_cache_holds_the_models_own_distribution_without_padding_columns(
    tokens, model_folder, tmp_path
):
    assert main(["capture", *arguments(tokens, model_folder, tmp_path / "cache")]) == 0
    data = open_sequences(DataConfig(tokens=tokens, vocab_size=VOCAB_SIZE, seq_len=SEQ_LEN))
    cache = open_cache(tmp_path / "cache", data)
    model = transformers.AutoModelForCausalLM.from_pretrained(model_folder).eval()
    for sequence in (0, 4, 11):
        ids, labels = data.plan.read(np.array([sequence]))
        with torch.no_grad():
            logits = model(torch.from_numpy(ids.astype(np.int64))).logits[0, :, :VOCAB_SIZE]
        probs = torch.softmax(logits.double(), -1).numpy()
        targets = cache.read(sequence, ids[0])
        rows = np.repeat(np.arange(SEQ_LEN), targets.entries_per_token)
        expected = 50 * probs[rows, targets.ids]
        assert (np.abs(targets.values - expected) < 1.001).all()  # systematic: floor or ceil
        assert targets.values.sum() == 50 * (labels >= 0).sum()
        assert targets.ids.max() < VOCAB_SIZE


def test_samplers_are_measured_on_a_hugging_face_teacher(tokens, model_folder, tmp_path, capsys):
    (tmp_path / "empty.yaml").write_text("{}\n")
    settings = arguments(tokens, model_folder, tmp_path / "cache")
    options = ["--sequences", "4", "--draws", "5", "--top-p", "0.9"]
    recipe = str(tmp_path / "empty.yaml")
    assert main(["inspect", "--estimators", recipe, *settings, *options]) == 0
    printed = capsys.readouterr().out
    assert f"vocabulary {VOCAB_SIZE}," in printed and "systematic 5" in printed
    assert not (tmp_path / "cache").exists()


def test_resuming_with_other_weights_is_refused(tokens, model_folder, tmp_path, capsys):
    cache = tmp_path / "cache"
    assert main(["capture", *arguments(tokens, model_folder, cache)]) == 0
    other = tmp_path / "other"
    model = transformers.AutoModelForCausalLM.from_pretrained(model_folder)
    with torch.no_grad():
        model.lm_head.weight[0, 0] += 1
    model.save_pretrained(other)
    assert main(["capture", *arguments(tokens, other, cache)]) == 2
    error = capsys.readouterr().err
    assert "model.safetensors" in error and "Traceback" not in error


def test_what_cannot_be_used_is_named(model_folder, tmp_path):
    def open_hf(path: Path, **changed: int) -> None:
        settings = {"vocab_size": VOCAB_SIZE, "seq_len": SEQ_LEN, **changed}
        open_engine("hf", path, "fp32", **settings)

    with pytest.raises(TeacherError, match=r"not a Hugging Face model folder.*config\.json"):
        open_hf(tmp_path)
    with pytest.raises(TokenizerMismatch, match=r"224 ids.*at least 300 ids"):
        open_hf(model_folder, vocab_size=300)
    with pytest.raises(TeacherError, match=r"seq_len = 65.*at most 64"):
        open_hf(model_folder, seq_len=65)
    (tmp_path / "config.json").write_text('{"model_type": "no_such_model"}')
    with pytest.raises(TeacherError, match=r"does not know models of this type.*no_such_model"):
        open_hf(tmp_path)


def test_a_corpus_of_another_tokenizer_than_the_teachers_is_refused(model_folder, tmp_path, capsys):
    from tokenizers import Tokenizer, models, pre_tokenizers

    def make_tokenizer(folder: Path, words: list[str]) -> None:
        vocabulary = {word: number for number, word in enumerate(["<unk>", "<eos>", *words])}
        plain = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
        plain.pre_tokenizer = pre_tokenizers.Whitespace()
        fast = transformers.PreTrainedTokenizerFast(
            tokenizer_object=plain, eos_token="<eos>", unk_token="<unk>"
        )
        fast.save_pretrained(folder)

    words = [f"w{number}" for number in range(30)]
    make_tokenizer(tmp_path / "tokenizer", words)
    texts = tmp_path / "texts"
    texts.mkdir()
    for number in range(20):
        (texts / f"{number}.txt").write_text(" ".join(words[number % 7 :] * 3))
    corpus = [f"corpus.paths=[{texts}]", f"corpus.output_dir={tmp_path / 'tokens'}"]
    corpus += ["corpus.held_out_fraction=0.3", "tokenizer.kind=hf"]
    assert main(["tokenize", *corpus, f"tokenizer.path={tmp_path / 'tokenizer'}"]) == 0

    teacher = tmp_path / "teacher"
    shutil.copytree(model_folder, teacher)
    make_tokenizer(teacher, words[::-1])  # the same size, other ids: nothing else would notice
    job = arguments(tmp_path / "tokens" / "train", teacher, tmp_path / "cache")
    job.remove(f"data.vocab_size={VOCAB_SIZE}")
    assert main(["capture", *job]) == 2
    assert "another tokenizer than the teacher's" in capsys.readouterr().err
    make_tokenizer(teacher, words)
    assert main(["capture", *job]) == 0


def test_a_stray_file_in_the_teachers_folder_does_not_block_extending(
    tokens, model_folder, tmp_path
):
    teacher = tmp_path / "teacher"
    shutil.copytree(model_folder, teacher)
    job = arguments(tokens, teacher, tmp_path / "cache")
    assert main(["capture", *job, "capture.num_sequences=5"]) == 0
    (teacher / "training_args.bin").write_bytes(b"of the training")
    (teacher / "consolidated.safetensors").write_bytes(b"")
    assert main(["capture", *job, "capture.num_sequences=6"]) == 0
    plan = tmp_path / "cache/plan.json"
    assert "training_args" not in plan.read_text() and "model.safetensors" in plan.read_text()


def test_a_plan_that_lists_more_files_is_joined_where_those_in_use_are_the_same():
    from dataclasses import replace

    from tests.support.cache_samples import make_plan

    ours = replace(make_plan(), teacher={"files": {"config.json": "a", "model.safetensors": "b"}})
    old = replace(ours, teacher={"files": {**ours.teacher["files"], "training_args.bin": "c"}})
    assert old.differences(ours.joining(old)) == []
    other = replace(old, teacher={"files": {**old.teacher["files"], "model.safetensors": "d"}})
    assert other.differences(ours.joining(other))


def test_what_cut_off_targets_keep_is_said_and_little_is_a_warning(
    tokens, model_folder, tmp_path, capsys
):
    job = arguments(tokens, model_folder, tmp_path / "cache")
    few, most = (
        "few: {sampler: topk, num_draws: 3}",
        "most: {sampler: topp, num_draws: 190, top_p: 0.99}",
    )
    assert main(["capture", *job, f"capture.sets={{{few}, {most}, rs: {{}}}}"]) == 0
    said = [
        line for line in capsys.readouterr().err.splitlines() if " of the teacher's mass" in line
    ]
    few, most = sorted(said, key=lambda line: "topp" in line)
    assert len(said) == 2 and " WARNING rank 0: " in few and " INFO " in most

    data = open_sequences(DataConfig(tokens=tokens, vocab_size=VOCAB_SIZE, seq_len=SEQ_LEN))
    cache = open_cache(tmp_path / "cache/few", data)
    kept = [
        np.add.reduceat(np.exp(t.values.astype(float)), range(0, len(t.values), 3))
        for t in (cache.read(n, data.plan.read(np.array([n]))[0][0]) for n in range(12))
    ]
    mass = np.concatenate(kept)
    assert f"keeps {mass.mean():.1%} of" in few and f"is {-np.log(mass).mean():.2f} nats off" in few


def test_a_teacher_of_far_more_ids_than_the_corpus_is_refused(tokens, tmp_path, capsys):
    config = transformers.LlamaConfig(
        vocab_size=VOCAB_SIZE + 1100,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "wide")
    job = arguments(tokens, tmp_path / "wide", tmp_path / "cache")
    for extra in (["--dry-run"], []):
        assert main(["capture", *job, *extra]) == 2
        assert "1,300 ids, 200 in the corpus" in capsys.readouterr().err
