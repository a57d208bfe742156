"""Pickled dictionaries by their opcodes: what `pickle.loads` gives, and for everything else one error of ours."""

from __future__ import annotations

import json
import os
import pickle
import struct
import sys
import time

import numpy as np
import pytest

from scbin._errors import ScbinInputError
from scbin.encoding.geneformer import LARGEST_FILE, read_dictionary, vocabulary_from_geneformer
from scbin.encoding.pickles import read_pickled_dictionary

NUMBERS = [
    np.dtype(code).type(value) for code in ("i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8") for value in (0, 100)
]
NUMBERS += [np.float32(0.1), np.float64(-1e300), np.uint64(2**64 - 1), np.int64(-(2**63))]
PLAIN = {"zero": 0, "byte": 255, "two": 65_535, "more": 10**6, "large": 2**40, "less": -(2**50), "half": 0.5}
MIXED = {**PLAIN, "ENSG00000000003": "TSPAN6", "\u00b5-opioid": "\U0001d4b3", "": "", "tiny": 5e-324}
MIXED |= {f"numpy{k}": number for k, number in enumerate(NUMBERS)}


def read(content):
    return read_pickled_dictionary(content, "tokens.pkl")


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize(
    "content",
    [
        {},
        {"a": 1},
        PLAIN,
        MIXED,
        {f"ENSG{k:011d}": np.int64(k) for k in range(3000)},
        {f"ENSG{k:011d}": np.float64(k / 7 + 1) for k in range(2500)},
        {f"name{k}": f"ENSG{k % 50:011d}" for k in range(2500)},
    ],
    ids=["empty", "one", "plain", "mixed", "ids", "medians", "names"],
)
def test_it_is_what_pickle_loads(protocol, content):
    raw = pickle.dumps(content, protocol=protocol)
    found = read(raw)
    assert found == pickle.loads(raw) and list(found) == list(content)
    assert {type(value) for value in found.values()} <= {str, int, float}


def test_the_slow_pickler_and_repeated_values(tmp_path):
    shared = np.float64(2.5)
    content = {f"g{k}": shared for k in range(5)} | {"same": "same"}
    for dumps in (pickle._dumps, pickle.dumps):
        for protocol in (2, 3, 4, 5):
            assert read(dumps(content, protocol)) == content
    (tmp_path / "d.pkl").write_bytes(pickle.dumps(content))
    assert read_dictionary(tmp_path / "d.pkl") == content


class Evil:
    def __reduce__(self):
        return os.system, ("touch harmed",)


class Method:
    def __reduce__(self):
        return getattr, ({}, "keys")


def doubled(n):
    """A tuple that holds itself twice, n levels deep: 2^n parts when it is printed."""
    return b"\x80\x04)" + b"\x94h\x00\x86" + b"".join(b"\x94h" + bytes([k]) + b"\x86" for k in range(1, n))


def of(*values, protocol=4):
    return [pickle.dumps({"a": value}, protocol=protocol) for value in values]


