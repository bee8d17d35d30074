"""Cross-entropy of a language-model head, with the gradient at the hidden states, chunk by chunk.

Logits of a sample would be its largest tensor by far (0.25 MiB per token in bf16 at a vocabulary of
128k); here only those of one chunk exist. The head is frozen, so the only gradient is that of the
hidden states, and it is computed while the chunk's logits are at hand. Library kernels for this loss
read the count of labels on the host (`.item()`), which an iteration must not wait for; these are
plain matrix products and reductions, on any device, and nothing is read back.

Where the vocabulary is split over ranks, each has the logits of its own rows. Of a token they exchange two
numbers, the logarithm of the sum over their rows and the logit of the label, and in the end the gradient of
the hidden states, which every rank has a part of: whole logits exist nowhere.

Shapes: T tokens, E hidden size, V vocabulary (a rank's rows of it).
"""

from __future__ import annotations

import torch

from engine.kernels.checks import FLOATS, check_device, check_dtype, check_shape
from engine.parallel import ALONE, Group

IGNORE_LABEL = -100


@torch.no_grad()
def linear_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    *,
    chunk_tokens: int = 512,
    group: Group = ALONE,
    first_row: int = 0,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Summed loss of softmax(hidden @ weight^T) against `labels`, and its gradient.

    hidden [T, E], weight [V, E], labels [T] int64, already shifted, IGNORE_LABEL where there is none.
    With p the softmax of a token's logits and c its label:

        loss = sum -log p_c        d_hidden = (p - onehot(c)) @ weight

    Returns loss [] (float32; float64 for float64), count [] int64 of tokens with a label and d_hidden
    [T, E] of hidden's type, the gradient of the *sum*. At most chunk_tokens x V logits exist at a time, once
    in the type of the loss and once in hidden's where that is another. On a `group` of several ranks
    `weight` are this rank's rows, from `first_row` on; all get the same.
    Raises ValueError for tensors that do not fit together.
    """
    check_shape("hidden", hidden, (None, None))
    check_dtype("hidden", hidden, (*FLOATS, torch.float64))
    check_shape("weight", weight, (None, hidden.shape[1]))
    check_dtype("weight", weight, (hidden.dtype,))
    check_shape("labels", labels, (hidden.shape[0],))
    check_dtype("labels", labels, (torch.int64,))
    check_device("weight", weight, hidden.device)
    check_device("labels", labels, hidden.device)
    if chunk_tokens < 1:
        raise ValueError(f"chunk_tokens must be at least 1, got {chunk_tokens}")
    compute = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    d_hidden = torch.empty_like(hidden, memory_format=torch.contiguous_format)
    loss = torch.zeros((), dtype=compute, device=hidden.device)
    for first in range(0, hidden.shape[0], chunk_tokens):
        part = slice(first, first + chunk_tokens)
        given = (hidden[part], weight, labels[part], d_hidden[part], compute)
        loss += _chunk(*given) if group.size == 1 else _split_chunk(*given, group, first_row)
    return loss, (labels != IGNORE_LABEL).sum(), group.all_reduce(d_hidden)


def _chunk(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    d_hidden: torch.Tensor,
    compute: torch.dtype,
) -> torch.Tensor:
    """Loss of one chunk; writes d_hidden. The logits turn into their own gradient in place (logsumexp would
    make another tensor of their size)."""
    logits = (hidden @ weight.T).to(compute)
    used = (labels != IGNORE_LABEL)[:, None]
    at = labels.where(used[:, 0], 0)[:, None]
    logits.sub_(logits.amax(1, keepdim=True))
    own = logits.gather(1, at)
    total = logits.exp_().sum(1, keepdim=True)
    loss = (total.log() - own).where(used, 0.0).sum()
    logits.div_(total)
    logits.scatter_add_(1, at, logits.new_full((1, 1), -1.0).expand_as(at))
    logits.masked_fill_(~used, 0.0)
    torch.matmul(logits.to(hidden.dtype), weight, out=d_hidden)
    return loss


def _split_chunk(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    d_hidden: torch.Tensor,
    compute: torch.dtype,
    group: Group,
    first_row: int,
) -> torch.Tensor:
    """Loss of one chunk; writes this rank's part of d_hidden."""
    logits = (hidden @ weight.T).to(compute)
    used = labels != IGNORE_LABEL
    at = labels - first_row
    own = used & (at >= 0) & (at < weight.shape[0])
    at = at.where(own, 0)[:, None]
    picked = logits.gather(1, at)[:, 0].where(own, 0.0)
    top = logits.amax(1)
    total = logits.sub_(top[:, None]).exp_().sum(1)
    every = group.all_gather(torch.stack((total.log() + top, picked)))
    log_total = every[:, 0].logsumexp(0)
    loss = (log_total - every[:, 1].sum(0)).where(used, 0.0).sum()
    logits.mul_((top - log_total).exp_()[:, None])
    logits.scatter_add_(1, at, -own[:, None].to(compute))
    logits.masked_fill_(~used[:, None], 0.0)
    torch.matmul(logits.to(hidden.dtype), weight, out=d_hidden)
    return loss
