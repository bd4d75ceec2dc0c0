"""The report as one HTML page that loads nothing from elsewhere and prints well."""

from __future__ import annotations

from collections.abc import Iterable
from html import escape
from importlib.resources import files

import cascade
from cascade.ledger.attribution import Books
from cascade.ledger.carbon import JOULES_PER_KWH
from cascade.ledger.deep_cost import Estimate
from cascade.ledger.render import LATENCY_COLUMNS, latency_cells, number_text, objective_cells, percent_text
from cascade.ledger.sla import ObjectiveResult
from cascade.ledger.summary import Counterfactual, EnergyComparison, LedgerSummary
from cascade.protocols import EnergyKind
from cascade.report import plots
from cascade.report.business import Assumptions, energy_text, mass_text, swings, year, years
from cascade.report.figures import Figures, budgets_left
from cascade.report.words import Words


def make_page(
    figures: Figures, assumptions: Assumptions, words: Words, command: str, counterfactual: Counterfactual | None = None
) -> str:
    """The HTML of the page.

    figures: of the journal. assumptions: of the business page. words: texts of the page's language.
    command: the command line that creates the page, for its footer.
    counterfactual: the comparison with deep-only; None without a measured cost of a deep call.
    """
    summary = figures.summary
    sections = [
        _section("h_latency", words, *_latency(figures, words)),
        _section("h_energy", words, *_energy(figures, words)),
        _section("h_time", words, *_time(figures, words)),
        _section("h_business", words, *_business(summary, assumptions, words, counterfactual), page=True),
        _section("h_sheet", words, *_sheet(figures, assumptions, words), page=True),
        _section("h_method", words, *_method(figures, words), page=True),
    ]
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
    started, ended = f"{summary.started:%Y-%m-%d %H:%M}", f"{summary.ended:%Y-%m-%d %H:%M}"
    return words("span", started=started, ended=ended, decisions=f"{summary.transactions:,}", runs=len(figures.runs))


def _tiles(summary: LedgerSummary, words: Words, counterfactual: Counterfactual | None) -> str:
    tiles = [_tile(percent_text(summary.paths["screened"].share), words("tile_light"))]
    for total in summary.energy_totals:
        per_million = None if total.per_transaction_mj is None else 1e3 * total.per_transaction_mj
        tiles.append(_tile(number_text(per_million), f"{escape(words('tile_energy'))} {_kind(total.kind, words)}"))
    if summary.carbon is not None:
        for grams in summary.carbon.totals:
            text = f"{escape(words('tile_carbon'))} {_kind(grams.kind, words)}"
            tiles.append(_tile(number_text(grams.per_million_g), text))
    if counterfactual is None:
        tiles.append(_tile(words("not_measured"), words("tile_saved_none"), small=True))
    else:
        for comparison in counterfactual.comparisons:
            text = f"{words('tile_saved')} {_kind(comparison.kind, words)}"
            tiles.append(_tile(_saved(comparison), text, small=True))
    status = "met" if all(result.met for result in summary.objectives) else "missed"
    tiles.append(_tile(f"<span class={status}>{words(f'sla_{status}')}</span>", words("tile_sla")))
    return f"<div class=tiles>{''.join(tiles)}</div>"


def _saved(comparison: EnergyComparison) -> str:
    """The share of deep-only's joules that the cascade saves, with its interval; negative if it saves none."""
    return _interval(comparison.filled.saving_share, ".0%")


def _interval(estimate: Estimate, form: str) -> str:
    return f"{estimate.value:{form}} ({estimate.low:{form}} … {estimate.high:{form}})"


def _tile(value: str, text: str, small: bool = False) -> str:
    return f'<div class="tile{" small" if small else ""}"><b>{value}</b><span>{text}</span></div>'


# --- latency ----------------------------------------------------------------------------------------------------------


def _latency(figures: Figures, words: Words) -> Iterable[str]:
    yield _note("latency_note", words)
    rows = [
        [escape(words(f"path_{name}")), f"{path.decisions:,}", percent_text(path.share), *latency_cells(path.latency)]
        for name, path in figures.summary.paths.items()
        if path.decisions or name == "all"
    ]
    yield table([*map(words, ("col_path", "col_decisions", "col_share")), *LATENCY_COLUMNS], rows)
    yield plots.latency(figures, words)
    yield _objectives(figures, words)


def _objectives(figures: Figures, words: Words) -> str:
    left = budgets_left(figures.events)
    rows = []
    for result in figures.summary.objectives:
        name, (value, limit) = escape(plots.objective_text(result.name, words)), objective_cells(result)
        rows.append([name, value, limit, _status(result, words), percent_text(left[result.name])])
    return table(map(words, ("col_objective", "col_value", "col_limit", "col_status", "col_budget")), rows)


def _status(result: ObjectiveResult, words: Words) -> str:
    if result.status == "no data":
        return escape(words("no_data"))
    return f"<span class={result.status}>{escape(words(f'sla_{result.status}'))}</span>"


# --- energy -----------------------------------------------------------------------------------------------------------


