"""Pickled dictionaries: what `pickle.loads` gives, and for everything else one error of ours."""

from __future__ import annotations

import os
import pickle
import struct
import sys
import time

import numpy as np
import pytest

from scbin._errors import ScbinInputError
from scbin.io.dictionaries import LARGEST_FILE, geneformer_vocabulary, read_dictionary

NUMBERS = [
    np.dtype(code).type(value) for code in ("i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8") for value in (0, 100)
]
NUMBERS += [np.float32(0.1), np.float64(-1e300), np.uint64(2**64 - 1), np.int64(-(2**63))]
PLAIN = {"zero": 0, "byte": 255, "two": 65_535, "more": 10**6, "large": 2**40, "less": -(2**50), "half": 0.5}
MIXED = {**PLAIN, "ENSG00000000003": "TSPAN6", "\u00b5-opioid": "\U0001d4b3", "": "", "tiny": 5e-324}
MIXED |= {f"numpy{k}": number for k, number in enumerate(NUMBERS)}


@pytest.fixture
def read(tmp_path):
    """Write a pickle and read it."""

    def read(content):
        (tmp_path / "tokens.pkl").write_bytes(content)
        return read_dictionary(tmp_path / "tokens.pkl")

    return read


@pytest.mark.parametrize("protocol", [3, 4, 5])
@pytest.mark.parametrize(
    "value",
    [np.int64, lambda k: np.float64(k / 7 + 1), "ENSG{:011d}".format, None],
    ids=["ids", "medians", "names", "mixed"],
)
def test_it_is_what_pickle_loads(read, protocol, value):
    content = MIXED if value is None else {f"ENSG{k:011d}": value(k) for k in range(2500)}
    for dumps in (pickle._dumps, pickle.dumps):
        raw = dumps(content, protocol=protocol)
        found = read(raw)
        assert found == pickle.loads(raw) and list(found) == list(content)
        assert {type(value) for value in found.values()} <= {str, int, float}


class Evil:
    def __reduce__(self):
        return os.system, ("touch harmed",)


class Method:
    def __reduce__(self):
        return getattr, ({}, "keys")


def doubled(n):
    """A tuple that holds itself twice, n levels deep: 2^n parts when it is printed or hashed."""
    return b"\x80\x04)" + b"\x94h\x00\x86" + b"".join(b"\x94h" + bytes([k]) + b"\x86" for k in range(1, n))


VALUES = [
    None,
    True,
    [1],
    (1,),
    {"b": 1},
    b"x",
    1j,
    2**2000,
    np.str_("x"),
    np.bool_(True),
    np.float16(1),
    np.array([1.0]),
]
VALUES += [float("nan"), np.float64("-inf"), Evil(), Method(), sys.intern, np.dtype("f8")]
REFUSED = {
    **{f"value {k}": pickle.dumps({"a": value}, protocol=4) for k, value in enumerate(VALUES)},
    "big-endian": pickle.dumps({"a": np.array([1.0], dtype=">f8")[0]}).replace(b"\x8c\x01<", b"\x8c\x01>"),
    "evil alone": pickle.dumps(Evil()),
    "number key": pickle.dumps({1: 1}),
    "surrogate key": pickle.dumps({"\ud800": 1}),
    "not a dictionary": pickle.dumps([1]),
    "protocol 0": pickle.dumps(PLAIN, protocol=0),
    "os.system": b"cos\nsystem\n(S'touch harmed'\ntR.",
    "stack global": b"\x80\x04\x8c\x02os\x8c\x06system\x93\x8c\x0ctouch harmed\x85R.",
    "instance": b"(S'touch harmed'\nios\nsystem\n.",
    "newobj": b"\x80\x02c__builtin__\nobject\n)\x81.",
    "name of a doubled tuple": doubled(26) + b"\x94h\x00\x93.",
    "key of a doubled tuple": b"\x80\x04}" + doubled(26)[2:] + b"K\x01s.",
    "type of a doubled tuple": b"\x80\x02" + doubled(26)[2:] + b"cnumpy\ndtype\nh\x19\x85R.",
    "number for a state": b"\x80\x02cnumpy\ndtype\nX\x02\x00\x00\x00f8\x85RK\x01b.",
    "state of a function": b"\x80\x02cnumpy\ndtype\n}\x8c\x01ah\x00sb.",
    "calls a dictionary": b"\x80\x02})R.",
    "bytes of another code": b"\x80\x02c_codecs\nencode\nX\x01\x00\x00\x00aX\x03\x00\x00\x00hex\x86R.",
    "no key": b"\x80\x04}(NNu.",
    "far memo": b"\x80\x04}r\xff\xff\xff\xff0.",
    "empty": b"",
    "long text": b"\x80\x04\x8d" + struct.pack("<Q", 2**62) + b"a.",
    "many digits": b"I" + b"9" * 10_000 + b"\n.",
    "many values": b"\x80\x04" + b"N" * 3_000_000 + b".",
}


