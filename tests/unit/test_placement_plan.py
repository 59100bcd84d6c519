"""Plans as JSON, and what a description tells of them."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nexus_ext.errors import FormatError
from nexus_ext.placement import Plan, PlanRequest, describe, solve
from nexus_ext.placement.plan import NVME, RAM, ROWS, TIERS
from tests.unit.test_placement_builders import GIB, gpu, large_model, large_moe, machine, model


def some_plan() -> Plan:
    return solve(large_model(), machine(), PlanRequest(ram_bytes=3 * GIB))


@pytest.mark.parametrize("ram", [2, 3, 12])
@pytest.mark.parametrize("gpus", [(), (gpu(4 * GIB),)])
def test_a_plan_survives_json(ram: int, gpus: tuple[Any, ...]) -> None:
    plan = solve(large_moe(), machine(gpus=gpus), PlanRequest(ram_bytes=ram * GIB))
    assert Plan.from_json(plan.to_json()) == plan


def test_a_plan_in_which_nothing_is_streamed_survives_json() -> None:
    plan = solve(model(), machine(), PlanRequest())
    assert plan.everything_fits
    assert Plan.from_json(plan.to_json()) == plan


def edit(change: Callable[[dict[str, Any]], object]) -> str:
    data = json.loads(some_plan().to_json())
    change(data)
    return json.dumps(data)


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("", "JSON"),
        ("[]", "object"),
        ('{"version": 1}', "missing"),
        ("[" * 100_000, "JSON"),
        (edit(lambda d: d.update(version=2)), "version"),
        (edit(lambda d: d.update(version=True)), "version"),
        (edit(lambda d: d.update(extra=1)), "extra"),
        (edit(lambda d: d.pop("ring_bytes")), "ring_bytes"),
        (edit(lambda d: d.update(ring_bytes=-1)), "ring_bytes"),
        (edit(lambda d: d.update(ring_bytes=1)), "ring_bytes"),
        (edit(lambda d: d.update(slab_bytes=1.5)), "slab_bytes"),
        (edit(lambda d: d.update(fingerprint=7)), "fingerprint"),
        (edit(lambda d: d.update(io_mode="mmap")), "io_mode"),
        (edit(lambda d: d.update(everything_fits=True)), "everything_fits"),
        (edit(lambda d: d.update(everything_fits="no")), "everything_fits"),
        (edit(lambda d: d.update(notes=[1])), "notes"),
        (edit(lambda d: d["tiers"].update({"output.weight": "disk"})), "output.weight"),
        (edit(lambda d: d["breakdown"].update(ring=0)), "ring"),
        (edit(lambda d: d["breakdown"].update(free=1)), "sum"),
        (edit(lambda d: d["breakdown"].pop("free")), "rows"),
        (edit(lambda d: d["budget"].update(weights_bytes=1)), "weights budget"),
        (edit(lambda d: d["budget"].pop("gpu_bytes")), "gpu_bytes"),
        (edit(lambda d: d["gpu_breakdown"].update(weights=1)), "gpu_breakdown"),
        (edit(lambda d: d["prediction"].update(tok_s=None)), "tok_s"),
        (edit(lambda d: d["prediction"].update(tok_s=-1)), "tok_s"),
        (some_plan().to_json().replace('"io_mode": "auto"', '"io_mode": NaN'), "JSON"),
    ],
)
def test_rubbish_is_refused_and_named(text: str, named: str) -> None:
    with pytest.raises(FormatError, match=named) as refused:
        Plan.from_json(text, source="plan.json")
    assert str(refused.value).startswith("plan.json: ")


@given(st.text(max_size=40) | st.recursive(st.none() | st.integers(), st.lists).map(json.dumps))
@settings(max_examples=100)
def test_no_text_leads_to_another_error(text: str) -> None:
    with pytest.raises(FormatError):
        Plan.from_json(text)


def test_breakdown_has_its_rows_in_order_and_sums_to_the_budget() -> None:
    plan = some_plan()
    assert tuple(plan.breakdown) == ROWS
    assert sum(plan.breakdown.values()) == 3 * GIB
    assert plan.ram_bytes + plan.breakdown["free"] == 3 * GIB


def test_a_description_accounts_for_every_weight() -> None:
    catalog, plan = large_model(), some_plan()
    told = describe(plan, catalog)
    assert told.totals.total_bytes == catalog.nbytes
    for tier in TIERS:
        assert sum(row.tier_bytes[tier] for row in told.roles) == told.totals.tier_bytes[tier]
    assert sum(told.n_tensors.values()) == len(catalog.tensors)
    assert told.roles[0].role == "ffn"
    assert told.limit == "disk"
    assert dict(told.memory)["ring"] == plan.ring_bytes
    assert told.bound_tok_s >= told.tok_s > 0
    # What a token streams is what the description puts on NVMe, rows of the embedding aside.
    embedding = next(t for t in catalog.tensors if t.name == "token_embd.weight")
    dense = told.totals.tier_bytes[NVME] - embedding.nbytes
    assert plan.tiers[embedding.name] == NVME
    assert plan.streamed_bytes_per_token == dense + embedding.row_nbytes


def test_a_description_says_when_everything_fits() -> None:
    catalog = model()
    told = describe(solve(catalog, machine(), PlanRequest()), catalog)
    assert any("Everything fits" in note for note in told.notes)
    assert told.limit == "compute"
    assert told.totals.tier_bytes[RAM] > 0 == told.totals.tier_bytes[NVME]
