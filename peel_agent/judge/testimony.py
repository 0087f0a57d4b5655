"""What an observation says about one subject of one rule."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from peel_agent.records import Rule

Speaks = Literal["for", "against", "neither"]


@dataclass(frozen=True)
class Testimony:
    """What an observation says about one subject: for the alert, against it, or neither, and the evidence in words.

    One that is `plain` needs no second checkpoint, unless the rule asks for it; one that is `counted` has looked at
    several already.
    """

    speaks: Speaks
    words: str = ""
    plain: bool = False
    causes: tuple[str, ...] = ()
    counted: bool = False


SILENCE = Testimony("neither")

Kind = Callable[[Any, Rule], Mapping[str, Testimony]]
"""Reads an observation for a rule: testimony by subject."""
