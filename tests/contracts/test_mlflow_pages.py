"""What the MLflow tracker adds for people: images and pages, numbers of a logged model, and the end of its own run."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from peel_agent.errors import DestinationUnavailable
from peel_agent.records import Pages, Publication
from peel_agent.spi import Showing
from peel_agent.testing.trackers import example_publication
from peel_plugins.trackers.mlflow_run import MlflowTracker
from tests import servers
from tests.contracts.test_trackers import NOW, Run, trainers_run

mlflow_uri = servers.mlflow_uri

NAME = (
    r"(?P<key>[^+]+)\+step\+(?P<step>\d+)\+timestamp\+(?P<at>\d+)\+(?P<id>[\w-]+?)(?P<small>\+compressed)?\.(png|webp)"
)


@pytest.fixture
def run(mlflow_uri: str, tmp_path: Path, request: pytest.FixtureRequest) -> Run:
    return Run(mlflow_uri, request.node.name, tmp_path)


def pages(folder: Path, step: int, *, shade: int = 0, keep: bool = True) -> Pages:
    """A page and a heat map of one colour."""
    page, image = folder / "page.html", folder / "drawn.png"
    page.write_text(f"<p>{step}")
    Image.fromarray(np.full((300, 400, 3), shade, np.uint8)).save(image)
    files = {"peel/report.html": page, "peel/margins.png": image}
    return Pages(step, NOW + step, files, {"peel/margins": image}, keep=keep)


def shown(run: Run, sent: Pages) -> str:
    """The id of the run that they are shown in."""
    tracker = run.connect()
    assert isinstance(tracker, Showing)
    tracker.show(sent)
    tracker.close()
    return run.ids()[0]


def images(run: Run, run_id: str) -> dict[tuple[int, bool], str]:
    """The images of a run by step, and whether it is the small one."""
    path_by_image = {}
    for entry in run.client.list_artifacts(run_id, "images"):
        match = re.fullmatch(NAME, entry.path.removeprefix("images/"))
        assert match, entry.path
        key = (int(match["step"]), bool(match["small"]))
        assert (match["key"], key in path_by_image) == ("peel~margins", False)
        path_by_image[key] = entry.path
    return path_by_image


def shade(run: Run, run_id: str, path: str) -> int:
    with Image.open(run.client.download_artifacts(run_id, path, str(run.folder))) as image:
        return image.convert("RGB").getpixel((5, 5))[0]


# ---------------------------------------------------------------- pages and images


def test_images_lie_where_mlflow_puts_its_own(run: Run, tmp_path: Path) -> None:
    """The names are those of MLflow's own `log_image`, and the run has its mark: so its pages show a slider."""
    run_id = shown(run, pages(tmp_path, 100, shade=90))
    run.client.log_image(run_id, np.zeros((4, 4, 3), np.uint8), key="peel/margins", step=300, timestamp=NOW)
    path_by_image = images(run, run_id)
    assert set(path_by_image) == {(step, small) for step in (0, 100, 300) for small in (False, True)}
    assert run.client.get_run(run_id).data.tags["mlflow.loggedImages"] == "True"
    for step in (0, 100):
        assert shade(run, run_id, path_by_image[step, False]) == 90
        with Image.open(run.client.download_artifacts(run_id, path_by_image[step, True], str(tmp_path))) as small:
            assert (small.format, max(small.size)) == ("WEBP", 256)
    assert run.text(run_id, "peel/report.html") == "<p>100"


def test_the_same_again_changes_nothing_and_the_newest_is_first(run: Run, tmp_path: Path) -> None:
    """Sent twice, there is one image a step; a later page takes the first place, and an earlier one leaves it there."""
    shown(run, pages(tmp_path, 100, shade=10))
    run_id = shown(run, pages(tmp_path, 100, shade=10))
    assert set(images(run, run_id)) == {(step, small) for step in (0, 100) for small in (False, True)}
    shown(run, pages(tmp_path, 300, shade=30, keep=False))
    shown(run, pages(tmp_path, 200, shade=20))
    path_by_image = images(run, run_id)
    assert {step for step, _ in path_by_image} == {0, 100}, "300 was not to be kept, 200 came late"
    assert shade(run, run_id, path_by_image[0, False]) == 30
    assert run.text(run_id, "peel/report.html") == "<p>300"


