"""The ledger's own cost: small beside the work at full speed, and bounded memory."""

from __future__ import annotations

import pytest

from bench.ledger_cost import BATCHES, run_ledger_cost


@pytest.mark.slow
def test_the_ledger_is_cheap_beside_what_it_accounts() -> None:
    report = run_ledger_cost(3, 1)
    by_rows = {one.rows: one for one in report.batches}
    assert tuple(by_rows) == BATCHES
    # its own goal is 2 %; a busy machine may double it
    assert 0 < by_rows[1_000].share < 0.04
    assert by_rows[1_000].ledger_us < 20 * by_rows[1].ledger_us
    assert set(report.second_us) == {"sample", "journal", "scrape"}
    assert sum(report.second_us.values()) < 50_000
    assert report.histogram_bytes < 1 << 20
