"""`cascade bundle`: brings a bundle to where a service reads it, and verifies it."""

from __future__ import annotations

import hashlib
import re
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from cascade.bundle import MANIFEST, Bundle, load_bundle
from cascade.errors import BundleError
from stages.certificate.render import show_certificate
from streaming.service.bundle_fetch import fetch_bundle

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    help="Fetch a bundle to where a service reads it, and verify it.",
)
_SHA256 = re.compile(r"[0-9a-fA-F]{64}")


@app.command()
def fetch(
    source: Annotated[str, typer.Argument(help="The bundle: a directory, or a URL (s3://, https://, through fsspec).")],
    destination: Annotated[
        Path, typer.Argument(help="Directory for it; an existing one is replaced. Not a mount point itself.")
    ],
    manifest_sha256: Annotated[
        str, typer.Option(help="SHA-256 of its manifest.json (hex): copy this bundle and no other.")
    ] = "",
) -> None:
    """Copy a bundle, after the size and SHA-256 of each file were compared with its manifest.

    The destination has the whole verified bundle, or is unchanged. Exit status: 0, or 1 with a line that has the
    reason.
    """
    if manifest_sha256 and not _SHA256.fullmatch(manifest_sha256):
        raise typer.BadParameter("use 64 hexadecimal digits", param_hint="--manifest-sha256")
    bundle = fetch_bundle(source, destination, manifest_sha256)
    typer.echo(f"{destination}: {_described(bundle)}")


@app.command()
def verify(bundle: Annotated[Path, typer.Argument(help="Directory of the bundle.")]) -> None:
    """Compare each file of a bundle with its manifest, and print version and SHA-256 of the manifest.

    Exit status: 0, or 1 with a line that has the reason.
    """
    typer.echo(f"{bundle}: {_described(load_bundle(bundle))}")


@app.command()
def certificate(bundle: Annotated[Path, typer.Argument(help="Directory of the bundle.")]) -> None:
    """Print the certificate that `cascade certify` wrote into a bundle.

    Exit status: 0, or 1 with a line that has the reason.
    """
    loaded = load_bundle(bundle)
    found = loaded.certificate()
    if found is None:
        raise BundleError(f"{bundle}: has no certificate; run `cascade certify`")
    show_certificate(found, Console(), datetime.now(UTC))


def _described(bundle: Bundle) -> str:
    digest = hashlib.sha256((bundle.directory / MANIFEST).read_bytes()).hexdigest()
    return f"bundle {bundle.manifest.version}, verified; manifest-sha256 {digest}"
