"""Creates the engine and the models of a bundle, as configured."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import msgspec
import structlog

from cascade.bundle import Bundle
from cascade.config import DeepSettings
from cascade.engine import Engine
from cascade.errors import BundleError
from cascade.features import FeatureEngine
from cascade.features.plan import resolve
from cascade.plugins import DEEP_STAGES
from cascade.protocols import DeepStage, Screener
from stages.deep.signature import DeepSignature
from stages.screener.compiled import CompiledScreener
from stages.screener.forest import UnsupportedForestError
from stages.screener.lightgbm_screener import LightGbmScreener, width_mismatch

log = structlog.get_logger()


def make_engine(bundle: Bundle) -> Engine:
    """The engine of a bundle. Raises BundleError or SettingError if features and screener do not fit each other."""
    features = FeatureEngine(bundle.spec, bundle.schema, str(bundle.directory / "features.toml"))
    # the gain model's last feature is the screener's score
    by_gain = bundle.policy.escalation.rule == "gain"
    gain_model = make_forest(bundle, "escalation.txt", features.width + 1) if by_gain else None
    return Engine(features, make_screener(bundle, features.width), bundle.policy, gain_model)


def make_screener(bundle: Bundle, width: int) -> Screener:
    """The bundle's screener, for rows of `width` features. Raises BundleError as `make_forest`."""
    return make_forest(bundle, "screener.txt", width)


def make_forest(bundle: Bundle, file: str, width: int) -> Screener:
    """The model in a file of the bundle: compiled if possible, else LightGBM itself. `width`: features of a row.

    Raises BundleError if the model expects rows of another width, or if LightGBM cannot read it either.
    """
    text = bundle.content[file]
    try:
        compiled = CompiledScreener(text)
    except UnsupportedForestError as error:
        log.warning("a model cannot be compiled, LightGBM scores instead", file=file, reason=str(error))
        return LightGbmScreener(text, width)
    if compiled.width != width:
        raise width_mismatch(compiled.width, width)
    return compiled


def deep_signature(bundle: Bundle) -> DeepSignature:
    """Inputs and outputs of the bundle's deep model.

    Raises BundleError if they cannot be read, or differ from the sequences and features that the bundle declares.
    """
    path = bundle.directory / "deep.json"
    try:
        signature = msgspec.json.decode(bundle.content["deep.json"], type=DeepSignature)
    except msgspec.MsgspecError as error:
        raise BundleError(f"{path}: {error}; train the bundle again") from error
    plan = resolve(bundle.spec, bundle.schema, str(bundle.directory / "features.toml"))
    computed = {sequence.name: sequence.shape for sequence in plan.sequences}, len(plan.names) + 1
    if (signature.sequences, signature.features) != computed:
        raise BundleError(
            f"{path}: the model reads sequences {signature.sequences} and {signature.features} features, features.toml"
            f" gives {computed[0]} and {computed[1]}; train the bundle again"
        )
    return signature


def make_deep_stage(bundle: Bundle, settings: DeepSettings) -> DeepStage:
    """The configured deep stage for the bundle's model: the function that `deep.backend` names makes it."""
    make: Callable[[Bundle, DeepSettings], DeepStage] = DEEP_STAGES.load(settings.backend)
    return make(bundle, settings)


def make_onnx_stage(bundle: Bundle, settings: DeepSettings) -> DeepStage:
    """The deep model in this process."""
    from stages.deep.in_process import OnnxDeepStage

    signature = deep_signature(bundle)
    return OnnxDeepStage(bundle.directory / "deep.onnx", signature, settings.threads, device=settings.device)


def make_triton_stage(bundle: Bundle, settings: DeepSettings) -> DeepStage:
    """The deep model on Triton."""
    from stages.deep.triton import TritonDeepStage
    from stages.deep.triton_connection import GrpcOptions

    def path(text: str) -> Path | None:
        return Path(text) if text else None

    options = GrpcOptions(
        ssl=settings.tls,
        root_certificates=path(settings.ca_file),
        private_key=path(settings.key_file),
        certificate_chain=path(settings.certificate_file),
    )
    digest = hashlib.sha256(bundle.content["deep.onnx"]).hexdigest()
    return TritonDeepStage(settings.url, deep_signature(bundle), settings.model, options, settings.hedge_ms, digest)
