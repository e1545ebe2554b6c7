"""From sources of every kind to one data set: nothing lost in silence, nothing overwritten, a rerun changes nothing."""

from __future__ import annotations

import hashlib
import io
import json
import subprocess
import sys
import unicodedata
import zipfile
from collections import Counter
from itertools import chain
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow.parquet as pq
import pytest
from pydantic import ValidationError

from btray import storage
from btray.acquire.config import AcquireConfig
from btray.acquire.job import acquire
from btray.core.errors import UserError
from btray.data.labelled import read_labelled
from tests.helpers.flat_store import flat_store
from tests.helpers.http_files import FileServer, Misbehaviour

ROOT = Path(__file__).resolve().parents[2]
SPLITS = {
    "Training/glioma_tumor/1.jpg": b"train glioma 1",
    "Training/glioma_tumor/2.jpg": b"train glioma 2",
    "Training/notumor/1.jpg": b"train none",
    "Testing/glioma_tumor/1.jpg": b"test glioma",
    "Testing/notumor/1.jpg": b"test none",
}
CLASSES = {
    "no_tumor/1.png": b"other none",
    "meningioma/a b%20#ü.png": b"other meningioma",
    "rare/IM0001": b"other rare",
}


def job(folder: Path, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, ROOT / "jobs/acquire.py", *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)


def make_tree(folder: Path, files: dict[str, bytes]) -> Path:
    for name, data in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return folder


def zipped(files: dict[str, bytes]) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name, data in files.items():
            archive.writestr(zipfile.ZipInfo(name), data)  # no time of day: the same files give the same bytes
    return file.getvalue()


def run(tmp_path: Path, *sources: str | Path, out: str | None = None, **settings: Any) -> str:
    config = AcquireConfig(
        source=tuple(map(str, sources)), out=out or str(tmp_path / "out"), cache=str(tmp_path / "cache"), **settings
    )
    return acquire(config)


def rows_of(manifest: str) -> list[dict[str, Any]]:
    return pq.read_table(io.BytesIO(storage.read_bytes(manifest))).to_pylist()


def content_of(manifest: str) -> dict[tuple[str, str, str | None], list[bytes]]:
    """Bytes of the images by source, label and split: read through the manifest."""
    base = manifest.rpartition("/")[0]
    found: dict[tuple[str, str, str | None], list[bytes]] = {}
    for row in rows_of(manifest):
        data = storage.read_bytes(storage.join(base, row["uri"]))
        found.setdefault((row["source"], row["label"], row["split"]), []).append(data)
    return {key: sorted(value) for key, value in found.items()}


def summary_of(manifest: str) -> dict[str, Any]:
    summary: dict[str, Any] = storage.read_json(manifest.replace("manifest.parquet", "dataset.json"))
    return summary


def without_dates(summary: dict[str, Any]) -> str:
    for source in summary["sources"]:
        del source["acquired_at"]
    return json.dumps(summary)


def test_two_sources_with_aliases_become_one_data_set(tmp_path: Path) -> None:
    one = make_tree(tmp_path / "one", SPLITS)
    (tmp_path / "two.zip").write_bytes(zipped(CLASSES))
    manifest = run(tmp_path, one, tmp_path / "two.zip", license=("CC0",))
    assert content_of(manifest) == {
        ("one", "glioma", "train"): [b"train glioma 1", b"train glioma 2"],
        ("one", "no_tumor", "train"): [b"train none"],
        ("one", "glioma", "test"): [b"test glioma"],
        ("one", "no_tumor", "test"): [b"test none"],
        ("two", "no_tumor", None): [b"other none"],
        ("two", "meningioma", None): [b"other meningioma"],
        ("two", "rare", None): [b"other rare"],
    }
    summary = summary_of(manifest)
    assert summary["classes"] == ["glioma", "meningioma", "no_tumor", "rare"]
    assert summary["counts"]["glioma"] == {"test": 1, "train": 2}
    assert summary["counts"]["no_tumor"] == {"test": 1, "train": 1, "unsplit": 1}
    assert summary["images"] == sum(source["images"] for source in summary["sources"]) == 8
    assert summary["bytes"] == sum(map(len, [*SPLITS.values(), *CLASSES.values()]))
    first, second = summary["sources"]
    assert (first["kind"], first["sha256"], first["license"]) == ("folder", None, "CC0")
    assert second["sha256"] == hashlib.sha256((tmp_path / "two.zip").read_bytes()).hexdigest()
    assert {source["acquired_at"][-1] for source in summary["sources"]} == {"Z"}
    assert (tmp_path / "out/images/one/Training/glioma_tumor/1.jpg").read_bytes() == b"train glioma 1"
    assert one.joinpath("Training/glioma_tumor/1.jpg").exists()  # copied, not moved


