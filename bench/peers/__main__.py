"""`python -m bench.peers [NAME...]`: installs the named peers, or all, into the directory of the embedded parts."""

from __future__ import annotations

import sys

from bench.peers import PEERS
from cascade.errors import CascadeError


def main(names: list[str]) -> int:
    """Installs each peer; prints a line where it fails, and continues with the others. Returns the exit status."""
    known = {peer.name: peer for peer in PEERS}
    if unknown := sorted(set(names) - set(known)):
        print(f"no peer {', '.join(unknown)}; use {', '.join(known)}", file=sys.stderr)
        return 2
    failed = 0
    for name in names or known:
        try:
            known[name].install(print)
        except CascadeError as error:
            print(f"{name}: {error}", file=sys.stderr)
            failed = 1
    return failed


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
