"""Checkpoints that are hostile or broken, each with the words in which it has to be refused."""

from __future__ import annotations

import ctypes
import functools
import io
import json
import os
import pickle
import re
import shutil
import socket
import stat
import struct
import tempfile
import warnings
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load, save
from transformers import LlamaConfig, LlamaForCausalLM

from tests import zoo
from tests.contracts import test_dcp_format as dcp_files
from tests.contracts import test_formats as safetensors_files
from tests.contracts import test_torch_format as torch_files

CANARY = torch_files.MARK
"""The file that every payload would make if it ran."""

Make = Callable[[Path], object]


@dataclass(frozen=True)
class Hostile:
    """An entry `name` of the watched folder, put there by `make`; `words` is a pattern of what its refusal says.

    `opened` says that only opening it shows what it is, which takes a worker.
    """

    name: str
    make: Make
    words: str
    opened: bool = False

    @property
    def tag(self) -> str:
        """The part of the name that is printed as it is, however the rest is."""
        match = re.match(r"[\w.=-]+", self.name, re.ASCII)
        assert match is not None
        return match[0]


def refused_at_a_look() -> list[Hostile]:
    """Those whose names, headers or markers give them away."""
    return [
        *_headers(),
        *_torch_single_files(),
        *_torch_folders(),
        *_distributed(),
        *_bombs(),
        *_links(),
        *_special_files(),
        *_configs_seen_at_once(),
        *_trainer_states(),
        *_names(),
        *_permissions(),
    ]


def refused_when_opened() -> list[Hostile]:
    """Those that look whole."""
    return [*_configs(), *_weights()]


# ---------------------------------------------------------------- pieces


@functools.cache
def sound() -> tuple[bytes, bytes]:
    """config.json and model.safetensors of a tiny trained model."""
    with tempfile.TemporaryDirectory() as name:
        zoo.build("llama", steps=20).save_pretrained(name)
        return (Path(name) / "config.json").read_bytes(), (Path(name) / "model.safetensors").read_bytes()


def good(path: Path, step: int = 5) -> Path:
    """A checkpoint of Trainer that is to be peeled; what lies beside its weights would run if anybody imported it."""
    config, weights = sound()
    code = {"auto_map": {"AutoModelForCausalLM": "modeling_evil.Evil", "AutoConfig": "modeling_evil.Evil"}}
    files = {
        "config.json": json.dumps(json.loads(config) | code).encode(),
        "model.safetensors": weights,
        "trainer_state.json": b'{"global_step": %d}' % step,
        "optimizer.pt": torch_files.saved(torch_files.Reduced(os.system, torch_files.TOUCH)),
        "training_args.bin": torch_files.saved(torch_files.Reduced(os.system, torch_files.TOUCH)),
        "rng_state.pth": torch_files.saved(torch_files.Reduced(os.system, torch_files.TOUCH)),
    }
    folder(files)(path)
    return shadows(path)


def shadows(path: Path) -> Path:
    """Puts modules into a folder that would run if it were on the import path."""
    for module in (
        "torch",
        "numpy",
        "json",
        "psutil",
        "transformers",
        "modeling_evil",
        "sitecustomize",
        "usercustomize",
    ):
        (path / f"{module}.py").write_text(f"open({str(CANARY)!r}, 'w')\nraise SystemExit('{module} was imported')\n")
    return path


def folder(files: Mapping[str, bytes]) -> Make:
    """A folder of these files; without one, its config.json is `{}`."""

    def make(path: Path) -> None:
        path.mkdir()
        for name, content in {"config.json": b"{}", **files}.items():
            (path / name).parent.mkdir(exist_ok=True)
            (path / name).write_bytes(content)

    return make


def file(content: Callable[[], bytes]) -> Make:
    return lambda path: path.write_bytes(content())


def _slug(text: str) -> str:
    return re.sub(r"\W+", "-", text, flags=re.ASCII).strip("-")


HEADER = safetensors_files.header_file
ENTRY = safetensors_files.entry
ONE_TENSOR = HEADER({"w": ENTRY()}, 4)
SHELL = torch_files.Reduced(os.system, torch_files.TOUCH)


# ---------------------------------------------------------------- safetensors


