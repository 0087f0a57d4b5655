"""The publish room's JSON form: the contract's `peel-agent/report/1`, there and back."""

from __future__ import annotations

import dataclasses
import json
from math import inf, nan
from types import MappingProxyType
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from peel_agent.publish import alert_line, report_from_json, report_json, report_line
from peel_agent.records import (
    BoundReport,
    Change,
    CheckpointInfo,
    Estimate,
    Finding,
    LayerReport,
    ModelInfo,
    Notice,
    PartReport,
    PeelReport,
    ProbeInfo,
    Skipped,
    Timing,
    WorstMatrix,
)

NOTICE = Notice(
    "92ab",
    "layer_below",
    "warning",
    "firing",
    "model.layers.0/attention",
    800,
    "the attention of model.layers.0 earns less — see",
    600,
    ("it does nothing yet",),
    ("margins of parts were not asked for",),
    "peel-agent status",
)

FULL = PeelReport(
    checkpoint=CheckpointInfo("run/checkpoint-800", 800, "transformers", "c0ffee"),
    model=ModelInfo("llama", 2, 1_200_000, "ternary", 32_000),
    probe=ProbeInfo("beef", 65_536, 8_192, 16_384, 128),
    loss=Estimate(1.67, 1.6, 1.7),
    bound=Estimate(1.5, 1.4, 1.6),
    gap=Estimate(0.17, 0.1, 0.2),
    zone="caution",
    bounds=(BoundReport("head", (1, 2), "closed_form", Estimate(1.6, 1.5, 1.7), 1.6, within_class=True),),
    layers=(
        LayerReport(
            index=0,
            name="model.layers.0",
            status="below",
            margin=Estimate(0.0, -0.0002, 0.0002),
            best_reference="skip",
            references=MappingProxyType({"skip": 0.0, "affine": 0.01}),
            parts={
                "attention": PartReport(
                    "below", Estimate(0.0, -0.1, 0.1), None, Change(2.0), None, "its output is zero: `w` is all zero"
                ),
                "mlp": PartReport("undecided", None, Estimate(0.2, 0.1, 0.3), None, Estimate(0.03, 0.02, 0.04)),
            },
            stream_share=0.3,
            headroom=Estimate(0.05, 0.04, 0.06),
            quantization_share=0.01,
            optimization_share=0.04,
            change=Change(1.5, WorstMatrix("mlp.down_proj.weight", 4.5)),
            progress=Estimate(-0.02, -0.03, -0.01),
            finding=Finding(
                "below",
                "model.layers.0/attention",
                "the attention of model.layers.0 earns less — see",
                {"margin": 0.0, "others_margin": 0.5},
                ("it does nothing yet",),
                500,
            ),
        ),
        LayerReport(1, "model.layers.1", "undecided", None, None, {}, {}, 0.1, hint="effort standard tells more"),
    ),
    skipped=(Skipped("affine of model.layers.1", "512 fit tokens; 1024 would be enough"),),
    timing=Timing(0.1, 0.2, 0.3, 0.4),
    redundancy=((0.1, 0.2), (0.3, 0.4)),
    bound_label="1-2",
    bound_step=700,
    since_step=600,
    finding=Finding("early", "run", "1 of 2 blocks earn no more than a cheap stand-in", {"below": 1.0}),
    alerts=(NOTICE,),
)

