"""The engine of the settings, opened with its own table of the configuration."""

from __future__ import annotations

import dataclasses

from peel_agent import registry
from peel_agent.config import EngineSettings, plugin_settings, worker_environment
from peel_agent.errors import ConfigurationError
from peel_agent.spi import Engine


def opened(engine: EngineSettings) -> Engine:
    """The engine that is in use. Raises ConfigurationError for a table that nothing reads, and PluginError."""
    unused = set(engine.options) - {engine.use}
    if unused:
        raise ConfigurationError(
            f"[engine.{min(unused)}] is configured, and [engine] use is `{engine.use}`",
            remedy=f'write use = "{min(unused)}" under [engine], or take the table out',
        )
    plugin = registry.engine(engine.use)
    variables = {
        field.name: field.metadata["environment"]
        for field in dataclasses.fields(plugin.settings)
        if field.metadata.get("environment")
    }
    table = engine.options.get(engine.use, {})
    settings = plugin_settings(plugin.settings, f"engine.{engine.use}", table, from_environment=variables)
    return plugin.open(worker_environment, settings)
