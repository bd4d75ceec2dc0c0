"""The simulator of faults: seeded schedules of crashes, delays and lies drive the worker, and an oracle judges."""
