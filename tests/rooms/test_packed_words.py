"""GPTQ's and AWQ's packed integers: read as they are defined, and refused by name where they do not fit."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

import peel_agent
from peel_agent.errors import CheckpointError
from peel_agent.load.packed import unpack
from tests.rooms.test_packed import (
    GPT2,
    JUNK,
    LLAMA,
    Q_PROJ,
    Change,
    Tensors,
    drop,
    leaves,
    outcome,
    plain_loss,
    put,
    refuses,
    replaced,
    say,
)

GROUP = 32
AWQ_PLACES = (0, 4, 1, 5, 2, 6, 3, 7)


def packed(columns: np.ndarray[Any, np.dtype[np.int64]], bits: int, places: tuple[int, ...] = ()) -> Tensor:
    """Numbers [rows, columns] in words of 32 bits, one after another from the lowest bits, or at these places."""
    per_word = 32 // bits
    words = np.zeros((len(columns), columns.shape[1] // per_word), dtype=np.int64)
    for column in range(columns.shape[1]):
        place = column % per_word
        words[:, column // per_word] |= columns[:, column] << bits * (places[place] if places else place)
    return torch.from_numpy(words.astype(np.uint32).view(np.int32))


def quantised(matrix: Tensor, bits: int, groups: np.ndarray[Any, Any]) -> tuple[Any, Any, Tensor]:
    """Codes [in, out], zero points [groups, out] and scales [groups, out] of a matrix [in, out]."""
    codes, zeros, scales = np.zeros(matrix.shape, dtype=np.int64), [], []
    for group in range(int(groups.max()) + 1):
        columns = matrix[groups == group].numpy()
        low, high = columns.min(0).clip(max=0), columns.max(0).clip(min=0)
        scale = ((high - low) / (2**bits - 1)).astype(np.float16)
        zero = np.round(-low / scale).clip(0, 2**bits - 1).astype(np.int64)
        codes[groups == group] = np.round(columns / scale + zero).clip(0, 2**bits - 1)
        zeros.append(zero)
        scales.append(scale)
    return codes, np.stack(zeros), torch.from_numpy(np.stack(scales))


def by_formula(codes: Any, zeros: Any, scales: Tensor, groups: Any) -> Tensor:
    """The weight [in, out], entry by entry of the definition: (code - zero) * scale, in the dtype of the scales."""
    rows = [torch.from_numpy(codes[row] - zeros[groups[row]]).half() * scales[groups[row]] for row in range(len(codes))]
    return torch.stack(rows)


def checkpoint(
    method: str, config: Any = LLAMA, *, bits: int = 4, ordered: bool = True, form: str = "gptq"
) -> tuple[Tensors, dict[str, Tensor]]:
    """A tiny model's checkpoint as GPTQ or AWQ packs it, and its dequantised matrices."""
    torch.manual_seed(0)
    turned = config.model_type == "gpt2"
    tensors, matrices = {}, {}
    for name, tensor in AutoModelForCausalLM.from_config(copy.deepcopy(config)).state_dict().items():
        if tensor.dim() < 2 or ".embed" in name or ".wte" in name or ".wpe" in name or "lm_head" in name:
            tensors |= {} if "lm_head" in name and turned else {name: tensor}
            continue
        matrix = tensor if turned else tensor.T
        groups = np.arange(len(matrix)) // GROUP
        groups = groups if ordered else np.random.default_rng(0).permutation(groups)
        codes, zeros, scales = quantised(matrix, bits, groups)
        effective = by_formula(codes, zeros, scales, groups)
        matrices[name] = effective if turned else effective.T
        module = name.removesuffix(".weight")
        if method == "awq":
            tensors[f"{module}.qweight"] = packed(codes, 4, AWQ_PLACES)
            tensors[f"{module}.qzeros"] = packed(zeros, 4, AWQ_PLACES)
        else:
            whole = packed(zeros, bits).numpy().view(np.uint32)
            ones = np.uint32(sum(1 << shift for shift in range(0, 32, bits)))
            stored = whole - ones if form == "gptq" else whole  # 0 less one borrows from the next field
            tensors[f"{module}.qweight"] = packed(np.ascontiguousarray(codes.T), bits).T.contiguous()
            tensors[f"{module}.qzeros"] = torch.from_numpy(stored.view(np.int32))
            if not ordered:
                tensors[f"{module}.g_idx"] = torch.from_numpy(groups.astype(np.int32))
        tensors[f"{module}.scales"] = scales
    settings = {"quant_method": method, "bits": bits, "group_size": GROUP}
    settings |= {"version": "gemm", "zero_point": True} if method == "awq" else {"checkpoint_format": form}
    return Tensors(config.to_dict() | {"quantization_config": settings}, tensors), matrices


