"""Every layout gives the tensors that torch wrote, bit for bit; every kind of damage is one readable message."""

import contextlib
import json
import os
import pickle
import shutil
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from flacuna_jax.errors import UserError
from flacuna_jax.huggingface.files import tensors
from flacuna_jax.huggingface.files.read import open_checkpoint
from flacuna_jax.huggingface.files.torch_file import read_torch_file
from tests.huggingface.checkpoints import Written, save
from tests.tiny import SMALL
from tests.torch_models import torch, torch_llama

LAYOUTS = ["safetensors", "safetensors sharded", "bin", "bin sharded", "bin old"]


def same_bits(ours: np.ndarray, theirs: torch.Tensor) -> bool:
    return (
        ours.shape == tuple(theirs.shape)
        and ours.tobytes() == theirs.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes()
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_tensors_are_bit_identical_to_torch(layout: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model = torch_llama(SMALL).to(dtype)
    save(model, tmp_path, layout)
    reader = open_checkpoint(tmp_path)
    state = model.state_dict()
    assert set(reader) == set(state)
    for name, tensor in state.items():
        assert same_bits(reader.read(name), tensor), name
        assert reader.dtype(name).name == str(tensor.dtype).removeprefix("torch.")


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "old stream"])
def test_views_strides_and_shared_storages(zipped: bool, tmp_path: Path) -> None:
    whole = torch.arange(120, dtype=torch.float32).reshape(4, 30)
    state = {
        "transposed": whole.t(),
        "columns": whole[:, 3:20:4],
        "row": whole[2],
        "scalar": whole[1, 1],
        "repeated": whole[:1].expand(5, 30),
        "empty": torch.zeros(0, 7),
        "integers": torch.arange(-5, 5, dtype=torch.int8),
        "truth": torch.tensor([True, False]),
    }
    torch.save(state, tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)
    reader = open_checkpoint(tmp_path)
    for name, tensor in state.items():
        np.testing.assert_array_equal(reader.read(name), tensor.numpy(), err_msg=name)
        if tensor.ndim:
            np.testing.assert_array_equal(reader.read(name, slice(1, 3)), tensor.numpy()[1:3], err_msg=name)


def test_pages_read_once_leave_memory_and_stay_readable(plain: Written, monkeypatch: pytest.MonkeyPatch) -> None:
    forgotten: list[int] = []
    forget = tensors.forget

    def counted(descriptor: int, start: int, size: int) -> None:
        forgotten.append(size)
        forget(descriptor, start, size)

    monkeypatch.setattr(tensors, "_LINGERING", 10_000)
    monkeypatch.setattr(tensors, "forget", counted)
    reader = open_checkpoint(plain.path, once=True)
    views = {name: reader.read(name) for name in reader}
    total = sum(view.nbytes for view in views.values())
    assert total - 10_000 <= sum(forgotten) < 2 * total
    for name, tensor in plain.model.state_dict().items():
        assert same_bits(views[name], tensor), name
    count = len(forgotten)
    assert all(map(np.size, map(open_checkpoint(plain.path).read, reader)))
    assert len(forgotten) == count


def test_views_are_of_the_file_and_read_only(plain: Written) -> None:
    view = open_checkpoint(plain.path).read("model.embed_tokens.weight")
    assert not view.flags.owndata
    with pytest.raises(ValueError, match="read-only"):
        view[0, 0] = 1


