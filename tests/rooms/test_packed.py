"""Low-bit contents: what the libraries write is read as they dequantise it, and what is not understood is refused."""

from __future__ import annotations

import copy
import inspect
import json
import re
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import save_file
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    BitNetQuantConfig,
    BitsAndBytesConfig,
    GPT2Config,
    LlamaConfig,
    TorchAoConfig,
)
from transformers.quantizers.auto import (
    AUTO_QUANTIZATION_CONFIG_MAPPING,
    AUTO_QUANTIZER_MAPPING,
    LOADING_ATTRIBUTES_CONFIG_TYPES,
)
from transformers.quantizers.base import HfQuantizer

import peel_agent
from peel_agent import registry
from peel_agent.errors import CheckpointError, WeightsMismatch
from peel_agent.load.architecture import build_model
from peel_agent.load.names import NamedWeights
from peel_agent.load.packed import METHODS, Unpacked, unpack
from peel_agent.load.packed.bitnet import globs_of
from peel_agent.load.packed.patterns import compiled
from peel_agent.load.packed.ways_out import BEFORE, PLAIN, WAYS_OUT
from peel_agent.pipeline import locate
from peel_agent.precision import quantise, recognise
from peel_agent.publish import report_json

IDS = (torch.arange(48)[None] * 7) % 32
_SHARED: dict[str, Any] = {"vocab_size": 32, "bos_token_id": 0, "eos_token_id": 0}
LLAMA = LlamaConfig(
    **_SHARED,
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
    initializer_range=0.1,
)
GPT2 = GPT2Config(
    **_SHARED, n_embd=64, n_inner=128, n_layer=2, n_head=4, n_positions=64, initializer_range=0.1, attn_pdrop=0.0
)
Q_PROJ = "model.layers.0.self_attn.q_proj"


@dataclass
class Tensors:
    """See records.Weights: tensors at hand, with the texts of safetensors' headers; it counts what is read."""

    own_config: dict[str, Any]
    tensors: dict[str, Tensor]
    texts: dict[str, str] = field(default_factory=dict)
    reads: list[str] = field(default_factory=list)

    def config(self) -> Mapping[str, Any]:
        return self.own_config

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        return {name: tuple(tensor.shape) for name, tensor in self.tensors.items()}

    def read(self, name: str) -> Tensor:
        self.reads.append(name)
        return self.tensors[name].clone()

    def metadata(self) -> Mapping[str, str]:
        return self.texts

    @property
    def settings(self) -> dict[str, Any]:
        settings: dict[str, Any] = self.own_config["quantization_config"]
        return settings


def opened(path: Path) -> Tensors:
    """A checkpoint as our own reader gives it, with the texts in the headers of its files."""
    ref = locate(path)
    (form,) = registry.formats(ref.format)
    weights: Any = form.open(ref)
    return Tensors(dict(weights.config()), {name: weights.read(name) for name in weights.shapes()}, weights.metadata())


@torch.no_grad()
def loss_of(model: Any) -> float:
    return float(model(IDS, labels=IDS).loss)


def plain_loss(unpacked: Unpacked) -> float:
    """The loss of the plain model with these weights, latents quantised; every weight must fit the model."""
    config, weights = unpacked.weights.config(), unpacked.weights
    tied = {"lm_head.weight": "transformer.wte.weight"} if config["tie_word_embeddings"] else {}
    NamedWeights(weights, build_model(config), {}, tied=tied).check()
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config), dtype=torch.float32).eval()
    state = {}
    for name in weights.shapes():
        weight_set = next((weight_set for glob, weight_set in unpacked.sets.items() if fnmatchcase(name, glob)), None)
        state[name] = weights.read(name) if weight_set is None else quantise(weights.read(name).float(), weight_set)
    model.load_state_dict(state, strict=not config["tie_word_embeddings"])
    return loss_of(model)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders `llama` and `gpt2` of tiny models, in float32."""
    folder = tmp_path_factory.mktemp("plain")
    for config in (LLAMA, GPT2):
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(copy.deepcopy(config)).save_pretrained(folder / config.model_type)
    return folder


def test_plain_weights_stay_themselves(plain: Path) -> None:
    """Without quantization_config the very same weights come back, with nothing to say about them."""
    weights = opened(plain / "llama")
    assert unpack(weights) == Unpacked(weights, "", {})
    assert unpack(weights).weights is weights


# compressed-tensors

SCHEMES: dict[str, dict[str, Any]] = {
    "int4-group": {"num_bits": 4, "strategy": "group", "group_size": 32},
    "int4-group-zero": {"num_bits": 4, "strategy": "group", "group_size": 32, "symmetric": False},
    "int4-channel": {"num_bits": 4, "strategy": "channel"},
    "int4-channel-zero": {"num_bits": 4, "strategy": "channel", "symmetric": False},
    "int3-channel": {"num_bits": 3, "strategy": "channel"},
    "int8-packed": {"num_bits": 8, "strategy": "channel"},
    "int8": {"num_bits": 8, "strategy": "channel", "input": {"num_bits": 8, "dynamic": True, "strategy": "token"}},
    "fp8-block": {"num_bits": 8, "type": "float", "strategy": "block", "block_structure": [32, 48]},
    "fp8": {
        "num_bits": 8,
        "type": "float",
        "strategy": "tensor",
        "input": {"num_bits": 8, "type": "float", "strategy": "tensor"},
    },
}


@dataclass(frozen=True)
class Written:
    """What a library wrote, its model's own weights by name after dequantising, and that model's loss."""

    path: Path
    dequantised: Mapping[str, Tensor]
    loss: float


def with_scales(module: Any) -> None:
    """Fills the scales of a module that the library prepared, from the range of each unit."""
    from compressed_tensors.quantization.utils import calculate_qparams

    args, weight = module.quantization_scheme.weights, module.weight.data
    if args.strategy == "group":
        units, over = weight.unflatten(1, (-1, args.group_size)), (2,)
    elif args.strategy == "block":
        height, width = args.block_structure
        rows, columns = -weight.shape[0] % height, -weight.shape[1] % width
        padded = torch.nn.functional.pad(weight, (0, columns, 0, rows))
        units, over = padded.unflatten(1, (-1, width)).unflatten(0, (-1, height)), (1, 3)
    else:
        units, over = weight, (0, 1) if args.strategy == "tensor" else (1,)
    scale, zero = calculate_qparams(units.amin(over), units.amax(over), args)
    module.weight_scale.data.copy_(scale.reshape(module.weight_scale.shape))
    module.weight_zero_point.data.copy_(zero.reshape(module.weight_zero_point.shape))
    if hasattr(module, "input_scale"):
        module.input_scale.data.fill_(0.05)


@pytest.fixture(scope="module")
def compressed(plain: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Written]:
    """Writes a scheme with the library's own ModelCompressor, as latents (`frozen`) or `compressed`."""
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.quantization import (
        QuantizationArgs,
        QuantizationConfig,
        QuantizationScheme,
        apply_quantization_config,
    )

    def write(name: str, state: str) -> Written:
        stated = dict(SCHEMES[name])
        inputs = stated.pop("input", None)
        scheme = QuantizationScheme(
            targets=["Linear"],
            weights=QuantizationArgs(**stated),
            input_activations=QuantizationArgs(**inputs) if inputs else None,
        )
        config = QuantizationConfig(config_groups={"g": scheme}, quantization_status="frozen", ignore=["lm_head"])
        model = AutoModelForCausalLM.from_pretrained(plain / "llama").eval()
        apply_quantization_config(model, config, show_progress=False)
        for module in model.modules():
            if hasattr(module, "quantization_scheme"):
                with_scales(module)
        loss = loss_of(model)
        compressor = ModelCompressor.from_pretrained_model(model)
        if state == "compressed":
            compressor.compress_model(model)
        path = tmp_path_factory.mktemp(name)
        model.save_pretrained(path)
        compressor.update_config(path)
        if state == "frozen":
            compressor.compress_model(model)
        compressor.decompress_model(model)
        return Written(path, {name: parameter.data for name, parameter in model.named_parameters()}, loss)

    return write


