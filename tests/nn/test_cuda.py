"""Every way through a network on a CUDA device that is not there: shapes, devices, types, calls of attention, and no waiting.

FakeTensorMode computes no values. What the kernels return is told by the tests marked `gpu`, and by `benchmarks/gpu.py`.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from scipy import sparse
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from scbin.nn import attention, run
from scbin.nn.attention import pack_layout, packed_attention
from scbin.nn.counts import CountHead
from scbin.nn.labels import LabelHead, Target
from scbin.nn.network import BACKBONES, build_network
from scbin.nn.presets import PRESETS
from scbin.nn.run import Runner
from scbin.tokens.bins import Bins
from scbin.tokens.edits import Edit, GeneRows, edit_rows
from scbin.tokens.tokens import MemoryTokens
from scbin.tokens.vocabulary import Vocabulary
from scbin.train.labels import Labels
from scbin.train.pretraining import Pretraining
from scbin.train.settings import RECIPES, Finetuning, Masking, Training
from scbin.train.task import map_tensors, to_device

CUDA, KINDS, N_LAYERS = torch.device("cuda", 0), ["mlp", "bert"], 2


class Watch(TorchDispatchMode):
    """Notes what comes back to the host. `.item()` and `nonzero` need no note: fake tensors have no values and raise."""

    def __init__(self):
        super().__init__()
        self.waits: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        given = [value.device.type for value in args if isinstance(value, torch.Tensor)]
        if given and given[0] == "cuda" and isinstance(out, torch.Tensor) and out.device.type == "cpu":
            self.waits.append(str(function))
        return out


class Indexing(TorchFunctionMode):
    """Square brackets by the operators behind them, since Python's own ask a build without CUDA for the device."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is not torch.Tensor.__getitem__:
            return function(*args, **(kwargs or {}))
        out, keys, dim, index = args[0], args[1] if isinstance(args[1], tuple) else (args[1],), 0, []
        at = keys.index(...) if any(key is ... for key in keys) else len(keys)
        whole = (slice(None),) * (out.ndim - sum(key is not None and key is not ... for key in keys))
        for key in (*keys[:at], *whole, *keys[at + 1 :]):
            if isinstance(key, int):
                out = torch.ops.aten.select.int(out, dim, key)
                continue
            if key is None:
                out = torch.ops.aten.unsqueeze.default(out, dim)
            elif isinstance(key, slice) and key != slice(None):
                out = torch.ops.aten.slice.Tensor(out, dim, key.start, key.stop, key.step or 1)
            index, dim = [*index, key if isinstance(key, torch.Tensor) else None], dim + 1
        return torch.ops.aten.index.Tensor(out, index) if any(key is not None for key in index) else out


@pytest.fixture
def cuda(monkeypatch):
    """A fake GPU of the Hopper generation, with the calls of its attention; to be changed to an older one."""
    calls: list[tuple[str, torch.dtype]] = []

    def noted(name):
        def call(query, key, value, layout, *rest):
            calls.append((name, query.dtype))
            assert query.device == key.device == value.device == layout.cu_seqlens.device == CUDA
            assert layout.cu_seqlens.dtype == torch.int32 and query.dtype == key.dtype == value.dtype
            if name == "_jagged":  # a build without CUDA lacks the kernel behind it
                return value.new_empty(1, query.shape[2], query.shape[1], value.shape[3])
            return real(query, key, value, layout, *rest)

        real = getattr(attention, name)
        return call

    for name in ("_varlen", "_jagged", "_row_by_row"):
        monkeypatch.setattr(attention, name, noted(name))
    here = run.resolve_device
    monkeypatch.setattr(run, "resolve_device", lambda name: CUDA if str(name).startswith("cuda") else here(name))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: self)
    monkeypatch.setattr(torch.nn.Module, "to", lambda self, *_: self)  # fake weights cannot be swapped; see `there`
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *_: True)
    monkeypatch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
    with FakeTensorMode(), torch.no_grad(), Watch() as watch, Indexing():
        yield calls, watch


def there(module):
    """Move a module of fake weights to the fake device, which `Module.to` cannot, without gradients, which need a real one."""
    for part in module.modules():
        for name, weight in part._parameters.items():
            if weight is not None:
                part._parameters[name] = torch.nn.Parameter(weight.detach().to(CUDA), requires_grad=False)
        part._buffers.update({name: None if b is None else b.to(CUDA) for name, b in part._buffers.items()})
    return module


