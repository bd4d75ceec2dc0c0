"""Another policy for a bundle: budget and costs change, the models stay as they are."""

from __future__ import annotations

from pathlib import Path

import msgspec
from msgspec.structs import replace

from cascade.bundle import FILES, Bundle, Manifest, write_bundle
from cascade.costs import Costs
from cascade.errors import BundleError
from cascade.readable import readable
from stages.calibration import calibrate
from stages.report import Report, figures
from stages.report_page import add_page
from stages.validation import ValidationRows


class Changes(msgspec.Struct, frozen=True):
    """What changes; None: as in the bundle.

    - `budget`: share of the transactions that is escalated.
    - `review_cost`, `false_decline_cost`: fixed costs, in the currency of the amounts.
    - `reviews_per_day_max`: transactions that can be reviewed on a mean day.
    """

    budget: float | None = None
    review_cost: float | None = None
    false_decline_cost: float | None = None
    reviews_per_day_max: float | None = None

    def of_costs(self, costs: Costs) -> Costs:
        """The costs with these changes."""
        if (review := self.review_cost) is not None:
            costs = replace(
                costs,
                review_fraud=replace(costs.review_fraud, fixed=review),
                review_genuine=replace(costs.review_genuine, fixed=review),
            )
        if (decline := self.false_decline_cost) is not None:
            costs = replace(costs, decline_genuine=replace(costs.decline_genuine, fixed=decline))
        if (reviews := self.reviews_per_day_max) is not None:
            costs = replace(costs, reviews_per_day_max=reviews)
        return costs


def recalibrated(bundle: Bundle, changes: Changes, out: Path) -> tuple[Manifest, Report]:
    """Writes the bundle with another policy to `out`; returns its manifest and report.

    Raises BundleError if the bundle's report or validation rows cannot be read.
    """
    rows = ValidationRows.from_parquet(
        bundle.content["validation.parquet"], str(bundle.directory / "validation.parquet")
    )
    report = read_report(bundle)
    escalation = bundle.policy.escalation
    if changes.budget is not None:
        escalation = replace(escalation, budget=changes.budget)
    policy = calibrate(rows, escalation, changes.of_costs(bundle.policy.costs))
    report = figures(rows, policy, report.seed).into(report)
    # without a certificate, which is of the earlier policy
    own = {file: bundle.content[file] for file in FILES}
    content = {**own, "policy.json": readable(policy), "report.json": readable(report)}
    add_page(content, report, bundle.manifest.name)
    return write_bundle(out, bundle.manifest.name, content), report


def read_report(bundle: Bundle) -> Report:
    """The bundle's report. Raises BundleError if it cannot be read."""
    try:
        return msgspec.json.decode(bundle.content["report.json"], type=Report)
    except msgspec.MsgspecError as error:
        raise BundleError(f"{bundle.directory / 'report.json'}: {error}; train the bundle again") from error
