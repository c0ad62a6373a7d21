"""Launch scripts, Dockerfile and Kubernetes examples, under the linters there are."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from shutil import which

import pytest
import yaml

from distill_pretrain.config import load_recipe
from distill_pretrain.jobs.comparison.plan import ComparisonPlan
from distill_pretrain.jobs.recipe import Recipe
from distill_pretrain.mcore.model.layout import check_layout
from tools.version_matrix import COMBINATIONS

ROOT = Path(__file__).parents[1]
SCRIPTS = sorted(
    [
        *ROOT.glob("launch/torchrun_*.sh"),
        *ROOT.glob("launch/*.sbatch"),
        ROOT / "launch/docs.sh",
        ROOT / "launch/package.sh",
        ROOT / "launch/real_teacher.sh",
        ROOT / "launch/progressive.sh",
        ROOT / "launch/cluster_env.sh",
    ]
)
MANIFESTS = sorted((ROOT / "launch/k8s").glob("*.yaml"))


def tool(name: str) -> str:
    """A linter beside this interpreter or on PATH."""
    beside = Path(sys.executable).with_name(name)
    found = str(beside) if beside.is_file() else which(name)
    if found is None:
        pytest.skip(f"{name} is not installed; pip install 'distill-pretrain[dev]'")
    return found


def require_clean(*command: str) -> None:
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def documents(path: Path) -> list[dict]:
    return list(yaml.safe_load_all(path.read_text()))


def test_scripts_are_sound_bash():
    for script in SCRIPTS:
        require_clean("bash", "-n", str(script))
        assert script.name == "cluster_env.sh" or script.stat().st_mode & 0o111, script
    require_clean(tool("shellcheck"), "-x", *map(str, SCRIPTS))


@pytest.mark.parametrize(
    "name", ["compare/cpu", *(f"real_teacher/{it}" for it in ("compare", "pruned", "pruned_seeds"))]
)
@pytest.mark.parametrize("processes", [1, 2])
def test_a_comparison_is_one_that_its_script_can_start(name: str, processes: int) -> None:
    """As launch/*.sh do on a laptop: every cell's objective fits its set, and every layout its processes."""
    recipe = load_recipe(Recipe, ROOT / f"launch/recipes/{name}.yaml")
    for run in ComparisonPlan.of(recipe).runs:
        job = run.recipe
        assert job.data and job.model and job.train
        check_layout(
            job.model,
            job.parallel,
            world_size=processes,
            micro_batch_size=job.train.micro_batch_size,
            global_batch_size=job.train.global_batch_size,
            seq_len=job.data.seq_len,
            optimizer=job.optimizer,
        )
        needed = job.train.steps * job.train.global_batch_size
        assert needed <= (job.data.num_sequences or needed), "a student sees sequences twice"


def test_the_dockerfile_is_clean_and_its_copies_reach_it():
    require_clean(tool("hadolint"), "Dockerfile")
    text = (ROOT / "Dockerfile").read_text()
    let_in = {line[1:] for line in (ROOT / ".dockerignore").read_text().split() if line[0] == "!"}
    for line in re.findall(r"^COPY (.+) \S+$", text, re.M):
        for source in line.split():
            assert (ROOT / source).exists() and source.removeprefix("./").split("/")[0] in let_in
    base = re.search(r"^FROM (\S+)$", text, re.M)
    assert base and re.fullmatch(r"\S+:\d+\.\d+\.\d+\S*", base[1]), "the base image has no full tag"
    assert "USER 1000" in text and "HEALTHCHECK" in text


def test_pins_satisfy_what_the_package_asks_for():
    requirements = pytest.importorskip("packaging.requirements")
    pins = {
        line.split("==")[0].lower(): line.split("==")[1]
        for line in (ROOT / "launch/constraints.txt").read_text().splitlines()
        if not line.startswith("#")
    }
    tomllib = pytest.importorskip("tomllib")  # of Python 3.11
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for text in project["dependencies"]:
        wanted = requirements.Requirement(text)
        if wanted.name != "torch":  # the image's own
            assert wanted.specifier.contains(pins[wanted.name.lower()]), text


def test_the_image_is_a_combination_that_the_matrix_runs():
    asked = COMBINATIONS["3.12"]
    pins = (ROOT / "launch/constraints.txt").read_text().splitlines()
    assert f"megatron-core=={asked.megatron}" in pins
    assert f"FROM pytorch/pytorch:{asked.torch}-cuda" in (ROOT / "Dockerfile").read_text()


def workflow(name: str) -> dict[str, dict]:
    (document,) = documents(ROOT / f".github/workflows/{name}.yml")
    return document["jobs"]


def test_workflows_are_clean():
    if which("actionlint") is None and not Path(sys.executable).with_name("actionlint").is_file():
        pytest.skip("actionlint is not installed")
    require_clean(tool("actionlint"), *map(str, (ROOT / ".github/workflows").glob("*.yml")))


def test_the_shards_of_the_workflow_have_every_test_once():
    shards = workflow("ci")["tests"]["strategy"]["matrix"]["include"]
    named = sorted(path for shard in shards for path in shard["paths"].split())
    files = set((ROOT / "tests").rglob("test_*.py"))
    folders = {
        "/".join(path.relative_to(ROOT).parts[:2]) for path in files if path.parent.name != "tests"
    }
    assert named == sorted([*folders, "tests/test_*.py"])


def test_the_workflow_runs_every_combination_under_its_python():
    asked = workflow("ci")["versions"]["strategy"]["matrix"]["include"]
    assert {row["combination"]: row["python"] for row in asked} == {
        name: combination.python for name, combination in COMBINATIONS.items()
    }


def test_the_wheel_is_tried_under_every_python_that_the_package_names():
    tomllib = pytest.importorskip("tomllib")  # of Python 3.11
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    named = [c.rpartition(" ")[2] for c in project["classifiers"] if re.search(r":: 3\.\d+$", c)]
    assert workflow("packages")["use"]["strategy"]["matrix"]["python"] == named


def test_kubernetes_examples_follow_the_schema():
    validate = pytest.importorskip("kubernetes_validate")
    assert MANIFESTS
    for path in MANIFESTS:
        for document in documents(path):
            validate.validate(document, validate.latest_version(), strict=True)
    rules = "{extends: default, rules: {document-start: disable, line-length: {max: 140}}}"
    require_clean(tool("yamllint"), "-d", rules, *map(str, MANIFESTS))


def test_the_training_job_agrees_with_itself():
    service, job = documents(ROOT / "launch/k8s/train-job.yaml")
    spec = job["spec"]["template"]["spec"]
    (container,) = spec["containers"]
    options = dict(arg.removeprefix("--").split("=") for arg in container["args"] if "=" in arg)
    assert int(options["nnodes"]) == job["spec"]["completions"] == job["spec"]["parallelism"]
    name, port = job["metadata"]["name"], service["spec"]["ports"][0]["port"]
    assert spec["subdomain"] == service["metadata"]["name"]
    assert options["rdzv-endpoint"] == f"{name}-0.{spec['subdomain']}:{port}"
    assert (
        service["spec"]["selector"].items() <= job["spec"]["template"]["metadata"]["labels"].items()
    )
    recipe = next(arg for arg in container["args"] if arg.endswith(".yaml"))
    gpus = yaml.safe_load((ROOT / recipe).read_text())["plan"]["gpus"]
    assert gpus == int(options["nnodes"]) * int(options["nproc-per-node"])


@pytest.mark.parametrize("script", ["torchrun_single.sh", "torchrun_multi.sh"])
def test_a_launcher_without_arguments_says_how_it_is_used(script):
    done = subprocess.run(
        [ROOT / "launch" / script],
        capture_output=True,
        text=True,
        check=False,
        env={"PATH": "/usr/bin:/bin"},
    )
    assert done.returncode == 2 and done.stderr.startswith("usage:")


def test_a_node_that_knows_no_rendezvous_is_refused():
    done = subprocess.run(
        [ROOT / "launch/torchrun_multi.sh", "train", "x.yaml"],
        capture_output=True,
        text=True,
        check=False,
        env={"PATH": "/usr/bin:/bin", "NNODES": "2"},
    )
    assert done.returncode == 2 and "RDZV_ENDPOINT is not set" in done.stderr