@pytest.mark.parametrize("state", ["compressed", "frozen"])
@pytest.mark.parametrize("name", SCHEMES)
def test_compressed_tensors(compressed: Callable[[str, str], Written], name: str, state: str) -> None:
    """Packed, integer and fp8 weights are the library's own, bit for bit; so are latents with stored scales.

    The loss is that of the library's model, up to the activations that it quantises too.
    """
    written = compressed(name, state)
    unpacked = unpack(opened(written.path))
    for weight in unpacked.weights.shapes():
        assert torch.equal(unpacked.weights.read(weight), written.dequantised[weight]), weight
    inputs = "input" in SCHEMES[name]
    assert plain_loss(unpacked) == pytest.approx(written.loss, abs=1e-2 if inputs else 1e-5)
    assert ("activations of its layers are not simulated" in unpacked.note) == inputs
    kind = name.split("-", maxsplit=1)[0]
    assert unpacked.note.startswith(
        f"latents of {kind} (compressed-tensors, frozen)" if state == "frozen" else f"{kind} packed by"
    )
    assert not unpacked.sets


def test_groups_by_name(compressed: Callable[[str, str], Written]) -> None:
    """With several config_groups, one that names a module stands before one for its class."""
    weights = opened(compressed("int4-group", "compressed").path)
    wanted = unpack(weights).weights.read("model.layers.1.mlp.up_proj.weight")
    (group,) = weights.settings["config_groups"].values()
    coarse = copy.deepcopy(group)
    coarse["weights"] |= {"strategy": "channel", "group_size": None}
    weights.settings["config_groups"] = {"a": coarse | {"targets": ["re:.*lm_head$"]}, "b": group}
    assert torch.equal(unpack(weights).weights.read("model.layers.1.mlp.up_proj.weight"), wanted)
    weights.settings["config_groups"]["a"]["targets"] = [r"re:.*\.up_proj$"]
    with pytest.raises(CheckpointError, match=r"up_proj.weight_scale` is \[128, 2\] where .* needs \[128, 1\]"):
        unpack(weights)
    weights.settings["config_groups"] = {"a": coarse, "b": group}
    with pytest.raises(CheckpointError, match="2 of the config_groups fit it, where one is needed"):
        unpack(weights)


def test_without_the_library(compressed: Callable[[str, str], Written], monkeypatch: pytest.MonkeyPatch) -> None:
    """A missing compressed-tensors is refused with the way to install it."""
    weights = opened(compressed("int4-group", "compressed").path)
    for module in [name for name in sys.modules if name.split(".")[0] == "compressed_tensors"]:
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(CheckpointError, match=r'pip install "peel-agent\[compressed-tensors\]"'):
        unpack(weights)


# bitsandbytes

