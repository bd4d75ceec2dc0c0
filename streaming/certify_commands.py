"""`cascade certify`: what labelled decisions after the training show of a bundle, written into the bundle."""

from __future__ import annotations

import hashlib
import shlex
from contextlib import closing
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from cascade.bundle import Bundle, add_certificate, load_bundle
from cascade.certificate import Certificate
from cascade.columns import Bool
from cascade.config import Config, DeepSettings, load_config
from cascade.durations import parse_ms
from cascade.frames import LabelledData, read_labelled
from cascade.local_parts import not_replaced
from cascade.progress import Steps
from stages.assembly import make_deep_stage, make_engine
from stages.certificate import Asked, LabelledDecisions, replayed
from stages.certificate.certify import Source, make_certificate, rows_to_judge
from stages.certificate.render import show_certificate
from stages.offline import score_offline
from streaming.commands import BROKER_WAIT_S
from streaming.evaluation import labelled_decisions, read_decisions
from streaming.kafka import make_consumer
from streaming.kafka.topics import wait_for_broker

app = typer.Typer(add_completion=False, no_args_is_help=True, rich_markup_mode=None, pretty_exceptions_enable=False)
REPLAY = "replay"


@app.command()
def certify(
    bundle: Annotated[Path, typer.Option(help="The bundle; the certificate becomes a part of it.")],
    data: Annotated[
        Path, typer.Option(help="Labelled transactions that go on after the bundle's own data, Parquet or CSV.")
    ],
    start: Annotated[
        datetime | None,
        typer.Option("--from", formats=["%Y-%m-%d"], help="First day, UTC; default: after the bundle's own data."),
    ] = None,
    until: Annotated[datetime | None, typer.Option(formats=["%Y-%m-%d"], help="Day after the last one, UTC.")] = None,
    confidence: Annotated[float, typer.Option(min=0.5, max=0.9999, help="Confidence of the statement.")] = 0.95,
    keep: Annotated[
        float, typer.Option(min=0.5, max=0.9999, help="Least share of deep-only's caught frauds and of its precision.")
    ] = 0.99,
    escalated: Annotated[
        float | None, typer.Option(min=0.0, max=1.0, help="Largest escalation rate; default: the bundle's budget.")
    ] = None,
    false_alarms: Annotated[
        float, typer.Option(min=1.0, max=100.0, help="Most false alarms, as a multiple of deep-only's.")
    ] = 1.05,
    valid: Annotated[str, typer.Option(help="How long it is valid, from the end of the data on.")] = "90d",
    decisions_from: Annotated[
        Path | None, typer.Option(help="Configuration of a service: read its decisions topic instead of replaying.")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print the certificate as JSON.")] = False,
) -> None:
    """State with confidence what the cascade keeps of deep-only, from labelled data after the training.

    Without --decisions-from it decides the data offline with the bundle. The file should begin well before --from, so
    that the features' windows are full, and its labels should be complete. Exit status: 0 if all claims are shown, 1 if
    one is not (the certificate is written all the same), or with a line that has the reason.
    """
    loaded = load_bundle(bundle)
    settings = None if decisions_from is None else load_config(decisions_from)
    labelled = read_labelled(data, loaded.schema)
    times = labelled.batch[loaded.schema.roles.event_time]
    judged = rows_to_judge(loaded, times, start, until, str(data))
    asked = Asked(
        confidence=confidence,
        keep_frauds=keep,
        keep_precision=keep,
        escalated=loaded.policy.escalation.budget if escalated is None else escalated,
        false_alarms=false_alarms,
    )
    valid_ms = _duration_ms(valid)
    with Steps() as progress:
        decisions = _decisions(loaded, labelled, judged, settings, progress)
        progress("statistics", 0.0)
        source = Source(
            file=data.name,
            sha256=_sha256(data),
            decisions=REPLAY if settings is None else f"topic {settings.kafka.topics.decisions}",
            first_ms=int(times[0]),
            command=_command(bundle, data, start, until, asked, valid, decisions_from),
        )
        certificate = make_certificate(loaded, decisions, asked, source, valid_ms, datetime.now(UTC))
        progress("statistics", 1.0)
    _write(loaded, certificate)
    if json:
        print(certificate.to_json().decode(), end="")
    else:
        show_certificate(certificate, Console(), datetime.now(UTC))
    if not certificate.holds:
        raise typer.Exit(1)


def _decisions(
    bundle: Bundle, data: LabelledData, judged: Bool, settings: Config | None, progress: Steps
) -> LabelledDecisions:
    """The decisions of the judged rows: replayed, or read from the topic of a service's configuration."""
    with closing(make_deep_stage(bundle, DeepSettings(backend="onnxruntime", threads=2))) as deep:
        if settings is None:
            scores = score_offline(
                make_engine(bundle), deep, data, judged, lambda share: progress("both models offline", share)
            )
            return replayed(bundle, data, scores)
        wait_for_broker(settings.kafka, BROKER_WAIT_S, lambda text: typer.echo(text, err=True))
        with closing(make_consumer(settings.kafka, None)) as consumer:
            topic = settings.kafka.topics.decisions
            decisions, _ = read_decisions(consumer, topic, settings.kafka.codec, progress)
        return labelled_decisions(decisions, data, judged, bundle, deep, progress)


def _duration_ms(text: str) -> int:
    try:
        return parse_ms(text)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--valid") from error


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _command(
    bundle: Path,
    data: Path,
    start: datetime | None,
    until: datetime | None,
    asked: Asked,
    valid: str,
    decisions_from: Path | None,
) -> str:
    """The command with all its values, those by default too; files by their names."""
    given: dict[str, object] = {
        "--bundle": bundle.name,
        "--data": data.name,
        "--from": None if start is None else f"{start:%Y-%m-%d}",
        "--until": None if until is None else f"{until:%Y-%m-%d}",
        "--confidence": asked.confidence,
        "--keep": asked.keep_frauds,
        "--escalated": asked.escalated,
        "--false-alarms": asked.false_alarms,
        "--valid": valid,
        "--decisions-from": None if decisions_from is None else decisions_from.name,
    }
    options = [part for name, value in given.items() if value is not None for part in (name, str(value))]
    return shlex.join(["cascade", "certify", *options])


def _write(bundle: Bundle, certificate: Certificate) -> None:
    try:
        add_certificate(bundle, certificate)
    except OSError as error:
        raise not_replaced(bundle.directory, error) from error
