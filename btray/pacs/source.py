"""The archive of a PACS as the input of a job: its instances listed, and read in whole series where most are wanted."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from typing import Final

from btray.core.errors import UserError
from btray.data.scans import ScanLimits, ScanRejected, SliceInfo
from btray.data.scans.dicom import other_kind
from btray.pacs.address import Address, InstanceUrl, Metadata, first_of
from btray.pacs.client import INSTANCE, SERIES, SOP_CLASS, STUDY, DicomWeb
from btray.pacs.config import PacsConfig
from btray.pacs.headers import slice_info
from btray.pacs.own import is_own
from btray.storage import FileInfo, StorageError
from btray.storage.read_many import ReadResult

_ROWS, _COLUMNS, _BITS, _FRAMES, _MODALITY = "00280010", "00280011", "00280100", "00280008", "00080060"
_USUAL: Final = {_ROWS: 512, _COLUMNS: 512, _BITS: 16, _FRAMES: 1}
_OWN: Final = "an answer of btray"


class PacsSource:
    """The studies that an address chooses."""

    def __init__(self, address: Address, access: PacsConfig, *, patience: float) -> None:
        """Connect when it is first asked, with the credentials of `access`; wait `patience` seconds for a PACS."""
        self.root = address.root
        self.left_out: Counter[str] = Counter()
        """Instances that `list_images` has left out so far, by what they are."""
        self._address = address
        self._client = DicomWeb(address.root, access, patience=patience, max_bytes=ScanLimits().max_bytes)

    def list_images(self) -> Iterator[FileInfo]:
        """Yield the images, series by series, each as its URL; its etag is its UID, since an instance never changes.

        The size is that of its pixels, uncompressed: a PACS does not tell that of the object. What is no image, and
        what btray wrote, is counted. Raises UserError if there is no image, and StorageError.
        """
        found = False
        for study in self._client.studies(self._address):
            study_uid = first_of(study, STUDY)
            for series in self._client.series(study_uid, self._address):
                for info in self._list_series(study_uid, series):
                    found = True
                    yield info
        if not found:
            left_out = f" ({self.left_out.total()} are no scans)" if self.left_out else ""
            raise UserError(f"--input {self.root}: no image of any study matches the query{left_out}; check it")

    def _list_series(self, study: str, series: Metadata) -> Iterator[FileInfo]:
        series_uid, own, modality = first_of(series, SERIES), is_own(series), first_of(series, _MODALITY)
        for instance in self._client.instances(study, series_uid):
            if kind := _OWN if own else other_kind(first_of(instance, SOP_CLASS), modality):
                self.left_out[kind] += 1
                continue
            uid = first_of(instance, INSTANCE)
            yield FileInfo(str(InstanceUrl(self.root, study, series_uid, uid)), _pixel_bytes(instance), uid, 0.0)

    def read(self, uris: Sequence[str]) -> Iterator[tuple[int, ReadResult]]:
        """Yield the number of each of `uris` once, as they come, with the instance's file or why it cannot be read.

        A series is retrieved whole if half of it or more is wanted. Once a PACS was waited for in vain, it is not asked
        for the series that are left.
        """
        away: StorageError | None = None
        for (study, series), numbers in self._by_series(uris).items():
            wanted = list(numbers)
            if away is None:
                whole = len(wanted) > 1 and 2 * len(wanted) >= self._client.count(study, series)
                results = (self._client.retrieve_series if whole else self._client.retrieve_instances)(
                    study, series, wanted
                )
            else:
                results = ((uid, _not_tried(away, uris[numbers[uid][0]])) for uid in wanted)
            failed: StorageError | None = None
            for uid, result in results:
                failed = result if isinstance(result, StorageError) and result.retryable else failed
                for number in numbers[uid]:
                    yield number, result
            if away is None and failed is not None and not self._client.answers():
                away = failed

    def read_many(self, uris: Sequence[str], **_: object) -> list[ReadResult]:
        """Return the same in the order of `uris`, as `btray.storage.read_many` does."""
        results = dict(self.read(uris))
        return [results[number] for number in range(len(uris))]

    def headers(self, uris: Sequence[str]) -> list[SliceInfo | ScanRejected | StorageError]:
        """Return what the PACS says of each instance, in their order: nothing is retrieved."""
        infos: dict[int, SliceInfo | ScanRejected | StorageError] = {}
        away: StorageError | None = None
        for (study, series), numbers in self._by_series(uris).items():
            try:
                of_series = [] if away else self._client.metadata(study, series)
            except StorageError as error:
                infos |= {number: error for some in numbers.values() for number in some}
                away = error if error.retryable and not self._client.answers() else None
                continue
            for metadata in of_series:
                info = slice_info(metadata)
                infos |= dict.fromkeys(numbers.get(first_of(metadata, INSTANCE), ()), info)
        missing = [_not_tried(away, uri) if away else StorageError("not_found", uri) for uri in uris]
        return [infos.get(number) or missing[number] for number in range(len(uris))]

    def _by_series(self, uris: Sequence[str]) -> dict[tuple[str, str], dict[str, list[int]]]:
        """Return the numbers of `uris` by study and series, and by the UIDs of the instances."""
        groups: dict[tuple[str, str], dict[str, list[int]]] = defaultdict(lambda: defaultdict(list))
        for number, uri in enumerate(uris):
            url = InstanceUrl.parse(uri)
            if url is None or url.root != self.root:  # credentials go nowhere else
                raise StorageError("failed", uri, f"it is no instance of {self.root}")
            groups[url.study, url.series][url.instance].append(number)
        return groups


def _not_tried(after: StorageError, uri: str) -> StorageError:
    return StorageError(after.code, uri, f"not tried after {after}")


def _pixel_bytes(instance: Metadata) -> int:
    size = 1
    for tag, usual in _USUAL.items():
        value = first_of(instance, tag)
        size *= int(value) if value.isdecimal() else usual
    return size // 8
