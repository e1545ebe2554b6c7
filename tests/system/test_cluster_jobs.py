"""Jobs on clusters: what is uploaded, `ray job submit` and `ray job stop`, and that nothing is left behind."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
import urllib.request
import zipfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
import torch

from btray import phantoms
from btray.bulk import pipeline
from btray.core import cluster as btray_cluster
from btray.core.config import SUBMITTED_VARIABLE
from btray.core.errors import UserError
from btray.model.bundle import load_bundle
from btray.model.shipped import FOLDER
from btray.results import current
from btray.training.config import TrainConfig
from btray.training.plan import run_folder
from tests.conftest import ROOT
from tests.helpers.classify_helpers import part_files
from tests.helpers.tiny_bundle import saved_bundle
from tests.helpers.training_helpers import history_of, write_tree
from tools.loopback_cluster import LoopbackCluster, free_ports
from tools.processes import descendants, is_alive, named, until


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
    assert (tmp_path / "package.zip").stat().st_size < 8_000_000  # of which the shipped model takes at most 6
    assert {str(path.relative_to(ROOT)) for path in FOLDER.rglob("*") if path.is_file()} <= set(names)
    assert {"jobs/train.py", "jobs/classify.py", "btray/training/job.py", "pyproject.toml"} <= set(names)
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
    # One long epoch: without a checkpoint within it, all would be lost.
    long = ["--epochs=1", "--num-workers=1", "--batch-size=2", "--network.widths=32,48", "--network.depths=4,4",
            "--preprocess.size=160", "--refit-epochs=0"]  # fmt: skip
    copies = 60
    data = many_times(pictures, copies, tmp_path / "many")
    command = [sys.executable, "jobs/train.py", "--data", data, "--out", config.out, *long]
    submitted = running.ray("job", "submit", "--no-wait", "--working-dir", ".", "--submission-id", "long", "--",
                            *command)  # fmt: skip
    assert submitted.returncode == 0, submitted.stderr
    until(lambda: workers_of(running), "training to begin", 240)
    until(lambda: Path(run_folder(config), "run.json").exists(), "the run to be claimed", 120)
    time.sleep(8)  # into the epoch; where it is too soon the checkpoint is of the first step
    before = time.monotonic()
    stopped = running.ray("job", "stop", "long", timeout=120)
    assert stopped.returncode == 0, stopped.stdout + stopped.stderr
    until(lambda: running.get("/api/jobs/long")["status"] == "STOPPED", "the job to be stopped", 90)
    took = time.monotonic() - before
    assert took < 60, "killed, not stopped"
    assert "resumes it" in running.ray("job", "logs", "long").stdout
    (name,) = [path.name for path in Path(run_folder(config)).glob("epoch_*")]
    state = torch.load(Path(run_folder(config), name, "state.pt"), weights_only=True)
    assert state["steps"] > 0
    assert history_of(config) == []
    until(lambda: not workers_of(running), "the job's workers to end", 60)
    again = running.ray("job", "submit", "--working-dir", ".", "--submission-id", "long-again", "--", *command,
                        timeout=600)  # fmt: skip
    assert again.returncode == 0, again.stdout + again.stderr
    (record,) = history_of(config)
    assert record.images == 48 * copies - 2 * state["steps"], "what was done before the stop is not done again"
    load_bundle(config.out)


# Flags, and what lies in OUT afterwards.
JOBS = {
    "audit": (["--data=DATA", "--out=OUT"], "report.html"),
    "tune": (
        ["--data=DATA", "--out=OUT", *small(epochs=2), "--trials=2", "--grace=1", "--search=random"],
        "trials.csv",
    ),
    "evaluate": (["--model=MODEL", "--data=DATA", "--out=OUT"], "metrics.json"),
    "classify": (["--model=MODEL", "--input=DATA", "--output=OUT"], "_runs"),
    "pack": (["--input=DATA", "--output=OUT"], "_runs"),
}


@pytest.mark.cluster
@pytest.mark.soak
@pytest.mark.timeout(900)
@pytest.mark.parametrize("script", JOBS)
def test_every_job_runs_when_it_is_submitted(
    running: LoopbackCluster, pictures: str, tmp_path: Path, script: str
) -> None:
    flags, made = JOBS[script]
    model, out = tmp_path / "model", tmp_path / "out"
    saved_bundle(model)
    for name, path in (("MODEL", model), ("DATA", Path(pictures)), ("OUT", out)):
        flags = [flag.replace(f"={name}", f"={path}") for flag in flags]
    submitted = running.ray(
        "job", "submit", "--working-dir", ".", "--runtime-env", "runtime-env.yaml", "--submission-id", script, "--",
        sys.executable, f"jobs/{script}.py", *flags, timeout=600,
    )  # fmt: skip
    assert submitted.returncode == 0, submitted.stdout + submitted.stderr
    assert (out / made).exists()
    logs = running.ray("job", "logs", script).stdout
    assert str(out) in logs.splitlines(), "the last line of a job is the URI of what it made"
    assert "Traceback" not in logs


@pytest.mark.cluster
@pytest.mark.soak
@pytest.mark.timeout(600)
def test_a_submitted_service_answers_until_it_is_stopped(running: LoopbackCluster, tmp_path: Path) -> None:
    saved_bundle(tmp_path / "model")
    (port,) = free_ports(1)
    submitted = running.ray(
        "job", "submit", "--no-wait", "--working-dir", ".", "--submission-id", "serve", "--",
        sys.executable, "jobs/serve.py", "--model", str(tmp_path / "model"), "--port", str(port),
    )  # fmt: skip
    assert submitted.returncode == 0, submitted.stderr

    def answers() -> bool:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/readyz", timeout=5) as answer:
                return bool(answer.status == 200)
        except OSError:
            return False

    def status() -> str:
        return str(running.get("/api/jobs/serve")["status"])

    until(lambda: answers() or status() not in ("PENDING", "RUNNING"), "the service to answer", 300)
    assert answers(), running.ray("job", "logs", "serve").stdout
    assert running.ray("job", "stop", "serve", timeout=120).returncode == 0
    until(lambda: status() == "STOPPED", "the job to be stopped", 90)
    assert not answers()


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
def test_a_job_without_a_cluster_starts_one_leaves_no_process_and_logs_pure_json(pictures: str, tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "jobs" / "train.py"), "--data", pictures, "--out", str(tmp_path / "model")]
    environment = os.environ | {"RAY_ADDRESS": "local", "RAY_AUTH_MODE": "disabled", "PYTHONPATH": str(ROOT)}
    started: set[int] = set()
    with (tmp_path / "said").open("w") as said:
        job = subprocess.Popen([*command, *small(epochs=2), "--log-format=json"], env=environment,
                               stdout=subprocess.DEVNULL, stderr=said)  # fmt: skip
        while job.poll() is None:
            started |= descendants(job.pid)
            time.sleep(0.2)
    assert job.returncode == 0
    assert len(started) > 3
    until(lambda: not [pid for pid in started if is_alive(pid)], "what the job started to end", 30)
    lines = [json.loads(line) for line in (tmp_path / "said").read_text().splitlines() if line.startswith("{")]
    ended = [line["epoch"] for line in lines if line["message"] == "epoch ended"]
    assert ended == [1, 2], "the worker's lines are whole, and each comes once"
    assert {line["run_id"] for line in lines if line["logger"] == "btray.training.tracking"} == {"train"}


_OWN = """
import os, ray
from btray.core.cluster import connected
from ray._private.services import canonicalize_bootstrap_address_or_die
from tools.processes import descendants, listened_on, named

