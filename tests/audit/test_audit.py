"""`jobs/audit.py` finds every copy of an image and nothing else, says what leaks, and never fails over a bad file."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet
import pytest
import ray
import yaml
from PIL import Image

from btray import phantoms, storage
from btray.audit.analysis import Twins, group, summarise
from btray.audit.config import AuditConfig
from btray.audit.findings import (
    AuditReport,
    Duplicates,
    Files,
    Intensity,
    LabelConflicts,
    Leakage,
    Patients,
    SizeCount,
)
from btray.audit.inspection import inspect_block
from btray.audit.job import audit
from btray.audit.report import render_audit
from btray.core.errors import ThresholdExceeded, UserError
from btray.data.duplicates import numbered
from btray.data.fingerprint import correlations, thumbnails
from btray.data.labelled import Labelled
from btray.data.scans import decode
from tests.helpers.forked_jobs import ROOT, run_all
from tests.helpers.image_truth import COPIES, REFRAMED, SAME_PIXELS, encode, recall_and_precision
from tests.helpers.local_data import run_here
from tests.helpers.pages import HOSTILE, Page

FILES = {
    "audit.json",
    "duplicates.parquet",
    "report.html",
    "left_out.csv",
    "unreadable.csv",
    "not_mri.csv",
    "config.yaml",
}
COLUMNS = ["uri", "split", "label", "group_id", "grade", "score"]


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Audit in this process, for what is decided after Ray's tasks have returned."""
    run_here(monkeypatch)


def strict_json(uri: str) -> Any:
    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is no JSON")

    return json.loads(storage.read_text(uri), parse_constant=refuse)


def rows(uri: str) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(storage.read_text(uri))))


def duplicates(out: object) -> list[dict[str, Any]]:
    data = storage.read_bytes(storage.join(str(out), "duplicates.parquet"))
    return pyarrow.parquet.read_table(pa.BufferReader(data)).to_pylist()


def run(data: object, out: object, **changes: Any) -> dict[str, Any]:
    """Audit and return the contents of audit.json."""
    audit(AuditConfig(data=str(data), out=str(out), **changes))
    return strict_json(storage.join(str(out), "audit.json"))


def slice_of(seed: int) -> np.ndarray:
    return phantoms.phantom(phantoms.CLASSES[seed % 5], seed)


def require_found(folder: Path, pictures: Sequence[np.ndarray], out: Path) -> None:
    """Write all COPIES of some different pictures, audit them, and hold the groups against the truth."""
    for number, gray in enumerate(pictures):
        for name, copy in COPIES.items():
            storage.write_bytes(str(folder / "glioma" / f"{number:03d} {name}"), copy(gray))
    run(folder, out)
    found = {Path(row["uri"]).name: row for row in duplicates(out)}
    names = [f"{number:03d} {name}" for number in range(len(pictures)) for name in COPIES]
    seen = np.stack([thumbnails(decode((folder / "glioma" / name).read_bytes()).frames[0]) for name in names])
    for copies, least_recall in ((set(COPIES) - set(REFRAMED), 0.99), (set(COPIES), 0.95)):
        scored = [place for place, name in enumerate(names) if name[4:] in copies]
        recall, precision, wrong = recall_and_precision(
            [int(names[place][:3]) for place in scored],
            [found[names[place]]["group_id"] if names[place] in found else -1 for place in scored],
            lambda a, b, scored=scored: float(correlations(seen[[scored[a]]], seen[[scored[b]]])[0]),
        )
        assert recall >= least_recall, [(names[scored[a]], names[scored[b]]) for a, b in wrong]
        assert precision >= 0.99, [(names[scored[a]], names[scored[b]]) for a, b in wrong]
    for name in names:
        if name[4:] in SAME_PIXELS:
            assert (found[name]["grade"], found[name]["score"]) == ("same_pixels", 1.0)
        elif name in found:
            assert found[name]["grade"] == "same_image"
            assert 0.99 <= found[name]["score"] <= 1


@pytest.mark.slow
@pytest.mark.cluster
def test_every_copy_of_a_phantom_is_found_and_no_other_image(ray_session: None, tmp_path: Path) -> None:
    require_found(tmp_path / "data", [slice_of(seed) for seed in range(20)], tmp_path / "out")


