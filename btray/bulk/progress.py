"""What a job on an archive prints while it runs and at its end, and what it reports to Prometheus."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from btray.bulk.listing.sealing import Listing
from btray.bulk.report import RATE_SECONDS, PartTally, RunReport, Totals
from btray.core import metrics
from btray.core.notice import percent
from btray.model.drift import RUNS_BEFORE


def progress_line(totals: Totals[Any], listing: Listing) -> str:
    """Return how a run stands, in one line: counts, rate and, once all is listed, the time left."""
    more = "" if listing.complete else " or more"
    left = listing.objects - totals.objects
    rate = remaining = ""
    if totals.rate_seconds >= RATE_SECONDS:
        rate = f"{totals.rate:.0f} images/s, "
        remaining = f", {duration(left / totals.rate)} left" if totals.rate and listing.complete else ""
    return f"{totals.objects} of {listing.objects}{more}, {rate}{totals.rejected.total()} rejected{remaining}"


def duration(seconds: float) -> str:
    """Return a duration as in 1:02:03 or 2:03."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def summarize_counts(report: RunReport, verb: str) -> str:
    """Return one line for a terminal; `verb` says what was done to the objects, as in "packed"."""
    erased = f", {report.erased} left out that were erased" if report.erased else ""
    return (
        f"{report.objects} objects in {duration(report.seconds)}: {report.frames} {verb}, {report.rejected} rejected; "
        f"{report.unchanged} unchanged{erased}"
    )


def summarize(report: RunReport) -> str:
    """Return a few lines for a terminal on a classification."""
    lines = [summarize_counts(report, "frames classified")]
    for title, counts in (("labels", report.labels), ("rejected", report.rejected_by_code)):
        if counts:
            lines.append(f"{title}: " + ", ".join(f"{name} {count}" for name, count in counts.items()))
    if report.not_scans:
        lines.append("left out: " + ", ".join(f"{count} x {kind}" for kind, count in report.not_scans.items()))
    if report.studies:
        lines.append(f"{report.studies.studies} studies, {report.studies.series} series: {report.studies.rule}")
    spent = report.seconds_by_stage
    total = sum(spent.values())
    if total:
        shares = ", ".join(f"{stage} {percent(seconds / total, 0)}" for stage, seconds in spent.items())
        rate = f"{report.images_per_second:.0f} images/s; " if report.has_rate else ""
        lines.append(f"{rate}of the actors' time: {shares}")
    return "\n".join(lines)


# ---- the same for Prometheus


def report_part(job: str, run_id: str, tally: PartTally) -> None:
    """Count a part that is done; the stages of one that an earlier attempt has written took no time of this run."""
    name = f"btray_{job}_"
    metrics.record({name + "objects": tally.objects, name + "bytes": tally.bytes}, run_id=run_id)
    for code, count in tally.rejected.items():
        metrics.record({name + "rejected": count}, run_id=run_id, code=code)
    if not tally.reused:
        for stage, seconds in tally.seconds.items():
            metrics.record({name + "stage_seconds": seconds}, run_id=run_id, stage=stage)


def report_progress(job: str, run_id: str, totals: Totals[Any], *, queue: int) -> None:
    """Set the gauges of a run; `queue` objects are listed and not yet done."""
    name = f"btray_{job}_"
    values = {
        name + "images_per_second": totals.rate,
        name + "queue": max(0, queue),
        name + "reject_ratio": totals.rejected.total() / max(1, totals.objects),
        name + "feed_ratio": _feed_ratio(totals.seconds) if job == "classify" else None,
    }
    metrics.record(values, run_id=run_id)


def _feed_ratio(seconds: Mapping[str, float]) -> float | None:
    """Return the share of the actors' seconds, by stage, in which the model classified."""
    total = sum(seconds.values())
    return seconds.get("predict", 0.0) / total if total else None


def prometheus_text(job: str, report: RunReport, ended: float) -> str:
    """Return the report of a run in Prometheus' text format; `ended` in seconds since 1970."""
    from prometheus_client import CollectorRegistry, Gauge, generate_latest

    registry = CollectorRegistry()

    def gauge(name: str, values: Mapping[str, float | None]) -> None:
        _, meaning, labels = metrics.METRICS[f"btray_{job}_{name}"]
        own = [label for label in labels if label != "run_id"]
        family = Gauge(f"btray_{job}_{name}", meaning, own, registry=registry)
        for value_of_label, value in values.items():
            if value is not None:
                (family.labels(value_of_label) if own else family).set(value)

    gauge("last_success_timestamp_seconds", {"": ended})
    gauge("last_objects", {"": report.objects})
    gauge("last_rejected", {**report.rejected_by_code})
    gauge("images_per_second", {"": report.images_per_second})
    gauge("reject_ratio", {"": report.rejected / report.objects if report.objects else 0.0})
    if job == "classify":
        gauge("feed_ratio", {"": _feed_ratio(report.seconds_by_stage)})
        index = {}
        before = (report.drift or {}).get(RUNS_BEFORE)
        if before and before.is_telling:
            index = {"label": before.labels, "confidence": before.confidence, "ood_score": before.ood_score}
        gauge("drift_psi", index)
    return generate_latest(registry).decode()
