"""The report as one self-contained page: nothing in it is fetched, and it prints."""

from __future__ import annotations

from collections.abc import Iterable
from html import escape
from importlib.resources import files

import cascade
from cascade.ledger.attribution import Books
from cascade.ledger.carbon import JOULES_PER_KWH
from cascade.ledger.render import number_text, percent_text
from cascade.ledger.sla import ObjectiveResult
from cascade.ledger.summary import Counterfactual, EnergyComparison, LedgerSummary
from cascade.protocols import EnergyKind
from cascade.report import plots
from cascade.report.business import Assumptions, energy_text, mass_text, swings, year, years
from cascade.report.figures import Figures, budgets_left
from cascade.report.words import Words


def make_page(
    figures: Figures, given: Assumptions, words: Words, command: str, counterfactual: Counterfactual | None = None
) -> str:
    """The page. `counterfactual`: the same stream by deep-only, where that was measured; `command`: what made it."""
    summary = figures.summary
    sections = [
        _section("h_latency", words, _note("latency_note", words), _latency(summary, words),
                 plots.latency(figures, words), _objectives(figures, words)),
        _section("h_energy", words, *_energy(figures, words)),
        _section("h_time", words, *_time(figures, words)),
        _section("h_business", words, *_business(summary, given, words, counterfactual), page=True),
        _section("h_sheet", words, *_sheet(figures, given, words), page=True),
        _section("h_method", words, *_method(figures, words), page=True),
    ]  # fmt: skip
    style = files("cascade.report").joinpath("page.css").read_text("utf-8")
    footer = words("footer", version=cascade.__version__, command=command)
    head = (
        '<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(words('title'))}</title><style>{style}</style>"
    )
    body = (
        f"<h1>{escape(words('title'))}</h1><p class=note>{escape(_span(figures, words))}</p>"
        f"{_tiles(summary, words, counterfactual)}{''.join(sections)}<footer><p>{escape(footer)}</p></footer>"
    )
    return f"<!doctype html>\n<html lang={words.language}><head>{head}</head><body>{body}</body></html>\n"


# --- headline ---------------------------------------------------------------------------------------------------------


def _span(figures: Figures, words: Words) -> str:
    summary = figures.summary
    return words(
        "span", started=f"{summary.started:%Y-%m-%d %H:%M}", ended=f"{summary.ended:%Y-%m-%d %H:%M}",
        decisions=f"{summary.transactions:,}", lives=len(figures.lives),
    )  # fmt: skip


def _tiles(summary: LedgerSummary, words: Words, counterfactual: Counterfactual | None) -> str:
    light = summary.paths["screened"].share
    tiles = [_tile(percent_text(light), words("tile_light"))]
    for total in summary.energy_totals:
        per_million = None if total.per_transaction_mj is None else 1e3 * total.per_transaction_mj
        tiles.append(_tile(number_text(per_million), f"{escape(words('tile_energy'))} {_kind(total.kind, words)}"))
    if summary.carbon is not None:
        for grams in summary.carbon.totals:
            text = f"{escape(words('tile_carbon'))} {_kind(grams.kind, words)}"
            tiles.append(_tile(number_text(grams.per_million_g), text))
    if counterfactual is None:
        tiles.append(_tile(words("not_measured"), f"{words('tile_saved')}: {words('tile_saved_none')}", small=True))
    else:
        for one in counterfactual.comparisons:
            tiles.append(_tile(_saved(one), f"{words('tile_saved')} {_kind(one.kind, words)}", small=True))
    met = all(one.met for one in summary.objectives)
    status = "met" if met else "missed"
    tiles.append(_tile(f"<span class={status}>{words(f'sla_{status}')}</span>", words("tile_sla")))
    return f"<div class=tiles>{''.join(tiles)}</div>"


def _saved(one: EnergyComparison) -> str:
    """The share of deep-only's joules that the cascade saves, with its interval; negative where it saves none."""
    share = one.filled.saving_share
    return f"{share.value:.0%} ({share.low:.0%} … {share.high:.0%})"


def _tile(value: str, text: str, small: bool = False) -> str:
    return f'<div class="tile{" small" if small else ""}"><b>{value}</b><span>{text}</span></div>'


# --- latency ----------------------------------------------------------------------------------------------------------


def _latency(summary: LedgerSummary, words: Words) -> str:
    rows = []
    for name, path in summary.paths.items():
        if not path.decisions and name != "all":
            continue
        held = path.latency
        cells = ["–"] * 4 if held is None else [
            number_text(value) for value in (held.p50_ms, held.p99_ms, held.p999_ms, held.max_ms)
        ]  # fmt: skip
        rows.append([escape(words(f"path_{name}")), f"{path.decisions:,}", percent_text(path.share), *cells])
    head = [words("col_path"), words("col_decisions"), words("col_share"), "p50 ms", "p99 ms", "p99.9 ms", "max ms"]
    return _table(head, rows)