@pytest.mark.soak
@pytest.mark.cluster
@pytest.mark.realdata
def test_every_copy_of_a_real_slice_is_found_and_no_other_image(
    ray_session: None, real_data: Path, tmp_path: Path
) -> None:
    files = sorted(real_data.glob("*/*/*"))[::160]
    pictures = [decode(path.read_bytes()).frames[0] for path in files]
    seen = np.stack([thumbnails(picture) for picture in pictures])
    different = [
        n for n in range(len(pictures)) if n == 0 or correlations(np.repeat(seen[[n]], n, 0), seen[:n]).max() < 0.97
    ]
    assert len(different) >= 15
    require_found(tmp_path / "data", [pictures[n] for n in different], tmp_path / "out")


@pytest.mark.slow
@pytest.mark.cluster
@pytest.mark.realdata
def test_neighbouring_slices_of_one_run_are_not_taken_for_one_image(
    ray_session: None, real_data: Path, tmp_path: Path
) -> None:
    run_of_files = [real_data / "Training" / "pituitary_tumor" / f"p ({number}).jpg" for number in range(500, 620)]
    present = [path for path in run_of_files if path.is_file()]
    assert len(present) > 60
    for path in present:
        (tmp_path / "data" / "pituitary").mkdir(parents=True, exist_ok=True)
        (tmp_path / "data" / "pituitary" / path.name).symlink_to(path)
    run(tmp_path / "data", tmp_path / "out")
    group = {Path(row["uri"]).name: row["group_id"] for row in duplicates(tmp_path / "out")}
    seen = np.stack([thumbnails(decode(path.read_bytes()).frames[0]) for path in present])
    neighbours = correlations(seen[:-1], seen[1:])
    assert (neighbours < 0.97).sum() > 30, "the run has neighbours that are different images"
    for before, after, value in zip(present, present[1:], neighbours, strict=False):
        if value < 0.97:
            assert group.get(before.name, -1) != group.get(after.name, -2), (before.name, after.name)


@pytest.fixture
def leaky(tmp_path: Path) -> Path:
    """Ten images in two splits: one byte-identical leak, one mirrored one under another label, two strays."""
    data = tmp_path / "data"
    for seed in range(4):
        storage.write_bytes(str(data / "train" / "glioma" / f"{seed}.png"), encode(slice_of(seed)))
    storage.write_bytes(str(data / "test" / "glioma" / "same, bytes.png"), encode(slice_of(0)))
    storage.write_bytes(str(data / "test" / "no_tumor" / "mirrored.png"), encode(slice_of(1)[:, ::-1]))
    storage.write_bytes(str(data / "test" / "no_tumor" / "new.png"), encode(slice_of(9)))
    storage.write_bytes(str(data / "test" / "no_tumor" / "photo.png"), encode(_photograph()))
    storage.write_bytes(str(data / "train" / "no_tumor" / "broken.jpg"), b"<html>502 Bad Gateway</html>")
    storage.write_bytes(str(data / "train" / "no_tumor" / "empty.jpg"), b"")
    return data


def _photograph() -> np.ndarray:
    from sklearn.datasets import load_sample_image

    return load_sample_image("china.jpg")


