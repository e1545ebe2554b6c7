"""What a DICOM object says of each of its frames (PS3.3 C.7.6.2, C.7.6.16), and how they are rescaled and shown.

Facts that people write as they please, such as the names of series, are read to tell how a slice was taken, and go no
further than memory.
"""

from __future__ import annotations

import functools
import hashlib
import math
import re
from collections.abc import Iterator
from typing import Final, NamedTuple

from btray.data.scans.dicom_header import Dataset
from btray.data.scans.orientation import View
from btray.data.scans.slice_info import Contrast, ImageKind, SliceInfo, Weighting

_PER_FRAME, _SHARED = 0x52009230, 0x52009229
# sequences of functional groups (PS3.3 C.7.6.16.2)
_POSITION_GROUP, _ORIENTATION_GROUP, _MEASURES_GROUP, _RESCALE_GROUP = 0x00209113, 0x00209116, 0x00289110, 0x00289145
_FRAME_TYPE_GROUP, _TIMING_GROUP, _ECHO_GROUP, _MODIFIER_GROUP = 0x00189226, 0x00189112, 0x00189114, 0x00189115
_DIFFUSION_GROUP, _CONTRAST_GROUP = 0x00189117, 0x00189341

_POSITION, _ORIENTATION, _SPACING, _DETECTOR_SPACING = 0x00200032, 0x00200037, 0x00280030, 0x00181164
_ASPECT, _INTERCEPT, _SLOPE, _IMAGE_TYPE, _FRAME_TYPE = 0x00280034, 0x00281052, 0x00281053, 0x00080008, 0x00089007
_SOP_CLASS, _INSTANCE, _STUDY, _SERIES, _MODALITY = 0x00080016, 0x00080018, 0x0020000D, 0x0020000E, 0x00080060
_PATIENT, _BODY_PART, _DESCRIPTION, _PROTOCOL, _BURNED_IN = 0x00100020, 0x00180015, 0x0008103E, 0x00181030, 0x00280301
_SEQUENCE_KINDS, _SEQUENCE_NAME, _PULSE_NAME = 0x00180020, 0x00180024, 0x00189005
_TR, _TE, _TI, _EFFECTIVE_TE, _TIMES_TI, _B_VALUE = (
    0x00180080,
    0x00180081,
    0x00180082,
    0x00189082,
    0x00189079,
    0x00189087,
)
_ECHO_KIND, _INVERTED, _ACQUISITION_CONTRAST = 0x00189008, 0x00189009, 0x00089209
_AGENT, _AGENT_GIVEN = 0x00180010, 0x00189342

_UID: Final = re.compile(r"(?!.{65})(?:0|[1-9]\d*)(?:\.(?:0|[1-9]\d*))+", re.ASCII)
_CODE: Final = re.compile(r"[A-Z][A-Z0-9]{1,9}", re.ASCII)
_SECONDARY_CAPTURE: Final = "1.2.840.10008.5.1.4.1.1.7"
_FARTHEST_MM: Final = 1e5
_WIDEST_PIXEL_MM: Final = 100

_CONTRASTS: Final[dict[str, Weighting]] = {
    "T1": "t1", "T2": "t2", "FLUID_ATTENUATED": "flair", "DIFFUSION": "dwi",
    **dict.fromkeys(("PROTON_DENSITY", "PERFUSION", "T2_STAR", "TAGGING", "STIR", "FLOW_ENCODED", "TOF"), "other"),
}  # fmt: skip


def _words(*words: str, anywhere: str = r"\b\B") -> re.Pattern[str]:
    """Match one of `words` with no letter beside it, or the pattern `anywhere`, which matches nothing if not given."""
    return re.compile(rf"(?:^|[^a-z])(?:{'|'.join(words)})(?![a-z])|{anywhere}", re.IGNORECASE)


