"""The certificate of a bundle: what labelled decisions after the training show of the cascade, and until when.

`cascade certify` writes it into the bundle as `certificate.json`; `stages.certificate` computes it. The service reads
`recall`, and compares it with what the labels say later (`streaming.worker.watch`).
"""

from __future__ import annotations

from datetime import datetime
from typing import Final, Literal

import msgspec

from cascade.errors import BundleError
from cascade.readable import readable

CERTIFICATE_FORMAT: Final = 1
Sense = Literal["at least", "at most"]


class Bound(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A one-sided bound on the figure of a claim, at the certificate's confidence.

    unit, units: what is taken as independent of each other, and how many there are. method: how it is computed.
    exact: valid for any number of units, if they are independent; else approximate. value: the bound. p_value: of the
    hypothesis that the asked claim is false; None for an approximate bound.
    """

    unit: str
    units: int
    method: str
    exact: bool
    value: float
    p_value: float | None


class Claim(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A statement about the cascade beside deep-only, asked for before the data was seen, and what the data shows.

    sense: whether the figure should be at least, or at most, `asked`. observed: the figure of the data itself. bounds:
    each under its own assumption. shown: the worst of the bounds. holds: whether all bounds are on the right side of
    `asked`. approximate: whether one of the bounds is. largest: the highest claim of a fixed sequence that all exact
    bounds allow; None without a sequence, or if not even its first claim holds.
    """

    name: str
    statement: str
    sense: Sense
    asked: float
    observed: float
    bounds: tuple[Bound, ...]
    shown: float
    holds: bool
    approximate: bool
    largest: float | None = None


class Power(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What the number of frauds allows, for the claim of frauds kept.

    frauds_min: with fewer, even a cascade that loses none could not be certified. needed: by unit, the frauds for which
    the claim is shown with a probability of `power`, if the cascade goes on to lose what it lost here; None if that
    loss is too high for any number. chance: by unit, the probability that this many units certify a cascade that loses
    half of what the claim allows.
    """

    power: float
    frauds_min: int
    needed: dict[str, int | None]
    chance: dict[str, float]


class Evidence(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The data behind a certificate.

    file, sha256: of the data file. decisions: `replay`, or the topic that they were read from. first, last: times of
    the first and the last transaction judged, UTC. history_days: days of the file before them, which fill the features'
    windows. The counts are of the judged transactions: `caught_by_deep` are the frauds that deep-only reviews or
    declines, `lost` those of them that the cascade approves, `gained` those that only the cascade catches.
    """

    file: str
    sha256: str
    decisions: str
    first: datetime
    last: datetime
    history_days: float
    days: int
    transactions: int
    cards: int
    frauds: int
    caught: int
    caught_by_deep: int
    lost: int
    gained: int


class Recall(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The cascade's recall, as the service can count it later without deep-only's decisions.

    Of each card's first fraud in a period of `period_days` (days since the epoch // period_days), the share that was
    reviewed or declined. at_least: its exact lower bound at the certificate's confidence. alarm_level: the probability
    of a false alarm of the watch, over all time.
    """

    period_days: int
    first_frauds: int
    caught: int
    at_least: float
    alarm_level: float


class Certificate(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Content of `certificate.json`.

    bundle_version: of the bundle that it belongs to. command: how it was made. method, assumptions: sentences with the
    papers, and what must be true for the bounds. expires: from then on it no longer counts. ends_earlier: the condition
    under which it ends before.
    """

    format: int = CERTIFICATE_FORMAT
    bundle_version: str
    created: datetime
    command: str
    confidence: float
    evidence: Evidence
    claims: tuple[Claim, ...]
    power: Power
    recall: Recall
    method: tuple[str, ...]
    assumptions: tuple[str, ...]
    expires: datetime
    ends_earlier: str

    @property
    def holds(self) -> bool:
        """Whether all claims hold; the sentence that joins them has the confidence of each: `certificate.claims`."""
        return all(claim.holds for claim in self.claims)

    def to_json(self) -> bytes:
        """The file's content."""
        return readable(self)


def parse_certificate(content: bytes, bundle_version: str, origin: str) -> Certificate:
    """Reads the file's content. `origin`: its name in messages. Raises BundleError if it is not of this bundle."""
    try:
        certificate = msgspec.json.decode(content, type=Certificate)
    except msgspec.MsgspecError as error:
        raise BundleError(f"{origin}: {error}; run `cascade certify` again with this release") from error
    if certificate.format != CERTIFICATE_FORMAT:
        raise BundleError(
            f"{origin}: certificate format {certificate.format} is unknown to this release, which reads"
            f" {CERTIFICATE_FORMAT}; run `cascade certify` again"
        )
    if certificate.bundle_version != bundle_version:
        raise BundleError(
            f"{origin}: is of bundle {certificate.bundle_version}, not of {bundle_version}; run `cascade certify` again"
        )
    return certificate
