"""model.py against independent formulations: the public MAE's, numpy's, FSDP2's.

The transformer in reference.py is plain functions of a dict of named parameters: a
convolution for the patch embedding, softmax written out, a decoder that un-shuffles.
"""

import gc
import itertools
import math
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import (
    CPU,
    SMALL,
    SMALL_MAE,
    TINY_TEXT,
    equal_states,
    on_meta,
    one_line,
    random_ids,
    random_images,
    stage,
)
from reference import (
    normalized,
    public_mae,
    reference_blocks,
    reference_embedding,
    reference_norm,
    reference_patches,
    with_class_token,
)
from torch._dynamo.testing import CompileCounter
from torch.testing import assert_close

import model as models
from model import MAE, Classifier, ViT, full_tensor, parallelize, sync_gradients
from support import pictures
from support.plan import flops_per_image
from tasks.lit import TwoTowers
from tasks.video import VideoClassifier


def float64(kind, seed=0, **arguments):
    """A ViT or MAE of random parameters: a bias of 0 or a scale of 1 hides mistakes."""
    model = on_meta(kind, **arguments).double().to_empty(device="cpu")
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.uniform_(-0.1, 0.1, generator=generator)
            if "norm" in name and name.endswith("weight"):
                parameter += 1
    return model


def reference_vit(model, images, gates=None):
    """(tokens, attention of the last block) of a float64 ViT."""
    weights = dict(model.named_parameters())
    x = with_class_token(weights, reference_embedding(weights, images))
    x, attention = reference_blocks(x, weights, "blocks", model.heads, gates)
    return reference_norm(x, weights, "norm"), attention


# ------------------------------------------------------------------------ loss of a MAE

RAW = {"size": "toy", "normalize_targets": False}

# arguments, visible patches, heads of the encoder and of the decoder
MAE_CASES = {
    "toy": ({"size": "toy", "image_size": 32}, 4, 4, 4),
    "toy, wide, 5 channels": ({"size": "toy", "image_size": (16, 40), "channels": 5}, 2, 4, 4),
    "raw pixels": ({**RAW, "image_size": (32, 16)}, 2, 4, 4),
    "raw, 5 channels": ({**RAW, "image_size": 24, "channels": 5}, 2, 4, 4),
    "learned positions, half hidden": ({**SMALL_MAE, "positions": "learned"}, 3, 4, 2),
    "B": ({"size": "B", "image_size": (64, 32)}, 2, 12, 16),
}


