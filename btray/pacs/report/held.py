"""Whether what a PACS holds is what would be sent: told by what it says, which takes a tenth of making it again.

What is copied from the sources counts for nothing, since a PACS may correct it, and neither do heat maps of a report,
which keeps those that it was sent with.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final

from pydicom.dataset import Dataset

from btray.pacs.report.answers import StudyAnswer
from btray.pacs.report.codes import finding
from btray.pacs.report.document import dates, parameters

_MEASUREMENTS, _GROUP, _NAME, _FINDING, _PROBABILITY, _SOURCE, _PARAMETERS = (
    "126010", "125007", "112039", "121071", "122157", "121112", "111002",
)  # fmt: skip
_PICTURE: Final = (
    "SOPClassUID", "ContentDate", "ContentTime", "DerivationDescription", "SourceImageSequence", "Rows", "Columns",
)  # fmt: skip
"""Of a heat map; its pixels differ in their last digits from one processor to the next."""


def says(report: Dataset, answer: StudyAnswer) -> bool:
    """Return whether a report says of a study, in each of its groups, what an answer does."""
    expected = [
        (name, finding(label).value, probability, [frame.instance_uid for frame in part.sources], parameters(answer))
        for part in answer.parts
        for name, label, probability in part.statements
    ]
    date, time = map(str, dates(answer))
    try:
        return (report.ContentDate, report.ContentTime, list(_groups(report))) == (date, time, expected)
    except (AttributeError, IndexError, TypeError, ValueError):
        return False  # it is no such report


def shows_the_same(held: Dataset, picture: Dataset) -> bool:
    """Return whether a picture that is held is another of the same slice, for the same answer."""
    return all(held.get(name) == picture.get(name) for name in _PICTURE)


def _groups(report: Dataset) -> Iterator[tuple[Any, ...]]:
    for container in _named(report, _MEASUREMENTS):
        for group in _named(container, _GROUP):
            (name,), (found,), (probability,) = (_named(group, code) for code in (_NAME, _FINDING, _PROBABILITY))
            code = found.ConceptCodeSequence[0]
            yield (
                name.TextValue,
                code.get("CodeValue") or code.LongCodeValue,
                probability.MeasuredValueSequence[0].FloatingPointValue,
                [image.ReferencedSOPSequence[0].ReferencedSOPInstanceUID for image in _named(group, _SOURCE)],
                [item.TextValue for item in _named(group, _PARAMETERS)],
            )


def _named(parent: Dataset, code: str) -> list[Dataset]:
    return [item for item in parent.ContentSequence if item.ConceptNameCodeSequence[0].get("CodeValue") == code]
