"""Whether what a PACS holds is what would be sent: told by what it says, which takes a tenth of making it again.

What is copied from the sources counts for nothing, since a PACS may correct it, and neither do heat maps of a report,
which keeps those that it was sent with. Neither does the time: the endpoint and the nightly job may say the same of the
same slices, on processors that round differently, and the first to say it has said it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, Final

from pydicom.dataset import Dataset

from btray.pacs.report.answers import StudyAnswer
from btray.pacs.report.codes import finding
from btray.pacs.report.document import parameters

_MEASUREMENTS, _GROUP, _NAME, _FINDING, _PROBABILITY, _SOURCE, _PARAMETERS = (
    "126010", "125007", "112039", "121071", "122157", "121112", "111002",
)  # fmt: skip
_PICTURE: Final = (
    "SOPClassUID", "ContentDate", "ContentTime", "DerivationDescription", "SourceImageSequence", "Rows", "Columns",
)  # fmt: skip
"""Of a heat map; its pixels differ in their last digits from one processor to the next."""

_ROUNDING: Final = 1e-3
"""Between probabilities of one model for the same slices."""


def says(report: Dataset, answer: StudyAnswer) -> bool:
    """Return whether a report says of a study, in each of its groups, what an answer does."""
    expected = [
        (probability, (name, finding(label).value, [frame.instance_uid for frame in part.sources], parameters(answer)))
        for part in answer.parts
        for name, label, probability in part.statements
    ]
    try:
        return all(
            rest == expected_rest and math.isclose(probability, expected_probability, abs_tol=_ROUNDING)
            for (probability, rest), (expected_probability, expected_rest) in zip(
                _groups(report), expected, strict=True
            )
        )
    except (AttributeError, IndexError, TypeError, ValueError):
        return False  # it is no such report


def shows_the_same(held: Dataset, picture: Dataset) -> bool:
    """Return whether a picture that is held is another of the same slice, for the same answer."""
    return all(held.get(name) == picture.get(name) for name in _PICTURE)


def _groups(report: Dataset) -> Iterator[tuple[float, tuple[Any, ...]]]:
    for container in _named(report, _MEASUREMENTS):
        for group in _named(container, _GROUP):
            (name,), (found,), (probability,) = (_named(group, code) for code in (_NAME, _FINDING, _PROBABILITY))
            code = found.ConceptCodeSequence[0]
            yield (
                probability.MeasuredValueSequence[0].FloatingPointValue,
                (
                    name.TextValue,
                    code.get("CodeValue") or code.LongCodeValue,
                    [image.ReferencedSOPSequence[0].ReferencedSOPInstanceUID for image in _named(group, _SOURCE)],
                    [item.TextValue for item in _named(group, _PARAMETERS)],
                ),
            )


def _named(parent: Dataset, code: str) -> list[Dataset]:
    return [item for item in parent.ContentSequence if item.ConceptNameCodeSequence[0].get("CodeValue") == code]
