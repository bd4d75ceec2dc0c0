"""The deep model and the screener of a simulation: cheap, exact, and, where asked for, slow or lying."""

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
    """Shares of calls. `answer_s`: how long an answer takes, at most.

    `slow_share`: no answer in time, so the stage gives up at the deadline. `late_share`: a good answer, after the
    deadline. `lying_share`: of wrong shape, or not finite. `doubled_share`: answered within the call, and once more
    with another score.
    """

    answer_s: float = 0.01
    slow_share: float = 0.0
    late_share: float = 0.0
    late_s: float = 0.2
    lying_share: float = 0.0
    doubled_share: float = 0.0


class SimScreener:
    """A Screener: log-odds that spread with the features, the same for the same features on every machine."""

    method = "simulated"

    def warm_up(self) -> None:
        """See Screener; nothing is to be done."""

    def score(self, features: Float32) -> Float64:
        """See Screener."""
        return _spread(features)


def deep_score(inputs: DeepInputs) -> Float64:
    """What the deep model says, raw scores float64 [rows]."""
    return _spread(inputs.features[:, :-1]) * 0.5 + 1.0


def _spread(features: Float32) -> Float64:
    """Numbers in [-4, 4) that look random and depend on each feature."""
    weights = 1.0 + np.arange(features.shape[1], dtype=np.float64) * 0.618
    # row by row in the same order of additions, so that the batch boundaries do not show
    total = np.zeros(len(features))
    for column, weight in enumerate(weights):
        total += np.sin(features[:, column].astype(np.float64) * weight + column)
    return np.asarray(np.mod(total * 7.31, 8.0) - 4.0, np.float64)


class SimDeepStage:
    """A DeepStage whose answers come in simulated time, checked as the real one checks them."""

    def __init__(self, life: Life, faults: ModelFaults) -> None:
        self._life, self._world, self._faults = life, life.world, faults
        self.hedged = 0
        self.late_answers = 0

    def submit(self, inputs: DeepInputs, timeout_s: float) -> Future[Float64]:
        """See DeepStage."""
        world, faults, chance = self._world, self._faults, self._world.chance
        self._life.point(f"ask the model about {len(inputs)}")
        answer: Future[Float64] = Future()
        if timeout_s <= 0:
            answer.set_exception(DeepStageError("deadline", "the time was up before the call began"))
            return answer
        scores, rows = deep_score(inputs), len(inputs)
        delay_s = faults.answer_s * chance.random()
        if world.happens(faults.slow_share):
            world.fire("model-slow")
            delay_s = timeout_s + 1.0
        elif world.happens(faults.late_share):
            world.fire("model-late-answer")
            # the loop that keeps the deadline was itself held up
            world.at(timeout_s + faults.late_s * chance.random(), lambda: _answer(answer, scores[:, None], rows))
            return answer
        elif world.happens(faults.lying_share):
            world.fire("model-lying")
            lie = _lie(chance.randrange(3), scores)
            world.at(min(delay_s, timeout_s), lambda: _answer(answer, lie, rows))
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
        return self.submit(DeepInputs(np.zeros((1, 1, 1), np.float32), np.zeros((1, 2), np.float32)), timeout_s)

    def wait_ready(self, timeout_s: float) -> None:
        """See DeepStage."""

    def close(self) -> None:
        """See DeepStage."""


def _lie(kind: int, scores: Float64) -> Array:
    if kind == 0:
        return scores[:0, None]
    return np.full((len(scores), 1), np.nan if kind == 1 else np.inf)


def _answer(answer: Future[Float64], output: Array, rows: int) -> None:
    try:
        answer.set_result(checked_scores(output, rows))
    except DeepStageError as error:
        answer.set_exception(error)
    except InvalidStateError:
        return  # answered before


def _give_up(answer: Future[Float64]) -> None:
    if not answer.done():
        answer.set_exception(DeepStageError("deadline", "the deep model did not answer in time"))