def _headers() -> Iterator[Hostile]:
    for name, (content, _, reason) in safetensors_files.HOSTILE.items():
        words = r"model\.safetensors.*" + reason.removeprefix("model.safetensors")
        yield Hostile(f"header-{_slug(name)}", folder({"model.safetensors": content}), words)
    # Every way of a tensor to be larger than anything.
    shapes: dict[str, tuple[list[int], str]] = {
        "2-60-elements": ([2**60], r"of [\d,]+ bytes|has 4 bytes where shape"),
        "10000-dimensions": ([1] * 10_000, "has a shape"),
        "2-62-squared": ([2**62, 2**62], "has 4 bytes where shape"),
    }
    for name, (shape, words) in shapes.items():
        content = HEADER({"w": ENTRY("F32", shape)}, 4)
        yield Hostile(f"shape-{name}", folder({"model.safetensors": content}), words)
    flood = (
        b"{" + b",".join(b'"%d":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}' % n for n in range(1_000_003)) + b"}"
    )
    yield Hostile("tensors-1000003", folder({"model.safetensors": HEADER(flood)}), "more than [0-9,]+ tensors")
    twice = b'{"w":{"dtype":"U8","shape":[4],"data_offsets":[0,4]},"w":{"dtype":"U8","shape":[3],"data_offsets":[0,3]}}'
    yield Hostile(
        "header-key-twice", folder({"model.safetensors": HEADER(twice, 4)}), "has [0-9]+ bytes where its header"
    )
    index = safetensors_files.index_file
    shard = "a-00001-of-00001.safetensors"
    for name, weight_map, words in (
        ("outside", {"w": "../../../../etc/passwd"}, "names the shard '../../../../etc/passwd'"),
        ("absolute", {"w": "/etc/passwd"}, "names the shard '/etc/passwd'"),
        ("another", {"v": shard}, f"says that {shard} holds `v`; it does not"),
        ("missing", {"w": "b-00001-of-00001.safetensors"}, "b-00001-of-00001.safetensors is not there"),
    ):
        files = {"model.safetensors.index.json": index(weight_map), shard: ONE_TENSOR}
        yield Hostile(f"index-{name}", folder(files), re.escape(words))


# ---------------------------------------------------------------- torch.save


def _torch_single_files() -> Iterator[Hostile]:
    """Every hostile file of the format's own tests, directly in the watched folder."""
    for number, (name, (make, reason)) in enumerate(torch_files.HOSTILE.items()):
        suffix = (".pt", ".ckpt", ".pth")[number % 3]
        yield Hostile(f"file-{_slug(name)}{suffix}", file(make), "(?s)" + reason)
    yield Hostile("file-archive-in-archive.pt", file(_nested), "has 2 members data.pkl")
    yield Hostile("file-bare-pickle.pt", file(lambda: pickle.dumps(SHELL)), "is a bare pickle")
    yield Hostile("file-protocol-0.ckpt", file(lambda: pickle.dumps(SHELL, protocol=0)), "is no zip archive")


def _nested() -> bytes:
    inner = torch_files.saved(SHELL)
    members = {"archive/data.pkl": torch_files.PICKLE, "archive/data/0": torch_files.DATA}
    return torch_files.zipped({**members, "inner/data.pkl": inner})


def _torch_folders() -> Iterator[Hostile]:
    for name, (make, reason) in torch_files.CODE.items():
        yield Hostile(f"bin-{_slug(name)}", _bin_folder(make), reason)
    for name in ("reduce", "persistent id"):
        shard = "pytorch_model-00001-of-00002.bin"
        data = (
            torch_files.saved({"w": SHELL}) if name == "reduce" else torch_files.lying(storage=b"cposix\nsystem\n)RQ")
        )
        index = torch_files.index_file({"w": shard, "v": "pytorch_model-00002-of-00002.bin"})
        files = {"pytorch_model.bin.index.json": index, shard: data, "pytorch_model-00002-of-00002.bin": data}
        yield Hostile(f"bin-shard-{_slug(name)}", folder(files), torch_files.RUNS)


def _bin_folder(content: Callable[[], bytes]) -> Make:
    def make(path: Path) -> None:
        folder({"pytorch_model.bin": content()})(path)

    return make


# ---------------------------------------------------------------- torch.distributed.checkpoint