class Exploit:
    """The effect of a malicious checkpoint on a program that unpickles it."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Callable, tuple]:
        return os.system, (f"touch {self.marker}",)


def write_zip(path: Path, raw: bytes) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", raw)


def malicious_pickles(marker: Path) -> dict[str, bytes]:
    exploit = pickle.dumps({"model.norm.weight": Exploit(marker)}, protocol=2)
    marker_text = str(marker).encode()
    return {
        "reduce": exploit,
        "protocol 0": pickle.dumps(Exploit(marker), protocol=0),
        "protocol 4": pickle.dumps(Exploit(marker), protocol=4),
        "inst": b"(S'touch " + marker_text + b"'\nios\nsystem\n.",
        "obj": b"(cos\nsystem\nS'touch " + marker_text + b"'\no.",
        "through builtins": b"c__builtin__\neval\n(S'open(\"" + marker_text + b'", "w")\'\ntR.',
        "through torch": b"ctorch.hub\nload\n(S'x'\ntR.",
        "attribute of an allowed name": b"ccollections\nOrderedDict.__init__.__globals__\n.",
        "build on a class": b"\x80\x02ccollections\nOrderedDict\n}U\x08__call__cos\nsystem\nsb.",
        "extension registry": b"\x80\x02\x82\x01.",
        "new object": b"\x80\x02ccollections\nOrderedDict\n)\x81.",
    }


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "stream"])
@pytest.mark.parametrize("kind", list(malicious_pickles(Path("x"))))
def test_a_malicious_pickle_is_rejected_and_not_executed(kind: str, zipped: bool, tmp_path: Path) -> None:
    marker, path = tmp_path / "executed", tmp_path / "pytorch_model.bin"
    raw = malicious_pickles(marker)[kind]
    if zipped:
        write_zip(path, raw)
    else:
        preamble = [0x1950A86A20F9469CFC6C, 1001, {"little_endian": True}]
        path.write_bytes(b"".join(pickle.dumps(value, protocol=2) for value in preamble) + raw)
    with pytest.raises(UserError, match=r"pytorch_model\.bin") as raised:
        open_checkpoint(tmp_path)
    assert not marker.exists()
    assert "Nothing in it was executed" in str(raised.value)


def test_the_exploit_works_on_pythons_unpickler(tmp_path: Path) -> None:
    marker = tmp_path / "executed"
    pickle.loads(malicious_pickles(marker)["reduce"])
    assert marker.exists()


@pytest.mark.parametrize(
    ("value", "says"),
    [
        ([torch.zeros(2)], "contains a list"),
        ({"epoch": 3}, "'epoch' is a int"),
        ({"state_dict": {"a": torch.zeros(2)}}, "'state_dict' is a dict"),
        ({"module": torch.nn.Linear(2, 2)}, "torch.nn.modules.linear.Linear"),
        ({"sparse": torch.zeros(2, 2).to_sparse()}, "torch._utils._rebuild_sparse_tensor"),
    ],
)
def test_other_contents_than_a_dictionary_of_tensors_are_named(value: object, says: str, tmp_path: Path) -> None:
    torch.save(value, tmp_path / "pytorch_model.bin")
    with pytest.raises(UserError) as raised:
        open_checkpoint(tmp_path)
    assert says in str(raised.value)


def truncate(path: Path, keep: float) -> None:
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * keep)])


@pytest.mark.parametrize("keep", [0, 0.001, 0.3, 0.9, 0.9999])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_truncated_file_is_torn(layout: str, keep: float, plain: Written, tmp_path: Path) -> None:
    save(plain.model, tmp_path, layout)
    victim = sorted([*tmp_path.glob("*.safetensors"), *tmp_path.glob("*.bin")])[-1]
    truncate(victim, keep)
    with pytest.raises(UserError) as raised:
        open_checkpoint(tmp_path)
    assert victim.name in str(raised.value)


def edit_json(path: Path, edit: Callable[[dict], None]) -> None:
    value = json.loads(path.read_text())
    edit(value)
    path.write_text(json.dumps(value))


def move_to_other_shard(index: dict) -> None:
    files = sorted(set(index["weight_map"].values()))
    name = next(name for name, file in index["weight_map"].items() if file == files[0])
    index["weight_map"][name] = files[1]


@pytest.mark.parametrize("layout", ["safetensors sharded", "bin sharded"])
@pytest.mark.parametrize(
    ("edit", "says"),
    [
        (move_to_other_shard, "does not list for it|lacks"),
        (lambda index: index["weight_map"].popitem(), "does not list for it"),
        (
            lambda index: index["weight_map"].update({"model.norm.bias": next(iter(index["weight_map"].values()))}),
            "lacks",
        ),
        (lambda index: index["weight_map"].update({"a": "../other.bin"}), "not a file name in its directory"),
        (lambda index: index["weight_map"].update({"a": "absent.bin"}), "absent.bin is missing"),
        (lambda index: index.pop("weight_map"), "no weight_map"),
        (lambda index: index.update(weight_map={"a": 3}), "no weight_map"),
    ],
    ids=["moved", "forgotten", "invented", "outside", "absent", "no map", "no file names"],
)
def test_an_index_that_does_not_match_its_shards(
    layout: str, edit: Callable, says: str, plain: Written, tmp_path: Path
) -> None:
    save(plain.model, tmp_path, layout)
    edit_json(next(tmp_path.glob("*.index.json")), edit)
    with pytest.raises(UserError, match=says):
        open_checkpoint(tmp_path)


def test_a_missing_shard_is_named(plain: Written, tmp_path: Path) -> None:
    save(plain.model, tmp_path, "bin sharded")
    (tmp_path / "pytorch_model-00002-of-00003.bin").unlink()
    with pytest.raises(UserError, match=r"pytorch_model-00002-of-00003\.bin is missing"):
        open_checkpoint(tmp_path)


def test_messages_for_directories_without_a_checkpoint_name_their_content(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="not a directory"):
        open_checkpoint(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"none of model\.safetensors"):
        open_checkpoint(tmp_path)
    (tmp_path / "pytorch_model-00001-of-00002.bin").touch()
    with pytest.raises(UserError, match="there are shards"):
        open_checkpoint(tmp_path)
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(UserError, match="PEFT adapter"):
        open_checkpoint(tmp_path)


def with_header(header: object, data: bytes = b"") -> bytes:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(raw)) + raw + data


F32_PAIR = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"1234567",
        struct.pack("<Q", 1 << 63),
        struct.pack("<Q", 100) + b"{}",
        with_header(b"[]"),
        with_header(b"\xff\xfe"),
        with_header(b'{"a":' + b"[" * 100_000),
        with_header({"a": 3}),
        with_header({"a": {**F32_PAIR, "dtype": "F33"}}, bytes(8)),
        with_header({"a": {**F32_PAIR, "shape": [3]}}, bytes(8)),
        with_header({"a": {**F32_PAIR, "shape": [-2]}}, bytes(8)),
        with_header({"a": {**F32_PAIR, "shape": [True]}}, bytes(8)),
        with_header({"a": {**F32_PAIR, "shape": [1 << 59, 1 << 59]}}, bytes(8)),
        with_header({"a": {**F32_PAIR, "data_offsets": [8, 0]}}, bytes(8)),
        with_header({"a": F32_PAIR, "b": F32_PAIR}, bytes(8)),
        with_header({"a": F32_PAIR}, bytes(9)),
        with_header({"a": {**F32_PAIR, "data_offsets": [8, 16]}}, bytes(16)),
        with_header(
            b'{"a":' + json.dumps(F32_PAIR).encode() + b',"a":' + json.dumps(F32_PAIR).encode() + b"}", bytes(8)
        ),
        with_header({"__metadata__": {"format": 3}, "a": F32_PAIR}, bytes(8)),
    ],
)
def test_an_invalid_safetensors_header_is_an_error(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(UserError, match=r"model\.safetensors"):
        open_checkpoint(tmp_path)


def damaged(original: bytes, edits: list[tuple[float, int]], region: int) -> bytes:
    """Replaces bytes at relative positions of the first (or, if negative, the last) `region` bytes."""
    content = bytearray(original)
    size = min(abs(region), len(content))
    for place, value in edits:
        at = int(place * (size - 1))
        content[at if region > 0 else len(content) - 1 - at] = value
    return bytes(content)


EDITS = st.lists(st.tuples(st.floats(0, 1), st.integers(0, 255)), min_size=1, max_size=4)
FUZZ = settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))


def open_or_refuse(directory: Path) -> None:
    """The only two outcomes a damaged file may have: a message, or tensors that can be read."""
    with contextlib.suppress(UserError):
        reader = open_checkpoint(directory)
        for name in reader:
            if np.prod(reader.shape(name), dtype=object) < 1 << 24:
                np.array(reader.read(name))


@pytest.fixture(scope="module")
def fuzz_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzz")


@pytest.fixture(scope="module")
def originals(fuzz_directory: Path) -> dict[str, bytes]:
    model = torch_llama(SMALL).half()
    found = {}
    for layout in ("safetensors", "bin", "bin old"):
        path = fuzz_directory / layout
        path.mkdir()
        save(model, path, layout)
        found[layout] = next(iter([*path.glob("*.safetensors"), *path.glob("*.bin")])).read_bytes()
    return found


@FUZZ
@given(edits=EDITS, region=st.sampled_from([8, 600, 4000]))
@example(edits=[(0.0, 255)], region=8)
def test_fuzzed_safetensors_header(edits: list, region: int, originals: dict[str, bytes], fuzz_directory: Path) -> None:
    path = fuzz_directory / "safetensors" / "model.safetensors"
    path.write_bytes(damaged(originals["safetensors"], edits, region))
    open_or_refuse(path.parent)


@FUZZ
@given(edits=EDITS, region=st.sampled_from([200, 6000, -60, -4000]), layout=st.sampled_from(["bin", "bin old"]))
def test_fuzzed_torch_file(
    edits: list, region: int, layout: str, originals: dict[str, bytes], fuzz_directory: Path
) -> None:
    path = fuzz_directory / layout / "pytorch_model.bin"
    path.write_bytes(damaged(originals[layout], edits, region))
    open_or_refuse(path.parent)


@FUZZ
@given(raw=st.binary(max_size=80), protocol=st.sampled_from([b"", b"\x80\x02", b"\x80\x04\x95"]))
def test_random_opcodes(raw: bytes, protocol: bytes, fuzz_directory: Path) -> None:
    path = fuzz_directory / "random.bin"
    write_zip(path, protocol + raw + b".")
    with pytest.raises(UserError):
        read_torch_file(path)


def test_a_compressed_member_is_an_error(plain: Written, tmp_path: Path) -> None:
    save(plain.model, tmp_path, "bin")
    original = tmp_path / "pytorch_model.bin"
    packed = tmp_path / "packed"
    with zipfile.ZipFile(original) as source, zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as target:
        for name in source.namelist():
            target.writestr(name, source.read(name))
    shutil.move(packed, original)
    with pytest.raises(UserError, match="compressed"):
        open_checkpoint(tmp_path)
