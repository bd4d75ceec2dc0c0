"""The peers: applications that a team would write instead of Cascade, on the same broker, topics, models and Triton.

    peer = peer_named("plain-loop")
    if (why := peer.missing()) is None:
        with peer.run(work) as process:
            process.wait_ready()

The comparison is fair: each peer is written as its library's documentation shows and tuned as a user would tune it. It
delivers at least once and commits offsets every five seconds. Its own module names what it leaves out. Its decisions
are the messages of `streaming.pipeline.decisions`.

`bench.peers.echo` is no alternative, so it is not in PEERS: it decides nothing, and shows what Kafka itself costs.
"""

from __future__ import annotations

from bench.peers.java_peer import KafkaStreams
from bench.peers.process import Job, Peer, PeerProcess, Work
from bench.peers.python_peers import PlainLoop, QuixStreams

__all__ = ["PEERS", "Job", "Peer", "PeerProcess", "Work", "peer_named"]

PEERS: tuple[Peer, ...] = (PlainLoop(), QuixStreams(), KafkaStreams())


def peer_named(name: str) -> Peer:
    """The peer of that name; raises KeyError."""
    return {peer.name: peer for peer in PEERS}[name]
