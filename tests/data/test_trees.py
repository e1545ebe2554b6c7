"""The level of the class folders is found by one rule; what looks like no class is named, not learnt in silence."""

from __future__ import annotations

import unicodedata
from collections import Counter
from pathlib import Path

import pytest

from btray.acquire.config import AcquireConfig
from btray.acquire.job import acquire
from btray.core.errors import UserError
from btray.data.labelled import list_labelled, read_labelled
from btray.data.labels import canonical_label
from btray.data.trees import class_root, read_tree, reason_to_leave_out
from btray.evaluation.config import EvaluateConfig
from btray.evaluation.job import evaluate
from btray.training.config import TrainConfig
from btray.training.prepare import read_source
from tests.helpers.tiny_bundle import saved_bundle

CASES = Path(__file__).parents[2].parent / "shared" / "cases" / "trees"


@pytest.mark.parametrize(
    ("names", "root"),
    [
        (["yes/1.png", "no/1.png"], ""),
        (["w/yes/1.png", "w/no/1.png"], "w"),
        (["v/w/yes/patient/1.png", "v/w/other/patient/1.png"], "v/w"),
        (["w/1.png"], ""),
        (["metastasis/1.png"], ""),
        (["w/metastasis/1.png"], "w"),
        (["Testing/a/1.png"], ""),
        (["w/test/a/1.png", "w/train/a/1.png"], "w"),
    ],
)
def test_the_root_of_a_class_tree(names: list[str], root: str) -> None:
    assert class_root(names, "it") == root


def test_two_class_trees_in_one_archive_are_not_guessed_at() -> None:
    with pytest.raises(UserError, match="'raw'") as caught:
        class_root(["raw/glioma/1.png", "clean/glioma/1.png"], "it")
    assert "'clean'" in str(caught.value)


def test_dicom_names_of_every_kind_may_be_images() -> None:
    for name in ("IM0001", "1.2.840.113619.2.55", "a.dcm", "a.nii.gz", "A.JPEG", "a.IMA"):
        assert reason_to_leave_out(f"glioma/{name}") is None


@pytest.mark.parametrize(
    "paths",
    [
        "Training/glioma_tumor/1.jpg|Training/no_tumor/1.jpg|Testing/glioma_tumor/1.jpg|Testing/no_tumor/1.jpg",
        "TRAIN/a/1.jpg|VALID/b/1.jpg|test/a/1.jpg",
        "glioma/1.jpg|no/1.jpg|test/glioma/1.jpg|test/no/1.jpg",
        "glioma/patient 1/T1/1.dcm|glioma/patient 1/T2/1.dcm|no_tumor/patient 7/series 2/1.dcm",
        "normal/k1/1.jpg|glioma/fold/1.jpg|glioma/images/1.jpg",
        "no/1.jpg|test_tumor/1.jpg|trained nurse/1.jpg|Devic/1.jpg|evaluation of T2/1.jpg",
        "1/1.jpg|2/1.jpg|3/1.jpg",
        "cat/T1/1.jpg|cat/T2/1.jpg|dog/T1/1.jpg|dog/T2/1.jpg",
        "cat/axial/1.jpg|cat/coronal/1.jpg|dog/axial/1.jpg|dog/coronal/1.jpg",
        "cat/p1/1.jpg|cat/p2/1.jpg|dog/p1/1.jpg|dog/p2/1.jpg",
        "glioma/left/1.jpg|glioma/right/1.jpg|no/left/1.jpg|no/right/1.jpg",
        "glioma/test/1.jpg|no/patient/1.jpg",
        "label_0/1.jpg|label_1/1.jpg|T1/1.jpg|grade 2/1.jpg|other/1.jpg|unknown/1.jpg",
        "glioma/glioma/1.jpg|no/no/1.jpg",
        "images/train/glioma/1.jpg|images/train/no/1.jpg",
        "wrap/per/glioma/1.jpg|wrap/per/abscess/1.jpg|wrap/README.md|__MACOSX/wrap/1.jpg",
        "glioma/1_mask.jpg|no/1.jpg|no/unmasked.jpg|no/2 label.jpg",
        "glioma/1.jpg|glioma/2_mask.jpg|glioma/length 1.jpg|no/Te-no_0010.jpg|no/gg (1).jpg|no/segment 7.jpg",
        "glioma_images/1.jpg|no_images/1.jpg|raw glioma/1.jpg|glioma 2/1.jpg",
        "grade -1/1.jpg|grade 1/1.jpg|T1/1.jpg|T1+/1.jpg|etiqueta_1/1.jpg|old stroke/1.jpg|imagination/1.jpg",
        "_NORMAL T1/_1.jpg|_NORMAL T2/_1.jpg",
        "Pituitary/1.jpg|PITUITARY/2.jpg|glioma/1.jpg",
    ],
)
def test_layouts_of_classes_alone_raise_no_doubt(paths: str) -> None:
    assert read_tree(paths.split("|"), "it").warnings == []


