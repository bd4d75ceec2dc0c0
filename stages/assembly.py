"""From a bundle to its models, as the configuration asks."""

from __future__ import annotations

from pathlib import Path

import msgspec

from cascade.bundle import Bundle
from cascade.config import DeepSettings
from cascade.engine import Engine
from cascade.errors import BundleError
from cascade.features import FeatureEngine
from cascade.protocols import DeepStage
from stages.deep.signature import DeepSignature
from stages.screener.lightgbm_screener import LightGbmScreener


def make_engine(bundle: Bundle) -> Engine:
    """Features, screener and policy of a bundle; raises BundleError or SettingError where they do not fit."""
    features = FeatureEngine(bundle.spec, bundle.schema, str(bundle.directory / "features.toml"))
    return Engine(features, make_screener(bundle, features.width), bundle.policy)


def make_screener(bundle: Bundle, width: int) -> LightGbmScreener:
    """The bundle's screener; `width`: features of a row."""
    return LightGbmScreener(bundle.content["screener.txt"], width)


def deep_signature(bundle: Bundle) -> DeepSignature:
    """Inputs and outputs of the bundle's deep model; raises BundleError."""
    try:
        return msgspec.json.decode(bundle.content["deep.json"], type=DeepSignature)
    except msgspec.MsgspecError as error:
        raise BundleError(f"{bundle.directory / 'deep.json'}: {error}; train the bundle again") from error


def make_deep_stage(bundle: Bundle, settings: DeepSettings) -> DeepStage:
    """The deep stage that the configuration names, for the bundle's model."""
    signature = deep_signature(bundle)
    if settings.backend == "onnxruntime":
        from stages.deep.in_process import OnnxDeepStage

        return OnnxDeepStage(bundle.directory / "deep.onnx", signature, settings.threads)
    from stages.deep.triton import GrpcOptions, TritonDeepStage

    def path(text: str) -> Path | None:
        return Path(text) if text else None

    options = GrpcOptions(
        ssl=settings.tls,
        root_certificates=path(settings.ca_file),
        private_key=path(settings.key_file),
        certificate_chain=path(settings.certificate_file),
    )
    return TritonDeepStage(settings.url, signature, settings.model, options, settings.hedge_ms)
