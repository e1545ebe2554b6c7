"""What an inventory has in common with that of the last run: files that name completed objects alone are not read.

A run that has listed a whole inventory and has left nothing to be read again keeps, in its run.json, which files the
inventory had and how many objects each names. If the next run chooses objects in the same way, and nobody has taken
anything out of the table, then it lists only the other files. Whenever that is not certain, it lists all.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping
from typing import Any

from btray.bulk.listing.inventory import Inventory
from btray.bulk.listing.objects import Counts, Listed
from btray.bulk.report import InventoryRead

_log = logging.getLogger(__name__)

_FORMAT = 1  # of how an inventory is read: increased if its objects count in another way


class Comparison:
    """An inventory, compared with that of the last run, for the next run to be compared with."""

    def __init__(self, inventory: Inventory, settings: Mapping[str, Any], table_files: Mapping[str, int]) -> None:
        """Examine the files of an inventory, before they are read.

        `settings` are what else says which objects are chosen and completed. `table_files` counts the files that each
        run has in the table, before it is found out which objects are completed: a file that is taken out after that
        is then missing in the next run's count.
        """
        self._names = inventory.file_names()
        self._files = len(inventory.files)
        self._settings = _digest({**settings, "format": _FORMAT})
        self._table_files = table_files

    def known(self, last: InventoryRead | None, *, rereads: str = "") -> dict[str, Listed]:
        """Return what stands for the files that need not be read, by their URIs; log how many, or why none.

        `last` is what the last run has kept, if it did. `rereads` names the settings by which completed objects are
        read again.
        """
        if last is None:
            reason = "the last run has read none to its end"
        else:
            reason = f"{rereads} reads objects again" if rereads else self._difference(last)
        if last is None or reason:
            _log.info("all of the inventory is looked at: %s", reason)
            return {}
        found = {uri: last.files[name] for uri, name in self._names.items() if name in last.files}
        _log.info("%d of %d files of the inventory are those of the last run", len(found), self._files)
        return {uri: Listed.completed(counts, source=uri) for uri, counts in found.items()}

    def _difference(self, last: InventoryRead) -> str:
        """Return why files that were read may name objects that are to be read again; empty if they cannot."""
        if last.open:
            return last.open
        if last.settings != self._settings:
            return "the last run chose by other settings, or objects were erased since"
        if any(self._table_files.get(run, 0) != count for run, count in last.table_files.items()):
            return "files were taken out of the table since"
        return ""

    def read(self, counts: Mapping[str, Counts], written: Mapping[str, int], unfinished: str = "") -> InventoryRead:
        """Return what the next run needs to know: of each file, by its URI, what was counted.

        `written` counts the files that this run has written. `unfinished` says why not all of the inventory's objects
        are completed.
        """
        files = {self._names[uri]: of_file for uri, of_file in counts.items() if uri in self._names}
        return InventoryRead(
            open=unfinished,
            files={} if unfinished else files,
            settings=self._settings,
            table_files={} if unfinished else {**self._table_files, **written},
        )


def _digest(content: Any) -> str:
    return hashlib.blake2b(json.dumps(content, sort_keys=True).encode(), digest_size=16).hexdigest()