SPLIT_NAMES = [
    "Train_Set",
    "test-set",
    "dev",
    "holdout",
    "hold_out",
    "01_train",
    "Validation Data",
    "train2",
    "TestImages",
    "Entra\u00eenement",
    "Conjunto de prueba",
    "Pr\u00fcfung",
    "\u043e\u0431\u0443\u0447\u0435\u043d\u0438\u0435",
    "\u6d4b\u8bd5\u96c6",
    "\ud559\uc2b5",
]
FOLD_NAMES = ["fold1", "fold_2", "Fold 3", "cv0", "k1", "kfold-4", "5fold", "folds", "part 2", "batch_1"]
MASK_NAMES = [
    "masks", "labels", "Annotations", "segmentation", "tumor_masks", "ground truth", "GT", "mask_png", "masque",
    "Masken",
    "M\u00e1scaras", "segmentaciones", "Segmentierung", "etiquetas", "\u6807\u6ce8", "\u043c\u0430\u0441\u043a\u0438",
    "\u30de\u30b9\u30af", "\ub77c\ubca8", "Contours", "bounding boxes", "segmentation-masks", "ROIs", "outlines",
]  # fmt: skip
OTHER_NAMES = [
    "pred",
    "Predictions",
    "results",
    "output",
    "images",
    "imgs",
    "jpg",
    "Augmented Data",
    "cropped",
    "patient 07",
    "thumbnails",
    "Previews",
    "thumbs",
    "vignettes",
    "Vorschau",
    "saliency maps",
    "excluded",
    "Duplicates",
    "tmp",
    "trash",
    "samples",
    "figures",
    "New folder (2)",
    "crops",
    "aug",
    "unlabelled",
    "dataset",
    "all",
    "Neuer Ordner",
]


@pytest.mark.parametrize("name", [*SPLIT_NAMES, *FOLD_NAMES, *MASK_NAMES, *OTHER_NAMES])
@pytest.mark.parametrize("beside", ["", "Training/"])
def test_a_folder_that_is_named_for_no_class_is_named(name: str, beside: str) -> None:
    warning, _ = read_tree([f"{beside}yes/1.jpg", f"{beside}no/1.jpg", f"{beside}{name}/1.jpg"], "it").warnings
    assert warning.startswith(f"{beside}{name} looks like ")