def _objectives(figures: Figures, words: Words) -> str:
    left = budgets_left(figures.events)
    rows = []
    for one in figures.summary.objectives:
        scale, unit = (100.0, " %") if one.unit == "share" else (1.0, " ms")
        value = "–" if one.value is None else number_text(one.value, scale) + unit
        rows.append(
            [
                escape(plots.objective_text(one.name, words)), value, number_text(one.limit, scale) + unit,
                _status(one, words), percent_text(left[one.name]),
            ]
        )  # fmt: skip
    names = ("col_objective", "col_value", "col_limit", "col_status", "col_budget")
    return _table([words(name) for name in names], rows)


def _status(one: ObjectiveResult, words: Words) -> str:
    if one.status == "no data":
        return escape(words("no_data"))
    return f"<span class={one.status}>{escape(words(f'sla_{one.status}'))}</span>"


# --- energy -----------------------------------------------------------------------------------------------------------


def _energy(figures: Figures, words: Words) -> Iterable[str]:
    summary, books = figures.summary, figures.summary.books
    if books is None or not books.closings:
        yield _note("no_energy", words)
        return
    yield _note("energy_note", words)
    yield plots.energy(figures, words)
    rows = [
        [escape(plots.line_text(line, words)), _kind(kind, words), number_text(joules),
         number_text(1e3 * joules / summary.transactions if summary.transactions else None)]
        for kind in dict.fromkeys(entry.kind for entry in books.entries)
        for line, joules in books.by_line(kind).items()
    ]  # fmt: skip
    yield _table([words(name) for name in ("col_line", "col_kind", "col_joules", "col_mj")], rows)
    costs = ", ".join(
        f"{words(f'path_{one.path}')} {number_text(one.mj_per_decision)} mJ ({words(f'kind_{one.kind}')})"
        for one in books.paths
    )
    if costs:
        yield f"<p class=note>{escape(words('per_decision', costs=costs))}</p>"
    if not books.idle_stated:
        yield _note("energy_idle_unstated", words)
    yield _meters(figures, books, words)


def _meters(figures: Figures, books: Books, words: Words) -> str:
    """Each meter, where its joules come from, and how its page closes."""
    closings = {(one.meter, one.kind): one for one in books.closings}
    rows = []
    for state in figures.account.meters:
        closing = None if state.kind is None else closings.get((state.meter, state.kind))
        check = None if closing is None else closing.check_share
        rows.append(
            [
                escape(state.meter), "–" if state.kind is None else _kind(state.kind, words),
                number_text(state.energy_j), "–" if closing is None else percent_text(closing.residual_share),
                "–" if check is None else f"{check:+.2%}",
                "–" if state.uncertainty is None else f"±{state.uncertainty:.0%}",
                f"<td class=text>{escape(state.problem or state.source)}",
            ]
        )  # fmt: skip
    names = ("col_meter", "col_kind", "col_joules", "col_residual", "col_check", "col_uncertainty", "col_source")
    return _table([words(name) for name in names], rows)


def _time(figures: Figures, words: Words) -> Iterable[str]:
    seconds = figures.interval_s
    every = f"{number_text(seconds)} s" if seconds < 120 else f"{number_text(seconds / 60)} min"
    yield f"<p class=note>{escape(words('time_note', every=every))}</p>"
    if figures.summary.energy_totals:
        yield plots.energy_over_time(figures, words)
    yield plots.escalated_over_time(figures, words)
    yield plots.budget_over_time(figures, words)
    yield _note("plot_budget_note", words)


# --- business and sheet -----------------------------------------------------------------------------------------------


def _business(
    summary: LedgerSummary, given: Assumptions, words: Words, counterfactual: Counterfactual | None
) -> Iterable[str]:
    note = words(
        "business_note", volume=f"{given.volume:,.0f}", region=given.region_name, year=given.year,
        g_per_kwh=f"{given.g_per_kwh:g}", price=f"{given.price:g}", currency=given.currency, pue=f"{given.pue:g}",
    )  # fmt: skip
    yield f"<p class=note>{escape(note)}</p>"
    found = years(summary, given)
    if not found:
        yield _note("no_energy", words)
        return
    told = [(words("row_cascade"), one) for one in found]
    if counterfactual is not None:
        for comparison in counterfactual.comparisons:
            joules = comparison.filled.energy_j.value / counterfactual.transactions
            told.append((words("row_deep_only"), year(comparison.kind, joules, given)))
    rows = [
        [escape(name), _kind(one.kind, words), energy_text(one.kwh), number_text(one.money), mass_text(one.t_co2e)]
        for name, one in told
    ]
    names = ("col_service", "col_kind", "col_kwh")
    yield _table(
        [*(words(name) for name in names), words("col_money", currency=given.currency), words("col_tonnes")], rows
    )
    yield _counterfactual(counterfactual, words)
    yield f"<h3>{escape(words('h_sensitivity'))}</h3>"
    yield _note("sensitivity_note", words)
    for one in found:
        money, tonnes = swings(one, given)
        yield f"<p>{_kind(one.kind, words)}</p>"
        yield plots.sensitivity(money, one.money, words("col_money", currency=given.currency), words)
        yield plots.sensitivity(tonnes, one.t_co2e, words("plot_tonnes"), words)