BITSANDBYTES: dict[str, dict[str, Any]] = {
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "nf4-double": {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
        "bnb_4bit_quant_storage": "bfloat16",
    },
    "fp4": {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"},
    "int8": {"load_in_8bit": True},
}


def dequantised_by_bitsandbytes(model: Any) -> dict[str, Tensor]:
    import bitsandbytes

    plain = {}
    for name, module in model.named_modules():
        weight = getattr(module, "weight", None)
        if type(weight).__name__ == "Params4bit":
            matrix = bitsandbytes.functional.dequantize_4bit(weight.data, weight.quant_state)
        elif type(weight).__name__ == "Int8Params":
            matrix = bitsandbytes.functional.int8_vectorwise_dequant(weight.data, weight.SCB)
        else:
            continue
        plain[f"{name}.weight"] = matrix.T if module.source_cls.__name__ == "Conv1D" else matrix
    return plain


@pytest.fixture(scope="module")
def by_bitsandbytes(plain: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Written]:
    def write(kind: str, name: str) -> Written:
        settings = BitsAndBytesConfig(**BITSANDBYTES[name])
        model = AutoModelForCausalLM.from_pretrained(plain / kind, quantization_config=settings, dtype=torch.float32)
        path = tmp_path_factory.mktemp(name)
        model.save_pretrained(path)
        matrices = dequantised_by_bitsandbytes(model)  # before a forward pass, which repacks them for the CPU
        return Written(path, matrices, loss_of(model.eval()))

    return write


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("name", BITSANDBYTES)
def test_bitsandbytes(by_bitsandbytes: Callable[[str, str], Written], kind: str, name: str) -> None:
    """4-bit and 8-bit matrices are those of the library's CPU kernels, bit for bit, those of Conv1D turned."""
    written = by_bitsandbytes(kind, name)
    unpacked = unpack(opened(written.path))
    assert len(written.dequantised) == (14 if kind == "llama" else 8)
    for weight, matrix in written.dequantised.items():
        assert torch.equal(unpacked.weights.read(weight), matrix), weight
        assert unpacked.weights.shapes()[weight] == tuple(matrix.shape)
    assert plain_loss(unpacked) == pytest.approx(written.loss, abs=1e-2 if name == "int8" else 4e-3)
    assert unpacked.note.startswith(f"{name.split('-', maxsplit=1)[0]} ")
    assert "dequantised" in unpacked.note


def test_one_matrix_at_a_time(by_bitsandbytes: Callable[[str, str], Written]) -> None:
    """Unpacking reads no matrix, and reading a matrix reads nothing but its own parts."""
    weights = opened(by_bitsandbytes("llama", "nf4").path)
    unpacked = unpack(weights)
    assert all(".quant_state." in name for name in weights.reads)
    weights.reads.clear()
    unpacked.weights.read(f"{Q_PROJ}.weight")
    assert set(weights.reads) == {f"{Q_PROJ}.weight{end}" for end in ("", ".absmax", ".quant_map")}


# torchao


def torchao_settings(name: str) -> Any:
    from torchao import quantization

    return {
        "int8": quantization.Int8WeightOnlyConfig,
        "int8-dynamic": quantization.Int8DynamicActivationInt8WeightConfig,
        "fp8": quantization.Float8WeightOnlyConfig,
        "int4": lambda: quantization.IntxWeightOnlyConfig(
            weight_dtype=torch.int4, granularity=quantization.PerGroup(32)
        ),
        "int4-dynamic": lambda: quantization.Int8DynamicActivationIntxWeightConfig(
            weight_dtype=torch.int4, weight_granularity=quantization.PerGroup(32)
        ),
    }[name]()


@pytest.fixture(scope="module")
def by_torchao(plain: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Written]:
    def write(name: str, dtype: torch.dtype = torch.float32) -> Written:
        settings = TorchAoConfig(torchao_settings(name))
        model = AutoModelForCausalLM.from_pretrained(plain / "llama", quantization_config=settings, dtype=dtype)
        path = tmp_path_factory.mktemp(name)
        model.save_pretrained(path)
        named = dict(model.named_parameters())
        matrices = {name: weight.dequantize() for name, weight in named.items() if hasattr(weight, "block_size")}
        return Written(path, matrices, loss_of(model.eval()))

    return write


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["int8", "int8-dynamic", "int4", "int4-dynamic", "fp8"])
def test_torchao(by_torchao: Callable[..., Written], name: str, dtype: torch.dtype) -> None:
    """int8, int4 and fp8 matrices are what torchao's dequantize gives, bit for bit; the loss is its model's."""
    written = by_torchao(name, dtype)
    unpacked = unpack(opened(written.path))
    assert len(written.dequantised) == 14
    for weight, matrix in written.dequantised.items():
        assert torch.equal(unpacked.weights.read(weight), matrix), weight
    close = 1e-5 if dtype == torch.float32 and "dynamic" not in name else 1e-2
    assert plain_loss(unpacked) == pytest.approx(written.loss, abs=close)
    assert unpacked.note.startswith(f"{name.split('-', maxsplit=1)[0]} by torchao, dequantised")
    assert ("activations" in unpacked.note) == ("dynamic" in name)


def test_torchao_without_headers(by_torchao: Callable[..., Written]) -> None:
    """A torchao checkpoint whose headers are not at hand is refused: they say what the parts mean."""
    weights = opened(by_torchao("int8").path)
    weights.texts = {"format": "pt"}
    with pytest.raises(CheckpointError, match="no `tensor_names` in their headers"):
        unpack(weights)


# bitnet