def relative_error(value, expected):
    return ((value - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("case", MAE_CASES)
def test_loss_and_gradients_are_the_public_mae_s(case):
    arguments, visible, *heads = MAE_CASES[case]
    model = float64(MAE, **arguments)
    images, ids = random_images(model), random_ids(model)
    parameters = dict(model.named_parameters())
    losses = model(images, ids)
    expected = public_mae(parameters, images, ids, visible, *heads, model.normalize_targets)
    assert losses.shape == (len(images),)
    # float64 has 16 digits; a sum of thousands in another order costs three or four.
    assert relative_error(losses, expected) < 1e-10
    trained = {name: p for name, p in parameters.items() if p.requires_grad}
    gradients = torch.autograd.grad(losses.mean(), list(trained.values()))
    expected = torch.autograd.grad(expected.mean(), list(trained.values()))
    errors = map(relative_error, gradients, expected)
    assert not {name: error for name, error in zip(trained, errors) if not error < 1e-10}
    fixed = {"decoder_pos_embed"} | ({"pos_embed"} if "positions" not in arguments else set())
    assert trained.keys() | fixed == parameters.keys()


REFUSED = [
    ({**SMALL_MAE, "mask_ratio": ratio}, r"of \d+ patches visible: want 1 to")
    for ratio in (0, 0.9, 1)
]
REFUSED += [({"size": s}, f"size '{s}'") for s in ("huge", "64x2", "64x2x5", "64x0x4", "axbxc")]
INDIVISIBLE = [
    ((30, 50), 16, "32x48"),
    (10, 16, "16x16"),
    ((64, 3), 8, "64x8"),
    (225, 14, "224x224"),
]
for size, patch, nearest in INDIVISIBLE:
    REFUSED.append(({"size": "toy", "image_size": size, "patch_size": patch}, rf"\b{nearest}$"))


@pytest.mark.parametrize(("arguments", "words"), REFUSED)
def test_what_cannot_be_built_is_refused_in_one_line(arguments, words):
    with pytest.raises(ValueError, match=words) as error:
        MAE(**arguments)
    assert one_line(error)


# ---------------------------------------------------------------- patches and positions


def test_patchify_is_row_by_row_and_pixel_channel_within_a_patch():
    images = torch.arange(2 * 3 * 4 * 6).reshape(2, 3, 4, 6)
    patches = models.patchify(images, 2)
    assert patches.shape == (2, 6, 12)
    for b, row, column, y, x, c in itertools.product(*map(range, (2, 2, 3, 2, 2, 3))):
        pixel = images[b, c, 2 * row + y, 2 * column + x]
        assert patches[b, 3 * row + column, (2 * y + x) * 3 + c] == pixel
    assert torch.equal(pictures.unpatchify(patches, 2, (2, 3)), images)


def test_sincos_positions_by_numpy():
    rows, columns, width = 3, 5, 16
    table = models.sincos_positions(width, (rows, columns))
    assert table.shape == (1, 1 + rows * columns, width)
    assert not table[0, 0].any()
    for row, column in itertools.product(range(rows), range(columns)):
        angles = [[n / 10000 ** (i / 4) for i in range(4)] for n in (column, row)]
        expected = np.concatenate([f(a) for a in angles for f in (np.sin, np.cos)])
        # Values up to 1, rounded once to float32: at most half of 2**-23.
        np.testing.assert_allclose(table[0, 1 + row * columns + column], expected, atol=6e-8)


def test_resampling_is_bicubic_over_a_row_major_grid_and_leaves_the_class_row():
    table = torch.randn(1, 1 + 3 * 4, 5, generator=torch.Generator().manual_seed(0))
    grid = torch.empty(1, 5, 3, 4)
    for row, column in itertools.product(range(3), range(4)):
        grid[0, :, row, column] = table[0, 1 + row * 4 + column]
    grid = F.interpolate(grid, size=(6, 2), mode="bicubic", align_corners=False)
    resampled = models.resample_positions(table, (3, 4), (6, 2))
    assert resampled.shape == (1, 13, 5)
    assert torch.equal(resampled[:, 0], table[:, 0])
    for row, column in itertools.product(range(6), range(2)):
        assert torch.equal(resampled[0, 1 + row * 2 + column], grid[0, :, row, column])
    # The same grid and a constant stay, to a few float32 roundings of values up to 3.
    same = models.resample_positions(table, (3, 4), (3, 4))
    assert_close(same, table, rtol=0, atol=2e-6)
    constant = models.resample_positions(table[:, :1].expand(-1, 13, -1), (3, 4), (5, 7))
    assert_close(constant, table[:, :1].expand(-1, 36, -1), rtol=0, atol=2e-6)


# ---------------------------------------------------------------------------------- ViT


@pytest.mark.parametrize("channels", [1, 10])
def test_vit_is_the_reference_transformer(channels):
    model = float64(ViT, **SMALL, channels=channels)
    images = random_images(model)
    expected, _ = reference_vit(model, images)
    assert expected.shape == (3, 1 + 2 * 3, 32)
    assert_close(model(images), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("shape", [(2, 3, 24, 16), (2, 1, 16, 24), (3, 16, 24), (2, 3, 16, 32)])
def test_images_of_another_shape_are_refused_with_what_to_build(shape):
    vit, mae = ViT(**SMALL), MAE(**SMALL_MAE)
    for call in partial(vit, torch.zeros(shape)), partial(mae, torch.zeros(shape), random_ids(mae)):
        with pytest.raises(ValueError, match="build it with that image_size and channels") as error:
            call()
        assert str(shape) in one_line(error) and "3, 16, 24" in one_line(error)


def test_pool():
    tokens = torch.tensor([[[100.0, 7.0], [1.0, 2.0], [3.0, 6.0]]])
    assert models.pool(tokens, "cls").tolist() == [[100.0, 7.0]]
    assert models.pool(tokens, "mean").tolist() == [[2.0, 4.0]]


def test_drop_path_skips_branches_below_the_rate_and_scales_the_others():
    """The rates of the three blocks are 0, 0.15 and 0.3; the noise is just above or below.
    Every pattern of the four branches that can be dropped is one sample."""
    model = float64(ViT, **SMALL, drop_path=0.3)
    images = random_images(model, 16)
    rates = torch.tensor([0.0, 0.15, 0.3], dtype=torch.float64)[:, None]  # (L, 1)
    kept = torch.tensor(list(itertools.product([0, 1], repeat=4)), dtype=torch.float64)
    kept = torch.cat([torch.ones(16, 2), kept], 1).view(16, 3, 2)
    noise = (rates + 0.02 * kept - 0.01).clamp(min=0)
    dropped = model(images, noise)
    expected, _ = reference_vit(model, images, kept / (1 - rates))
    assert_close(dropped, expected, rtol=1e-10, atol=1e-10)
    # It does not depend on the rest of the batch, but for the order of sums.
    alone = model(images[5:7].flip(0), noise[5:7].flip(0)).flip(0)
    assert_close(dropped[5:7], alone, rtol=1e-12, atol=1e-12)
    expected, _ = reference_vit(model, images)
    assert_close(model(images), expected, rtol=1e-10, atol=1e-10)  # no noise, no drop


@pytest.mark.parametrize("size", ["32x1x4", "32x3x2"])
def test_class_attention_is_the_last_block_s_softmax_from_the_class_token(size):
    model = float64(ViT, **{**SMALL, "size": size})
    images = random_images(model)
    _, attention = reference_vit(model, images)
    rows = pictures.class_attention(model, images)
    assert rows.shape == (3, int(size[-1]), 6)
    assert_close(rows, attention[:, :, 0, 1:], rtol=1e-10, atol=1e-10)
    total = rows.sum(-1) + attention[:, :, 0, 0]
    assert_close(total, torch.ones_like(total), rtol=0, atol=1e-10)


# ----------------------------------------------------------------------- the classifier


@pytest.mark.parametrize("classes", [7, 300])
def test_tag_loss_and_its_gradient_are_those_of_the_dense_formulation(classes):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(5, classes, generator=generator, dtype=torch.float64, requires_grad=True)
    tags = torch.tensor([[0, 3, 6], [2, -1, -1], [5, 1, -1], [4, -1, -1], [-1, -1, -1]])
    target = torch.zeros(5, classes, dtype=torch.float64)
    for row, ids in enumerate(tags.tolist()):
        for number in (ids := [i for i in ids if i >= 0]):
            target[row, number] = 1 / len(ids)
    weight = torch.tensor([1.0, 0.5, 2.0, 1.0, 0.0], dtype=torch.float64)
    dense = -(target * logits.log_softmax(dim=1)).sum(dim=1)
    (expected,) = torch.autograd.grad((dense * weight).sum(), logits)
    loss = models.tag_loss(logits, tags)
    (gradient,) = torch.autograd.grad((loss * weight).sum(), logits)
    assert_close(loss[:4], dense[:4], rtol=1e-10, atol=0)
    assert_close(gradient, expected, rtol=1e-10, atol=1e-15)


@pytest.mark.parametrize("how", ["cls", "mean"])
def test_a_classifier_is_its_encoder_pooled_normed_and_a_linear_head(how):
    model = Classifier(classes=5, pool=how, head_std=0.1, **SMALL)
    images = random_images(model)
    x = model.encode(images)
    norm = model.norm if how == "cls" else model.fc_norm
    pooled = x[:, 0] if how == "cls" else x[:, 1:].mean(dim=1)
    expected = F.layer_norm(pooled, (32,), norm.weight, norm.bias, 1e-6) @ model.head.weight.T
    assert_close(model(images), expected)
    assert 0.05 < model.head.weight.std() < 0.2 and not model.head.bias.any()
    assert flops_per_image(model) == flops_per_image(ViT(**SMALL)) + 2 * 32 * 5


# ----------------------------------------------------------------------- initialisation


def test_initialize_is_a_function_of_seed_and_name():
    state = MAE(**SMALL_MAE).state_dict()
    deferred = on_meta(MAE, **SMALL_MAE).to_empty(device="cpu")
    with torch.no_grad():
        for parameter in deferred.parameters():
            parameter.fill_(math.nan)
    models.initialize(deferred)
    assert equal_states(state, deferred.state_dict())
    # What a name gets does not depend on other modules.
    shared = ViT(**{**SMALL, "size": "32x2x4"}).state_dict()
    assert equal_states(shared, {name: state[name] for name in shared})

    models.initialize(deferred, seed=1)
    drawn = {n: t for n, t in state.items() if t.std() > 0 and "pos_embed" not in n}
    assert len(drawn) == 2 + 1 + 4 * 5 + 2
    for name, tensor in deferred.state_dict().items():
        assert torch.equal(tensor, state[name]) == (name not in drawn), name
    for one, other in itertools.combinations(drawn.values(), 2):
        assert one.shape != other.shape or not torch.equal(one, other)


def test_initial_values_are_the_public_mae_s():
    model = MAE("toy", image_size=(32, 48), positions="learned")
    for name, parameter in model.named_parameters():
        if name == "decoder_pos_embed":
            assert torch.equal(parameter, models.sincos_positions(128, (4, 6)))
        elif name.endswith(("_token", "pos_embed")):
            # The deviation of n draws is off by 1 / sqrt(2 n): four times that is rare.
            near = 4 / math.sqrt(2 * parameter.numel())
            assert parameter.std().item() == pytest.approx(0.02, rel=near)
            assert abs(parameter.mean()) < 4 * 0.02 / math.sqrt(parameter.numel())
        elif parameter.ndim == 1:
            assert (parameter == (0 if name.endswith("bias") else 1)).all(), name
        else:  # Xavier-uniform
            bound = math.sqrt(6 / sum(parameter.flatten(1).shape))
            # 12,000 draws or more: the largest is within 1 % of the bound, deviation and mean
            # are within four of their own deviations.
            assert 0.99 * bound < parameter.max() <= bound
            assert -bound <= parameter.min() < -0.99 * bound
            assert parameter.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.02)
            assert abs(parameter.mean()) < 0.04 * bound / math.sqrt(3)


def test_a_pair_begins_as_the_released_ones_did():
    pair = TwoTowers("64x1x2", {"size": "16x1x2", "vocabulary": 9}, shared_width=256, image_size=32)
    for projection, width in ((pair.image_projection, 64), (pair.text_projection, 16)):
        # 4,096 draws or more: their deviation is off by less than 5 %.
        assert projection.std().item() == pytest.approx(width**-0.5, rel=0.05)
    assert pair.logit_scale.exp().item() == pytest.approx(1 / 0.07)


# ----------------------------------------------------------------------------- counting


# name, width, layers, heads, patches (a side, visible in MAE), millions of parameters:
# the paper's table 8; DeiT's for T, S
ARCHITECTURES = [
    ("T", 192, 12, 3, 14, 49, None),
    ("S", 384, 12, 6, 14, 49, None),
    ("B", 768, 12, 12, 14, 49, 85.8),
    ("L", 1024, 24, 16, 14, 49, 303.3),
    ("H", 1280, 32, 16, 16, 64, 630.8),
    ("2B", 2560, 24, 32, 16, 64, 1890.4),
    ("6.5B", 4096, 32, 32, 16, 64, 6447.6),
]


@pytest.mark.parametrize("size, width, layers, heads, side, visible, millions", ARCHITECTURES)
def test_architectures(size, width, layers, heads, side, visible, millions):
    encoder, autoencoder = on_meta(ViT, size), on_meta(MAE, size)
    assert encoder.num_patches == autoencoder.num_patches == side**2
    assert autoencoder.num_visible == visible
    assert encoder.pos_embed.shape == (1, 1 + side**2, width)
    assert (len(encoder.blocks), encoder.blocks[0].attn.heads) == (layers, heads)
    total = sum(p.numel() for p in encoder.parameters())
    assert millions is None or round(total / 1e6, 1) == millions
    counts = {name: p.numel() for name, p in autoencoder.named_parameters()}
    decoder = sum(n for name, n in counts.items() if name.startswith(("decoder", "mask")))
    assert sum(counts.values()) == total + decoder
    assert millions is None or 26.1 <= round(decoder / 1e6, 1) <= 27.8


# -------------------------------------------------------------------------- reconstruct


@pytest.mark.parametrize("normalize", [True, False])
def test_reconstruction(normalize, monkeypatch):
    model = MAE(**SMALL_MAE, normalize_targets=normalize)
    images, ids = 2 + 3 * random_images(model), random_ids(model)
    patches = reference_patches(images, model.patch_size)
    visible, hidden = (
        order[..., None].expand(-1, -1, 192) for order in ids.split(model.num_visible, dim=1)
    )

    def painted():
        return reference_patches(pictures.reconstruct(model, images, ids), model.patch_size)

    assert torch.equal(painted().gather(1, visible), patches.gather(1, visible))
    assert (painted().gather(1, hidden) != patches.gather(1, hidden)).float().mean() > 0.99
    # A perfect prediction is the image, to a few roundings of pixels of about 10.
    targets = normalized(patches) if normalize else patches
    monkeypatch.setattr(model, "forward_decoder", lambda *_: targets.gather(1, hidden))
    assert_close(painted(), patches, rtol=0, atol=1e-5 if normalize else 0)
    assert_close(model(images, ids), torch.zeros(3), rtol=0, atol=1e-10)
    # A prediction of 0 is the mean of the patch, of 192 pixels of about 3, or 0.
    monkeypatch.setattr(model, "forward_decoder", lambda *_: torch.zeros(hidden.shape))
    mean = (patches.mean(-1, keepdim=True) * normalize).expand_as(patches)
    assert_close(painted().gather(1, hidden), mean.gather(1, hidden), rtol=0, atol=1e-5)


# ------------------------------------------------------------------------- optimisation


@pytest.mark.parametrize("positions", ["sincos", "learned"])
def test_matrices_and_tokens_are_decayed_and_nothing_else(positions):
    model = float64(MAE, **SMALL_MAE, positions=positions)
    groups = models.parameter_groups(model, weight_decay=0.1)
    fixed = {"decoder_pos_embed"} | ({"pos_embed"} if positions == "sincos" else set())
    grouped = sorted(id(parameter) for group in groups for parameter in group["params"])
    trained = {id(p) for name, p in model.named_parameters() if name not in fixed}
    assert grouped == sorted(trained)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    torch.optim.AdamW(groups, lr=0.5).step()  # with gradients of 0, decay alone
    for name, parameter in model.named_parameters():
        factor = 1 if name in fixed or name.endswith("bias") or "norm" in name else 0.95
        # One product in float64.
        assert_close(parameter.data, factor * before[name], rtol=1e-14, atol=0)


@pytest.mark.parametrize("shard", [None, 1])
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("recompute", [False, True])
def test_sharded_compiled_and_recomputed_steps_are_the_plain_one(
    shard, compiled, recompute, group, monkeypatch
):
    # The graph is the same with any backend; the default one needs a C++ compiler.
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    plain, model = MAE(**SMALL_MAE), MAE(**SMALL_MAE)
    images, ids = random_images(plain), random_ids(plain)
    parallelize(model, CPU, shard, "fp32", compiled, recompute)
    assert [n for n, _ in model.named_parameters()] == [n for n, _ in plain.named_parameters()]
    for part in range(2):  # accumulated over two micro-batches, as in the stages
        with sync_gradients(model, last=part == 1):
            for one in (plain, model):
                one(images[part : part + 1], ids[part : part + 1]).sum().backward()
    for (name, a), b in zip(plain.named_parameters(), model.parameters()):
        if a.requires_grad:
            assert_close(full_tensor(b.grad), a.grad, rtol=1e-4, atol=1e-6, msg=name)
    with torch.no_grad():
        assert_close(model(images, ids), plain(images, ids), rtol=1e-4, atol=1e-5)


def example(kind):
    """(model, what a training step computes of it) on three small random samples."""
    draw = torch.Generator().manual_seed(0)
    shape = {"image_size": 16, "patch_size": 4}
    images = torch.randn(3, 3, 16, 16, generator=draw)
    if kind == "mae":
        model = MAE("32x4x2", decoder=(16, 2, 2), **shape)
        ids = random_ids(model, 3)
        return model, lambda model: [model(images, ids)]
    if kind in ("towers", "cached features"):
        tokens = torch.randint(4, 30, (3, 9), generator=draw)
        features = torch.randn(3, 16, generator=draw)  # fp32, whatever the weights compute in
        model = TwoTowers("16x2x2", TINY_TEXT, 8, **shape)
        cached = kind == "cached features"
        return model, lambda model: model(features if cached else model.features(images), tokens)
    shape |= {"classes": 5, "head_std": 0.1, "drop_path": 0.4}
    noise = torch.rand(3, 4, 2, generator=draw)  # some of it next to a rate in bf16
    if kind == "classifier":
        return Classifier("32x4x2", **shape), lambda model: [model(images, noise)]
    clips = torch.randn(3, 3, 2, 16, 16, generator=draw)
    return VideoClassifier("32x4x2", frames=2, **shape), lambda model: [model(clips, noise)]


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("kind", ["mae", "classifier", "video", "towers", "cached features"])
def test_bf16_without_sharding_is_fsdp_s_bit_for_bit(kind, recompute, group):
    """Loss and every gradient: the casts of cast_weights are those of FSDP2's policy."""

    def step(shard):
        model, compute = example(kind)
        plain = compute(model)
        methods = () if kind in ("mae", "classifier", "video") else ("features",)
        options = {"checkpoint_activations": recompute, "methods": methods}
        outputs = compute(parallelize(model, CPU, shard, "bf16", **options))
        loss = sum(output.float().pow(3).sum() for output in outputs)
        loss.backward()
        assert all(parameter.dtype == torch.float32 for parameter in model.parameters())
        gradients = [full_tensor(p.grad) for p in model.parameters() if p.grad is not None]
        return plain, outputs, loss, gradients

    (plain, outputs, loss, gradients), (*_, expected, theirs) = step(None), step(1)
    assert torch.equal(loss, expected)
    assert len(gradients) == len(theirs) and all(map(torch.equal, gradients, theirs))
    assert all(gradient.dtype == torch.float32 for gradient in gradients)
    # Computed in bf16, of 8 bits (0.4 %), but losses and embeddings are fp32.
    assert not torch.equal(outputs[0], plain[0])
    if kind not in ("classifier", "video"):
        assert all(output.dtype == torch.float32 for output in outputs)
        assert all(gradient.any() for gradient in gradients)
        assert_close(outputs, plain, rtol=0.02, atol=0 if kind == "mae" else 0.02)


@pytest.fixture
def graphs(monkeypatch):
    """A counter of compiled graphs. A model that is not one graph is an error."""
    torch._dynamo.reset()
    counter = CompileCounter()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=counter, fullgraph=True))
    return counter


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize(("shard", "kind"), [(None, "mae"), (1, "mae"), (None, "vit"), (1, "vit")])
def test_training_is_compiled_once(shard, kind, recompute, group, graphs):
    """One graph or, sharded, one for each kind of block: encoder's, decoder's, its last one.
    Measuring an uneven batch in between compiles nothing more."""
    shape = {"image_size": 16, "patch_size": 4}
    model = MAE("32x4x2", decoder=(16, 3, 2), **shape)
    if kind == "vit":  # each block has another rate
        model = Classifier("32x12x2", 5, drop_path=0.3, **shape)
    parallel = parallelize(
        model, CPU, shard, "bf16", compile=True, checkpoint_activations=recompute
    )
    for step in range(20):
        images = random_images(model, 4)
        given = random_ids(model, 4) if kind == "mae" else torch.rand(4, 12, 2)
        losses = parallel(images, given)
        if kind == "vit":
            losses = models.tag_loss(losses, torch.tensor([[0, -1], [1, 2], [3, 4], [4, -1]]))
        losses.sum().backward()
        if step % 5 == 0:
            model.eval()
            with torch.no_grad():
                model(images[:3], given[:3])
            model.train()
    assert graphs.frame_count == (3 if shard and kind == "mae" else 1)


