"""config: settings from a file, the environment and flags. The only room that reads the environment."""

from peel_agent.config.environment import (
    default_state_dir,
    given_state_dir,
    see_only,
    service_manager,
    state_dir_of_0_1,
    variable_of,
    visible_gpus,
    worker_environment,
)
from peel_agent.config.reading import load_settings, plugin_settings, settings_from_tables
from peel_agent.config.sections import (
    DeviceSettings,
    EngineSettings,
    HealthSettings,
    LogSettings,
    RunSettings,
    Settings,
    SinkSettings,
    StateSettings,
    TrackerSettings,
    WatchSettings,
)

__all__ = [
    "DeviceSettings",
    "EngineSettings",
    "HealthSettings",
    "LogSettings",
    "RunSettings",
    "Settings",
    "SinkSettings",
    "StateSettings",
    "TrackerSettings",
    "WatchSettings",
    "default_state_dir",
    "given_state_dir",
    "load_settings",
    "plugin_settings",
    "see_only",
    "service_manager",
    "settings_from_tables",
    "state_dir_of_0_1",
    "variable_of",
    "visible_gpus",
    "worker_environment",
]
