"""What a screener can be trained for: log-loss, focal loss, LambdaRank, or the opinion of the deep model."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np

from cascade.columns import Float64, Int64

Objective = Literal["log-loss", "focal", "lambdarank", "distilled"]
# Lin et al., "Focal Loss for Dense Object Detection", ICCV 2017, use 2.
FOCAL_GAMMA = 2.0
# LightGBM allows 10,000 rows of a query. Rows are in order of time, so a query is a stretch of the stream.
QUERY_ROWS = 5_000
# Hessians of the focal loss become negative for rows that are far wrong.
HESSIAN_MIN = 1e-6


def focal_loss(raw: Float64, fraud: Float64) -> tuple[Float64, Float64]:
    """Gradient and second derivative, float64 [rows], of the focal loss −(1 − q)^γ · ln q by the log-odds.

    q is the probability that the row has its own label. It counts rows less that are right already.

    - `raw` float64 [rows]: log-odds. `fraud` float64 [rows]: 0 or 1.

    Source: Lin et al., "Focal Loss for Dense Object Detection", ICCV 2017, equation 4, differentiated.
    """
    sign = 2.0 * fraud - 1.0
    q = np.clip(1.0 / (1.0 + np.exp(-sign * raw)), 1e-12, 1.0 - 1e-12)
    wrong, log_q = 1.0 - q, np.log(q)
    gradient = wrong**FOCAL_GAMMA * (FOCAL_GAMMA * q * log_q - wrong)
    slope = FOCAL_GAMMA * (wrong**FOCAL_GAMMA * (log_q + 1.0) - FOCAL_GAMMA * wrong ** (FOCAL_GAMMA - 1.0) * q * log_q)
    slope += (FOCAL_GAMMA + 1.0) * wrong**FOCAL_GAMMA
    return sign * gradient, np.maximum(slope * q * wrong, HESSIAN_MIN)


def queries(rows: int) -> Int64:
    """Sizes of LambdaRank's queries for `rows` consecutive rows, int64."""
    full, rest = divmod(rows, QUERY_ROWS)
    return np.array([QUERY_ROWS] * full + [rest] * (rest > 0), np.int64)


def parameters(objective: Objective) -> dict[str, Any]:
    """LightGBM's parameters for an objective."""
    by_objective: dict[Objective, dict[str, Any]] = {
        "log-loss": {"objective": "binary"},
        "focal": {"objective": lambda raw, data: focal_loss(raw, data.get_label())},
        "lambdarank": {"objective": "lambdarank", "lambdarank_truncation_level": QUERY_ROWS // 20},
        "distilled": {"objective": "cross_entropy"},
    }
    return by_objective[objective]
