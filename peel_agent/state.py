"""Where an agent of these settings keeps its state."""

from __future__ import annotations

from pathlib import Path

from peel_agent.config import Settings, default_state_dir, given_state_dir, state_dir_of_0_1
from peel_agent.destinations import pinned_run, tracker_settings
from peel_agent.errors import ConfigurationError
from peel_agent.ledger import FILE
from peel_agent.records import plain

NOT_IN_0_1 = frozenset({"experiment_id", "end_run", "logged_models"})
"""Settings of trackers that came later."""


def state_dir_of(settings: Settings, file: Path | None) -> Path:
    """The folder that is named, or the agent's own: by its configuration file when that names several runs, else by its
    one run. One that version 0.1 left under its own name is gone on with.
    """
    named = settings.state.path or given_state_dir()
    if named is not None:
        return named
    if file is not None and len(settings.runs) != 1:
        return default_state_dir([str(file.absolute())], file.absolute().stem)
    if not settings.runs:
        raise ConfigurationError(
            "it is not said which agent is meant",
            remedy="give its configuration (-c peel.toml), its state folder (--state DIR) or the directory it watches",
        )
    (run,) = settings.runs
    place, trackers = str(run.watch.path), tracker_settings(run.tracker, alone=True)
    state_dir = default_state_dir([place, run.name, pinned_run(trackers)], run.name)
    given = {
        name: {key: str(value) for key, value in plain(tracker).items() if value is not None and key not in NOT_IN_0_1}
        for name, tracker in trackers.items()
    }
    for name, options_given in given.items():  # version 0.1 took no experiment from the environment
        if "experiment" not in run.tracker.options.get(name, {}):
            options_given.pop("experiment", None)
    options = {name: texts for name, texts in given.items() if texts}
    earlier = state_dir_of_0_1(place, run.tracker.use, options)
    return earlier if not (state_dir / FILE).exists() and (earlier / FILE).exists() else state_dir