def _energy(figures: Figures, words: Words) -> Iterable[str]:
    summary, books = figures.summary, figures.summary.books
    if books is None or not books.closings:
        yield _note("no_energy", words)
        return
    yield _note("energy_note", words)
    if summary.transactions:
        yield plots.energy(books, summary.transactions, words)
    rows = []
    for kind in dict.fromkeys(entry.kind for entry in books.entries):
        for line, joules in books.by_line(kind).items():
            mj = 1e3 * joules / summary.transactions if summary.transactions else None
            name = escape(plots.line_text(line, words))
            rows.append([name, _kind(kind, words), number_text(joules), number_text(mj)])
    yield table(map(words, ("col_line", "col_kind", "col_joules", "col_mj")), rows)
    costs = words("list_separator").join(
        words(
            "cost",
            path=words(f"path_{path.path}"),
            mj=number_text(path.mj_per_decision),
            kind=words(f"kind_{path.kind}"),
        )
        for path in books.paths
    )
    if costs:
        yield f"<p class=note>{escape(words('per_decision', costs=costs))}</p>"
    if not books.idle_stated:
        yield _note("energy_idle_unstated", words)
    yield _meters(figures, books, words)


def _meters(figures: Figures, books: Books, words: Words) -> str:
    """Each meter with the source of its joules, its residual and its check."""
    closings = {(closing.meter, closing.kind): closing for closing in books.closings}
    rows = []
    for state in figures.account.meters:
        closing = None if state.kind is None else closings.get((state.meter, state.kind))
        kind = "–" if state.kind is None else _kind(state.kind, words)
        residual = "–" if closing is None else percent_text(closing.residual_share)
        check = "–" if closing is None or closing.check_share is None else f"{closing.check_share:+.2%}"
        uncertainty = "–" if state.uncertainty is None else f"±{state.uncertainty:.0%}"
        source = f"<td class=text>{escape(state.problem or state.source)}"
        rows.append([escape(state.meter), kind, number_text(state.energy_j), residual, check, uncertainty, source])
    keys = ("col_meter", "col_kind", "col_joules", "col_residual", "col_check", "col_uncertainty", "col_source")
    return table(map(words, keys), rows)


def _time(figures: Figures, words: Words) -> Iterable[str]:
    seconds = figures.interval_s
    unit, value = ("seconds", seconds) if seconds < 120 else ("minutes", seconds / 60)
    every = words(unit, value=f"{value:.3g}")
    yield f"<p class=note>{escape(words('time_note', every=every))}</p>"
    if figures.summary.energy_totals:
        yield plots.energy_over_time(figures, words)
    yield plots.escalated_over_time(figures, words)
    yield plots.budget_over_time(figures, words)
    yield _note("plot_budget_note", words)


# --- business and sheet -----------------------------------------------------------------------------------------------


def _business(
    summary: LedgerSummary, assumptions: Assumptions, words: Words, counterfactual: Counterfactual | None
) -> Iterable[str]:
    region, of_year, g_per_kwh = assumptions.grid
    volume, price, pue = f"{assumptions.volume:,.0f}", f"{assumptions.price:g}", f"{assumptions.pue:g}"
    place = {"region": region, "year": of_year, "g_per_kwh": f"{g_per_kwh:g}", "currency": assumptions.currency}
    note = words("business_note", volume=volume, price=price, pue=pue, **place)
    yield f"<p class=note>{escape(note)}</p>"
    of_cascade = years(summary, assumptions)
    if not of_cascade:
        yield _note("no_energy", words)
        return
    services = [("row_cascade", figures) for figures in of_cascade]
    if counterfactual is not None:
        for comparison in counterfactual.comparisons:
            joules = comparison.filled.energy_j.value / counterfactual.transactions
            services.append(("row_deep_only", year(comparison.kind, joules, assumptions)))
    rows = []
    for name, found in services:
        cells = (energy_text(found.kwh), number_text(found.money), mass_text(found.t_co2e))
        rows.append([escape(words(name)), _kind(found.kind, words), *cells])
    money_text = words("col_money", currency=assumptions.currency)
    yield table([*map(words, ("col_service", "col_kind", "col_kwh")), money_text, words("col_tonnes")], rows)
    yield _counterfactual(counterfactual, words)
    yield f"<h3>{escape(words('h_sensitivity'))}</h3>"
    yield _note("sensitivity_note", words)
    for found in of_cascade:
        money, tonnes = swings(found, assumptions)
        yield f"<p>{_kind(found.kind, words)}</p>"
        # a figure of zero is zero at both ends of every range
        if found.money:
            yield plots.sensitivity(money, found.money, money_text, words)
        if found.t_co2e:
            yield plots.sensitivity(tonnes, found.t_co2e, words("plot_tonnes"), words)


