"""`export`: what stock transformers makes of a student of this project."""

from __future__ import annotations

import errno
import io
import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors import safe_open

from distill_pretrain.checkpoint.hf import save
from distill_pretrain.checkpoint.hf.save import save_hf_model
from distill_pretrain.checkpoint.hf.tokenizer import write_tokenizer
from distill_pretrain.checkpoint.store import find_checkpoint
from distill_pretrain.checkpoint.whole import load_whole_model, model_logits
from distill_pretrain.cli.main import main
from distill_pretrain.corpus.tokenizers import load_tokenizer
from distill_pretrain.corpus.tokens_record import TokensRecord
from distill_pretrain.errors import CheckpointError
from distill_pretrain.files import disk, ownership
from distill_pretrain.files.ownership import owner_beside
from distill_pretrain.mcore.model.config import ModelConfig, ParallelConfig
from distill_pretrain.processes import watchdog
from distill_pretrain.processes.process import process_group
from distill_pretrain.processes.watchdog import Watchdog
from tests.support.distributed import REPOSITORY, torchrun
from tests.support.jobs import run_cli
from tests.support.owner import owned_elsewhere

transformers = pytest.importorskip("transformers")

SEQ_LEN = 32
TEXT = Path(json.__file__).with_name("decoder.py")
ODD_TEXTS = ["", " ", "  a\tb\n\n", "naïve 漢字 🙂", "a\u2581b", "x" * 40, "==  ==\n" * 9]


@pytest.fixture(scope="module")
def tokens(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tokens")
    run_cli(
        "tokenize",
        f"corpus.paths=[{TEXT.parent}]",
        "corpus.include=['*.py']",
        f"corpus.output_dir={folder}",
        "corpus.held_out_fraction=0.3",
        "tokenizer.vocab_size=400",
    )
    return folder


def train(tokens: Path, run: Path, *overrides: str) -> Path:
    run_cli(
        "train",
        f"data.tokens={tokens / 'train'}",
        f"data.seq_len={SEQ_LEN}",
        "model.num_layers=2",
        "model.hidden_size=32",
        "model.ffn_hidden_size=48",
        "model.num_attention_heads=4",
        "model.init_std=0.3",
        "optimizer.lr=0.02",
        "optimizer.decay_style=constant",
        "train.steps=3",
        "train.global_batch_size=2",
        "train.threads=1",
        f"train.output_dir={run}",
        *overrides,
    )
    return run


@pytest.fixture(scope="module")
def run(tokens, tmp_path_factory) -> Path:
    """A trained llama, exported every second step on the way."""
    folder = tmp_path_factory.mktemp("runs") / "llama"
    return train(tokens, folder, "train.export_interval=2", "model.num_query_groups=2")


def own_logits(run: Path, ids: torch.Tensor) -> torch.Tensor:
    from distill_pretrain.mcore.runtime.parallel import model_parallel

    checkpoint = find_checkpoint(run)
    with process_group(), model_parallel(ParallelConfig(), seed=0), torch.no_grad():
        model = load_whole_model(checkpoint, precision="fp32")
        return model_logits(model, ids, checkpoint.identity["vocab_size"])


def some_ids() -> torch.Tensor:
    return torch.randint(0, 400, (2, SEQ_LEN), generator=torch.Generator().manual_seed(0))


def difference(run: Path, exported: Path) -> float:
    model = transformers.AutoModelForCausalLM.from_pretrained(exported).eval()
    with torch.no_grad():
        return float((model(some_ids()).logits - own_logits(run, some_ids())).abs().max())


def weights(folder: Path) -> bytes:
    return (folder / "model.safetensors").read_bytes()


def test_transformers_loads_an_export_and_generates(run, tokens, tmp_path, capsys):
    run_cli("export", str(run), str(tmp_path / "out"))
    assert "step 3" in capsys.readouterr().out
    assert difference(run, tmp_path / "out") <= 1e-5
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    record = TokensRecord.load(tokens)
    assert tokenizer.eos_token_id == model.generation_config.eos_token_id == record.eod_id
    prompt = tokenizer("def decode(self", return_tensors="pt", return_token_type_ids=False)
    text = model.generate(**prompt, max_new_tokens=4, do_sample=False, eos_token_id=None)
    assert text.shape[1] == prompt["input_ids"].shape[1] + 4


def test_the_exported_tokenizer_gives_the_ids_of_the_corpus(run, tokens, tmp_path):
    run_cli("export", str(run), str(tmp_path / "out"))
    record = TokensRecord.load(tokens).tokenizer
    own = load_tokenizer(record["kind"], tokens / record["file"])
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    for text in [TEXT.read_text(), *ODD_TEXTS]:
        ids = own.encode([text])[0]
        assert theirs(text)["input_ids"] == ids
        assert theirs.decode(ids) == own.decode(ids)


FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"hidden_size": 36, "num_attention_heads": 8, "kv_channels": 4},
    "qwen2": {"qkv_bias": True},
    "qwen3": {"qk_norm": True},
    "gpt2": {"arch": "gpt2"},
}


