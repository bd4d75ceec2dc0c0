"""The errors of Cascade: each names the place, the value and the remedy, and prints as one line."""

from __future__ import annotations


class CascadeError(Exception):
    """Base of every error that a user can cause or mend; `str()` is one printable line."""


class SettingError(CascadeError):
    """A setting, schema or feature file holds something that cannot be used.

    >>> str(SettingError("cascade.toml", "deadline.budget_ms", -3, "must be positive", "set it to 50 or so"))
    'cascade.toml: deadline.budget_ms = -3: must be positive; set it to 50 or so'
    """

    def __init__(self, file: object, key: str, value: object, problem: str, remedy: str) -> None:
        self.file, self.key, self.value, self.problem, self.remedy = str(file), key, value, problem, remedy
        shown = "" if value is None else f" = {value!r}"
        super().__init__(" ".join(f"{file}: {key}{shown}: {problem}; {remedy}".splitlines()))


class BundleError(CascadeError):
    """A bundle is incomplete, altered, or of a version that this release does not read."""


class DataError(CascadeError):
    """A data file lacks a column, has a column of the wrong type, or cannot be read."""


class BrokerError(CascadeError):
    """Kafka cannot be reached, refuses an operation, or lacks a topic."""


class ProducerFencedError(BrokerError):
    """Another producer with the same transactional id has begun: nothing more may be sent with this one."""


class CommitUnknownError(BrokerError):
    """A transaction's commit was sent and its outcome is not known; a new producer must be made before anything else.

    Sending on could let the late commit hit a later transaction (Jepsen, "Bufstream 0.1.0", 2024).
    """


class TransactionAbortedError(BrokerError):
    """A transaction failed as a whole: none of its records and none of its offsets are kept."""


class StateError(CascadeError):
    """A snapshot of the feature state cannot be read, or does not fit what it is loaded into."""


class ModelServerError(CascadeError):
    """Triton cannot be reached, does not serve the model, or answers with something else than promised."""


class WorkerEndedError(CascadeError):
    """One of several workers ended again and again, so that all of them were stopped."""


class LocalPartError(CascadeError):
    """An embedded part (the local broker, the local Triton) is not installed or does not start."""


class DeepStageError(CascadeError):
    """One deep call failed; the transaction is decided by the screener and marked degraded.

    `cause` is one of the causes of degradation: `deadline`, `queue-full`, `error`.
    """

    def __init__(self, cause: str, detail: str) -> None:
        self.cause = cause
        super().__init__(detail)