CASES: dict[str, dict[str, Any]] = {
    "gptq": {"method": "gptq"},
    "gptq of 8 bits": {"method": "gptq", "bits": 8},
    "gptq of 2 bits": {"method": "gptq", "bits": 2},
    "gptq by activation order": {"method": "gptq", "ordered": False},
    "gptq_v2": {"method": "gptq", "form": "gptq_v2"},
    "gptq of GPT-2": {"method": "gptq", "config": GPT2},
    "awq": {"method": "awq"},
}


@pytest.mark.parametrize("name", CASES)
def test_packed_words(name: str) -> None:
    """Matrices are what the definition gives, bit for bit, and the plain model runs with them."""
    weights, matrices = checkpoint(**CASES[name])
    unpacked = unpack(weights)
    assert len(matrices) in (8, 14)
    for weight, matrix in matrices.items():
        assert torch.equal(unpacked.weights.read(weight), matrix), weight
    method, bits = CASES[name]["method"], CASES[name].get("bits", 4)
    assert unpacked.note == f"int{bits} packed by {method}, dequantised"
    assert math.isfinite(plain_loss(unpacked))


def test_awq_as_its_library_unpacks_it() -> None:
    """compressed-tensors has a converter of AWQ's files: what it makes of them is read to the same matrices."""
    from compressed_tensors.entrypoints.convert.converters import AutoAWQConverter

    weights, _ = checkpoint("awq")
    converter = AutoAWQConverter.from_autoawq_config(weights.settings)
    tensors = converter.process(dict(weights.tensors))
    settings = converter._build_quant_config().model_dump()
    converted = Tensors(weights.own_config | {"quantization_config": settings}, tensors)
    ours, theirs = unpack(weights).weights, unpack(converted).weights
    assert ours.shapes() == theirs.shapes()
    for name in ours.shapes():
        assert torch.equal(ours.read(name), theirs.read(name)), name


def test_scan_of_packed_words(tmp_path: Path) -> None:
    """`scan` gives the loss of the dequantised weights saved plainly, and says what they were."""
    weights, matrices = checkpoint("gptq")
    np.save(tmp_path / "probe.npy", np.random.default_rng(0).integers(0, 32, (200, 12)))
    plain = {
        name: tensor for name, tensor in weights.tensors.items() if name.endswith(("norm.weight", "tokens.weight"))
    }
    plain |= matrices | {"lm_head.weight": weights.tensors["lm_head.weight"]}
    reports = []
    for folder, tensors, config in (
        ("packed", weights.tensors, weights.own_config),
        ("plain", plain, LLAMA.to_dict()),
    ):
        (tmp_path / folder).mkdir()
        alone = {name: tensor.contiguous() for name, tensor in tensors.items()}
        save_file(alone, tmp_path / folder / "model.safetensors", {"format": "pt"})
        (tmp_path / folder / "config.json").write_text(json.dumps(config))
        reports.append(peel_agent.scan(tmp_path / folder, probe=tmp_path / "probe.npy", quantities=()))
    assert reports[0].loss == reports[1].loss
    assert reports[0].model.precision.startswith("int4 packed by gptq, dequantised")


@pytest.fixture(scope="module")
def gptq() -> Tensors:
    return checkpoint("gptq", ordered=False)[0]


@pytest.fixture(scope="module")
def awq() -> Tensors:
    return checkpoint("awq")[0]


