"""Trees of class folders: at which level the classes are, which files are left out, and which folders are no classes.

One rule for acquire, train, audit and evaluate. `CLASS/**/FILE` or `SPLIT/CLASS/**/FILE` may lie in wrapper folders.
Published data sets have more beside them: folds, masks, predictions, a second copy of themselves. What looks so is
reported in `Tree.warnings` and never passed over, unless the caller names the classes that are meant.
"""

from __future__ import annotations

import re
import shlex
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from posixpath import splitext

from btray.core.errors import UserError
from btray.data.folder_names import class_meant, mask_files, name_key, no_class, no_images, odd_below_class, split_meant
from btray.data.labels import CANONICAL, canonical_label, label_twins
from btray.storage import is_hidden

SPLITS = {
    **dict.fromkeys(("training", "train"), "train"),
    **dict.fromkeys(("validation", "valid", "val"), "val"),
    **dict.fromkeys(("testing", "test"), "test"),
}
"""Names of split folders, and in a manifest's column split, with what they mean."""
COLUMNS = "uri,label[,split][,patient_id][,source]"
LAYOUT = f"one folder per class, or a manifest (.parquet or .csv) with the columns {COLUMNS}"

_MOST_WARNINGS = 20
_ARCHIVES = {".zip", ".tar", ".tgz", ".tbz", ".tbz2", ".txz", ".rar", ".7z", ".gz", ".bz2", ".xz", ".zst"}
# What is found beside images in published data sets. There is no list of image suffixes: DICOM files have any or none.
_NO_IMAGES = {
    ".csv", ".tsv", ".txt", ".md", ".rst", ".json", ".jsonl", ".xml", ".html", ".htm", ".yaml", ".yml", ".log",
    ".pdf", ".doc", ".docx", ".xls", ".xlsx", ".ppt", ".pptx", ".rtf", ".parquet", ".sqlite",
    ".py", ".pyc", ".ipynb", ".m", ".r", ".sh", ".bat", ".exe", ".dll",
    ".mat", ".npy", ".npz", ".h5", ".hdf5", ".pkl", ".pickle", ".pt", ".pth", ".onnx", ".keras", ".safetensors",
    ".db", ".ini", ".lnk", ".url", ".bib", ".tex", ".mp4", ".avi", ".mov", ".svg", ".identifier",
    ".crdownload", ".part", ".partial", ".tmp", ".bak", ".xmp", ".md5", ".sha1", ".sha256", ".htt",
}  # fmt: skip
# The same without a suffix, in lower case; operating systems and network drives make the folders.
_NO_IMAGE_FILES = {
    "readme", "license", "licence", "copying", "changelog", "authors", "notice", "citation", "version", "checksums",
    "md5sums", "sha1sums", "sha256sums", "dicomdir", "icon\r", "thumbs.db:encryptable", "_success",
    "zbthumbnail.info", "synctoy.dat",
}  # fmt: skip
_NO_IMAGE_FOLDERS = {
    "@eadir", "@recycle", "#recycle", "$recycle.bin", "recycler", "recycled", "system volume information",
    "lost+found", "network trash folder", "temporary items", "__pycache__",
    "@__thumb",
}  # fmt: skip

_SERIES = re.compile(r".*\d.*|axial|coronal|sagittal|flair|dwi|adc|swi|pre|post|left|right")
_SPLIT_WORD = r"(?:train(?:ing)?|test(?:ing)?|val(?:id|idation)?|dev)"
_OF_SPLIT = re.compile(rf"^{_SPLIT_WORD}[\W_]+|[\W_]+{_SPLIT_WORD}$", re.I)  # train_glioma, glioma-test
_COPY_WORD = r"(?:copy|kopie|copie|copia|aug(?:mented|mentations?)?)"
_COPY = re.compile(rf"(.+?)(?:[\W_]+{_COPY_WORD}|[\W_]*\(\d+\))+", re.I)  # glioma - Copy (2), glioma_aug


@dataclass(frozen=True)
class Tree:
    """The images of a tree, and what it holds besides. Paths are relative to the folder that was listed."""

    root: str
    """The folder whose children are the classes or the splits."""
    images: dict[str, tuple[str | None, str]]
    """Split and label of each."""
    left_out: dict[str, str] = field(default_factory=dict)
    """Why each of the other files is not an image to take."""
    warnings: list[str] = field(default_factory=list)
    """As from `with_remedy`; each names a folder that does not look like a class."""


