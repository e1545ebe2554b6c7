"""What the names of folders and files say: splits, folds, masks, previews and others that hold no class of images.

They are known in the languages in which data sets are published.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Mapping
from functools import lru_cache

# What follows are names as `name_key` gives them: `Test-Set` is testset. `test_tumor` is none of them, and a class.
_FILLER = r"""(?:data|sets?|split|fold|images?|imgs?|scans?|slices?|samples?|files?|folder|cases|mri|png|jpe?g|\d
    |s?daten(?:satz)?|donnees|jeu|datos|conjunto|dados|dati|de|di|d|tr|ts|集)*"""
_TRAIN = """train(?:ing|ings)?(?:val)?|entraine?ment|apprentissage|entrenamiento|trein(?:o|amento)|addestramento
    |обучение|训练|訓練|学習|훈련|학습"""
_VAL = "val(?:id|ida[ct]ion|idierungs?|idacao|idazione)?|dev(?:elopment)?|валидация|验证|検証|검증"
_TEST = "tests?|teste|testing|hold(?:ing)?out|heldout|eval(?:uation)?|prufung|prueba|prova|тест|测试|テスト|테스트"
_MASK = """mask(?:s|e[nr]?|ar|[aiy])?|masques?|mascher[ae]|mascaras?|маск[аи]|掩[码膜模]|蒙[版板]|マスク|마스크
    |labelmaps?|annot(?:s|ations?|ationen)?|anotac(?:ion(?:es)?|ao|oes)|annotazion[ei]|аннотаци[ия]|注释|アノテーション
    |seg(?:s|mented|mentations?|mentationen|mentierung(?:en)?)?|segmentac(?:ion(?:es)?|ao|oes)|segmentazion[ei]
    |сегментаци[яи]|分割|セグメンテーション|분할|contours?|contorn[oi]s?|kontur(?:en)?|контуры?|轮廓|輪郭|outlines?
    |delineations?|polygons?|(?:bounding|b)box(?:es)?|groundtruths?|gt|veriteterrain|金标准|rois?"""
_LABEL = (
    "labels?|etiquetas?|etiquettes?|etikett(?:en)?|etichett[ae]|rotulos?|标[签記记注]|ラベル|라벨"  # label_1 is a class
)
_MASKS = rf"""(?:brain|tumou?r|lesion|train(?:ing)?|test(?:ing)?|val|manual|binary|semantic|images?|img|de|{_MASK})*
    (?:{_MASK}|(?:{_LABEL})(?!\d))"""
_PREDICTIONS = """(?:pred(?:ict|icted|iction)?|output|result|inference|heatmap|overlay|gradcam|saliency|probability)
    (?:map)?s?"""
_PREVIEWS = """(?:images?|img)?(?:thumb(?:nail)?s?|previews?|quicklooks?|icons?|vignettes?|miniatur(?:en?|es?|as?)
    |vorschau(?:bilder)?|apercus?|anteprim[ae]|vistasprevias|缩略图|サムネイル)"""
_ASIDE = """trash|papierkorb|deleted|removed|excluded|rejected|discarded|unused|corrupt(?:ed)?|dup(?:e|licate)s?|te?mp
    |old|cache|unlabell?ed|unannotated|unsorted"""
_FOLDS = r"(?:k|cv|(?:k|cv)?fold|crossval(?:idation)?|part|partition|batch|subset|split|set)\d+|(?:k|\d+(?:th)?)?folds?"
_IMAGES = """(?:all|raw|original)?(?:images?|imgs?|pictures?|slices|scans|jpe?gs?|pngs?|dicoms?|dcm|niftis?|nii|bilder
    |imagenes|imagens|immagini|изображения|图像|图片|画像|samples|examples?|figures?|plots?|screenshots?
    |data(?:sets?)?|all|archive|input|sources?|assets|docs?|documentation|static|models?|checkpoints?|logs?|notebooks?)
    (?:t[rs])?"""
_VERSIONS = "aug(?:ment(?:ed|ations?))?|crop(?:ped|s)?|resized|(?:pre)?processed|raw|originals?|copy|backup"
_PATIENTS = r"(?:patient|subject|sub|case|participant|study|series|session)s?\d+"
_UNNAMED = r"""(?:newfolder|untitledfolder|neuerordner|nouveaudossier|nuevacarpeta|novapasta|nuovacartella|новаяпапка
    |新建文件夹)\d*"""


def _pattern(names: str, after: str = "") -> re.Pattern[str]:
    return re.compile(f"(?:{names}){after}", re.VERBOSE)


_SPLIT = _pattern(rf"{_FILLER}(?:(?P<train>{_TRAIN})|(?P<val>{_VAL})|(?P<test>{_TEST}))", _FILLER)
_NO_IMAGES_BELOW = {
    "masks": _pattern(_MASKS, _FILLER),
    "predictions": _pattern(_PREDICTIONS, _FILLER),
    "previews": _pattern(_PREVIEWS, _FILLER),
    "what was put aside": _pattern(_ASIDE, _FILLER),
}
_BELOW = {"a split": _SPLIT} | _NO_IMAGES_BELOW
_NO_CLASSES = _BELOW | {
    "a fold": _pattern(_FOLDS),
    "a folder of images": _pattern(_IMAGES),
    "a version of the images": _pattern(_VERSIONS, _FILLER),
    "a patient": _pattern(_PATIENTS),
    "a folder that nobody named": _pattern(_UNNAMED),
}
_BESIDE = _NO_IMAGES_BELOW | {"a version": _pattern(_VERSIONS)}
_MASK_WORD = _pattern(rf"(.*?)(?:{_MASK}|{_LABEL})")
_TWO_WORDS = re.compile(r"(ground|bounding)[\W_](?=truth|box)", re.IGNORECASE)
_SUFFIX = re.compile(r"(\.nii)?\.[^.]*$", re.IGNORECASE)
_IMAGE_WORD = _pattern("images?|imgs?|im|scan|slice|picture|original|orig|mri|bild|imagen|imagem|immagine")


def no_class(name: str) -> str | None:
    """Return what a class folder or label of this name looks like, if that is no class."""
    return _looks_like(name, _NO_CLASSES)


def odd_below_class(name: str) -> str | None:
    """Return what a folder in a class folder looks like, if its files are not images of that class alone."""
    return _looks_like(name, _BELOW)


@lru_cache(4096)
def no_images(name: str) -> str | None:
    """Return what a folder in a class folder looks like, if it holds no images to take."""
    return _looks_like(name, _NO_IMAGES_BELOW)


def class_meant(name: str) -> tuple[str, str] | None:
    """Return the class of which a folder holds no images, or other versions, by its name, and what it holds.

    The folders glioma_mask, Masks of glioma and augmented-glioma are such.
    """
    words = re.split(r"[\W_]+(?:of[\W_]+)?", name.strip())
    for word, rest in ((words[-1], words[:-1]), (words[0], words[1:])):
        if rest and (kind := _looks_like(word, _BESIDE)):
            return " ".join(rest), kind
    return None


def split_meant(name: str) -> str | None:
    """Return the split that a folder is named for: Train_Set and 01_dev are, say."""
    match = _SPLIT.fullmatch(name_key(name))
    return match.lastgroup if match else None


def name_key(name: str) -> str:
    """Return the name without case, accents, spaces and punctuation."""
    plain = name if name.isascii() else re.sub("[\u0300-\u036f]", "", unicodedata.normalize("NFKD", name))
    return re.sub(r"[\W_]+", "", unicodedata.normalize("NFC", plain).casefold())


def _looks_like(name: str, kinds: Mapping[str, re.Pattern[str]]) -> str | None:
    return next((kind for kind, pattern in kinds.items() if pattern.fullmatch(name_key(name))), None)


def mask_files(paths: Iterable[str]) -> set[str]:
    """Return those of `paths` that are named for a mask and whose image lies beside them.

    The image of 1_mask.png, 1mask.png, 1_mask_2.png, mask_1.png and imagemask1.png is 1.png, 001.png or img1.png; or
    1_t1.png, since it may have a word of its own.
    """
    masks: dict[str, set[str]] = {}
    for path in paths:
        words = _words(path)
        for place, word in enumerate(words):
            if (rest := _before_mask(word)) is not None:
                before = [*words[:place], rest]
                masks[path] = {_bare(before), _bare([*before, *words[place + 1 :]])} - {""}
                break
    folders = {path.rpartition("/")[0] for path in masks}
    images: dict[str, set[str]] = {}
    for path in paths if masks else ():
        folder = path.rpartition("/")[0]
        if folder in folders and path not in masks:
            images.setdefault(folder, set()).update((_bare(_words(path)), _bare(_words(path.rpartition("_")[0]))))
    return {path for path, names in masks.items() if not names.isdisjoint(images.get(path.rpartition("/")[0], ()))}


def _words(path: str) -> list[str]:
    """Return the words and numbers of a file's name, without its suffix."""
    name = _SUFFIX.sub("", unicodedata.normalize("NFC", path.rpartition("/")[2]))
    return re.findall(r"[^\W\d_]+|\d+", _TWO_WORDS.sub(r"\1", name))


def _bare(words: Iterable[str]) -> str:
    """Return `words` as one text that is the same for 1, 001 and Image 1."""
    keys = (word.lstrip("0") or "0" if word.isdecimal() else word.casefold() for word in words if word)
    return " ".join(key for key in keys if not _IMAGE_WORD.fullmatch(key))


@lru_cache(1 << 16)
def _before_mask(word: str) -> str | None:
    """Return what stands before the word for a mask with which `word` ends; None if it ends with none."""
    match = _MASK_WORD.fullmatch(name_key(word))
    return match[1] if match else None
