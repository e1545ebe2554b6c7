"""A labelled tree or manifest is read whole or refused with one line that names the value and the remedy."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from btray import storage
from btray.core.errors import UserError
from btray.data.labelled import SCHEMA, read_labelled
from tools.s3_server import S3Server


@pytest.fixture(scope="module")
def shared_bucket(s3: S3Server) -> str:
    s3.make_bucket("test-worklist")
    return "s3://test-worklist"


@pytest.fixture(params=["local", pytest.param("s3", marks=pytest.mark.s3)])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """An empty folder, local and on S3."""
    if request.param == "local":
        yield str(tmp_path)
        return
    bucket = request.getfixturevalue("shared_bucket")
    storage.reconnect()
    yield storage.join(bucket, uuid.uuid4().hex)
    storage.reconnect()


def write(root: str, *names: str) -> None:
    for name in names:
        storage.write_bytes(storage.join(root, name), name.encode())


def rows(root: str, table: pa.Table) -> dict[str, tuple[str, str | None]]:
    assert table.schema == SCHEMA
    return {row["uri"].removeprefix(root + "/"): (row["label"], row["split"]) for row in table.to_pylist()}


def refusal(uri: str) -> str:
    with pytest.raises(UserError) as caught:
        read_labelled(uri)
    line = str(caught.value)
    assert "\n" not in line
    assert uri in line
    return line


# ---- trees


def test_a_tree_with_split_folders_in_any_case_is_read_whole(place: str) -> None:
    write(
        place,
        "Training/glioma_tumor/gg (1).jpg",
        "Training/no_tumor/deep/er/no extension",
        "VAL/notumor/x.dcm",
        "valid/Glioma/50%+#1.png",
        "testing/abscess/_DSC0001",
        "Testing/abscess/日本.jpg",
    )
    assert rows(place, read_labelled(place)) == {
        "Training/glioma_tumor/gg (1).jpg": ("glioma", "train"),
        "Training/no_tumor/deep/er/no extension": ("no_tumor", "train"),
        "VAL/notumor/x.dcm": ("no_tumor", "val"),
        "valid/Glioma/50%+#1.png": ("glioma", "val"),
        "testing/abscess/_DSC0001": ("abscess", "test"),
        "Testing/abscess/日本.jpg": ("abscess", "test"),
    }


def test_sizes_and_etags_are_those_of_the_listing(place: str) -> None:
    write(place, "a/1", "b/22")
    listed = {info.uri: (info.size, info.etag) for info in storage.list_files(place)}
    assert {row["uri"]: (row["size"], row["etag"]) for row in read_labelled(place).to_pylist()} == listed


def test_hidden_files_do_not_count_and_what_else_is_left_out_is_named_in_the_log(
    place: str, caplog: pytest.LogCaptureFixture
) -> None:
    write(place, "a/1.jpg", "a/.DS_Store", "__MACOSX/a/1.jpg", "_b/_2.jpg", "a/Thumbs.db", "README", "train/loose.jpg")
    assert set(rows(place, read_labelled(place))) == {"a/1.jpg", "_b/_2.jpg"}
    assert "3 files" in caplog.text
    assert "(no_image 2, no_class_folder 1): README, a/Thumbs.db, train/loose.jpg" in caplog.text


def test_a_folder_named_like_a_split_is_a_class_only_where_it_holds_no_class(place: str) -> None:
    write(place, "Training/1.jpg", "Training/glioma/1.jpg", "normal/test/1.jpg")
    assert rows(place, read_labelled(place)) == {
        "Training/glioma/1.jpg": ("glioma", "train"),
        "normal/test/1.jpg": ("no_tumor", None),
    }


def test_a_missing_folder_is_refused(place: str) -> None:
    assert "spelling" in refusal(storage.join(place, "nowhere"))


def test_an_empty_folder_is_refused(tmp_path: Path) -> None:
    assert "no images" in refusal(str(tmp_path))
    write(str(tmp_path), "a/notes.txt")
    assert "no images (1 other files, such as a/notes.txt)" in refusal(str(tmp_path))


def test_files_without_class_folders_are_refused(place: str) -> None:
    write(place, "1.jpg", "2.jpg")
    line = refusal(place)
    assert "no class folders" in line
    assert "1.jpg" in line


def test_a_single_class_is_refused(place: str) -> None:
    write(place, "archive/abscess/1.jpg", "archive/abscess/2.jpg")
    assert "'abscess'" in refusal(place)


def test_the_classes_are_found_below_a_folder_that_holds_nothing_else(place: str) -> None:
    write(place, "archive/Training/glioma/1.jpg", "archive/Testing/no_tumor/1.jpg", "figures/1.jpg")
    assert rows(place, read_labelled(place)) == {
        "archive/Training/glioma/1.jpg": ("glioma", "train"),
        "archive/Testing/no_tumor/1.jpg": ("no_tumor", "test"),
    }


def test_a_single_file_that_is_no_manifest_is_refused(place: str) -> None:
    write(place, "a/1.jpg")
    assert "manifest" in refusal(storage.join(place, "a", "1.jpg"))


# ---- manifests


def write_csv(root: str, *lines: str, name: str = "manifest.csv") -> str:
    uri = storage.join(root, name)
    storage.write_text(uri, "\n".join(lines) + "\n")
    return uri


def test_a_manifest_of_either_kind_gives_the_same_rows_by_its_name_or_its_folder(place: str) -> None:
    uri = write_csv(
        place,
        "uri,extra,label,split,patient_id, SOURCE ",
        '"img/a, b.jpg",x,glioma_tumor,Training,007, f44',
        "img/%20.jpg,x,NA,,,",
        "/abs/c.jpg,x, no tumor ,valid,p2,web",
        "s3://other/d#.jpg,x,glioma,,, ",
    )
    wanted = [
        (f"{place}/img/a, b.jpg", "glioma", "train", "007", "f44"),
        (f"{place}/img/%20.jpg", "NA", None, None, None),
        ("/abs/c.jpg", "no_tumor", "val", "p2", "web"),
        ("s3://other/d#.jpg", "glioma", None, None, None),
    ]
    table = read_labelled(uri)
    assert table.schema == SCHEMA
    assert [tuple(row.values())[:5] for row in table.to_pylist()] == wanted
    assert table["size"].null_count == table["etag"].null_count == 4
    assert read_labelled(place).equals(table)

    columns = {
        "patient_id": pa.array(["007", None, "p2", ""]),
        "label": pa.array(["glioma", "NA", "no_tumor", "glioma"]).dictionary_encode(),
        "Source": ["f44 ", "", "web", None],
        "split": ["TRAIN", None, "val", ""],
        "uri": pa.array(["img/a, b.jpg", "img/%20.jpg", "/abs/c.jpg", "s3://other/d#.jpg"], pa.large_string()),
        "extra": [{"a": 1}] * 4,
    }
    filesystem, path = storage.arrow_filesystem(storage.join(place, "manifest.parquet"))
    pq.write_table(pa.table(columns), path, filesystem=filesystem)
    assert read_labelled(storage.join(place, "manifest.parquet")).equals(table)


def test_a_label_is_the_same_as_text_and_as_a_number_of_any_kind(tmp_path: Path) -> None:
    uris, numbers = ["a.jpg", "b.jpg", "c.jpg"], [1, 2, 10]
    write_csv(str(tmp_path), "uri,label", "a.jpg,1.0", "b.jpg,2", "c.jpg, 10.00")
    expected = read_labelled(str(tmp_path))["label"]
    assert expected.to_pylist() == ["1", "2", "10"]
    for kind in (pa.int8(), pa.int64(), pa.float32(), pa.float64(), pa.decimal128(6, 2), pa.string()):
        labels = pa.array(numbers, pa.float64() if pa.types.is_string(kind) else kind).cast(kind)
        pq.write_table(pa.table({"uri": uris, "label": labels}), tmp_path / "m.parquet")
        assert read_labelled(str(tmp_path / "m.parquet"))["label"].to_pylist() == expected.to_pylist(), kind


def test_labels_that_are_no_classes_are_refused_in_a_manifest_as_in_a_tree(tmp_path: Path) -> None:
    uri = write_csv(str(tmp_path), "uri,label", "a.jpg,yes", "b.jpg,pred", "c.jpg,no")
    assert "label 'pred' looks like predictions; rename" in refusal(uri)
    assert read_labelled(uri, classes=("yes", "no", "pred")).num_rows == 3


def test_classes_choose_among_the_labels_of_a_manifest(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    uri = write_csv(str(tmp_path), "uri,label", "a.jpg,Glioma", "b.jpg,me\u0301ta", "c.jpg,x")
    table = read_labelled(uri, classes=("glioma tumor", "m\u00e9ta"))
    assert table["label"].to_pylist() == ["glioma", "m\u00e9ta"]
    assert "(not_in_classes 1)" in caplog.text
    for missing in (("glioma", "y"), ("y",)):
        with pytest.raises(UserError, match="--classes"):
            read_labelled(uri, classes=missing)


def test_dots_in_relative_uris_are_resolved_against_the_manifest(place: str) -> None:
    uri = write_csv(place, "uri,label", "../img/a.jpg,x", "./b.jpg,y", name="lists/m.CSV")
    folder = place.rstrip("/")
    assert read_labelled(uri)["uri"].to_pylist() == [f"{folder}/img/a.jpg", f"{folder}/lists/b.jpg"]


def test_numbers_as_labels_and_patients_are_read_as_text(tmp_path: Path) -> None:
    pq.write_table(pa.table({"uri": ["a", "b"], "label": [0, 1], "patient_id": [3, None]}), tmp_path / "m.parquet")
    table = read_labelled(str(tmp_path / "m.parquet"))
    assert table["label"].to_pylist() == ["0", "1"]
    assert table["patient_id"].to_pylist() == ["3", None]


def test_a_row_given_twice_counts_once(tmp_path: Path) -> None:
    uri = write_csv(str(tmp_path), "uri,label,split", "a,x,train", "./a,x,training", "b,y,test")
    assert len(read_labelled(uri)) == 2


@pytest.mark.parametrize(
    ("lines", "named"),
    [
        (["uri,label", "a,x", ",y"], ["row 2", "uri is empty"]),
        (["uri,label", "a,x", "b, "], ["row 2", "label is empty", "'b'"]),
        (["uri,label,split", "a,x,train", "b,y,trian"], ["row 2", "'trian'"]),
        (["uri,label", "a,x", "b,y", "a,z"], ["row 3", "'x'", "'z'", "row 1"]),
        (["uri,label,split", "a,x,train", "b,y,", "a,x,test"], ["row 3", "'train'", "'test'"]),
        (["uri,label,patient_id", "a,x,1", "b,y,", "a,x,2"], ["row 3", "'1'", "'2'"]),
        (["uri,label", "a,x", "http://h/b,y"], ["row 2", "http://h/b"]),
        (["path,class", "a,x"], ["uri and label", "path, class"]),
        (["uri,class", "a,x"], ["no column label"]),
        (["uri,label"], ["no rows"]),
        (["uri,label", "a,x", "b,x"], ["'x'", "two classes"]),
        (["uri,label", "a,x,too,many"], ["Expected 2 columns"]),
    ],
)
def test_a_bad_manifest_is_refused_by_row_and_value(tmp_path: Path, lines: list[str], named: list[str]) -> None:
    line = refusal(write_csv(str(tmp_path), *lines))
    for part in named:
        assert part in line


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("m.csv", b""),
        ("m.csv", b"uri,label\n\xff\xfe,x\n"),
        ("m.csv", b"ur\xff,label\na,x\n"),
        ("m.parquet", b"uri,label\na,x\n"),
        ("m.parquet", b""),
    ],
)
def test_a_broken_manifest_is_refused(tmp_path: Path, name: str, data: bytes) -> None:
    (tmp_path / name).write_bytes(data)
    refusal(str(tmp_path / name))


def test_a_missing_manifest_is_refused(place: str) -> None:
    assert "spelling" in refusal(storage.join(place, "none.parquet"))


# ---- S3


@pytest.mark.s3
def test_a_missing_bucket_and_wrong_credentials_name_what_to_check(
    shared_bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage.reconnect()
    assert "AWS_ENDPOINT_URL" in refusal("s3://no-such-bucket-at-all/x")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    storage.reconnect()
    line = refusal(shared_bucket)
    storage.reconnect()
    for variable in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE", "AWS_ENDPOINT_URL"):
        assert variable in line