def test_the_manifest_is_read_as_training_reads_it_also_after_a_move(tmp_path: Path) -> None:
    manifest = Path(run(tmp_path, make_tree(tmp_path / "one", SPLITS)))
    moved = tmp_path / "elsewhere"
    manifest.parent.rename(moved)
    table = read_labelled(str(moved / manifest.name))
    assert sorted(Path(uri).read_bytes() for uri in table["uri"].to_pylist()) == sorted(SPLITS.values())
    assert set(table["split"].to_pylist()) == {"train", "test"}


def test_a_rerun_gives_the_same_files(tmp_path: Path) -> None:
    one, two = make_tree(tmp_path / "one", SPLITS), tmp_path / "two.zip"
    two.write_bytes(zipped(CLASSES))
    first = run(tmp_path, one, two)
    before = {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()}
    summary = without_dates(summary_of(first))
    (tmp_path / "out/images/one/Testing/notumor/1.jpg").write_bytes(b"cut o")
    (tmp_path / "out/manifest.parquet").unlink()
    assert run(tmp_path, one, two) == first
    after = {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()}
    dataset = tmp_path / "out/dataset.json"
    assert {**before, dataset: b""} == {**after, dataset: b""}
    assert without_dates(summary_of(first)) == summary
    assert not list((tmp_path / "cache").glob("unpack-*"))


def test_files_of_a_manifest_keep_the_folders_that_tell_patients_apart(tmp_path: Path) -> None:
    files = {
        f"scans/{patient}/{name}": f"{patient} {name}".encode()
        for patient in ("a", "b", "A")
        for name in ("t1.nii.gz", "slice 0.png")
    }
    folder = make_tree(tmp_path / "set", files)
    lines = [f"{name},{'no_tumor' if '/b/' in name else 'glioma'}" for name in files]
    (folder / "labels.csv").write_text("\n".join(["uri,label", *lines]))
    manifest = run(tmp_path, folder / "labels.csv")
    found = {row["uri"].split("/", 2)[2] for row in rows_of(manifest)}
    assert found == {
        "glioma/a/t1.nii.gz", "glioma/a/slice 0.png", "no_tumor/b/t1.nii.gz", "no_tumor/b/slice 0.png",
        "glioma/A/t1-2.nii.gz", "glioma/A/slice 0-2.png",
    }  # fmt: skip
    assert sorted(body for bodies in content_of(manifest).values() for body in bodies) == sorted(files.values())


def test_a_failing_source_leaves_no_manifest(tmp_path: Path) -> None:
    (tmp_path / "bad.zip").write_bytes(zipped(CLASSES)[:-30])
    with pytest.raises(UserError, match="damaged"):
        run(tmp_path, make_tree(tmp_path / "one", SPLITS), tmp_path / "bad.zip")
    assert not (tmp_path / "out/manifest.parquet").exists()
    assert not list((tmp_path / "cache").glob("unpack-*"))