@pytest.fixture(scope="module")
def by_bitnet(plain: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Written]:
    """Latents, or codes by transformers' pack_weights; the model is then loaded by transformers."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own, of the compiler that transformers' module asks for
        from transformers.integrations import bitnet

    def write(linear_class: str, mode: str) -> Written:
        state = AutoModelForCausalLM.from_pretrained(plain / "llama").state_dict()
        matrices = {}
        for name in [name for name in state if "_proj.weight" in name]:
            if mode == "online":
                matrices[name] = bitnet.WeightQuant.apply(state[name])
                continue
            scale = state[name].abs().mean().reshape(1)
            codes = (state[name] / scale).round().clamp(-1, 1)
            state[name] = bitnet.pack_weights(codes.clone())
            state[f"{name}_scale"] = scale if linear_class == "autobitlinear" else 1 / scale
            matrices[name] = codes * scale if linear_class == "autobitlinear" else codes / state[f"{name}_scale"]
        path = tmp_path_factory.mktemp(f"{linear_class}-{mode}")
        config = copy.deepcopy(LLAMA)
        config.quantization_config = BitNetQuantConfig(linear_class=linear_class, quantization_mode=mode)
        config.save_pretrained(path)
        save_file(state, path / "model.safetensors", {"format": "pt"})
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
        assert type(model.get_submodule(Q_PROJ)).__name__.lower() == linear_class
        return Written(path, matrices, loss_of(model.eval()))

    torch.compiler.set_stance("force_eager")
    yield write
    torch.compiler.set_stance("default")


def test_bitnet_online(by_bitnet: Callable[[str, str], Written]) -> None:
    """Latents stay as they are stored, and the sets name the quantiser of exactly the layers that use it.

    Their effective weights agree with transformers' up to the order of a product and a quotient.
    """
    written = by_bitnet("autobitlinear", "online")
    unpacked = unpack(opened(written.path))
    assert unpacked.note.startswith("float32 latents of ternary (bitnet, online)")
    assert "8-bit activations of its layers are not simulated" in unpacked.note
    assert {weight_set.name for weight_set in unpacked.sets.values()} == {"ternary"}
    assert "model.layers.*.self_attn.q_proj.weight" in unpacked.sets
    fitting = {name for name in unpacked.weights.shapes() if any(fnmatchcase(name, glob) for glob in unpacked.sets)}
    assert fitting == written.dequantised.keys()
    for weight, matrix in written.dequantised.items():
        effective = quantise(unpacked.weights.read(weight), next(iter(unpacked.sets.values())))
        torch.testing.assert_close(effective, matrix, rtol=1e-6, atol=1e-7)
    assert plain_loss(unpacked) == pytest.approx(written.loss, abs=2e-3)


@pytest.mark.parametrize("linear_class", ["autobitlinear", "bitlinear"])
def test_bitnet_offline(by_bitnet: Callable[[str, str], Written], linear_class: str) -> None:
    """Packed codes times (autobitlinear) or over (bitlinear) their scale, and recognised as ternary."""
    written = by_bitnet(linear_class, "offline")
    unpacked = unpack(opened(written.path))
    for weight, matrix in written.dequantised.items():
        assert torch.equal(unpacked.weights.read(weight), matrix), weight
        assert recognise(matrix).name == "ternary"
    assert not unpacked.sets
    assert unpacked.note.startswith("ternary packed by bitnet (offline), dequantised")
    assert plain_loss(unpacked) == pytest.approx(written.loss, abs=2e-3)


@pytest.mark.parametrize(
    ("fixture", "arguments", "precision"),
    [
        ("compressed", ("int4-group", "compressed"), "int4 packed by compressed-tensors"),
        ("by_bitsandbytes", ("llama", "nf4"), "nf4 packed by bitsandbytes"),
        ("by_torchao", ("int8",), "int8 by torchao"),
        ("by_bitnet", ("bitlinear", "offline"), "ternary packed by bitnet"),
    ],
)
def test_scan(
    fixture: str, arguments: tuple[str, ...], precision: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    """`scan` gives the very numbers of the dequantised weights saved plainly, and says what they were."""
    written: Written = request.getfixturevalue(fixture)(*arguments)
    unpacked = unpack(opened(written.path)).weights
    save_file({name: unpacked.read(name).clone() for name in unpacked.shapes()}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(dict(unpacked.config())))
    np.save(tmp_path / "probe.npy", np.random.default_rng(0).integers(0, 32, (200, 12)))
    low, plain = (
        report_json(peel_agent.scan(path, probe=tmp_path / "probe.npy", sequence_length=12))
        for path in (written.path, tmp_path)
    )
    for report in (low, plain):
        del report["checkpoint"], report["timing"]
    assert low["model"].pop("precision").startswith(precision)
    assert plain["model"].pop("precision").startswith("float32")
    assert low == plain


def test_patterns_that_repeat_behind_a_backslash_are_counted() -> None:
    """An escaped star is a star; a star behind an escaped backslash repeats it, and too many of those are refused."""
    assert compiled(r"a\.\*\*\*\*\*", "ignore").match("a.*****")
    with pytest.raises(CheckpointError, match="more repetitions"):
        compiled(r"\\*" * 12 + "x", "ignore")


def test_bitnet_leaves_named_modules(by_bitnet: Callable[[str, str], Written]) -> None:
    """Modules that modules_to_not_convert names are in no set, by transformers' rule of prefix, pattern and end."""
    weights = opened(by_bitnet("autobitlinear", "online").path)
    weights.settings["modules_to_not_convert"] = ["model.layers.0", "layers.1.mlp.up_proj", "lm_head"]
    globs = unpack(weights).sets
    assert not any(fnmatchcase("model.layers.0.mlp.down_proj.weight", glob) for glob in globs)
    assert not any(fnmatchcase("model.layers.1.mlp.up_proj.weight", glob) for glob in globs)
    assert any(fnmatchcase("model.layers.1.mlp.down_proj.weight", glob) for glob in globs)


def test_globs_fit_no_other_name() -> None:
    """One glob for all layers, unless it would fit a weight that is not meant."""
    every = ["l.0.a", "l.1.a", "l.0.b", "l.1.b", "x[0]"]
    assert globs_of(["l.0.a", "l.1.a", "l.1.b", "x[0]"], every) == ["l.*.a", "l.1.b", "x[[]0]"]


# a quantiser that the checkpoint names itself


def test_named_quantiser(plain: Path) -> None:
    """`quant_method` peel-agent names sets by glob, as --precision does; the weights stay as they are."""
    weights = opened(plain / "llama")
    named = {"model.layers.*_proj.weight": "ternary", "lm_head.weight": "int4-g32"}
    weights.own_config["quantization_config"] = {"quant_method": "peel-agent", "weights": named}
    unpacked = unpack(weights)
    assert {glob: weight_set.name for glob, weight_set in unpacked.sets.items()} == named
    assert unpacked.note == "latents of int4-g32, ternary, as config.json names them"
    assert "quantization_config" not in unpacked.weights.config()
    assert torch.equal(unpacked.weights.read("lm_head.weight"), weights.read("lm_head.weight"))


@pytest.mark.parametrize(
    ("named", "words"),
    [
        (None, "weights is None"),
        ({}, "not 1 to 100 globs"),
        ({f"*{i}": "sign" for i in range(101)}, "not 1 to 100 globs"),
        ({"model.nothing": "sign"}, "'model.nothing', which fits no matrix"),
        ({"*" * 5000: "sign"}, "fits no matrix"),
        ({"lm_head.weight": "int9-channel"}, "the set 'int9-channel'; sets are none, sign"),
        ({"lm_head.weight": ["sign"]}, r"the set \['sign'\]"),
    ],
)
def test_named_quantiser_refused(plain: Path, named: Any, words: str) -> None:
    """What names no quantiser that is known, or no weight, is refused with it."""
    weights = opened(plain / "llama")
    weights.own_config["quantization_config"] = {"quant_method": "peel-agent", "weights": named}
    with pytest.raises(CheckpointError, match=words):
        unpack(weights)


# refusals


UNREAD = sorted(AUTO_QUANTIZER_MAPPING.keys() - METHODS.keys() - {"bitsandbytes_4bit", "bitsandbytes_8bit"})


def refusal_of(plain: Path, method: Any) -> CheckpointError:
    weights = opened(plain / "llama")
    weights.own_config["quantization_config"] = {"quant_method": method}
    with pytest.raises(CheckpointError) as caught:
        unpack(weights)
    assert f"quant_method {method!r}" in caught.value.what
    return caught.value


