"""Jobs on clusters: what is uploaded, `ray job submit` and `ray job stop`, and that nothing is left behind."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from btray import cluster as btray_cluster
from btray import phantoms
from btray.bundle import load_bundle
from btray.errors import UserError
from btray.results import current
from btray.settings import TrainConfig
from tests.classify_helpers import part_files
from tests.conftest import ROOT
from tests.tiny_bundle import saved_bundle
from tests.training_helpers import history_of, run_of, write_tree
from tools.loopback_cluster import LoopbackCluster
from tools.processes import descendants, is_alive, until


def small(**changes: object) -> list[str]:
    """Flags of a training of seconds; `changes` by name, with `__` for a dot and `_` for a hyphen."""
    flags = {
        "num_workers": 1, "batch_size": 4, "preprocess__size": 32, "network__stem_width": 8, "network__widths": "8,16",
        "network__depths": "1,1", "refit_epochs": 0, **changes,
    }  # fmt: skip
    return [f"--{name.replace('__', '.').replace('_', '-')}={value}" for name, value in flags.items()]


def package(folder: Path, target: Path) -> list[str]:
    """What `ray job submit --working-dir FOLDER` uploads, by Ray's own functions, into `target`; its names."""
    from ray._private.runtime_env import packaging

    packaging.create_package(str(folder), target, include_gitignore=True)
    with zipfile.ZipFile(target) as archive:
        return archive.namelist()


def test_the_upload_is_small_and_holds_what_jobs_need(tmp_path: Path) -> None:
    names = package(ROOT, tmp_path / "package.zip")
    assert (tmp_path / "package.zip").stat().st_size < 2_000_000
    assert {"jobs/train.py", "jobs/classify.py", "btray/training.py", "pyproject.toml"} <= set(names)
    assert not [name for name in names if re.match(r"\.git/|\.venv|tests/|docs/|runs/|benchmarks/|deploy/", name)]


def test_a_checkout_full_of_results_and_caches_is_no_larger(tmp_path: Path) -> None:
    checkout = tmp_path / "checkout"
    checkout.mkdir()
    for name in (".rayignore", ".gitignore"):
        (checkout / name).write_bytes((ROOT / name).read_bytes())
    for name in (".venv/lib/torch.so", ".git/objects/pack", "runs/first/model.safetensors", "btray/__pycache__/x.pyc",
                 "data/scan.jpg", ".mypy_cache/x", "models/first/model.safetensors", "results/part.parquet",
                 "spill/x.bin"):  # fmt: skip
        (checkout / name).parent.mkdir(parents=True, exist_ok=True)
        (checkout / name).write_bytes(os.urandom(300_000))
    (checkout / "jobs").mkdir()
    (checkout / "jobs" / "train.py").write_text("pass")
    (checkout / "btray" / "kept.py").write_text("pass")
    names = {name for name in package(checkout, tmp_path / "package.zip") if not name.endswith("/")}
    assert names == {".rayignore", ".gitignore", "jobs/train.py", "btray/kept.py", "spill/x.bin"}


# ---- a cluster started with `ray start`


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_tree(
        tmp_path_factory.mktemp("pictures"),
        {"train/glioma": 24, "train/no_tumor": 24, "val/glioma": 5, "val/no_tumor": 5},
    )


@pytest.fixture(scope="module")
def running() -> Iterator[LoopbackCluster]:
    with LoopbackCluster(cpus=2, settings={"RAY_JOB_STOP_WAIT_TIME_S": "60"}) as cluster:
        yield cluster


@pytest.mark.cluster
@pytest.mark.soak
@pytest.mark.timeout(900)
def test_a_submitted_job_trains_says_so_in_its_log_and_leaves_no_worker(
    running: LoopbackCluster, pictures: str, tmp_path: Path
) -> None:
    out = tmp_path / "model"
    submitted = running.ray(
        "job", "submit", "--working-dir", ".", "--runtime-env", "runtime-env.yaml", "--submission-id", "first", "--",
        sys.executable, "jobs/train.py", "--data", pictures, "--out", str(out), *small(epochs=2), timeout=400,
    )  # fmt: skip
    assert submitted.returncode == 0, submitted.stdout + submitted.stderr
    load_bundle(str(out))
    logs = running.ray("job", "logs", "first").stdout
    assert re.search(r"epoch 2/2 .*val macro-F1", logs)
    assert str(out) in logs.splitlines()[-1] or any(line == str(out) for line in logs.splitlines())
    assert "Traceback" not in logs
    assert running.get("/api/jobs/first")["status"] == "SUCCEEDED"
    until(lambda: not workers_of(running), "the job's workers to end", 60)


