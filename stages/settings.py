"""The training file: everything that a training run can be told, in TOML.

docs/training.example.toml explains each key.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import msgspec

from cascade.costs import Costs
from cascade.durations import parse_ms
from cascade.errors import SettingError
from cascade.setting_files import parse_settings, read_setting_file
from stages.screener.search import SearchSettings
from stages.screener.train import DIRECTIONS

EXAMPLE = "docs/training.example.toml"
AUTO = "auto"
Size = Literal["small", "large"]


class DataSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`[data]`: how the data is divided by time.

    - `warm_up`: length of the first part, which only fills the feature state.
    - `validation`: length of the last part, from which calibration and thresholds come; `auto`: as many days as have
      `validation_frauds_min` frauds, at most a third of what follows the warm-up.
    - `validation_frauds_min`: with fewer, the report says how uncertain its figures are.
    """

    warm_up: str = "37d"
    validation: str = AUTO
    validation_frauds_min: Annotated[int, msgspec.Meta(ge=20)] = 300


class EscalationSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`[escalation]`: `budget`, the share of the transactions that goes to the deep model.

    - `genuine_share`: share of the plainly genuine transactions of the later half of the training data from which the
      rule is learned, with all frauds and what the screener suspects. The deep model scores them.
    """

    budget: Annotated[float, msgspec.Meta(ge=0.0, le=1.0)] = 0.01
    genuine_share: Annotated[float, msgspec.Meta(gt=0.0, le=1.0)] = 0.1


class DeepSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A deep model, and how it is trained.

    - `hidden`: size of the recurrent state of each sequence.
    - `steps`: it reads so many last steps of each sequence at most.
    - `frequencies`: sines and cosines of each number of a step, and of its change from the step before; 0: none.
    """

    hidden: Annotated[int, msgspec.Meta(ge=1, le=4_096)] = 96
    steps: Annotated[int, msgspec.Meta(ge=1, le=4_096)] = 20
    frequencies: Annotated[int, msgspec.Meta(ge=0, le=64)] = 0
    dropout: Annotated[float, msgspec.Meta(ge=0.0, lt=1.0)] = 0.1
    epochs: Annotated[int, msgspec.Meta(ge=1, le=1_000)] = 8
    batch_rows: Annotated[int, msgspec.Meta(ge=1)] = 512
    learning_rate: Annotated[float, msgspec.Meta(gt=0.0)] = 4e-3
    weight_decay: Annotated[float, msgspec.Meta(ge=0.0)] = 1e-2


class LargeSettings(DeepSettings, frozen=True, forbid_unknown_fields=True):
    """The defaults of the size `large`: longer sequences, a wider state, and exact changes of amounts and times."""

    hidden: Annotated[int, msgspec.Meta(ge=1, le=4_096)] = 320
    steps: Annotated[int, msgspec.Meta(ge=1, le=4_096)] = 256
    frequencies: Annotated[int, msgspec.Meta(ge=0, le=64)] = 8
    epochs: Annotated[int, msgspec.Meta(ge=1, le=1_000)] = 4
    learning_rate: Annotated[float, msgspec.Meta(gt=0.0)] = 2e-3


class DeepSizes(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`[deep]`: the deep models, each of which makes a bundle.

    - `sizes`: which of them are trained.
    - `genuine_share`: share of the plainly genuine transactions that the training uses. Of those that the screener
      suspects it uses more, and from a probability of fraud of 2 % on all, as of the frauds. Each has the inverse of
      its chance as its weight, so that the probabilities stay right.
    """

    sizes: tuple[Size, ...] = ("small", "large")
    genuine_share: Annotated[float, msgspec.Meta(gt=0.0, le=1.0)] = 0.1
    small: DeepSettings = DeepSettings()
    large: LargeSettings = LargeSettings()

    def of(self, size: Size) -> DeepSettings:
        """The settings of a size."""
        return self.small if size == "small" else self.large


class TrainingFile(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A training file. The defaults are good; an empty file is complete."""

    data: DataSettings = DataSettings()
    escalation: EscalationSettings = EscalationSettings()
    costs: Costs = Costs()
    screener: SearchSettings = SearchSettings()
    deep: DeepSizes = DeepSizes()

    @property
    def warm_up_ms(self) -> int:
        """Length of the warm-up, ms."""
        return parse_ms(self.data.warm_up)

    @property
    def validation_ms(self) -> int | None:
        """Length of the validation part, ms; None: chosen by its frauds."""
        return None if self.data.validation == AUTO else parse_ms(self.data.validation)


def load_training_file(path: Path) -> TrainingFile:
    """Reads a training file. Raises SettingError with file, key, value and remedy."""
    settings = parse_settings(read_setting_file(path), TrainingFile, path, EXAMPLE)
    for key in ("warm_up", "validation"):
        text = getattr(settings.data, key)
        if key == "validation" and text == AUTO:
            continue
        try:
            parse_ms(text)
        except ValueError as error:
            raise SettingError(path, f"data.{key}", text, str(error), 'write "14d", "36h" or the like') from error
    if not settings.deep.sizes or len(set(settings.deep.sizes)) < len(settings.deep.sizes):
        sizes = list(settings.deep.sizes)
        raise SettingError(path, "deep.sizes", sizes, "none, or one twice", 'use ["small", "large"]')
    for name, direction in settings.screener.monotone.items():
        if direction not in DIRECTIONS:
            remedy = "use " + " or ".join(f'"{choice}"' for choice in DIRECTIONS)
            raise SettingError(path, f"screener.monotone.{name}", direction, "not one of the choices", remedy)
    return settings
