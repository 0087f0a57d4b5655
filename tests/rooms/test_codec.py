"""One way from a record to JSON and back: what crosses a process or a file comes back as it was."""

from __future__ import annotations

import dataclasses
import json
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from peel_agent.courier import Orders
from peel_agent.publish import report_from_json
from peel_agent.records import (
    SCHEMA,
    Before,
    Best,
    BoundMemory,
    Change,
    CheckpointInfo,
    CheckpointRef,
    Debt,
    DeviceLease,
    Estimate,
    Event,
    FileStamp,
    Finding,
    LayerReport,
    Memory,
    ModelInfo,
    ModelSettings,
    Notice,
    NoticeGroup,
    PartReport,
    Peeled,
    PeelReport,
    PeelSettings,
    ProbeInfo,
    ProbeSettings,
    Publication,
    Request,
    RuleState,
    Sketches,
    Skipped,
    Timing,
    WeightSet,
    WorstMatrix,
    YesMemory,
    decoded,
    plain,
    restored,
)

RECORDS = (
    PeelReport,
    Peeled,
    Request,
    BoundMemory,
    YesMemory,
    CheckpointRef,
    Before,
    Publication,
    Sketches,
    Notice,
    RuleState,
    Finding,
    NoticeGroup,
    Debt,
    Event,
    Orders,
)
"""Every record that crosses a process (worker.py) or a file (the ledger, its reports, pins, alerts.jsonl)."""

ONE = Estimate(1.0, 0.9, 1.1)
PATHS = st.lists(st.text("ab .ß日", min_size=1), min_size=1, max_size=3).map(lambda names: Path(*names))
ATOMS: dict[Any, st.SearchStrategy[Any]] = {
    str: st.text(max_size=8),
    int: st.integers(),
    float: st.floats(allow_nan=False, allow_infinity=False),
    bool: st.booleans(),
    type(None): st.none(),
    Path: PATHS,
    Any: st.one_of(st.none(), st.booleans(), st.integers(), st.text(max_size=8), st.lists(st.text(max_size=8))),
}