def test_a_compiled_replica_is_cut_where_a_bucket_is_full(group, graphs):
    """So gradients of later blocks are sent while those of the first are computed. Blocks cast
    their own weights: gradients of weights cast at the start would be ready at the end."""
    plain, model = (Classifier("128x6x2", 5, image_size=16, patch_size=4) for _ in range(2))
    parallelize(plain, CPU, None, "bf16")
    model = parallelize(model, CPU, None, "bf16", compile=True)
    parallel, images = models.replicate(model, bucket_mb=1), random_images(model)  # 0.8 MB a block
    assert_close(parallel(images), plain(images))
    assert graphs.frame_count >= 4


def test_replicas_send_gradients_with_the_last_micro_batch_alone(group):
    model, sent = MAE(**SMALL_MAE), []
    parallel = models.replicate(model)

    def hook(_, bucket):
        sent.append(bucket.buffer().numel())
        future = torch.futures.Future()
        future.set_result(bucket.buffer())
        return future

    parallel.register_comm_hook(None, hook)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    for last in (False, False, True) * 3:
        sent.clear()
        with sync_gradients(parallel, last):
            parallel(random_images(model), random_ids(model)).sum().backward()
        assert sum(sent) == (trained if last else 0)


def test_sharded_hooks_run_once(group, monkeypatch):
    """FSDP2 hooks the call of a module: its forward must not be hooked beside it."""
    from torch.distributed.fsdp._fully_shard._fsdp_state import FSDPState

    model, hooked, plain = MAE(**SMALL_MAE), [], FSDPState._pre_forward
    counted = lambda state, module, *inputs: hooked.append(module) or plain(state, module, *inputs)
    monkeypatch.setattr(FSDPState, "_pre_forward", counted)
    parallelize(model, CPU, 1)
    model(random_images(model), random_ids(model))
    assert len(hooked) == len({*hooked}) == 1 + len(model.blocks) + len(model.decoder_blocks)