def _distributed() -> Iterator[Hostile]:
    bomb = dcp_files.Run(os.system, torch_files.TOUCH)
    for position in dcp_files.POSITIONS.split():
        make = functools.partial(dcp_files.changed, **{position: bomb})
        yield Hostile(f"dcp-call-{position}", _dcp(make), r"\.metadata names posix\.system")
    yield Hostile("dcp-call-all", _dcp(lambda: bomb), r"\.metadata names posix\.system")
    for name, (content, state, reason) in dcp_files.PICKLES.items():
        yield Hostile(f"dcp-pickle-{_slug(name)}", _dcp(lambda content=content: content), reason.replace("^", ""))
        del state
    for name, (make, _, reason) in dcp_files.LIES.items():
        yield Hostile(f"dcp-lie-{_slug(name)}", _dcp(make), reason.replace("^", ""))


def _dcp(make: Callable[[], object], item: bytes = dcp_files.ITEM) -> Make:
    def put(path: Path) -> None:
        with tempfile.TemporaryDirectory(dir=path.parent.parent) as name:
            shutil.move(dcp_files.folder_of(Path(name), make(), item), path)

    return put


# ---------------------------------------------------------------- bombs


def _bombs() -> Iterator[Hostile]:
    for member in ("data.pkl", "data/0"):
        yield Hostile(f"bomb-{_slug(member)}.pt", file(functools.partial(_deflated, member)), "compressed or encrypted")


def _deflated(member: str) -> bytes:
    """256 MiB of zeros in a quarter of a megabyte."""
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in {"data.pkl", "data/0"} - {member}:
            archive.writestr(zipfile.ZipInfo(f"archive/{name}"), torch_files.PICKLE)
        archive.writestr(f"archive/{member}", bytes(256 << 20), compresslevel=1)
    return stream.getvalue()


# ---------------------------------------------------------------- links and special files


def _in_place(name: str, put: Callable[[Path], object], files: Mapping[str, bytes]) -> Make:
    """A folder in which one file is something else."""

    def make(path: Path) -> None:
        folder(files)(path)
        (path / name).unlink(missing_ok=True)
        put(path / name)

    return make


_STATED = {"model.safetensors": ONE_TENSOR, "trainer_state.json": b'{"global_step": 901}'}
_FILES: Mapping[str, tuple[str, Mapping[str, bytes]]] = {
    "config.json": ("", {"model.safetensors": ONE_TENSOR}),
    "model.safetensors": ("", {}),
    "pytorch_model.bin": ("", {}),
    "trainer_state.json": ("checkpoint-901", _STATED),
    "model.safetensors.index.json": ("", {"a-00001-of-00001.safetensors": ONE_TENSOR}),
}


def _links() -> Iterator[Hostile]:
    for name, (slug, files) in _FILES.items():
        make = _in_place(name, _link_to("/etc/passwd"), files)
        yield Hostile(slug or f"link-{_slug(name)}", make, f"{name} is a link to /etc/passwd, outside")
    shard = "a-00001-of-00001.safetensors"
    index = {"model.safetensors.index.json": safetensors_files.index_file({"w": shard})}
    metadata = {".metadata": pickle.dumps(dcp_files.sound())}
    for label, name, target, beside, words in (
        ("shard", shard, "/etc/passwd", index, f"{shard} is a link to /etc/passwd, outside"),
        ("distcp", "__0_0.distcp", "/etc/passwd", metadata, "__0_0.distcp is a link to /etc/passwd, outside"),
        (
            "accelerate-folder",
            "pytorch_model_fsdp_0",
            "/etc",
            {},
            r"pytorch_model_fsdp_0/\.metadata is (a link|not the)",
        ),
        ("itself", "model.safetensors", "model.safetensors", {}, "Too many levels of symbolic links"),
        ("nothing", "model.safetensors", "gone", {}, "model.safetensors is not there"),
        ("nothing-outside", "model.safetensors", "/gone", {}, "model.safetensors is a link to /gone, outside"),
        ("a-folder", "model.safetensors", ".", {}, "model.safetensors is not a regular file"),
        ("dev-zero", "model.safetensors", "/dev/zero", {}, "model.safetensors is a link to /dev/zero, outside"),
        ("up-and-out", "model.safetensors", "../checkpoint-5/model.safetensors", {}, "is a link to .*, outside"),
        ("proc", "model.safetensors", "/proc/self/mem", {}, "is a link to /proc/.*, outside"),
    ):
        yield Hostile(f"link-to-{label}", _in_place(name, _link_to(target), beside), words)


