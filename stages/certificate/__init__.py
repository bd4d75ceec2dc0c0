"""The certificate: what labelled decisions after the training show of the cascade beside deep-only."""

from stages.certificate.claims import Asked, make_claims, make_power, make_recall
from stages.certificate.decisions import LabelledDecisions, first_frauds, labelled, replayed

__all__ = [
    "Asked",
    "LabelledDecisions",
    "first_frauds",
    "labelled",
    "make_claims",
    "make_power",
    "make_recall",
    "replayed",
]