HOSTILE: list[tuple[str, str, Change, str]] = [
    ("bits", "gptq", say(bits=3), "bits 3; read are 2, 4, 8"),
    ("text", "gptq", say(bits="4"), "bits '4'; read are"),
    ("format", "gptq", say(checkpoint_format="marlin"), "checkpoint_format 'marlin'; read are gptq, gptq_v2"),
    ("dynamic", "gptq", say(dynamic={"+:.*": {"bits": 8}}), "settings by module are not read"),
    ("group", "gptq", say(group_size=0), "group_size 0, which is no number of inputs"),
    ("groups", "gptq", say(group_size=16), r"qzeros` is \[2, 8\] where .* needs \[4, 8\]"),
    ("whole", "gptq", say(group_size=-1), r"qzeros` is \[2, 8\] where .* needs \[1, 8\]"),
    ("no-zeros", "gptq", drop(".qzeros"), "qzeros` is missing"),
    ("no-scales", "gptq", drop(".scales"), "scales` is missing"),
    ("no-codes", "gptq", drop(".qweight"), "qweight` is missing, where .* is stored"),
    ("scales", "gptq", put(".scales", lambda t: t[:, :9]), r"scales` is \[2, 9\] where .* needs \[2, 64\]"),
    ("nan", "gptq", put(".scales", lambda t: t * torch.nan), "hold a value that is not finite"),
    ("dtype", "gptq", put(".qweight", lambda t: t.float()), "qweight` is stored as float32 instead of int32"),
    ("vector", "gptq", put(".qweight", lambda t: t[0]), "qweight` is .* not a matrix of codes"),
    ("index", "gptq", put(".g_idx", lambda t: t + 1), "g_idx` names a group that is none of the 2"),
    ("negative", "gptq", put(".g_idx", lambda t: t - 9), "g_idx` names a group that is none of the 2"),
    ("short", "gptq", put(".g_idx", lambda t: t[1:]), r"g_idx` is \[63\] where .* needs \[64\]"),
    ("awq-bits", "awq", say(bits=8), "bits 8; read are 4"),
    ("awq-version", "awq", say(version="gemv"), "version 'gemv'; read are GEMM, gemm"),
    ("awq-zero", "awq", say(zero_point=False), "zero_point False; only true is read"),
    ("awq-zeros", "awq", put(".qzeros", lambda t: t[1:]), r"qzeros` is \[1, 8\] where .* needs \[2, 8\]"),
]


@pytest.mark.parametrize(("method", "change", "words"), [pytest.param(*rest, id=name) for name, *rest in HOSTILE])
def test_hostile_packed_words(method: str, change: Change, words: str, request: pytest.FixtureRequest) -> None:
    """Settings that are not read, missing and misshapen parts and indices that lead nowhere are refused by name."""
    refuses(copy.deepcopy(request.getfixturevalue(method)), change, words)


def test_a_claim_without_packed_words(gptq: Tensors) -> None:
    """Plain weights under the name of a method are refused: nothing says what they are."""
    plain = {name: tensor for name, tensor in gptq.tensors.items() if Q_PROJ not in name and "proj" not in name}
    with pytest.raises(CheckpointError, match=r"no tensor `\.\.\.qweight` is stored"):
        unpack(Tensors(gptq.own_config, plain))


@pytest.mark.parametrize("method", ["gptq", "awq"])
def test_any_value_of_the_settings(method: str, request: pytest.FixtureRequest) -> None:
    """Whatever one value of quantization_config is, the matrix is read or the checkpoint refused in few words."""
    original: Tensors = request.getfixturevalue(method)
    outcomes = [
        outcome(Tensors(original.own_config | {"quantization_config": changed}, original.tensors))
        for path in leaves(original.settings)
        for changed in (replaced(original.settings, path, junk) for junk in JUNK)
    ]
    assert {shape_or_words for shape_or_words in outcomes if not isinstance(shape_or_words, str)} <= {(64, 64)}
    assert 0 < max(len(shape_or_words) for shape_or_words in outcomes if isinstance(shape_or_words, str)) < 1000
