"""`peel-agent witness`: a better block's weights as a patch, measured again from the file that was written.

The patch is a safetensors file under the checkpoint's own names and in its dtypes: `model.load_state_dict(load_file(F),
strict=False)` is all it takes. A low-bit block's latents are written, so that training can go on from them.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from peel_agent import engines, registry
from peel_agent.before import check_earlier, open_past
from peel_agent.config import EngineSettings, visible_gpus
from peel_agent.errors import ConfigurationError, NoWitness
from peel_agent.pipeline import located
from peel_agent.probing import probe_for
from peel_agent.records import (
    CheckpointRef,
    DeviceLease,
    Estimate,
    ModelSettings,
    PeelSettings,
    ProbeSettings,
    Progress,
    Request,
)
from peel_agent.signals import Interrupted
from peel_agent.watch import USUAL, Reserve

if TYPE_CHECKING:
    from torch import Tensor

    from peel_agent.peel import Improvement

END_SECONDS = 2.0
"""How long a process that is ended may take."""

TOLERANCE = 0.05
"""A loss measured from the file may differ from what was promised by this fraction of the win."""


@dataclasses.dataclass(frozen=True)
class Witness:
    """What was proven: the loss as trained and with the patch in place, both on confirm, in nats per token.

    `headroom` is their difference with its paired interval; `names` are the weights in the patch.
    """

    trained: Estimate
    patched: Estimate
    headroom: Estimate
    names: tuple[str, ...]


def witness(
    path: str | Path,
    *,
    layer: int,
    out: Path,
    probe: ProbeSettings,
    model: ModelSettings,
    device: str,
    clock: Callable[[], float],
    earlier: str | Path | None = None,
    reserve: Reserve = USUAL,
    progress: Progress | None = None,
) -> Witness:
    """Writes better weights for block `layer` (0-based) to `out`, and measures them from there in a fresh process.

    They are the block's own weights of the checkpoint `earlier`, if it is given, else those that its headroom was
    measured with. `out` is there only once it is proven, and a file that is there already is never touched. Raises
    NoWitness when the win cannot be told from 0 or the file does not win it, Interrupted for Ctrl-C.
    """
    _check_out(out)
    with ExitStack() as places:
        ref = places.enter_context(located(path, reserve=reserve))
        before = None if earlier is None else places.enter_context(located(earlier, reserve=reserve))
        if before is not None:
            check_earlier(before, ref, flag="--from")
        return _witness(
            ref,
            before,
            layer=layer,
            out=out,
            probe=probe,
            model=model,
            device=device,
            clock=clock,
            progress=progress,
        )


def _witness(
    ref: CheckpointRef,
    earlier: CheckpointRef | None,
    *,
    layer: int,
    out: Path,
    probe: ProbeSettings,
    model: ModelSettings,
    device: str,
    clock: Callable[[], float],
    progress: Progress | None,
) -> Witness:
    from peel_agent.capture import open_trace, settled
    from peel_agent.load import open_snapshot
    from peel_agent.peel import earlier_block, improve
    from peel_agent.precision import float32_products

    (form,) = registry.formats(ref.format)
    snapshot = open_snapshot(ref, form, registry.family, sets=model.precision, factory=model.factory)
    trace = open_trace(snapshot, probe_for(snapshot, probe), device=device)
    if not 0 <= layer < len(trace.block_names):
        raise ConfigurationError(
            f"there is no block {layer}", remedy=f"this model has blocks 0 to {len(trace.block_names) - 1}"
        )
    clock = settled(clock, trace.device)
    with float32_products(trace.device):
        if earlier is None:
            better = improve(trace, layer, clock, progress)
        else:
            better = earlier_block(trace, open_past(earlier, earlier.step, trace, model), layer, clock, progress)
    patch = {name: weight.cpu().to(snapshot.weights.read(name).dtype) for name, weight in better.weights.items()}
    request = Request(
        ref=ref,
        probe=probe,
        peel=PeelSettings(quantities=()),
        model=model,
        lease=DeviceLease(device, visible_gpus() or "", device, "the command's own"),
        nice=0,
    )
    try:
        with _unproven(patch, out) as file:
            patched = _proven(better, dataclasses.replace(request, patch=file), snapshot.precision)
            _check_out(out)  # somebody may have made it meanwhile
            file.replace(out)
    except KeyboardInterrupt:
        words = f"a headroom of {better.headroom} nats per token is not proven, and no patch is left"
        raise Interrupted(f"interrupted while the patch was measured again: {words}") from None
    return Witness(better.loss, patched, better.headroom, tuple(sorted(patch)))


def _proven(better: Improvement, request: Request, precision: str) -> Estimate:
    """The loss with the patch, by a fresh process that is ended with us; raises NoWitness when it does not win."""
    engine = engines.opened(EngineSettings())
    try:
        patched = engine.submit(request).result().report.loss
    finally:
        engine.close(END_SECONDS)
    won = better.loss.value - patched.value
    if abs(won - better.headroom.value) > TOLERANCE * better.headroom.value:
        raise NoWitness(
            f"the weights win {won:.4f} nats per token from the file, not {better.headroom.value:.4f}: "
            f"{precision} does not hold them",
            remedy="nothing was left; take a checkpoint of higher precision",
        )
    return patched


def _check_out(out: Path) -> None:
    """Raises ConfigurationError for a patch that would take another file's place, or has no folder to be in."""
    if out.exists() or out.is_symlink():
        raise ConfigurationError(
            f"{out} is there already, and is not written over",
            remedy="give --out the name of a file that is not there, or move that one away",
        )
    if not out.absolute().parent.is_dir():
        raise ConfigurationError(f"cannot write {out}: its folder is not there", remedy="check the path of --out")


@contextmanager
def _unproven(patch: Mapping[str, Tensor], out: Path) -> Iterator[Path]:
    """The patch in a file beside `out`, under a name of its own; it is gone afterwards, unless it took its place."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    file = out.absolute().with_name(f".{out.name}.unproven-{os.getpid()}")
    try:
        try:
            save_file(dict(patch), file)
        except (OSError, SafetensorError) as error:
            raise ConfigurationError(f"cannot write {out}: {error}", remedy="check the path of --out") from error
        yield file
    finally:
        file.unlink(missing_ok=True)