@ray.remote
def task():
    return canonicalize_bootstrap_address_or_die(None), os.environ["RAY_AUTH_MODE"], os.environ["RAY_AUTH_TOKEN"]

before = dict(os.environ)
with connected():
    found, mode, token = ray.get(task.remote())
    print(found == ray.get_runtime_context().gcs_address, mode, len(token))
    listeners = listened_on(descendants(os.getpid()) | {os.getpid()})
    print({address for address, _ in listeners}, len(named(b"dashboard.py", os.getpid())))
print(len(descendants(os.getpid())), {name for name in before if before[name] != os.environ.get(name)})
print({name for name in os.environ if name.startswith("RAY_")} - {*before})
"""


@pytest.mark.cluster
@pytest.mark.slow
def test_a_ray_that_a_job_starts_shares_nothing_with_that_of_ray_start(tmp_path: Path) -> None:
    """A new user's first hour: a job alone, then `ray start` and `ray job submit`, with no token anywhere."""
    home = {"HOME": str(tmp_path), "PYTHONPATH": str(ROOT)}
    cluster = LoopbackCluster(cpus=1, settings=home)
    del cluster.environment["RAY_AUTH_MODE"]
    # As if that Ray ran already: this is how Ray finds it.
    (cluster.folder / "ray").mkdir()
    (cluster.folder / "ray" / "ray_current_cluster").write_text("127.0.0.1:1")
    done = subprocess.run([sys.executable, "-c", _OWN], env=cluster.environment | {"RAY_ADDRESS": "local"},
                          capture_output=True, text=True, check=False, timeout=200)  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["True token 64", "{'127.0.0.1'} 0", "0 set()", "set()"]
    assert not (tmp_path / ".ray").exists()
    with cluster:
        script = f"import os; print('submitted:', {SUBMITTED_VARIABLE!r} in os.environ)"
        submitted = cluster.ray("job", "submit", "--", sys.executable, "-c", script)
    assert submitted.returncode == 0, submitted.stderr
    assert "submitted: True" in submitted.stdout
    assert not (tmp_path / ".ray").exists()
    (command,) = re.findall(r"^(\(umask.*?\)) ", (ROOT / "README.md").read_text(), re.MULTILINE)
    subprocess.run(["bash", "-ec", command], env=cluster.environment, check=True, timeout=100)
    assert (tmp_path / ".ray").stat().st_mode & 0o777 == 0o700
    assert (tmp_path / ".ray" / "auth_token").stat().st_mode & 0o777 == 0o600


