"""The peers: applications that a team would write in Cascade's stead, on the same broker, topics, models and Triton.

    peer = peer_named("plain-loop")
    if (why := peer.missing()) is None:
        with peer.run(work) as process:
            process.wait_ready()

They are fair: each as its documentation shows, tuned as a user would, at least once, offsets committed every five
seconds. What they leave out, their own modules say. They write the messages of `streaming.decisions`.
"""

from __future__ import annotations

from bench.peers.java_peer import KafkaStreams
from bench.peers.process import Peer, PeerProcess, Work
from bench.peers.python_peers import PlainLoop, QuixStreams

__all__ = ["PEERS", "Peer", "PeerProcess", "Work", "peer_named"]

PEERS: tuple[Peer, ...] = (PlainLoop(), QuixStreams(), KafkaStreams())


def peer_named(name: str) -> Peer:
    """The peer of that name; raises KeyError."""
    return {peer.name: peer for peer in PEERS}[name]