def _counterfactual(found: Counterfactual | None, words: Words) -> str:
    """How deep-only was counted, and where it would cost the same."""
    if found is None:
        return f"<p class=note>{escape(words('tile_saved'))}: {escape(words('tile_saved_none'))}</p>"
    lines = []
    for one in found.comparisons:
        even = one.filled.break_even_share
        values = {
            "kind": words(f"kind_{one.kind}"), "saving": _saved(one),
            "ratio": f"{one.filled.ratio.value:.2f} ({one.filled.ratio.low:.2f} … {one.filled.ratio.high:.2f})",
            "rows": f"{one.filled.rows_per_call:g}",
            "even": "–" if even is None else f"{even.value:.1%} ({even.low:.1%} … {even.high:.1%})",
        }  # fmt: skip
        lines.append(f"<p>{escape(words('saving', **values))}</p>")
    measured = words("saving_measured", at=f"{found.measured_at:%Y-%m-%d %H:%M}", server=found.server)
    return "".join(lines) + f"<p class=note>{escape(measured)}</p>"


def _sheet(figures: Figures, given: Assumptions, words: Words) -> Iterable[str]:
    summary, carbon = figures.summary, figures.summary.carbon
    yield _note("sheet_note", words)
    rows = [
        [words("sheet_boundary"), words("sheet_boundary_text")],
        [words("sheet_unit"), words("sheet_unit_text")],
        [words("sheet_method"), words("sheet_method_text")],
    ]
    for total in summary.energy_totals:
        joules = "–" if total.energy_j is None else energy_text(total.energy_j / JOULES_PER_KWH)
        rows.append([words("sheet_mwh"), f"{joules} ({words(f'kind_{total.kind}')}; {', '.join(total.meters)})"])
    basis = "; ".join(carbon.bases) if carbon is not None else words("sheet_not_accounted")
    rows.append([words("sheet_intensity"), basis])
    if carbon is not None:
        embodied = f"{number_text(carbon.embodied_g)} g ({words('kind_stated')})" if carbon.embodied_g else words(
            "sheet_not_accounted"
        )  # fmt: skip
        rows.append([words("sheet_embodied"), embodied])
        if carbon.sci_g_per_million is not None:
            kind = words(f"kind_{carbon.totals[0].kind}")
            grams = number_text(carbon.sci_g_per_million)
            rows.append([words("sheet_sci"), words("sheet_sci_value", grams=grams, kind=kind)])
    for one in years(summary, given):
        told = f"{energy_text(one.kwh)}, {mass_text(one.t_co2e)} CO2e ({words(f'kind_{one.kind}')})"
        rows.append([words("sheet_year"), told])
    measured = {state.uncertainty for state in figures.account.meters if state.kind == "measured"}
    if measured:
        value = ", ".join("–" if one is None else f"±{one:.0%}" for one in sorted(measured, key=str))
        rows.append([words("sheet_uncertainty"), words("sheet_uncertainty_measured", value=value)])
    if any(state.kind == "modelled" for state in figures.account.meters):
        rows.append([words("sheet_uncertainty"), words("sheet_uncertainty_modelled")])
    cells = "".join(f"<tr><td>{escape(name)}</td><td>{escape(text)}</td></tr>" for name, text in rows)
    yield f"<div class=wide><table class=sheet>{cells}</table></div>"


def _method(figures: Figures, words: Words) -> Iterable[str]:
    names = ("method_latency", "method_energy", "method_books", "method_saved", "method_carbon")
    yield "<ul>" + "".join(f"<li>{escape(words(name))}</li>" for name in names) + "</ul>"
    machines = "".join(f"<li>{escape(machine.text)}</li>" for machine in figures.account.machines)
    bundles = ", ".join(figures.account.bundle_versions)
    screeners = ", ".join(figures.account.screeners)
    yield f"<h3>{escape(words('method_machine'))}</h3><ul>{machines}<li>bundle {escape(bundles or '–')};"
    yield f" screener: {escape(screeners or '–')}</li></ul>"
    lives = figures.lives
    told = words(
        "method_journal", files=", ".join(life.name for life in lives), torn=sum(life.torn for life in lives),
        lines=f"{sum(len(life.accounts) for life in lives):,}",
    )  # fmt: skip
    yield f"<p class=note>{escape(told)}</p>"


# --- pieces -----------------------------------------------------------------------------------------------------------


def _section(title: str, words: Words, *parts: str, page: bool = False) -> str:
    return f"<section{' class=page' if page else ''}><h2>{escape(words(title))}</h2>{''.join(parts)}</section>"


def _note(name: str, words: Words) -> str:
    return f"<p class=note>{escape(words(name))}</p>"


def _kind(kind: EnergyKind, words: Words) -> str:
    return f'<span class="kind {kind}">{escape(words(f"kind_{kind}"))}</span>'


def _table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """Cells are HTML; one that begins with a `td` of its own keeps it."""
    top = "".join(f"<th>{escape(name)}</th>" for name in head)
    body = "".join(
        "<tr>" + "".join(cell + "</td>" if cell.startswith("<td") else f"<td>{cell}</td>" for cell in row) + "</tr>"
        for row in rows
    )
    return f"<div class=wide><table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>"
