"""config: settings from a file, the environment and flags. The only room that reads the environment."""

from peel_agent.config.environment import default_state_dir, worker_environment
from peel_agent.config.reading import load_settings
from peel_agent.config.sections import (
    DeviceSettings,
    ModelSettings,
    PeelSettings,
    ProbeSettings,
    Settings,
    StateSettings,
    TrackerSettings,
    WatchSettings,
)

__all__ = [
    "DeviceSettings",
    "ModelSettings",
    "PeelSettings",
    "ProbeSettings",
    "Settings",
    "StateSettings",
    "TrackerSettings",
    "WatchSettings",
    "default_state_dir",
    "load_settings",
    "worker_environment",
]
