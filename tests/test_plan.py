"""support/plan.py: FLOPs as PyTorch counts; memory as autograd keeps it; replicas or shards."""

import os
from argparse import Namespace

import pytest
import torch
from conftest import CPU, SMALL, on_meta
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from model import MAE, Classifier, ViT
from support.plan import (
    describe_sharding,
    fitting_batch,
    flops_per_image,
    settle_sharding,
    training_memory,
)


def settled(**given):
    """A stage's settled arguments."""
    run = {"processes": 1, "shard_group": None, "gpus": None, "memory": None, "device": CPU}
    run |= {"precision": "bf16", "checkpoint_activations": False, "micro_batch": None}
    return Namespace(**run | given)


def counted_flops(model, train=False):
    """PyTorch's count for one image. Only the math backend's products of attention are counted."""
    images = torch.empty(1, *model.input_shape, device="meta")
    ids = torch.zeros(1, model.num_patches, dtype=torch.long, device="meta")
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        output = model(images, ids) if isinstance(model, MAE) else model(images)
        if train:
            output.sum().backward()
    return counter.get_total_flops()


WIDE = {"size": "toy", "image_size": (16, 40), "channels": 5}


@pytest.mark.parametrize("kind", [ViT, MAE])
@pytest.mark.parametrize("arguments", [WIDE, SMALL | {"size": "32x1x4"}, {"size": "H"}])
def test_flops_are_what_pytorch_counts(kind, arguments):
    model = on_meta(kind, **arguments)
    # Both count matrix products only, a multiply-add as two: integers, so exactly.
    assert flops_per_image(model) == counted_flops(model)


@pytest.mark.parametrize("size, gigaflops", [("B", 58), ("L", 124), ("H", 288)])
def test_flops_of_a_training_step(size, gigaflops):
    model = on_meta(MAE, size)
    flops = 3 * flops_per_image(model)
    # These figures round each part to 1 GF and leave out the pixel head.
    assert flops / 1e9 == pytest.approx(gigaflops, rel=0.015)
    # The backward costs twice the forward, but the pixels have no gradient.
    pixels = 2 * model.num_visible * 3 * model.patch_size**2 * model.width
    assert counted_flops(model, train=True) == flops - pixels


@pytest.mark.parametrize("kind", [MAE, Classifier])
def test_planned_activations_are_what_autograd_keeps(kind):
    """Bytes of all storages that a forward saves for its backward, without the parameters."""
    arguments = {"decoder": (32, 3, 2)} if kind is MAE else {"classes": 10}
    model = kind("64x4x2", image_size=32, patch_size=4, **arguments)
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    storages = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    ids = torch.rand(32, 64).argsort(dim=1) if kind is MAE else None
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(torch.rand(32, 3, 32, 32), ids)
    saved = sum(size for place, size in storages.items() if place not in own)
    plan = training_memory(model, settled(batch_size=32, precision="fp32"), 32)
    assert saved == pytest.approx(plan["activations for backward"], rel=0.1)


MEASURED = [("B", 256, 11.7), ("L", 256, 20.4), ("H", 128, 23.1), ("B", 1024, 42.2)]


@pytest.mark.parametrize(("size", "batch", "gib"), MEASURED)
def test_planned_peaks_are_those_measured_on_an_h200(size, batch, gib):
    """GiB in bf16, compiled: tests/bench/results/NVIDIA-H200-2026-11-27-2.csv."""
    model, run = on_meta(MAE, size), settled(batch_size=batch, gpus=1)
    peak = training_memory(model, run, batch)["peak"]
    assert peak / 2**30 == pytest.approx(gib, rel=0.05)
    run.checkpoint_activations = True
    assert training_memory(model, run, batch)["peak"] < peak


# Processes, of which as many share the weights; micro-batches; bytes of gradients a parameter.
SPREAD = [(1, None, 1, 4), (1, None, 2, 4), (8, 8, 1, 0.5), (8, 8, 2, 4)]
SPREAD += [(8, None, 1, 4), (8, None, 2, 8)]  # replicas: buckets, and what they add up


@pytest.mark.parametrize(("processes", "group", "micro_batches", "gradients"), SPREAD)
def test_a_parameter_takes_16_bytes_over_the_processes_that_share_it(
    processes, group, micro_batches, gradients
):
    model = on_meta(MAE, "L")
    count = sum(p.numel() for p in model.parameters())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    run = settled(processes=processes, shard_group=group)
    run.batch_size = 32 * micro_batches * processes
    plan = training_memory(model, run, 32)
    assert plan["weights (fp32)"] == 4 * count / (group or 1)
    assert plan["Adam's two moments (fp32)"] == 8 * trained / (group or 1)
    assert plan["gradients (fp32)"] == gradients * trained
    assert group or plan["weights, gathered or cast"] == 2 * count
    items = sum(plan.values()) - plan["peak"]
    assert plan["peak"] <= items and (micro_batches == 1 or plan["peak"] > 0.9 * items)


# Activations kept; GiB; images of a process; the largest micro-batch.
FITTING = [(True, 80, 4096, 256), (True, 80, 300, 300), (True, 80, 75, 75)]
FITTING += [(False, 80, 4096, 4096), (True, 14, 6, 2), (True, 14, 9, 1)]


@pytest.mark.parametrize(("kept", "memory", "images", "largest"), FITTING)
def test_the_largest_micro_batch_divides_the_images_and_is_even(kept, memory, images, largest):
    run = settled(batch_size=4096, memory=memory, checkpoint_activations=not kept)
    assert fitting_batch(on_meta(MAE, "H"), images, run) == largest


PLACES = [
    ("H", 8, None, 80, None),  # 16 bytes for each of 657 M weights, and 2 for the copies: 12 GB
    ("H", 8, None, 10, 8),
    ("6.5B", 128, None, 80, 128),
    ("6.5B", 128, 8, 80, 8),
    ("6.5B", 128, 1, 80, None),  # as the user wants it
    ("6.5B", 1, None, 80, None),
    ("H", 4, None, None, 4),  # processes of a CPU with 24 GB share its memory
    ("B", 4, None, None, None),
]


@pytest.mark.parametrize(("size", "processes", "given", "memory", "group"), PLACES)
def test_a_model_that_fits_is_replicated_one_that_does_not_is_sharded(
    size, processes, given, memory, group, monkeypatch
):
    model = on_meta(MAE, size)
    run = settled(processes=processes, shard_group=given, memory=memory, batch_size=4096)
    sizes = {"SC_PAGE_SIZE": 4096, "SC_PHYS_PAGES": 24 * 10**9 // 4096}
    monkeypatch.setattr(os, "sysconf", sizes.get)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
    assert settle_sharding(model, run) == group
    run.shard_group, run.micro_batch = group, 32
    words = "one process" if processes == 1 else f"{processes} replicas"
    line = describe_sharding(model, run)
    assert (words if group is None else f"sharded over {group} processes") in line
    assert memory is None or f"of {memory}.0 GiB" in line
    assert ("more than there is" in line) == (size == "6.5B" and group is None)