FORM = {
    "schema": "peel-agent/report/1",
    "checkpoint": {"path": "run/checkpoint-800", "step": 800, "format": "transformers", "fingerprint": "c0ffee"},
    "model": {"family": "llama", "blocks": 2, "parameters": 1_200_000, "precision": "ternary", "vocabulary": 32_000},
    "probe": {
        "fingerprint": "beef",
        "fit_tokens": 65_536,
        "select_tokens": 8_192,
        "confirm_tokens": 16_384,
        "sequence_length": 128,
    },
    "loss": {"value": 1.67, "low": 1.6, "high": 1.7},
    "bound": {"value": 1.5, "low": 1.4, "high": 1.6},
    "bound_label": "1-2",
    "bound_step": 700,
    "gap": {"value": 0.17, "low": 0.1, "high": 0.2},
    "zone": "caution",
    "bounds": [
        {
            "label": "head",
            "map": [1, 2],
            "solver": "closed_form",
            "value": {"value": 1.6, "low": 1.5, "high": 1.7},
            "best": 1.6,
            "within_class": True,
        }
    ],
    "layers": [
        {
            "index": 0,
            "name": "model.layers.0",
            "status": "below",
            "margin": {"value": 0.0, "low": -0.0002, "high": 0.0002},
            "best_reference": "skip",
            "references": {"skip": 0.0, "affine": 0.01},
            "parts": {
                "attention": {
                    "status": "below",
                    "margin": {"value": 0.0, "low": -0.1, "high": 0.1},
                    "headroom": None,
                    "change": {"ratio": 2.0, "worst": None},
                    "progress": None,
                    "dead": "its output is zero: `w` is all zero",
                    "cut": None,
                    "first": None,
                },
                "mlp": {
                    "status": "undecided",
                    "margin": None,
                    "headroom": {"value": 0.2, "low": 0.1, "high": 0.3},
                    "change": None,
                    "progress": {"value": 0.03, "low": 0.02, "high": 0.04},
                    "dead": None,
                    "cut": None,
                    "first": None,
                },
            },
            "stream_share": 0.3,
            "headroom": {"value": 0.05, "low": 0.04, "high": 0.06},
            "quantization_share": 0.01,
            "optimization_share": 0.04,
            "change": {"ratio": 1.5, "worst": {"name": "mlp.down_proj.weight", "ratio": 4.5}},
            "progress": {"value": -0.02, "low": -0.03, "high": -0.01},
            "finding": {
                "kind": "below",
                "subject": "model.layers.0/attention",
                "words": "the attention of model.layers.0 earns less — see",
                "evidence": {"margin": 0.0, "others_margin": 0.5},
                "causes": ["it does nothing yet"],
                "since_step": 500,
            },
            "hint": None,
            "cut": None,
            "first": None,
        },
        {
            "index": 1,
            "name": "model.layers.1",
            "status": "undecided",
            "margin": None,
            "best_reference": None,
            "references": {},
            "parts": {},
            "stream_share": 0.1,
            "headroom": None,
            "quantization_share": None,
            "optimization_share": None,
            "change": None,
            "progress": None,
            "finding": None,
            "hint": "effort standard tells more",
            "cut": None,
            "first": None,
        },
    ],
    "redundancy": [[0.1, 0.2], [0.3, 0.4]],
    "since_step": 600,
    "finding": {
        "kind": "early",
        "subject": "run",
        "words": "1 of 2 blocks earn no more than a cheap stand-in",
        "evidence": {"below": 1.0},
        "causes": [],
        "since_step": None,
    },
    "alerts": [
        {
            "id": "92ab",
            "rule": "layer_below",
            "severity": "warning",
            "state": "firing",
            "subject": "model.layers.0/attention",
            "step": 800,
            "text": "the attention of model.layers.0 earns less — see",
            "since_step": 600,
            "causes": ["it does nothing yet"],
            "unchecked": ["margins of parts were not asked for"],
            "command": "peel-agent status",
        }
    ],
    "skipped": [{"what": "affine of model.layers.1", "why": "512 fit tokens; 1024 would be enough"}],
    "timing": {"load": 0.1, "capture": 0.2, "solve": 0.3, "score": 0.4},
}