@pytest.mark.parametrize(
    ("paths", "named"),
    [
        ("yes/1.jpg|no/1.jpg|Br35H/TRAIN/1.jpg|Br35H/VAL/1.jpg", "Br35H holds TRAIN"),
        ("yes/1.jpg|no/1.jpg|brain_tumor_dataset/yes/1.jpg|brain_tumor_dataset/no/1.jpg", "brain_tumor_dataset holds"),
        ("cat/1.jpg|dog/1.jpg|stuff/deep/cat/1.jpg", "stuff holds cat"),
        ("Training/no/1.jpg|Training/yes/1.jpg|Training/Training/no/1.jpg", "Training/Training looks like a split"),
        ("Training/no/1.jpg|Training/yes/1.jpg|copy/Training/no/1.jpg", "copy"),
        ("Training/a/1.jpg|Training/b/1.jpg|samples of ours/1.jpg", "samples of ours lies beside"),
        ("glioma/1.jpg|glioma/train/2.jpg|no/1.jpg", "glioma holds train"),
        ("glioma/train/1.jpg|glioma/Test_Set/2.jpg|no/train/1.jpg|no/Test_Set/1.jpg", "no holds train"),
        ("glioma/1.jpg|glioma/glioma_2/normal/2.jpg|no/1.jpg", "glioma holds normal"),
        ("tumor/glioma/1.jpg|tumor/meningioma/1.jpg|no/1.jpg", "tumor holds glioma"),
        ("glioma/images/1.jpg|glioma/masks/1.jpg|no/1.jpg", "glioma holds masks"),
        ("glioma/1.png|glioma/1_mask.png|no/2.png", "glioma/1_mask.png looks like a mask"),
        ("benign/b (1).png|benign/b (1)_mask_1.png|no/2.png", "benign/b (1)_mask_1.png"),
        ("glioma/p1_t1.nii.gz|glioma/p1_seg.nii.gz|no/2.nii.gz", "glioma/p1_seg.nii.gz"),
        ("Train_Set/a/1.jpg|Train_Set/b/1.jpg|Test_Set/a/1.jpg", "Test_Set looks like a split"),
        ("fold1/a/1.jpg|fold2/a/1.jpg", "fold1 looks like a fold"),
        ("Original/cat/1.jpg|Original/dog/1.jpg|Resized ones/cat/1.jpg|Resized ones/dog/1.jpg", "Original"),
        ("site A/cat/1.jpg|site A/dog/1.jpg|site B/cat/1.jpg|site B/dog/1.jpg", "site A and site B hold the same"),
        ("glioma/1.png|glioma/mask_1.png|no/2.png", "glioma/mask_1.png looks like a mask"),
        ("glioma/1.png|glioma/1mask.png|no/2.png", "glioma/1mask.png looks like a mask"),
        ("glioma/001.png|glioma/mask1.png|no/2.png", "glioma/mask1.png looks like a mask"),
        ("glioma/image_01.png|glioma/mask_1.png|no/2.png", "glioma/mask_1.png looks like a mask"),
        ("glioma/1_image.png|glioma/1-Annotation.png|no/2.png", "glioma/1-Annotation.png looks like a mask"),
        ("glioma/IMG1.png|glioma/masque 1.png|no/2.png", "glioma/masque 1.png looks like a mask"),
        ("glioma/p1.png|glioma/p1_ground_truth.png|no/2.png", "glioma/p1_ground_truth.png looks like a mask"),
        ("glioma/p1.png|glioma/p1_segmentation_left.png|no/2.png", "glioma/p1_segmentation_left.png looks"),
        ("glioma/a.png|glioma/a_ma\u0301scara.png|no/2.png", "glioma/a_ma\u0301scara.png looks like a mask"),
        ("glioma/a.png|glioma/a_\u6807\u6ce8.png|no/2.png", "glioma/a_\u6807\u6ce8.png looks like a mask"),
        ("glioma/1.png|glioma/thumbnails/1.png|no/2.png", "glioma holds thumbnails, which looks like previews"),
        ("cat/1.jpg|dog/1.jpg|Entra\u00eenement/cat/1.jpg", "Entra\u00eenement"),
        ("glioma/1.jpg|glioma_mask/1.jpg|no/1.jpg", "glioma_mask looks like masks of glioma"),
        ("cat/1.jpg|masks-cat/1.jpg|dog/1.jpg", "masks-cat looks like masks of cat"),
        ("cat/1.jpg|augmented cat/1.jpg|dog/1.jpg", "augmented cat looks like a version of cat"),
        ("cat/1.jpg|cat_old/1.jpg|dog/1.jpg", "cat_old looks like what was put aside of cat"),
        ("imagesTr/1.nii|labelsTr/1.nii|imagesTs/1.nii", "labelsTr looks like masks"),
        ("A/cat/1.jpg|A/dog/1.jpg|A/cow/1.jpg|B/cat/1.jpg|B/dog/1.jpg", "A and B hold the same"),
        ("train_cat/1.jpg|test_cat/1.jpg|train_dog/1.jpg", "test_cat looks like a split of a class"),
        ("glioma-train/1.jpg|other/1.jpg|no/1.jpg", "glioma-train looks like a split of a class"),
        ("cat/1.jpg|cat - Copy/1.jpg|dog/1.jpg", "cat - Copy looks like a copy of cat"),
        ("cat/1.jpg|dog (2)/1.jpg|dog/1.jpg", "dog (2) looks like a copy of dog"),
        ("cat/1.jpg|glioma_aug/1.jpg|dog/1.jpg", "glioma_aug looks like a copy of glioma"),
        ("cat/1.jpg|dog/1.jpg|Overlays/1.jpg", "Overlays looks like predictions"),
        ("images/1.png|masks/1.png", "masks looks like masks"),
    ],
)
def test_what_lies_beside_or_below_the_classes_is_named(paths: str, named: str) -> None:
    assert any(warning.startswith(named) for warning in read_tree(paths.split("|"), "it").warnings)


