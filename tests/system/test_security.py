"""With its token on, Ray accepts only authorised requests; and no secret is written anywhere."""

from __future__ import annotations

import os
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.helpers.training_helpers import write_tree
from tools.loopback_cluster import BIN, LoopbackCluster
from tools.s3_server import S3Server

pytestmark = [pytest.mark.cluster, pytest.mark.soak, pytest.mark.timeout(900)]

TOKEN = "0123456789abcdef" * 4  # Ray requires 64 hexadecimal digits


class Guarded(LoopbackCluster):
    """A cluster with token authentication on."""

    def get(self, path: str, token: str | None = TOKEN) -> object:
        opener = urllib.request.build_opener()
        opener.addheaders = [("Authorization", f"Bearer {token}")] if token else []
        urllib.request.install_opener(opener)
        try:
            return super().get(path)
        finally:
            urllib.request.install_opener(urllib.request.build_opener())


@pytest.fixture(scope="module")
def guarded(s3: S3Server) -> Iterator[Guarded]:
    with Guarded(cpus=2, settings={"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": TOKEN}) as cluster:
        yield cluster


def test_without_the_token_and_with_a_wrong_one_nobody_is_let_in(guarded: Guarded) -> None:
    assert guarded.get("/api/version")
    for token in (None, "f" * 64):
        for path in ("/api/jobs/", "/nodes?view=summary"):
            with pytest.raises(urllib.error.HTTPError) as refused:
                guarded.get(path, token)
            assert refused.value.code in (401, 403)
    for settings in ({"RAY_AUTH_MODE": "disabled"}, {"RAY_AUTH_TOKEN": "f" * 64}):
        environment = guarded.environment_of_jobs() | settings
        if settings.get("RAY_AUTH_MODE"):
            del environment["RAY_AUTH_TOKEN"]
        script = "import ray; ray.init(log_to_driver=False); print('in', ray.cluster_resources())"
        done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True,
                              timeout=120, check=False)  # fmt: skip
        assert done.returncode != 0
        assert "in {" not in done.stdout


def test_a_job_is_submitted_with_the_tokens_file_and_not_without(guarded: Guarded, tmp_path: Path) -> None:
    environment = guarded.environment_of_jobs() | {
        "HOME": str(tmp_path),
        "RAY_API_SERVER_ADDRESS": f"http://127.0.0.1:{guarded.dashboard}",
    }
    del environment["RAY_AUTH_TOKEN"]
    command = [str(BIN / "ray"), "job", "submit", "--", sys.executable, "-c", "print('it', 'ran')"]

    def submitted() -> subprocess.CompletedProcess[str]:
        return subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=120,
                              check=False)  # fmt: skip

    assert submitted().returncode != 0, "there is no token yet"
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray" / "auth_token").write_text(TOKEN)
    done = submitted()
    assert done.returncode == 0, done.stderr
    assert "it ran" in done.stdout
    del environment["RAY_AUTH_MODE"]
    assert submitted().returncode != 0, "Ray now finds its token by itself: update docs/operations.md"


def test_secrets_that_a_training_on_s3_used_stand_in_no_file_afterwards(
    guarded: Guarded, s3: S3Server, bucket: str, tmp_path: Path
) -> None:
    data = write_tree(f"{bucket}/scans", {"train/glioma": 20, "train/no_tumor": 20, "val/glioma": 5, "val/no_tumor": 5})
    secret = os.environ["AWS_SECRET_ACCESS_KEY"]
    assert len(secret) >= 8
    aws = {name: value for name, value in os.environ.items() if name.startswith("AWS_")}
    command = [sys.executable, str(ROOT / "jobs" / "train.py"), "--data", data, "--out", str(tmp_path / "model")]
    command += ["--epochs=2", "--num-workers=1", "--preprocess.size=32", "--network.widths=8,16", "--refit-epochs=0"]
    command += ["--network.depths=1,1", "--network.stem-width=8", "--log-format=json"]
    with Guarded(cpus=2, settings={"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": TOKEN} | aws) as cluster:
        done = subprocess.run(command, env=cluster.environment_of_jobs(), capture_output=True, timeout=400, check=False)
        assert done.returncode == 0, done.stderr.decode()[-3000:]
        (tmp_path / "output").write_bytes(done.stdout + done.stderr)
        written = [path for folder in (tmp_path, cluster.folder) for path in folder.rglob("*") if path.is_file()]
        assert len(written) > 20
        assert any("session_" in str(path) for path in written), "Ray's own logs are among them"
        for path in written:
            body = path.read_bytes()
            for name, value in (("the secret key", secret), ("Ray's token", TOKEN)):
                assert value.encode() not in body, f"{name} is in {path}"