def test_a_cache_that_cannot_be_is_named_before_anything_is_brought(tmp_path: Path) -> None:
    one = make_tree(tmp_path / "one", SPLITS)
    (tmp_path / "two.zip").write_bytes(zipped(CLASSES))
    (tmp_path / "cache").write_text("mine")
    with pytest.raises(UserError, match=r"^--cache .*cache is not a folder") as caught:
        run(tmp_path, one, tmp_path / "two.zip")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out" / "images").exists()
    run(tmp_path, one)  # a folder needs none


def test_the_same_source_twice_is_kept_apart(tmp_path: Path) -> None:
    one, other = make_tree(tmp_path / "a/set", CLASSES), make_tree(tmp_path / "b/SET", SPLITS)
    manifest = run(tmp_path, one, one, other)
    assert {row["source"] for row in rows_of(manifest)} == {"set", "set-2", "SET-3"}
    assert len(rows_of(manifest)) == 2 * len(CLASSES) + len(SPLITS)


def test_names_can_be_chosen(tmp_path: Path) -> None:
    manifest = run(tmp_path, make_tree(tmp_path / "one", CLASSES), name=("site-a",))
    assert {row["source"] for row in rows_of(manifest)} == {"site-a"}


def test_everything_that_is_not_taken_is_counted_and_named(tmp_path: Path) -> None:
    rest = {
        "README.md": b"x",
        "Training/glioma_tumor/notes.txt": b"x",
        "Training/glioma_tumor/more.zip": b"x",
        "Training/notumor/.DS_Store": b"x",
        "__MACOSX/Training/1.jpg": b"x",
        "loose.jpg": b"x",
    }
    reasons = {"no_image": 2, "archive_inside": 1, "hidden": 2, "no_class_folder": 1}
    make_tree(tmp_path / "one", SPLITS | rest)
    (tmp_path / "two.zip").write_bytes(zipped(SPLITS | rest))
    manifest = run(tmp_path, tmp_path / "one", tmp_path / "two.zip")
    for source in summary_of(manifest)["sources"]:
        assert source["left_out"]["reasons"] == reasons
        assert {item["name"] for item in source["left_out"]["files"]} == set(rest)
    assert len(rows_of(manifest)) == 2 * len(SPLITS)


def test_the_list_of_files_left_out_is_bounded_and_their_count_is_not(tmp_path: Path) -> None:
    rest = {f"notumor/{number}.txt": b"" for number in range(500)}
    (tmp_path / "one.zip").write_bytes(zipped(CLASSES | rest))
    left_out = summary_of(run(tmp_path, tmp_path / "one.zip"))["sources"][0]["left_out"]
    assert left_out["count"] == 500
    assert len(left_out["files"]) == 200


@pytest.mark.parametrize("wrapper", ["", "wrap/", "a/b c/Brain Tumor MRI/"])
def test_the_class_tree_is_found_below_wrapper_folders(tmp_path: Path, wrapper: str) -> None:
    beside = {"docs/figure.png": b"x"} if wrapper else {}
    (tmp_path / "one.zip").write_bytes(zipped({wrapper + name: data for name, data in SPLITS.items()} | beside))
    manifest = run(tmp_path, tmp_path / "one.zip")
    assert sorted(row["uri"] for row in rows_of(manifest)) == sorted(f"images/one/{name}" for name in SPLITS)
    assert summary_of(manifest)["sources"][0]["left_out"]["reasons"] == ({"outside_class_tree": 1} if wrapper else {})


def test_folders_of_one_class_are_merged_and_no_image_of_theirs_is_lost(tmp_path: Path) -> None:
    names = [
        "Glioma/1.png",
        "glioma/1.png",
        "glioma/p/1.png",
        "M\u00e9ta/1.png",
        "Me\u0301ta/1.png",
        "glioma tumor/1.png",
    ]
    source = make_tree(tmp_path / "one", {name: name.encode() for name in names})
    manifest = run(tmp_path, source)
    assert Counter(row["label"] for row in rows_of(manifest)) == {"glioma": 4, "m\u00e9ta".title(): 2}
    stored = {storage.join(str(tmp_path / "out"), row["uri"]) for row in rows_of(manifest)}
    assert {storage.read_bytes(uri).decode() for uri in stored} == set(names)
    assert len({unicodedata.normalize("NFC", uri).casefold() for uri in stored}) == len(names)


