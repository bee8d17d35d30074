from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F  # noqa: N812

from engine.kernels.loss import linear_cross_entropy

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2}


def make(dtype: torch.dtype, tokens: int = 23) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(3)
    hidden = torch.randn(tokens, 16, generator=draw).to(dtype)
    weight = torch.randn(50, 16, generator=draw).to(dtype)
    labels = torch.randint(0, 50, (tokens,), generator=draw)
    labels[::4] = -100
    return hidden, weight, labels


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("chunk_tokens", [1, 5, 23, 100])
def test_chunks_give_the_loss_and_gradient_of_the_whole(chunk_tokens: int, dtype: torch.dtype) -> None:
    hidden, weight, labels = make(dtype)
    leaf = hidden.double().clone().requires_grad_()
    wanted = F.cross_entropy(leaf @ weight.double().T, labels, reduction="sum")
    wanted.backward()
    loss, count, d_hidden = linear_cross_entropy(hidden, weight, labels, chunk_tokens=chunk_tokens)
    assert int(count) == int((labels >= 0).sum())
    assert abs(float(loss) - float(wanted.detach())) < TOLERANCE[dtype] * float(wanted.detach())
    assert leaf.grad is not None
    assert float((d_hidden.double() - leaf.grad).norm() / leaf.grad.norm()) < TOLERANCE[dtype]
    assert d_hidden.dtype == dtype
    assert not bool(d_hidden[labels == -100].any())


@pytest.mark.parametrize("tokens", [0, 1])
def test_without_labels_there_is_no_loss(tokens: int) -> None:
    hidden, weight, labels = make(torch.float32, tokens)
    loss, count, d_hidden = linear_cross_entropy(hidden, weight, labels)
    assert float(loss) == 0.0
    assert int(count) == 0
    assert torch.equal(d_hidden, torch.zeros_like(hidden))


def test_logits_of_all_tokens_never_exist() -> None:
    hidden, weight, labels = make(torch.float32, 64)
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            nonlocal largest
            result = func(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor):
                largest = max(largest, result.numel())
            return result

    with Watch():
        linear_cross_entropy(hidden, weight, labels, chunk_tokens=8)
    assert largest <= max(8 * 50, hidden.numel(), weight.numel())


@pytest.mark.parametrize("which", ["weight", "labels", "label type", "type", "chunk"])
def test_tensors_that_do_not_fit_are_refused(which: str) -> None:
    hidden, weight, labels = make(torch.float32)
    chunk_tokens = 0 if which == "chunk" else 8
    if which == "weight":
        weight = weight[:, :8]
    if which == "labels":
        labels = labels[:-1]
    if which == "label type":
        labels = labels.int()
    if which == "type":
        weight = weight.half()
    with pytest.raises(ValueError, match=r"must be|must have"):
        linear_cross_entropy(hidden, weight, labels, chunk_tokens=chunk_tokens)