# ---- clusters that grow


@pytest.mark.parametrize(
    ("cpus", "own", "wanted", "expected"),
    [
        (4, True, None, (4, 4)),
        (4, True, 9, (4, 4)),
        (4, True, 2, (2, 2)),
        (4, False, None, (4, None)),
        (4, False, 9, (4, 9)),
        (1, False, None, (1, None)),
    ],
)
def test_a_pool_of_actors_fills_the_machine_or_grows_with_the_cluster(
    monkeypatch: pytest.MonkeyPatch, cpus: int, own: bool, wanted: int | None, expected: tuple[int, int | None]
) -> None:
    monkeypatch.setattr(pipeline, "cpus", lambda: float(cpus))
    monkeypatch.setattr(pipeline, "started_ray_here", lambda: own)
    assert pipeline.count_actors(wanted) == expected


@pytest.mark.cluster
@pytest.mark.soak
@pytest.mark.timeout(900)
def test_a_classification_begun_on_a_head_without_cpus_grows_over_the_nodes_that_come(tmp_path: Path) -> None:
    """As an autoscaler adds them; Ray's own, with the nodes it fakes, does not last for the length of a test."""
    model = saved_bundle(tmp_path / "model")
    archive = tmp_path / "archive"
    archive.mkdir()
    for seed in range(8):
        (tmp_path / f"{seed}.jpg").write_bytes(phantoms.encoded_phantom("glioma", seed))
    for number in range(40_000):  # more than a minute for one core: nodes join slowly
        os.link(tmp_path / f"{number % 8}.jpg", archive / f"{number:05d}.jpg")
    command = [sys.executable, str(ROOT / "jobs" / "classify.py"), "--model", model.uri, "--input", str(archive)]
    command += ["--output", str(tmp_path / "results"), "--batch-size=8"]
    with LoopbackCluster(cpus=0) as cluster, (tmp_path / "log").open("w") as log:
        job = subprocess.Popen(command, env=cluster.environment_of_jobs(), stdout=log, stderr=log)
        until(lambda: (tmp_path / "results" / "_runs").exists() or job.poll() is not None, "the run to begin", 120)
        nodes = [cluster.add(cpus=1) for _ in range(2)]
        for node in nodes:
            at_work = partial(named, b"PartActor", node.process.pid)
            until(lambda at_work=at_work: at_work() or job.poll() is not None, "an actor at work on each node", 300)
        assert job.poll() is None, (tmp_path / "log").read_text()
        assert job.wait(400) == 0, (tmp_path / "log").read_text()
    assert current(str(tmp_path / "results"), columns=["uri"]).num_rows == 40_000


# ---- GPUs that are not there yet


@pytest.mark.cluster
def test_gpus_are_refused_where_the_job_started_its_ray_and_awaited_where_it_joined_one(
    ray_session: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    assert btray_cluster.started_ray_here()
    with pytest.raises(UserError, match=r"^--use-gpu: .*leave it out, or connect"):
        btray_cluster.require_gpus()
    monkeypatch.setattr(btray_cluster, "started_ray_here", lambda: False)
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
    assert "resuming run" in done.stderr
    assert current(output, columns=["uri"]).num_rows == 4000
