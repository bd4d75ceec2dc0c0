"""The times and sizes that both client libraries are set to."""

from __future__ import annotations

# A client that finds no broker for this long is not made.
BOOTSTRAP_TIMEOUT_S = 30.0
# A request is retried on another node after this long; kafka-python's 30 s would hide a dead broker.
REQUEST_TIMEOUT_MS = 15_000

# The group notices a killed worker after this long, and its partitions are not read until then. The broker's minimum is
# 6 s; below 10 s a loaded machine loses partitions without need.
SESSION_TIMEOUT_MS = 10_000
HEARTBEAT_INTERVAL_MS = 2_000
# The broker answers a fetch as soon as it has a byte, so this adds no latency in the steady state. A partition that was
# just resumed, or whose position was set, waits this long at most for the fetch in flight that does not include it; and
# so does the event that a partition has ended. An idle worker's clients take 0.53 % of a core with 50 ms, 0.23 % with
# 250 ms and not less with 500 ms.
FETCH_WAIT_MS = 250
# Limits the memory of a fetch, over all partitions.
FETCH_BYTES_MAX = 8 * 1024 * 1024
# `committed` waits for open transactions. That of a killed worker ends after its timeout (15 s) and the coordinator's
# next check (every 10 s by default).
COMMITTED_TIMEOUT_S = 30.0

# A record without an acknowledgement after this long ends the session, so that the queue does not grow.
DELIVERY_TIMEOUT_S = 60.0
# Of kafka-python, which appends a micro-batch record by record: without lingering, the sender sends the first records
# at once and competes with the rest for the interpreter.
LINGER_MS = 1
# Larger than the broker's default, so that the dead letter of a message at the limit can be sent.
REQUEST_BYTES_MAX = 2 * 1024 * 1024
# Records in flight.
UNDELIVERED_MAX = 50_000
# The libraries' threads end within milliseconds; kafka-python's not before its records are delivered or have failed.
ABANDON_TIMEOUT_S = 1.0

# The open transaction of a killed worker without a successor delays read_committed readers this long, and then until
# the coordinator's next check (every 10 s by default). A shorter timeout would abort the longest configurable
# transaction (10 s).
TRANSACTION_TIMEOUT_MS = 15_000
# An earlier open transaction is aborted first; a coordinator that moves to another node needs some 10 s.
INIT_TIMEOUT_S = 30.0
# For deliveries and offsets, and again for the commit; the transaction cannot take longer than its timeout.
COMMIT_TIMEOUT_S = TRANSACTION_TIMEOUT_MS / 1_000
ABORT_TIMEOUT_S = 5.0
# The abort after a failure only spares readers a wait: otherwise the next producer or the timeout aborts.
FAILURE_ABORT_TIMEOUT_S = 2.0