REFUSED = {
    **{
        f"value {k}": raw
        for k, raw in enumerate(of(None, True, [1], (1,), {}, {"b": 1}, {1}, b"x", 1j, 2**70, -(2**70)))
    },
    **{
        f"number {k}": raw
        for k, raw in enumerate(of(float("nan"), float("inf"), np.float64("-inf"), np.float32("nan")))
    },
    **{f"numpy {k}": raw for k, raw in enumerate(of(np.str_("x"), np.bool_(True), np.float16(1), np.array([1.0])))},
    "big-endian": pickle.dumps({"a": np.array([1.0], dtype=">f8")[0]}).replace(b"\x8c\x01<", b"\x8c\x01>"),
    **{f"object {k}": raw for k, raw in enumerate(of(Evil(), Method(), len, Evil, sys.intern, np.dtype("f8")))},
    "evil alone": pickle.dumps(Evil()),
    "evil key": pickle.dumps({(1, "a"): 1}),
    "number key": pickle.dumps({1: 1}),
    "surrogate key": pickle.dumps({"\ud800": 1}),
    "surrogate value": pickle.dumps({"a": "\udfff"}),
    "not a dictionary": pickle.dumps([1]),
    "text": pickle.dumps("x"),
    "two dictionaries": b"\x80\x04}}0.",
    "protocol 0": pickle.dumps(PLAIN, protocol=0),
    "protocol 1": pickle.dumps({"a": 1}, protocol=1).replace(b"}", b"(d"),
    "os.system": b"cos\nsystem\n(S'touch harmed'\ntR.",
    "stack global": b"\x80\x04\x8c\x02os\x8c\x06system\x93\x8c\x0ctouch harmed\x85R.",
    "instance": b"(S'touch harmed'\nios\nsystem\n.",
    "extension": b"\x80\x02\x82\x01.",
    "persistent": b"\x80\x02Px\n.",
    "newobj": b"\x80\x02c__builtin__\nobject\n)\x81.",
    "name of a doubled tuple": doubled(26) + b"\x94h\x00\x93.",
    "value of a doubled tuple": b"\x80\x04}\x8c\x01a" + doubled(26)[2:] + b"s.",
    "key of a doubled tuple": b"\x80\x04}" + doubled(26)[2:] + b"K\x01s.",
    "dictionary for a type": b"\x80\x02cnumpy\ndtype\n}\x85R.",
    "type of a type": b"\x80\x02cnumpy\ndtype\ncnumpy\ndtype\n\x85R.",
    "number for a state": b"\x80\x02cnumpy\ndtype\nX\x02\x00\x00\x00f8\x85RK\x01b.",
    "state of a dictionary": b"\x80\x02}K\x01b.",
    "calls a dictionary": b"\x80\x02})R.",
    "bytes of another code": b"\x80\x02c_codecs\nencode\nX\x01\x00\x00\x00aX\x03\x00\x00\x00hex\x86R.",
    "mark below": b"\x80\x04}(\x8c\x01aK\x01e.",
    "below a mark": b"\x80\x04}\x8c\x01a(K\x01s.",
    "no mark": b"\x80\x04}\x8c\x01aK\x01u.",
    "no key": b"\x80\x04}(NNu.",
    "nothing": b"\x80\x04N.",
    "odd": b"\x80\x04}(\x8c\x01au.",
    "key twice": b"\x80\x04}(\x8c\x01aK\x01\x8c\x01aK\x02u.",
    "memo": b"\x80\x04h\x07.",
    "goes on": pickle.dumps({"a": 1}) + b"cos\nsystem\n.",
    "stops late": pickle.dumps({"a": 1})[:-1],
    "empty": b"",
    "noise": bytes(range(256)),
    "long text": b"\x80\x04\x8d" + struct.pack("<Q", 2**62) + b"a.",
    "long number": b"\x80\x04\x8b" + struct.pack("<i", 2**31 - 1) + b"a.",
    "many digits": b"I" + b"9" * 10_000 + b"\n.",
    "many values": b"\x80\x04" + b"N" * 200_000 + b".",
    "many marks": b"\x80\x04" + b"(" * 200_000 + b".",
}


@pytest.mark.parametrize("name", REFUSED)
def test_everything_else_is_refused(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    modules, start = set(sys.modules), time.perf_counter()
    with pytest.raises(ScbinInputError) as caught:
        read(REFUSED[name])
    assert caught.value.code == "G09" and len(str(caught.value)) < 500
    assert time.perf_counter() - start < 2
    assert set(sys.modules) == modules and not list(tmp_path.iterdir())


def mutants(seeds, n, seed=0):
    """Yield files with a few bytes changed, cut, doubled or put elsewhere."""
    rng = np.random.default_rng(seed)
    for k in range(n):
        raw = bytearray(seeds[k % len(seeds)])
        for _ in range(rng.integers(1, 5)):
            at, length = (int(x) for x in rng.integers(0, len(raw), 2))
            kind = rng.integers(0, 5)
            if kind == 0:
                raw[at] = rng.integers(0, 256)
            elif kind == 1:
                raw[at] ^= 1 << int(rng.integers(0, 8))
            elif kind == 2:
                del raw[at : at + 1 + length % 8]
            elif kind == 3:
                raw[at:at] = raw[length : length + 8]
            else:
                raw[at:at] = bytes(rng.integers(0, 256, 3, dtype=np.uint8))
            raw = raw or bytearray(b".")
        yield bytes(raw)


@pytest.mark.parametrize("n", [10_000, pytest.param(100_000, marks=pytest.mark.slow)])
def test_mutants_raise_nothing_but_our_error(n):
    small = {"<pad>": 0, "ENSG00000000003": 70_000, "s": "t", "f": 0.25, "n": np.int64(5), "d": np.float64(1.5)}
    seeds = [pickle.dumps(small, protocol=protocol) for protocol in (2, 3, 4, 5)]
    modules, loaded = set(sys.modules), 0
    for raw in mutants(seeds, n):
        try:
            found = read(raw)
        except ScbinInputError as error:
            assert error.code == "G09"
            continue
        loaded += 1
        assert all(type(k) is str and type(v) in (str, int, float) for k, v in found.items())
        assert np.isfinite([v for v in found.values() if type(v) is not str]).all()
    assert 0 < loaded < n / 2 and set(sys.modules) == modules


# ---- files -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("code", "name", "content"),
    [
        ("G06", "d.txt", b"{}"),
        ("G10", "gone.json", None),
        ("G10", "gone.pkl", None),
        ("G11", "d.pkl", b"version https://git-lfs.github.com/spec/v1\n"),
        ("G11", "d.json", b"version https://git-lfs.github.com/spec/v1\n"),
        ("G09", "d.pkl", b"{}"),
        ("G08", "d.json", b"{"),
        ("G08", "d.json", b"\xff"),
        ("G08", "d.json", b"[" * 200_000),
        ("G08", "d.json", b'{"a": 1, "a": 2}'),
        ("G08", "d.json", b'{"a": NaN}'),
        ("G08", "d.json", b'{"a": 1e999}'),
        ("G08", "d.json", b'{"a": null}'),
        ("G08", "d.json", b'{"a": true}'),
        ("G08", "d.json", b'{"a": {"b": 1}}'),
        ("G08", "d.json", b'{"a": [1]}'),
        ("G08", "d.json", b'{"\\ud800": 1}'),
        ("G07", "d.json", b"[1]"),
        ("G07", "d.json", b"3"),
    ],
)
def test_files_that_are_no_dictionaries(tmp_path, code, name, content):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ScbinInputError, match=code) as caught:
        read_dictionary(tmp_path / name)
    assert name in str(caught.value)