def _link_to(target: str) -> Callable[[Path], None]:
    return lambda path: path.symlink_to(target)


def _special_files() -> Iterator[Hostile]:
    not_regular = "is not a regular file"
    for name in ("config.json", "model.safetensors", "pytorch_model.bin", "model.safetensors.index.json"):
        yield Hostile(f"pipe-{_slug(name)}", _in_place(name, os.mkfifo, _FILES[name][1]), f"{name} {not_regular}")
    make = _in_place("__0_0.distcp", os.mkfifo, {".metadata": pickle.dumps(dcp_files.sound())})
    yield Hostile("pipe-distcp", make, f"__0_0.distcp {not_regular}")
    for name in ("config.json", "model.safetensors"):
        make = _in_place(name, _socket, _FILES[name][1])
        yield Hostile(f"socket-{_slug(name)}", make, f"{name} cannot be read: No such device or address")
        yield Hostile(f"folder-{_slug(name)}", _in_place(name, Path.mkdir, _FILES[name][1]), f"{name} {not_regular}")
    if os.geteuid() == 0:  # nobody else can make one
        make = _in_place("model.safetensors", _device, {})
        yield Hostile("device-model-safetensors", make, f"model.safetensors {not_regular}")


def _socket(path: Path) -> None:
    """Bound by way of its folder's descriptor: a socket's path may have 107 bytes, and pytest's folders are deep."""
    descriptor = os.open(path.parent, os.O_PATH)
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(f"/proc/self/fd/{descriptor}/{path.name}")
    os.close(descriptor)


def _device(path: Path) -> None:
    os.mknod(path, 0o666 | stat.S_IFCHR, os.makedev(1, 5))  # /dev/zero, which has no end


# ---------------------------------------------------------------- config.json and trainer_state.json


def _configs_seen_at_once() -> Iterator[Hostile]:
    weights = {"model.safetensors": ONE_TENSOR}
    for name, content, words in (
        ("list", b"[]", "config.json holds a JSON list"),
        ("text", b'"llama"', "config.json holds a JSON str"),
        ("binary", b"\x80\x04\x95", "config.json does not parse"),
        ("deep", b'{"a":' * 100_000 + b"1" + b"}" * 100_000, "config.json does not parse"),
        ("long-number", b'{"hidden_size": 1' + b"0" * 5000 + b"}", "config.json does not parse"),
        ("100-mb", b"{" + b" " * 100_000_000 + b"}", "config.json has 100,000,002 bytes, more than"),
    ):
        yield Hostile(f"config-{name}", folder({**weights, "config.json": content}), words)


def _trainer_states() -> Iterator[Hostile]:
    for step, state, words in (
        (911, b'{"global_step": 912}', "says global_step 912 in checkpoint-911"),
        (913, b'{"global_step": "913"}', "has global_step '913', not a count"),
        (914, b'{"global_step": 914, "global_step": -1}', "has global_step -1, not a count"),
        (915, b'{"global_step": 9.15e2}', "has global_step 915.0, not a count"),
        (916, b'{"global_step": ' + b"[" * 100_000, "trainer_state.json does not parse"),
        (917, b'{"global_step": ' + b"9" * 4000 + b"}", "says global_step 9,999"),
    ):
        files = {"model.safetensors": ONE_TENSOR, "trainer_state.json": state}
        yield Hostile(f"checkpoint-{step}", folder(files), words)
    files = {"model.safetensors": ONE_TENSOR, "trainer_state.json": b"{}", "checkpoint-is-incomplete.txt": b""}
    yield Hostile("checkpoint-918", folder(files), "checkpoint-is-incomplete.txt is there")
    yield Hostile("checkpoint-919", lambda path: path.mkdir(), "neither model.safetensors nor")


