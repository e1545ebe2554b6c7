"""What the classify job says while it runs and at its end."""

from __future__ import annotations

import heapq
import json
import sys
import time
from collections import Counter
from collections.abc import Mapping
from typing import Any

from btray.bulk.listing import Listing
from btray.core import metrics
from btray.model.drift import RUNS_BEFORE, Profile

_EVERY = 0.5  # seconds between two progress lines


class Totals:
    """Counts of the parts that are done; each part counts once, however often it is reported."""

    def __init__(self, *, least_certain: int = 0) -> None:
        self._least_certain = least_certain
        self.objects = 0
        self.frames = 0
        self.bytes = 0
        self.labels: Counter[str] = Counter()
        self.rejected: Counter[str] = Counter()
        self.seconds: Counter[str] = Counter()
        self.profile = Profile()
        self.least_certain: list[dict[str, Any]] = []
        self.reused = 0
        self.fresh = 0
        self.started = time.monotonic()
        self.first: float | None = None
        self.last = self.started
        self._of_first = 0
        self._parts: set[str] = set()

    def add(self, part: str, tally: str) -> dict[str, Any] | None:
        """Count one part's `tally`, JSON as the actor gives it; gives what it holds, None where it was counted."""
        if part in self._parts:
            return None
        self._parts.add(part)
        counts: dict[str, Any] = json.loads(tally)
        self.objects += counts["objects"]
        self.frames += counts["frames"]
        self.bytes += counts["bytes"]
        self.labels.update(counts["labels"])
        self.rejected.update(counts["rejected"])
        if "profile" in counts:
            self.profile.add(Profile.from_json(counts["profile"]))
            scans = [*self.least_certain, *counts["least_certain"]]
            self.least_certain = heapq.nsmallest(self._least_certain, scans, key=lambda scan: float(scan["confidence"]))
        if counts["reused"]:
            self.reused += counts["objects"]
            return counts
        self.seconds.update(counts["seconds"])
        self.fresh += counts["objects"]
        self.last = time.monotonic()
        if self.first is None:
            self.first, self._of_first = self.last, counts["objects"]
        return counts

    @property
    def rate(self) -> float:
        """Objects a second between the first part and the last; 0 where there was one part at most."""
        took = self.last - (self.first or self.last)
        return (self.fresh - self._of_first) / took if took > 0 else 0.0

    def report(self, unchanged: int) -> dict[str, Any]:
        """What run.json says of the counts. Times are in seconds; those of the stages are summed over the actors."""
        elapsed = time.monotonic() - self.started
        return {
            "objects": self.objects,
            "unchanged": unchanged,
            "taken_from_earlier_attempt": self.reused,
            "frames": self.frames,
            "rejected": sum(self.rejected.values()),
            "bytes": self.bytes,
            "labels": dict(self.labels.most_common()),
            "rejected_by_code": dict(self.rejected.most_common()),
            "profile": self.profile.to_json(),
            "least_certain": self.least_certain,
            "seconds": round(elapsed, 3),
            "seconds_to_first_part": None if self.first is None else round(self.first - self.started, 3),
            "seconds_by_stage": {stage: round(spent, 3) for stage, spent in self.seconds.items()},
            "images_per_second": round(self.rate or self.fresh / elapsed, 2),
            "images_per_second_with_start": round(self.fresh / elapsed, 2),
        }


class Progress:
    """One line on the terminal, written over again; nothing where stderr is no terminal."""

    def __init__(self, totals: Totals, listing: Listing) -> None:
        self._totals = totals
        self._listing = listing
        self._shown = 0.0
        self._quiet = not sys.stderr.isatty()

    def show(self) -> None:
        """Show the counts, twice a second at most."""
        now = time.monotonic()
        if not self._quiet and now - self._shown > _EVERY:
            self._shown = now
            print(f"\r{self._line()}\x1b[K", end="", file=sys.stderr, flush=True)

    def end(self) -> None:
        """Leave the last line standing."""
        if not self._quiet:
            print(f"\r{self._line()}\x1b[K", file=sys.stderr, flush=True)

    def _line(self) -> str:
        totals, listing = self._totals, self._listing
        more = "" if listing.complete else " or more"
        left = listing.objects - totals.objects
        remaining = f", {duration(left / totals.rate)} left" if totals.rate and listing.complete else ""
        rejected = sum(totals.rejected.values())
        return (
            f"{totals.objects} of {listing.objects}{more}, {totals.rate:.0f} images/s, {rejected} rejected{remaining}"
        )


