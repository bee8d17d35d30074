"""The loss of samples that nothing is trained on, by an adapter as it stands.

Short samples share a forward pass, a longer one goes through in windows. Keys and values lie in pages that nobody else
uses at the time.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import torch

from engine.finetune import Sample
from engine.kernels.loss import IGNORE_LABEL, linear_cross_entropy
from engine.lora import AdapterBank
from engine.model import Batch, Model, Pages
from engine.packing import Piece, Staging, pack, upload
from engine.shelf import Segments

PASS_TOKENS = 2048
"""Of a forward pass."""


def room_for(samples: Sequence[Sample], block_tokens: int) -> int:
    """Tokens of pages that `mean_loss` needs, whole blocks of them."""
    return (
        max(sum(_blocks(sample, block_tokens) for sample in group) for group in _groups(samples))
        * block_tokens
    )


def mean_loss(
    model: Model, pages: Pages, bank: AdapterBank, slot: int, samples: Sequence[Sample], staging: Staging
) -> float:
    """Mean cross-entropy per label of the adapter in `slot`, without dropout. Overwrites the first pages, for
    `room_for` tokens. Waits for the device."""
    loss = torch.zeros((), dtype=model.compute, device=model.device)
    labels_in_all = 0
    for group in _groups(samples):
        block_tokens = pages.k.shape[2]
        ends = np.cumsum([_blocks(sample, block_tokens) for sample in group])
        blocks = [
            np.arange(end - _blocks(sample, block_tokens), end, dtype=np.int32)
            for sample, end in zip(group, ends.tolist(), strict=True)
        ]
        for start in range(0, len(group[0].tokens), PASS_TOKENS):
            at = slice(start, start + PASS_TOKENS)
            pieces = [Piece(s.tokens[at], start, own, slot) for s, own in zip(group, blocks, strict=True)]
            labels = np.concatenate([np.append(s.labels[1:], IGNORE_LABEL)[at] for s in group])
            x = _forward(model, pages, bank, pieces, staging)
            loss += linear_cross_entropy(
                model.final_norm(x),
                model.weights.head,
                upload(torch.from_numpy(labels), model.device),
                group=model.group,
                first_row=model.vocab.start,
            )[0]
            labels_in_all += int((labels != IGNORE_LABEL).sum())
    return float(loss) / labels_in_all


def _forward(
    model: Model, pages: Pages, bank: AdapterBank, pieces: Sequence[Piece], staging: Staging
) -> torch.Tensor:
    packed = pack(pieces, pages.k.shape[2])
    tokens, positions, slots, tables, start, context, segment_start, segment_adapter = staging.upload(
        packed[:-1]
    )
    segments = Segments(segment_start, segment_adapter)
    batch = Batch(
        tokens=tokens,
        positions=positions,
        slots=slots,
        block_tables=tables,
        query_start=start,
        context_lens=context,
        decodes=0,
        max_keys=packed.max_keys,
        lora=bank.batch(segments, packed.segment_start, packed.segment_adapter),
    )
    return model.forward(batch, pages)


def _groups(samples: Iterable[Sample]) -> Iterator[list[Sample]]:
    """Samples in their order, as many as fit a pass; a longer one by itself."""
    group: list[Sample] = []
    for sample in samples:
        if group and sum(len(s.tokens) for s in (*group, sample)) > PASS_TOKENS:
            yield group
            group = []
        group.append(sample)
    yield group


def _blocks(sample: Sample, block_tokens: int) -> int:
    return -(-len(sample.tokens) // block_tokens)