def test_a_manifest_is_a_source_and_its_names_do_not_collide(tmp_path: Path) -> None:
    make_tree(tmp_path / "x", {"p/1.png": b"p1", "q/1.png": b"q1", "q/2.png": b"q2"})
    (tmp_path / "list.csv").write_text(
        "uri,label,split,patient_id\nx/p/1.png,glioma_tumor,train,7\nx/q/1.png,glioma,train,8\nx/q/2.png,notumor,test,\n"
    )
    manifest = run(tmp_path, tmp_path / "list.csv")
    assert content_of(manifest) == {
        ("list", "glioma", "train"): [b"p1", b"q1"],
        ("list", "no_tumor", "test"): [b"q2"],
    }
    assert {row["patient_id"] for row in rows_of(manifest)} == {"7", "8", None}


def test_a_manifest_names_the_sources_of_its_images_and_a_tree_is_named_after_its_folder(tmp_path: Path) -> None:
    make_tree(tmp_path / "x", {"1.png": b"m1", "2.png": b"m2", "3.png": b"m3"})
    (tmp_path / "list.csv").write_text("uri,label,source\nx/1.png,glioma,f44\nx/2.png,glioma,web\nx/3.png,glioma,\n")
    manifest = run(tmp_path, tmp_path / "list.csv", make_tree(tmp_path / "hospital", SPLITS))
    table = read_labelled(manifest)
    assert Counter(table["source"].to_pylist()) == {"f44": 1, "web": 1, "list": 1, "hospital": len(SPLITS)}
    again = read_labelled(run(tmp_path, manifest, out=str(tmp_path / "again")))
    assert Counter(again["source"].to_pylist()) == Counter(table["source"].to_pylist())


def test_a_manifest_of_one_class_is_a_source_beside_others(tmp_path: Path) -> None:
    make_tree(tmp_path / "x", {"1.png": b"m1"})
    (tmp_path / "list.csv").write_text("uri,label\nx/1.png,metastasis\n")
    manifest = run(tmp_path, tmp_path / "list.csv", make_tree(tmp_path / "one", SPLITS))
    assert content_of(manifest)["list", "metastasis", None] == [b"m1"]


def test_an_acquired_data_set_is_a_source_again(tmp_path: Path) -> None:
    first = run(tmp_path, make_tree(tmp_path / "one", SPLITS))
    second = run(tmp_path, first, out=str(tmp_path / "second"))
    assert sorted(chain.from_iterable(content_of(second).values())) == sorted(SPLITS.values())


def test_a_folder_with_a_manifest_is_what_the_manifest_says(tmp_path: Path) -> None:
    files = {"a/1.png": b"a1", "a/2.png": b"a2", "b/1.png": b"b1"}
    folder = make_tree(tmp_path / "one", files | {"manifest.csv": b"uri,label\na/1.png,glioma\nb/1.png,other\n"})
    manifest = run(tmp_path, folder)
    assert content_of(manifest) == {("one", "glioma", None): [b"a1"], ("one", "other", None): [b"b1"]}
    left_out = summary_of(manifest)["sources"][0]["left_out"]["files"]
    assert left_out == [{"name": "a/2.png", "reason": "not_in_manifest"}]


