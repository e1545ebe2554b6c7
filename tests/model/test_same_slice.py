"""One slice gets the same answer as DICOM in every lossless syntax, as a 16-bit PNG and as NIfTI."""

from __future__ import annotations

import gzip
import io

import numpy as np
import pytest
from PIL import Image

from btray import phantoms
from btray.data.scans import decode
from btray.model.classifier import Classifier
from btray.model.shipped import FOLDER, SHIPPED
from tests.helpers import dicom_files as dicom
from tests.helpers.nifti_files import TO_RAS, write_nifti
from tests.helpers.tiny_bundle import random_bundle


@pytest.fixture(scope="module", params=["random", "shipped"])
def classifier(request: pytest.FixtureRequest) -> Classifier:
    if request.param == "random":
        return Classifier(random_bundle(seed=2))
    if not (FOLDER / SHIPPED).is_dir():
        pytest.skip(f"NO SHIPPED MODEL: {FOLDER / SHIPPED} does not exist, so what this test shows is NOT shown here")
    return Classifier.load()


@pytest.mark.parametrize("label", ["glioma", "meningioma", "no_tumor"])
def test_one_slice_gets_the_same_answer_in_every_format(classifier: Classifier, label: str) -> None:
    gray = decode(phantoms.encoded_phantom(label, 3)).frames[0].astype(np.uint16)
    gray = gray * 16 + np.random.default_rng(1).integers(0, 16, gray.shape).astype(np.uint16)
    png = io.BytesIO()
    Image.fromarray(gray).save(png, "PNG")
    volume = gray.T[:, :, None]
    turned = TO_RAS @ np.diag([-1.0, -1.0, 1.0, 1.0])
    files = {
        "png": png.getvalue(),
        "nifti": write_nifti(volume),
        "nifti, turned and packed": gzip.compress(write_nifti(volume[::-1, ::-1], turned)),
        "nifti of floats": write_nifti(volume.astype(np.float32) / 7 - 100),
        **{f"dicom {syntax}": dicom.slice_file(gray, syntax=syntax) for syntax in dicom.LOSSLESS},
        "dicom, turned": dicom.slice_file(gray[::-1, ::-1].copy(), ImageOrientationPatient=[-1, 0, 0, 0, -1, 0]),
        "dicom, rescaled": dicom.slice_file(gray, RescaleSlope="1.37", RescaleIntercept="-11"),
    }
    answers = classifier.predict(list(files.values()))
    first = answers[0]
    for name, said in zip(files, answers, strict=True):
        assert said.label == first.label, name
        # floats are scaled to 16 bits, where the levels of a stretch fall otherwise
        tolerance = 5e-3 if "floats" in name else 1e-3
        assert said.probabilities == pytest.approx(first.probabilities, abs=tolerance), name
