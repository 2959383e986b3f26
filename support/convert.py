"""python model.py convert IN OUT --format timm | hf | own: weights for another library.

convert             what read_weights can read -> a file or folder
write_timm          a file for timm's VisionTransformer
write_hugging_face  a folder for transformers' from_pretrained
"""

import json
import os
import tempfile
from pathlib import Path

from model import MAE, Classifier, check_weights, pair, read_weights, save_weights
from support.checkpoints import last_line, write_file
from support.flags import make_parser
from support.formats import HF, TIMM_VIT, import_safetensors, tensor_names
from support.launch import report_errors


def convert(source, out, format, heads=None, image_size=None, entry=None):
    """Write weights for another library; return the line of Python that loads them.

    source  what read_weights can read; heads, image_size, entry: see there
    format  "timm": tensors for VisionTransformer, .pt, .pth or .safetensors; "own":
            model.pt; "hf": a folder for from_pretrained
    Raises ValueError if `out` exists, has no folder, or cannot hold the model.
    """
    out, parent = Path(out), Path(out).absolute().parent
    if os.path.lexists(out):
        raise ValueError(f"{out} exists: give another name, or remove it")
    if not parent.is_dir():
        raise ValueError(f"{parent} is no folder that exists: make it first")
    suffixes = {"own": (".pt", ".pth"), "timm": (".pt", ".pth", ".safetensors")}
    if out.suffix not in suffixes.get(format, out.suffix):
        raise ValueError(f"{out} must end in {' or '.join(suffixes[format])}")
    if format == "hf" or out.suffix == ".safetensors":
        import_safetensors()  # before everything is read
    state, config = read_weights(source, heads, image_size, entry)
    if "frames" in config:
        raise ValueError(f"{source} is of videos: no other library has such a ViT")
    if image_size and pair(image_size) != pair(config["image_size"]):
        known = "x".join(map(str, config["image_size"]))
        raise ValueError(f"{source} is of images of {known}: leave --image-size out")
    model = check_weights(source, state, config)
    if missing := sorted(model.state_dict().keys() - state.keys()):
        raise ValueError(f"{source} lacks {', '.join(missing[:3])}")
    print_dropped(state.keys() - model.state_dict().keys())
    state = {name: state[name] for name in model.state_dict()}
    with tempfile.TemporaryDirectory(dir=parent, prefix=f"{out.name}.") as folder:
        path = Path(folder, out.name)  # moved when it is whole
        if format == "own":
            save_weights(path, state, model.config | config)
            line = f"import model; state, config = model.read_weights({str(out)!r})"
        else:
            write = write_timm if format == "timm" else write_hugging_face
            line = write(path, out, state, model)
        os.replace(path, out)
    return line


def translate(state, table):
    """Tensors by the names in a table. Prints which ones the table lacks."""
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
    """Write a file for timm's VisionTransformer; return the line that loads `out`."""
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
    """Write a folder that transformers reads; return the line that loads `out`."""
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
            raise ValueError(f"{kind} reads the class token, this head patches: use --format timm")
        labels = config["class_names"] or [f"LABEL_{i}" for i in range(config["classes"])]
        published["id2label"] = dict(enumerate(labels))
        published["label2id"] = {label: i for i, label in enumerate(labels)}
    if kind != "ViTModel":
        bare, options = ("classifier.", "decoder."), ""
        state = {n if n.startswith(bare) else f"vit.{n}": t for n, t in state.items()}
    published["architectures"] = [kind]
    path.mkdir()
    write_file(path / "config.json", json.dumps(published, indent=1))
    save_safetensors(state, path / "model.safetensors")
    load = f"transformers.{kind}.from_pretrained({str(out)!r}{options})"
    return f"import transformers; model = {load}"


def main(argv=None):
    """python model.py convert."""
    parser = make_parser("model.py", "Convert weights.")
    add = parser.add_argument
    add("command", choices=["convert"], help="write weights for another library")
    add("source", metavar="IN", help="a model.pt, a public checkpoint or folder")
    add("out", metavar="OUT", help="a new file; for hf, a new folder")
    add("--format", required=True, choices=("timm", "hf", "own"), help="of OUT")
    add("--heads", type=int, help="of IN, if its size is not a known one")
    add("--image-size", type=pair, help="of IN, if it is no square: HEIGHTxWIDTH")
    add("--entry", help="of IN, if it has several networks: state_dict_ema, or a prefix")
    run = vars(parser.parse_args(argv))
    del run["command"]
    with report_errors("model.py"):
        line = convert(**run)
    print(f"wrote {run['out']}. To load it:\n{line}")
