"""Test items that also stand in training data: refused where they are whole, reported where they are parts.

``refuse_leaks`` keeps whole inputs out of a workspace. ``ancestry_overlap`` looks afterwards, at every data set that a
version and all that it grew from learned, for n words in a row as well.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from meristem.data.datasets import ROWS_FILE
from meristem.data.overlap import input_text, leaks
from meristem.ecosystem import assets, lineage, retirement
from meristem.ecosystem.assets import AssetEntry
from meristem.ecosystem.versions import VersionEntry
from meristem.errors import BadInput
from meristem.evaluation.service import load_suite_asset
from meristem.evaluation.suites import Suite
from meristem.store.store import Store

if TYPE_CHECKING:
    from meristem.data.matching import ItemMatch, Wanted

SCHEMA = "meristem/contamination/v1"
NGRAM = 13
MOST_ITEMS = 100  # listed in a document
Progress = Callable[[str, int, int, str], None]


def refuse_leaks(
    store: Store, where: str, rows: Sequence[dict[str, Any]], suites: Iterable[AssetEntry]
) -> None:
    """Raises ``BadInput`` naming the first rows of ``where`` whose input is a test item of ``suites``."""
    for entry in suites:
        refuse_leaks_into(where, rows, entry.label, load_suite_asset(store, entry))


def refuse_leaks_into(where: str, rows: Sequence[dict[str, Any]], label: str, suite: Suite) -> None:
    found = leaks(rows, suite.test_rows())
    if found:
        shown = ", ".join(f"{row} = {item}" for row, item in found[:3])
        more = f" and {len(found) - 3} more" if len(found) > 3 else ""
        rows_found = len({row for row, _ in found})  # one row may be an item of several tasks
        raise BadInput(
            f"{where}: {rows_found} training rows are also test items of suite {label} ({shown}{more}); "
            "remove them from the training data"
        )


@dataclass(frozen=True)
class Checked:
    """A data set that was read; ``digest`` of the asset."""

    label: str
    digest: str
    rows: int


@dataclass(frozen=True)
class Unchecked:
    """A data set whose rows are gone; ``why`` names the event, as in ``deleted by event 12``."""

    label: str
    digest: str
    why: str


@dataclass(frozen=True)
class ContaminationReport:
    """What of a suite stands in the training data of a version and of all that it grew from.

    ``found``: the items, worst first (with their answer, whole, by share). Of ``items`` in the suite, n-grams were
    looked for in ``searched``; the others are short, or hold nothing but text that many items share, and were compared
    as a whole; ``blank`` ones hold no text here (a harness keeps it). ``unchecked`` data were deleted or retired;
    ``unrecorded`` versions came ready made, and what they learned from is not known.
    """

    version: str
    version_digest: str
    suite: str
    suite_digest: str
    ngram: int
    items: int
    searched: int
    blank: int
    found: tuple[ItemMatch, ...]
    checked: tuple[Checked, ...]
    unchecked: tuple[Unchecked, ...]
    unrecorded: tuple[str, ...]

    @property
    def complete(self) -> bool:
        """Whether all recorded training data and every item could be looked at."""
        return not self.unchecked and not self.blank

    @property
    def rows(self) -> int:
        """Training rows that were read."""
        return sum(data.rows for data in self.checked)

    def to_document(self, most: int = MOST_ITEMS) -> dict[str, Any]:
        """JSON value; of ``found`` the first ``most``, with the true counts beside them."""
        counts = {
            "contaminated": len(self.found),
            "exact": sum(match.kind == "exact" for match in self.found),
            "with_answer": sum(bool(match.answer) for match in self.found),
            "complete": self.complete,
            "rows": self.rows,
        }
        listed = [asdict(match) for match in self.found[:most]]
        return {"schema": SCHEMA, **asdict(self), **counts, "found": listed}


def ancestry_overlap(
    store: Store,
    version: VersionEntry,
    suite: AssetEntry,
    ngram: int = NGRAM,
    progress: Progress | None = None,
) -> ContaminationReport:
    """Look for the items of ``suite`` in all that ``version`` and its ancestors learned.

    Raises ``BadInput`` for a suite that was given up and for an ``ngram`` (words in a row) outside 3 to 100.
    """
    return ancestry_overlaps(store, version, [suite], ngram, progress)[0]


def ancestry_overlaps(
    store: Store,
    version: VersionEntry,
    suites: Sequence[AssetEntry],
    ngram: int = NGRAM,
    progress: Progress | None = None,
) -> list[ContaminationReport]:
    """``ancestry_overlap`` of several suites, in one reading of the data."""
    from meristem.data.matching import OverlapSearch

    if not 3 <= ngram <= 100:
        raise BadInput(f"an n-gram has 3 to 100 words, not {ngram}; 13 is the usual number")
    wanted = [_wanted(entry, load_suite_asset(store, entry)) for entry in suites]
    search = OverlapSearch([item for items in wanted for item in items], ngram)
    data, unchecked, unrecorded = _training_data(store, version)
    checked = _read_all(store, data, search.add, f"training data of {version.label}", progress)
    matches, searched = search.found(), search.searched()
    reports, start = [], 0
    for entry, items in zip(suites, wanted, strict=True):
        mine = range(start, start + len(items))
        start += len(items)
        reports.append(
            ContaminationReport(
                version=version.label,
                version_digest=version.digest,
                suite=entry.label,
                suite_digest=entry.digest,
                ngram=ngram,
                items=len(items),
                searched=sum(searched[number] for number in mine),
                blank=sum(not item.inputs for item in items),
                found=tuple(sorted((matches[n] for n in mine if n in matches), key=_badness)),
                checked=checked,
                unchecked=unchecked,
                unrecorded=unrecorded,
            )
        )
    return reports


def _badness(match: ItemMatch) -> tuple[bool, bool, float]:
    return not match.answer, match.kind != "exact", -match.share


def _wanted(entry: AssetEntry, suite: Suite) -> list[Wanted]:
    from meristem.data.matching import Wanted

    items = [(task, item) for task in suite.tasks for item in task.items]
    found = []
    for (task, item), row in zip(items, suite.test_rows(), strict=True):
        texts = [row.get("source") or "", input_text(row)]
        answers = [item.answer, *item.references]
        found.append(
            Wanted(
                id=row["id"],
                group=f"{entry.digest} {task.name}",
                inputs=tuple(dict.fromkeys(filter(None, texts))),
                answers=tuple(answer for answer in answers if answer and answer != item.text),
            )
        )
    return found


def _training_data(
    store: Store, version: VersionEntry
) -> tuple[list[AssetEntry], tuple[Unchecked, ...], tuple[str, ...]]:
    here, gone = [], []
    with store.database.read() as connection:
        learned = lineage.learned(connection, version)
        for digest in learned.data:
            entry = assets.resolve(connection, "dataset", digest)
            if event := retirement.event_of(connection, digest):
                why = f"{event.kind.partition('.')[2]} by event {event.sequence}"
                gone.append(Unchecked(entry.label, digest, why))
            else:
                here.append(entry)
    return here, tuple(gone), learned.unrecorded


def _read_all(
    store: Store,
    data: list[AssetEntry],
    add: Callable[[str, Iterable[dict[str, Any]], Callable[[int], None]], int],
    what: str,
    progress: Progress | None,
) -> tuple[Checked, ...]:
    total = sum(entry.record.facts["rows"] for entry in data)
    before, checked = 0, []

    def step(rows: int) -> None:
        if progress:
            progress(what, before + rows, total, "")

    for entry in data:
        rows = add(entry.label, _rows(store, entry), step)
        before += rows
        checked.append(Checked(entry.label, entry.digest, rows))
    return tuple(checked)


def _rows(store: Store, entry: AssetEntry) -> Iterator[dict[str, Any]]:
    """One row at a time: parsed, a data set takes several times the memory of its bytes."""
    for line in io.BytesIO(store.read_blob(entry.record.files[ROWS_FILE])):
        yield json.loads(line)