# What names of sequences, series and protocols say; the first that holds counts.
_NAMED: Final[tuple[tuple[re.Pattern[str], Weighting], ...]] = (
    (_words("adc", "dti", r"b ?=? ?\d{3,4}", anywhere=r"dwi|diff|tensor|trace|ep_b\d"), "dwi"),
    (
        _words(
            "asl", "bold", "cbf", "cbv", "csi", "dce", "dsc", "fmri", "hemo", "mra", "mrs", "mrv", "mtt", "pd",
            "pwi", "rcbf", "rcbv", "stir", "swi", "tof", "ttp",
            anywhere=r"swan|t2[ _]?(?:\*|star)|perf|spectro|proton|angio|field.?map|venous",
        ),
        "other",
    ),
    (re.compile(r"t1[\W_]{0,3}(?:w |weighted )?flair|flair[\W_]{0,3}t1", re.IGNORECASE), "t1"),
    (re.compile(r"flair|dark.?fluid|tirm|tir2d", re.IGNORECASE), "flair"),
    (_words("bravo", "f?spgr", "lava", "thrive", "vibe", anywhere=r"t1(?!\d)|mp.?rage|tfl|tfe"), "t1"),
    (_words("ciss", "drive", "fiesta", anywhere=r"t2(?!\d)"), "t2"),
    (_words("gre"), "other"),
)  # fmt: skip
_AFTER: Final = _words(
    "ce", "contrast", "enhanced", "gad[a-z]*", "gd", "km", "kontrast[a-z]*", "mdc", "post",
    anywhere=r"\+ ?(?:c|gd|km)(?![a-z])|(?<![a-z])c ?\+|t1ce?(?![a-z])|t1gd",
)  # fmt: skip
_BEFORE: Final = _words(
    "native?", "no contrast", "non.?contrast", "ohne", "plain", "pre", "sans", "senza", "unenhanced", "w/?o", "without",
    anywhere=r"(?<=[\s_])- ?c(?![a-z+\d])|(?<![a-z])c ?-(?!\w)",
)  # fmt: skip
_BOTH: Final = re.compile(r"\bw(?:ith)?\W{0,3}(?:and|und|&|/)?\W{0,3}w(?:ith)?/?o(?:ut)?\b", re.IGNORECASE)
_LOCALIZER: Final = _words("scout", "survey", anywhere=r"locali[sz]er|three.?plane|3.?plane|\bloc\b")
_NO_AGENT: Final = re.compile(r"(?:no|none|non|n|0|nein|without|ohne|w/?o)\b.*|-*\Z", re.IGNORECASE)


class FrameHeader(NamedTuple):
    """How the pixels of a frame become a picture, and what is known of it."""

    slope: float
    intercept: float
    view: View | None
    """None if the object does not say how the slice lies."""
    spacing: tuple[float, float] | None
    """From row to row and from column to column, in mm or, of a picture without scale, in any unit."""
    info: SliceInfo


def frame_headers(elements: Dataset, frames: int) -> Iterator[FrameHeader]:
    """Yield one for each frame. Frames that say nothing of their own share one."""
    shared = elements.first(_SHARED)
    of_frames = elements.items(_PER_FRAME)
    common = _Facts(elements)
    header = None
    for number in range(frames):
        own = of_frames[number] if number < len(of_frames) else None
        if header is None or own is not None or number == 1:
            header = _frame_header(_Groups(elements, shared, own, is_first=number == 0), common)
        yield header


