"""The command line: a table from command to the module that holds it, loaded when it is called."""

from __future__ import annotations

import importlib
import sys
from typing import NamedTuple

from cascade import __version__


class Command(NamedTuple):
    """Where a command lives, what it is for, and whether it is a group with commands of its own."""

    module: str
    help: str
    group: bool = False


COMMANDS = {
    "demo": Command("bench.demo", "Stream simulated transactions through embedded parts; end with a ledger."),
    "run": Command("streaming.commands", "Run the service until SIGTERM."),
    "train": Command("stages.commands", "Train screener and deep model; write a bundle."),
    "simulate": Command("stages.commands", "Write data of the project's own simulator."),
    "repository": Command("stages.commands", "Write the Triton model repository of a bundle."),
    "replay": Command("streaming.commands", "Play a data file into Kafka."),
    "evaluate": Command("streaming.commands", "Judge the decisions topic by the truth."),
    "top": Command("streaming.top", "Watch a running service in the terminal."),
    "ledger": Command("cascade.ledger.commands", "Put together what services have kept on disk.", group=True),
    "report": Command("cascade.report.commands", "What services have kept, as a page for manager and auditor."),
    "doctor": Command("streaming.doctor", "Check broker, topics, Triton, model, bundle, clocks and limits."),
    "handbook": Command("bench.handbook", "Reproduce the figures on the Fraud Detection Handbook's data."),
    "simulate-faults": Command("bench.faults.commands", "Drive the worker through seeded faults; an oracle judges."),
    "bench": Command("bench.commands", "Measure speed beside what it is compared with.", group=True),
    "chaos": Command("bench.chaos", "Kill workers under load on a cluster in trouble; count what was lost."),
    "delivery": Command("bench.delivery", "Exactly-once against at-least-once, in one run."),
    "soak": Command("bench.soak", "Memory of worker and Triton under a steady load."),
    "fuzz": Command("bench.fuzz", "Push hostile messages through decoding by the million."),
    "local": Command("streaming.local_parts_commands", "Install and run the embedded broker and Triton.", group=True),
}

USAGE = """Usage: cascade COMMAND [OPTIONS]

Real-time fraud detection that spends deep-model compute only where it is needed.

{commands}

`cascade COMMAND --help` explains a command. Start with `cascade demo`, or with a service of your own:

  cascade simulate --out data.parquet                         1. or bring a data file and a schema
  cascade train --data data.parquet --out bundle              2. a bundle of both models and the policy
  cascade doctor --config cascade.toml                        3. is everything in place?
  cascade run --config cascade.toml                           4. the service
"""


def main(arguments: list[str] | None = None) -> int:
    """Run the command that the arguments name; returns the exit status."""
    given = sys.argv[1:] if arguments is None else arguments
    if given[:1] == ["--version"]:
        print(f"cascade {__version__}")
        return 0
    if not given or given[0] in ("--help", "-h", "help"):
        listing = "\n".join(f"  {name:<15} {command.help}" for name, command in COMMANDS.items())
        print(USAGE.format(commands=listing), end="")
        return 0 if given else 2
    if given[0] not in COMMANDS:
        import difflib

        near = difflib.get_close_matches(given[0], COMMANDS, n=1)
        hint = f"; did you mean {near[0]}?" if near else "; `cascade --help` lists them"
        print(f"cascade: no command {given[0]}{hint}", file=sys.stderr)
        return 2
    return _call(given)


def _call(given: list[str]) -> int:
    from cascade.errors import CascadeError

    command = COMMANDS[given[0]]
    app = importlib.import_module(command.module).app
    try:
        if command.group:
            app(args=given[1:], prog_name=f"cascade {given[0]}")
        else:
            app(args=given, prog_name="cascade")
    except CascadeError as error:
        print(f"cascade {given[0]}: {error}", file=sys.stderr)
        return 1
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else 1
    return 0
