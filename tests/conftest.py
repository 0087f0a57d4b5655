"""Every test computes with one thread in its own process: on models this small, threads cost more than they give."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, settings

torch.set_num_threads(1)

# An example takes as long as it takes: by default more than 200 ms of a slow or busy machine would be a failure.
settings.register_profile("any machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("any machine")

LONG = (
    "test_low_bit",
    "test_broken_midway",
    "test_outages",
    "test_held_back_block",
    "test_watch",
    "test_demo",
    "test_hostile_folder",
    "test_setup_commands",
    "test_destination_at_start",
    "test_every_format",
    "test_writer_process",
    "test_every_tracker",
    "test_writer_schedules",
    "test_memory",
    "test_cuts",
)
"""Modules that take longest: processes share the work module by module, and a long one last would be waited for."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    def place(item: pytest.Item) -> int:
        path = Path(item.path)
        if path.stem in LONG:
            return LONG.index(path.stem)
        return len(LONG) + (path.parent.name != "runs")  # whole runs are longer than what remains

    items.sort(key=place)


@pytest.fixture(scope="session", autouse=True)
def commands_in_process_leave_it_as_it_is() -> Iterator[None]:
    """A command that a test runs in its own process would lower the priority and the memory of all tests after it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("peel_agent.cli.options.stay_second", lambda *_: None)
        yield


@pytest.fixture(scope="session", autouse=True)
def half_of_the_disk_is_free() -> Iterator[None]:
    """What the agent holds and copies depends on how much of the disk is free; what tests say of it must not.

    The agents that tests start as processes of their own are given a setting instead (tests/runs/command.py).
    """
    usage_of = shutil.disk_usage

    def half_free(path: Path) -> Any:
        usage = usage_of(path)
        return usage._replace(used=usage.total - usage.total // 2, free=usage.total // 2)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shutil, "disk_usage", half_free)
        yield


@pytest.fixture(autouse=True)
def gpus_are_seen_as_before() -> Iterator[None]:
    """A command that a test runs in its own process hides the GPUs from it, and so from all tests after it."""
    before = os.environ.get("CUDA_VISIBLE_DEVICES")
    yield
    if before is None:
        os.environ.pop("CUDA_VISIBLE_DEVICES", None)
    else:
        os.environ["CUDA_VISIBLE_DEVICES"] = before


@pytest.fixture(scope="module", autouse=True)
def environment_is_left_as_it_was() -> Iterator[None]:
    """mlflow.set_experiment, for one, leaves a variable that names the experiment to all modules after it."""
    before = dict(os.environ)
    yield
    for name in os.environ.keys() - before.keys():
        del os.environ[name]
    os.environ.update(before)


@pytest.fixture(scope="module", autouse=True)
def arithmetic_is_left_as_it_was() -> Iterator[None]:
    """No module leaves its process computing otherwise (numbers near 0 flushed, another number of threads, another
    default type): the modules after it would measure something else.
    """
    yield
    smallest = np.nextafter(np.float64(0), np.float64(1))
    assert smallest * np.float64(1) > 0, "torch.set_flush_denormal(True) was left behind"
    assert torch.get_num_threads() == 1
    assert torch.get_default_dtype() == torch.float32
    assert not torch.are_deterministic_algorithms_enabled()
    assert torch.is_grad_enabled()