@pytest.mark.parametrize("family", FAMILIES)
def test_the_tokenizer_round_trips_beside_every_family(tokens, tmp_path, family):
    record = TokensRecord.load(tokens).tokenizer
    own = load_tokenizer(record["kind"], tokens / record["file"])
    sizes = {"num_layers": 1, "hidden_size": 32, "ffn_hidden_size": 8, "num_attention_heads": 4}
    model = ModelConfig(**{**sizes, **FAMILIES[family]})
    out = tmp_path / "out"
    with process_group(), model_parallel_of_one():
        from distill_pretrain.mcore.model.chunks import build_model_chunks

        size = {"vocab_size": own.vocab_size, "seq_len": SEQ_LEN}
        chunks = build_model_chunks(model, ParallelConfig(), precision="fp32", seed=1, **size)
        save_hf_model(
            chunks,
            model=model,
            vocab_size=own.vocab_size,
            max_positions=SEQ_LEN,
            folder=out,
            dtype="fp32",
            tokenizer=tokens / record["file"],
        )
    assert json.loads((out / "config.json").read_text())["model_type"] == family
    place = out / "tokenizer" if family == "qwen2" else out
    if place != out:
        # No other tokenizer in its place.
        assert not [p.name for p in out.iterdir() if p.is_file() and "token" in p.name]
    theirs = transformers.AutoTokenizer.from_pretrained(place)
    assert len(theirs) == own.vocab_size
    for text in [TEXT.read_text(), *ODD_TEXTS]:
        ids = own.encode([text])[0]
        assert theirs(text)["input_ids"] == ids
        assert theirs.decode(ids) == own.decode(ids)


def model_parallel_of_one() -> Any:
    from distill_pretrain.mcore.runtime.parallel import model_parallel

    return model_parallel(ParallelConfig(), seed=0)


@pytest.mark.parametrize("model_type", ["bpe", "unigram"])
def test_sentencepiece_models_of_both_kinds_keep_their_ids(tmp_path, model_type):
    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXT.read_text().splitlines(keepends=True)),
        model_writer=model,
        vocab_size=500,
        model_type=model_type,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        add_dummy_prefix=model_type == "bpe",
        minloglevel=2,
    )
    source = tmp_path / "m.model"
    source.write_bytes(model.getvalue())
    (tmp_path / "out").mkdir()
    write_tokenizer(source, tmp_path / "out", max_positions=SEQ_LEN)
    own = load_tokenizer("sentencepiece", source)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    for text in [TEXT.read_text(), *ODD_TEXTS]:
        ids = own.encode([text])[0]
        assert theirs(text)["input_ids"] == ids
        assert theirs.decode(ids) == own.decode(ids)