def test_cast_weights_leaves_the_module_what_it_is():
    """In its methods, self is the module: with its mode, and assignments to it stay."""

    class Counter(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight, self.calls = torch.nn.Parameter(torch.ones(2)), 0

        def forward(self, x):
            self.calls += 1
            return self.training, (self.weight * x).dtype

        def method(self, x):
            return "method", *self.forward(x)

    module = Counter().eval()
    for method in ("forward", "method"):
        models.cast_weights(module, method)
    x = torch.ones(2, dtype=torch.bfloat16)
    assert module(x) == (False, torch.bfloat16) and module.train()(x) == (True, torch.bfloat16)
    assert module.method(x) == ("method", True, torch.bfloat16)
    assert module.calls == 3
    assert module.weight.dtype == torch.float32 and [*module.state_dict()] == ["weight"]


def test_sharded_steps_leave_nothing_behind(group):
    """Fused AdamW over DTensors kept a DTensorSpec for each tensor and step before torch 2.12
    (pytorch issues 181761, 188174). A second model makes no process groups of its own."""
    model = MAE(**SMALL_MAE)
    parallelize(model, CPU, 1)
    mesh = models.sharding_mesh("cpu", 1, torch.distributed.group.WORLD)
    parallelize(MAE(**SMALL_MAE), CPU, 1)
    assert models.sharding_mesh("cpu", 1, torch.distributed.group.WORLD) is mesh
    optimizer = torch.optim.AdamW(models.parameter_groups(model, 0.05), 1e-3, fused=True)
    images, ids, counts = random_images(model), random_ids(model), []
    for step in range(25):
        model(images, ids).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        if step in (4, 24):
            gc.collect()
            counts.append(sum(type(thing).__name__ == "DTensorSpec" for thing in gc.get_objects()))
    assert counts[0] > 0
    assert counts[1] <= counts[0] or torch.__version__ < "2.12"  # where a run says that it leaks


PARALLEL = """
import sys
import torch
import torch.distributed as dist
from torch.nn.functional import cross_entropy
import model as models

dist.init_process_group("gloo")
rank, count, group = dist.get_rank(), dist.get_world_size(), int(sys.argv[1])
shape = {"size": "32x3x4", "image_size": (16, 24), "patch_size": 8, "positions": "learned"}
plain = models.Classifier(classes=7, head_std=0.02, **shape)
with torch.device("meta" if group else "cpu"):
    model = models.Classifier(classes=7, head_std=0.02, **shape)
precision = "fp32" if group else "bf16"
parallel = models.parallelize(model, torch.device("cpu"), group or None, precision)
if sys.argv[2] == "kernels":
    models.kernels.attention = models.kernels.triton_attention
if group:
    for parameter in model.parameters():
        models.local(parameter.detach()).fill_(float("nan"))  # what is not initialised shows
    for seed, weights in ((0, None), (5, models.Classifier(classes=7, **shape).state_dict())):
        models.initialize(plain, seed)
        models.initialize(model, seed)
        if weights:  # from a file: the head stays as it was made
            assert models.load_weights(plain, weights) == models.load_weights(model, weights)
        for (name, p), (other, whole) in zip(model.named_parameters(), plain.named_parameters()):
            assert name == other and torch.equal(p.full_tensor(), whole), name
            rows = -(-len(whole) // group)  # the first dimension is dealt out
            assert p.to_local().numel() <= rows * whole[0].numel(), name
else:  # replicas compute what one process does
    assert type(parallel) is torch.nn.parallel.DistributedDataParallel
    for module in (*plain.blocks, plain):
        models.cast_weights(module)

images = torch.randn(2 * count, 3, 16, 24, generator=torch.Generator().manual_seed(1))
labels = torch.arange(2 * count) % 7
for mine in torch.arange(2 * count).split(1):
    (cross_entropy(plain(images[mine]).float(), labels[mine]) / (2 * count)).backward()
for mine in torch.arange(2 * rank, 2 * rank + 2).split(1):  # two micro-batches
    with models.sync_gradients(parallel, last=mine.item() % 2 == 1):
        (cross_entropy(parallel(images[mine]).float(), labels[mine]) / 2).backward()
for (name, p), whole in zip(model.named_parameters(), plain.parameters()):
    gradient = models.full_tensor(p.grad)
    assert gradient.dtype == torch.float32
    torch.testing.assert_close(gradient, whole.grad, rtol=1e-4, atol=1e-6, msg=name)
state = models.full_state(model)
assert bool(state) == (rank == 0)
assert all(torch.equal(tensor, plain.state_dict()[name]) for name, tensor in state.items())
dist.barrier()
"""


@pytest.mark.parametrize(
    ("processes", "group", "attention"),
    [(3, 3, "torch"), (4, 2, "torch"), (2, 1, "kernels"), (2, 0, "torch")],
)
def test_shards_and_replicas_are_the_whole(processes, group, attention):
    """Values, gradients and state are those of one process. group 0: replicas in bf16."""
    ran = stage(group, attention, processes=processes, code=PARALLEL)
    assert ran.returncode == 0, ran.stderr
