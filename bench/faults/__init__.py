"""The fault simulator: seeded schedules of faults drive the real worker on a simulated clock; an oracle checks it."""