def duration(seconds: float) -> str:
    """As in 1:02:03 or 2:03."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def counts_of(report: Mapping[str, Any], done: str) -> str:
    """One line for a terminal of what run.json holds; `done` says what was done to the objects."""
    took = duration(report["seconds"])
    fine = report["frames"]
    line = f"{report['objects']} objects in {took}: {fine} {done}, {report['rejected']} rejected"
    return f"{line}; {report['unchanged']} unchanged"


def summary(report: Mapping[str, Any]) -> str:
    """A few lines for a terminal, of what run.json holds of a classification."""
    lines = [counts_of(report, "frames classified")]
    for title, counts in (("labels", report["labels"]), ("rejected", report["rejected_by_code"])):
        if counts:
            lines.append(f"{title}: " + ", ".join(f"{name} {count}" for name, count in counts.items()))
    spent = report["seconds_by_stage"]
    total = sum(spent.values())
    if total:
        shares = ", ".join(f"{stage} {seconds / total:.0%}" for stage, seconds in spent.items())
        lines.append(f"{report['images_per_second']:.0f} images/s; of the actors' time: {shares}")
    return "\n".join(lines)


# ---- the same for Prometheus


def part_ended(job: str, run_id: str, counts: Mapping[str, Any]) -> None:
    """A part of an archive was done; `counts` is its tally, with seconds by stage where it is fresh."""
    name = f"btray_{job}_"
    metrics.record({name + "objects": counts["objects"], name + "bytes": counts["bytes"]}, run_id=run_id)
    for code, count in counts["rejected"].items():
        metrics.record({name + "rejected": count}, run_id=run_id, code=code)
    if not counts["reused"]:
        for stage, seconds in counts["seconds"].items():
            metrics.record({name + "stage_seconds": seconds}, run_id=run_id, stage=stage)


def report_progress(job: str, run_id: str, totals: Totals, *, queue: int) -> None:
    """How a run over an archive stands; `queue` objects are listed and not yet done."""
    name = f"btray_{job}_"
    values: dict[str, float | None] = {
        name + "images_per_second": totals.rate,
        name + "queue": max(0, queue),
        name + "reject_ratio": totals.rejected.total() / max(1, totals.objects),
    }
    if job == "classify":
        values[name + "feed_ratio"] = feed_ratio(totals.seconds)
    metrics.record(values, run_id=run_id)


def feed_ratio(seconds: Mapping[str, float]) -> float | None:
    """Share of the actors' seconds, by stage, in which the model classified."""
    total = sum(seconds.values())
    return seconds.get("predict", 0.0) / total if total else None


def lines_of(job: str, report: Mapping[str, Any], ended: float) -> str:
    """The report of a run in Prometheus' text format; `ended` in seconds since 1970."""
    from prometheus_client import CollectorRegistry, Gauge, generate_latest

    registry = CollectorRegistry()

    def gauge(name: str, values: Mapping[str, float | None]) -> None:
        _, meaning, labels = metrics.METRICS[f"btray_{job}_{name}"]
        own = [label for label in labels if label != "run_id"]
        family = Gauge(f"btray_{job}_{name}", meaning, own, registry=registry)
        for value_of_label, value in values.items():
            if value is not None:
                (family.labels(value_of_label) if own else family).set(value)

    objects = report["objects"]
    gauge("last_success_timestamp_seconds", {"": ended})
    gauge("last_objects", {"": objects})
    gauge("last_rejected", report["rejected_by_code"])
    gauge("images_per_second", {"": report["images_per_second"]})
    gauge("reject_ratio", {"": report["rejected"] / objects if objects else 0.0})
    if job == "classify":
        gauge("feed_ratio", {"": feed_ratio(report["seconds_by_stage"])})
        before = report["drift"].get(RUNS_BEFORE, {})
        gauge(
            "drift_psi", {"label": before.get("labels"), **{of: before.get(of) for of in ("confidence", "ood_score")}}
        )
    return generate_latest(registry).decode()