@pytest.mark.parametrize("method", UNREAD)
def test_the_way_out_of_every_other_method_exists(plain: Path, method: str) -> None:
    """Each method of the pinned transformers that is not read has a way out that this transformers has.

    Where it can dequantise, that is said: by a setting at load time, or once loaded. Else the weights are those of
    before.
    """
    remedy = refusal_of(plain, method).remedy
    assert BEFORE in remedy
    config, quantiser = AUTO_QUANTIZATION_CONFIG_MAPPING[method], AUTO_QUANTIZER_MAPPING[method]
    at_load = config in LOADING_ATTRIBUTES_CONFIG_TYPES and "dequantize" in inspect.signature(config).parameters
    assert (f"{config.__name__}(dequantize=True)" in remedy) == at_load
    assert ("model.dequantize()" in remedy) == (quantiser._dequantize is not HfQuantizer._dequantize)
    assert hasattr(transformers, config.__name__)


@pytest.mark.parametrize("method", [None, ["bitnet"], "of-ones-own"])
def test_methods_that_nobody_knows_are_refused_by_name(plain: Path, method: Any) -> None:
    """transformers loads such a checkpoint as a plain one; whether it is one must be said."""
    assert refusal_of(plain, method).remedy == PLAIN


def fp8_of(state: dict[str, Tensor], block: tuple[int, int]) -> dict[str, Tensor]:
    """Matrices as fp8 codes with a scale for each block; a power of two in a byte where a block is one row."""
    tensors = {}
    for name, tensor in state.items():
        if not name.endswith("_proj.weight"):
            tensors[name] = tensor
            continue
        blocks = tensor.unflatten(1, (-1, block[1])).unflatten(0, (-1, block[0]))
        scales = stored = blocks.abs().amax(dim=(1, 3)) / 448
        if block[0] == 1:
            stored = (scales.log2().ceil() + 127).to(torch.uint8)
            scales = (stored.float() - 127).exp2()
        codes = (blocks / scales[:, None, :, None]).to(torch.float8_e4m3fn)
        tensors |= {name: codes.flatten(0, 1).flatten(1, 2), f"{name}_scale_inv": stored}
    return tensors


def metal_of(state: dict[str, Tensor]) -> dict[str, Tensor]:
    from transformers.integrations.metal_quantization import _affine_quantize_tensor

    tensors = {}
    for name, tensor in state.items():
        if name.endswith("_proj.weight"):
            codes, scales, biases = _affine_quantize_tensor(tensor, 32, 4)
            module = name.removesuffix("weight")
            tensors |= {name: codes, f"{module}scales": scales, f"{module}qbiases": biases}
        else:
            tensors[name] = tensor
    return tensors


STEPS = re.compile(r"model\.(?:dequantize|save_pretrained)\(.*?\)(?=,| and )|model = .*?\)(?=, model| and model)")


def follow(remedy: str, folder: Path, out: Path) -> Any:
    """Does what a remedy says, to the letter, and gives the model that it loads."""
    words = re.findall(r"[A-Z]\w+", remedy)
    names = {word: getattr(transformers, word) for word in words if hasattr(transformers, word)}
    names |= {"FOLDER": folder, "OUT": out}
    for step in STEPS.findall(remedy):
        exec(step, names)
    return names["model"]


PACKED: dict[str, tuple[dict[str, Any], Callable[[dict[str, Tensor]], dict[str, Tensor]]]] = {
    "fp8": ({"weight_block_size": [32, 32]}, lambda state: fp8_of(state, (32, 32))),
    "mxfp8": ({"weight_block_size": [1, 32]}, lambda state: fp8_of(state, (1, 32))),
    "metal": ({"bits": 4, "group_size": 32}, metal_of),
}


@pytest.mark.parametrize("method", PACKED)
def test_the_way_out_leads_out(plain: Path, method: str, tmp_path: Path) -> None:
    """What the remedy says is done to the letter, and what it writes is peeled with the loss of the loaded model."""
    settings, pack = PACKED[method]
    weights, path = opened(plain / "llama"), tmp_path / "packed"
    path.mkdir()
    save_file(pack(weights.tensors), path / "model.safetensors", {"format": "pt"})
    config = weights.own_config | {"quantization_config": {"quant_method": method} | settings}
    (path / "config.json").write_text(json.dumps(config))
    model = follow(WAYS_OUT[method], path, tmp_path / "plain")
    check_led_out(model, tmp_path / "plain")


def check_led_out(model: Any, path: Path) -> None:
    unpacked = unpack(opened(path))
    assert not unpacked.note
    assert plain_loss(unpacked) == pytest.approx(loss_of(model.float().eval()), abs=1e-5)