TEXTS = st.lists(st.text()).map(tuple)
NUMBERS = st.floats(allow_nan=False, allow_infinity=False)
ESTIMATES = st.builds(Estimate, NUMBERS, NUMBERS, NUMBERS)
CHANGES = st.builds(Change, NUMBERS, st.none() | st.builds(WorstMatrix, st.text(), NUMBERS))
FINDINGS = st.builds(
    Finding,
    evidence=st.dictionaries(st.text(), NUMBERS),
    causes=st.lists(st.text()).map(tuple),
    since_step=st.none() | st.integers(),
)
PARTS = st.builds(
    PartReport,
    st.sampled_from(("above", "below", "undecided", "not_measured")),
    *(st.none() | strategy for strategy in (ESTIMATES, ESTIMATES, CHANGES, ESTIMATES, st.text())),
)
REPORTS = st.builds(
    PeelReport,
    bounds=st.lists(
        st.builds(BoundReport, map=st.lists(st.integers(1, 99)).map(tuple), value=ESTIMATES, best=NUMBERS)
    ).map(tuple),
    layers=st.lists(
        st.builds(
            LayerReport,
            references=st.dictionaries(st.text(), NUMBERS),
            parts=st.dictionaries(st.sampled_from(("attention", "mlp")), PARTS),
            stream_share=NUMBERS,
            margin=st.none() | ESTIMATES,
            headroom=st.none() | ESTIMATES,
            quantization_share=st.none() | NUMBERS,
            optimization_share=st.none() | NUMBERS,
            change=st.none() | CHANGES,
            progress=st.none() | ESTIMATES,
            finding=st.none() | FINDINGS,
            hint=st.none() | st.text(),
        ),
        max_size=3,
    ).map(tuple),
    loss=ESTIMATES,
    bound=st.none() | ESTIMATES,
    gap=st.none() | ESTIMATES,
    timing=st.builds(Timing, NUMBERS, NUMBERS, NUMBERS, NUMBERS),
    redundancy=st.none() | st.lists(st.lists(NUMBERS).map(tuple)).map(tuple),
    skipped=st.lists(st.builds(Skipped)).map(tuple),
    bound_label=st.none() | st.text(),
    bound_step=st.none() | st.integers(),
    since_step=st.none() | st.integers(),
    finding=st.none() | FINDINGS,
    alerts=st.lists(st.builds(Notice, causes=TEXTS, unchecked=TEXTS, command=st.none() | st.text())).map(tuple),
    schema=st.just("peel-agent/report/1"),
)


def test_the_form_is_the_contracts() -> None:
    """A full report has exactly the names and nesting that CONTRACT.md fixes, `schema` first."""
    assert report_json(FULL) == FORM
    assert next(iter(report_json(FULL))) == "schema"


def test_a_line_is_one_line_of_the_same() -> None:
    """The line holds no newline, whatever the texts hold, and parses to the form."""
    torn = dataclasses.replace(FULL, skipped=(Skipped("two\nlines", "\r\u2028"),))
    assert len(report_line(torn).splitlines()) == 1
    assert json.loads(report_line(FULL)) == FORM


@given(REPORTS)
def test_a_report_survives_the_round_trip(report: PeelReport) -> None:
    """report_from_json undoes report_json, through text, for any report of finite numbers."""
    assert report_from_json(json.loads(report_line(report))) == report


@pytest.mark.parametrize("number", [nan, inf, -inf])
@pytest.mark.parametrize(
    "place", ["loss", "references", "redundancy", "timing", "change", "worst", "progress", "evidence"]
)
def test_no_nan_or_infinity_leaves(number: float, place: str) -> None:
    """A number that JSON does not have is refused wherever it hides."""

    def layer(**fields: Any) -> dict[str, Any]:
        return {"layers": (dataclasses.replace(FULL.layers[0], **fields),)}

    broken = {
        "loss": {"loss": Estimate(number, 0.0, 1.0)},
        "references": layer(references={"skip": number}),
        "change": layer(change=Change(number)),
        "worst": layer(change=Change(1.0, WorstMatrix("w", number))),
        "progress": layer(progress=Estimate(0.0, number, 1.0)),
        "evidence": {"finding": Finding("early", "run", "words", {"below": number})},
        "redundancy": {"redundancy": ((0.0, number),)},
        "timing": {"timing": Timing(load=number)},
    }[place]
    report = dataclasses.replace(FULL, **broken)
    with pytest.raises(ValueError, match="not JSON compliant"):
        report_json(report)
    with pytest.raises(ValueError, match="not JSON compliant"):
        report_line(report)


def test_another_schema_is_refused_by_name() -> None:
    """A report of a later schema is not read as if it were this one."""
    with pytest.raises(ValueError, match=r"peel-agent/report/2.*reads.*peel-agent/report/1"):
        report_from_json({**FORM, "schema": "peel-agent/report/2"})


def test_an_alert_is_one_json_line() -> None:
    """A notice's line holds its fields by their names."""
    assert json.loads(alert_line(NOTICE)) == FORM["alerts"][0]
    assert len(alert_line(dataclasses.replace(NOTICE, text="a\nb")).splitlines()) == 1
