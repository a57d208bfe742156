"""Packed attention against the softmax written out."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from scbin.nn import attention
from scbin.nn.attention import _row_by_row, pack_layout, packed_attention


def written_out(q, k, v, scale, bias=None):
    scores = q @ k.transpose(-2, -1) * scale
    return torch.softmax(scores if bias is None else scores + bias, -1) @ v


def attend(q, k, v, layout=None, **options):
    return packed_attention(torch.nn.Identity(), q, k, v, None, layout=layout, **options)[0]


def test_a_scale_of_its_own():
    q, k, v = torch.randn(3, 1, 2, 10, 8).unbind()
    out = attend(q, k, v, pack_layout(np.array([4, 6])), scaling=0.3)
    for a, b in ((0, 4), (4, 10)):
        expected = written_out(q[:, :, a:b], k[:, :, a:b], v[:, :, a:b], 0.3)
        assert (out[0, a:b] - expected[0].transpose(0, 1)).abs().max() < 1e-5


def test_a_bias_of_the_keys_is_added_to_their_scores():
    q, k, v = torch.randn(3, 1, 2, 10, 8).unbind()
    bias = torch.randn(10, requires_grad=True)
    out = attend(q, k, v, pack_layout(np.array([4, 6])), key_bias=bias)
    expected = torch.cat(
        [written_out(q[:, :, s], k[:, :, s], v[:, :, s], 8**-0.5, bias[s]) for s in (slice(0, 4), slice(4, 10))], 2
    )
    assert (out[0] - expected[0].transpose(0, 1)).abs().max() < 1e-5
    (slope,) = torch.autograd.grad(out.square().sum(), bias, retain_graph=True)
    (exact,) = torch.autograd.grad(expected.square().sum(), bias)
    assert (slope - exact).abs().max() < 1e-4


@pytest.mark.parametrize("lengths", [(40, 7, 30), (20, 20, 20)])
@pytest.mark.parametrize("most", [1, 200, 2**25], ids=["a query", "some queries", "all rows"])
def test_in_bfloat16_rows_attend_as_in_float32_to_its_three_digits(monkeypatch, lengths, most):
    monkeypatch.setattr(attention, "_SCORES", most)
    torch.manual_seed(0)
    full = [torch.randn(1, 2, sum(lengths), 8, requires_grad=True) for _ in range(3)]
    half = [t.detach().bfloat16().requires_grad_() for t in full]
    exact, out = (attend(*qkv, pack_layout(np.array(lengths))) for qkv in (full, half))
    assert out.dtype == torch.bfloat16 and (out - exact).abs().max() < 2e-2
    slopes, found = (torch.autograd.grad(o.float().square().sum(), qkv) for o, qkv in ((exact, full), (out, half)))
    for a, b in zip(slopes, found, strict=True):
        assert (a - b).norm() < 2e-2 * a.norm()


def test_without_a_layout_it_is_ordinary_attention():
    q, k, v = torch.randn(3, 2, 2, 6, 8).unbind()
    assert (attend(q, k, v) - written_out(q, k, v, 8**-0.5).transpose(1, 2)).abs().max() < 1e-5


@pytest.mark.gpu
def test_the_packed_kernel_of_cuda_equals_row_by_row():
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 4, 300, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
    layout = pack_layout(np.array([7, 93, 200]), "cuda")
    exact = [t.detach().float().requires_grad_() for t in (q, k, v)]
    out, expected = attend(q, k, v, layout), _row_by_row(*exact, layout, 64**-0.5)
    assert (out.float() - expected).abs().max() < 2e-2 and (attend(*exact, layout) - expected).abs().max() < 1e-3
    out.float().square().sum().backward()
    expected.square().sum().backward()
    for half, full in zip((q, k, v), exact, strict=True):
        assert (half.grad.float() - full.grad).abs().max() < 5e-2 * full.grad.abs().max()