def test_a_manifest_in_an_archive_reaches_no_file_of_this_machine(tmp_path: Path) -> None:
    secret = make_tree(tmp_path, {"secret/key": b"secret"}) / "secret/key"
    (tmp_path / "evil.zip").write_bytes(zipped(SPLITS | {"manifest.csv": f"uri,label\n{secret},glioma\n".encode()}))
    manifest = run(tmp_path, tmp_path / "evil.zip")
    assert len(rows_of(manifest)) == len(SPLITS)
    assert summary_of(manifest)["sources"][0]["left_out"]["files"] == [{"name": "manifest.csv", "reason": "no_image"}]


def test_a_source_may_bring_one_class_alone(tmp_path: Path) -> None:
    one = make_tree(tmp_path / "one", SPLITS)
    (tmp_path / "two.zip").write_bytes(zipped({"Metastases/1.png": b"m1", "Metastases/p2/2.png": b"m2"}))
    manifest = run(tmp_path, one, tmp_path / "two.zip")
    assert content_of(manifest)["two", "metastasis", None] == [b"m1", b"m2"]


def test_a_tree_is_labelled_as_training_labels_it(tmp_path: Path) -> None:
    names = [
        "TRAIN/Glioma_Tumor/p1/s2/1",
        "train/no tumour/1.png",
        "Valid/x/1.png",
        "testing/none/1.dcm",
        "glioma/a.png",
    ]
    names += ["test/loose.png", "loose.png", "Brain Metastases/test/1.png"]
    tree = make_tree(tmp_path / "tree", dict.fromkeys(names, b"x"))
    base = f"{tree}/"
    expected = {
        (row["uri"].removeprefix(base), row["label"], row["split"]) for row in read_labelled(str(tree)).to_pylist()
    }
    found = {
        (row["uri"].removeprefix("images/tree/"), row["label"], row["split"]) for row in rows_of(run(tmp_path, tree))
    }
    assert found == expected
    assert len(found) == 6


def test_an_unreadable_file_is_named_and_the_rest_is_taken(tmp_path: Path) -> None:
    one = make_tree(tmp_path / "one", SPLITS)
    (one / "Training/notumor/gone.jpg").symlink_to(tmp_path / "nowhere")
    manifest = run(tmp_path, one)
    left_out = summary_of(manifest)["sources"][0]["left_out"]
    assert left_out["reasons"] == {"not_found": 1}
    assert left_out["files"][0]["name"].endswith("gone.jpg")
    assert len(rows_of(manifest)) == len(SPLITS)


def test_an_archive_comes_over_http_resumed_verified_and_only_once(tmp_path: Path) -> None:
    content = zipped(SPLITS | {"Training/glioma_tumor/big.jpg": bytes(range(256)) * 2000})
    with FileServer(content) as server:
        server.plan = [Misbehaviour(cut_after=200_000)]
        digest = hashlib.sha256(content).hexdigest()
        url = server.url("data%20sets/Brain%20MRI.zip?download=1&token=hush")
        manifest = run(tmp_path, url, sha256=(digest.upper(),))
        assert server.sent == len(content)
        run(tmp_path, url, sha256=(digest,))
        assert server.sent == len(content)
        with pytest.raises(UserError, match=f"{digest}, expected {'0' * 64}"):
            run(tmp_path, url, sha256=("0" * 64,))
    assert summary_of(manifest)["sources"][0]["sha256"] == digest
    assert {row["source"] for row in rows_of(manifest)} == {"Brain-MRI"}
    for path in (tmp_path / "out").glob("*.*"):
        assert b"hush" not in path.read_bytes()


def test_a_wrong_digest_of_a_local_archive_names_both_and_leaves_it_alone(tmp_path: Path) -> None:
    archive = tmp_path / "one.zip"
    archive.write_bytes(zipped(SPLITS))
    with pytest.raises(UserError, match=f"{hashlib.sha256(archive.read_bytes()).hexdigest()}, expected {'0' * 64}"):
        run(tmp_path, archive, sha256=("0" * 64,))
    assert archive.exists()


