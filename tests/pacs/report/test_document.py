"""A report says what the model says, keeps to the standard, is read by others, and is the same whenever it is made."""

from __future__ import annotations

import functools
import io
import logging
import warnings
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from highdicom.sr import srread
from pydicom.sr.codedict import codes

from btray.core.notice import NOTICE
from btray.model.classifier import Classifier
from btray.pacs.address import Metadata
from btray.pacs.own import is_own
from btray.pacs.report.document import make_report
from btray.pacs.report.identity import report_uid
from btray.pacs.report.reporter import as_file
from tests.helpers.hospital_archive import ROOT
from tests.helpers.reported import (
    CLASSIFIED_AT,
    PLANTED,
    answer_of,
    classic,
    complaints,
    dumped,
    enhanced,
    groups_of,
    read,
    sources_of,
)
from tests.helpers.tiny_bundle import random_bundle

KINDS = ("classic", "enhanced", "several series", "sloppy")


@functools.cache
def study(kind: str) -> list[bytes]:
    """The files of a study of one of the KINDS."""
    if kind == "classic":
        return classic()
    if kind == "enhanced":
        return enhanced()
    if kind == "several series":
        return [*classic(), *classic(series=3), *enhanced()]
    return classic(
        PatientName="no caret here\\x", PatientSex="unknown", PatientBirthDate="19xx", StudyDate="2020.1.1",
        Modality=None, SliceThickness="", PixelSpacing=None, FrameOfReferenceUID=None,
    )  # fmt: skip


@pytest.fixture(scope="module")
def classifier() -> Classifier:
    return Classifier(random_bundle(), device="cpu", engine="eager")


def made(files: list[bytes], classifier: Classifier) -> tuple[Any, bytes]:
    answer = answer_of(files, classifier)
    return answer, as_file(make_report(answer, classifier.manifest, sources_of(files, answer)))


@pytest.mark.parametrize("kind", KINDS)
def test_a_report_keeps_to_the_standard_and_says_what_the_model_says(
    kind: str, classifier: Classifier, tmp_path: Path
) -> None:
    answer, file = made(study(kind), classifier)
    if "sloppy" not in kind:  # there what the sources have is wrong
        assert complaints(file, tmp_path) == []
    report = srread(io.BytesIO(file))
    assert (report.CompletionFlag, report.VerificationFlag, report.PreliminaryFlag) == (
        "COMPLETE", "UNVERIFIED", "PRELIMINARY",
    )  # fmt: skip
    groups = groups_of(report)
    parts = {"study": answer.study, **{f"series {part.series_uid}": part for part in answer.series}}
    assert list(groups) == [
        f"{name}: {what}" for name, part in parts.items() for what in ("answer", *part.probabilities)
    ], "the study first"
    for name, part in parts.items():
        for what in ("answer", *part.probabilities):
            group = groups[f"{name}: {what}"]
            (probability,) = group.get_measurements()
            expected = part.confidence if what == "answer" else part.probabilities[what]
            assert probability.name == codes.DCM.Probability
            assert probability.unit.value == "1"
            assert probability.value == pytest.approx(expected, abs=1e-7)
            assert [site.value.value for site in group.finding_sites] == ["12738006"]
            shown = {
                (image.referenced_sop_instance_uid, tuple(image.referenced_frame_numbers or ()))
                for image in group.source_images
            }
            assert {uid for uid, _ in shown} == {frame.instance_uid for frame in part.sources}
            several = [numbers for _, numbers in shown if numbers]
            assert len(several) == sum("enhanced" in kind or frame.series_uid.endswith(".2") for frame in part.sources)
    text = dumped(file, tmp_path)
    for said in (NOTICE, f"model_id={answer.model_id}", f"rule={answer.rule}", "btray"):
        assert said in text


def test_classes_have_the_codes_of_snomed_and_others_those_of_btray(classifier: Classifier) -> None:
    files = classic(slices=1)
    answer = answer_of(files, classifier)
    labels = [
        "glioma",
        "meningioma",
        "pituitary",
        "metastasis",
        "no_tumor",
        "größe\\x",
        "an uncommon class of more than 64 characters, which no code can hold as it is",
    ]
    shares = dict.fromkeys(labels, 1 / len(labels))
    odd = replace(answer, study=replace(answer.study, label="no_tumor", probabilities=shares), series=())
    report = srread(io.BytesIO(as_file(make_report(odd, classifier.manifest, sources_of(files, odd)))))
    groups = list(groups_of(report).values())
    found = [(group.finding_type.scheme_designator, group.finding_type.value) for group in groups]
    assert found[:6] == [
        ("SCT", "108369006"), ("SCT", "393564001"), ("SCT", "302820008"), ("SCT", "254956000"), ("SCT", "94225005"),
        ("SCT", "108369006"),
    ]  # fmt: skip
    assert [scheme for scheme, _ in found[6:]] == ["99BTRAY", "99BTRAY"]
    absent = [
        [e.value.value for e in group.get_qualitative_evaluations(codes.DCM.PresenceOfProperty)] for group in groups
    ]
    assert absent == [["272519000"], [], [], [], [], ["272519000"], [], []]


def test_a_repeat_has_the_same_bytes_and_other_sources_or_models_another_uid(classifier: Classifier) -> None:
    files = study("several series")
    answer, file = made(files, classifier)
    assert made(files, classifier)[1] == file
    report = read(file)
    assert report.SOPInstanceUID.startswith("2.25.")
    dates = {str(report[name].value) for name in ("ContentDate", "SeriesDate", "InstanceCreationDate")}
    times = {str(report[name].value) for name in ("ContentTime", "SeriesTime", "InstanceCreationTime")}
    assert (dates, times) == ({"20261129"}, {"030405.678901"}), "no date is that of the making"
    others = [
        answer_of(files[:-1], classifier),
        answer_of(classic(study=2), classifier),
        answer_of(files, Classifier(random_bundle(seed=1), device="cpu", engine="eager")),
    ]
    assert len({report_uid(other) for other in (answer, *others)}) == 4
    assert report_uid(replace(answer, classified_at=CLASSIFIED_AT + timedelta(days=1))) == report_uid(answer)


def test_the_patient_is_that_of_the_sources_and_nothing_says_his_name(
    classifier: Classifier, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.DEBUG), warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        files = [made(study(kind), classifier)[1] for kind in KINDS]
    assert "PLANTED" not in caplog.text + " ".join(str(warning.message) for warning in warned)
    report = read(files[0])
    assert str(report.PatientName) == PLANTED
    assert (report.PatientID, report.AccessionNumber, report.PatientBirthDate) == (
        "PLANTEDID",
        "PLANTEDACCESSION",
        "19500102",
    )
    assert report.StudyInstanceUID == f"{ROOT}.1"


def test_btray_knows_what_it_wrote(classifier: Classifier) -> None:
    report: Metadata = read(made(classic(), classifier)[1]).to_json_dict()
    for tag in ("00080070", "0008103E"):
        assert is_own({tag: report[tag]})
    assert not is_own({"00080070": {"vr": "LO", "Value": ["Siemens"]}, "0008103E": {"vr": "LO", "Value": ["t1"]}})
