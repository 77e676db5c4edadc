"""Rows between stages: exact by default, rounded within known bounds where that is asked for."""

from __future__ import annotations

import pytest
import torch

from engine.pipeline.wire import LinkDtype, Wire

ROWS = torch.randn(5, 24, generator=torch.Generator().manual_seed(3)) * 10
ROWS[1, 7] = 4000.0  # an outlier is of its own row alone
ROWS[2] = 0.0


def across(kind: LinkDtype, rows: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    wire = Wire(kind, 24, dtype)
    payload = torch.full((len(rows) * wire.row_bytes,), 255, dtype=torch.uint8)
    wire.put(rows.to(dtype), payload)
    return wire.take(payload, len(rows))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_exact_rows_arrive_to_the_bit(dtype: torch.dtype) -> None:
    assert torch.equal(across("exact", ROWS, dtype), ROWS.to(dtype))


def test_rounded_rows_are_near_and_smaller() -> None:
    assert [Wire(kind, 24, torch.float32).row_bytes for kind in ("exact", "bfloat16", "int8")] == [
        96,
        48,
        28,
    ]
    assert torch.equal(across("bfloat16", ROWS), ROWS.bfloat16().float())
    error = (across("int8", ROWS) - ROWS).abs()
    assert (error <= ROWS.abs().amax(dim=1, keepdim=True) / 127 / 2 * 1.001).all()
    assert across("int8", ROWS)[2].eq(0).all()


@pytest.mark.parametrize("kind", ["exact", "bfloat16", "int8"])
def test_a_row_arrives_the_same_whatever_is_beside_it(kind: LinkDtype) -> None:
    alone = torch.cat([across(kind, row[None]) for row in ROWS])
    assert torch.equal(across(kind, ROWS), alone)