@pytest.mark.cluster
@pytest.mark.soak
@pytest.mark.timeout(900)
def test_a_stopped_job_has_written_a_checkpoint_within_the_epoch_and_goes_on_from_it(
    running: LoopbackCluster, pictures: str, tmp_path: Path
) -> None:
    config = TrainConfig(data=pictures, out=str(tmp_path / "model"))
    # One epoch that takes minutes: without a checkpoint within it, all would be lost.
    long = ["--epochs=1", "--num-workers=1", "--batch-size=2", "--network.widths=64,96", "--network.depths=6,6",
            "--preprocess.size=224", "--refit-epochs=0"]  # fmt: skip
    data = many_times(pictures, 40, tmp_path / "many")
    command = [sys.executable, "jobs/train.py", "--data", data, "--out", config.out, *long]
    submitted = running.ray("job", "submit", "--no-wait", "--working-dir", ".", "--submission-id", "long", "--",
                            *command)  # fmt: skip
    assert submitted.returncode == 0, submitted.stderr
    until(lambda: workers_of(running), "training to begin", 240)
    until(lambda: Path(run_of(config), "run.json").exists(), "the run to be claimed", 120)
    time.sleep(8)  # into the epoch; where it is too soon the checkpoint is of the first step
    before = time.monotonic()
    stopped = running.ray("job", "stop", "long", timeout=120)
    assert stopped.returncode == 0, stopped.stdout + stopped.stderr
    until(lambda: running.get("/api/jobs/long")["status"] == "STOPPED", "the job to be stopped", 90)
    took = time.monotonic() - before
    assert took < 60, "killed, not stopped"
    assert "goes on" in running.ray("job", "logs", "long").stdout
    (name,) = [path.name for path in Path(run_of(config)).glob("epoch_*")]
    state = torch.load(Path(run_of(config), name, "state.pt"), weights_only=True)
    assert state["steps"] > 0
    assert history_of(config) == []
    until(lambda: not workers_of(running), "the job's workers to end", 60)


def many_times(tree: str, times: int, folder: Path) -> str:
    """A tree with so many copies of each training picture of `tree`, and its held-out ones once: long epochs."""
    for path in sorted(Path(tree).rglob("*.png")):
        below = path.relative_to(tree)
        for number in range(times if below.parts[0] == "train" else 1):
            copy = folder / below.with_name(f"{number}-{below.name}")
            copy.parent.mkdir(parents=True, exist_ok=True)
            os.link(path, copy)
    return str(folder)


def workers_of(cluster: LoopbackCluster) -> list[int]:
    """Processes of the cluster in which Ray Train trains."""
    found = []
    for node in cluster.nodes:
        for pid in node.pids():
            try:
                if b"RayTrainWorker" in Path(f"/proc/{pid}/cmdline").read_bytes():
                    found.append(pid)
            except OSError:
                continue
    return found


@pytest.mark.cluster
@pytest.mark.soak
@pytest.mark.timeout(900)
def test_a_job_finds_the_cluster_that_runs_here_by_itself(
    running: LoopbackCluster, pictures: str, tmp_path: Path
) -> None:
    command = [sys.executable, str(ROOT / "jobs" / "train.py"), "--data", pictures, "--out", str(tmp_path / "model")]
    job = subprocess.Popen([*command, *small(epochs=2)], env=running.environment, stdout=subprocess.PIPE,
                           stderr=subprocess.STDOUT, text=True)  # fmt: skip
    seen_there = until(lambda: workers_of(running) or job.poll() is not None, "workers in the cluster", 240)
    started = descendants(job.pid)
    output, _ = job.communicate(timeout=240)
    assert job.returncode == 0, output
    assert seen_there is not True, "it trained somewhere else"
    assert not [pid for pid in started if is_alive(pid)]
    assert running.alive() == 1


@pytest.mark.cluster
@pytest.mark.soak
@pytest.mark.timeout(600)
def test_a_job_without_a_cluster_starts_one_and_leaves_no_process(pictures: str, tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "jobs" / "train.py"), "--data", pictures, "--out", str(tmp_path / "model")]
    environment = os.environ | {"RAY_ADDRESS": "local", "RAY_AUTH_MODE": "disabled", "PYTHONPATH": str(ROOT)}
    started: set[int] = set()
    job = subprocess.Popen([*command, *small(epochs=1)], env=environment, stdout=subprocess.DEVNULL,
                           stderr=subprocess.DEVNULL)  # fmt: skip
    while job.poll() is None:
        started |= descendants(job.pid)
        time.sleep(0.2)
    assert job.returncode == 0
    assert len(started) > 3
    until(lambda: not [pid for pid in started if is_alive(pid)], "what the job started to end", 30)


# ---- GPUs that are not there yet


@pytest.mark.cluster
def test_gpus_are_refused_where_the_job_started_its_ray_and_awaited_where_it_joined_one(
    ray_session: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    assert btray_cluster.is_own()
    with pytest.raises(UserError, match=r"^--use-gpu: .*leave it out, or connect"):
        btray_cluster.require_gpus()
    monkeypatch.setattr(btray_cluster, "is_own", lambda: False)
    with caplog.at_level("WARNING"):
        assert btray_cluster.require_gpus() == 0
    assert "waits until its autoscaler" in caplog.text


@pytest.mark.cluster
@pytest.mark.soak
@pytest.mark.timeout(600)
def test_a_classification_that_is_stopped_ends_in_order_and_the_same_command_goes_on(
    running: LoopbackCluster, tmp_path: Path
) -> None:
    model = saved_bundle(tmp_path / "model")
    archive = tmp_path / "archive"
    archive.mkdir()
    for number in range(4000):
        (archive / f"{number:04d}.jpg").write_bytes(phantoms.encoded_phantom("glioma", number % 8))
    output = str(tmp_path / "results")
    command = [sys.executable, str(ROOT / "jobs" / "classify.py"), "--model", model.uri, "--input", str(archive)]
    command += ["--output", output, "--batch-size=8"]
    environment = running.environment_of_jobs()
    job = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    until(lambda: part_files(output) or job.poll() is not None, "the first part", 240)
    job.terminate()
    _, said = job.communicate(timeout=60)
    assert job.returncode == 143, said
    assert "stopped by SIGTERM, in order" in said
    assert "Traceback" not in said
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    assert "taking up run" in done.stderr
    assert current(output, columns=["uri"]).num_rows == 4000
