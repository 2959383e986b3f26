"""test_plan"""

import os
from argparse import Namespace

import pytest
import torch
from conftest import CPU

import model as models
from support import plan as plan_module


def planned(model, micro_batch=32, processes=1, batch_size=None, recompute=False):
    run = Namespace(processes=processes, shard_group=processes, gpus=None, precision="fp32")
    run.batch_size, run.device = batch_size or micro_batch * processes, torch.device("cpu")
    return plan_module.training_memory(model, run, micro_batch, recompute)


@pytest.mark.parametrize("kind", ["mae", "classifier"])
def test_planned_activations_are_what_autograd_keeps(kind):
    """Bytes of all storages that a forward saves for its backward, parameters and loss aside."""
    shape = {"image_size": 32, "patch_size": 4}
    if kind == "mae":
        model = models.MAE("64x4x2", decoder=(32, 3, 2), **shape)
        given = torch.rand(32, 64).argsort(dim=1)
    else:
        model, given = models.Classifier("64x4x2", classes=10, **shape), None
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    storages = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        losses = model(torch.rand(32, 3, 32, 32), given)
    kept = planned(model)["activations for backward"]
    if kind == "mae":  # of the loss, the differences on the 48 hidden patches
        kept += 4 * 32 * 48 * 48
    assert sum(storages.values()) == pytest.approx(kept, rel=0.01)
    assert losses.requires_grad


def test_a_plan_of_more_processes_and_pieces():
    with torch.device("meta"):
        model = models.MAE("L")
    one, eight, pieces = planned(model), planned(model, 32, 8), planned(model, 32, 8, 512)
    for item in ("weights (fp32)", "Adam's two moments (fp32)", "gradients (fp32)"):
        assert one[item] == 8 * eight[item]
    assert pieces["gradients (fp32)"] == one["gradients (fp32)"]  # whole until the last piece
    assert eight["peak"] < pieces["peak"] and planned(model, recompute=True)["peak"] < one["peak"]
    assert all(plan["peak"] <= sum(plan.values()) - plan["peak"] for plan in (one, eight, pieces))


def test_replicas_keep_all_and_have_buckets_for_all_gradients():
    """In bytes for each parameter: 4 the weights, 8 AdamW's moments, 4 the buckets, 4 what several
    micro-batches add up beside them, and 2 the bf16 copies."""
    with torch.device("meta"):
        model = models.MAE("L")
    run = Namespace(processes=8, shard_group=None, gpus=8, precision="bf16", device=CPU)
    count = sum(p.numel() for p in model.parameters())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    for micro_batch, gradients in ((64, 4 * trained), (32, 8 * trained)):
        run.batch_size = 8 * 64
        plan = plan_module.training_memory(model, run, micro_batch, recompute=False)
        assert plan["weights (fp32)"] == 4 * count
        assert plan["weights, gathered or cast"] == 2 * count
        assert plan["Adam's two moments (fp32)"] == 8 * trained
        assert plan["gradients (fp32)"] == gradients


@pytest.mark.parametrize(
    ("size", "processes", "given", "memory", "group"),
    [
        ("H", 8, None, 80, None),  # 16 bytes for each of 657 M weights, and 2 for the copies: 12 GB
        ("H", 8, None, 10, 8),
        ("6.5B", 128, None, 80, 128),
        ("6.5B", 128, 8, 80, 8),
        ("6.5B", 128, 1, 80, None),  # as the user wants it
        ("6.5B", 1, None, 80, None),
        ("H", 4, None, None, 4),  # processes of a CPU with 24 GB share its memory
        ("B", 4, None, None, None),
    ],
)
def test_a_model_that_fits_is_replicated_one_that_does_not_is_sharded(
    size, processes, given, memory, group, monkeypatch
):
    with torch.device("meta"):
        model = models.MAE(size)
    run = Namespace(processes=processes, shard_group=given, memory=memory, device=CPU)
    run.batch_size, run.micro_batch, run.gpus, run.precision = 4096, None, None, "bf16"
    run.checkpoint_activations = False
    sizes = {"SC_PAGE_SIZE": 4096, "SC_PHYS_PAGES": 24 * 10**9 // 4096}
    monkeypatch.setattr(os, "sysconf", sizes.get)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
    assert plan_module.settle_sharding(model, run) == group
    run.shard_group, run.micro_batch = group, 32
    words = "one process" if processes == 1 else f"{processes} replicas"
    line = plan_module.describe_sharding(model, run)
    assert (words if group is None else f"sharded over {group} processes") in line
    assert memory is None or f"of {memory}.0 GiB" in line
    assert ("more than there is" in line) == (size == "6.5B" and group is None)
