"""What comes of a peel, and of time passing: diagnosed, judged, told, and on disk with all that is owed for it."""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from peel_agent.config import RunSettings
from peel_agent.diagnose import diagnose, lineage
from peel_agent.errors import CheckpointError
from peel_agent.journal import Journal
from peel_agent.judge import judge, withdrawn
from peel_agent.ledger import RunLedger
from peel_agent.notify import standing, still_firing, tell, to_sinks
from peel_agent.publish import (
    alert_line,
    alert_tags,
    publication,
    report_from_json,
    report_line,
    series_of,
    to_those_that_show,
    to_trackers,
    worst_margin,
)
from peel_agent.records import (
    CheckpointRef,
    Debt,
    Level,
    Moment,
    Notice,
    Peeled,
    PeelReport,
    Publication,
    ReportObservation,
    RuleState,
    TickObservation,
    Verdict,
)


@dataclass(frozen=True)
class Finished:
    """A report that is final, its line of JSON, and the notices that came of it."""

    report: PeelReport
    line: str
    notices: tuple[Notice, ...]


class Judging:
    """The judge of one run.

    `sinks` names those that get notices now, with the seconds after which they are to be told again of all that fires,
    None for never; `owed` is called when they are owed any; the trackers of `showing` get pages. With `once` no
    checkpoint is awaited: that none comes, and how many wait, is then no alert.
    """

    def __init__(
        self,
        settings: RunSettings,
        ledger: RunLedger,
        sinks: Callable[[], Mapping[str, float | None]],
        journal: Journal,
        owed: Callable[[], None],
        *,
        showing: Sequence[str] = (),
        once: bool = False,
    ) -> None:
        self._settings = settings
        self._ledger = ledger
        self._sinks = sinks
        self._journal = journal
        self._owed = owed
        self._showing = tuple(showing)
        self._once = once
        self._resent: dict[str, float] = {}
        self._known: tuple[RuleState, ...] | None = None
        """The states as the ledger has them, which nobody else changes: a tick does not read thousands of rows."""
        self._worst_margin: float | None = None
        self._knows_worst_margin = False
        """Not before the first report since the start was judged, or the ledger was asked."""

    def finish(self, ref: CheckpointRef, peeled: Peeled, *, observed: bool, now: float) -> Finished:
        """Judged and made final in the ledger; what destinations get is owed by then.

        One that is not `observed` (it has no place in the order of the run) is kept, and changes no alert. Raises
        CheckpointError for numbers that cannot be judged, sqlite3.Error and OSError.
        """
        earlier = tuple(lineage(map(report_from_json, self._ledger.history()), ref.step)) if observed else ()
        states = self._states()
        loss = self._ledger.alerting.training_loss() if observed else ()
        charted = self._ledger.series()
        is_over = ref.step is None and self._ledger.alerting.observed(now).ended is not None
        try:
            report = diagnose(peeled.report, earlier)
            if observed:
                seen = ReportObservation(report, earlier, series_of(report), loss)
                states = judge(seen, self._settings.rules, states)
            verdict = self._told(states, self._moment(ref, report, now)) if observed else Verdict(states, ())
            report = dataclasses.replace(report, alerts=verdict.notices)
            sent = publication(
                report,
                verdict,
                committed_at=ref.committed_at,
                max_series=self._settings.tracker.max_series,
                charted=charted,
            )
            sent = dataclasses.replace(sent, training_ended=is_over)
        except Exception as error:  # it is pure: what fails once fails for ever, and must not hold up the next
            what = f"its numbers cannot be judged: {type(error).__name__}: {error}"
            raise CheckpointError(what, remedy="please report it") from error
        line = report_line(report)
        self._known = None
        self._ledger.record(
            ref,
            report=line,
            verdict=verdict,
            alert_lines=_alert_lines(verdict),
            memory=peeled.memory if observed else None,
            debts=self._debts(sent, verdict, ref.fingerprint, ref.committed_at),
            observed=observed,
            sketches=peeled.sketches,
            charted=sent.metrics,
        )
        self._known = verdict.states
        if observed:
            self._knows_worst_margin, self._worst_margin = True, worst_margin(report)
        return Finished(report, line, verdict.notices)

    def worst_margin(self) -> float | None:
        """The least margin of a block at the last checkpoint that was judged, in nats per token; None for no margin."""
        if not self._knows_worst_margin:
            history = self._ledger.history()
            self._worst_margin = worst_margin(report_from_json(history[-1])) if history else None
            self._knows_worst_margin = True
        return self._worst_margin

    def tick(self, now: float) -> None:
        """Time has passed: rules that go by the clock are judged, and what was held back until now is told."""
        states = self._states()
        after = judge(self._observed(now), self._settings.rules, states)
        moment = Moment(now, self._last_step())
        verdict = self._told(after, moment)
        self._keep(verdict, states, now, key=f"tick/{now:.3f}")
        self._tell_again(verdict, moment)

    def _tell_again(self, verdict: Verdict, moment: Moment) -> None:
        """To sinks that would otherwise take silence for an end."""
        rules, run = self._settings.rules, self._settings.name
        debts: list[Debt] = []
        for sink, seconds in self._sinks().items():
            if seconds is not None and not 0 <= moment.now - self._resent.get(sink, -seconds) < seconds:
                self._resent[sink] = moment.now
                debts += still_firing(standing(verdict.states, moment), sink, rules, run=run, at=moment.now)
        if debts:
            self._ledger.owe(debts)
            self._owed()

    def owe_past(self) -> None:
        """A tracker that is new here is owed what was peeled before it came. Raises sqlite3.Error."""
        last, states = self._ledger.last_peeled(), self._states()
        for name in self._settings.tracker.use if last is not None else ():
            assert last is not None
            now = Publication(last[0] or 0, round(last[1] * 1000), metrics={}, tags=alert_tags(states, {}))
            debts = to_trackers(now, [name], key=f"past/{name}", with_alerts=True)
            pages = to_those_that_show([name] if name in self._showing else [])
            series = self._settings.tracker.max_series
            count = self._ledger.owe_past(name, max_series=series, debts=(*debts, *pages))
            if count:
                words = f"{name} is new here: it gets the {count} checkpoints that were peeled before"
                self._journal.tell("started", words, run=self._settings.name)
                self._owed()

    def withdraw_all(self, reason: str, now: float) -> None:
        """Nothing of this run is watched any more: what was told firing is resolved, for this reason."""
        states = self._states()
        verdict = tell(withdrawn(states, reason), (), (), Moment(now, self._last_step()), run=self._settings.name)
        self._keep(verdict, states, now, key=f"withdrawn/{now:.3f}")

    def tell(self, notices: Sequence[Notice]) -> None:
        """Notices, in the log."""
        for notice in notices:
            level: Level = "warning" if notice.state == "firing" else "info"
            words = f"ALERT {notice.state}: {notice.text}"
            self._journal.tell("alert", words, run=self._settings.name, step=notice.step, level=level)

    def _states(self) -> tuple[RuleState, ...]:
        if self._known is None:
            self._known = self._ledger.rule_states()
        return self._known

    def _observed(self, now: float) -> TickObservation:
        troubles = self._journal.troubles_of(self._settings.name)
        observed = dataclasses.replace(self._ledger.alerting.observed(now), troubles=troubles)
        return dataclasses.replace(observed, last_checkpoint_at=None, waiting=None) if self._once else observed

    def _last_step(self) -> int | None:
        last = self._ledger.last_peeled()
        return None if last is None else last[0]

    def _moment(self, ref: CheckpointRef, report: PeelReport, now: float) -> Moment:
        probe = self._settings.probe.path
        command = ["peel-agent", "scan", ref.label, *([] if probe is None else ["--probe", str(probe)])]
        unchecked = tuple(f"{skipped.what} ({skipped.why})" for skipped in report.skipped)
        return Moment(now, ref.step, is_checkpoint=True, unchecked=unchecked, command=shlex.join(command))

    def _told(self, states: Sequence[RuleState], moment: Moment) -> Verdict:
        silences = self._ledger.alerting.silences(moment.now)
        return tell(states, self._settings.rules, silences, moment, run=self._settings.name)

    def _keep(self, verdict: Verdict, before: Sequence[RuleState], now: float, *, key: str) -> None:
        """What changed without a checkpoint; the trackers' tags follow."""
        if set(verdict.states) == set(before) and not verdict.notices:
            return
        were, are = alert_tags(before, {}), alert_tags(verdict.states, {})
        gone = dict.fromkeys(were.keys() - are.keys(), "inactive")
        tags = {tag: text for tag, text in (are | gone).items() if text != were.get(tag, "inactive")}
        last = self._ledger.last_peeled()
        step, committed_at = last if last is not None else (None, now)
        sent = Publication(step or 0, round(committed_at * 1000), metrics={}, tags=tags)
        self._known = None
        self._ledger.keep_verdict(verdict, _alert_lines(verdict), self._debts(sent, verdict, key, now))
        self._known = verdict.states
        self.tell(verdict.notices)
        self._owed()

    def _debts(self, sent: Publication, verdict: Verdict, key: str, at: float) -> tuple[Debt, ...]:
        """What trackers and sinks are owed."""
        notices, settings = verdict.notices, self._settings
        return (
            *to_trackers(sent, settings.tracker.use, key=key, with_alerts=bool(notices)),
            *to_those_that_show(self._showing if sent.files or notices else ()),
            *to_sinks(notices, tuple(self._sinks()), settings.rules, run=settings.name, at=at),
        )


def _alert_lines(verdict: Verdict) -> dict[str, str]:
    return {notice.id: alert_line(notice) for notice in verdict.notices}