def test_a_file_larger_than_any_dictionary(tmp_path):
    (tmp_path / "d.pkl").touch()
    os.truncate(tmp_path / "d.pkl", LARGEST_FILE + 1)
    with pytest.raises(ScbinInputError, match="G05"):
        read_dictionary(tmp_path / "d.pkl")


def test_a_pickle_and_its_json_are_one_vocabulary(tmp_path):
    tokens = {"<pad>": 0, "<mask>": 1, "ENSG01": 2, "ENSG02": 3}
    medians = {"ENSG01": 0.5, "ENSG02": 2.0, "ENSG03": 1.0}
    (tmp_path / "t.json").write_text(json.dumps(tokens))
    (tmp_path / "t.pkl").write_bytes(pickle.dumps({k: np.int64(v) for k, v in tokens.items()}))
    (tmp_path / "m.pkl").write_bytes(pickle.dumps({k: np.float64(v) for k, v in medians.items()}))
    one = vocabulary_from_geneformer(tmp_path / "t.json", medians)
    assert one == vocabulary_from_geneformer(tmp_path / "t.pkl", tmp_path / "m.pkl")
    assert one.genes == ("ENSG01", "ENSG02")


@pytest.mark.parametrize(
    ("code", "tokens", "medians"),
    [
        ("G15", {"<pad>": 0, "<mask>": 1, "g": "2"}, {"g": 1.0}),
        ("G15", {"<pad>": 0, "<mask>": 1, "g": 2.5}, {"g": 1.0}),
        ("G15", {"<pad>": 0, "<mask>": 1, "g": 2}, {"g": "1"}),
        ("G02", {"<pad>": 0, "<mask>": 1, "g": 3}, {"g": 1.0}),
        ("G02", {"<pad>": 0, "<mask>": 1, "g": 2, "h": 2}, {"g": 1.0, "h": 1.0}),
        ("G03", {"<pad>": 0, "<mask>": 1, "g": 2}, {}),
        ("G04", {"<pad>": 0, "<mask>": 1, "g": 2}, {"g": 0.0}),
        ("G04", {"<pad>": 0, "<mask>": 1, "g": 2}, {"g": float("nan")}),
    ],
)
def test_dictionaries_that_are_no_vocabulary(code, tokens, medians):
    with pytest.raises(ScbinInputError, match=code):
        vocabulary_from_geneformer(tokens, medians)


def test_the_map_of_the_version_goes_before_the_list_of_symbols():
    tokens = {"<pad>": 0, "<mask>": 1, "ENSG01": 2, "ENSG02": 3}
    medians = {"ENSG01": 0.5, "ENSG02": 2.0}
    vocabulary = vocabulary_from_geneformer(tokens, medians, {"A": "ENSG01"}, {"A": "ENSG02", "b": "ENSG02", "c": "X"})
    assert vocabulary.aliases == {"A": "ENSG01", "B": "ENSG02"}
