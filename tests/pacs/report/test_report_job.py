"""The report job refuses, before it sends anything, a table whose studies no PACS can know or another model decided."""

from __future__ import annotations

from pathlib import Path

import pytest

from btray import storage
from btray.bulk.clinical.pseudonyms import Pseudonyms
from btray.core.errors import UserError
from btray.launch import read_config
from btray.model.bundle import load_bundle
from btray.model.classifier import Classifier
from btray.model.manifest import StudyRule
from btray.pacs.report.config import ReportConfig
from btray.pacs.report.job import report
from tests.helpers.reported import classic, write_tables
from tests.helpers.tiny_bundle import saved_bundle

NOWHERE = "dicomweb+http://127.0.0.1:9/dicom-web"
"""No PACS: a job that asked it would fail, and not with exit code 2."""


def classifier(bundle: Path) -> Classifier:
    return Classifier(load_bundle(str(bundle)), device="cpu", engine="eager")


def test_pseudonyms_another_model_and_another_rule_are_refused_in_one_line(tmp_path: Path) -> None:
    for name, options in (("model", {}), ("other", {"seed": 1}), ("rule", {"study_rule": StudyRule(top=2)})):
        saved_bundle(tmp_path / name, **options)
    model, files = classifier(tmp_path / "model"), classic(slices=2)
    plain = write_tables(str(tmp_path / "plain"), files, model)
    concealed = write_tables(str(tmp_path / "concealed"), files, model, pseudonyms=Pseudonyms(bytes(32)))
    cases = {(concealed, "model"): "pseudonyms", (plain, "other"): "--model", (plain, "rule"): "run classify again"}
    for (studies, bundle), said in cases.items():
        config = ReportConfig(studies=studies, to=NOWHERE, model=str(tmp_path / bundle), patience=0.1)
        with pytest.raises(UserError, match=said) as raised:
            report(config)
        assert raised.value.exit_code == 2
        assert "\n" not in str(raised.value)
    with pytest.raises(storage.StorageError) as away:
        report(ReportConfig(studies=plain, to=NOWHERE, model=str(tmp_path / "model"), patience=0.1))
    assert away.value.exit_code == 1, "it is to be run again"


@pytest.mark.parametrize(
    ("to", "said"),
    [
        ("https://pacs/dicom-web", "dicomweb://HOST"),
        ("dicomweb+http://pacs.example.org/dicom-web", "--insecure"),
        ("dicomweb://me:secret@pacs/dicom-web", "BTRAY_PACS_USER"),
        ("dicomweb://pacs/dicom-web?Modality=MR", "leave out what follows"),
    ],
)
def test_an_address_that_is_none_is_refused_and_no_password_is_quoted(to: str, said: str) -> None:
    with pytest.raises(UserError, match="--to") as raised:
        read_config(ReportConfig, ["--studies", "x", "--to", to])
    assert said in str(raised.value)
    assert "secret" not in str(raised.value)
