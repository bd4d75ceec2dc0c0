"""How many rows each family of frauds and twins has, and how they join the genuine purchases."""

from __future__ import annotations

from dataclasses import replace
from typing import Final

import numpy as np

from cascade.progress import Progress
from cascade.simulator.frauds.anchors import Family, fill
from cascade.simulator.frauds.leak import leak_cards
from cascade.simulator.frauds.mules import concerts, mule_rings
from cascade.simulator.frauds.plain import compromise_terminals, large_amounts
from cascade.simulator.frauds.stolen import stolen_cards, travel_days
from cascade.simulator.frauds.takeover import new_hobbies, new_phones, takeovers
from cascade.simulator.frauds.testing import baskets, card_tests, transit_days
from cascade.simulator.rows import Campaigns, Rows, make_campaigns
from cascade.simulator.settings import Kind
from cascade.simulator.world import World

# Share of each pattern in the frauds.
PATTERN_MIX: Final = {
    Kind.STOLEN_CARD: 0.14,
    Kind.COMPROMISED_TERMINAL: 0.24,
    Kind.CARD_TESTING: 0.15,
    Kind.ACCOUNT_TAKEOVER: 0.12,
    Kind.LARGE_AMOUNT: 0.18,
    Kind.LEAKED_MERCHANT: 0.03,
    Kind.MULE_RING: 0.14,
}
# Share of each twin in all transactions; it does not depend on the share of frauds.
TWIN_MIX: Final = {
    Kind.TRAVEL_DAY: 0.0035,
    Kind.BASKET: 0.0022,
    Kind.TRANSIT_DAY: 0.0010,
    Kind.NEW_HOBBY: 0.0022,
    Kind.NEW_PHONE: 0.0018,
    Kind.CONCERT: 0.0035,
}
_FAMILIES: Final[dict[Kind, Family]] = {
    Kind.STOLEN_CARD: stolen_cards,
    Kind.CARD_TESTING: card_tests,
    Kind.ACCOUNT_TAKEOVER: takeovers,
    Kind.LARGE_AMOUNT: large_amounts,
    Kind.MULE_RING: mule_rings,
    Kind.TRAVEL_DAY: travel_days,
    Kind.BASKET: baskets,
    Kind.TRANSIT_DAY: transit_days,
    Kind.NEW_HOBBY: new_hobbies,
    Kind.NEW_PHONE: new_phones,
    Kind.CONCERT: concerts,
}
TWIN_SHARE: Final = sum(TWIN_MIX.values())


def add_frauds_and_twins(
    rng: np.random.Generator, world: World, genuine: Rows, progress: Progress
) -> tuple[Rows, Campaigns]:
    """Adds the frauds and the twins to genuine purchases: some frauds change genuine rows, the others are rows more."""
    twins = {kind: round(share * len(genuine.card) / (1.0 - TWIN_SHARE)) for kind, share in TWIN_MIX.items()}
    converted = PATTERN_MIX[Kind.COMPROMISED_TERMINAL]
    share = world.settings.fraud_share
    # frauds / (genuine + twins + inserted frauds) = share, solved for frauds
    frauds = share * (len(genuine.card) + sum(twins.values())) / (1.0 - (1.0 - converted) * share)
    wanted = {kind: round(frauds * part) for kind, part in PATTERN_MIX.items()} | twins
    streams = dict(zip(wanted, rng.spawn(len(wanted)), strict=True))
    campaigns, parts = [make_campaigns(Kind.PURCHASE, 0, start_ms=0, end_ms=0)], [genuine]
    if len(genuine.card):
        for kind, family in _FAMILIES.items():
            made, rows = fill(family, streams[kind], world, genuine, wanted[kind])
            campaigns += made
            parts += rows
            progress(len(parts) / (len(parts) + len(_FAMILIES)))
        kind = Kind.LEAKED_MERCHANT
        sold, rows_of_sold = leak_cards(streams[kind], world, genuine, wanted[kind])
        compromised, hit = compromise_terminals(
            streams[Kind.COMPROMISED_TERMINAL], world, genuine, wanted[Kind.COMPROMISED_TERMINAL]
        )
        genuine.kind[hit] = Kind.COMPROMISED_TERMINAL
        campaigns += [sold, compromised]
        parts.append(rows_of_sold)
    return _with_own_devices(world, campaigns, parts)


def _with_own_devices(world: World, campaigns: list[Campaigns], parts: list[Rows]) -> tuple[Rows, Campaigns]:
    """Joins all parts. Numbers of new devices are unique in a part, and become unique in all."""
    count = world.devices.count
    free = 0
    renumbered, states = [parts[0]], [campaigns[0], *campaigns[len(parts) :]]
    for made, rows in zip(campaigns[1 : len(parts)], parts[1:], strict=True):
        states.append(replace(made, device=np.where(made.device > count, made.device + free, made.device)))
        renumbered.append(replace(rows, device=np.where(rows.device > count, rows.device + free, rows.device)))
        free += max(0, int(made.device.max(initial=0)) - count)
    return Rows.joined(renumbered), Campaigns.joined(states)
