"""MIG: slices of GPUs, their placements, the plan of a deep stage on them, and what a cluster needs for it."""
