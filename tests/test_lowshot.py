"""Low-shot classification: prompts and logistic regression by hand, and as a program."""

import torch
import torch.nn.functional as F
from conftest import last_json, main_json, stage

import finetune
import model as models
from support import launch
from tasks import lowshot

LOWSHOT = ["--task", "lowshot", "--size", "16x2x2", "--image-size", "16", "--patch-size", "4"]
LOWSHOT += ["--batch-size", "8", "--workers", "0"]


def test_prompts_are_counted_and_stand_beside_the_tokens_of_every_block():
    trunk = models.Classifier("16x3x2", image_size=8, patch_size=4, classes=5)
    model = lowshot.Prompted(trunk, seed=0)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert trained == 3 * 8 * 192 + (192 * 16 + 16) + (16 * 5 + 5)
    generator = torch.Generator().manual_seed(0)
    torch.nn.init.normal_(model.head.weight, generator=generator)
    images = torch.randn(2, 3, 8, 8, generator=generator)
    x = trunk.tokens(images)
    for i, block in enumerate(trunk.blocks):  # independently: prompts last, dropped after the block
        prompts = model.prompts[i] @ model.project.weight.T + model.project.bias
        x = block(torch.cat([x, prompts.expand(2, -1, -1)], dim=1))[:, :-8]
    expected = trunk.norm(x)[:, 0] @ model.head.weight.T
    # three blocks in fp32, of sums in another order
    torch.testing.assert_close(model(images)[:, 0], expected, rtol=1e-4, atol=1e-5)


def test_logistic_regression_is_at_its_minimum():
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(30, 4, generator=generator), torch.arange(30) % 3
    weight = torch.zeros(3, 4, dtype=torch.float64)
    units = F.normalize(x.double() - x.double().mean(dim=0))
    for _ in range(3000):  # plain gradient descent
        residual = (units @ weight.T).softmax(dim=1) - F.one_hot(y, 3)
        weight -= 2.0 * (residual.T @ units / 30 + 1e-2 * weight)
    found = lowshot.logistic_scores(x, y, x, 3, 1e-2)
    torch.testing.assert_close(found, units @ weight.T, rtol=1e-4, atol=1e-5)


def test_lowshot_reports_both_and_does_not_repeat_what_is_known(
    animals, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(lowshot, "LOWSHOT_RATES", (1e-2,))
    monkeypatch.setattr(lowshot, "SEEDS", range(2))
    asked = [*LOWSHOT, "--epochs", "4", "--shots", "1,30", "--data", animals]
    asked += ["--out", tmp_path / "run"]
    found = main_json(capsys, finetune, *asked)["top1"]
    assert set(found) == {"prompts", "logistic"} and set(found["prompts"]) == {"1", "30"}
    assert found["logistic"]["30"] > 0.6 and found["prompts"]["30"] > 0.3
    checkpoints = list((tmp_path / "run").rglob("*.distcp"))
    assert checkpoints and all(path.stat().st_size < 100_000 for path in checkpoints)  # no trunk
    monkeypatch.setattr(launch, "save_checkpoint", None)  # would fail
    assert main_json(capsys, finetune, *asked)["top1"] == found


def test_what_is_best_at_the_first_draw_is_used_for_all_with_as_many_shots(
    animals, tmp_path, monkeypatch, capsys
):
    tried = []

    def fit(run, finetune, source, seed, rate, out):
        tried.append((len(source.sizes), seed, rate))
        return (rate, 0) if len(source.sizes) > 3 else (-rate, 0)

    monkeypatch.setattr(lowshot, "train_prompts", fit)
    monkeypatch.setattr(lowshot, "SEEDS", range(2))
    flags = [*LOWSHOT, "--shots", "1,3", "--data", animals, "--out", tmp_path / "run"]
    main_json(capsys, finetune, *flags)
    low, *_, high = lowshot.LOWSHOT_RATES
    seeds = [(seed, rate) for _, seed, rate in tried]
    first = [(0, rate) for rate in lowshot.LOWSHOT_RATES]
    assert seeds == [*first, (1, low), *first, (1, high)]


def test_prompts_are_the_same_on_any_number_of_processes(animals, tmp_path):
    code = "import sys, finetune; from tasks import lowshot; lowshot.SEEDS = range(1); "
    code += "lowshot.LOWSHOT_RATES = (1e-2,); finetune.main(sys.argv[1:])"
    asked, found = [*LOWSHOT, "--steps", "4", "--shots", "2", "--data", animals, "--out"], []
    for name, processes, extra in (
        ("one", None, []),
        ("two", 2, []),
        ("sharded", 2, ["--shard-group", "2"]),
    ):
        ran = stage(*asked, tmp_path / name, *extra, processes=processes, code=code)
        found.append(last_json(ran))
    assert found[0] == found[1] == found[2]
