"""The screener and the deep model of a simulation: cheap and exact, the deep model with its faults."""

from __future__ import annotations

from concurrent.futures import Future, InvalidStateError
from dataclasses import dataclass

import numpy as np

from bench.faults.world import Life
from cascade.columns import Array, Float32, Float64
from cascade.errors import DeepStageError
from cascade.protocols import DeepInputs
from stages.deep.answers import checked_scores


@dataclass(frozen=True, slots=True)
class ModelFaults:
    """Shares of calls; times in seconds.

    `answer_s`: longest time to an answer. `slow_share`: no answer, so the stage gives up at the deadline. `late_share`:
    a correct answer up to `late_s` after the deadline. `invalid_share`: an answer of wrong shape, or not finite.
    `doubled_share`: an answer within the call, and later a second one with other scores.
    """

    answer_s: float = 0.01
    slow_share: float = 0.0
    late_share: float = 0.0
    late_s: float = 0.2
    invalid_share: float = 0.0
    doubled_share: float = 0.0


class SimScreener:
    """A Screener whose log-odds depend on the features alone, and are the same on every machine."""

    method = "simulated"

    def warm_up(self) -> None:
        """See Screener; does nothing."""

    def score(self, features: Float32) -> Float64:
        """See Screener."""
        return _spread(features)


def deep_score(inputs: DeepInputs) -> Float64:
    """The deep model's raw scores, float64 [rows]."""
    return _spread(inputs.features[:, :-1]) * 0.5 + 1.0


def _spread(features: Float32) -> Float64:
    """Pseudo-random numbers in [-4, 4) that depend on each feature, float64 [rows]."""
    weights = 1.0 + np.arange(features.shape[1], dtype=np.float64) * 0.618
    # the order of additions is the same for each row, so the result does not depend on the batch
    total = np.zeros(len(features))
    for column, weight in enumerate(weights):
        total += np.sin(features[:, column].astype(np.float64) * weight + column)
    return np.asarray(np.mod(total * 7.31, 8.0) - 4.0, np.float64)


class SimDeepStage:
    """A DeepStage that answers in simulated time, and checks the answers as the real stage does."""

    def __init__(self, life: Life, faults: ModelFaults) -> None:
        self._life, self._world, self._faults = life, life.world, faults
        self.hedged = 0
        self.late_answers = 0

    def submit(self, inputs: DeepInputs, timeout_s: float) -> Future[Float64]:
        """See DeepStage."""
        world, faults, chance = self._world, self._faults, self._world.chance
        self._life.fault_point(f"deep call, {len(inputs)} rows")
        answer: Future[Float64] = Future()
        if timeout_s <= 0:
            answer.set_exception(DeepStageError("deadline", "the deadline passed before the call"))
            return answer
        scores, rows = deep_score(inputs), len(inputs)
        delay_s = faults.answer_s * chance.random()
        if world.happens(faults.slow_share):
            world.fire("model-slow")
            delay_s = timeout_s + 1.0
        elif world.happens(faults.late_share):
            world.fire("model-late-answer")
            # the client's own timer is late too, so no deadline error comes first
            world.at(timeout_s + faults.late_s * chance.random(), lambda: _answer(answer, scores[:, None], rows))
            return answer
        elif world.happens(faults.invalid_share):
            world.fire("model-lying")
            output = _invalid_output(chance.randrange(3), scores)
            world.at(min(delay_s, timeout_s), lambda: _answer(answer, output, rows))
            return answer
        elif world.happens(faults.doubled_share):
            world.fire("model-doubled-answer")
            _answer(answer, scores[:, None], rows)
            world.at(delay_s, lambda: _answer(answer, -scores[:, None], rows))
            return answer
        if delay_s < timeout_s:
            world.at(delay_s, lambda: _answer(answer, scores[:, None], rows))
        else:
            world.at(timeout_s, lambda: _give_up(answer))
        return answer

    def probe(self, timeout_s: float) -> Future[Float64]:
        """See DeepStage."""
        return self.submit(DeepInputs({}, np.zeros((1, 2), np.float32)), timeout_s)

    def wait_ready(self, timeout_s: float) -> None:
        """See DeepStage."""

    def close(self) -> None:
        """See DeepStage."""


def _invalid_output(kind: int, scores: Float64) -> Array:
    if kind == 0:
        return scores[:0, None]
    return np.full((len(scores), 1), np.nan if kind == 1 else np.inf)


def _answer(answer: Future[Float64], output: Array, rows: int) -> None:
    try:
        answer.set_result(checked_scores(output, rows))
    except DeepStageError as error:
        answer.set_exception(error)
    except InvalidStateError:
        return  # an answer came before


def _give_up(answer: Future[Float64]) -> None:
    if not answer.done():
        answer.set_exception(DeepStageError("deadline", "the deep model did not answer in time"))
