"""Weight sets: what values the matrices of a low-bit model may take."""

from __future__ import annotations

import re
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Literal

_NAME = re.compile(
    r"(?P<none>none)"
    r"|(?P<coarse>sign|ternary)(-(?P<unit>channel|matrix))?"
    r"|int(?P<bits>[2-8])-(?P<scaled>channel|matrix|g(?P<group>[1-9]\d*))(?P<affine>-affine)?"
    r"|(?P<fp8>fp8-e4m3|fp8-e5m2)"
)

SETS = (
    "none, sign, sign-matrix, ternary, ternary-channel, int4-channel, int4-g128, int4-g128-affine, fp8-e4m3, fp8-e5m2"
)
"""Examples of names, for messages; `int` takes 2 to 8 bits, and a group of any size that divides the width."""


@dataclass(frozen=True)
class WeightSet:
    """The values that a matrix [out, in] may take: a grid times a scale for each unit.

    `unit` is what shares a scale: an output `channel`, the whole `matrix`, or a `group` of consecutive inputs of one
    output channel, `group` of them. `affine` grids have a zero point. `name` is the form users write.
    """

    name: str
    kind: Literal["none", "sign", "ternary", "int", "fp8-e4m3", "fp8-e5m2"]
    unit: Literal["channel", "matrix", "group"] = "matrix"
    bits: int = 16
    group: int = 0
    affine: bool = False

    @property
    def restricts(self) -> bool:
        return self.kind != "none"

    @classmethod
    def named(cls, name: str) -> WeightSet:
        """The set of this name. ValueError for a name that none has."""
        match = _NAME.fullmatch(name)
        if match is None:
            raise ValueError(name)
        if match["none"]:
            return cls(name, "none")
        if match["fp8"]:
            return cls(name, "fp8-e4m3" if match["fp8"] == "fp8-e4m3" else "fp8-e5m2", bits=8)
        if match["coarse"]:
            kind: Literal["sign", "ternary"] = "sign" if match["coarse"] == "sign" else "ternary"
            default: Literal["channel", "matrix"] = "channel" if kind == "sign" else "matrix"
            unit = default if match["unit"] is None else "channel" if match["unit"] == "channel" else "matrix"
            return cls(name, kind, unit, bits=1 if kind == "sign" else 2)
        group, bits, affine = int(match["group"] or 0), int(match["bits"]), bool(match["affine"])
        return cls(name, "int", "group" if group else _plain_unit(match["scaled"]), bits, group, affine)


def _plain_unit(text: str) -> Literal["channel", "matrix"]:
    return "channel" if text == "channel" else "matrix"


FULL_PRECISION = WeightSet("none", "none")


def glob_fits(glob: str, weight: str) -> bool:
    """Whether a glob names a weight, or the module that has it: `*.mlp.gate_proj` its `.weight` too."""
    return fnmatchcase(weight, glob) or fnmatchcase(weight.removesuffix(".weight"), glob)
