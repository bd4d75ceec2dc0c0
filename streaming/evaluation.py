"""Evaluates the decisions topic by the labels, beside the decisions that each model alone would have made."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from operator import attrgetter

import msgspec
import numpy as np
import polars as pl

from cascade.bundle import Bundle
from cascade.columns import Bool, Float64, Int64
from cascade.config import CodecName
from cascade.errors import BrokerError, DataError
from cascade.features.spec import DAY_MS
from cascade.frames import LabelledData
from cascade.ledger import ModelQuality, QualityComparison
from cascade.protocols import DeepStage
from cascade.schema import key_codes
from stages.assembly import make_engine
from stages.certificate import LabelledDecisions, labelled
from stages.metrics import Quality, quality
from stages.offline import DeepSample, score_offline
from streaming.kafka import ConsumerClient
from streaming.pipeline.decisions import decode_decision, plain_ids

Progress = Callable[[str, float], None]
ROWS_MAX = 10_000
# A broker that returns no records for this long, although there are more, does not work.
SILENCE_S_MAX = 30.0


class ModelEvaluation(msgspec.Struct, frozen=True, kw_only=True):
    """The quality of a way to decide: its ranking, and its decisions by the policy's thresholds.

    `caught`: frauds that are reviewed or declined; `missed`: frauds that are approved; `false_alarms`: genuine
    transactions that are reviewed or declined. `cost_per_thousand`: by the policy, in the currency of the amounts.
    """

    quality: Quality
    caught: int
    missed: int
    false_alarms: int
    cost_per_thousand: float


class Evaluation(msgspec.Struct, frozen=True, kw_only=True):
    """The evaluation of the decisions of a period.

    `missing`: transactions without a decision; `repeated`: decisions beyond a transaction's first. `escalated_share`,
    `degraded_share`: of all decisions; degraded ones count as escalated. `offline_difference_max`: largest absolute
    difference between a score in the topic and the offline score of the same bundle and stage. `deep_rows`: rows that
    the deep model scored; fewer than the transactions: deep-only's figures are those of a weighted sample.
    """

    bundle: str
    transactions: int
    frauds: int
    missing: int
    repeated: int
    escalated_share: float
    degraded_share: float
    offline_difference_max: float
    deep_rows: int
    review_from: float
    decline_from: float
    cascade: ModelEvaluation
    screener_only: ModelEvaluation
    deep_only: ModelEvaluation

    def comparison(self) -> QualityComparison:
        """The part that the ledger shows."""
        models = (("cascade", self.cascade), ("deep only", self.deep_only), ("screener only", self.screener_only))
        return QualityComparison(
            transactions=self.transactions,
            frauds=self.frauds,
            alert_rule=f"reviewed or declined: probability of fraud from {self.review_from:.3f} on",
            models=tuple(
                ModelQuality(
                    name=name,
                    frauds_caught=model.caught,
                    frauds_missed=model.missed,
                    false_alarms=model.false_alarms,
                    auc_roc=model.quality.auc,
                    average_precision=model.quality.average_precision,
                    card_precision_100=model.quality.card_precision_top100,
                )
                for name, model in models
            ),
        )


def read_decisions(
    consumer: ConsumerClient, topic: str, codec_name: CodecName, progress: Progress
) -> tuple[pl.DataFrame, int]:
    """Returns the first decision of each transaction in the topic, and the number of further decisions.

    Columns: `transaction_id`, `score`, `screener_score`, `stage`, `decision`, `degraded`, `bundle`. Raises BrokerError
    if the topic is missing or the broker returns no records, DataError if a record is not a decision.
    """
    partitions = consumer.partitions_for(topic)
    consumer.assign(partitions)
    ends = consumer.end_offsets(partitions)
    starts = consumer.beginning_offsets(partitions)
    total = sum(ends[partition] - starts[partition] for partition in partitions)
    names = ("transaction_id", "score", "screener_score", "stage", "decision", "degraded", "bundle")
    row, rows = attrgetter(*names), []
    answered_s = time.monotonic()
    while any(consumer.position(partition) < end for partition, end in ends.items()):
        for fetched in consumer.poll(0.1, ROWS_MAX):
            answered_s = time.monotonic()
            for offset, value in zip(fetched.offsets, fetched.values, strict=True):
                try:
                    rows.append(row(decode_decision(value or b"", codec_name)))
                except (msgspec.MsgspecError, UnicodeDecodeError) as error:
                    raise DataError(
                        f"topic {topic}, partition {fetched.partition}, offset {offset}: not a decision in codec"
                        f" {codec_name} ({error}); set kafka.codec as for the service"
                    ) from error
            progress("decisions", min(1.0, len(rows) / max(total, 1)))
        if time.monotonic() - answered_s > SILENCE_S_MAX:
            raise BrokerError(
                f"topic {topic}: the broker returned no records for {SILENCE_S_MAX:.0f} s, although there are more;"
                " check the broker"
            )
    if not rows:
        raise DataError(f"topic {topic} has no decisions; run the service first")
    frame = pl.DataFrame(rows, schema=names, orient="row")
    first = frame.unique("transaction_id", keep="first", maintain_order=True)
    return first, frame.height - first.height


@dataclass(frozen=True, slots=True)
class Judged:
    """The evaluation, and its scores, a row for each decided transaction."""

    evaluation: Evaluation
    scores: pl.DataFrame


def evaluate(
    decisions: pl.DataFrame,
    repeated: int,
    data: LabelledData,
    within: Bool,
    bundle: Bundle,
    deep: DeepStage,
    progress: Progress,
    deep_share: float = 1.0,
) -> Judged:
    """Evaluates decisions by the labels of a data file.

    decisions, repeated: of `read_decisions`. data: the whole file, from which the features are computed. within: the
    rows to evaluate, bool [rows]. bundle, deep: for the offline scores. progress: called with step and share.
    deep_share: share of the transactions that look genuine which the deep model scores, all others besides.

    The `scores` have the columns `transaction_id`, `score`, `stage`, `screener_only`, `deep_only` (probabilities), and
    `deep_weight`: how many transactions a row stands for in deep-only's figures, 0 where it was not scored.
    Raises DataError if no decision belongs to the data.
    """
    joined, rows, wanted = _joined(decisions, data, within, bundle)
    by_deep = (joined["stage"] == "deep").to_numpy()
    always = data.fraud == 1
    always[rows[by_deep]] = True
    offline = score_offline(
        make_engine(bundle),
        deep,
        data,
        wanted,
        lambda share: progress("both models offline", share),
        DeepSample(always, deep_share) if deep_share < 1.0 else None,
    )
    policy = bundle.policy
    screener_only = policy.screener.probability(offline.screener_raw)
    scored = offline.weight > 0.0
    deep_only = np.where(scored, policy.deep.probability(np.where(scored, offline.deep_raw, 0.0)), 0.0)
    score = joined["score"].to_numpy()
    degraded = joined["degraded"].to_numpy()
    expected = policy.probability(offline.screener_raw, offline.deep_raw, by_deep)
    judged = data.take(rows)
    fraud = judged.fraud == 1
    evaluation = Evaluation(
        bundle=", ".join(joined["bundle"].unique().sort()),
        transactions=len(rows),
        frauds=int(fraud.sum()),
        missing=int(within.sum()) - len(rows),
        repeated=repeated,
        escalated_share=float((by_deep | degraded).mean()),
        degraded_share=float(degraded.mean()),
        offline_difference_max=float(np.max(np.abs(score - expected))),
        deep_rows=int(scored.sum()),
        review_from=policy.review_from,
        decline_from=policy.decline_from,
        cascade=_judge(score, judged, bundle),
        screener_only=_judge(screener_only, judged, bundle),
        deep_only=_judge(
            deep_only[scored], judged.take(scored), bundle, None if scored.all() else offline.weight[scored]
        ),
    )
    scores = joined.select("transaction_id", "score", "stage").with_columns(
        screener_only=pl.Series(screener_only), deep_only=pl.Series(deep_only), deep_weight=pl.Series(offline.weight)
    )
    return Judged(evaluation, scores)


def labelled_decisions(
    decisions: pl.DataFrame,
    data: LabelledData,
    within: Bool,
    bundle: Bundle,
    deep: DeepStage,
    progress: Progress,
) -> LabelledDecisions:
    """The decisions of the topic as they were made, beside what deep-only would have decided; arguments as `evaluate`.

    Raises DataError if no decision belongs to the data, or if another bundle has decided.
    """
    joined, rows, wanted = _joined(decisions, data, within, bundle)
    others = sorted(set(joined["bundle"].unique()) - {bundle.version})
    if others:
        raise DataError(
            f"the decisions topic has decisions of bundle {', '.join(others)}; only those of {bundle.version} can"
            " certify it: choose the days with --from and --until"
        )
    offline = score_offline(
        make_engine(bundle), deep, data, wanted, lambda share: progress("both models offline", share)
    )
    return labelled(
        bundle,
        data.take(rows),
        cascade=joined["score"].to_numpy(),
        by_cascade=(joined["decision"] != "approve").to_numpy(),
        escalated=(joined["degraded"] | (joined["stage"] == "deep")).to_numpy(),
        scores=offline,
    )


def _joined(
    decisions: pl.DataFrame, data: LabelledData, within: Bool, bundle: Bundle
) -> tuple[pl.DataFrame, Int64, Bool]:
    """The decisions of the rows `within`, in the order of the data; positions of these rows, and a mask of them."""
    identities = data.batch[bundle.schema.roles.transaction_id]
    truth = pl.DataFrame({"transaction_id": plain_ids(identities), "row": np.arange(len(identities))})
    joined = truth.filter(pl.Series(within)).join(decisions, on="transaction_id", how="inner").sort("row")
    if not joined.height:
        raise DataError("no decision belongs to a transaction of the data file; use the file that was replayed")
    rows: Int64 = joined["row"].to_numpy()
    wanted = np.zeros(len(identities), bool)
    wanted[rows] = True
    return joined, rows, wanted


def _judge(score: Float64, data: LabelledData, bundle: Bundle, weight: Float64 | None = None) -> ModelEvaluation:
    """Judges the decisions by these probabilities.

    weight: float64 [rows], how many transactions each row of a sample stands for; all frauds are in it.
    """
    roles, policy = bundle.schema.roles, bundle.policy
    fraud, weights = data.fraud == 1, np.ones(len(score)) if weight is None else weight
    actions = policy.actions(score)
    cost = policy.costs.of_decisions(actions, fraud, data.batch[roles.amount])
    day, card = data.batch[roles.event_time] // DAY_MS, key_codes(data.batch[roles.card])
    return ModelEvaluation(
        quality=quality(score, fraud, day, card, policy.escalation.budget, weight),
        caught=int((fraud & (actions > 0)).sum()),
        missed=int((fraud & (actions == 0)).sum()),
        false_alarms=round(float(weights[~fraud & (actions > 0)].sum())),
        cost_per_thousand=1e3 * float(np.average(cost, weights=weights)),
    )