@pytest.mark.parametrize(
    "paths",
    ["fold1/no/1.jpg|fold2/no/1.jpg", "images/no/1.jpg|masks/no/1.jpg", "Train_Set/no/1.jpg|Test_Set/no/1.jpg"],
)
def test_two_trees_are_refused_by_name(paths: str) -> None:
    with pytest.raises(UserError) as caught:
        read_tree(paths.split("|"), "it")
    assert all(repr(path.split("/")[0]) in str(caught.value) for path in paths.split("|"))


@pytest.mark.parametrize(
    ("paths", "classes", "taken"),
    [
        ("yes/1.jpg|no/1.jpg|pred/1.jpg|copy/yes/1.jpg", ("yes", "no"), {"yes/1.jpg": None, "no/1.jpg": None}),
        ("yes/1.jpg|no/1.jpg", ("no tumor",), {"no/1.jpg": None}),
        ("no/1.png|no/1_mask.png|no/masks/2.png|no/p/thumbs/1.png", ("no",), {"no/1.png": None}),
        ("masks/1.png|masks/axial/2.png", ("masks",), {"masks/1.png": None, "masks/axial/2.png": None}),
        ("w/1_Train/no/1.jpg|w/dev/no/1.jpg|x/1", ("no",), {"w/1_Train/no/1.jpg": "train", "w/dev/no/1.jpg": "val"}),
        ("pred/1.jpg|train/1.jpg|no/1.jpg", ("pred", "train"), {"pred/1.jpg": None, "train/1.jpg": None}),
        ("Training/me\u0301ta/1.jpg|Testing/m\u00e9ta/1.jpg|x/1.jpg", ("m\u00e9ta",),
         {"Training/me\u0301ta/1.jpg": "train", "Testing/m\u00e9ta/1.jpg": "test"}),
    ],
)  # fmt: skip
def test_named_classes_are_taken_and_all_else_is_left_out_by_name(
    paths: str, classes: tuple[str, ...], taken: dict[str, str | None]
) -> None:
    tree = read_tree(paths.split("|"), "it", classes)
    assert {path: split for path, (split, _) in tree.images.items()} == taken
    assert tree.warnings == []
    assert set(tree.left_out) == set(paths.split("|")) - set(taken)


def test_a_class_that_is_not_there_is_refused_with_those_that_are(tmp_path: Path) -> None:
    make(tmp_path, "yes/1.jpg|no/1.jpg")
    for classes in (("yes", "glioma"), ("glioma",)):
        with pytest.raises(UserError, match="glioma"):
            read_labelled(str(tmp_path), classes=classes)


JUNK = [
    "Thumbs.db", "desktop.ini", "ehthumbs.db", "Icon\r", "README", "LICENSE", "labels.csv", "@eaDir/1.jpg",
    "1.jpg.crdownload", "1.jpg~", "1.jpg.bak", "1.xmp", "@__thumb/1.jpg", "sums.md5",
    "$RECYCLE.BIN/1.jpg", "System Volume Information/1.jpg", "lost+found/1.jpg", "DICOMDIR", "1.jpg:Zone.Identifier",
]  # fmt: skip
HIDDEN = [".DS_Store", "._1.jpg", ".directory", "__MACOSX/1.jpg", ".Trashes/1.jpg"]


def test_what_systems_and_publishers_leave_beside_images_is_no_image() -> None:
    for folder in ("", "glioma/", "Training/glioma/"):
        assert {reason_to_leave_out(folder + name) for name in JUNK} == {"no_image"}
        assert {reason_to_leave_out(folder + name) for name in HIDDEN} == {"hidden"}


def test_names_of_every_kind_may_be_images() -> None:
    for name in ("IM0001", "1.2.840.113619.2.55", "a.dcm", "a.nii.gz", "A.JPEG", "a.IMA", "_DSC0001.jpg", "Icon.png"):
        assert reason_to_leave_out(f"glioma/{name}") is None


def make(folder: Path, paths: str) -> Path:
    for path in paths.split("|"):
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(path.encode())
    return folder