def values(hint: Any) -> st.SearchStrategy[Any]:
    """Values of a type annotation, records with every field drawn: none keeps its default by chance of the test."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint in ATOMS:
        return ATOMS[hint]
    if dataclasses.is_dataclass(hint):
        hints = typing.get_type_hints(hint)
        return st.builds(hint, **{field.name: values(hints[field.name]) for field in dataclasses.fields(hint)})
    if origin is typing.Literal:
        return st.sampled_from(arguments)
    if origin in (typing.Union, types.UnionType):
        return st.one_of(*map(values, arguments))
    if origin is tuple and arguments[1:] == (...,):
        return st.lists(values(arguments[0]), max_size=2).map(tuple)
    if origin is tuple:
        return st.tuples(*map(values, arguments))
    assert isinstance(origin, type), hint
    assert issubclass(origin, Mapping), hint
    return st.dictionaries(values(arguments[0]), values(arguments[1]), max_size=2)


def through_json(record: Any) -> Any:
    """Its plain form as another process reads it."""
    return json.loads(json.dumps(plain(record), allow_nan=False))


@pytest.mark.parametrize("kind", RECORDS, ids=lambda kind: kind.__name__)
@settings(max_examples=40, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_records_come_back_as_they_were(kind: type, data: st.DataObject) -> None:
    """plain, JSON and restored give a record that is equal, of the same types all the way down."""
    record = data.draw(values(kind))
    again = restored(kind, through_json(record))
    assert again == record
    assert typed(again) == typed(record)


def typed(value: Any) -> Any:
    """The types of a value and of everything in it."""
    if dataclasses.is_dataclass(value):
        return type(value), [typed(getattr(value, field.name)) for field in dataclasses.fields(value)]
    if isinstance(value, Mapping):
        return dict, [(key, typed(entry)) for key, entry in value.items()]
    if isinstance(value, tuple):
        return tuple, [typed(entry) for entry in value]
    return Path if isinstance(value, Path) else type(value)


FULL = PeelReport(
    checkpoint=CheckpointInfo("run/checkpoint-800", 800, "transformers", "c0ffee"),
    model=ModelInfo("llama", 1, 1000, "full"),
    probe=ProbeInfo("beef", 100, 10, 10, 10),
    loss=ONE,
    bound=ONE,
    gap=None,
    zone="caution",
    bounds=(),
    layers=(
        LayerReport(
            index=0,
            name="model.layers.0",
            status="below",
            margin=ONE,
            best_reference="skip",
            references={"skip": 0.5},
            parts={
                "attention": PartReport("above", ONE, None, Change(0.0), ONE),
                "mlp": PartReport("below", None, ONE, None, None, "its output is zero: `mlp.down_proj.weight`"),
            },
            stream_share=0.5,
            change=Change(3.5, WorstMatrix("mlp.down_proj.weight", 7.25)),
            progress=Estimate(-0.1, -0.2, -0.05),
            finding=Finding(
                "changed", "model.layers.0/mlp", "the MLP changed — see", {"change": 3.5}, ("a script", "a merge"), 700
            ),
        ),
    ),
    skipped=(Skipped("progress of parts", "too dear"),),
    timing=Timing(0.1),
    redundancy=((0.0, 0.25), (0.0, 0.0)),
    since_step=700,
    finding=Finding("collapsed", "run", "1 of 1 blocks", {"below": 1.0}),
    alerts=(
        Notice("92ab", "r", "critical", "firing", "model.layers.0/mlp", 800, "text", 700, ("a script",)),
        Notice("92ac", "r", "info", "resolved", "model.layers.0", None, "text"),
    ),
)
FILES = (FileStamp("model.safetensors", 2**40, 1_700_000_000_123_456_789, 2**63),)
REF = CheckpointRef(Path("/run/checkpoint-800"), 800, "dcp", "c0ffee", 12.5, FILES, Path("/held/c"), "s3://b/run")


def test_findings_changes_and_alerts_survive() -> None:
    """A report with everything new in it, and what comes with it from the worker, is the same afterwards."""
    sketches = Sketches({"model.layers.0.w": "AACAPw=="}, {"model.layers.0.w": (64, 32)}, "bfloat16")
    for memory in (
        None,
        BoundMemory("p", 1.5, (1.0, 2.0), {"head": 1.5}),
        YesMemory("p", "(4, 3) biased full", (Best((), 1.0, (1.0,), True), Best((1, 3), 0.5, (0.25,), False))),
    ):
        peeled = Peeled(FULL, memory, sketches)
        again = restored(Peeled, through_json(peeled))
        assert again == peeled
        assert type(again.memory) is type(memory)
        assert memory is None or decoded(Memory, through_json(memory)) == memory


def test_what_the_worker_is_asked_comes_back() -> None:
    """Paths are paths again, maps tuples of tuples or a suite's name, weight sets weight sets, what is held of the
    checkpoint before a reference.
    """
    request = Request(
        ref=REF,
        probe=ProbeSettings(Path("/probe/held out.npy"), None, 128),
        peel=PeelSettings("full", ("margin", "bounds"), ((1, 4), (2, 4)), time_budget_seconds=1.5),
        model=ModelSettings("own:factory", {"*.weight": WeightSet.named("int4-g128-affine")}),
        lease=DeviceLease("cuda:0", "GPU-1b2c", "GPU 0 (NVIDIA H100)", "nobody uses it"),
        nice=10,
        earlier=BoundMemory("p", 1.5, (1.0, 2.0), {"head": 1.5}),
        before=Before(700, dataclasses.replace(REF, step=700), Sketches({}, {}, "float16")),
        keep_sketches=True,
        patch=Path("/patch.safetensors"),
        memory_fraction=0.25,
    )
    named = dataclasses.replace(request, peel=PeelSettings(maps="ends"), before=Before(why_not="it is the first"))
    for one in (request, named, dataclasses.replace(request, before=None, earlier=None, patch=None)):
        again = restored(Request, through_json(one))
        assert again == one
        assert typed(again) == typed(one)


OLD = {
    "schema": SCHEMA,
    "checkpoint": {"path": "run/checkpoint-800", "step": 800, "format": "transformers", "fingerprint": "c0ffee"},
    "model": {"family": "llama", "blocks": 1, "parameters": 1000, "precision": "full"},
    "probe": {
        "fingerprint": "beef",
        "fit_tokens": 100,
        "select_tokens": 10,
        "confirm_tokens": 10,
        "sequence_length": 10,
    },
    "loss": {"value": 1.0, "low": 0.9, "high": 1.1},
    "bound": None,
    "gap": None,
    "zone": "undecided",
    "bounds": [
        {
            "label": "head",
            "map": [1, 2],
            "solver": "closed_form",
            "value": {"value": 1.0, "low": 0.9, "high": 1.1},
            "best": 1.0,
            "within_class": True,
        }
    ],
    "layers": [
        {
            "index": 0,
            "name": "model.layers.0",
            "status": "below",
            "margin": {"value": 1.0, "low": 0.9, "high": 1.1},
            "best_reference": "skip",
            "references": {"skip": 0.5},
            "parts": {
                "attention": {
                    "status": "below",
                    "margin": {"value": 1.0, "low": 0.9, "high": 1.1},
                    "headroom": None,
                },
            },
            "stream_share": 0.5,
            "headroom": None,
            "quantization_share": None,
            "optimization_share": None,
        }
    ],
    "skipped": [{"what": "progress", "why": "none"}],
    "timing": {"load": 0.1, "capture": 0.0, "solve": 0.0, "score": 0.0},
    "redundancy": [[0.0]],
    "alerts": [
        {
            "id": "92ab",
            "rule": "layer_below",
            "severity": "warning",
            "state": "firing",
            "layer": "model.layers.0",
            "step": 800,
            "text": "model.layers.0 earns less",
        }
    ],
}
"""A report as the version before wrote it, word for word."""


def test_a_report_of_the_version_before_reads() -> None:
    """What it did not know yet has its default; an alert's `layer` is the subject."""
    report = report_from_json(OLD)
    (layer,) = report.layers
    assert (layer.change, layer.progress, layer.finding) == (None, None, None)
    assert layer.parts == {"attention": PartReport("below", ONE)}
    assert (layer.status, layer.margin, layer.references) == ("below", ONE, {"skip": 0.5})
    assert (report.since_step, report.finding) == (None, None)
    assert report.alerts == (
        Notice(
            "92ab", "layer_below", "warning", "firing", "model.layers.0", 800, "model.layers.0 earns less", None, ()
        ),
    )
    assert report.redundancy == ((0.0,),)
    assert report.bounds[0].map == (1, 2)


