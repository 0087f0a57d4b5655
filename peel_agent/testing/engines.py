"""What every engine plug-in must do, as checks that raise AssertionError. Needs no test framework.

    @pytest.mark.parametrize("check", CHECKS)
    def test_conforms(check):
        check(lambda: PLUGIN.open(environment, PLUGIN.settings(...)), request)

`request` is for a checkpoint that takes seconds to peel, and each check opens an engine of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from peel_agent.errors import GaveWay, PeelError, TornCheckpoint
from peel_agent.records import Peeled, PeelReport, Request, Timing
from peel_agent.spi import Engine, Leasing

Open = Callable[[], Engine]

SECONDS = 600.0
"""How long an answer may take: a proof that it comes at all, on any machine."""


def answers_come_back(open_engine: Open, request: Request) -> None:
    """The numbers of one checkpoint are the same each time; one that changed under its name is torn, and no death."""
    engine = open_engine()
    try:
        first, second = (peeled(engine, request) for _ in range(2))
        _expect(first.report.checkpoint.fingerprint == request.ref.fingerprint, "the report is the checkpoint's", first)
        _expect(numbers(first) == numbers(second), "the same is computed again", second)
        torn = _error(engine, replace(request, ref=replace(request.ref, fingerprint="of another save")))
        _expect(type(torn) is TornCheckpoint, "a checkpoint that changed is torn", torn)
    finally:
        engine.close(SECONDS)


def work_gives_way(open_engine: Open, request: Request) -> None:
    """What is given up answers with the reason, and what is asked afterwards for the same checkpoint is not meant."""
    engine = open_engine()
    try:
        given_up = engine.submit(request)
        engine.give_way("of another save", "not meant")
        engine.give_way(request.ref.fingerprint, "somebody is on the GPU")
        error = given_up.exception(SECONDS)
        _expect(isinstance(error, GaveWay) and error.what == "somebody is on the GPU", "it gave way", error)
        _expect(isinstance(engine.submit(request).result(SECONDS), Peeled), "it is peeled afterwards", None)
    finally:
        engine.close(SECONDS)


def a_closed_engine_has_given_way(open_engine: Open, request: Request) -> None:
    """What runs when the engine is closed is not blamed for it, nor what is asked for afterwards."""
    engine = open_engine()
    running = engine.submit(request)
    engine.close(SECONDS)
    for answer in (running, engine.submit(request)):
        error = answer.exception(SECONDS)
        _expect(isinstance(error, GaveWay), "a closed engine gives way", error)


def places_are_bounded(open_engine: Open, _request: Request) -> None:
    """An engine that leases its own devices has some, each with another name, and has one again that is given back."""
    engine = open_engine()
    try:
        if not isinstance(engine, Leasing):
            return
        leases = []
        while (lease := engine.acquire()) is not None:
            leases.append(lease)
        _expect(len(leases) > 0, "there is a device", leases)
        _expect(len({lease.key for lease in leases}) == len(leases), "each is another one", leases)
        _expect(all(lease.elsewhere for lease in leases), "none is this machine's", leases)
        engine.release(leases[0])
        engine.release(leases[0])
        again = engine.acquire()
        _expect(again is not None and again.key == leases[0].key, "what is given back is there again", again)
        _expect(engine.acquire() is None, "it is there once", None)
    finally:
        engine.close(SECONDS)


CHECKS: tuple[Callable[[Open, Request], None], ...] = (
    answers_come_back,
    work_gives_way,
    a_closed_engine_has_given_way,
    places_are_bounded,
)


def peeled(engine: Engine, request: Request) -> Peeled:
    """The answer to a request."""
    return engine.submit(request).result(SECONDS)


def numbers(answer: Peeled) -> PeelReport:
    """The report without its times: what two computations of the same must have in common, bit for bit."""
    return replace(answer.report, timing=Timing())


def _error(engine: Engine, request: Request) -> PeelError:
    error = engine.submit(request).exception(SECONDS)
    _expect(isinstance(error, PeelError), "an error is one of peel_agent.errors", error)
    assert isinstance(error, PeelError)
    return error


def _expect(holds: bool, claim: str, seen: object) -> None:
    if not holds:
        raise AssertionError(f"{claim}; seen: {seen!r}")