def _counterfactual(counterfactual: Counterfactual | None, words: Words) -> str:
    """The saving against deep-only, and the escalation rate at which there is none."""
    if counterfactual is None:
        return _note("tile_saved_none", words)
    lines = []
    for comparison in counterfactual.comparisons:
        deep_only = comparison.filled
        even = "–" if deep_only.break_even_share is None else _interval(deep_only.break_even_share, ".1%")
        values = {"kind": words(f"kind_{comparison.kind}"), "saving": _saved(comparison), "even": even}
        values |= {"ratio": _interval(deep_only.ratio, ".2f"), "rows": f"{deep_only.rows_per_call:g}"}
        lines.append(f"<p>{escape(words('saving', **values))}</p>")
    at = f"{counterfactual.measured_at:%Y-%m-%d %H:%M}"
    measured = words("saving_measured", at=at, server=counterfactual.server)
    return "".join(lines) + f"<p class=note>{escape(measured)}</p>"


def _sheet(figures: Figures, assumptions: Assumptions, words: Words) -> Iterable[str]:
    summary, carbon = figures.summary, figures.summary.carbon
    yield _note("sheet_note", words)
    rows = [
        [words("sheet_boundary"), words("sheet_boundary_text")],
        [words("sheet_unit"), words("sheet_unit_text")],
        [words("sheet_method"), words("sheet_method_text")],
    ]
    for total in summary.energy_totals:
        energy = "–" if total.energy_j is None else energy_text(total.energy_j / JOULES_PER_KWH)
        meters, kind = words("list_separator").join(total.meters), words(f"kind_{total.kind}")
        rows.append([words("sheet_mwh"), words("sheet_mwh_value", energy=energy, kind=kind, meters=meters)])
    basis = "; ".join(carbon.bases) if carbon is not None else words("sheet_not_accounted")
    rows.append([words("sheet_intensity"), basis])
    if carbon is not None:
        stated = words("sheet_embodied_value", grams=number_text(carbon.embodied_g), kind=words("kind_stated"))
        rows.append([words("sheet_embodied"), stated if carbon.embodied_g else words("sheet_no_embodied")])
        if carbon.sci_g_per_million is not None:
            kind = words(f"kind_{carbon.totals[0].kind}")
            grams = number_text(carbon.sci_g_per_million)
            rows.append([words("sheet_sci"), words("sheet_sci_value", grams=grams, kind=kind)])
    for found in years(summary, assumptions):
        energy, mass = energy_text(found.kwh), mass_text(found.t_co2e)
        amounts = words("sheet_year_value", energy=energy, mass=mass, kind=words(f"kind_{found.kind}"))
        rows.append([words("sheet_year"), amounts])
    measured = {state.uncertainty for state in figures.account.meters if state.kind == "measured"}
    if measured:
        value = ", ".join("–" if share is None else f"±{share:.0%}" for share in sorted(measured, key=str))
        rows.append([words("sheet_uncertainty"), words("sheet_uncertainty_measured", value=value)])
    if any(state.kind == "modelled" for state in figures.account.meters):
        rows.append([words("sheet_uncertainty"), words("sheet_uncertainty_modelled")])
    cells = "".join(f"<tr><td>{escape(name)}</td><td>{escape(text)}</td></tr>" for name, text in rows)
    yield f"<div class=wide><table class=sheet>{cells}</table></div>"


def _method(figures: Figures, words: Words) -> Iterable[str]:
    names = ("method_latency", "method_energy", "method_books", "method_saved", "method_carbon")
    yield "<ul>" + "".join(f"<li>{escape(words(name))}</li>" for name in names) + "</ul>"
    machines = "".join(f"<li>{escape(machine.text)}</li>" for machine in figures.account.machines)
    bundles = ", ".join(figures.account.bundle_versions) or "–"
    screeners = ", ".join(figures.account.screeners) or "–"
    bundle = escape(words("method_bundle", bundles=bundles, screeners=screeners))
    yield f"<h3>{escape(words('method_machine'))}</h3><ul>{machines}<li>{bundle}</li></ul>"
    files = ", ".join(run.name for run in figures.runs)
    lines = f"{sum(len(run.accounts) for run in figures.runs):,}"
    torn = sum(run.torn for run in figures.runs)
    yield f"<p class=note>{escape(words('method_journal', files=files, lines=lines, torn=torn))}</p>"


# --- pieces -----------------------------------------------------------------------------------------------------------


def _section(title: str, words: Words, *parts: str, page: bool = False) -> str:
    return f"<section{' class=page' if page else ''}><h2>{escape(words(title))}</h2>{''.join(parts)}</section>"


def _note(name: str, words: Words) -> str:
    return f"<p class=note>{escape(words(name))}</p>"


def _kind(kind: EnergyKind, words: Words) -> str:
    return f'<span class="kind {kind}">{escape(words(f"kind_{kind}"))}</span>'


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A table whose cells are HTML; a cell that begins with its own `td` tag keeps it."""
    top = "".join(f"<th>{escape(name)}</th>" for name in head)
    body = "".join(
        "<tr>" + "".join(cell + "</td>" if cell.startswith("<td") else f"<td>{cell}</td>" for cell in row) + "</tr>"
        for row in rows
    )
    return f"<div class=wide><table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>"