def test_tokenizers_that_cannot_be_converted_are_refused_by_name(tmp_path):
    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXT.read_text().splitlines()),
        model_writer=model,
        vocab_size=200,
        minloglevel=2,
    )
    (tmp_path / "m.model").write_bytes(model.getvalue())
    with pytest.raises(CheckpointError, match=r"normalization rule nmt_nfkc.*extra_whitespaces"):
        write_tokenizer(tmp_path / "m.model", tmp_path, max_positions=SEQ_LEN)
    (tmp_path / "m.model").write_bytes(b"junk")
    with pytest.raises(CheckpointError, match="not a sentencepiece model"):
        write_tokenizer(tmp_path / "m.model", tmp_path, max_positions=SEQ_LEN)
    with pytest.raises(CheckpointError, match="no tokenizer found"):
        write_tokenizer(tmp_path / "none", tmp_path, max_positions=SEQ_LEN)


def test_a_named_tokenizer_gives_its_end_and_must_fit_the_model(run, tokens, tmp_path, capsys):
    import sentencepiece

    record = TokensRecord.load(tokens)
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    newest = find_checkpoint(run).folder
    shutil.copytree(newest, tmp_path / "run" / "checkpoints" / newest.name)
    named = ["--tokenizer", str(tokens / record.tokenizer["file"])]
    run_cli("export", str(tmp_path / "run"), str(tmp_path / "out"), *named)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["eos_token_id"] == record.eod_id is not None
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXT.read_text().splitlines()),
        model_writer=model,
        vocab_size=401,
        minloglevel=2,
    )
    (tmp_path / "larger.model").write_bytes(model.getvalue())
    named = ["--tokenizer", str(tmp_path / "larger.model")]
    assert main(["export", str(run), str(tmp_path / "other"), *named]) == 2
    error = capsys.readouterr().err
    assert "401 ids" in error and "at most 400" in error
    assert not (tmp_path / "other").exists()


def test_the_token_that_began_the_documents_is_named(run, tokens, tmp_path):
    path = tokens / "tokens.json"
    plain = path.read_bytes()
    record = json.loads(plain)
    record["tokenizer"]["bos_id"] = 7
    found = []
    for content in (plain, json.dumps(record).encode()):
        path.write_bytes(content)
        try:
            out = tmp_path / str(len(found))
            run_cli("export", str(run), str(out))
        finally:
            path.write_bytes(plain)
        config = json.loads((out / "config.json").read_text())
        generation = json.loads((out / "generation_config.json").read_text())
        found.append((config["bos_token_id"], generation.get("bos_token_id")))
    assert found == [(None, None), (7, 7)]


def test_files_of_a_hugging_face_tokenizer_are_copied(run, tokens, tmp_path):
    source = tmp_path / "tokenizer"
    source.mkdir()
    record = TokensRecord.load(tokens)
    write_tokenizer(tokens / record.tokenizer["file"], source, max_positions=SEQ_LEN)
    for name in ("special_tokens_map.json", "weights.bin"):
        (source / name).write_text("{}")
    run_cli("export", str(run), str(tmp_path / "out"), "--tokenizer", str(source))
    assert (tmp_path / "out" / "tokenizer.json").read_text() == (
        source / "tokenizer.json"
    ).read_text()
    assert (tmp_path / "out" / "special_tokens_map.json").exists()
    assert not (tmp_path / "out" / "weights.bin").exists()
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["model_type"] == "llama" and config["eos_token_id"] == record.eod_id
    run_cli("export", str(run), str(tmp_path / "out"), "--tokenizer", "none")
    assert not (tmp_path / "out" / "tokenizer.json").exists()


def test_exports_during_training_are_those_of_their_steps(run, tmp_path):
    assert sorted(p.name for p in (run / "hf").iterdir()) == ["step-00000002", "step-00000003"]
    run_cli("export", str(run), str(tmp_path / "out"))
    last, before = run / "hf" / "step-00000003", run / "hf" / "step-00000002"
    assert {p.name: p.read_bytes() for p in last.iterdir()} == {
        p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()
    }
    assert weights(before) != weights(last)
    assert difference(run, before) > 1e-3
    run_cli("export", str(run), str(last))  # the same step of the same run


