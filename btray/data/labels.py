"""The class vocabulary: canonical labels, the folder names that mean them, and the order of a model's classes."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Collection, Iterable, Sequence
from functools import lru_cache
from typing import Annotated

from pydantic import AfterValidator

from btray.core.errors import UserError

CANONICAL = ("glioma", "meningioma", "pituitary", "metastasis", "no_tumor")

# without "tumor", case, spaces and punctuation, see `canonical_label`
_ALIASES = {
    "glioma": ("glioma", "gliomas"),
    "meningioma": ("meningioma", "meningiomas"),
    "pituitary": ("pituitary", "pituitaryadenoma", "pituitaryadenomas"),
    "metastasis": ("metastasis", "metastases", "metastatic", "brainmetastasis", "brainmetastases"),
    "no_tumor": ("no", "non", "none", "normal", "healthy"),
}
_CANONICAL_BY_ALIAS = {alias: label for label, aliases in _ALIASES.items() for alias in aliases}
# small Cyrillic and Greek letters that look like Latin ones, dashes and quotes
_LOOKALIKES = str.maketrans(
    "\u0430\u0435\u043e\u0440\u0441\u0443\u0445\u0456\u0458\u0455\u04bb\u0501\u051b\u051d\u03bf\u03bd\u03b9"
    "\u2010\u2011\u2012\u2013\u2014\u2015\u2212\u2018\u2019\u02bc",
    "aeopcyxijshdqwovi" + "-" * 7 + "'" * 3,
)


@lru_cache(4096)
def canonical_label(folder_name: str) -> str:
    """Return the canonical label that a folder name or manifest label means, or else the name itself, stripped.

    Case, spaces, `-`, `_` and a closing "tumor" or "tumour" do not count: `Glioma_Tumor`, `no tumour` and `notumor` are
    known. A name has the Unicode form NFC, whatever the file system or editor that wrote it; characters without width
    do not count, 1.0 is 1 and True is true, since the same column is text in a CSV file, and numbers in a Parquet file.
    """
    visible = "".join(letter for letter in folder_name if unicodedata.category(letter) != "Cf")
    name = unicodedata.normalize("NFC", visible).strip()
    name = re.sub(r"^([+-]?[0-9]+)\.0+$", r"\1", name)
    if name.casefold() in ("true", "false"):
        name = name.casefold()
    key = re.sub(r"[\W_]+", "", unicodedata.normalize("NFKC", name).casefold())
    return _CANONICAL_BY_ALIAS.get(re.sub(r"tumou?rs?$", "", key), name or folder_name)


Label = Annotated[str, AfterValidator(canonical_label)]
"""A setting that names a label, by any name that means it."""


def label_twins(labels: Iterable[str]) -> list[str]:
    """Name labels that a reader takes for the same: only case, spaces, dashes, width, script or a last dot differ."""
    alike: dict[str, list[str]] = {}
    for label in sorted(set(labels)):
        plain = unicodedata.normalize("NFKC", label).casefold().translate(_LOOKALIKES).rstrip(" .")
        alike.setdefault(re.sub(r"(?<=\w)(?:[\s_]+|-)(?=\w)", " ", plain.replace("_", " ")), []).append(label)
    return [
        f"{' and '.join(map(repr, names))} are labels that look alike" for names in alike.values() if len(names) > 1
    ]


def class_order(labels: Iterable[str]) -> tuple[str, ...]:
    """Return the distinct labels in the order of a model's outputs: as in CANONICAL, then the others sorted."""
    distinct = set(labels)
    return tuple(label for label in CANONICAL if label in distinct) + tuple(sorted(distinct - set(CANONICAL)))


def require_classes(classes: Sequence[str], labels: Collection[str], source: str) -> None:
    """Raise UserError if one of `classes`, by any name that means it, is none of the `labels` that `source` has."""
    if missing := [name for name in classes if canonical_label(name) not in labels]:
        raise UserError(f"--classes {missing[0]}: {source} has this class; there are {', '.join(class_order(labels))}")


def require_label(label: str | None, labels: Collection[str], source: str) -> None:
    """Raise UserError if `label`, which --outliers names if it is not None, is none of the `labels` of `source`."""
    if label is not None and label not in labels:
        raise UserError(f"--outliers {label}: {source} has no such label; there are {', '.join(class_order(labels))}")


def require_known_labels(labels: Iterable[str], classes: Sequence[str], source: str) -> None:
    """Raise UserError if one of `labels`, which come from `source`, is none of a model's `classes`."""
    unknown = sorted(set(labels) - set(classes))
    if unknown:
        raise UserError(
            f"{source} has the label {unknown[0]!r}, which is none of the model's classes ({', '.join(classes)}); "
            "remove or rename it, or train a model with it"
        )