def cells(encoding="bins"):
    rng, genes = np.random.default_rng(0), [f"G{k}" for k in range(60)]
    bins = Bins((1.0, 2.0, 3.0, 5.0), reads="counts") if encoding == "bins" else None
    vocabulary = (
        Vocabulary.build(encoding, genes, bins=bins) if bins else Vocabulary.build(encoding, genes, max_length=64)
    )
    rows, first = np.zeros((9, vocabulary.n_positions), dtype=np.uint16), vocabulary.first_gene_position
    for row in rows:
        n = rng.integers(20, 40)
        if bins:
            at = first + np.sort(rng.choice(60, n, replace=False))
            row[at] = vocabulary.group_start[at] + rng.integers(1, 4, n)
        else:
            row[first : first + n] = vocabulary.first_gene_id + rng.permutation(60)[:n]
    return MemoryTokens(sparse.csr_matrix(rows), vocabulary)


def network_of(tokens, kind, **options) -> Any:
    return there(build_network(tokens.vocabulary, "tiny", kind, **options)).eval()


def expected(kind, packs=1, name="_varlen", dtype=torch.bfloat16):
    return [(name, dtype)] * (N_LAYERS * packs if kind == "bert" else 0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("encoding", ["bins", "rank"])
@pytest.mark.parametrize("vector", ["latent", "pooled"])
def test_embedding(cuda, kind, encoding, vector):
    calls, watch = cuda
    tokens = cells(encoding)
    network = network_of(tokens, kind, vector=vector)
    network.vector.layer = -1
    lengths, n = tokens.lengths, 0
    for pack, hidden in run.run(network, tokens, device="cuda", token_budget=int(lengths.sum() / 2)):
        assert hidden.device == CUDA and hidden.dtype in (torch.bfloat16, torch.float32)
        vectors, n = network.vector(hidden, pack), n + 1
        assert (
            vectors.device == CUDA
            and vectors.dtype == torch.float32
            and vectors.shape == (pack.n_rows, network.vector.size)
        )
    assert n > 1 and calls == expected(kind, n) and not watch.waits


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("masking", [Masking(), Masking(gene_mask_prob=0.0)])
def test_forward_of_a_training_step(cuda, kind, masking):
    calls, watch = cuda
    tokens = cells()
    network, task = network_of(tokens, kind), Pretraining(tokens.vocabulary, masking, layer=-1)
    mode = torch._guards.detect_fake_mode([network.vector.bias])
    with unset_fake_temporarily():
        batch = task.prepare(tokens, np.arange(9), seed=0, epoch=0, token_budget=150)
    runner = Runner(network.train(), "cuda", trains=True)
    for packed in batch.packs:
        pack, targets = to_device(map_tensors(packed, mode.from_tensor), CUDA)
        hidden = runner(pack)
        with runner.autocast():
            losses = task.loss(network, hidden, pack, targets)
        assert losses.device == CUDA and losses.shape == (len(task.losses),)
    assert calls == expected(kind, len(batch.packs)) and len(batch.packs) > 1 and not watch.waits


def test_scores_of_labels_pick_nothing_out(cuda):
    _, watch = cuda
    tokens = cells()
    head = LabelHead(tokens.vocabulary, 30, [Target("age", "number"), Target("score", "number")])
    network = network_of(tokens, "mlp")
    network.labels = there(head)
    task = Labels(head, tokens.vocabulary, [np.arange(9), np.arange(9)], Finetuning())
    mode = torch._guards.detect_fake_mode([network.vector.bias])
    with unset_fake_temporarily():
        ((pack, targets),) = task.prepare(tokens, np.arange(9), seed=0, epoch=0, token_budget=10_000).packs
    pack, targets = to_device(map_tensors((pack, targets), mode.from_tensor), CUDA)
    losses = task.loss(network.train(), network.backbone.embed(pack), pack, targets)
    assert losses.shape == (2,) and losses.device == CUDA and not watch.waits


@pytest.mark.parametrize("kind", KINDS)
def test_exact_edits_and_the_forward_of_the_screen(cuda, kind):
    calls, watch = cuda
    tokens = cells()
    network = network_of(tokens, kind, vector="pooled")
    rows = GeneRows(tokens.matrix, tokens.vocabulary)
    edited = edit_rows(rows, Edit("delete"), np.arange(9), np.zeros((9, 1), dtype=np.int64))
    for pack, hidden in run.run(network, MemoryTokens(edited.tokens, tokens.vocabulary), device="cuda"):
        network.vector(hidden, pack)
    assert calls == expected(kind) and not watch.waits
    gates = torch.zeros(pack.n_tokens, device=CUDA)
    hidden = Runner(network, "cuda")(pack, gates=gates)
    assert network.vector(hidden, pack, gates=gates).device == CUDA
    assert calls == expected(kind, 2) and not watch.waits


def test_prediction_of_counts(cuda):
    _, watch = cuda
    head = there(CountHead(60, 30))
    assert (
        head.log_mean(torch.zeros(4, 30, device=CUDA), torch.zeros(4, device=CUDA)).device == CUDA and not watch.waits
    )


@pytest.mark.parametrize(("generation", "precision"), [((9, 0), "float32"), ((7, 5), "auto"), ((7, 5), "bfloat16")])
def test_in_float32_and_on_older_gpus_attention_is_one_call_too(cuda, monkeypatch, generation, precision):
    calls, watch = cuda
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: generation)
    tokens = cells()
    network = network_of(tokens, "bert")
    for _ in run.run(network, tokens, layer=-1, device="cuda", precision=precision):
        pass
    dtype = torch.bfloat16 if precision == "bfloat16" else torch.float32
    assert calls == expected("bert", name="_jagged", dtype=dtype) and not watch.waits