def test_only_the_newest_exports_are_kept(tokens, tmp_path):
    foreign = tmp_path / "run" / "hf" / "step-00000009"
    foreign.mkdir(parents=True)
    kept = ["train.export_interval=1", "train.keep_exports=2", "train.steps=4"]
    train(tokens, tmp_path / "run", *kept)
    names = sorted(p.name for p in (tmp_path / "run" / "hf").iterdir())
    assert names == ["step-00000003", "step-00000004", foreign.name]


def test_a_run_replaces_exports_that_an_older_version_made_of_it(tokens, tmp_path):
    record = tmp_path / "run" / "hf" / "step-00000002" / "export.json"
    record.parent.mkdir(parents=True)
    record.write_text(json.dumps({"source": {"run": "in other words", "step": 2}}))
    train(tokens, tmp_path / "run", "train.export_interval=2")
    assert json.loads(record.read_text())["source"]["run"] != "in other words"


def test_an_export_says_that_it_goes_on(run, tmp_path, monkeypatch):
    dog = Watchdog(dist.HashStore(), 100.0)
    monkeypatch.setattr(watchdog, "_current", dog)
    run_cli("export", str(run), str(tmp_path / "out"), "--tokenizer", "none")
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as file:
        assert dog._moves >= len(file.keys())


def test_another_folder_is_not_overwritten(run, tmp_path, capsys):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes").touch()
    for folder in (tmp_path / "mine", run / "hf" / "step-00000002"):
        assert main(["export", str(run), str(folder)]) == 2
        error = capsys.readouterr().err
        assert "not an export of this checkpoint" in error and "Traceback" not in error
    assert main(["export", str(tmp_path), str(tmp_path / "out")]) == 2
    assert "no checkpoint found" in capsys.readouterr().err


