"""What comes of a peel: diagnosed, judged, on disk with all that is owed for it, and told."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from peel_agent.config import RunSettings
from peel_agent.diagnose import lineage
from peel_agent.errors import CheckpointError
from peel_agent.journal import Journal
from peel_agent.judge import withdraw
from peel_agent.ledger import RunLedger
from peel_agent.pipeline import conclude
from peel_agent.publish import alert_line, report_from_json, report_line, to_sinks, to_trackers
from peel_agent.records import CheckpointRef, Debt, Level, Notice, Peeled, PeelReport, Publication, Verdict

RULE_GONE = "its rule was renamed or removed"


@dataclass(frozen=True)
class Finished:
    """A report that is final, its line of JSON, and the notices that came of it."""

    report: PeelReport
    line: str
    notices: tuple[Notice, ...]


class Judging:
    """The judge of one run. `sinks` names those that get notices now; `owed` is called when they are owed any."""

    def __init__(
        self,
        settings: RunSettings,
        ledger: RunLedger,
        sinks: Callable[[], Sequence[str]],
        journal: Journal,
        owed: Callable[[], None],
    ) -> None:
        self._settings = settings
        self._ledger = ledger
        self._sinks = sinks
        self._journal = journal
        self._owed = owed

    def finish(self, ref: CheckpointRef, peeled: Peeled, *, observed: bool) -> Finished:
        """Judged and made final in the ledger; what destinations get is owed by then.

        Raises CheckpointError for numbers that cannot be judged, sqlite3.Error and OSError.
        """
        history, states = self._ledger.history(), self._ledger.rule_states()
        try:
            report, verdict, sent = conclude(
                peeled.report,
                ref,
                observed=observed,
                history=lineage(map(report_from_json, history), ref.step),
                rules=self._settings.rules,
                states=states,
                max_series=self._settings.tracker.max_series,
            )
        except Exception as error:  # it is pure: what fails once fails for ever, and must not hold up the next
            what = f"its numbers cannot be judged: {type(error).__name__}: {error}"
            raise CheckpointError(what, remedy="please report it") from error
        line = report_line(report)
        self._ledger.record(
            ref,
            report=line,
            verdict=verdict,
            alert_lines=_alert_lines(verdict),
            memory=peeled.memory if observed else None,
            debts=self._debts(sent, verdict, ref.fingerprint),
            observed=observed,
            sketches=peeled.sketches,
        )
        return Finished(report, line, verdict.notices)

    def withdraw(self, rules: set[str], reason: str) -> None:
        """What these rules fire is resolved, for this reason; the trackers' tags follow."""
        if not rules:
            return
        states = self._ledger.rule_states()
        last = self._ledger.last_peeled()
        severities = {rule: self._ledger.severity(rule) for rule in rules}
        step, committed_at = last if last is not None else (None, 0.0)
        verdict = withdraw(states, dict.fromkeys(rules, reason), severities, step)
        firing = {state.rule for state in states if state.phase == "firing"} & rules
        tags = dict.fromkeys((f"peel.alert.{rule}" for rule in sorted(firing)), "inactive")
        sent = Publication(step or 0, round(committed_at * 1000), metrics={}, tags=tags)
        self._ledger.keep_verdict(verdict, _alert_lines(verdict), self._debts(sent, verdict, f"withdrawn/{step}"))
        self.tell(verdict.notices)
        self._owed()

    def tell(self, notices: Sequence[Notice]) -> None:
        """Notices, in the log."""
        for notice in notices:
            level: Level = "warning" if notice.state == "firing" else "info"
            words = f"ALERT {notice.state}: {notice.text}"
            self._journal.tell("alert", words, run=self._settings.name, step=notice.step, level=level)

    def _debts(self, sent: Publication, verdict: Verdict, key: str) -> tuple[Debt, ...]:
        """What trackers and sinks are owed."""
        notices = verdict.notices
        at = sent.timestamp_ms / 1000
        return (
            *to_trackers(sent, self._settings.tracker.use, key=key, with_alerts=bool(notices)),
            *to_sinks(notices, self._sinks(), run=self._settings.name, at=at),
        )


def _alert_lines(verdict: Verdict) -> dict[str, str]:
    return {notice.id: alert_line(notice) for notice in verdict.notices}
