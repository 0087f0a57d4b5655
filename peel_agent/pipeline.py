"""One checkpoint through every room; the only module that knows the order.

`measure` needs torch and runs where the numbers are computed. `locate` runs in the parent, which needs
neither torch nor a tracker's library.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from peel_agent import registry
from peel_agent.before import check_earlier, open_before, still_whole, without_comparison
from peel_agent.diagnose import diagnose
from peel_agent.errors import (
    CheckpointError,
    IncompleteCheckpoint,
    TornCheckpoint,
    WorkerError,
    printable,
)
from peel_agent.feedforward import measure_network, network_of
from peel_agent.probing import probe_for
from peel_agent.records import (
    Before,
    BoundMemory,
    CheckpointInfo,
    CheckpointRef,
    Findings,
    Helpers,
    LocalListing,
    Memory,
    ModelInfo,
    ModelSettings,
    Peeled,
    PeelReport,
    PeelSettings,
    Plan,
    Probe,
    ProbeInfo,
    ProbeSettings,
    Progress,
    Skipped,
    Snapshot,
    Weights,
)
from peel_agent.spi import Format
from peel_agent.watch import USUAL, Reserve, checkpoint_ref, fetch, fingerprint, inspected, is_url


def locate(path: Path, format_name: str = "auto") -> CheckpointRef:
    """The checkpoint at `path`, whole at this moment; CheckpointError says why not."""
    path = path.absolute() if path.name else path.resolve()  # `.` has no name of its own
    if not path.exists():
        raise CheckpointError(f"no checkpoint at {path}", remedy="give the path of a checkpoint directory or file")
    listing = LocalListing(path)
    formats = registry.formats(format_name)
    answer = registry.claims(listing, formats)
    if answer.winner is not None:
        form, _ = answer.winner
        readiness = inspected(listing, form)
        if readiness.state == "complete":
            return checkpoint_ref(path, form.name, readiness, form.step(listing))
        if readiness.state == "damaged":
            remedy = readiness.remedy or "take another checkpoint"
            raise CheckpointError(f"{path} cannot be used: {readiness.reason}", remedy=remedy)
        raise IncompleteCheckpoint(
            f"{path} is {readiness.state}: {readiness.reason}",
            remedy=readiness.remedy or "wait until it is written, or take another checkpoint",
        )
    if answer.failure is not None:
        raise answer.failure
    raise CheckpointError(
        f"{path} is no checkpoint of a known format{_what_it_holds(listing, formats)}",
        remedy="give one checkpoint (a checkpoint-N or save_pretrained folder, a .safetensors or .pt file); "
        "for a folder of checkpoints use `peel-agent watch --once`",
    )


def _what_it_holds(listing: LocalListing, formats: Sequence[Format]) -> str:
    """The checkpoints in a folder that is none itself, or else what is in it."""
    names = sorted(listing.names())
    inside = [name for name in names if registry.claimed(listing.folder(name), formats) is not None]
    if inside:
        return printable(f"; there are checkpoints in it ({', '.join(inside[:3])}{', ...' if len(inside) > 3 else ''})")
    return printable(f"; it holds {', '.join(names[:5])}{', ...' if len(names) > 5 else ''}") if names else ""


def measure(
    ref: CheckpointRef,
    *,
    probe: ProbeSettings,
    peeling: PeelSettings,
    model: ModelSettings,
    device: str,
    clock: Callable[[], float],
    patch: Path | None = None,
    earlier: Memory | None = None,
    before: Before | None = None,
    keep_sketches: bool = False,
    require_before: bool = False,
    tokens: Probe | None = None,
    progress: Progress | None = None,
    helpers: Helpers | None = None,
) -> Peeled:
    """Loads and peels one checkpoint on `device` ("cpu", "cuda:0"); `earlier` are the best bounds so far.

    It is held against the checkpoint `before`; what cannot be compared is said in the report, or raised when that is
    required. With `keep_sketches` the next one can be held against it when its files are gone. A `patch` of
    safetensors replaces weights of the same names. Without `tokens` the `probe` is read as suits this model; given, the
    answer has the losses on each sequence too. `helpers` compute pieces of it elsewhere; the numbers are the same.

    Raises CheckpointError, ConfigurationError (a probe or a map that does not suit the model), and TornCheckpoint when
    the files changed while they were read.
    """
    (form,) = registry.formats(ref.format)
    with reading(ref):
        weights = form.open(ref.in_place())
        network = network_of(weights) if model.factory is None else None
        if network is not None:
            family, stack = network
            peeled = measure_network(
                ref, weights, family=family, stack=stack, probe=probe, clock=clock, earlier=earlier
            )
            if require_before:
                peeled = dataclasses.replace(
                    peeled, report=without_comparison(peeled.report, "a fully connected network has no blocks")
                )
        else:
            peeled = _measure_decoder(
                ref,
                form,
                weights,
                probe=probe,
                peeling=peeling,
                model=model,
                device=device,
                clock=clock,
                patch=patch,
                earlier=earlier,
                compared=_Compared(before, keep_sketches, require_before),
                tokens=tokens,
                progress=progress,
                helpers=helpers,
            )
    check_unchanged(ref, form)
    return with_what_was_beside(peeled, ref.beside)


@contextmanager
def reading(ref: CheckpointRef) -> Iterator[None]:
    """Says of files that vanish meanwhile, and of memory that runs out, what to do."""
    try:
        yield
    except FileNotFoundError as error:
        if not str(error.filename).startswith(str(ref.in_place().path.parent)):
            raise
        raise _torn(ref, f"{error.filename} vanished while it was read") from error
    except (RuntimeError, MemoryError) as error:
        if (full := _out_of_memory(error)) is None:
            raise
        raise full from error


def with_what_was_beside(peeled: Peeled, beside: str) -> Peeled:
    """The same, with what was in the checkpoint and is not read among what was skipped."""
    if not beside:
        return peeled
    skipped = (*peeled.report.skipped, Skipped("other weights in the folder", beside))
    return dataclasses.replace(peeled, report=dataclasses.replace(peeled.report, skipped=skipped))


def _out_of_memory(error: Exception) -> WorkerError | None:
    """What to raise for an error that says that memory ran out."""
    from peel_agent.peel import out_of_memory

    if not out_of_memory(error):
        return None
    return WorkerError(
        f"memory ran out: {error}",
        remedy="raise [device] memory_fraction, name a smaller [probe], or peel on a larger machine",
    )


def _measure_decoder(
    ref: CheckpointRef,
    form: Format,
    weights: Weights,
    *,
    probe: ProbeSettings,
    peeling: PeelSettings,
    model: ModelSettings,
    device: str,
    clock: Callable[[], float],
    patch: Path | None,
    earlier: Memory | None,
    compared: _Compared,
    tokens: Probe | None,
    progress: Progress | None,
    helpers: Helpers | None,
) -> Peeled:
    from peel_agent.capture import open_trace, settled
    from peel_agent.load import open_snapshot
    from peel_agent.peel import ALONE, peel
    from peel_agent.precision import float32_products

    start = clock()
    sets, factory = model.precision, model.factory
    snapshot = open_snapshot(
        ref.in_place(), form, registry.family, sets=sets, patch=patch, factory=factory, stored=weights
    )
    is_given = tokens is not None
    tokens = tokens or probe_for(snapshot, probe, quick=peeling.effort == "quick")
    trace = open_trace(snapshot, tokens, device=device)
    opened = open_before(
        compared.before, trace, model=model, keep_sketches=compared.keep_sketches, required=compared.required
    )
    loaded = clock()
    known = earlier if isinstance(earlier, BoundMemory) else None
    with float32_products(trace.device):
        findings = peel(
            trace,
            plan_of(peeling),
            settled(clock, trace.device),
            earlier=known,
            progress=progress,
            comparison=opened.comparison,
            step=ref.step,
            helpers=helpers or ALONE,
        )
    is_compared = opened.comparison is not None and opened.comparison.stands
    report = dataclasses.replace(
        _report_of(ref, _model_info(snapshot, len(trace.block_names)), tokens, findings),
        skipped=(*tokens.left_out, *findings.skipped, *opened.skipped),
        timing=dataclasses.replace(findings.timing, load=loaded - start),
        since_step=compared.before.step if compared.before is not None and is_compared else None,
    )
    if compared.before is not None and compared.before.ref is not None and not still_whole(compared.before.ref):
        report = without_comparison(report, "the files of the checkpoint before changed while they were read")
    return Peeled(report, findings.memory, findings.sketches, findings.losses if is_given else None)


def _model_info(snapshot: Snapshot, depth: int) -> ModelInfo:
    return ModelInfo(snapshot.family, depth, snapshot.parameters, snapshot.precision, snapshot.vocabulary)


def _report_of(ref: CheckpointRef, model: ModelInfo, tokens: Probe, findings: Findings) -> PeelReport:
    """What was found, and of what."""
    return PeelReport(
        checkpoint=CheckpointInfo(ref.label, ref.step, ref.format, ref.fingerprint),
        model=model,
        probe=ProbeInfo(
            tokens.fingerprint, tokens.fit.size, tokens.select.size, tokens.confirm.size, tokens.sequence_length
        ),
        loss=findings.loss,
        bound=findings.bound,
        gap=findings.gap,
        zone=findings.zone,
        bounds=findings.bounds,
        layers=findings.layers,
        redundancy=findings.redundancy,
        bound_label=findings.bound_label,
        bound_step=findings.bound_step,
        skipped=findings.skipped,
        timing=findings.timing,
    )


@dataclass(frozen=True)
class _Compared:
    """What a checkpoint is held against, and how."""

    before: Before | None
    keep_sketches: bool
    required: bool


def plan_of(peeling: PeelSettings) -> Plan:
    """What the settings ask for: `quick` is margins of blocks from `skip` and `affine`; `quantities` overrides."""
    quick = peeling.effort == "quick"
    return Plan(
        quantities=frozenset(peeling.computed),
        references=("skip", "affine") if quick else ("skip", "affine", "previous"),
        maps=peeling.maps,
        solver=peeling.solver,
        parts=not quick,
        few_sequences=quick,
        seconds=peeling.time_budget_seconds,
        passes=peeling.budget_passes or None,
    )


def scan(
    path: str | Path,
    *,
    probe: ProbeSettings,
    peeling: PeelSettings,
    model: ModelSettings | None = None,
    device: str = "cpu",
    format_name: str = "auto",
    since: str | Path | None = None,
    reserve: Reserve = USUAL,
    clock: Callable[[], float],
    progress: Progress | None = None,
) -> PeelReport:
    """One checkpoint located, measured and diagnosed in this process; held against the one `since`, if it is given.

    What is fetched of an object store leaves the `reserve` free. Raises NotEarlier and OtherArchitecture for a `since`
    that it cannot be held against.
    """
    with ExitStack() as places:
        ref = places.enter_context(located(path, format_name, reserve))
        before = None
        if since is not None:
            earlier = places.enter_context(located(since, format_name, reserve))
            check_earlier(earlier, ref)
            before = Before(earlier.step, earlier)
        peeled = measure(
            ref,
            probe=probe,
            peeling=peeling,
            model=model or ModelSettings(),
            device=device,
            clock=clock,
            before=before,
            require_before=before is not None,
            progress=progress,
        )
    return diagnose(peeled.report, ())


@contextmanager
def located(path: str | Path, format_name: str = "auto", reserve: Reserve = USUAL) -> Iterator[CheckpointRef]:
    """The checkpoint at a path, or at a URL: then a copy for the length of the `with`, which leaves the `reserve` free.

    Raises as `locate` and `fetch`.
    """
    if not is_url(str(path)):
        yield locate(Path(path), format_name)
        return
    with TemporaryDirectory(prefix="peel-agent-") as folder:
        copy = fetch(str(path), Path(folder), registry.formats(format_name), reserve=reserve)
        yield dataclasses.replace(locate(copy, format_name), url=str(path).rstrip("/"))


def check_unchanged(ref: CheckpointRef, form: Format) -> None:
    """Raises TornCheckpoint for one that changed while it was read: it gave numbers of no checkpoint at all.

    One that was rotated away meanwhile is fine: its files were held open before the first read.
    """
    place = ref.in_place().path
    if not place.exists():
        return
    now = form.inspect(LocalListing(place))
    if now.state != "complete" or fingerprint(now.files) != ref.fingerprint:
        raise _torn(ref, "its files changed while they were read")


def _torn(ref: CheckpointRef, what: str) -> TornCheckpoint:
    return TornCheckpoint(
        f"{ref.path}: {what}", remedy="nothing was published; it is read again once it is whole and at rest"
    )
