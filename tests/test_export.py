"""An encoder as a file for other programs, and the code of docs/weights.md, as it is printed."""

import re
import subprocess
import sys

import numpy as np
import onnxruntime
import pytest
import torch
from conftest import ROOT, encoded, painting, random_images, save_model
from PIL import Image

import data
import model as models
from model import MAE

PAGE = (ROOT / "docs" / "weights.md").read_text()
BATCH = {"images": {0: torch.export.Dim("batch")}}


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    """A frozen ViT of 16 x 24 pixels from the model.pt of an MAE, with two heads of 12."""
    path = tmp_path_factory.mktemp("mae") / "model.pt"
    save_model(path, MAE, decoder=(16, 1, 2))
    state, config = models.read_weights(path)
    encoder = models.ViT(**models.encoder_config(config)).eval().requires_grad_(False)
    models.load_weights(encoder, state)
    return encoder


def by_torch_export(encoder, images, path):
    torch.export.save(torch.export.export(encoder, (images,), dynamic_shapes=BATCH), path)
    return torch.export.load(path).module()


def by_onnx(encoder, images, path):
    options = {"input_names": ["images"], "output_names": ["tokens"], "external_data": False}
    torch.onnx.export(encoder, (images,), path, dynamic_shapes=BATCH, verbose=False, **options)
    session = onnxruntime.InferenceSession(path)
    return lambda images: torch.from_numpy(session.run(None, {"images": images.numpy()})[0])


@pytest.mark.parametrize(
    ("export", "suffix", "error"), [(by_torch_export, "pt2", 0), (by_onnx, "onnx", 1e-4)]
)
def test_an_exported_encoder_gives_the_same_for_any_batch(export, suffix, error, encoder, tmp_path):
    exported = export(encoder, random_images(encoder, 2), tmp_path / f"encoder.{suffix}")
    for count in (1, 2, 5):
        images = random_images(encoder, count, seed=count)
        tokens = encoder(images)
        assert tokens.shape == (count, 7, 24) and tokens.std() > 0.1
        found = exported(images)
        assert found.shape == tokens.shape
        assert (found - tokens).abs().max() <= error


def run(code, folder, *path):
    """Run code in a Python of its own that finds modules in `path` only."""
    command = [sys.executable, "-c", f"import sys\nsys.path += {[str(p) for p in path]}\n{code}"]
    ran = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    return ran.stdout


def test_the_page_s_code_takes_an_encoder_elsewhere(tmp_path):
    (tmp_path / "runs" / "mae").mkdir(parents=True)
    save_model(tmp_path / "runs" / "mae" / "model.pt", MAE, "toy", image_size=32, patch_size=8)
    (tmp_path / "photo.jpg").write_bytes(encoded(painting(90, 120), "JPEG"))
    here = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    prepare, *elsewhere = re.findall(r"```python elsewhere\n(.*?)```", PAGE, re.DOTALL)
    assert (len(here), len(elsewhere)) == (3, 2)
    assert "tensors loaded" in run("\n".join(here), tmp_path, ROOT)
    state, config = models.read_weights(tmp_path / "runs" / "mae" / "model.pt")
    encoder = models.ViT(**models.encoder_config(config)).eval()
    models.load_weights(encoder, state)
    with Image.open(tmp_path / "photo.jpg") as image:
        pixels = np.array(image.resize((32, 32)))
    images = data.normalize(torch.from_numpy(pixels).permute(2, 0, 1)[None])
    with torch.inference_mode():
        features = models.pool(encoder(images), "mean").numpy()
    for code in elsewhere:  # a program that finds none of this repository's modules
        run(f"{prepare}{code}np.save('found.npy', features)", tmp_path)
        found = np.load(tmp_path / "found.npy")
        assert found.shape == features.shape == (1, 128)
        assert np.abs(found - features).max() < 1e-4 < features.std()
