"""The screener by LightGBM's own predict: the reference that every faster screener must equal."""

from __future__ import annotations

import lightgbm
import numpy as np

from cascade.columns import Float32, Float64
from cascade.errors import BundleError


class LightGbmScreener:
    """Scores batches with LightGBM, in the calling thread."""

    method = "lightgbm"

    def __init__(self, model_text: bytes, width: int) -> None:
        """`model_text`: LightGBM's text format; `width`: features of a row. Raises BundleError where they differ."""
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
        # one thread: at a few hundred rows LightGBM's thread pool costs more than the trees
        raw: Float64 = self._booster.predict(features, raw_score=True, num_threads=1)
        return raw


def width_mismatch(taken: int, given: int) -> BundleError:
    """The error of a model that takes rows of another width than the features give."""
    return BundleError(f"screener.txt: takes {taken} features, features.toml gives {given}; train the bundle again")