class _Groups:
    """The functional groups of a frame; those of an object without them are its own elements."""

    def __init__(self, top: Dataset, shared: Dataset | None, own: Dataset | None, *, is_first: bool) -> None:
        self.top, self._groups = top, [group for group in (own, shared) if group is not None]
        self._is_first = is_first

    def find(self, group: int, tag: int) -> Dataset:
        """Return what says most closely what `tag` is: the frame's group, the shared one, or the object."""
        for groups in self._groups:
            item = groups.first(group)
            if item is not None and tag in item:
                return item
        return self.top

    def numbers(self, group: int, tag: int, binary: str = "") -> list[float]:
        """Return finite numbers, or none."""
        found = self.find(group, tag).numbers(tag, binary)
        return found if all(map(math.isfinite, found)) else []

    def number(self, group: int, tag: int, default: float, binary: str = "") -> float:
        """Return the first of them."""
        return next(iter(self.numbers(group, tag, binary)), default)

    def position(self) -> list[float]:
        """Return where the frame lies; the object's own position is that of the first one."""
        source = self.find(_POSITION_GROUP, _POSITION)
        if source is self.top and not self._is_first:
            return []
        found = source.numbers(_POSITION)
        return found if len(found) == 3 and all(abs(value) < _FARTHEST_MM for value in found) else []


class _Facts:
    """What an object says of all its frames."""

    def __init__(self, elements: Dataset) -> None:
        self.uids = [_uid(elements.text(tag)) for tag in (_STUDY, _SERIES, _INSTANCE)]
        modality = elements.text(_MODALITY).upper()
        self.modality = modality if _CODE.fullmatch(modality) else None
        self.sop_class = elements.text(_SOP_CLASS)
        self.texts = [elements.text(tag) or None for tag in (_BODY_PART, _DESCRIPTION, _PROTOCOL)]
        self.names = tuple(
            elements.text(tag) for tag in (_SEQUENCE_NAME, _PULSE_NAME, _DESCRIPTION, _PROTOCOL) if tag in elements
        )
        self.burned_in = {"YES": True, "NO": False}.get(elements.text(_BURNED_IN).upper())
        patient = elements.raw(_PATIENT).strip(b" \0")
        self.patient_key = hashlib.sha256(b"PatientID\0" + patient).hexdigest()[:32] if patient else None
        agent = elements.text(_AGENT)
        self.agent = None if not agent else not _NO_AGENT.match(agent)


def _frame_header(groups: _Groups, facts: _Facts) -> FrameHeader:
    slope = groups.number(_RESCALE_GROUP, _SLOPE, 1) or 1.0
    intercept = groups.number(_RESCALE_GROUP, _INTERCEPT, 0)
    directions = groups.numbers(_ORIENTATION_GROUP, _ORIENTATION)
    view = View.of(directions[:3], directions[3:]) if len(directions) == 6 else None
    spacing = _pair(groups.numbers(_MEASURES_GROUP, _SPACING)) or _pair(groups.top.numbers(_DETECTOR_SPACING))
    position = groups.position()
    frame_type = groups.find(_FRAME_TYPE_GROUP, _FRAME_TYPE).codes(_FRAME_TYPE)
    kinds = tuple(frame_type or groups.top.codes(_IMAGE_TYPE))
    info = SliceInfo(
        study_uid=facts.uids[0],
        series_uid=facts.uids[1],
        instance_uid=facts.uids[2],
        modality=facts.modality,
        plane=view.plane if view else None,
        position_mm=view.locate(position) if view and position else None,
        spacing_mm=min(spacing) if spacing else None,
        image_kind=_image_kind(kinds, facts),
        sequence=_sequence(groups, facts.names, kinds) if facts.modality == "MR" else None,
        contrast=_contrast(groups, facts),
        burned_in=facts.burned_in,
        body_part=facts.texts[0],
        description=facts.texts[1],
        protocol=facts.texts[2],
        patient_key=facts.patient_key,
    )
    return FrameHeader(slope, intercept, view, spacing or _pair(groups.top.numbers(_ASPECT)), info)


def _uid(text: str) -> str | None:
    return text if _UID.fullmatch(text) else None


def _pair(numbers: list[float]) -> tuple[float, float] | None:
    """Return two distances, if they are some."""
    plausible = len(numbers) == 2 and all(0 < number < _WIDEST_PIXEL_MM for number in numbers)
    return (numbers[0], numbers[1]) if plausible else None


