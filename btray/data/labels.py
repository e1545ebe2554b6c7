"""The class vocabulary: canonical labels, the folder names that mean them, and the order of a model's classes."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

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


def canonical_label(folder_name: str) -> str:
    """Return the canonical label that a folder name or manifest label means, or else the name itself, stripped.

    Case, spaces, `-`, `_` and a closing "tumor" or "tumour" do not count: `Glioma_Tumor`, `no tumour` and `notumor` are
    known.
    """
    name = folder_name.strip()
    key = re.sub(r"[\W_]+", "", name.casefold())
    return _CANONICAL_BY_ALIAS.get(re.sub(r"tumou?rs?$", "", key), name)


def class_order(labels: Iterable[str]) -> tuple[str, ...]:
    """Return the distinct labels in the order of a model's outputs: as in CANONICAL, then the others sorted."""
    distinct = set(labels)
    return tuple(label for label in CANONICAL if label in distinct) + tuple(sorted(distinct - set(CANONICAL)))


def require_known_labels(labels: Iterable[str], classes: Sequence[str], source: str) -> None:
    """Raise UserError if one of `labels`, which come from `source`, is none of a model's `classes`."""
    unknown = sorted(set(labels) - set(classes))
    if unknown:
        raise UserError(
            f"{source} has the label {unknown[0]!r}, which is none of the model's classes ({', '.join(classes)}); "
            "remove or rename it, or train a model with it"
        )