def read_tree(paths: Iterable[str], shown: str, classes: Sequence[str] = ()) -> Tree:
    """Return what the files at `paths` below a folder are.

    Args:
        paths: Relative, without hidden ones.
        shown: What errors call the folder.
        classes: The class folders that are meant, by any name that means their label; the others, and what looks like
            masks or the like in these, are then left out. None: all, and what does not look like a class is warned of.

    Raises:
        UserError: there are no images, no class folders, or several trees of them.
    """
    wanted = {canonical_label(name) for name in classes}
    reasons = {path: reason_to_leave_out(path) for path in paths}
    left_out = {path: reason for path, reason in reasons.items() if reason}
    # a key in S3 may have parts without a name
    images = {path: "/".join(filter(None, path.split("/"))) for path, reason in reasons.items() if reason is None}
    if not images:
        besides = f" ({len(left_out)} other files, such as {next(iter(left_out))})" if left_out else ""
        raise UserError(f"{shown} holds no images{besides}; give {LAYOUT}.")
    root = class_root(images.values(), shown, wanted)
    masks = mask_files(images)
    labelled: dict[str, tuple[str | None, str]] = {}
    for path, plain in images.items():
        is_below = _is_below(plain, root)
        place = _class_of(plain.removeprefix(f"{root}/"), wanted) if is_below else None
        if place is None:
            left_out[path] = "no_class_folder" if is_below else "outside_class_tree"
        elif wanted and place[1] not in wanted:
            left_out[path] = "not_in_classes"
        elif wanted and (reason := "mask" if path in masks else _no_image_below(plain, root, place[0])):
            left_out[path] = reason
        else:
            labelled[path] = place
    if not labelled:
        what = f"no folder of --classes {','.join(classes)}" if wanted else "no class folders"
        raise UserError(f"{shown} holds {len(images)} images (such as {next(iter(images))}) but {what}; give {LAYOUT}.")
    if wanted:
        return Tree(root, labelled, left_out)
    folders = {images[path].rpartition("/")[0]: place for path, place in labelled.items()}
    doubts = _doubtful_folders(folders, root)
    class_folders = {_cut(folder, root, split)[:2] for folder, (split, _) in folders.items()}
    others = ",".join(sorted({name for place, name in class_folders if place not in doubts}))
    mixed = {images[path].rpartition("/")[0]: images[path] for path in masks.intersection(labelled)}
    warnings = [*doubts.values(), *(f"{path} looks like a mask beside its image" for path in sorted(mixed.values()))]
    return Tree(
        root,
        labelled,
        left_out,
        with_remedy(warnings, {label for _, label in labelled.values()}, others or "NAME,NAME"),
    )


def with_remedy(warnings: Sequence[str], labels: Collection[str], meant: str = "") -> list[str]:
    """Return the first of `warnings` and of those about `labels`, and, if there are any, what to do about them.

    `meant` is the example for --classes; default: all labels.
    """
    every = [*warnings, *label_twins(labels)]
    if not every:
        return []
    more = [f"and {len(every) - _MOST_WARNINGS} more"] * (len(every) > _MOST_WARNINGS)
    example = shlex.quote(meant or ",".join(sorted(labels)))
    remedy = f"rename or move what is not meant so, or name the classes that are meant: --classes {example}"
    return [*every[:_MOST_WARNINGS], *more, remedy]


def reason_to_leave_out(path: str) -> str | None:
    """Return why the file `path`, relative to its source, is not an image to take; None if it may be one."""
    if is_hidden(path):
        return "hidden"
    *folders, name = path.casefold().split("/")
    suffix = splitext(name)[1]
    if suffix in _ARCHIVES and not name.endswith(".nii.gz"):
        return "archive_inside"
    is_other = (
        suffix in _NO_IMAGES
        or name.endswith("~")
        or name in _NO_IMAGE_FILES
        or not _NO_IMAGE_FOLDERS.isdisjoint(folders)
    )
    return "no_image" if is_other else None


def class_root(names: Iterable[str], shown: str, wanted: Collection[str] = ()) -> str:
    """Find the folder, relative and without slashes around it, whose children are the classes or the splits.

    It is the topmost one with a child that is named like a split or a known class, which are the labels `wanted` if
    there are any; if there is none, single folders count as wrappers down to the first that has files or several
    children.

    Raises:
        UserError: several unrelated folders look like a class tree.
    """
    with_files = {name.rpartition("/")[0] for name in names}
    children: dict[str, set[str]] = {}
    for folders in (folder.split("/") for folder in with_files if folder):
        for depth, child in enumerate(folders):
            children.setdefault("/".join(folders[:depth]), set()).add(child)
    known = {folder for folder, below in children.items() if _is_level(below, wanted)}
    if wanted:  # Train_Set/CLASS and Test_Set/CLASS are one tree
        known = {folder.rpartition("/")[0] if _split_of(folder, loosely=True) else folder for folder in known}
    # a tree in a tree, Training/glioma say, is one tree: only the topmost folders count
    tops = sorted(folder for folder in known if not any(folder != top and _is_below(folder, top) for top in known))
    if len(tops) > 1:
        several = ", ".join([*map(repr, tops[:5]), "..."][: len(tops)])
        remedy = (
            "give each by itself" if wanted else "give each by itself, or name the classes that are meant: --classes"
        )
        raise UserError(f"{shown} holds {len(tops)} class trees ({several}); {remedy}.")
    root = tops[0] if tops else ""
    while not tops and root not in with_files and len(children.get(root, ())) == 1:
        (child,) = (f"{root}/{child}".strip("/") for child in children[root])
        if child in with_files:
            break
        root = child
    return root