def test_a_store_that_refuses_is_tried_again(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An artifact store that breaks off is a destination that is away, and what was begun is ended the next time."""

    def broken(*args: object) -> None:
        raise OSError("connection reset")

    tracker = run.connect()
    assert isinstance(tracker, Showing)
    with monkeypatch.context() as fault:
        fault.setattr(type(run.client), "log_artifact", broken)
        with pytest.raises(DestinationUnavailable, match="connection reset"):
            tracker.show(pages(tmp_path, 100))
    tracker.show(pages(tmp_path, 100))
    assert len(images(run, run.ids()[0])) == 4


# ---------------------------------------------------------------- logged models


def test_a_logged_model_of_the_step_gets_the_numbers(run: Run) -> None:
    """With `logged_models`, the model that the training made at this step has the metrics and tags, once; no other."""
    run_id = trainers_run(run)
    made = {step: run.client.create_logged_model(run.experiment(), source_run_id=run_id) for step in (100, 200)}
    mlflow_entities = servers.importlib.import_module("mlflow.entities")
    outputs = [mlflow_entities.LoggedModelOutput(model.model_id, step) for step, model in made.items()]
    run.client.log_outputs(run_id, models=outputs)
    sent = dataclasses.replace(example_publication(100), files={})
    for linked in (False, True, True):
        tracker = run.connect(run_id=run_id, logged_models=linked)
        tracker.publish(sent)
        tracker.publish(dataclasses.replace(example_publication(300), files={}))
        tracker.close()
    model = run.client.get_logged_model(made[100].model_id)
    assert {metric.key: (metric.value, metric.step) for metric in model.metrics} == {
        key: (value, 100) for key, value in sent.metrics.items()
    }
    assert len(model.metrics) == len(sent.metrics)
    assert sent.tags.items() <= model.tags.items()
    assert run.read_metrics(100) == {key: [value] for key, value in sent.metrics.items()}
    other = run.client.get_logged_model(made[200].model_id)
    assert not other.metrics
    assert not [tag for tag in other.tags if tag.startswith("peel")]


def test_a_model_that_was_deleted_holds_back_no_number(run: Run) -> None:
    """The run still names a model that is gone: the run's own numbers arrive as if there were none."""
    run_id = trainers_run(run)
    model = run.client.create_logged_model(run.experiment(), source_run_id=run_id)
    output = servers.importlib.import_module("mlflow.entities").LoggedModelOutput(model.model_id, 100)
    run.client.log_outputs(run_id, models=[output])
    run.client.delete_logged_model(model.model_id)
    run.connect(run_id=run_id, logged_models=True).publish(example_publication(100))
    assert run.read_metrics(100) == {key: [value] for key, value in example_publication(100).metrics.items()}


# ---------------------------------------------------------------- the end of the run


def over(step: int) -> Publication:
    """What is sent of a last export."""
    return Publication(0, NOW + step, {}, {}, training_ended=True)


@pytest.mark.parametrize(
    ("options", "sent", "status"),
    [
        pytest.param({}, [example_publication(100)], "RUNNING", id="it goes on"),
        pytest.param({}, [example_publication(100), over(101)], "FINISHED", id="a last export"),
        pytest.param({}, [example_publication(100), over(101), over(101)], "FINISHED", id="sent twice"),
        pytest.param(
            {}, [example_publication(100), over(101), example_publication(100)], "FINISHED", id="an earlier one late"
        ),
        pytest.param(
            {}, [example_publication(100), over(101), example_publication(200)], "RUNNING", id="training goes on"
        ),
        pytest.param({"end_run": True}, [example_publication(100)], "FINISHED", id="the user says so"),
        pytest.param(
            {"end_run": True}, [example_publication(100), example_publication(200)], "FINISHED", id="and again"
        ),
    ],
)
def test_a_run_of_our_own_ends_with_the_training(
    run: Run, options: dict[str, bool], sent: list[Publication], status: str
) -> None:
    """It is FINISHED when a last export was seen, or the user says so, and RUNNING again when more comes."""
    for publication in sent:
        tracker: MlflowTracker = run.connect(**options)  # type: ignore[arg-type, assignment]
        tracker.publish(publication)
        assert (tracker.training(()).ended is None) == (run.client.get_run(run.ids()[0]).info.status == "RUNNING")
        tracker.close()
    (run_id,) = run.ids()
    assert run.client.get_run(run_id).info.status == status


@pytest.mark.parametrize("status", ["RUNNING", "FAILED"])
def test_a_trainers_run_is_never_ended(run: Run, status: str) -> None:
    """Whatever is seen or said, the status and the end of a run that was not made here stay."""
    run_id = trainers_run(run)
    if status != "RUNNING":
        run.client.set_terminated(run_id, status)
    before = run.foreign(run_id)
    for sent in (example_publication(100), over(101), example_publication(200)):
        run.connect(run_id=run_id, end_run=True).publish(sent)  # type: ignore[arg-type]
    assert run.foreign(run_id) == before
