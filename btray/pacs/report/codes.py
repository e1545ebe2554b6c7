"""Codes of a model's classes and of what is said of them: SNOMED CT and DICOM's own, else those of btray."""

from __future__ import annotations

import re
from typing import Final

from highdicom.sr import CodedConcept
from pydicom.dataset import Dataset
from pydicom.sr.codedict import codes
from pydicom.sr.coding import Code

SCHEME: Final = "99BTRAY"
"""Designator of btray's codes; those of private schemes begin with 99 (PS3.16 8)."""
BRAIN: Final = codes.SCT.Brain
ABSENT: Final = codes.SCT.Absent
PRESENCE: Final = codes.DCM.PresenceOfProperty
PROBABILITY: Final = codes.DCM.Probability
NO_TUMOR: Final = "no_tumor"
_CLASSES: Final = {
    "glioma": Code("393564001", "SCT", "Glioma"),
    "meningioma": Code("302820008", "SCT", "Intracranial meningioma"),
    "pituitary": Code("254956000", "SCT", "Pituitary adenoma"),
    "metastasis": Code("94225005", "SCT", "Metastatic malignant neoplasm to brain"),
    NO_TUMOR: Code("108369006", "SCT", "Neoplasm"),
}
_PROCEDURES: Final = {
    "MR": Code("25056-3", "LN", "MRI unspecified body region"),
    "CT": Code("25045-6", "LN", "CT unspecified body region"),
}
_NOT_PLAIN: Final = re.compile(r"[^ -\[\]-~]")  # but for ASCII, and for the backslash that separates values
_LONGEST: Final = 64  # characters of a meaning


def finding(label: str) -> Code:
    """Return the code of a class; that of `no_tumor` is of a neoplasm, which is then called absent."""
    return _CLASSES.get(label) or own_code(label, label)


def own_code(value: str, meaning: str) -> Code:
    """Return a code of btray's scheme."""
    return Code(_NOT_PLAIN.sub("_", value), SCHEME, _NOT_PLAIN.sub("_", meaning)[:_LONGEST])


def coded(code: Code) -> Dataset:
    """Return a code as an item of a sequence."""
    return CodedConcept.from_code(code)


def procedure(modality: str | None) -> Code:
    """Return the code of what was done to get images of a modality (CID 100)."""
    return _PROCEDURES.get(modality or "") or codes.SCT.ImagingProcedure
