"""How long the loop rests between two turns, so that under load a turn takes several records.

A turn costs about as much for ten records as for one. The loop's own work sets the pace: a slow machine, or a busy one,
rests for longer, and a load that comes only now and then is not delayed at all.
"""

from __future__ import annotations

# A rest is so many times as long as the work before it, and at most REST_S_MAX, since it is a part of the latency.
REST = 4.0
REST_S_MAX = 0.004
# Turns that begin closer together are under load.
LOAD_S = 2 * REST_S_MAX


class Pace:
    """Decides when the next turn begins; for one thread.

    >>> pace = Pace()
    >>> pace.ended(began_s=1.0, ended_s=1.0005), pace.ended(began_s=1.002, ended_s=1.0025) > 0.0
    (0.0, True)
    """

    def __init__(self) -> None:
        self._began_s = -LOAD_S

    def ended(self, began_s: float, ended_s: float) -> float:
        """Returns the seconds to rest after a turn that took records, from `began_s` to `ended_s`; 0 without load."""
        loaded = began_s - self._began_s < LOAD_S
        self._began_s = began_s
        return min(REST * (ended_s - began_s), REST_S_MAX) if loaded else 0.0
