"""The worker: its loop, its partitions and their state, and its sessions with the broker."""