@pytest.mark.parametrize("name", ["br35h", "nested_copy", "underscore_class", "unicode_forms", "junk"])
def test_published_trees_are_read_alike_by_every_job(
    name: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    if not CASES.is_dir():
        pytest.skip(f"{CASES} is not there")
    doubtful = {"br35h": ("pred", "Br35H-Mask-RCNN"), "nested_copy": ("brain_tumor_dataset",)}.get(name, ())
    found = list_labelled(str(CASES / name))  # what the audit reports
    manifest = acquire(AcquireConfig(source=(str(CASES / name),), out=str(tmp_path), license=("CC0-1.0",)))
    printed = " ".join(capfd.readouterr().out.split())
    for folder in doubtful:
        assert any(warning.startswith(folder) for warning in found.warnings)
        assert folder in printed
    if doubtful:
        with pytest.raises(UserError, match="--classes") as caught:  # train and evaluate
            read_labelled(str(CASES / name))
        assert all(folder in str(caught.value) for folder in doubtful)
        table = read_labelled(str(CASES / name), classes=("yes", "no"))
        assert Counter(table["label"].to_pylist()) == {"yes": 6, "no_tumor": 6}
        return
    table = read_labelled(str(CASES / name))
    labels = Counter(table["label"].to_pylist())
    assert (
        labels
        == {
            "underscore_class": dict.fromkeys(["Glioma T1", "Meningioma T1", "_NORMAL T1", "_NORMAL T2"], 6),
            "unicode_forms": {unicodedata.normalize("NFC", "Me\u0301tastase"): 10, "glioma": 10},
            "junk": {"glioma": 8, "no_tumor": 8},
        }[name]
    )
    assert len(found.left_out) == (4 if name == "junk" else 0)
    assert Counter(read_labelled(manifest)["label"].to_pylist()) == labels


def test_train_and_evaluate_refuse_what_is_in_doubt_and_take_the_classes_that_are_named(tmp_path: Path) -> None:
    data = str(make(tmp_path / "data", "glioma/1.jpg|no/1.jpg|pred/1.jpg"))
    train = TrainConfig(data=data, out=str(tmp_path / "out"))
    saved_bundle(bundle := tmp_path / "bundle")
    for start in (
        lambda: read_source(train),
        lambda: evaluate(EvaluateConfig(model=str(bundle), data=data, out=str(tmp_path / "out"))),
    ):
        with pytest.raises(UserError, match=r"pred looks like predictions.*--classes glioma,no\.$"):
            start()
    assert read_source(train.model_copy(update={"classes": ("glioma", "no")})).classes == ("glioma", "no_tumor")


# ---- labels


def test_a_label_has_one_form_whatever_wrote_it() -> None:
    for name in ("Me\u0301tastase", "M\u00e9tastase", " M\u00e9tastase\u200b", "\ufeffM\u00e9tastase\u3000"):
        assert canonical_label(name) == "M\u00e9tastase"
    assert {canonical_label(name) for name in ("1", "1.0", " 1.00 ")} == {"1"}
    assert {canonical_label(name) for name in ("True", "TRUE", "true")} == {"true"}
    assert [canonical_label(name) for name in ("01", "1.5", "1.0.0", "1.")] == ["01", "1.5", "1.0.0", "1."]
    assert canonical_label("\uff27\uff4c\uff49\uff4f\uff4d\uff41") == "glioma"


@pytest.mark.parametrize(
    "paths",
    [
        "Abscess/1.jpg|abscess/2.jpg|glioma/1.jpg",
        "Training/A b/1.jpg|Testing/a\u00a0B/2.jpg",
        "Glioma T1/1.jpg|Glioma_T1/2.jpg",
        "grade-1/1.jpg|grade\u20131/2.jpg",
        "cyst/1.jpg|\u0441yst/2.jpg",
        "cyst/1.jpg|cyst./2.jpg",
        "patient's/1.jpg|patient\u2019s/2.jpg",
    ],
)
def test_labels_that_look_alike_are_refused_naming_both(tmp_path: Path, paths: str) -> None:
    one, two = (canonical_label(path.split("/")[-2]) for path in paths.split("|")[:2])
    (tmp_path / "m.csv").write_text(f"uri,label\nx,{one}\ny,{two}\nz,{one}\n")
    for source in (make(tmp_path / "tree", paths), tmp_path / "m.csv"):
        with pytest.raises(UserError, match=r"look alike.*--classes") as caught:
            read_labelled(str(source))
        assert repr(one) in str(caught.value)
        assert repr(two) in str(caught.value)
        assert len(read_labelled(str(source), classes=(one, two))) >= 2
