"""Break connections, servers and files in mid-download: what arrives is whole and right, or nothing arrives."""

from __future__ import annotations

import fcntl
import hashlib
import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from btray.acquire.download import Retries, download, without_secrets
from btray.core.errors import UserError
from tests.helpers.http_files import FileServer, Misbehaviour

CONTENT = random.Random(0).randbytes(400_000)
SHA = hashlib.sha256(CONTENT).hexdigest()
QUICK = Retries(attempts=3, first_wait=0.001, longest_wait=0.01)
GIVE_UP = Retries(attempts=1, first_wait=0.001, longest_wait=0.01)


@pytest.fixture
def server() -> Iterator[FileServer]:
    with FileServer(CONTENT) as running:
        yield running


def test_a_file_arrives_whole_and_leaves_no_part(server: FileServer, tmp_path: Path) -> None:
    path = download(server.url(), tmp_path, sha256=SHA)
    assert path.read_bytes() == CONTENT
    assert path.name.endswith("-set.zip")
    assert not list(tmp_path.glob("*.part"))


def test_a_cut_connection_is_taken_up_and_no_byte_is_sent_twice(server: FileServer, tmp_path: Path) -> None:
    server.plan = [Misbehaviour(cut_after=150_000), Misbehaviour(cut_after=150_000)]
    assert download(server.url(), tmp_path, retries=QUICK).read_bytes() == CONTENT
    assert [request.status for request in server.requests] == [200, 206, 206]
    assert server.sent == len(CONTENT)


def test_the_next_run_takes_up_what_the_last_one_left(server: FileServer, tmp_path: Path) -> None:
    server.plan = [Misbehaviour(cut_after=300_000), Misbehaviour(status=503)]
    with pytest.raises(UserError, match="continue from the 300000 bytes"):
        download(server.url(), tmp_path, retries=GIVE_UP)
    assert download(server.url(), tmp_path, sha256=SHA).read_bytes() == CONTENT
    assert server.requests[-1].sent == 100_000


def test_more_cuts_than_attempts_do_no_harm_while_bytes_come(server: FileServer, tmp_path: Path) -> None:
    server.always = Misbehaviour(cut_after=40_000)
    assert download(server.url(), tmp_path, retries=QUICK).read_bytes() == CONTENT
    assert len(server.requests) == 10


@pytest.mark.parametrize("ignore_if_range", [False, True])
def test_a_file_that_changes_in_the_middle_is_never_stitched(
    server: FileServer, tmp_path: Path, ignore_if_range: bool
) -> None:
    other = random.Random(1).randbytes(400_000)

    def change(number: int) -> None:
        if number == 1:
            server.content = other

    server.before_answer = change
    server.plan = [Misbehaviour(cut_after=100_000), Misbehaviour(ignore_if_range=ignore_if_range)]
    assert download(server.url(), tmp_path, retries=QUICK).read_bytes() == other


@pytest.mark.parametrize("content_range", ["bytes 99999-399999/400000", "bytes 100000-399999/400001", "", "rubbish"])
def test_a_range_that_was_not_asked_for_is_not_taken(server: FileServer, tmp_path: Path, content_range: str) -> None:
    server.plan = [Misbehaviour(cut_after=100_000), Misbehaviour(headers={"Content-Range": content_range})]
    assert download(server.url(), tmp_path, retries=QUICK).read_bytes() == CONTENT


def test_a_server_without_ranges_is_asked_for_the_whole_again_but_not_for_ever(
    server: FileServer, tmp_path: Path
) -> None:
    server.plan = [Misbehaviour(cut_after=100_000), Misbehaviour(no_range=True)]
    assert download(server.url("a.zip"), tmp_path, retries=QUICK).read_bytes() == CONTENT
    server.always = Misbehaviour(cut_after=100_000, no_range=True)
    with pytest.raises(UserError, match="brought nothing new"):
        download(server.url("b.zip"), tmp_path, retries=QUICK)
    assert len(server.requests) < 10


def test_without_a_version_nothing_is_stitched(server: FileServer, tmp_path: Path) -> None:
    server.always = Misbehaviour(headers={"ETag": ""})
    server.plan = [Misbehaviour(cut_after=100_000, headers={"ETag": ""})]
    assert download(server.url(), tmp_path, retries=QUICK).read_bytes() == CONTENT
    assert "Range" not in server.requests[1].headers


def test_a_weak_etag_is_no_basis_for_resuming(server: FileServer, tmp_path: Path) -> None:
    server.plan = [Misbehaviour(cut_after=100_000, headers={"ETag": 'W/"1"'})]
    assert download(server.url(), tmp_path, retries=QUICK).read_bytes() == CONTENT
    assert "Range" not in server.requests[1].headers


