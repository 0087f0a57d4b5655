"""Two real checkpoints on one probe: what is equal, what is told, what is refused."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig

import peel_agent
from peel_agent.comparing import check_probe_of_runs
from peel_agent.errors import CheckpointError, ConfigurationError, OtherArchitecture, ProbeError
from peel_agent.records import DifferenceReport, ProbeSettings
from tests import zoo

SIZES = {"fit_tokens": 480, "select_tokens": 120, "confirm_tokens": 180}


@pytest.fixture(scope="module")
def probe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("probe") / "probe.npy"
    np.save(file, zoo.token_ids(100, 5))
    return file


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return zoo.save(zoo.build("llama", steps=10), tmp_path_factory.mktemp("base"), step=10)


def compared(a: Path, b: Path, probe: Path, **options: Any) -> DifferenceReport:
    return peel_agent.compare(a, b, probe=probe, **{"quantities": (), **SIZES, **options})


def loaded(path: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)


def add_to(name: str) -> Callable[[Any], None]:
    """Moves one value of one tensor by a little."""

    def change(model: Any) -> None:
        with torch.no_grad():
            model.state_dict()[name].view(-1)[3] += 1e-3

    return change


@pytest.mark.parametrize(
    ("names", "first", "blocks", "outside"),
    [
        ((), None, (), ()),
        (("model.layers.2.mlp.up_proj.weight",), 2, (2,), ()),
        (("model.layers.3.input_layernorm.weight", "model.layers.1.self_attn.q_proj.weight"), 1, (1, 3), ()),
        (("model.norm.weight",), None, (), ("model.norm.weight",)),
        (("model.embed_tokens.weight", "model.layers.0.mlp.up_proj.weight"), 0, (0,), ("model.embed_tokens.weight",)),
    ],
)
def test_one_value_that_is_not_equal_is_found(
    names: tuple[str, ...], first: int | None, blocks: tuple[int, ...], outside: tuple[str, ...],
    base: Path, probe: Path, tmp_path: Path,
) -> None:  # fmt: skip
    """Every block with an unequal value, and every tensor outside of them; the loss of equal ones differs by 0."""
    model = loaded(base)
    for name in names:
        add_to(name)(model)
    report = compared(base, zoo.save(model, tmp_path, step=20), probe)
    assert (report.first_by_weights, report.weights.blocks, report.weights.outside) == (first, blocks, outside)
    assert report.weights.why_not is None
    assert report.loss.difference is not None
    assert (report.loss.difference.high == report.loss.difference.low == 0.0) == (not names)


def as_torch(model: Any, folder: Path) -> Path:
    torch.save(model.state_dict(), folder / "model.pt")
    model.config.save_pretrained(folder)
    return folder / "model.pt"


def as_half(model: Any, folder: Path) -> Path:
    return zoo.save(model.to(torch.bfloat16), folder)


@pytest.mark.parametrize(
    ("save", "equal", "note"),
    [(as_torch, True, "their formats differ: A transformers, B torch"), (as_half, False, "their precisions differ")],
)
def test_another_format_holds_the_same_weights(
    save: Callable[[Any, Path], Path], equal: bool, note: str, base: Path, probe: Path, tmp_path: Path
) -> None:
    """What is stored is compared by value, whatever the format; rounding is a difference, and what differs is told."""
    report = compared(base, save(loaded(base), tmp_path), probe)
    assert any(note in one for one in report.notes)
    assert (report.weights.blocks == ()) == equal


def test_margins_and_headroom_are_paired(base: Path, probe: Path, tmp_path: Path) -> None:
    """Each place has both numbers, as `scan` gives them, and a paired difference; they differ where the weights do."""
    model = loaded(base)
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight.mul_(-1.0)
    other = zoo.save(model, tmp_path, step=20)
    quantities = ("margin", "headroom")
    report = compared(base, other, probe, quantities=quantities)
    sides = [peel_agent.scan(place, probe=probe, quantities=quantities, **SIZES) for place in (base, other)]
    assert [report.loss.a, report.loss.b] == [one.loss for one in sides]
    for layer in report.layers:
        a, b = (one.layers[layer.index] for one in sides)
        assert (layer.block.margin.a, layer.block.margin.b) == (a.margin, b.margin)
        assert (layer.block.status_a, layer.block.status_b) == (a.status, b.status)
        for place in layer.places.values():
            assert place.margin.difference is not None
            assert place.headroom is not None
            assert place.headroom.difference is not None
            assert place.headroom.a is not None
            assert place.headroom.b is not None
            # Headroom is measured on all of confirm in both: the mean of the pairs is the difference of the means.
            expected = place.headroom.b.value - place.headroom.a.value
            assert place.headroom.difference.value == pytest.approx(expected, abs=1e-9)
            assert place.margin.sequences is not None
            assert 8 <= place.margin.sequences <= report.probe.confirm_tokens // report.probe.sequence_length


def deeper(config: LlamaConfig, folder: Path, **more: object) -> Path:
    torch.manual_seed(1)
    changed = LlamaConfig(**{**config.to_dict(), **more})
    return zoo.save(AutoModelForCausalLM.from_config(changed), folder)


def test_another_depth_and_width_are_told(base: Path, probe: Path, tmp_path: Path) -> None:
    """Blocks are held against each other as far as both have them; a tensor of another shape is not equal."""
    config = loaded(base).config
    report = compared(base, deeper(config, tmp_path, num_hidden_layers=6, intermediate_size=40), probe, effort="quick",
                      quantities=("margin",))  # fmt: skip
    assert any("A has 4 blocks and B 6" in note for note in report.notes)
    assert [layer.index for layer in report.layers] == [0, 1, 2, 3]
    assert report.weights.blocks == (0, 1, 2, 3)


def test_another_family_is_told(base: Path, probe: Path, tmp_path: Path) -> None:
    """Losses and margins are compared; weights of other names are not, which is said."""
    torch.manual_seed(1)
    assert isinstance(zoo.CONFIGS["gpt2"], GPT2Config)
    other = zoo.save(AutoModelForCausalLM.from_config(zoo.CONFIGS["gpt2"]), tmp_path)
    report = compared(base, other, probe, quantities=("margin",))
    assert report.weights.why_not == "the two have other tensors: one is llama, the other gpt2"
    assert report.first_by_weights is None
    assert report.layers[0].weights_differ is None
    assert report.layers[0].name == "model.layers.0 | transformer.h.0"
    assert report.layers[0].block.margin.difference is not None


def test_a_shorter_context_cuts_the_probe_for_both(base: Path, tmp_path: Path) -> None:
    """A stream is cut to what both models take, so that both are measured on the same sequences."""
    np.save(tmp_path / "stream.npy", zoo.token_ids(200, 5).reshape(-1))
    short = deeper(loaded(base).config, tmp_path / "short", max_position_embeddings=10)
    for places in ((base, short), (short, base)):
        assert compared(*places, tmp_path / "stream.npy").probe.sequence_length == 10


# ---------------------------------------------------------------- vocabularies


def test_another_vocabulary_is_refused_by_its_size(base: Path, probe: Path, tmp_path: Path) -> None:
    """Losses over 19 and over 23 tokens are no difference of the models."""
    other = deeper(loaded(base).config, tmp_path, vocab_size=23)
    with pytest.raises(OtherArchitecture, match=r"has a vocabulary of 23, .* one of 19"):
        compared(base, other, probe)


def with_tokenizer(base: Path, folder: Path, words: list[str] | None, *, by: str = "whitespace") -> Path:
    """The checkpoint with a tokenizer of these words, in order; with none for None, with a damaged one for []."""
    zoo.save(loaded(base), folder)
    if words:
        tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token=words[0]))
        tokenizer.pre_tokenizer = pre_tokenizers.Whitespace() if by == "whitespace" else pre_tokenizers.Digits()
        tokenizer.save(str(folder / "tokenizer.json"))
    elif words is not None:
        (folder / "tokenizer.json").write_text("{")
    return folder


WORDS = [f"w{index}" for index in range(zoo.VOCABULARY)]
SWAPPED = [*WORDS[:5], "w6", "w5", *WORDS[7:]]


def test_another_meaning_of_a_token_is_refused_by_name(base: Path, probe: Path, tmp_path: Path) -> None:
    """Two tokenizers of one size in which an id stands for another token: the first such id is named."""
    places = [with_tokenizer(base, tmp_path / str(index), words) for index, words in enumerate((WORDS, SWAPPED))]
    with pytest.raises(OtherArchitecture, match="token id 5 is `w5` in the first and `w6` in the second, one of 2"):
        compared(*places, probe)


@pytest.mark.parametrize(
    ("words", "note"),
    [
        (WORDS, None),
        (None, "B has no tokenizer.json: that a token id means the same in both is taken for granted"),
        ([], "the tokenizers could not be compared"),
    ],
)
def test_what_is_not_known_of_a_vocabulary_is_told(
    words: list[str] | None, note: str | None, base: Path, probe: Path, tmp_path: Path
) -> None:
    """The same tokenizer needs no word; one that is missing or damaged is no reason to refuse, and is told."""
    places = with_tokenizer(base, tmp_path / "a", WORDS), with_tokenizer(base, tmp_path / "b", words)
    notes = compared(*places, probe).notes
    assert any(note in one for one in notes) if note is not None else not any("token" in one for one in notes)


def test_a_text_is_read_with_the_tokenizer_that_is_there(base: Path, tmp_path: Path) -> None:
    """The one that has a tokenizer lends it to the other, whichever it is; two that read a text apart are refused."""
    (tmp_path / "held.txt").write_text("\n\n".join(" ".join(WORDS) for _ in range(120)))
    has, has_none = with_tokenizer(base, tmp_path / "a", WORDS), with_tokenizer(base, tmp_path / "b", None)
    prints = {
        compared(*places, tmp_path / "held.txt", sequence_length=12).probe.fingerprint
        for places in ((has, has_none), (has_none, has))
    }
    assert len(prints) == 1
    splits = with_tokenizer(base, tmp_path / "c", WORDS, by="digits")
    with pytest.raises(ProbeError, match="make other tokens of"):
        compared(has, splits, tmp_path / "held.txt", sequence_length=12)


# ---------------------------------------------------------------- refusals


def test_what_is_not_compared_is_refused(base: Path, probe: Path, tmp_path: Path) -> None:
    """Bounds and redundancy are of one checkpoint; a place without a checkpoint, and one that is damaged, are named."""
    with pytest.raises(ConfigurationError, match="not compared by bounds, redundancy"):
        compared(base, base, probe, quantities=("margin", "bounds", "redundancy"))
    with pytest.raises(CheckpointError, match="no checkpoint at"):
        compared(base, tmp_path / "none", probe)
    broken = zoo.save(loaded(base), tmp_path, step=30)
    config = json.loads((broken / "config.json").read_text())
    (broken / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 5}))
    with pytest.raises(CheckpointError, match="missing"):
        compared(base, broken, probe)


def test_the_probe_of_a_report_is_known_again(base: Path, probe: Path, tmp_path: Path) -> None:
    """A report's probe is the file that it was measured on, and no other."""
    measured = peel_agent.scan(base, probe=probe, quantities=(), **SIZES).probe
    check_probe_of_runs(ProbeSettings(path=probe), measured)
    np.save(tmp_path / "other.npy", zoo.token_ids(100, 6))
    with pytest.raises(ConfigurationError, match="measured on another probe"):
        check_probe_of_runs(ProbeSettings(path=tmp_path / "other.npy"), measured)
    with pytest.raises(ConfigurationError, match="measured on another probe"):
        check_probe_of_runs(ProbeSettings(path=probe), dataclasses.replace(measured, fingerprint="dead"))
