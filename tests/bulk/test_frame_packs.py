"""A pack of frames stands for the files it was made of: same rows, same survey, same labels, and no other frames."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from pydantic import ValidationError

from btray import storage
from btray.bulk.classify import classify
from btray.bulk.config import PackConfig
from btray.bulk.listing.archive import list_archive
from btray.bulk.listing.selection import Selection
from btray.bulk.pack import pack
from btray.core.errors import UserError
from btray.data import frames, packs
from btray.data.config import PreprocessConfig
from btray.data.frames import FrameSource, Rejection
from btray.data.labelled import list_labelled, read_labelled
from btray.data.preprocess import preprocessing_key
from btray.data.scans import SliceInfo
from btray.model import precision
from btray.model.classifier import Classifier
from btray.storage.packed import path_of
from btray.training.feeds import decode_block, stream_block
from tests.helpers.classify_helpers import interrupt_after, job, plain_rows, report_of, without_ray, write_objects
from tests.helpers.scan_corpus import bad_scans, good_scans
from tests.helpers.tiny_bundle import PREPROCESS, saved_bundle
from tests.helpers.training_helpers import write_tree


@pytest.fixture(autouse=True)
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    without_ray(monkeypatch)


def packed(source: Any, output: Any, preprocess: PreprocessConfig = PREPROCESS, **changes: Any) -> str:
    return pack(PackConfig(input=str(source), output=str(output), frames=True, preprocess=preprocess, **changes))


def without_decoding(monkeypatch: pytest.MonkeyPatch) -> None:
    def decoded(*_: Any, **__: Any) -> None:
        raise AssertionError("a scan was decoded")

    monkeypatch.setattr(frames, "decode", decoded)
    monkeypatch.setattr(frames, "make_frame", decoded)


def test_the_same_rows_come_out_of_frames_and_of_files_and_a_later_run_finds_nothing_new(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    scans, model = tmp_path / "scans", str(tmp_path / "model")
    saved_bundle(model)
    write_objects(str(scans), good_scans() | {f"bad/{name}": data for name, (data, _) in bad_scans().items()})
    (scans / "gone.jpg").symlink_to(tmp_path / "nowhere")
    shards = pack(PackConfig(input=str(scans), output=str(tmp_path / "packed"), frames=True, model=model))
    classify(job(model, str(scans), str(tmp_path / "loose")))
    without_decoding(monkeypatch)
    classify(job(model, shards, str(tmp_path / "shards"), explain=3))

    def rows(name: str) -> list[dict[str, Any]]:
        table = plain_rows(str(tmp_path / name)).drop_columns(["run_id", "classified_at"])
        return table.sort_by([("uri", "ascending"), ("frame", "ascending")]).to_pylist()

    loose, of_frames = rows("loose"), rows("shards")
    for row in (*loose, *of_frames):  # its message names the place
        if row["error_code"] == "not_found":
            row["error"] = None
    for row, other in zip(of_frames, loose, strict=True):
        # Batches are made of other frames, and a sum over a batch of another size may round differently.
        numbers = [[value for _, value in each.pop("probabilities") or ()] for each in (row, other)]
        numbers = [
            [*values, *filter(None, map(each.pop, ("confidence", "ood_score")))]
            for values, each in zip(numbers, (row, other), strict=True)
        ]
        assert numbers[0] == pytest.approx(numbers[1], abs=1e-6)
        assert row == other
    assert {"ok", "rejected"} == {row["status"] for row in loose}
    assert any(row["modality"] for row in loose)
    assert max(row["frame"] for row in loose) > 0
    assert report_of(str(tmp_path / "shards"))["labels"] == report_of(str(tmp_path / "loose"))["labels"]
    capsys.readouterr()
    classify(job(model, shards, str(tmp_path / "loose")))
    assert f"{len({row['uri'] for row in loose}) - 1} unchanged" in capsys.readouterr().out  # gone.jpg is tried again


def test_a_later_model_of_the_same_preprocessing_classifies_what_was_packed_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    scans, table = tmp_path / "scans", str(tmp_path / "table")
    models = [str(tmp_path / f"model{seed}") for seed in range(2)]
    ids = [saved_bundle(model, seed=seed).manifest.model_id for seed, model in enumerate(models)]
    pictures = {name: data for name, data in good_scans().items() if name.startswith(("png", "tiff"))}
    write_objects(str(scans), pictures | {"bad.png": b"no picture"})
    shards = packed(scans, tmp_path / "packed")
    expected = [Classifier.load(model).predict(sorted(map(str, scans.iterdir()))) for model in models]
    without_decoding(monkeypatch)
    for model in models:
        classify(job(model, shards, table))
    rows = {(row["model_id"], row["uri"], row["frame"]): row for row in plain_rows(table).to_pylist()}
    assert len(rows) == len(plain_rows(table)) == sum(map(len, expected))
    assert expected[0] != expected[1]
    for model_id, predictions in zip(ids, expected, strict=True):
        for wanted in predictions:
            row = rows[model_id, str(wanted.uri), wanted.frame]
            assert (row["label"], row["error_code"]) == (wanted.label, wanted.error_code)
            assert row["confidence"] == pytest.approx(wanted.confidence, abs=1e-5)
    capsys.readouterr()
    classify(job(models[1], shards, table))
    assert f"{len(pictures) + 1} unchanged" in capsys.readouterr().out


def test_a_pack_of_frames_holds_no_free_text_and_names_object_and_preprocessing(tmp_path: Path) -> None:
    info = SliceInfo(modality="MR", patient_key="k", description="MISS X", protocol="MISS X", body_part="MISS X")
    assert packs.slices_json([info]) == '[{"modality": "MR", "patient_key": "k"}]'
    write_objects(str(tmp_path / "scans"), {"a.png": next(iter(good_scans().values()))})
    output = packed(tmp_path / "scans", tmp_path / "out")
    key = preprocessing_key(PREPROCESS)
    (shard,) = (tmp_path / "out" / "frames" / key).iterdir()
    assert set(pq.read_table(shard)["preprocessing"].to_pylist()) == {key}
    assert packs.describe_pack(output).preprocess == PREPROCESS


@pytest.mark.parametrize("kind", ["tree", "manifest beside", "manifest inside"])
def test_training_gets_the_frames_labels_and_fingerprints_of_the_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    data = write_tree(tmp_path / "data", {"Training/glioma": 5, "Training/no_tumor": 4, "Testing/glioma": 2})
    storage.write_bytes(storage.join(data, "Training/glioma/many.tiff"), good_scans()["tiff_pages"])
    storage.write_bytes(storage.join(data, "Training/glioma/bad.png"), b"no picture")
    names = [info.uri.removeprefix(f"{data}/") for info in storage.list_files(data)]
    if kind != "tree":
        lines = [f"{name},{name.split('/')[1]},{'test' if 'Testing' in name else ''}" for name in names]
        place = "manifest.csv" if kind == "manifest inside" else "labels.csv"
        storage.write_text(storage.join(data, place), "\n".join(["uri,label,split", *lines]))
    source = storage.join(data, "labels.csv") if kind == "manifest beside" else data
    output = packed(source, tmp_path / "packed")
    loose, members = read_labelled(source), read_labelled(output, preprocess=PREPROCESS)
    paths = {uri: path_of(uri).removeprefix(f"{data[1:]}/") for uri in members["uri"].to_pylist()}
    paths |= {uri: uri.removeprefix(f"{data}/") for uri in loose["uri"].to_pylist()}

    def surveyed(table: Any) -> dict[tuple[str, int], dict[str, Any]]:
        uris = table["uri"].to_numpy()
        batch = {"uri": uris, "row": np.arange(len(uris)), "label": np.zeros(len(uris), np.int64)}
        found = {}
        for block, streamed in zip(
            decode_block(batch, FrameSource(PREPROCESS)), stream_block(batch, FrameSource(PREPROCESS)), strict=True
        ):
            assert (streamed["frame"] == block["frame"]).all()
            assert streamed["sample"].tolist() == block["sample"].tolist()
            for number, sample in enumerate(block["sample"].tolist()):
                row = table.slice(sample // 1024, 1).to_pylist()[0]
                facts = {name: block[name][number] for name in ("digest", "fingerprint", "patient", "code", "message")}
                found[paths[row["uri"]], sample % 1024] = facts | {"label": row["label"], "split": row["split"]}
        return found

    def shown(table: Any) -> dict[str, bytes]:
        """The frames by which bfloat16 is compared with single precision."""
        uris = [uri for uri in table["uri"].to_pylist() if not uri.endswith("bad.png")]
        return {
            paths[uri]: frame.tobytes()
            for uri, frame in zip(uris, precision._frames(FrameSource(PREPROCESS), uris), strict=True)
        }

    of_files, shown_of_files = surveyed(loose), shown(loose)
    without_decoding(monkeypatch)
    monkeypatch.setattr(precision, "make_frame", frames.make_frame)
    assert surveyed(members) == of_files
    assert shown(members) == shown_of_files
    assert {facts["code"] for facts in of_files.values()} == {"", "not_an_image"}


def test_frames_of_another_preprocessing_are_refused_in_one_line_that_names_both(tmp_path: Path) -> None:
    data = write_tree(tmp_path / "data", {"glioma": 2, "no_tumor": 2})
    output, model = packed(data, tmp_path / "packed"), str(tmp_path / "model")
    other = PREPROCESS.model_copy(update={"size": 64})
    saved_bundle(model, preprocess=other)
    both = f"{preprocessing_key(PREPROCESS)}.*{preprocessing_key(other)}.*size 48 instead of 64"
    for refused in (
        lambda: read_labelled(output, preprocess=other),
        lambda: classify(job(model, output, str(tmp_path / "table"))),
    ):
        with pytest.raises(UserError, match=both) as caught:
            refused()
        assert "\n" not in str(caught.value)
    with pytest.raises(
        UserError, match=rf"pack of frames of .*{preprocessing_key(PREPROCESS)}, not of .*another output"
    ):
        packed(data, output, other)
    with pytest.raises(UserError, match="not of files; name another output"):
        pack(PackConfig(input=data, output=output))
    with pytest.raises(UserError, match="the files themselves are needed; give what was packed"):
        list_labelled(output)
    with pytest.raises(UserError, match="which have no headers"):
        classify(job(model, output, str(tmp_path / "table"), series=("plane=axial",)))
    member = read_labelled(output, preprocess=PREPROCESS)["uri"][0].as_py()
    (made,) = FrameSource(other).from_uris([member])
    assert isinstance(made, Rejection)
    assert made.code == "unsupported"
    (prediction,) = Classifier.load(model).predict([member])
    assert prediction.error_code == "unsupported"
    for settings in ({"model": model}, {"preprocess": other}, {"frames": True, "model": model, "preprocess": other}):
        with pytest.raises(ValidationError, match="--preprocess"):
            PackConfig(input=data, output=output, **settings)


def test_other_versions_of_libraries_count_as_another_preprocessing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = write_tree(tmp_path / "data", {"glioma": 1, "no_tumor": 1})
    output = packed(data, tmp_path / "packed")
    monkeypatch.setattr(packs, "preprocessing_key", lambda _: "elsewhere")
    with pytest.raises(UserError, match=r"not of elsewhere \(made by other versions of libraries\)"):
        read_labelled(output, preprocess=PREPROCESS)
    keys = iter("abb")
    monkeypatch.setattr("btray.bulk.pack.preprocessing_key", lambda _: next(keys))
    with pytest.raises(UserError, match="preprocessing a is b on the node"):
        packed(data, tmp_path / "mixed")


def test_a_pack_of_frames_grows_and_what_is_damaged_or_was_withheld_is_packed_anew(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    scans, pictures = tmp_path / "scans", good_scans()
    some = [data for name, data in pictures.items() if name.startswith("png")][:4]
    write_objects(str(scans), {f"{number}.png": data for number, data in enumerate(some)} | {"bad.png": b"no picture"})
    (scans / "gone.png").symlink_to(tmp_path / "nowhere")
    output = packed(scans, tmp_path / "out")
    assert "4 packed, 2 rejected" in capsys.readouterr().out
    (scans / "gone.png").unlink()
    (scans / "gone.png").write_bytes(some[0])
    (scans / "3.png").write_bytes(some[0] + b" ")
    packed(scans, output)
    assert "2 packed, 0 rejected; 4 unchanged" in capsys.readouterr().out
    folder = tmp_path / "out" / packs.describe_pack(output).folder
    _, second = sorted(folder.glob("*.parquet"))
    second.write_bytes(second.read_bytes()[:-20])
    with pytest.raises(UserError, match=r"is damaged; run jobs/pack\.py again"):
        list(packs.list_pack(output))
    packed(scans, output)
    assert "2 packed, 0 rejected; 4 unchanged" in capsys.readouterr().out
    assert (folder / "_damaged" / second.name).exists()
    listed = list(list_archive(output, Selection(), preprocess=PREPROCESS))
    assert len(listed) == 6
    source = FrameSource(PREPROCESS)
    for info, of_member in zip(listed, source.from_uris([info.place for info in listed]), strict=True):
        (of_file,) = source.from_uris([info.uri])
        assert type(of_member) is type(of_file)
        assert isinstance(of_file, Rejection) or np.array_equal(of_member, of_file)


def test_a_run_that_was_killed_is_resumed_and_until_then_nobody_takes_it_for_a_pack(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scans = write_tree(tmp_path / "data", {"glioma": 40, "no_tumor": 40})
    with monkeypatch.context() as patch:
        made = interrupt_after(patch, 2)
        with pytest.raises(KeyboardInterrupt):
            packed(scans, tmp_path / "out")
    with pytest.raises(UserError, match=r"not finished: run jobs/pack\.py again"):
        next(list_archive(str(tmp_path / "out"), Selection(), preprocess=PREPROCESS))
    others = write_tree(tmp_path / "others", {"glioma": 2})
    for source, preprocess in ((others, PREPROCESS), (scans, PREPROCESS.model_copy(update={"size": 64}))):
        with pytest.raises(UserError, match=r"is a pack of .*, not of .*; name another output"):
            packed(source, tmp_path / "out", preprocess)
    times = {uri: Path(uri).stat().st_mtime_ns for uri in made}
    output = packed(scans, tmp_path / "out")
    assert {uri: Path(uri).stat().st_mtime_ns for uri in made} == times
    assert len(list(packs.list_pack(output))) == 80