def test_a_checkpoint_held_by_the_version_before_reads() -> None:
    """A pin's note without the keys that came later is a reference."""
    form = {key: value for key, value in through_json(REF).items() if key not in ("files", "held", "url")}
    assert restored(CheckpointRef, form) == dataclasses.replace(REF, files=(), held=None, url=None)


def everywhere(form: Any, kind: Any) -> Any:
    """The form with a key that no version knows in every record of it; the keys of a mapping are data."""
    hints = typing.get_type_hints(kind) if dataclasses.is_dataclass(kind) else {}
    if hints:
        known = {name: everywhere(entry, hints[name]) for name, entry in form.items()} if form is not None else None
        return known if known is None else {**known, "colour": "green"}
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if form is None or not arguments:
        return form
    if origin in (typing.Union, types.UnionType):
        fitting = [one for one in arguments if dataclasses.is_dataclass(one) and set(form) <= set(fields_of(one))]
        return everywhere(form, fitting[0]) if fitting else form
    if origin is tuple:
        return [everywhere(entry, arguments[0]) for entry in form]
    if isinstance(form, dict):
        return {key: everywhere(entry, arguments[1]) for key, entry in form.items()}
    return form


def fields_of(kind: Any) -> list[str]:
    return [field.name for field in dataclasses.fields(kind)]


@pytest.mark.parametrize(
    "record",
    [
        Peeled(FULL, YesMemory("p", "n", (Best((1,), 0.5, (0.25,), False),)), Sketches({}, {}, "float16")),
        Peeled(FULL, BoundMemory("p", 1.5, (1.0, 2.0), {"head": 1.5})),
        REF,
        Publication(5, 12_500, {"peel/loss": 1.5}, {"peel.zone": "caution"}, {"peel/alerts.jsonl": "x\n"}),
    ],
    ids=lambda record: type(record).__name__,
)
def test_keys_of_a_later_version_are_passed_over(record: Any) -> None:
    """A key that this version does not know, in any record at any depth, changes nothing that it does know."""
    form = everywhere(through_json(record), type(record))
    assert json.dumps(form).count('"colour"') > 0
    assert "colour" in form
    assert restored(type(record), form) == record


def test_what_is_a_mapping_keeps_all_of_its_keys() -> None:
    """Only a record's keys are names of fields: those of metrics, references and sketches are data."""
    sent = Publication(5, 1, {"step": 1.0, "colour": 2.0}, {"tags": "x"}, {})
    assert restored(Publication, through_json(sent)) == sent


@pytest.mark.parametrize("kind", RECORDS, ids=lambda kind: kind.__name__)
@settings(max_examples=5, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_a_missing_key_without_default_is_a_type_error(kind: type, data: st.DataObject) -> None:
    """Each field that has no default is asked for by name; each that has one gets it."""
    record = data.draw(values(kind))
    form = through_json(record)
    for field in dataclasses.fields(kind):
        without = {key: value for key, value in form.items() if key != field.name}
        if field.default is not dataclasses.MISSING:
            assert getattr(restored(kind, without), field.name) == field.default
        elif field.default_factory is not dataclasses.MISSING:
            assert getattr(restored(kind, without), field.name) == field.default_factory()
        else:
            with pytest.raises(TypeError, match=rf"'{field.name}'"):
                restored(kind, without)


def test_a_missing_key_deep_inside_is_a_type_error_too() -> None:
    """A layer without its index is no layer."""
    form = through_json(FULL)
    del form["layers"][0]["index"]
    with pytest.raises(TypeError, match="'index'"):
        restored(PeelReport, form)


def test_sets_are_lists_in_order() -> None:
    """A set's plain form is the same at every run, and comes back as a set."""
    form = plain({"quantities": frozenset({"margin", "bounds", "headroom"})})
    assert form == {"quantities": ["bounds", "headroom", "margin"]}
    assert decoded(frozenset[str], form["quantities"]) == frozenset({"margin", "bounds", "headroom"})