def _is_level(names: Iterable[str], wanted: Collection[str]) -> bool:
    """Return whether folders of these names are the classes or the splits of a tree."""
    labels = set(map(canonical_label, names))
    if wanted:
        return not labels.isdisjoint(wanted)
    return not labels.isdisjoint(CANONICAL) or any(map(_split_of, names))


def _is_below(path: str, folder: str) -> bool:
    return not folder or path.startswith(f"{folder}/")


def _split_of(folder: str, *, loosely: bool = False) -> str | None:
    """Return the split that a folder is named for; loosely, Train_Set and 01_dev are named for one too."""
    name = folder.rpartition("/")[2]
    return SPLITS.get(name.casefold()) or (split_meant(name) if loosely else None)


def _class_of(path: str, wanted: Collection[str]) -> tuple[str | None, str] | None:
    """Return split and label of a file at `path` below the root of a tree; None if it is in no class folder."""
    first, *rest = path.split("/")
    split = _split_of(first, loosely=bool(wanted)) if rest and canonical_label(first) not in wanted else None
    label, *below = rest if split else [first, *rest]
    return (split, canonical_label(label)) if below else None


# ---- what looks like no class


def _doubtful_folders(folders: Mapping[str, tuple[str | None, str]], root: str) -> dict[str, str]:
    """Return what is odd about class folders, by their paths, from split and label of all folders with images."""
    labels = {label for _, label in folders.values()}
    known = labels.union(CANONICAL)
    bare = Counter(_OF_SPLIT.sub("", label) for label in labels)
    in_splits = {label for split, label in folders.values() if split}
    cuts = {folder: _cut(folder, root, split) for folder, (split, _) in folders.items()}
    inner_splits = {_split_of(inner, loosely=True) for *_, below in cuts.values() for inner in below} - {None}
    doubts: dict[str, str] = {}
    for folder, (place, name, below) in cuts.items():
        label = folders[folder][1]
        if kind := no_class(name):
            doubts.setdefault(place, f"{place} looks like {kind}")
        elif (whole := _OF_SPLIT.sub("", label)) != label and (bare[whole] > 1 or canonical_label(whole) in known):
            doubts.setdefault(place, f"{place} looks like a split of a class")
        elif (copied := _COPY.fullmatch(name)) and canonical_label(copied[1]) in known:
            doubts.setdefault(place, f"{place} looks like a copy of {copied[1]}")
        elif (meant := class_meant(name)) and canonical_label(meant[0]) in labels:
            doubts.setdefault(place, f"{place} looks like {meant[1]} of {meant[0]}")
        elif in_splits and label not in in_splits.union(CANONICAL):
            doubts.setdefault(place, f"{place} lies beside folders of splits, which have no such class")
        for inner in below:
            kind = "a class" if canonical_label(inner) in known - {label} else odd_below_class(inner)
            # glioma/test alone: a patient, say; no split is lost
            is_harmless = kind == "a split" and len(inner_splits) == 1 and label in CANONICAL and place not in folders
            if kind and not is_harmless:
                doubts.setdefault(place, f"{place} holds {inner}, which looks like {kind}")
    return _alike(cuts.values(), folders) | doubts


def _alike(cuts: Collection[tuple[str, str, list[str]]], images: Collection[str]) -> dict[str, str]:
    """Return which folders hold the same folders, as two versions of a data set do; of no known class, nor images."""
    children: dict[str, set[str]] = {}
    for place, name, below in cuts:
        if place not in images and canonical_label(name) not in CANONICAL:
            children.setdefault(place, set()).update(
                key for key in map(name_key, below[:1]) if not _SERIES.fullmatch(key)
            )
    alike: dict[frozenset[str], dict[str, str]] = {}
    for place, names in children.items():
        alike.setdefault(frozenset(names), {}).setdefault(place.rpartition("/")[2], place)
    for fewer, places in alike.items():
        if len(fewer) > 1:
            places |= {name: place for more, others in alike.items() if fewer < more for name, place in others.items()}
    return {
        place: f"{' and '.join(sorted(places.values()))} hold the same folders, which look like classes"
        for names, places in alike.items()
        if len(names) > 1 and len(places) > 1
        for place in [min(places.values())]
    }


def _cut(folder: str, root: str, split: str | None) -> tuple[str, str, list[str]]:
    """Return the path and the name of the class folder that `folder` is or lies in, and the names below it."""
    above = len(root.split("/")) * bool(root) + bool(split)
    parts = folder.split("/")
    return "/".join(parts[: above + 1]), parts[above], parts[above + 1 :]


def _no_image_below(path: str, root: str, split: str | None) -> str | None:
    """Return what a folder between a class folder and the file at `path` looks like, if it holds no images to take."""
    *_, below = _cut(path.rpartition("/")[0], root, split)
    return next((f"looks like {kind}".replace(" ", "_") for kind in map(no_images, below) if kind), None)
