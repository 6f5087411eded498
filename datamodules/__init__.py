"""The data pipeline: from raw preference data to this rank's share of an optimizer batch."""

from datamodules.controlled import ControlledTask
from datamodules.preference_data import PreferenceData

__all__ = ["ControlledTask", "PreferenceData"]