@pytest.mark.filterwarnings("ignore:You passed `quantization_config`")
@pytest.mark.parametrize(
    ("method", "fixture", "arguments"),
    [
        ("bitsandbytes", "by_bitsandbytes", ("llama", "nf4")),
        ("compressed-tensors", "compressed", ("int4-group", "compressed")),
    ],
)
def test_the_way_out_of_what_is_not_read_of_a_method(
    method: str, fixture: str, arguments: tuple[str, ...], request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    """Where a setting of a method is not read, what is said of the method leads out."""
    written: Written = request.getfixturevalue(fixture)(*arguments)
    check_led_out(follow(WAYS_OUT[method], written.path, tmp_path), tmp_path)


def test_early_checkpoints_of_bitsandbytes(by_bitsandbytes: Callable[[str, str], Written]) -> None:
    """Without a quant_method, load_in_4bit says that it is bitsandbytes, as transformers takes it."""
    weights = opened(by_bitsandbytes("llama", "nf4").path)
    del weights.settings["quant_method"]
    assert unpack(weights).note == "nf4 packed by bitsandbytes, dequantised"


@pytest.mark.parametrize("settings", ["nf4", [4], 7])
def test_settings_that_are_no_object(plain: Path, settings: Any) -> None:
    """A quantization_config of another type is refused as such."""
    weights = opened(plain / "llama")
    weights.own_config["quantization_config"] = settings
    with pytest.raises(CheckpointError, match="which is not an object"):
        unpack(weights)


Change = Callable[[Tensors], object]


def group(weights: Tensors) -> dict[str, Any]:
    (settings,) = weights.settings["config_groups"].values()
    return settings  # type: ignore[no-any-return]


def put(name: str, make: Callable[[Tensor], Tensor]) -> Change:
    """Replaces a tensor of the first query projection, by the end of its name."""

    def change(weights: Tensors) -> None:
        weights.tensors[Q_PROJ + name] = make(weights.tensors[Q_PROJ + name])

    return change


def drop(name: str) -> Change:
    return lambda weights: weights.tensors.pop(Q_PROJ + name)


def add(name: str, tensor: Tensor) -> Change:
    return lambda weights: weights.tensors.update({Q_PROJ + name: tensor})


def say(**entries: Any) -> Change:
    return lambda weights: weights.settings.update(entries)


def refuses(weights: Tensors, change: Change, words: str) -> None:
    """The change makes unpacking, the check against the model or reading the matrix fail with these words."""
    change(weights)
    with pytest.raises(CheckpointError, match=words):
        read_whole(weights)


def read_whole(weights: Tensors) -> Tensor:
    unpacked = unpack(weights)
    NamedWeights(unpacked.weights, build_model(unpacked.weights.config()), {}).check()
    return unpacked.weights.read(f"{Q_PROJ}.weight")


COMPRESSED: list[tuple[str, Change, str]] = [
    ("no-groups", say(config_groups={}), "config_groups {}, not 1 to 32 groups"),
    ("many-groups", say(config_groups={str(i): {} for i in range(33)}), "not 1 to 32 groups"),
    ("group-text", say(config_groups={"g": "W4A16"}), "'W4A16', not as an object"),
    ("negative", lambda w: group(w)["weights"].update(group_size=-32), "compressed-tensors refuses.*group size -32"),
    ("huge", lambda w: group(w)["weights"].update(group_size=10**30), "has 128 inputs, which groups of 10{30} do not"),
    ("odd", lambda w: group(w)["weights"].update(group_size=48), "has 128 inputs, which groups of 48 do not divide"),
    ("text", lambda w: group(w)["weights"].update(group_size="many"), "compressed-tensors refuses"),
    ("bits", lambda w: group(w)["weights"].update(num_bits=10**9), "1000000000 bits with the strategy group"),
    ("fp6", lambda w: group(w)["weights"].update(type="float", num_bits=6), "type float with 6 bits"),
    ("bits-off", lambda w: group(w)["weights"].update(num_bits=3), "in 3 bits, packed in words of 32"),
    ("unknown", lambda w: group(w).update(secret=1), "compressed-tensors refuses"),
    ("nested", lambda w: group(w).update(targets=["re:(a+)+$"]), "more repetitions than are tried"),
    ("broken", lambda w: group(w).update(targets=["re:("]), "which does not parse"),
    ("targets", lambda w: group(w).update(targets="Linear"), "targets 'Linear', which is not a list of names"),
    ("nvfp4", lambda w: group(w).update(format="nvfp4-pack-quantized"), "format 'nvfp4-pack-quantized'; read are"),
    ("marlin", say(format="marlin-24"), "format 'marlin-24'; read are"),
    ("sparse", say(sparsity_config={"format": "sparse-24-bitmask"}), "sparsity_config .*sparse-24-bitmask"),
    ("rotated", say(transform_config={"config_groups": {}}), "transform_config"),
    ("status", say(quantization_status="melted"), "quantization_status 'melted'"),
    ("rows", put(".weight_packed", lambda t: t[:10]), r"\[10, 8\], which is not \[64, 64\]"),
    ("columns", put(".weight_packed", lambda t: t[:, :7]), r"\[64, 7\], which is not \[64, 64\]"),
    ("absurd", put(".weight_shape", lambda t: torch.tensor([2**40, 2**40])), r"which is not \[1099511627776, "),
    ("below-zero", put(".weight_shape", lambda t: -t), r"which is not \[-64, -64\]"),
    ("no-shape", drop(".weight_shape"), "weight_shape` is missing"),
    ("no-scale", drop(".weight_scale"), "weight_scale` is missing"),
    ("no-codes", drop(".weight_packed"), r"q_proj.weight` is \[\], not the matrix"),
    ("nan", put(".weight_scale", lambda t: t * torch.nan), "weight_scale` hold a value that is not finite"),
    ("integers", put(".weight_scale", lambda t: t.int()), "weight_scale` are int32, not floating-point"),
    ("short-scale", put(".weight_scale", lambda t: t[:, :1]), r"\[64, 1\] where .* needs \[64, 2\]"),
    ("floats", put(".weight_packed", lambda t: t.float()), "weight_packed` is stored as float32 instead of int32"),
    ("overflow", put(".weight_scale", lambda t: t * 0 + 3e38), "is not finite once it is dequantised"),
    ("reordered", add(".weight_g_idx", torch.arange(64)), "weight_g_idx` is stored, which is not read"),
    ("twice", add(".weight", torch.zeros(64, 64)), r"q_proj.weight` is stored twice: .*q_proj.weight_packed"),
]


@pytest.fixture(scope="module")
def int4_group(compressed: Callable[[str, str], Written]) -> Tensors:
    return opened(compressed("int4-group", "compressed").path)


@pytest.mark.parametrize(("change", "words"), [pytest.param(*rest, id=name) for name, *rest in COMPRESSED])
def test_hostile_compressed_tensors(int4_group: Tensors, change: Change, words: str) -> None:
    """Absurd sizes, wrong types, missing and misshapen parts are refused by name."""
    refuses(copy.deepcopy(int4_group), change, words)


def test_uncalibrated_scales(compressed: Callable[[str, str], Written]) -> None:
    """Latents whose scales were never set have no effective weights."""
    weights = opened(compressed("int4-group", "frozen").path)
    refuses(weights, say(quantization_status="initialized"), "never calibrated")


def state(**entries: Any) -> Change:
    """Changes the JSON text beside the first query projection's 4-bit codes."""
    end = ".weight.quant_state.bitsandbytes__nf4"

    def changed(text: Tensor) -> Tensor:
        settings = json.loads(bytes(text.tolist())) | entries
        return torch.tensor(list(json.dumps(settings).encode()), dtype=torch.uint8)

    return put(end, changed)


STATE = ".weight.quant_state.bitsandbytes__nf4"
FOUR_BIT: list[tuple[str, Change, str]] = [
    ("neither", say(load_in_4bit=False), "load_in_4bit False and load_in_8bit False"),
    ("eight", say(load_in_4bit=False, load_in_8bit=True), r"no scales `...SCB` are stored"),
    ("text", say(load_in_4bit="yes"), "load_in_4bit 'yes'"),
    ("block", state(blocksize=-64), "blocksize of -64"),
    ("block-true", state(blocksize=True), "blocksize of True"),
    ("dtype", state(dtype="__class__"), "dtype of '__class__'"),
    ("type", state(quant_type="nf5"), "read is a quant_type of nf4 or fp4"),
    ("absurd", state(shape=[2**30, 2**30]), r"absmax` is \[64\] where .* needs \[18014398509481984\]"),
    ("negative", state(shape=[-64, -64]), r"a shape of \[-64, -64\], which is not that of a matrix"),
    ("three", state(shape=[64, 8, 8]), "which is not that of a matrix"),
    ("other-shape", state(shape=[32, 128]), r"misshapen .*q_proj.weight \[32, 128\] instead of \[64, 64\]"),
    ("json", put(STATE, lambda t: t[:-1]), "does not parse"),
    ("deep", add(STATE, torch.full((4000,), 91, dtype=torch.uint8)), "does not parse"),
    ("long", add(STATE, torch.zeros(10_000, dtype=torch.uint8)), "not a text of up to 4,096 bytes"),
    ("rows", put(".weight", lambda t: t[:10]), "has 10 bytes where"),
    ("no-absmax", drop(".weight.absmax"), "weight.absmax` is missing"),
    ("no-weight", drop(".weight"), "q_proj.weight` is missing, whose quant_state is stored"),
    ("no-state", drop(STATE), r"weight.absmax` is stored without the other tensors|quant_map` is stored without"),
    ("nan", put(".weight.absmax", lambda t: t * torch.nan), "absmax` hold a value that is not finite"),
    ("table", put(".weight.quant_map", lambda t: t.flip(0)), "not the table of nf4"),
    ("nested", state(nested_blocksize=0), "nested_blocksize of 0"),
    ("offset", state(nested_blocksize=256, nested_offset=float("nan")), "nested_offset of nan"),
    ("half-nested", state(nested_blocksize=256, nested_offset=0.1), "nested_absmax` is missing"),
]


@pytest.fixture(scope="module")
def nf4(by_bitsandbytes: Callable[[str, str], Written]) -> Tensors:
    return opened(by_bitsandbytes("llama", "nf4").path)


@pytest.mark.parametrize(("change", "words"), [pytest.param(*rest, id=name) for name, *rest in FOUR_BIT])
def test_hostile_four_bit(nf4: Tensors, change: Change, words: str) -> None:
    """A JSON text that does not fit its tensors, or is no such text, is refused by name."""
    refuses(copy.deepcopy(nf4), change, words)


EIGHT_BIT: list[tuple[str, Change, str]] = [
    ("no-scale", lambda w: (drop(".SCB")(w), drop(".weight_format")(w)), "stored as int8, and nothing beside it"),
    ("format-alone", drop(".SCB"), "weight_format` is stored without"),
    ("format", put(".weight_format", lambda t: t + 1), "another layout than rows"),
    ("rows", put(".SCB", lambda t: t[:10]), r"SCB` is \[10\] where .* needs \[64\]"),
    ("nan", put(".SCB", lambda t: t / 0), "SCB` hold a value that is not finite"),
    ("floats", put(".weight", lambda t: t.float()), "stored as float32 instead of int8"),
]


@pytest.fixture(scope="module")
def int8(by_bitsandbytes: Callable[[str, str], Written]) -> Tensors:
    return opened(by_bitsandbytes("llama", "int8").path)


@pytest.mark.parametrize(("change", "words"), [pytest.param(*rest, id=name) for name, *rest in EIGHT_BIT])
def test_hostile_eight_bit(int8: Tensors, change: Change, words: str) -> None:
    """Codes without their scale are never taken for weights."""
    refuses(copy.deepcopy(int8), change, words)


def head(**entries: Any) -> Change:
    """Changes what the header says of the first query projection."""

    def change(weights: Tensors) -> None:
        form = json.loads(weights.texts[f"{Q_PROJ}.weight"])
        data = form["_data"] | {key: value for key, value in entries.items() if not key.startswith("_")}
        form |= {"_data": data} | {key: value for key, value in entries.items() if key.startswith("_")}
        weights.texts[f"{Q_PROJ}.weight"] = json.dumps(form)

    return change


HEADERS: list[tuple[str, Change, str]] = [
    ("cuda", head(_type="Int4TilePackedTo4dTensor"), "Int4TilePackedTo4dTensor of torchao, which only kernels"),
    ("int4", head(_type="Int4Tensor"), "a Int4Tensor of torchao, which only kernels of an accelerator"),
    ("part", head(_tensor_data_names=["qdata", "scale", "act_pre_scale"]), "a part 'act_pre_scale', which is not read"),
    ("parts", head(_tensor_data_names=["scale"]), "is missing, without which"),
    ("block", head(block_size=[1, -32]), r"block_size of \[1, -32\]"),
    ("blocks", head(block_size=[1, 48]), r"\[64, 64\], which blocks of \[1, 48\] do not divide"),
    ("block-huge", head(block_size=[1, 10**30]), "which is not a list of sizes"),
    ("rank", head(block_size=[32]), r"which blocks of \[32\] do not divide"),
    ("dtype", head(dtype={"_type": "torch.dtype", "_data": "load"}), "a dtype of .*'load'"),
    ("unsaid", lambda w: w.texts.pop(f"{Q_PROJ}.weight"), "does not say what .*q_proj.weight` is: None"),
    ("garbled", lambda w: w.texts.update({f"{Q_PROJ}.weight": "{"}), "does not say what .*q_proj.weight` is"),
    ("names", lambda w: w.texts.update(tensor_names="[1]"), r"tensor_names` in a header is \[1\]"),
    ("names-deep", lambda w: w.texts.update(tensor_names="[" * 10**6), "tensor_names` in a header does not parse"),
    ("unnamed", lambda w: w.texts.update(tensor_names='["lm_head.weight"]'), "name no quantised tensor"),
    ("one-unnamed", lambda w: w.texts.update(tensor_names=f'["{Q_PROJ}.weight"]'), "do not say which tensor it is"),
    ("no-scale", drop("._weight_scale"), "q_proj._weight_scale` is missing"),
    ("no-codes", drop("._weight_qdata"), "q_proj._weight_qdata` or .* is missing"),
    ("scale", put("._weight_scale", lambda t: t[:10]), r"_weight_scale` is \[10, 2\] where .* needs \[64, 2\]"),
    ("nan", put("._weight_scale", lambda t: t * torch.nan), "_weight_scale` hold a value that is not finite"),
    ("floats", put("._weight_qdata", lambda t: t.float()), "stored as float32 instead of int8"),
    ("clash", add(".weight", torch.zeros(64, 64)), "q_proj.weight` is stored twice"),
]


@pytest.fixture(scope="module")
def ao_int4(by_torchao: Callable[..., Written]) -> Tensors:
    return opened(by_torchao("int4").path)


@pytest.mark.parametrize(("change", "words"), [pytest.param(*rest, id=name) for name, *rest in HEADERS])
def test_hostile_torchao(ao_int4: Tensors, change: Change, words: str) -> None:
    """A header that does not fit its tensors is refused, and classes of an accelerator by name."""
    refuses(copy.deepcopy(ao_int4), change, words)


BITNET: list[tuple[str, Change, str]] = [
    ("class", say(linear_class="linear"), "linear_class 'linear'; read are autobitlinear, bitlinear"),
    ("mode", say(quantization_mode=3), "quantization_mode 3; read are offline, online"),
    ("norm", say(use_rms_norm=True), "use_rms_norm True: the layers then hold norms"),
    ("skipped", say(modules_to_not_convert="lm_head"), "modules_to_not_convert 'lm_head', which is not a list"),
    ("pattern", say(modules_to_not_convert=["(.*)*x"]), "more repetitions than are tried"),
    ("everything", say(modules_to_not_convert=[".*"]), "no linear layer that it would quantise"),
    ("skip-packed", say(modules_to_not_convert=["model.layers.0", "lm_head"]), "leaves its layer as it is"),
    ("latents", say(linear_class="autobitlinear", quantization_mode="online"), "weights are latents, but `.*_scale`"),
    ("rows", put(".weight", lambda t: t[:10]), r"packed as \[10, 64\]: .* it cannot be \[64, 64\]"),
    ("plain", put(".weight", lambda t: torch.zeros(64, 64)), r"packed as \[64, 64\]"),
    ("code", put(".weight", lambda t: t | 3), "holds the code 3"),
    ("dtype", put(".weight", lambda t: t.to(torch.int8)), "stored as int8 instead of uint8"),
    ("no-scale", drop(".weight_scale"), "weight_scale` is missing"),
    ("scales", put(".weight_scale", lambda t: t.repeat(64)), r"weight_scale` is \[64\] where .* needs \[1\]"),
    ("nan", put(".weight_scale", lambda t: t * torch.nan), "weight_scale` hold a value that is not finite"),
    ("zero", put(".weight_scale", lambda t: t * 0), "weight_scale` is 0, and weights are divided by it"),
]


@pytest.fixture(scope="module")
def ternary(by_bitnet: Callable[[str, str], Written]) -> Tensors:
    return opened(by_bitnet("bitlinear", "offline").path)


@pytest.mark.parametrize(("change", "words"), [pytest.param(*rest, id=name) for name, *rest in BITNET])
def test_hostile_bitnet(ternary: Tensors, change: Change, words: str) -> None:
    """Codes that are not ternary, shapes that do not fit the model and settings that are not read are refused."""
    refuses(copy.deepcopy(ternary), change, words)


def test_what_nobody_knows_is_named(nf4: Tensors) -> None:
    """A tensor beside the parts that the method knows reaches the check against the model, which names it."""
    weights = copy.deepcopy(nf4)
    weights.tensors[f"{Q_PROJ}.codebook"] = torch.zeros(3)
    with pytest.raises(WeightsMismatch, match=r"unexpected model.layers.0.self_attn.q_proj.codebook"):
        read_whole(weights)


JUNK = (None, True, -1, 10**400, 1e308, float("nan"), "", "x" * 5000, "re:(", [], [[1]], ["Linear", 7], {}, {"a": {}})


def leaves(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Where the values of nested objects and lists are, these themselves included."""
    if path:
        yield path
    pairs = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in pairs:
        yield from leaves(inner, (*path, key))


def replaced(value: Any, path: tuple[Any, ...], junk: Any) -> Any:
    """A copy of nested objects and lists with one value replaced."""
    result = copy.deepcopy(value)
    inner = result
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = junk
    return result


def outcome(weights: Tensors) -> str | tuple[int, ...]:
    """What a refusal says, or else the shape of the matrix that was read. Any other error passes through."""
    try:
        return tuple(unpack(weights).weights.read(f"{Q_PROJ}.weight").shape)
    except CheckpointError as error:
        return error.what


@pytest.mark.parametrize("fixture", ["int4_group", "nf4", "int8", "ao_int4", "ternary"])
def test_any_value_of_the_settings(fixture: str, request: pytest.FixtureRequest) -> None:
    """Whatever one value of quantization_config is, the matrix is read or the checkpoint refused in few words."""
    original: Tensors = request.getfixturevalue(fixture)
    outcomes = []
    for path in leaves(original.settings):
        for junk in JUNK:
            config = original.own_config | {"quantization_config": replaced(original.settings, path, junk)}
            outcomes.append(outcome(Tensors(config, original.tensors, original.texts)))
    assert {shape_or_words for shape_or_words in outcomes if not isinstance(shape_or_words, str)} <= {(64, 64)}
    assert 0 < max(len(shape_or_words) for shape_or_words in outcomes if isinstance(shape_or_words, str)) < 1000


@pytest.mark.parametrize("fixture", ["nf4", "ao_int4"])
def test_any_value_beside_the_tensors(fixture: str, request: pytest.FixtureRequest) -> None:
    """The same for what the JSON text beside a matrix says."""
    original: Tensors = request.getfixturevalue(fixture)
    four_bit = fixture == "nf4"
    text = bytes(original.tensors[Q_PROJ + STATE].tolist()) if four_bit else original.texts[f"{Q_PROJ}.weight"]
    stated, outcomes = json.loads(text), []
    for path in leaves(stated):
        for junk in JUNK:
            changed = json.dumps(replaced(stated, path, junk))
            weights = Tensors(original.own_config, dict(original.tensors), dict(original.texts))
            if four_bit:
                weights.tensors[Q_PROJ + STATE] = torch.tensor(list(changed.encode()), dtype=torch.uint8)
            else:
                weights.texts[f"{Q_PROJ}.weight"] = changed
            outcomes.append(outcome(weights))
    assert {shape_or_words for shape_or_words in outcomes if not isinstance(shape_or_words, str)} <= {(64, 64)}
    assert 0 < max(len(shape_or_words) for shape_or_words in outcomes if isinstance(shape_or_words, str)) < 1000