@pytest.mark.cluster
def test_what_is_written_is_the_contract(
    ray_session: None, leaky: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    findings = run(leaky, out)
    assert {path.name for path in out.iterdir()} == FILES
    assert findings["images"] == 10
    assert findings["splits"]["train"] == {"images": 6, "by_class": {"glioma": 4, "no_tumor": 2}}
    assert findings["unreadable"] == {"images": 2, "by_code": {"empty": 1, "not_an_image": 1}}
    leak = findings["leakage"]["test"]
    assert (leak["images"], leak["with_twin"], leak["in"]) == (4, 2, {"train": 2})
    assert leak["by_class"]["glioma"] == {"images": 1, "with_twin": 1}
    assert leak["by_class"]["no_tumor"] == {"images": 3, "with_twin": 1}
    assert findings["label_conflicts"] == {
        "groups": 1,
        "images": 2,
        "between": [{"labels": ["glioma", "no_tumor"], "groups": 1}],
    }
    assert findings["not_mri"] == {"images": 1, "by_reason": {"colour": 1}}
    assert findings["patients"]["named"] == 0
    found = duplicates(out)
    assert list(found[0]) == COLUMNS
    by_name = {Path(row["uri"]).name: row for row in found}
    assert set(by_name) == {"0.png", "same, bytes.png", "1.png", "mirrored.png"}
    assert by_name["0.png"]["grade"] == by_name["same, bytes.png"]["grade"] == "same_bytes"
    assert by_name["1.png"]["grade"] == by_name["mirrored.png"]["grade"] == "same_image"
    assert by_name["0.png"]["group_id"] != by_name["1.png"]["group_id"]
    assert {Path(row["uri"]).name: row["error_code"] for row in rows(str(out / "unreadable.csv"))} == {
        "broken.jpg": "not_an_image",
        "empty.jpg": "empty",
    }
    assert [row["reason"] for row in rows(str(out / "not_mri.csv"))] == ["colour"]
    assert AuditConfig(**yaml.safe_load((out / "config.yaml").read_text())).data == str(leaky)
    page = (out / "report.html").read_text()
    assert page.count("data:image/jpeg") == 5, "two groups of two and a stray"
    assert "http://" not in page
    assert "same, bytes.png" in page
    assert "2 of 4 test images have a twin in train" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.cluster
def test_fail_on_ends_the_command_with_its_code_and_one_line_after_all_is_written(
    ray_session: None, leaky: Path, tmp_path: Path
) -> None:
    leak = "leak: 2 of 4 test images have a twin in train; conflict: 1 group"
    cases = [("leak,conflict", 3, leak), ("patient", 0, ""),
             ("leek", 2, "'leek' is refused: Input should be 'leak', 'conflict'")]  # fmt: skip
    out = [tmp_path / fail_on for fail_on, _, _ in cases]
    commands = [
        ("jobs/audit.py", ["--data", str(leaky), "--out", str(folder), "--fail-on", fail_on])
        for folder, (fail_on, _, _) in zip(out, cases, strict=True)
    ]
    done = run_all(commands, {"RAY_ADDRESS": ray.get_runtime_context().gcs_address})
    for folder, ended, (_, code, said) in zip(out, done, cases, strict=True):
        assert ended.code == code, ended.stderr
        assert "Traceback" not in ended.stderr
        if said:
            (line,) = [line for line in ended.stderr.splitlines() if line.startswith("error:")]
            assert said in line
        assert folder.exists() == (code != 2)
        if code != 2:
            assert {path.name for path in folder.iterdir()} == FILES
        if code == 0:
            assert ended.stdout.splitlines()[-1] == str(folder)


def test_each_finding_can_fail_the_job_and_only_if_it_is_there(here: None, leaky: Path, tmp_path: Path) -> None:
    with pytest.raises(ThresholdExceeded) as caught:
        run(leaky, tmp_path / "out", fail_on=("unreadable", "not_mri", "duplicate", "leak", "conflict", "patient"))
    message = str(caught.value)
    assert "\n" not in message
    for name in ("leak:", "conflict:", "duplicate:", "not_mri:", "unreadable:"):
        assert name in message
    assert "patient:" not in message
    assert (tmp_path / "out" / "report.html").is_file()


def test_blank_and_noisy_images_do_not_become_one_group(here: None, tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    data = tmp_path / "data" / "no_tumor"
    for level in range(6):
        faint = np.clip(random.normal(level * 9 + 5, 0.6, (200 + level, 256)), 0, 255).astype(np.uint8)
        storage.write_bytes(str(data / f"blank {level}.png"), encode(faint))
        storage.write_bytes(str(data / f"noise {level}.png"), encode(random.integers(0, 256, (200, 256), np.uint8)))
    findings = run(tmp_path / "data", tmp_path / "out")
    assert duplicates(tmp_path / "out") == []
    assert findings["not_mri"]["by_reason"] == {"blank": 6, "noise": 6}
    assert findings["leakage"] == {}, "there are no two splits"


def test_odd_shapes_depths_and_volumes_are_audited_and_what_cannot_be_read_ends_nothing(
    here: None, tmp_path: Path
) -> None:
    data = tmp_path / "data" / "glioma"
    gray = slice_of(3)
    for number, shape in enumerate([(16, 4000), (4000, 16), (17, 17), (1500, 1100)]):
        storage.write_bytes(str(data / f"{number}.png"), encode(Image.fromarray(gray).resize(shape)))
    for name in ("flat", "flat again"):
        storage.write_bytes(str(data / f"{name}.png"), encode(np.full((64, 64), 7, np.uint8)))
    pages = [Image.fromarray(slice_of(seed)) for seed in (5, 6, 7)]
    stream = io.BytesIO()
    pages[0].save(stream, "TIFF", save_all=True, append_images=pages[1:])
    storage.write_bytes(str(data / "volume.tif"), stream.getvalue())
    storage.write_bytes(str(data / "middle.png"), encode(slice_of(6)))
    (data / "gone.png").symlink_to(tmp_path / "nowhere.png")
    findings = run(tmp_path / "data", tmp_path / "out")
    assert findings["unreadable"]["by_code"] == {"not_found": 1}
    groups = {Path(row["uri"]).name: (row["group_id"], row["grade"]) for row in duplicates(tmp_path / "out")}
    assert groups["flat.png"] == groups["flat again.png"]
    assert groups["volume.tif"] == groups["middle.png"], "a volume is compared by its middle frame"
    assert groups["middle.png"][1] == "same_image"
    assert findings["files"]["several_frames"] == 1


def test_data_of_which_nothing_can_be_read_are_audited_too(here: None, tmp_path: Path) -> None:
    for label in ("glioma", "no_tumor"):
        storage.write_bytes(str(tmp_path / "data" / label / "x.jpg"), b"no image")
    findings = run(tmp_path / "data", tmp_path / "out")
    assert findings["unreadable"]["images"] == 2
    assert findings["duplicates"]["share"] is None
    assert {path.name for path in (tmp_path / "out").iterdir()} == FILES


def test_patients_in_several_splits_and_images_without_a_split_are_counted(here: None, tmp_path: Path) -> None:
    lines = ["uri,label,split,patient_id"]
    for seed, (split, patient) in enumerate([("", "a"), ("test", "a"), ("val", "b"), ("val", "b"), ("test", "")]):
        storage.write_bytes(str(tmp_path / f"{seed}.png"), encode(slice_of(seed)))
        lines.append(f"{seed}.png,glioma,{split},{patient}")
    storage.write_bytes(str(tmp_path / "copy.png"), encode(slice_of(0).T))
    storage.write_bytes(str(tmp_path / "second.png"), encode(slice_of(2)))
    lines += ["copy.png,glioma,val,", "second.png,glioma,test,"]
    (tmp_path / "manifest.csv").write_text("\n".join(lines))
    with pytest.raises(ThresholdExceeded, match="1 of 2 patients are in several splits"):
        run(tmp_path / "manifest.csv", tmp_path / "out", fail_on=("patient",))
    findings = strict_json(str(tmp_path / "out" / "audit.json"))
    assert findings["patients"] == {"named": 2, "images": 4, "in_several_splits": 1, "images_of_these": 2}
    assert findings["splits"]["train"]["images"] == 1, "an image with no split is trained on"
    assert findings["leakage"]["val"]["in"] == {"train": 1}
    assert findings["leakage"]["test"]["in"] == {"train": 0, "val": 1}
    assert findings["leakage"]["test"]["with_twin"] == 1


def test_the_page_shows_some_groups_leaks_first_and_says_how_many_it_does_not(here: None, tmp_path: Path) -> None:
    for seed in range(5):
        for copy in range(2):
            split = "val" if seed == 4 and copy else "train"
            storage.write_bytes(
                str(tmp_path / "data" / split / "glioma" / f"{seed} {copy}.png"), encode(slice_of(seed))
            )
    run(tmp_path / "data", tmp_path / "out", report_groups=2)
    page = (tmp_path / "out" / "report.html").read_text()
    assert "2 of 5 groups; 3 are not" in page
    assert page.index("Group 4:") < page.index("Group 0:")
    assert "Group 2:" not in page


def test_unusable_data_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nowhere"):
        run(tmp_path / "nowhere", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.s3
@pytest.mark.cluster
def test_data_and_audit_may_lie_in_object_storage(ray_session: None, bucket: str) -> None:
    for name, copy in (("a.png", "original"), ("b +%41.jpg", "recompressed")):
        storage.write_bytes(f"{bucket}/data/glioma/{name}", COPIES[copy](slice_of(2)))
    storage.write_bytes(f"{bucket}/data/glioma/Thumbs.db", b"no image")
    storage.write_bytes(f"{bucket}/data/pred/a.png", encode(slice_of(5)))
    findings = run(f"{bucket}/data", f"{bucket}/out")
    assert set(storage.list_names(f"{bucket}/out")) == FILES
    assert findings["left_out"] == {"files": 1, "by_reason": {"no_image": 1}}
    assert storage.read_text(f"{bucket}/out/left_out.csv").splitlines() == ["path,reason", "glioma/Thumbs.db,no_image"]
    assert findings["warnings"][0] == "pred looks like predictions"
    assert "pred looks like predictions" in storage.read_text(f"{bucket}/out/report.html")
    assert findings["duplicates"]["by_grade"] == {"same_bytes": 0, "same_pixels": 0, "same_image": 2}
    assert {row["uri"] for row in duplicates(f"{bucket}/out")} == {
        f"{bucket}/data/glioma/a.png",
        f"{bucket}/data/glioma/b +%41.jpg",
    }


def audited(table: pa.Table) -> tuple[AuditReport, str]:
    """The findings of files without duplicates, and the page, made in this process."""
    inspected = inspect_block(pa.table({"row": np.arange(len(table)), "uri": table["uri"]}))
    readable = inspected.filter(pc.equal(inspected["code"], ""))
    pixels = numbered(readable["pixel_digest"])
    twins = Twins(pixels, np.zeros((0, 2), np.int64), np.zeros(0, np.float32), 0, 0)
    members = group(table, readable, twins)
    data = Labelled(table, {"Thumbs.db": "no_image"}, ["pred looks like predictions"])
    report = summarise("data", data, inspected, twins, members)
    return report, render_audit(report, table, inspected, members, most_groups=9)


def labelled_files(folder: Path, names: Sequence[str], labels: Sequence[str]) -> pa.Table:
    """One slice twice, under two labels and in two splits, a photograph, and a file that is not an image."""
    uris = [str(folder / str(number) / name) for number, name in enumerate(names)]
    bodies = [encode(slice_of(0)), encode(slice_of(0)), encode(_photograph()), b"no image"]
    for uri, body in zip(uris, bodies, strict=True):
        storage.write_bytes(uri, body)
    splits = ["train", "test", "test", "train"]
    return pa.table(
        {
            "uri": uris,
            "label": labels,
            "split": splits,
            "patient_id": ["a", "a", "b", None],
            "source": pa.nulls(4, pa.string()),
        }
    )


def test_the_page_keeps_hostile_names_and_labels_text(tmp_path: Path) -> None:
    _, expected = audited(labelled_files(tmp_path, ["a.png"] * 4, ["l", "m", "n", "o"]))
    hostile = [name.replace("/", "") for name in HOSTILE[:4]]
    report, page = audited(labelled_files(tmp_path, hostile, hostile[::-1]))
    page.encode("utf-8")
    assert Page(page).shape == Page(expected).shape
    assert hostile[0] in Page(page).text
    report.to_json().decode("utf-8")


def test_audit_json_has_the_documented_fields_in_this_order_and_a_version(tmp_path: Path) -> None:
    report, _ = audited(labelled_files(tmp_path, ["a.png"] * 4, ["l", "m", "n", "o"]))
    record = json.loads(report.to_json())
    assert list(record) == [
        "data", "images", "classes", "splits", "left_out", "warnings", "unreadable", "duplicates", "leakage",
        "label_conflicts", "patients", "not_mri", "files", "intensity", "format_version",
    ]  # fmt: skip
    assert record["format_version"] == 1
    assert record["leakage"]["test"]["in"] == {"train": 1}
    documented = (ROOT / "docs" / "audit.md").read_text(encoding="utf-8")
    table = documented[documented.index("| field |") :]
    parts = (Duplicates, Leakage, LabelConflicts, Patients, Files, Intensity, SizeCount)
    for name in (*record, *(field.name.rstrip("_") for part in parts for field in fields(part))):
        assert re.search(rf"^\| [^|]*\b{name}\b", table, re.MULTILINE), name
