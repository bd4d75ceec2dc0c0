"""The errors of Cascade. Each message is one line that names the place, the value and the remedy."""

from __future__ import annotations


class CascadeError(Exception):
    """Base of every error that a user can cause or correct; `str()` is one printable line."""


class SettingError(CascadeError):
    """A configuration, schema or feature file has a value that Cascade cannot use.

    - `file`, `key`: where the value is.
    - `value`: None if it is missing, or if it may be a secret: the message then shows none.
    - `problem`, `remedy`: what is wrong, and what the user should do.

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
    """Kafka cannot be reached, refuses an operation, or has no such topic."""


class MissingTopicsError(BrokerError):
    """Kafka has no topic of these names."""


class ProducerFencedError(BrokerError):
    """A newer producer with the same transactional id exists: the broker refuses every record of this producer."""


class CommitUnknownError(BrokerError):
    """The client sent a transaction's commit and does not know its outcome. The caller must create a new producer.

    A producer that sends on could apply the late commit to a later transaction (Jepsen, "Bufstream 0.1.0", 2024).
    """


class TransactionAbortedError(BrokerError):
    """The broker aborted a transaction: none of its records is visible and none of its offsets is committed."""


class StateError(CascadeError):
    """A snapshot of the feature state cannot be read, or does not fit the bundle or the partitions."""


class ModelServerError(CascadeError):
    """Triton cannot be reached, or does not serve the model that the bundle describes."""


class WorkerEndedError(CascadeError):
    """A worker process ended too often, and the supervisor stopped all of them."""


class LocalPartError(CascadeError):
    """An embedded part (the local broker, the local Triton) is not installed or does not start."""


class DeepStageError(CascadeError):
    """A deep call failed. The screener decides its transactions, and they are marked degraded.

    - `cause`: the cause of the degradation: `deadline`, `queue-full` or `error`.
    - `detail`: the message, for the log.
    """

    def __init__(self, cause: str, detail: str) -> None:
        self.cause = cause
        super().__init__(detail)

    @property
    def overloaded(self) -> bool:
        """Whether the model has too many calls, which is no fault of its server."""
        return self.cause in ("deadline", "queue-full")