def test_a_hostile_archive_writes_nothing_outside(tmp_path: Path) -> None:
    (tmp_path / "evil.zip").write_bytes(zipped(SPLITS | {"../../../evil.png": b"x"}))
    with pytest.raises(UserError, match="unsafe"):
        run(tmp_path, tmp_path / "evil.zip")
    assert not list(tmp_path.rglob("evil.png"))
    assert not (tmp_path / "out/images").exists()


@pytest.mark.parametrize(
    ("source", "match"),
    [
        ("kaggle:nobody", "kaggle:OWNER/NAME"),
        ("kaggle:../x", "kaggle:OWNER/NAME"),
        ("http://", "names no server"),
        ("gs://bucket/x", "gs://"),
        ("nowhere.zip", "nothing is there"),
        ("", "not a path"),
    ],
)
def test_a_source_that_cannot_be_is_one_line(tmp_path: Path, source: str, match: str) -> None:
    with pytest.raises((UserError, ValidationError), match=match):
        run(tmp_path, source)


def test_without_the_kaggle_extra_the_message_says_how_to_get_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "kagglehub", None)  # as if it were not installed, also where it is
    with pytest.raises(UserError, match=r"pip install 'btray\[kaggle\]'"):
        run(tmp_path, "kaggle:owner/name")


def test_what_kagglehub_brings_is_taken_and_its_failure_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_tree(tmp_path / "kaggle/versions/1", {f"Brain/{name}": data for name, data in SPLITS.items()})
    asked: list[str] = []

    def dataset_download(handle: str) -> str:
        asked.append(handle)
        if handle == "owner/gone":
            raise RuntimeError("404 Client Error.\n\nResource not found")
        return str(folder)

    # Stands in for a client that needs the network and an account.
    monkeypatch.setitem(sys.modules, "kagglehub", SimpleNamespace(dataset_download=dataset_download))
    manifest = run(tmp_path, "kaggle:owner/brain-mri")
    assert asked == ["owner/brain-mri"]
    assert len(content_of(manifest)["brain-mri", "glioma", "train"]) == 2
    with pytest.raises(UserError, match=r"kaggle:owner/gone.*Resource not found") as caught:
        run(tmp_path, "kaggle:owner/gone")
    assert "\n" not in str(caught.value)


def test_a_folder_and_the_output_may_not_overlap(tmp_path: Path) -> None:
    one = make_tree(tmp_path / "one", SPLITS)
    for out in (one, one / "out", tmp_path):
        with pytest.raises(UserError, match="overlap"):
            run(tmp_path, one, out=str(out))
    run(tmp_path, one, out=str(tmp_path / "one-more"))


def test_a_digest_for_a_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nothing to compare"):
        run(tmp_path, make_tree(tmp_path / "one", SPLITS), sha256=("0" * 64,))


def test_a_source_without_images_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "empty.zip").write_bytes(zipped({"README.md": b"x"}))
    with pytest.raises(UserError, match="no images") as caught:
        run(tmp_path, tmp_path / "empty.zip")
    assert "cache" not in str(caught.value)


def test_files_that_no_source_of_this_run_brought_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run(tmp_path, make_tree(tmp_path / "old", CLASSES))
    manifest = run(tmp_path, make_tree(tmp_path / "new", SPLITS))
    assert f"{len(CLASSES)} files below" in caplog.text
    assert {row["source"] for row in rows_of(manifest)} == {"new"}