# ---- on the CPU --------------------------------------------------------------------------------------------------------


def test_one_call_equals_row_by_row():
    torch.manual_seed(0)
    layout = pack_layout(np.array([3, 40, 17]))
    q, k, v = (torch.randn(1, 2, 60, 8, requires_grad=True) for _ in range(3))
    one = attention._jagged(q, k, v, layout, 0.3)
    rows, _ = packed_attention(torch.nn.Identity(), q, k, v, None, layout=layout, scaling=0.3)
    assert one.shape == rows.shape and (one - rows).abs().max() < 1e-5
    found = torch.autograd.grad(one.square().sum(), (q, k, v))
    for a, b in zip(found, torch.autograd.grad(rows.square().sum(), (q, k, v)), strict=True):
        assert (a - b).abs().max() < 1e-4


def test_auto_is_bfloat16_on_cuda_and_float32_on_the_cpu(monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 0))
    for trains in (0, 64, 256):
        assert run.resolve_precision("auto", CUDA, trains) == torch.bfloat16
    assert run.resolve_precision("auto", torch.device("cpu")) == torch.float32
    for trains, dtype in ((64, torch.float32), (128, torch.bfloat16)):
        assert run.resolve_precision("auto", torch.device("cpu"), trains) == dtype
    assert {Training().for_preset(name, 100).precision for name in PRESETS} == {"auto"} and set(RECIPES) <= set(PRESETS)


def test_tf32_is_for_our_calls_alone():
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    with run.fast_products(CUDA, torch.bfloat16):
        assert matmul.fp32_precision == "tf32"
    for where, dtype in ((CUDA, torch.float32), (torch.device("cpu"), torch.bfloat16)):
        with run.fast_products(where, dtype):
            assert matmul.fp32_precision == before
    with pytest.raises(KeyError), run.fast_products(CUDA, torch.bfloat16):
        raise KeyError
    assert matmul.fp32_precision == before


def test_weights_are_cast_once_in_a_call():
    tokens = cells()
    network = build_network(tokens.vocabulary, "tiny", "bert")
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as few:
        list(run.run(network, tokens, device="cpu", precision="bfloat16"))
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as many:
        n = len(list(run.run(network, tokens, device="cpu", precision="bfloat16", token_budget=30)))
    casts = [sum(e.count for e in p.key_averages() if e.key == "aten::_to_copy") for p in (few, many)]
    assert (
        n == 9 and casts[1] - casts[0] < 8 * 12 * N_LAYERS
    )  # states are cast in every pack, the 12 weights of a layer are not


def test_every_backbone_is_driven():
    assert set(KINDS) == set(BACKBONES)
