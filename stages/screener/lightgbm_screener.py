"""The screener that uses LightGBM's own `predict`, which every faster screener must equal."""

from __future__ import annotations

import numpy as np

from cascade.columns import Float32, Float64
from cascade.errors import BundleError


class LightGbmScreener:
    """Scores batches with LightGBM in the calling thread."""

    method = "lightgbm"

    def __init__(self, model_text: bytes, width: int) -> None:
        """`model_text`: LightGBM's text format. Raises BundleError unless it is a model of `width` features."""
        # with scikit-learn behind it, a third of a service's imports, which a compiled screener does not need
        import lightgbm

        try:
            self._booster = lightgbm.Booster(model_str=model_text.decode())
        except (lightgbm.basic.LightGBMError, UnicodeDecodeError) as error:
            raise BundleError(f"screener.txt: LightGBM cannot read it ({error}); train the bundle again") from error
        if self._booster.num_feature() != width:
            raise width_mismatch(self._booster.num_feature(), width)

    def warm_up(self) -> None:
        """See Screener."""
        self.score(np.zeros((1, self._booster.num_feature()), np.float32))

    def score(self, features: Float32) -> Float64:
        """Log-odds float64 [rows] of features float32 [rows, width]."""
        # one thread: for a few hundred rows LightGBM's thread pool takes longer than the trees
        raw: Float64 = self._booster.predict(features, raw_score=True, num_threads=1)
        return raw


def width_mismatch(expected: int, actual: int) -> BundleError:
    """The error for a model that expects another number of features than features.toml defines."""
    return BundleError(f"screener.txt: expects {expected} features, features.toml has {actual}; train the bundle again")