@pytest.mark.parametrize("name", REFUSED)
def test_everything_else_is_refused(read, name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    modules, start = set(sys.modules), time.process_time()
    with pytest.raises(ScbinInputError) as caught:
        read(REFUSED[name])
    assert caught.value.code == "V05" and len(str(caught.value)) < 500
    assert time.process_time() - start < 5
    assert set(sys.modules) == modules and os.listdir(tmp_path) == ["tokens.pkl"]


def mutants(seeds, n, seed=0):
    """Yield files with a few bytes changed, cut, doubled or put elsewhere."""
    rng = np.random.default_rng(seed)
    for k in range(n):
        raw = bytearray(seeds[k % len(seeds)])
        for _ in range(rng.integers(1, 5)):
            at, other = (int(x) for x in rng.integers(0, len(raw), 2))
            new = (b"", bytes([raw[at] ^ 1 << int(rng.integers(8))]), raw[other : other + 8], rng.bytes(3))
            raw[at : at + int(rng.integers(9))] = new[rng.integers(4)]
            raw = raw or bytearray(b".")
        yield bytes(raw)


@pytest.mark.parametrize("n", [2_500, pytest.param(100_000, marks=pytest.mark.slow)])
def test_mutants_raise_nothing_but_our_error(read, n):
    small = {"<pad>": 0, "ENSG00000000003": 70_000, "s": "t", "f": 0.25, "n": np.int64(5), "d": np.float64(1.5)}
    seeds = [pickle.dumps(small, protocol=protocol) for protocol in (3, 4, 5)]
    modules, n_loaded = set(sys.modules), 0
    for raw in mutants(seeds, n):
        try:
            found = read(raw)
        except ScbinInputError as error:
            assert error.code == "V05"
            continue
        n_loaded += 1
        assert all(type(k) is str and type(v) in (str, int, float) for k, v in found.items())
        assert np.isfinite([v for v in found.values() if type(v) is not str]).all()
    assert 0 < n_loaded < n / 2 and set(sys.modules) == modules


LFS = b"version https://git-lfs.github.com/spec/v1\n"


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("d.txt", b"{}"),
        *((f"d{suffix}", content) for suffix in (".json", ".pkl") for content in (None, LFS, b"\xff", b"[" * 200_000)),
        *(("d.json", f'{{"a": {value}}}'.encode()) for value in ("NaN", "1e999", "null", "true", "[1]", '1, "a": 2')),
        ("d.json", b"[1]"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_files_that_are_no_dictionaries(tmp_path, name, content):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ScbinInputError, match="V05") as caught:
        read_dictionary(tmp_path / name)
    assert name in str(caught.value)


def test_a_pipe_a_folder_and_a_file_larger_than_any_dictionary(tmp_path):
    os.mkfifo(tmp_path / "pipe.pkl")  # nobody ever writes into it
    (tmp_path / "folder.json").mkdir()
    (tmp_path / "large.pkl").touch()
    os.truncate(tmp_path / "large.pkl", LARGEST_FILE + 1)
    for name in ("pipe.pkl", "folder.json", "large.pkl", "/dev/zero.pkl"):
        with pytest.raises(ScbinInputError, match="V05"):
            read_dictionary(tmp_path / name)


@pytest.mark.parametrize(
    ("tokens", "medians"),
    [
        *(({"g": number}, {"g": 1.0}) for number in ("2", 2.5, 3)),
        *(({"g": 2}, {"g": median}) for median in ("1", 0.0, float("nan"))),
        *(({"g": 2, "h": 2}, {"g": 1.0, "h": 1.0}), ({"g": 2}, {})),
    ],
)
def test_dictionaries_that_are_no_vocabulary(tokens, medians):
    with pytest.raises(ScbinInputError, match="V05"):
        geneformer_vocabulary({"<pad>": 0, "<mask>": 1} | tokens, medians)


def test_the_map_of_the_version_goes_before_the_list_of_symbols():
    tokens = {"<pad>": 0, "<mask>": 1, "ENSG01": 2, "ENSG02": 3}
    medians = {"ENSG01": 0.5, "ENSG02": 2.0}
    vocabulary = geneformer_vocabulary(tokens, medians, {"A": "ENSG01"}, {"A": "ENSG02", "b": "ENSG02", "c": "X"})
    assert vocabulary.aliases == {"A": "ENSG01", "B": "ENSG02"}