def test_416_starts_over(server: FileServer, tmp_path: Path) -> None:
    server.plan = [Misbehaviour(cut_after=100_000), Misbehaviour(status=416)]
    assert download(server.url(), tmp_path, retries=QUICK).read_bytes() == CONTENT


def test_a_length_that_is_never_delivered_is_noticed(server: FileServer, tmp_path: Path) -> None:
    server.always = Misbehaviour(headers={"Content-Length": "500000"}, no_range=True)
    with pytest.raises(UserError, match="gave up"):
        download(server.url(), tmp_path, retries=QUICK)
    assert not [path for path in tmp_path.iterdir() if path.name.endswith("set.zip")]


def test_a_length_that_is_too_short_is_caught_by_the_digest(server: FileServer, tmp_path: Path) -> None:
    server.always = Misbehaviour(headers={"Content-Length": "399999"})
    with pytest.raises(UserError, match=SHA):
        download(server.url(), tmp_path, sha256=SHA, retries=QUICK)


def test_a_wrong_digest_names_both_and_leaves_no_file(server: FileServer, tmp_path: Path) -> None:
    expected = "0" * 64
    with pytest.raises(UserError, match=f"{SHA}, expected {expected}"):
        download(server.url(), tmp_path, sha256=expected)
    assert not [path for path in tmp_path.iterdir() if path.name.endswith((".zip", ".part"))]


def test_a_whole_file_is_not_fetched_again_while_it_is_current(server: FileServer, tmp_path: Path) -> None:
    download(server.url(), tmp_path)
    download(server.url(), tmp_path, sha256=SHA)
    assert len(server.requests) == 1  # the digest is enough
    download(server.url(), tmp_path)
    assert (server.requests[-1].status, server.sent) == (304, len(CONTENT))
    server.content = b"new"
    assert download(server.url(), tmp_path).read_bytes() == b"new"


def test_a_cached_file_that_was_damaged_is_fetched_again(server: FileServer, tmp_path: Path) -> None:
    path = download(server.url(), tmp_path)
    path.write_bytes(CONTENT[:-1] + b"?")
    assert download(server.url(), tmp_path, sha256=SHA).read_bytes() == CONTENT
    path.write_bytes(CONTENT[:-1])
    assert download(server.url(), tmp_path).read_bytes() == CONTENT


@pytest.mark.parametrize("status", [401, 403, 404, 410])
def test_a_refusal_is_not_repeated(server: FileServer, tmp_path: Path, status: int) -> None:
    server.always = Misbehaviour(status=status)
    with pytest.raises(UserError, match=str(status)):
        download(server.url(), tmp_path)
    assert len(server.requests) == 1


@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_passing_failure_is_repeated_a_bounded_number_of_times(
    server: FileServer, tmp_path: Path, status: int
) -> None:
    server.plan = [Misbehaviour(status=status, headers={"Retry-After": "3600"})] * 2
    assert download(server.url("a.zip"), tmp_path, retries=QUICK).read_bytes() == CONTENT
    server.always = Misbehaviour(status=status)
    with pytest.raises(UserError, match=f"after 3 requests.*{status}"):
        download(server.url("b.zip"), tmp_path, retries=QUICK)


def test_nobody_there_is_one_line(tmp_path: Path) -> None:
    with FileServer(b"") as server:
        url = server.url()
    with pytest.raises(UserError, match="gave up") as caught:
        download(url, tmp_path, retries=GIVE_UP)
    assert "\n" not in str(caught.value)


def test_two_processes_do_not_write_one_download(server: FileServer, tmp_path: Path) -> None:
    path = download(server.url(), tmp_path)
    with path.with_name(path.name + ".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="another process"):
            download(server.url(), tmp_path)


def test_no_secret_of_an_address_is_shown(server: FileServer, tmp_path: Path) -> None:
    shown = without_secrets("https://me:pw@host:8/a.zip?download=1&X-Amz-Signature=abc&X-Amz-Credential=d")
    assert shown == "https://host:8/a.zip?download=1&X-Amz-Signature=REDACTED&X-Amz-Credential=REDACTED"
    plain = "https://host/a%20b.zip?download=1#x"
    assert without_secrets(plain) == plain
    server.always = Misbehaviour(status=404)
    with pytest.raises(UserError, match="404") as caught:
        download(server.url("a.zip?token=hush"), tmp_path)
    assert "hush" not in str(caught.value)
    with FileServer(b"") as gone:
        url = gone.url("a.zip?token=hush")
    with pytest.raises(UserError) as caught:
        download(url, tmp_path, retries=GIVE_UP)
    assert "hush" not in str(caught.value)
