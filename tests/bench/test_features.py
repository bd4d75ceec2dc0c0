"""The bench of the features measures what it says: each number of cards, and each set of sequences."""

from __future__ import annotations

from io import StringIO

from rich.console import Console

from bench.features import SEQUENCES, run_features, show_features


def test_each_number_of_cards_and_each_set_of_sequences_is_measured() -> None:
    report = run_features([16, 64], events_per_card=3, rounds=3, seed=1)
    assert [timing.cards for timing in report.timings] == [16, 64]
    assert [sequence.lengths for sequence in report.sequences] == [dict(lengths) for lengths in SEQUENCES]
    assert all(sequence.us_per_transaction > 0 and sequence.us_per_single_row > 0 for sequence in report.sequences)
    one, _, two = (sequence.bytes_per_card for sequence in report.sequences)
    assert two > one, "the terminal's events have step fields too"
    console = Console(file=StringIO(), width=120)
    show_features(report, console)
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    assert "card 64, terminal 64" in shown
