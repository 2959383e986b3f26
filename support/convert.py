"""python model.py convert IN OUT --format timm | hf | own: weights as another library reads them.

convert             what read_weights can read -> a file or folder
write_timm          a file for timm's VisionTransformer
write_hugging_face  a folder for transformers' from_pretrained
"""

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path

from model import MAE, Classifier, check_weights, pair, read_weights, save_weights
from support.checkpoints import last_line, write_file
from support.formats import HF, TIMM_VIT, import_safetensors, tensor_names


def convert(source, out, format, heads=None, image_size=None, entry=None):
    """Write what read_weights can read for another library. Returns the Python line that loads it.

    format  "timm": tensors for VisionTransformer, .pt, .pth or .safetensors; "hf": a folder for
            from_pretrained; "own": model.pt
    Raises ValueError if `out` exists, its folder does not, or the format cannot hold the model.
    """
    out = Path(out)
    if os.path.lexists(out):
        raise ValueError(f"{out} exists: give another name, or remove it")
    if not out.absolute().parent.is_dir():
        raise ValueError(f"{out.parent} is no folder that exists: make it first")
    suffixes = {"own": (".pt", ".pth"), "timm": (".pt", ".pth", ".safetensors")}
    if out.suffix not in suffixes.get(format, out.suffix):
        raise ValueError(f"{out} must end in {' or '.join(suffixes[format])}")
    if format == "hf" or out.suffix == ".safetensors":
        import_safetensors()  # before everything is read
    state, config = read_weights(source, heads, image_size, entry)
    if "frames" in config:
        raise ValueError(f"{source} is of videos: no other library's ViT has such weights")
    if image_size and pair(image_size) != pair(config["image_size"]):
        known = "x".join(map(str, config["image_size"]))
        raise ValueError(f"{source} is of images of {known}: leave --image-size out")
    model = check_weights(source, state, config)
    if missing := sorted(model.state_dict().keys() - state.keys()):
        raise ValueError(f"{source} lacks {', '.join(missing[:3])}")
    print_dropped(state.keys() - model.state_dict().keys())
    state = {name: state[name] for name in model.state_dict()}
    with tempfile.TemporaryDirectory(dir=out.absolute().parent, prefix=f"{out.name}.") as folder:
        path = Path(folder, out.name)  # moved when it is whole; the folder goes in any case
        if format == "own":
            kept = {"val_crop": config["val_crop"]} if "val_crop" in config else {}
            save_weights(path, state, model.config | kept)
            line = f"import model; state, config = model.read_weights({str(out)!r})"
        else:
            write = write_timm if format == "timm" else write_hugging_face
            line = write(path, out, state, model)
        os.replace(path, out)
    return line


def translate(state, table):
    """Tensors by the names in a table. Prints which ones are dropped, as the table lacks them."""
    known, renamed = tensor_names(table, state), {}
    for name in filter(known.get, state):
        parts = state[name].contiguous().chunk(len(known[name]))
        renamed |= dict(zip(known[name], parts))
    print_dropped(state.keys() - known.keys())
    return renamed


def print_dropped(names):
    if families := sorted({name.split(".")[0] for name in names}):
        print(f"dropped: {', '.join(families)}")


def save_safetensors(state, path):
    safetensors = import_safetensors()
    try:
        safetensors.torch.save_file(state, path, {"format": "pt"})
    except safetensors.SafetensorError as error:  # also when the disk is full
        raise OSError(f"cannot write {path}: {last_line(error)}") from None


def write_timm(path, out, state, model):
    """Write a file for timm's VisionTransformer; return the line that builds it and loads `out`."""
    config, state = model.config, translate(state, TIMM_VIT)
    if config.get("class_names"):
        print_dropped(["class_names"])
    arguments = {
        "img_size": tuple(config["image_size"]),
        "patch_size": model.patch_size,
        "in_chans": config["channels"],
        "num_classes": config.get("classes", 0),
        "embed_dim": model.width,
        "depth": model.layers,
        "num_heads": model.heads,
        "global_pool": "avg" if config.get("pool") == "mean" else "token",
    }
    arguments = ", ".join(f"{name}={value!r}" for name, value in arguments.items())
    norm = f"functools.partial(torch.nn.LayerNorm, eps={config['norm_eps']})"
    build = f"timm.models.VisionTransformer({arguments}, norm_layer={norm})"
    imports, load = "functools, timm, torch", "torch.load"
    if out.suffix == ".safetensors":
        imports, load = f"{imports}, safetensors.torch", "safetensors.torch.load_file"
        save_safetensors(state, path)
    else:
        write_file(path, state)
    return f"import {imports}; model = {build}; model.load_state_dict({load}({str(out)!r}))"


