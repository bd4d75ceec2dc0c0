"""Makes a certificate from labelled decisions: which rows may be judged, whether they suffice, and the whole record."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

import msgspec
import numpy as np

from cascade.bundle import Bundle
from cascade.certificate import Certificate, Evidence
from cascade.columns import Bool, Int64
from cascade.errors import BundleError, DataError
from cascade.features.spec import DAY_MS
from stages.certificate.claims import Asked, make_claims, make_power, make_recall
from stages.certificate.decisions import PERIOD_DAYS, LabelledDecisions
from stages.resampling import BLOCK_DAYS

# Fewer days give no idea of how much days differ.
DAYS_MIN = 14
METHOD = (
    "Frauds: the loss of a fraud that deep-only catches is 1 if the cascade approves it. Learn then Test (Angelopoulos,"
    " Bates, Candès, Jordan, Lei, arXiv 2110.01052) with the exact binomial p-value for single frauds, and the"
    " Hoeffding-Bentkus p-value for the share that a card, or a terminal, loses. The lowest of the three bounds is"
    " shown. Claims are tested in a fixed sequence, from the weakest on.",
    "Nothing is chosen by this data: the bundle's thresholds stay as they are. Conformal risk control (Angelopoulos,"
    " Bates, Fisch, Lei, Schuster, arXiv 2208.02814) chooses a threshold so that the expected loss is bounded, and the"
    " same for models that exit early (Jazbec et al., arXiv 2405.20915); we test a fixed cascade, with confidence.",
    f"Average precision, false alarms and escalated share: bootstrap over cards and over blocks of {BLOCK_DAYS} days,"
    " variances joined for two-way clusters (Cameron, Gelbach, Miller, 2011), Student's t. Approximate.",
    "The sentence that joins the claims has the confidence of one claim (intersection-union test, Berger, 1982).",
)
ASSUMPTIONS = (
    "The judged transactions are a sample of those to come: until the certificate expires, customers, frauds and labels"
    " behave as in the judged days. The service's watch looks for a fall of the recall.",
    "each fraud: the bound holds if whether a fraud is lost says nothing of other frauds.",
    "each card: the bound holds if cards are independent, however alike the frauds of a card are. It is on the mean"
    " over cards of the share of a card's caught frauds that is kept, so that a card with many frauds counts once.",
    "each terminal: likewise for terminals.",
    "The labels of the judged days are complete. A fraud that nobody reported counts as genuine.",
)


class _Seen(msgspec.Struct):
    """The end of a part of the data that the bundle was made from, in its report."""

    last: datetime


class _Report(msgspec.Struct):
    train: _Seen
    validation: _Seen


@dataclass(frozen=True, slots=True)
class Source:
    """Where labelled decisions come from.

    file, sha256: of the data file. decisions: `replay`, or the topic. first_ms: event time of the file's first row.
    command: how the certificate is made.
    """

    file: str
    sha256: str
    decisions: str
    first_ms: int
    command: str


def rows_to_judge(bundle: Bundle, time_ms: Int64, start: datetime | None, end: datetime | None, origin: str) -> Bool:
    """Mask of the rows to judge, bool [rows]: from `start` on and before `end`.

    time_ms: event times int64 [rows]. start: by default the first day after the bundle's training and validation data.
    origin: the data file, in messages.

    Raises DataError if training or validation may have seen one of the rows, or if there is none.
    """
    seen = _seen_until(bundle)
    unseen = datetime(seen.year, seen.month, seen.day, tzinfo=UTC) + timedelta(days=1)
    start_ms = _ms(unseen if start is None else start.replace(tzinfo=UTC))
    judged: Bool = time_ms >= start_ms
    if end is not None:
        judged &= time_ms < _ms(end.replace(tzinfo=UTC))
    known = int((judged & (time_ms <= _ms(seen))).sum())
    if known:
        raise DataError(
            f"{origin}: {known:,} of the rows are from before {unseen:%Y-%m-%d}, and bundle {bundle.version} was"
            f" trained and calibrated on data up to {seen:%Y-%m-%d}: use --from {unseen:%Y-%m-%d} or later"
        )
    if not judged.any():
        raise DataError(
            f"{origin}: no rows between --from {_day(start_ms)} and --until; the bundle's own data ends on"
            f" {seen:%Y-%m-%d}, so use a file that goes on after it"
        )
    return judged


def make_certificate(
    bundle: Bundle, decisions: LabelledDecisions, asked: Asked, source: Source, valid_ms: int, now: datetime
) -> Certificate:
    """The certificate of a bundle.

    valid_ms: it expires so long after the last judged transaction. now: the time of its making, UTC. Raises DataError
    if the decisions are too few, with the number that is needed.
    """
    _check_enough(decisions, asked, source.file)
    evidence = _evidence(decisions, source)
    recall = make_recall(decisions, asked)
    return Certificate(
        bundle_version=bundle.version,
        created=now,
        command=source.command,
        confidence=asked.confidence,
        evidence=evidence,
        claims=make_claims(decisions, asked),
        power=make_power(decisions, asked),
        recall=recall,
        method=METHOD,
        assumptions=ASSUMPTIONS,
        expires=evidence.last + timedelta(milliseconds=valid_ms),
        ends_earlier=(
            f"when labels show that less than {recall.at_least:.1%} of the first frauds of a card in {PERIOD_DAYS} days"
            " are reviewed or declined, or when another bundle or other thresholds decide"
        ),
    )


def _check_enough(decisions: LabelledDecisions, asked: Asked, origin: str) -> None:
    frauds, needed = int((decisions.fraud & decisions.by_deep).sum()), asked.frauds_min
    if frauds < needed:
        raise DataError(
            f"{origin}: deep-only catches {frauds:,} frauds in these days, and at least {needed:,} are needed to show"
            f" {100 * asked.keep_frauds:.4g} % at {100 * asked.confidence:.4g} % confidence: use more days, or a lower"
            " --keep"
        )
    days = len(np.unique(decisions.day))
    if days < DAYS_MIN:
        raise DataError(
            f"{origin}: {days} days to judge, and at least {DAYS_MIN} are needed to see how much days differ: use more"
        )


def _evidence(decisions: LabelledDecisions, source: Source) -> Evidence:
    fraud, time_ms = decisions.fraud, decisions.time_ms
    return Evidence(
        file=source.file,
        sha256=source.sha256,
        decisions=source.decisions,
        first=_moment(int(time_ms[0])),
        last=_moment(int(time_ms[-1])),
        history_days=(int(time_ms[0]) - source.first_ms) / DAY_MS,
        days=len(np.unique(decisions.day)),
        transactions=len(fraud),
        cards=len(np.unique(decisions.card)),
        frauds=int(fraud.sum()),
        caught=int((fraud & decisions.by_cascade).sum()),
        caught_by_deep=int((fraud & decisions.by_deep).sum()),
        lost=int(decisions.lost.sum()),
        gained=int((fraud & decisions.by_cascade & ~decisions.by_deep).sum()),
    )


def _seen_until(bundle: Bundle) -> datetime:
    """The time of the last row that training or validation used, UTC."""
    try:
        report = msgspec.json.decode(bundle.content["report.json"], type=_Report)
    except msgspec.MsgspecError as error:
        raise BundleError(
            f"{bundle.directory / 'report.json'}: has no spans of training and validation ({error}); train the bundle"
            " again"
        ) from error
    return max(report.train.last, report.validation.last).astimezone(UTC)


def _ms(moment: datetime) -> int:
    return round(moment.timestamp() * 1e3)


def _moment(time_ms: int) -> datetime:
    return datetime.fromtimestamp(time_ms / 1e3, UTC)


def _day(time_ms: int) -> str:
    return f"{_moment(time_ms):%Y-%m-%d}"