CONFIG_FAULTS: Mapping[str, tuple[dict[str, object], str]] = {
    "control characters": ({"model_type": "\x1b[2J\r\nevil"}, r"covers model_type `\\x1b\[2J +evil`"),
    "negative width": ({"hidden_size": -16}, "config.json"),
    "text for a width": ({"hidden_size": "16"}, "'hidden_size' expected int, got str"),
    "endless width": ({"hidden_size": 2**60}, "config.json"),
    "infinite width": ({"hidden_size": float("inf")}, "'hidden_size' expected int, got float"),
    "negative vocabulary": ({"vocab_size": -1}, "config.json"),
    "endless vocabulary": ({"vocab_size": 2**60}, "config.json"),
    "no heads": ({"num_attention_heads": 0}, "config.json"),
    "a list of heads": ({"num_attention_heads": [4]}, "heads"),
    "endless heads": ({"head_dim": 2**52}, "config.json"),
    "text for positions": ({"max_position_embeddings": "many"}, "'max_position_embeddings' expected int"),
    "padding outside": ({"pad_token_id": 999}, "config.json"),
    "a call as activation": ({"hidden_act": "os.system"}, "os.system"),
    "a call as dtype": ({"dtype": "os.system"}, "config.json"),
    "text for a norm": ({"rms_norm_eps": "x"}, "'rms_norm_eps' expected float, got str"),
    "unknown layers": ({"layer_types": ["evil"] * 4}, "layer_types"),
    "text for rotations": ({"rope_parameters": "x"}, "'rope_parameters'"),
    "unknown rotations": ({"rope_parameters": {"rope_type": "evil", "rope_theta": "x"}}, "evil"),
    "another class": ({"__class__": "evil"}, "config.json"),
    "a method": ({"to_dict": 1, "get_text_config": 1, "validate": 1}, "config.json"),
    "text for a quantiser": ({"quantization_config": "evil"}, "quantization_config"),
    "an unknown quantiser": ({"quantization_config": {"quant_method": "evil"}}, "evil"),
    "900 deep": ({"a": functools.reduce(lambda inner, _: {"a": inner}, range(900), {})}, "config.json"),
}
"""What is changed in a sound config.json, and a pattern of its refusal."""


def changed_config(**changes: object) -> Make:
    """A sound folder but for these keys of its config.json."""
    config, weights = sound()
    return folder({"config.json": json.dumps(json.loads(config) | changes).encode(), "model.safetensors": weights})


def _configs() -> Iterator[Hostile]:
    code = {"AutoConfig": "modeling_evil.Evil", "AutoModelForCausalLM": "modeling_evil.Evil"}
    make = changed_config(model_type="evil", auto_map=code)
    words = "no family plug-in covers model_type `evil`"
    yield Hostile("config-auto-map", lambda path: (make(path), shadows(path)), words, opened=True)


def heavy() -> list[Hostile]:
    """Those that are small on disk beside what a careless reader makes of them, or that it reads for long."""
    metadata = b"\x80\x04" + b"(" * 30 + b"N" * 30
    return [
        Hostile("header-of-lists", _made(lambda: {"model.safetensors": HEADER(_lists())}), "model.safetensors"),
        Hostile("header-of-999999-tensors", _made(_million), ""),
        Hostile("name-of-90-mb", _made(lambda: {"model.safetensors": HEADER({"x" * 90_000_000: 1})}), "model.safetens"),
        Hostile("config-of-lists", _made(lambda: {"config.json": b'{"a":' + _lists() + b"}"}), "config.json"),
        Hostile("index-of-names", _made(_index), "model.safetensors.index.json"),
        Hostile("checkpoint-920", _made(lambda: {"trainer_state.json": b'{"a":' + _lists()}), "trainer_state.json"),
        Hostile("operations.pt", file(lambda: torch_files.pickled(b"]" + b"N0" * 1_499_000 + b".")), "state dict"),
        Hostile("metadata-of-60-mb", _dcp(lambda: metadata * 1_000_000), r"\.metadata"),
    ]


def _made(files: Callable[[], Mapping[str, bytes]]) -> Make:
    """A folder whose large files come to be only now."""

    def make(path: Path) -> None:
        made = files()
        folder(made if "model.safetensors.index.json" in made else {"model.safetensors": ONE_TENSOR, **made})(path)

    return make


def _lists() -> bytes:
    return b"[" + b"[]," * 33_000_000 + b"[]]"


def _million() -> dict[str, bytes]:
    entries = (b'"%d":{"dtype":"U8","shape":[1],"data_offsets":[%d,%d]}' % (n, n, n + 1) for n in range(999_999))
    return {"model.safetensors": HEADER(b"{" + b",".join(entries) + b"}", 999_999)}