def _image_kind(kinds: tuple[str, ...], facts: _Facts) -> ImageKind | None:
    if "MOSAIC" in kinds:
        return "mosaic"
    if "LOCALIZER" in kinds or any(_LOCALIZER.search(name) for name in facts.names):
        return "localizer"
    if f"{facts.sop_class}.".startswith(f"{_SECONDARY_CAPTURE}."):
        return "secondary"
    first = kinds[0] if kinds else ""
    return "derived" if first == "DERIVED" else "original" if first in ("ORIGINAL", "MIXED") else None


def _sequence(groups: _Groups, names: tuple[str, ...], kinds: tuple[str, ...]) -> Weighting | None:
    """Return how an MR slice is weighted: as the object says, as its names say, or as its times imply."""
    contrast = groups.find(_FRAME_TYPE_GROUP, _ACQUISITION_CONTRAST).text(_ACQUISITION_CONTRAST).upper()
    if contrast in _CONTRASTS:
        return _CONTRASTS[contrast]
    if groups.number(_DIFFUSION_GROUP, _B_VALUE, 0, "d") > 0 or {"DIFFUSION", "ADC", "TRACEW"} & set(kinds):
        return "dwi"
    named = _weighting_of_names(names)
    if named is not None:
        return named
    repetition = groups.number(_TIMING_GROUP, _TR, 0)
    echo = groups.number(_ECHO_GROUP, _EFFECTIVE_TE, 0, "d") or groups.number(_ECHO_GROUP, _TE, 0)
    inversion = groups.number(_MODIFIER_GROUP, _TIMES_TI, 0, "d") or groups.number(_MODIFIER_GROUP, _TI, 0)
    scanned = groups.top.codes(_SEQUENCE_KINDS)
    if "IR" in scanned or groups.find(_MODIFIER_GROUP, _INVERTED).text(_INVERTED).upper() == "YES":
        inversion = inversion or 1.0
    spins = "SE" in scanned or groups.top.text(_ECHO_KIND).upper() == "SPIN"
    return _weighting_of_times(repetition, echo, inversion, spins) if repetition and echo else None


@functools.lru_cache(maxsize=256)
def _weighting_of_names(names: tuple[str, ...]) -> Weighting | None:
    text = " ".join(names)
    return next((weighting for pattern, weighting in _NAMED if pattern.search(text)), None)


def _weighting_of_times(repetition: float, echo: float, inversion: float, spins: bool) -> Weighting:
    """Return what times in ms make of an image, by the usual ranges of 1.5 and 3 T."""
    if inversion > 1500 and echo > 60:
        return "flair"
    if inversion > 300 and echo < 30:
        return "t1"
    if inversion > 1:
        return "other"
    if not spins:
        return "t1" if echo < 10 and repetition < 500 else "other"
    if repetition < 1200 and echo < 30:
        return "t1"
    return "t2" if repetition > 1500 and echo > 60 else "other"


def _contrast(groups: _Groups, facts: _Facts) -> Contrast | None:
    """Return whether contrast agent was given, None if the object does not tell or contradicts itself."""
    given = groups.find(_CONTRAST_GROUP, _AGENT_GIVEN).text(_AGENT_GIVEN).upper()
    if given in ("YES", "NO"):
        return "post" if given == "YES" else "pre"
    before, after = _contrast_of_names(facts.names)
    if facts.agent is not None:
        after, before = after or facts.agent, before or not facts.agent
    if before == after:
        return None
    return "post" if after else "pre"


@functools.lru_cache(maxsize=256)
def _contrast_of_names(names: tuple[str, ...]) -> tuple[bool, bool]:
    """Return whether names say that agent was not given, and that it was."""
    text = " ".join(names)
    before = bool(_BEFORE.search(text))
    return (False, False) if _BOTH.search(text) else (before, not before and bool(_AFTER.search(text)))
