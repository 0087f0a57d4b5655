"""Which places of one sink have the group that is being sent: a place that has it does not get it again."""

from __future__ import annotations


class Taken:
    """Of the last group alone: a lane sends the next one only when this one is done with."""

    def __init__(self) -> None:
        self._group = ""
        self._places: set[str] = set()

    def lack(self, group: str, places: tuple[str, ...]) -> tuple[str, ...]:
        """Those of the places that do not have this group yet."""
        if group != self._group:
            self._group, self._places = group, set()
        return tuple(place for place in places if place not in self._places)

    def add(self, place: str) -> None:
        self._places.add(place)