def test_the_table_says_how_balanced_the_classes_are(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(tmp_path, make_tree(tmp_path / "one", {f"glioma/{i}.png": b"x" for i in range(9)} | {"pituitary/1.png": b"x"}))
    text = capsys.readouterr().out
    assert "90.0 %" in text
    assert "glioma has 9.0 times as many as pituitary" in text


@pytest.mark.s3
def test_archive_and_folder_in_a_bucket_become_the_same_data_set_in_a_bucket(tmp_path: Path, bucket: str) -> None:
    for name, data in (SPLITS | {"Testing/notumor/.hidden": b"x"}).items():
        storage.write_bytes(storage.join(bucket, "in", name), data)
    storage.write_bytes(f"{bucket}/two.zip", zipped(CLASSES))
    remote = run(tmp_path, f"{bucket}/in", f"{bucket}/two.zip", out=f"{bucket}/out")
    assert remote == f"{bucket}/out/manifest.parquet"
    (tmp_path / "two.zip").write_bytes(zipped(CLASSES))
    local = run(tmp_path, make_tree(tmp_path / "in", SPLITS), tmp_path / "two.zip")
    assert rows_of(remote) == rows_of(local)
    assert content_of(remote) == content_of(local)
    assert summary_of(remote)["sources"][0]["left_out"]["reasons"] == {"hidden": 1}
    assert "out" in storage.read_text(f"{bucket}/out/config.yaml")


@pytest.mark.parametrize("remote", [False, True])
def test_keys_that_no_file_system_holds_are_left_out_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, remote: bool
) -> None:
    odd = {
        "glioma/" + "x" * 300 + ".jpg": "unusable_name",
        "glioma/a/b.jpg": "colliding_name",  # beside glioma/a
        "glioma//1.jpg": "duplicate_name",
        "glioma/1.jpg": None,
        "glioma/B.jpg": None,
        "glioma/b.jpg": "colliding_name",
        "glioma/1.jpg.": None,
        "glioma/a": None,
        "glioma/u\u0308.jpg": None,
        "glioma/\xfc.jpg": "colliding_name",
        "no_tumor//2.jpg": None,
        "/no_tumor/4.jpg": None,
        "//no_tumor//5.jpg": None,
        "no_tumor/6.jpg/": None,
        "no_tumor/c\\d.jpg": None,
        "glioma/../no_tumor/3.jpg": "hidden",
    }
    with flat_store(monkeypatch, {f"in/{key}": key.encode() for key in odd}) as bucket:
        manifest = run(tmp_path, f"{bucket}/in", out=f"{bucket}/out" if remote else str(tmp_path / "out"))
        left_out = summary_of(manifest)["sources"][0]["left_out"]
        taken = sorted(chain.from_iterable(content_of(manifest).values()))
        uris = [row["uri"] for row in rows_of(manifest)]
    assert {item["name"]: item["reason"] for item in left_out["files"]} == {k: why for k, why in odd.items() if why}
    assert taken == sorted(key.encode() for key, why in odd.items() if not why)
    assert len(set(uris)) == len(uris)
    assert not list(tmp_path.rglob("3.jpg"))


@pytest.mark.s3
def test_a_missing_bucket_is_one_line(tmp_path: Path, bucket: str) -> None:
    with pytest.raises(UserError, match="not-there") as caught:
        run(tmp_path, "s3://not-there-at-all/in", out=f"{bucket}/out")
    assert "\n" not in str(caught.value)


def test_the_job_prints_the_manifest_last_and_its_config_repeats_it(tmp_path: Path) -> None:
    make_tree(tmp_path / "one", SPLITS)
    out = tmp_path / "out"
    first = job(tmp_path, "--source", "one", "--out", "out")
    assert (first.returncode, first.stderr) == (0, "")
    assert first.stdout.splitlines()[-1] == str(out / "manifest.parquet")
    (out / "manifest.parquet").unlink()
    again = job(tmp_path, "--config", out / "config.yaml")
    assert again.returncode == 0, again.stderr
    assert (out / "manifest.parquet").exists()


@pytest.mark.parametrize(
    "arguments",
    [
        ["--source", "nowhere", "--out", "out"],
        ["--sourc", "x", "--out", "out"],
        ["--source", "x", "--sha256", "12", "--out", "o"],
    ],
)
def test_wrong_use_of_the_job_is_one_line_and_exit_2(tmp_path: Path, arguments: list[str]) -> None:
    done = job(tmp_path, *arguments)
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
    assert done.stdout == ""