def test_an_export_has_one_writer(run, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(ownership, "PATIENCE_S", 0.2)
    with owned_elsewhere(owner_beside(tmp_path / "out")) as holder:
        assert main(["export", str(run), str(tmp_path / "out")]) == 2
    assert f"process {holder.pid} on node7" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_tokens_made_again_with_another_tokenizer_are_refused(run, tokens, tmp_path, capsys):
    other = tmp_path / "tokens"
    shutil.copytree(tokens, other)
    record = json.loads((other / "tokens.json").read_text())
    record["tokenizer"]["sha256"] = "0" * 64
    (other / "tokens.json").write_text(json.dumps(record))
    copied = tmp_path / "run"
    shutil.copytree(run, copied)
    recipe = (copied / "recipe.yaml").read_text()
    (copied / "recipe.yaml").write_text(recipe.replace(str(tokens), str(other)))
    assert main(["export", str(copied), str(tmp_path / "out")]) == 2
    assert "made again with another tokenizer" in capsys.readouterr().err
    run_cli("export", str(copied), str(tmp_path / "out"), "--tokenizer", "none")
    (copied / "recipe.yaml").unlink()
    run_cli("export", str(copied), str(tmp_path / "out"))
    assert "no tokenizer" in capsys.readouterr().err
    assert not (tmp_path / "out" / "tokenizer.json").exists()


MODELS: dict[str, list[str]] = {
    "gpt2": ["model.arch=gpt2", "model.tie_embeddings=true"],
    "gpt2 untied, deepscale": ["model.arch=gpt2", "model.init=deepscale"],
    "qwen2": ["model.qkv_bias=true", "model.tie_embeddings=true", "model.rotary_base=5000"],
    "qwen3": ["model.qk_norm=true", "model.kv_channels=16", "model.rope_scaling_factor=8"],
    "llama, deepscale": ["model.init=deepscale", "model.norm_epsilon=1e-3"],
    "odd width": ["model.hidden_size=36", "model.num_attention_heads=8", "model.kv_channels=4"],
}


@pytest.mark.parametrize("kind", MODELS)
def test_every_architecture_is_what_transformers_computes(tokens, tmp_path, kind):
    trained = train(tokens, tmp_path / "run", *MODELS[kind])
    run_cli("export", str(trained), str(tmp_path / "out"))
    assert difference(trained, tmp_path / "out") <= 2e-5


def test_a_model_that_cannot_be_exported_is_refused_before_training(tokens, tmp_path, capsys):
    settings: list[Any] = [f"data.tokens={tokens / 'train'}", "data.seq_len=32"]
    settings += [f"model.{k}=8" for k in ("hidden_size", "ffn_hidden_size")]
    settings += ["model.num_layers=1", "model.num_attention_heads=2", "model.norm_placement=post"]
    settings += ["train.steps=1", "train.global_batch_size=1", f"train.output_dir={tmp_path / 'r'}"]
    assert main(["train", *settings, "train.export_interval=1"]) == 2
    assert "no class of transformers computes this llama model" in capsys.readouterr().err
    assert not (tmp_path / "r").exists()


def test_several_processes_export_what_one_does(run, tmp_path):
    run_cli("export", str(run), str(tmp_path / "one"), "--dtype", "bf16")
    command = ["-m", "distill_pretrain", "export", str(run), str(tmp_path / "two")]
    done = subprocess.run(
        torchrun(2, *command, "--dtype", "bf16", "--tensor", "2"),
        cwd=REPOSITORY,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    one, two = ({p.name: p.read_bytes() for p in (tmp_path / n).iterdir()} for n in ("one", "two"))
    assert one == two
    assert json.loads(one["config.json"])["torch_dtype"] == "bfloat16"


def stored(folder: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(folder / "model.safetensors")


@pytest.mark.parametrize("sharded", [False, True])
def test_fp32_of_a_bf16_run_is_what_the_optimizer_kept(tokens, tmp_path, sharded):
    trained = train(
        tokens,
        tmp_path / "run",
        "train.precision=bf16",
        "model.init=deepscale",
        f"parallel.distributed_optimizer={str(sharded).lower()}",
    )
    for dtype in ("fp32", "bf16"):
        run_cli("export", str(trained), str(tmp_path / dtype), "--dtype", dtype)
    fine, coarse = stored(tmp_path / "fp32"), stored(tmp_path / "bf16")
    name = "model.layers.0.self_attn.q_proj.weight"
    assert not torch.equal(fine[name], fine[name].bfloat16().float())
    # Not scaled, so that it is the optimizer's weight, rounded once.
    assert torch.equal(fine[name].bfloat16(), coarse[name])


def test_bf16_of_a_scaled_fp32_run_is_rounded_once(tokens, tmp_path):
    trained = train(tokens, tmp_path / "run", "model.init=deepscale", "model.num_layers=3")
    for dtype in ("fp32", "bf16"):
        run_cli("export", str(trained), str(tmp_path / dtype), "--dtype", dtype)
    fine, coarse = stored(tmp_path / "fp32"), stored(tmp_path / "bf16")
    for name, values in fine.items():
        assert torch.equal(values.bfloat16(), coarse[name]), name


def test_a_layout_that_does_not_fit_is_refused(run, tmp_path, capsys):
    assert main(["export", str(run), str(tmp_path / "out"), "--tensor", "3"]) == 2
    assert "parallel.tensor" in capsys.readouterr().err


def test_an_export_without_room_is_refused_and_one_that_fills_the_disk_leaves_nothing(
    run, tmp_path, capsys, monkeypatch
):
    target = tmp_path / "exported"
    with monkeypatch.context() as small:
        small.setattr(disk, "free_bytes", lambda path: 1000)
        assert main(["export", str(run), str(target), "--tokenizer", "none"]) == 2
    error = capsys.readouterr().err
    assert "1,000 bytes free" in error and "Traceback" not in error
    assert list(tmp_path.iterdir()) == []

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(save.TensorFile, "append", full)
    assert main(["export", str(run), str(target), "--tokenizer", "none"]) == 2
    error = capsys.readouterr().err
    assert "bytes free" in error and "Traceback" not in error
    assert list(tmp_path.iterdir()) == []