def _index() -> dict[str, bytes]:
    entries = b'"a":"b.safetensors",' * 4_900_000
    return {"model.safetensors.index.json": b'{"weight_map":{' + entries + b'"a":"b.safetensors"}}'}


# ---------------------------------------------------------------- weights that look whole


def _weights() -> Iterator[Hostile]:
    finite = "not a finite number"
    yield Hostile("weights-nan", _altered(torch.nan), finite, opened=True)
    yield Hostile("weights-infinite \udcff\udcfe", _altered(torch.inf), finite, opened=True)
    yield Hostile("weights-of-4-tebibytes", _sparse, "memory", opened=True)
    names = {"\x1b[2J\x1b[31m\r\nALERT": torch.ones(1), "x" * 100_000: torch.ones(1)}
    config, weights = sound()
    make = folder({"config.json": config, "model.safetensors": save(load(weights) | names)})
    yield Hostile("weights-named-for-a-terminal", make, "do not fit config.json.*unexpected", opened=True)
    other = folder(
        {"pytorch_model.bin": torch_files.saved({"w": torch.frombuffer(bytearray(_nested()), dtype=torch.uint8)})}
    )
    yield Hostile("weights-that-are-an-archive", other, "model_type `\\(none\\)`", opened=True)
    yield Hostile("weights-dcp-shard-calls", _shard_that_calls, r"data\.pkl names posix\.system", opened=True)


def _altered(number: float) -> Make:
    """Sound but for one number of one matrix."""
    config, weights = sound()
    tensors = load(weights)
    tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = number
    return folder({"config.json": config, "model.safetensors": save(tensors)})


def _sparse(path: Path) -> None:
    """A file as long as its header says that takes no room: an embedding of 4 TiB, and config.json agrees."""
    config = json.loads(sound()[0]) | {"vocab_size": 2**24, "hidden_size": 2**16, "num_hidden_layers": 1}
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**config))
    header, at = {}, 0
    for name, tensor in model.state_dict().items():
        size = 4 * tensor.numel()
        header[name] = ENTRY("F32", list(tensor.shape), [at, at + size])
        at += size
    text = json.dumps(header).encode()
    folder({"config.json": json.dumps(config).encode()})(path)
    weights = path / "model.safetensors"
    weights.write_bytes(struct.pack("<Q", len(text)) + text)
    os.truncate(weights, 8 + len(text) + at)


def _shard_that_calls(path: Path) -> None:
    """What torch.distributed.checkpoint writes, with a call in place of every tensor's own."""
    config, weights = sound()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that torch.distributed is not initialised
        dcp.save({"model": load(weights)}, checkpoint_id=path)
    (path / "config.json").write_bytes(config)
    old, new = b"ctorch._utils\n_rebuild_tensor_v2\n", b"cposix\nsystem\n"
    shard = path / "__0_0.distcp"
    shard.write_bytes(shard.read_bytes().replace(old, new + b"N0" * 9 + b"N"))


# ---------------------------------------------------------------- names and permissions


def _names() -> Iterator[Hostile]:
    make, words = folder({"model.safetensors": ONE_TENSOR[:-1]}), "model.safetensors has [0-9,]+ of [0-9,]+ bytes"
    yield Hostile("name-escape-\x1b[2J\x1b]0;title\x07", make, words)
    yield Hostile("name-newline-\ncannot use everything: forged\r", make, words)
    yield Hostile("name-long " + "x" * 245, make, words)
    yield Hostile("name-unicode-\u202egnp.\u200b\u0085", make, words)
    yield Hostile("name-format-{0}%s%n$(touch x)`x`'\";", make, words)
    yield Hostile("name-not-utf8-\udcff\udcfe", make, words)


def _permissions() -> Iterator[Hostile]:
    def closed(path: Path) -> None:
        folder({"model.safetensors": ONE_TENSOR})(path)
        (path / "model.safetensors").chmod(0)

    yield Hostile("permission-denied", closed, "model.safetensors cannot be read: Permission denied")


def give_up_root_s_privileges() -> None:
    """For `preexec_fn`: a root that reads only what the permissions of a file let it read, as any other user does."""
    if os.geteuid() == 0:
        libc = ctypes.CDLL(None, use_errno=True)
        for capability in (1, 2):  # CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH
            libc.prctl(24, capability, 0, 0, 0)  # PR_CAPBSET_DROP: what is executed next has it no more