def write_hugging_face(path, out, state, model):
    """Write a folder that all versions of transformers read; returns the line that loads `out`."""
    config, (H, W) = model.config, model.config["image_size"]
    published = {
        "model_type": "vit",
        "image_size": H if H == W else [H, W],
        "patch_size": model.patch_size,
        "num_channels": config["channels"],
        "hidden_size": model.width,
        "num_hidden_layers": model.layers,
        "num_attention_heads": model.heads,
        "intermediate_size": 4 * model.width,
        "layer_norm_eps": config["norm_eps"],
    }
    state, kind, options = translate(state, HF), "ViTModel", ", add_pooling_layer=False"
    if isinstance(model, MAE):
        if H != W:
            raise ValueError(f"ViTMAEForPreTraining wants square images, not {H}x{W}")
        kind, (width, layers, heads) = "ViTMAEForPreTraining", config["decoder"]
        published |= {
            "model_type": "vit_mae",
            "decoder_hidden_size": width,
            "decoder_num_hidden_layers": layers,
            "decoder_num_attention_heads": heads,
            "decoder_intermediate_size": 4 * width,
            "mask_ratio": config["mask_ratio"],
            "norm_pix_loss": config["normalize_targets"],
        }
    elif isinstance(model, Classifier):
        kind = "ViTForImageClassification"
        if config["pool"] != "cls":
            raise ValueError(
                f"{kind} reads the class token, this head the mean of the patches: "
                "--format timm can say that"
            )
        labels = config["class_names"] or [f"LABEL_{i}" for i in range(config["classes"])]
        published["id2label"] = dict(enumerate(labels))
        published["label2id"] = {label: i for i, label in enumerate(labels)}
    if kind != "ViTModel":
        bare, options = ("classifier.", "decoder."), ""
        state = {n if n.startswith(bare) else f"vit.{n}": tensor for n, tensor in state.items()}
    path.mkdir()
    write_file(path / "config.json", json.dumps(published | {"architectures": [kind]}, indent=1))
    save_safetensors(state, path / "model.safetensors")
    load = f"transformers.{kind}.from_pretrained({str(out)!r}{options})"
    return f"import transformers; model = {load}"


def main(argv=None):
    """python model.py convert: exit status 2 for what was given, 1 for the machine."""
    parser = argparse.ArgumentParser("model.py", allow_abbrev=False, description="Weights.")

    def fail(message, status=2):
        print(f"model.py: {message}", file=sys.stderr)
        sys.exit(status)

    parser.error = lambda message: fail(f"{message} (--help lists all)")
    add = parser.add_argument
    add("command", choices=["convert"], help="write weights as another library reads them")
    add("source", metavar="IN", help="a model.pt, a public checkpoint, a Hugging Face folder")
    add("out", metavar="OUT", help="a new file; for hf, a new folder")
    add("--format", required=True, choices=("timm", "hf", "own"), help="of OUT")
    add("--heads", type=int, help="of IN, if its size is not a known one")
    add("--image-size", type=pair, help="of IN, if its positions are no square: HEIGHTxWIDTH")
    add("--entry", help="of IN, if it has several networks: state_dict_ema, or a prefix of names")
    run = parser.parse_args(argv)
    try:
        line = convert(run.source, run.out, run.format, run.heads, run.image_size, run.entry)
    except (ValueError, OSError) as error:
        fail(error, 2 if isinstance(error, ValueError) else 1)
    except KeyboardInterrupt:
        fail("stopped", 130)
    print(f"wrote {run.out}. To load it:\n{line}")
