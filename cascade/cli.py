"""The command line: a table of the commands. Each command's module is imported only when the command is called."""

from __future__ import annotations

import difflib
import importlib
import sys
from typing import NamedTuple

from cascade import __version__


class Command(NamedTuple):
    """The module whose `app` runs the command, and the command's line in `cascade --help`.

    `group`: the command has commands of its own. `shared`: the module's app runs several commands of the table.
    """

    module: str
    help: str
    group: bool = False
    shared: bool = False


SECTIONS = {
    "Use it: from simulated cards to a running service": {
        "demo": Command("bench.demo", "Run the whole service on this machine, on simulated data."),
        "simulate": Command("stages.commands", "Write simulated transactions with known frauds.", shared=True),
        "train": Command("stages.commands", "Train both models; write a bundle.", shared=True),
        "recalibrate": Command("stages.commands", "Change a bundle's budget and costs without training.", shared=True),
        "doctor": Command("streaming.service.doctor", "Check broker, Triton, bundle, clocks and limits."),
        "run": Command("streaming.commands", "Run the service until SIGTERM.", shared=True),
        "top": Command("streaming.service.top", "Watch a running service in the terminal."),
    },
    "Judge it: what it decided, and what that cost": {
        "evaluate": Command("streaming.data_commands", "Compare the decisions with the labels.", shared=True),
        "certify": Command("streaming.certify_commands", "State with confidence what the cascade keeps of deep-only."),
        "worth": Command("bench.worth.commands", "Say at which escalated share the deep stage pays, if at all."),
        "ledger": Command("cascade.ledger.commands", "Combine the ledgers that services wrote to disk.", group=True),
        "report": Command("cascade.report.commands", "Write the ledgers as a page for manager and auditor."),
    },
    "Plan it: slices of GPUs for the deep model": {
        "mig": Command("cascade.mig.commands", "Plan, check and watch MIG layouts.", group=True),
    },
    "Prove it: measure and break it on your own machine": {
        "bench": Command("bench.commands", "Measure its speed beside the alternatives.", group=True),
        "handbook": Command("bench.handbook", "Reproduce the results on the Fraud Detection Handbook's data."),
        "delivery": Command("bench.delivery", "Compare exactly-once with at-least-once delivery."),
        "simulate-faults": Command("bench.faults.commands", "Run the worker through seeded faults."),
        "chaos": Command("bench.chaos", "Kill workers and brokers under load; count losses."),
        "soak": Command("bench.soak", "Watch the memory under a steady load."),
        "fuzz": Command("bench.fuzz", "Decode hostile messages by the million."),
    },
    "Set it up: data, models and brokers to work with": {
        "compile": Command("streaming.commands", "Compile the kernels ahead of the first start.", shared=True),
        "topics": Command("streaming.commands", "Create the topics of a configuration.", shared=True),
        "warm-up": Command("streaming.data_commands", "Fill the state from history before a start.", shared=True),
        "replay": Command("streaming.data_commands", "Send a data file to Kafka.", shared=True),
        "bundle": Command("streaming.bundle_commands", "Fetch and verify a bundle.", group=True),
        "repository": Command("stages.commands", "Write a bundle's Triton model repository.", shared=True),
        "local": Command("streaming.local_parts_commands", "Install and run a broker and a Triton.", group=True),
    },
}
COMMANDS = {name: command for section in SECTIONS.values() for name, command in section.items()}

USAGE = """Usage: cascade COMMAND [OPTIONS]

Real-time card-fraud detection: a fast model screens every transaction, and a
deep model examines only those that are worth its cost.

{sections}

`cascade COMMAND --help` explains a command. Start with `cascade demo`, then:

  cascade simulate --out data.parquet             1. data, or your own file
  cascade train --data data.parquet --out bundle  2. both models and the policy
  cascade doctor --config cascade.toml            3. is everything in place?
  cascade run --config cascade.toml               4. the service
"""


def main(arguments: list[str] | None = None) -> int:
    """Run the command that `arguments` (by default the process's) name, and return the exit status."""
    arguments = sys.argv[1:] if arguments is None else arguments
    name = arguments[0] if arguments else ""
    if name in COMMANDS:
        return _call(name, arguments[1:])
    if name == "--version":
        print(f"cascade {__version__}")
        return 0
    if name in ("", "--help", "-h", "help"):
        print(USAGE.format(sections="\n\n".join(_section(title) for title in SECTIONS)), end="")
        return 0 if name else 2
    near = difflib.get_close_matches(name, COMMANDS, n=1)
    hint = f"did you mean {near[0]}?" if near else "`cascade --help` lists them"
    print(f"cascade: no command {name}; {hint}", file=sys.stderr)
    return 2


def _section(title: str) -> str:
    return "\n".join([title, *(f"  {name:<15} {command.help}" for name, command in SECTIONS[title].items())])


def _call(name: str, arguments: list[str]) -> int:
    from cascade.errors import CascadeError

    command = COMMANDS[name]
    app = importlib.import_module(command.module).app
    try:
        if command.shared:
            app(args=[name, *arguments], prog_name="cascade")
        else:  # typer runs an app with a single command without that command's name
            app(args=arguments, prog_name=f"cascade {name}")
    except CascadeError as error:
        print(f"cascade {name}: {error}", file=sys.stderr)
        return 1
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else 1
    return 0
