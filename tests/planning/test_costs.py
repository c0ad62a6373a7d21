"""Hours, traffic and the break-even, against figures worked out by hand."""

from __future__ import annotations

import json

import pytest

from distill_pretrain.errors import ConfigError
from distill_pretrain.planning.costs import (
    BreakEven,
    RunSpeed,
    gpu_hours,
    hf_parameters,
    model_speed,
    reading,
    telemetry_speed,
)


def test_a_billion_tokens_at_a_hundred_thousand_per_second_on_two_gpus():
    assert gpu_hours(3.6e9, 1e5, 2) == 20


def test_a_training_step_is_three_forward_passes():
    machine = {"gpus": 8, "tflops": 1000.0, "utilization": 0.5}
    forward = model_speed(1e9, training=False, **machine)
    assert forward == 2e6
    assert model_speed(1e9, training=True, **machine) == forward / 3


def test_tensor_ranks_of_a_node_read_the_same_bytes():
    # 4 nodes of 8, tensor 4, pipeline 2: 16 last-stage ranks on 2 nodes, 2 replicas on each.
    traffic = reading(
        tokens_per_second=400.0,
        bytes_per_position=10.0,
        data_parallel=4,
        tensor=4,
        gpus=32,
        gpus_per_node=8,
    )
    assert traffic.positions_per_rank == 100
    assert traffic.busiest_node == 8 * 1000
    assert traffic.from_storage == 2 * 1000


@pytest.mark.parametrize(
    ("capture", "storage", "online", "offline", "students"),
    [
        (10, 0, 10, 0, 2),
        (10, 5, 10, 0, 2),
        (10, 0, 4, 0, 3),
        (10, 0, 40, 0, 1),
        (10, 0, 4, 5, None),
    ],
)
def test_the_break_even_is_the_first_number_that_is_cheaper(
    capture, storage, online, offline, students
):
    costs = BreakEven(
        capture=capture,
        storage=storage,
        per_student_online=online,
        per_student_offline=offline,
    )
    assert costs.students == students
    if students is not None:
        assert costs.offline(students) < costs.online(students)
        assert costs.offline(students - 1) >= costs.online(students - 1)


def test_speeds_are_medians_without_the_first_steps(tmp_path):
    lines = [
        json.dumps({"seconds": s, "data_wait": s / 10, "tokens_per_second": 100 / s})
        for s in (50, 50, 50, 50, 50, 1, 2, 3)
    ]
    (tmp_path / "metrics.jsonl").write_text("\n".join([*lines, '{"sec']))
    assert RunSpeed.of(tmp_path, "plan.kd_run").seconds == 2
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines[:5]))
    with pytest.raises(ConfigError, match=r"plan\.kd_run"):
        RunSpeed.of(tmp_path, "plan.kd_run")


def test_a_capture_that_ran_says_its_speed(tmp_path):
    folder = tmp_path / "cache.telemetry"
    folder.mkdir()
    for host, speed in (("a", 100.0), ("b", 300.0)):
        (folder / f"{host}.jsonl").write_text(json.dumps({"positions_per_s": speed}) + "\n")
    assert telemetry_speed(tmp_path / "cache") == 200
    assert telemetry_speed(tmp_path / "other") is None


def test_parameters_of_a_hugging_face_folder(tmp_path):
    llama_3b = {
        "hidden_size": 3072,
        "num_hidden_layers": 28,
        "num_attention_heads": 24,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "intermediate_size": 8192,
        "vocab_size": 128256,
        "tie_word_embeddings": True,
    }
    (tmp_path / "config.json").write_text(json.dumps(llama_3b))
    assert hf_parameters(tmp_path) == 3_212_749_824
    (tmp_path / "config.json").write_text("{}")
    assert hf_parameters(tmp_path) is None
