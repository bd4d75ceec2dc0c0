"""How often a certificate's bounds fail, and what its watch finds, in worlds whose truth is known.

Each sample is a world of its own: labelled decisions, a certificate's claims from them, and the truth beside. A bound
at 95 % confidence may fail in one sample of twenty.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import fields

import msgspec
import numpy as np
from rich.console import Console
from sklearn.metrics import average_precision_score

from bench.tables import figure_table, print_table
from cascade.evidence import alarm_nats, evidence_nats
from cascade.features.spec import DAY_MS
from cascade.progress import StepProgress
from stages.certificate import Asked, LabelledDecisions, first_frauds, make_claims, make_recall

ASKED = Asked(keep_frauds=0.95, keep_precision=0.9, escalated=0.05, false_alarms=1.5, replicates=40)
# where only the exact bounds are looked at
QUICK = msgspec.structs.replace(ASKED, replicates=2)
# Of the frauds that deep-only catches, what the cascade loses in the world of campaigns.
LOST = 0.06
DRIFTS = (0.0, 0.03, 0.05, 0.1, 0.2)
World = Callable[[np.random.Generator], LabelledDecisions]


class Failures(msgspec.Struct, frozen=True, kw_only=True):
    """How often a bound was on the wrong side of the truth. `may_fail`: the share that it allows itself."""

    bound: str
    world: str
    may_fail: float
    failed: float


class Found(msgspec.Struct, frozen=True, kw_only=True):
    """How often the watch raised its alarm, on `first_frauds` later ones, after the recall had fallen by `fall`."""

    fall: float
    first_frauds: int
    alarms: float


class CertificateReport(msgspec.Struct, frozen=True, kw_only=True):
    """The result of `cascade bench certificate`."""

    samples: int
    seed: int
    failures: list[Failures]
    watch: list[Found]


def campaigns(rng: np.random.Generator, cards: int, lost: float, caught: float = 0.8) -> LabelledDecisions:
    """Frauds in campaigns, one for each card, of 1 to 40; the decisions on a card's frauds are much alike.

    lost: mean over cards of the share of frauds that deep-only catches and the cascade loses. caught: share of cards
    whose frauds deep-only catches; so the recall of the cascade is caught · (1 − lost).
    """
    sizes = np.minimum(rng.geometric(0.25, cards), 40)
    # a few cards lose nearly all of their frauds, the others hardly any
    share = rng.beta(0.05 * lost, 0.05 * (1 - lost), cards)
    return _frauds(rng, sizes, share, caught)


def single_frauds(rng: np.random.Generator, cards: int, lost: float, caught: float = 0.8) -> LabelledDecisions:
    """Frauds that are independent of each other: one for each card. Arguments as for `campaigns`."""
    return _frauds(rng, np.ones(cards, np.int64), np.full(cards, lost), caught)


def _frauds(rng: np.random.Generator, sizes: np.ndarray, share: np.ndarray, caught: float) -> LabelledDecisions:
    cards = len(sizes)
    start = rng.integers(0, 40, cards)
    card = np.repeat(np.argsort(start, kind="stable"), sizes[np.argsort(start, kind="stable")])
    rows = len(card)
    by_deep = (rng.random(cards) < caught)[card]
    score = rng.random(rows)
    return LabelledDecisions(
        fraud=np.ones(rows, bool), time_ms=start[card] * DAY_MS, card=card, terminal=rng.integers(0, 50 * cards, rows),
        cascade=score, deep=score, by_cascade=by_deep & (rng.random(rows) >= share[card]), by_deep=by_deep,
        escalated=np.zeros(rows, bool),
    )  # fmt: skip


def shops(rng: np.random.Generator, cards: int = 150, days: int = 42) -> LabelledDecisions:
    """Transactions with scores that depend on card and day; the cascade ranks a little worse than deep-only."""
    rows = cards * days // 3
    card, day = rng.integers(0, cards, rows), np.sort(rng.integers(0, days, rows))
    fraud = rng.random(rows) < 0.08 * rng.gamma(2.0, 0.5, cards)[card]
    known = rng.normal(size=rows) + 2.0 * fraud
    on_card, on_day = 0.6 * rng.normal(size=cards)[card], 0.4 * rng.normal(size=days)[day]
    deep = known + 0.6 * rng.normal(size=rows)
    cascade = deep + 0.7 * rng.normal(size=rows) + on_card + on_day
    pressed = np.exp(0.4 * rng.normal(size=days) - 0.08)[day] * np.exp(0.4 * rng.normal(size=cards) - 0.08)[card]
    return LabelledDecisions(
        fraud=fraud, time_ms=day * DAY_MS, card=card, terminal=rng.integers(0, 100, rows), cascade=cascade, deep=deep,
        by_cascade=cascade > 2.5, by_deep=deep > 2.5, escalated=rng.random(rows) < 0.04 * pressed,
    )  # fmt: skip


def samples_of(world: World, samples: int, seed: int) -> Iterator[LabelledDecisions]:
    """So many samples of a world; each has a seed of its own."""
    return (world(np.random.default_rng([seed, number])) for number in range(samples))


def truth_of(worlds: Iterator[LabelledDecisions]) -> dict[str, float]:
    """The figures of the claims, by name, of all samples joined: what a single sample estimates."""
    joined = list(worlds)
    names = [field.name for field in fields(LabelledDecisions)]
    whole = LabelledDecisions(**{name: np.concatenate([getattr(part, name) for part in joined]) for name in names})
    fraud, genuine = whole.fraud, ~whole.fraud
    precision = average_precision_score(fraud, whole.cascade) / average_precision_score(fraud, whole.deep)
    alarms = (genuine & whole.by_cascade).sum() / (genuine & whole.by_deep).sum()
    return {
        "average precision": float(precision),
        "escalated": float(whole.escalated.mean()),
        "false alarms": float(alarms),
    }


def alarmed(later: LabelledDecisions, at_least: float, level: float) -> bool:
    """Whether the watch, which looks after each label, ever raises its alarm on later decisions."""
    caught = np.cumsum(later.by_cascade[first_frauds(later.fraud, later.card, later.day)])
    limit = alarm_nats(level)
    return any(evidence_nats(int(count), n - int(count), at_least) >= limit for n, count in enumerate(caught, 1))


def run_certificate(samples: int, seed: int, progress: StepProgress) -> CertificateReport:
    """Counts the failures of each bound, and the alarms of the watch, over so many samples of each world."""
    failures = [
        *_frauds_failures("frauds are independent", single_frauds, samples, seed, progress),
        *_frauds_failures("frauds in campaigns", campaigns, samples, seed, progress),
        *_approximate_failures(samples, seed, progress),
    ]
    return CertificateReport(
        samples=samples, seed=seed, failures=failures,
        watch=[_found(fall, samples, seed, progress) for fall in DRIFTS],
    )  # fmt: skip


def _frauds_failures(
    name: str,
    make: Callable[[np.random.Generator, int, float], LabelledDecisions],
    samples: int,
    seed: int,
    progress: StepProgress,
) -> list[Failures]:
    """Of each bound on the frauds kept, and of the claim, which has the lowest of them."""
    failed: dict[str, int] = {}
    for number, decisions in enumerate(samples_of(lambda rng: make(rng, 500, LOST), samples, seed), 1):
        claim = make_claims(decisions, QUICK)[0]
        shown = {f"frauds kept, {bound.unit}": bound.value for bound in claim.bounds} | {"frauds kept": claim.shown}
        for bound, value in shown.items():
            failed[bound] = failed.get(bound, 0) + (value > 1.0 - LOST)
        progress(name, number / samples)
    return [
        Failures(bound=bound, world=name, may_fail=QUICK.level, failed=count / samples)
        for bound, count in failed.items()
    ]


def _approximate_failures(samples: int, seed: int, progress: StepProgress) -> list[Failures]:
    truth = truth_of(samples_of(shops, samples, seed + 1))
    failed = dict.fromkeys(truth, 0)
    for number, decisions in enumerate(samples_of(shops, samples, seed), 1):
        for claim in make_claims(decisions, ASKED)[1:]:
            wrong = claim.shown > truth[claim.name] if claim.sense == "at least" else claim.shown < truth[claim.name]
            failed[claim.name] += wrong
        progress("effects of card and day", number / samples)
    return [
        Failures(bound=f"{name} *", world="effects of card and day", may_fail=ASKED.level, failed=count / samples)
        for name, count in failed.items()
    ]


def _found(fall: float, samples: int, seed: int, progress: StepProgress) -> Found:
    alarms, labels = 0, 0
    for number in range(samples):
        rng = np.random.default_rng([seed, number])
        certified = make_recall(campaigns(rng, cards=800, lost=0.025), QUICK)
        later = campaigns(rng, cards=800, lost=0.025, caught=0.8 - fall)
        alarms += alarmed(later, certified.at_least, QUICK.alarm_level)
        labels += len(first_frauds(later.fraud, later.card, later.day))
        progress(f"recall falls by {100 * fall:g} points", (number + 1) / samples)
    return Found(fall=fall, first_frauds=labels // samples, alarms=alarms / samples)


def show_certificate_report(report: CertificateReport, console: Console) -> None:
    """Prints the failures of the bounds, and the alarms of the watch."""
    table = figure_table("bound, at 95 %", "may fail", "failed")
    for failures in report.failures:
        name = f"{failures.bound}; {failures.world}"
        table.add_row(name, f"{failures.may_fail:.1%}", f"{failures.failed:.1%}")
    print_table(
        console, table, f"{report.samples} samples of each world, seed {report.seed}; * approximate, by bootstrap",
        "the bound for single frauds is not meant for campaigns: the claim has the lowest of the three",
    )  # fmt: skip
    table = figure_table("the recall falls by", "first frauds", "alarms")
    for found in report.watch:
        table.add_row(f"{100 * found.fall:g} points", f"{found.first_frauds:,}", f"{found.alarms:.1%}")
    print_table(
        console, table,
        f"without a fall at most {QUICK.level + QUICK.alarm_level:.0%}: the certificate fails, or the watch does",
    )  # fmt: skip
