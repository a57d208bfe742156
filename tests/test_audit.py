"""The watch over the whole suite: it bites where scbin would unpickle, run a command or open a socket, and nowhere else."""

from __future__ import annotations

import ast
import pickle
import sys
from collections import OrderedDict
from pathlib import Path

import pytest

SRC = Path(__file__).parents[1] / "src" / "scbin"
FILES = sorted(SRC.rglob("*.py"))
RAW = pickle.dumps(OrderedDict(a=1))


def as_if_in(path: str, source: str, **names) -> None:
    """Run code as if it stood in a file."""
    exec(compile(source, path, "exec"), names)


@pytest.mark.parametrize(
    ("event", "source"),
    [
        ("pickle.find_class", "import pickle; pickle.loads(raw)"),
        ("pickle.find_class", "import pickle, io; pickle._Unpickler(io.BytesIO(raw)).load()"),
        ("pickle.find_class", "import numpy as np, io; np.load(io.BytesIO(array), allow_pickle=True)"),
        ("subprocess.Popen", "import subprocess; subprocess.run([python, '-c', ''], check=True)"),
        ("os.system", "import os; os.system('true')"),
        ("socket.__new__", "import socket; socket.socket().close()"),
        ("socket.getaddrinfo", "import socket; socket.getaddrinfo('127.0.0.1', 80)"),
    ],
    ids=["pickle", "slow pickle", "numpy", "process", "shell", "socket", "name"],
)
def test_it_bites(noted, event, source):
    import io

    import numpy as np

    buffer = io.BytesIO()
    np.save(buffer, np.array([OrderedDict(a=1)], dtype=object), allow_pickle=True)
    names = {"raw": RAW, "array": buffer.getvalue(), "python": sys.executable}
    as_if_in(str(SRC / "tl" / "_evil.py"), source, **names)
    found = noted()
    assert found and found[0].startswith(event) and "_evil.py" in found[0]
    as_if_in(__file__, source, **names)  # tests may
    assert not noted()


def test_it_bites_through_libraries(noted):
    source = "import functools; functools.reduce(lambda a, b: pickle.loads(raw), [1, 2])"
    as_if_in(str(SRC / "model.py"), source, raw=RAW, pickle=pickle)
    assert noted()


def test_caches_of_compiled_code_may(noted):
    names = {"call": lambda: as_if_in("/x/numba/core/caching.py", "pickle.loads(raw)", pickle=pickle, raw=RAW)}
    as_if_in(str(SRC / "encoding" / "kernels.py"), "call()", **names)
    assert not noted()


FORBIDDEN = {
    *("pickle", "cPickle", "marshal", "shelve", "dill", "cloudpickle", "joblib", "socket", "ftplib", "urllib.request"),
    *("requests", "httpx", "pty"),
}
CALLS = {
    "eval",
    "exec",
    "compile",
    "__import__",
    "torch.load",
    "np.load",
    "os.system",
    "torch.hub.load",
    "from_pretrained",
}


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(SRC)))
def test_nothing_in_the_source_could(path):
    """The same by reading: events that no test causes are found here."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import | ast.ImportFrom):
            module = getattr(node, "module", None)
            names = {alias.name for alias in node.names} | ({module} if module else set())
            assert not names & FORBIDDEN, names
            assert "subprocess" not in names or path.name == "_check_file.py"
        elif isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            assert called not in CALLS and called.split(".")[-1] != "from_pretrained", called
            keywords = {keyword.arg for keyword in node.keywords}
            assert not keywords & {"allow_pickle", "trust_remote_code", "weights_only"}, called
