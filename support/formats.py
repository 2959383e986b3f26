"""Weights of other libraries: recognised by their tensors' names, read, and written.

read_file     a file or folder -> tensors by our names, and what is known of their architecture
infer_config  tensors that come without a config -> one
convert       python model.py convert IN OUT --format timm | hf | own
"""

import argparse
import itertools
import json
import math
import os
import re
import sys
import tempfile
import zipfile
from functools import partial
from pathlib import Path

import torch

from model import (
    DECODERS,
    DEFAULT_DECODER,
    MAE,
    SIZES,
    Classifier,
    ViT,
    encoder_config,
    load_weights,
    pair,
    read_weights,
    save_weights,
)
from support.checkpoints import last_line, write_file

# -------------------------------------------------------------------------------------------- names


def columns(ours, theirs=None, at="", there=None):
    """{our name: another's} of modules and lone tensors, word by word; ours below `at`."""
    there = at if there is None else there
    return {f"{at}{a}": f"{there}{b}" for a, b in zip(ours.split(), (theirs or ours).split())}


# Our names, which are timm's and the public MAE's as far as these go. {i} is a block's number.
VIT = "cls_token pos_embed patch_embed.proj norm head fc_norm"


DECODER = "mask_token decoder_pos_embed decoder_embed decoder_norm decoder_pred"


TEXT = "token_embedding position_embedding embedding_norm type_embedding"


PROJECTIONS = "image_projection text_projection logit_scale"


BLOCK = "attn.qkv attn.proj norm1 norm2 mlp.fc1 mlp.fc2"


PLACES = "blocks.{i}.", "decoder_blocks.{i}.", "text.blocks.{i}."


# What others call these, in the same order. A plus joins three tensors that are one of ours;
# in_proj_ has no dot before weight and bias. transformers 5 has others in memory than in files.
HF_VIT = "embeddings.cls_token embeddings.position_embeddings "


HF_VIT += "embeddings.patch_embeddings.projection layernorm classifier"


HF_BLOCK = "attention.attention.query+key+value attention.output.dense "


HF_BLOCK += "layernorm_before layernorm_after intermediate.dense output.dense"


HF_BLOCK_5 = "attention.q_proj+k_proj+v_proj attention.o_proj layernorm_before layernorm_after "


HF_BLOCK_5 += "mlp.fc1 mlp.fc2"


XLMR_TEXT = "word_embeddings position_embeddings LayerNorm token_type_embeddings"


XLMR_BLOCK = "attention.self.query+key+value attention.output.dense "


XLMR_BLOCK += "attention.output.LayerNorm output.LayerNorm intermediate.dense output.dense"


TORCHTEXT_TEXT = "token_embedding positional_embedding.embedding embedding_layer_norm"


TORCHTEXT_BLOCK = "self_attn.in_proj_ self_attn.out_proj norm1 norm2 linear1 linear2"


TORCHTEXT_OLD_BLOCK = "attention.input_projection attention.output_projection "


TORCHTEXT_OLD_BLOCK += "attention_layer_norm final_layer_norm residual_mlp.mlp.0 residual_mlp.mlp.3"


MAWS_PROJECTIONS = "vision_projection text_projection logit_scale"


TIMM_VIT = columns(VIT) | columns(BLOCK, at=PLACES[0])


TIMM = TIMM_VIT | columns(DECODER) | columns(BLOCK, at=PLACES[1]) | columns(TEXT, at="text.")


TIMM |= columns(BLOCK, at=PLACES[2]) | columns(PROJECTIONS) | columns("time_embed")


TIMM |= columns("attn.rel_pos_t attn.rel_pos_h attn.rel_pos_w", at=PLACES[0])


HF_FILE, HF_FILE_5, HF_MEMORY_5 = (
    columns(VIT, HF_VIT)
    | columns(BLOCK, block, PLACES[0], encoder)
    | columns(DECODER, there="decoder.")
    | columns(BLOCK, block, PLACES[1], decoder)
    for block, encoder, decoder in (
        (HF_BLOCK, "encoder.layer.{i}.", "decoder.decoder_layers.{i}."),
        (HF_BLOCK, "encoder.layer.{i}.", "decoder.decoder_encoder.layer.{i}."),
        (HF_BLOCK_5, "layers.{i}.", "decoder.decoder_layers.{i}."),
    )
)


XLMR = columns(TEXT, XLMR_TEXT, "text.", "embeddings.")


XLMR |= columns(BLOCK, XLMR_BLOCK, PLACES[2], "encoder.layer.{i}.")


TORCHTEXT, TORCHTEXT_OLD = (
    {ours: f"vision_encoder.{theirs}" for ours, theirs in TIMM_VIT.items()}
    | columns(TEXT, TORCHTEXT_TEXT, "text.", "encoder.transformer.")
    | columns(BLOCK, block, PLACES[2], f"encoder.transformer.{layers}")
    | columns(PROJECTIONS, MAWS_PROJECTIONS)
    for block, layers in (
        (TORCHTEXT_BLOCK, "layers.layers.{i}."),
        (TORCHTEXT_OLD_BLOCK, "layers.{i}."),
    )
)


# What a file is said to be, and its table of names.
FORMATS = [("timm-named", TIMM), ("Hugging Face", HF_FILE), ("Hugging Face", HF_FILE_5)]


FORMATS += [("Hugging Face", HF_MEMORY_5), ("Hugging Face", XLMR)]


FORMATS += [("torchtext-named", TORCHTEXT), ("torchtext-named", TORCHTEXT_OLD)]


# Names that some files put before a part of a network; layers that we have no use for.
PARTS = r"(vit\.|roberta\.|text_encoder\.)?"


UNUSED = ("pooler.", "lm_head.", "embeddings.position_ids")


# Names before a whole one: of data parallelism, Lightning, solo-learn and the like. They may begin
# another's own names, too ("encoder.layer.0"): what they are is told from the embedding's name.
WRAPPERS = r"((module|model|backbone|encoder)\.)*"


EMBEDDINGS = ("patch_embed.proj", "text.token_embedding")


EMBEDDINGS = {
    re.escape(table[name]) for _, table in FORMATS for name in EMBEDDINGS if name in table
}


NETWORK = re.compile(rf"(|.+?\.){PARTS}({'|'.join(EMBEDDINGS)})\.weight")


def tensor_names(table, depth):
    """(our name, [theirs]) of each tensor that may be: of a module, its weight and its bias."""
    for (ours, theirs), end in itertools.product(table.items(), ("", ".weight", ".bias")):
        start, dot, last = theirs.rpartition(".")
        theirs = [f"{start}{dot}{part}{end}".replace("_.", "_") for part in last.split("+")]
        for i in range(depth if "{i}" in ours else 1):
            yield ours.replace("{i}", str(i)) + end, [t.replace("{i}", str(i)) for t in theirs]


def depth_of(state):
    """More than the number of any block among the names of tensors."""
    numbers = (int(n) for name in state for n in re.findall(r"\.(\d{1,3})\.", name))
    return 1 + max(numbers, default=0)


def networks_in(names):
    """What is before the names of each network: see WRAPPERS."""
    return sorted({found[1] for name in names if (found := NETWORK.fullmatch(str(name)))})


def recognise(state):
    """(format, tensors by our names, those of no use, those that nothing explains) of a file's."""
    bare = {re.sub(f"^(module\\.)?{PARTS}", "", name): tensor for name, tensor in state.items()}
    if len(bare) < len(state):
        raise RuntimeError("some have the same name but for a prefix")
    state = bare
    style, found = None, []
    for other, table in FORMATS:
        known = tensor_names(table, depth_of(state))
        explained = [(ours, theirs) for ours, theirs in known if state.keys() >= set(theirs)]
        if len(explained) > len(found):
            style, found = other, explained
    left = state.keys() - {name for _, parts in found for name in parts}
    unused = {name for name in left if style == "Hugging Face" and name.startswith(UNUSED)}
    merged = {
        ours: torch.cat([state[part] for part in parts]) if len(parts) > 1 else state[parts[0]]
        for ours, parts in found
    }
    if (types := merged.pop("text.type_embedding.weight", None)) is not None:
        # Of all that a text's tokens may be, they are the first: it is added to each of them.
        name = "text.position_embedding.weight"
        merged[name] = merged[name].float() + types[:1].float()
    if "logit_scale" in merged:
        merged["logit_scale"] = merged["logit_scale"].reshape(1)
    if lone := [name for name, tensor in merged.items() if not tensor.ndim]:
        raise RuntimeError(f"{lone[0]} is one number")
    return style, merged, unused, left - unused


def import_safetensors():
    try:
        import safetensors.torch
    except ImportError:
        why = ".safetensors needs the safetensors package: pip install safetensors"
        raise ValueError(why) from None
    return safetensors.torch


def save_safetensors(state, path):
    save = import_safetensors().save_file
    from safetensors import SafetensorError

    try:
        save(state, path, {"format": "pt"})
    except SafetensorError as error:  # which is no OSError, also where the disk is full
        raise OSError(f"cannot write {path}: {last_line(error)}") from None


def open_weights(path):
    """(content, path) of a file of weights, or of that in a folder of transformers.

    Several files, whose tensors an index.json beside them lists, are one. No code runs from a file.
    Raises ValueError, one line, when one cannot be read.
    """
    path = Path(path)
    if path.is_dir():
        names = ("model.safetensors", "pytorch_model.bin")
        names = [name + end for name in names for end in ("", ".index.json")]
        path = next((path / name for name in names if (path / name).is_file()), path / names[0])
    return (open_shards if path.name.endswith(".index.json") else open_file)(path), path


def open_shards(index):
    """The tensors, by name, of the files that an index.json lists. See open_weights."""
    try:
        listed = set(json.loads(index.read_text())["weight_map"].items())
        paths = {file: index.with_name(file) for _, file in listed}
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise ValueError(f"{index} lists no files of weights ({last_line(error):.200})") from None
    files = {file: open_file(path) for file, path in paths.items()}
    files = {file: part if isinstance(part, dict) else {} for file, part in files.items()}
    found = {(str(name), file) for file, content in files.items() for name in content}
    if differing := sorted(listed ^ found):
        name, file = differing[0]
        where = "the index alone" if differing[0] in listed else f"{file} alone"
        raise ValueError(f"{index} and its files differ: {name} is in {where}")
    return {name: tensor for content in files.values() for name, tensor in content.items()}


def open_file(path):
    """The content of one file: see open_weights."""
    if not path.is_file():
        raise ValueError(f"no weights at {path}: give a model.pt or a public checkpoint")
    safe = import_safetensors() if path.suffix == ".safetensors" else None
    try:
        if safe:
            return safe.load_file(path)
        # The public MAE code stores its arguments beside the weights: plain values in a Namespace.
        with torch.serialization.safe_globals([argparse.Namespace]):
            # Mapped, not read: processes share it, and each takes no more than its part of it.
            mapped = zipfile.is_zipfile(path)
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except Exception as error:  # noqa: BLE001 (torch.load says "damaged" in a dozen ways)
        why = f"{type(error).__name__}: damaged, or more than tensors and plain values in it"
        if refused := re.search(r"GLOBAL (\S+)", str(error)):  # torch's message has ten lines
            why = f"torch refuses the {refused[1]} in it: save its tensors and plain values alone"
        raise ValueError(f"cannot read weights from {path} ({why}): nothing was run") from None


def one_network(content, entry=None):
    """(tensors, config, {title: what to say of it}, other networks) of what a file holds.

    Of several networks, one is read: in the entry "model" or "state_dict", below no more than
    WRAPPERS; or where `entry` says, which is an entry or a prefix. Its names come without these.
    """
    held = content if isinstance(content, dict) else {}
    entries = {key: part for key, part in held.items() if isinstance(part, dict)}
    networks = [key for key in entries if networks_in(entries[key])]
    usual = [key for key in ("model", "state_dict") if key in (networks or entries)]
    chosen = entry if entry in entries else next(iter(usual), None)
    below = f"{entry}." if entry and entry != chosen else ""
    config = held.get("config", {}) if chosen and not below else {}
    tensors = entries.get(chosen, held).items()
    tensors = {str(name): tensor for name, tensor in tensors if isinstance(tensor, torch.Tensor)}
    # torch.compile's may be before every name, or before those of blocks that are compiled alone.
    plain = {name.replace("_orig_mod.", ""): tensor for name, tensor in tensors.items()}
    if len(plain) < len(tensors):
        raise RuntimeError("some have the same name but for a prefix")
    found = networks_in(plain)
    fitting = [prefix for prefix in found if re.fullmatch(re.escape(below) + WRAPPERS, prefix)]
    prefix = fitting[0] if len(fitting) == 1 else below
    state = {n.removeprefix(prefix): t for n, t in plain.items() if n.startswith(prefix)}
    if odd := [n for n, t in state.items() if t.layout != torch.strided or t.is_meta]:
        raise RuntimeError(f"{odd[0]} is sparse, or a shape without numbers")
    others = [other for other in found if other != prefix]
    left = [name.split(".") for name in plain if not name.startswith((prefix, *others))]
    depth = max(1, prefix.count("."))
    left = {".".join(words[:depth][: len(words) - 1] or words) for words in left}
    notes = {
        "entry": [entry] if entry and not below else [],
        "stripped": [prefix] * bool(prefix) + ["_orig_mod."] * (plain.keys() != tensors.keys()),
        "left": left,
    }
    others = [str(key) for key in networks if key != chosen] + [o.rstrip(".") for o in others if o]
    return state, config, notes, others


def read_file(path, entry=None, flag="--entry"):
    """(path, format, tensors by our names, config or {}) of a file or folder of weights.

    The config is ours or, beside Hugging Face's tensors, transformers'; or what the public MAE
    code's arguments say, by the names of the latter. entry: see one_network; flag: how a program
    is told it. Raises ValueError, one line, when the tensors cannot be read, or are no network that
    is known here.
    """
    content, path = open_weights(path)
    try:
        state, config, notes, others = one_network(content, entry)
        style, named, unused, strange = recognise(state)
    except (RuntimeError, LookupError) as error:
        raise ValueError(f"the tensors in {path} cannot be used: {last_line(error)}") from None
    patches = 5 if "frames" in config else 4  # (D, C, 2, P, P) is a VideoClassifier's
    shapes = {patches: "patch_embed.proj.weight", 2: "text.token_embedding.weight"}
    found = {name: t.ndim for name, t in named.items() if t.numel()}
    hint = f"; {flag} reads what is in {' or '.join(others)}" if others and flag else ""
    if not any(found.get(name) == n for n, name in shapes.items()):
        there, where = state or content, f" in {entry}" if entry else ""
        there = ", ".join(map(str, [*there][:3])) if isinstance(there, dict) else there
        why = f"no (D, C, P, P) patches' and no tokens' embedding among {there!s:.120}{hint}"
        raise ValueError(f"{path} holds no ViT or text tower that is known here{where}: {why}")
    if strange:
        more = f" and {len(strange) - 3} more" if len(strange) > 3 else ""
        why = f"but nothing explains {', '.join(sorted(strange)[:3])}{more}"
        raise ValueError(f"{path} looks {style}, {why}: it is of another architecture{hint}")
    style = "our own" if config else style
    if style == "Hugging Face":
        config = published_config(path, named)
    if style == "timm-named" and "mask_token" in named:
        config, notes["its args"] = public_arguments(content, named)
    if os.environ.get("RANK", "0") == "0":
        kind = "ViT" if shapes[patches] in named else "XLM-R"
        kind = "ViTMAE" if "mask_token" in named else kind
        kind = "CLIP pair" if named.keys() >= {*shapes.values()} else kind
        notes["of no use here"] = {name.split(".")[0] for name in unused}
        notes["also there" + (f" ({flag} reads it)" if flag else "")] = others
        notes = [f"{title}: {', '.join(sorted(some))}" for title, some in notes.items() if some]
        print("; ".join([f"{path}: {style} {kind}", *notes]))
    return path, style, named, config


def public_arguments(content, state):
    """({transformers' name: value}, what to print) of the public MAE code's arguments beside a MAE.

    What is of another kind, or of another image size than the positions, is not used, and said.
    """
    args = content.get("args") if isinstance(content, dict) else None
    args = vars(args) if isinstance(args, argparse.Namespace) else args
    args = args if isinstance(args, dict) else {}
    is_flag = lambda value: isinstance(value, int) and value in (0, 1)
    is_share = lambda value: isinstance(value, float) and 0 < value < 1
    tests = {"norm_pix_loss": is_flag, "mask_ratio": is_share, "input_size": partial(fits, state)}
    used = {name: args[name] for name, test in tests.items() if name in args and test(args[name])}
    said = [f"{n} {args[n]!r:.20}{'' if n in used else ' (not used)'}" for n in tests if n in args]
    if "input_size" in used:
        used["image_size"] = used.pop("input_size")
    return used, said


def published_config(path, state):
    """The config.json of transformers beside a file of weights, or {}."""
    path = path.with_name("config.json")
    try:
        config = json.loads(path.read_text())
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise ValueError(f"{path} is no JSON: {error}") from None
    kinds = ("vit", "vit_mae", "xlm-roberta")
    if not isinstance(config, dict) or config.get("model_type", kinds[0]) not in kinds:
        raise ValueError(f"{path} is of none of {', '.join(kinds)}")
    if config.get("hidden_act", "gelu") != "gelu":
        raise ValueError(f"{path}: hidden_act {config['hidden_act']!r} is not gelu, which we have")
    widths = [len(t) for name, t in state.items() if name.endswith("blocks.0.norm1.weight")]
    if config.get("hidden_size") not in (None, *widths):
        raise ValueError(f"{path} is not of the weights beside it: its hidden_size is not theirs")
    return config if "model_type" in config else {}


def infer_shape(state, blocks, width, known, heads=None):
    """(width, layers, heads) of so many `blocks`: heads as given, or as one of `known` has."""
    layers = len({name.split(".")[1] for name in state if name.startswith(f"{blocks}.")})
    heads = heads or next((h for w, l, h, *_ in known if (w, l) == (width, layers)), None)
    if not heads:
        why = f"{layers} {blocks} of width {width} have how many heads?"
        raise ValueError(f"{why} Give --heads (of the encoder), or a config")
    return width, layers, heads


def name_of(shape, sizes):
    """The name of (width, layers, heads) in SIZES or TEXT_SIZES, or "WIDTHxLAYERSxHEADS"."""
    known = (name for name, known in sizes.items() if known[:3] == shape)
    return next(known, "x".join(map(str, shape)))


def fits(state, image_size):
    """True if the position table among a ViT's tensors is for images of this size."""
    try:
        rows, P = state["pos_embed"].shape[1], state["patch_embed.proj.weight"].shape[-1]
        return rows == 1 + math.prod(side // P for side in pair(image_size))
    except (ValueError, LookupError):
        return False


def infer_config(state, heads=None, published=None, norm_eps=1e-6, image_size=None):
    """The config of tensors by our names that come without one.

    published: what a config.json of transformers says of them, or the public MAE code's arguments.
    Where it says nothing, the image is square or, if it cannot be, of the image_size that is given,
    and norm_eps is that of those who write such files. What is left open about a decoder is left
    out.
    """
    from tasks.lit import infer_text_config

    width, channels, P, _ = state["patch_embed.proj.weight"].shape
    published = published or {}
    heads = heads or published.get("num_attention_heads")
    shape = infer_shape(state, "blocks", width, SIZES.values(), heads)
    if "pos_embed" not in state or state["pos_embed"].ndim != 3:
        raise ValueError("there is no (1, 1 + patches, width) pos_embed among the weights")
    rows, said = state["pos_embed"].shape[1], published.get("image_size")
    sizes = (math.isqrt(max(0, rows - 1)) * P, image_size) if said is None else (said,)
    if not any(fits(state, size) for size in sizes):
        why = f"pos_embed has {rows} rows, which are not a class token's and "
        why += "a square grid's" if said is None else f"those of image_size {said!s:.20}"
        more = f": give the weights' own --image-size HEIGHTxWIDTH, of {rows - 1} patches of {P}"
        more += " (to model.py convert, if another is wanted)"
        raise ValueError(why + (more if said is None else ""))
    image_size = pair(next(size for size in sizes if fits(state, size)))
    config = {
        "size": name_of(shape, SIZES),
        "image_size": [*image_size],
        "patch_size": P,
        "channels": channels,
        "positions": "sincos",
        "norm_eps": float(published.get("layer_norm_eps", norm_eps)),
    }
    if "mask_token" in state:
        known = [DEFAULT_DECODER, *DECODERS.values()]
        heads = published.get("decoder_num_attention_heads")
        width = state["mask_token"].shape[-1]
        config["decoder"] = [*infer_shape(state, "decoder_blocks", width, known, heads)]
        known = {"mask_ratio": "mask_ratio", "norm_pix_loss": "normalize_targets"}
        config |= {ours: published[name] for name, ours in known.items() if name in published}
    if "head.weight" in state:
        config["classes"] = len(state["head.weight"])
        config["pool"] = "mean" if "fc_norm.weight" in state else "cls"
        labels = published.get("id2label") or {}
        labels = [str(labels[number]) for number in sorted(labels, key=int)]
        if len(labels) not in (0, config["classes"]):
            raise ValueError(f"id2label has {len(labels)} of {config['classes']} classes")
        config["class_names"] = None if labels[:1] in ([], ["LABEL_0"]) else labels
        if not published and config["pool"] == "cls" and image_size[0] in (512, 518):
            config["val_crop"] = 0.0  # the MAWS repository's finetuned ones: pictures are squashed
    if "text.token_embedding.weight" in state:
        text = {n.removeprefix("text."): t for n, t in state.items() if n.startswith("text.")}
        config["text"] = infer_text_config(text) | {"context": 100}  # maws repository
        config |= {"shared_width": state["image_projection"].shape[1], "pool": "cls"}
    return config


def network(state, config):
    """The model on the meta device that the tensors of a file are of, with or without a config."""
    from tasks.lit import TwoTowers
    from tasks.video import VideoClassifier

    kinds = {"text.token_embedding.weight": (TwoTowers, "text shared_width pool")}
    kinds |= {"mask_token": (MAE, "decoder mask_ratio normalize_targets")}
    kinds |= {"head.weight": (Classifier, "pool class_names")}
    kind, keys = next((kinds[name] for name in kinds if name in state), (ViT, ""))
    if "frames" in config:
        kind, keys = VideoClassifier, f"{keys} frames relative_positions"
    arguments = {key: config[key] for key in keys.split() if key in config}
    if issubclass(kind, Classifier):
        arguments["classes"] = len(state.get("head.weight", (0,)))
        arguments.setdefault("pool", "mean" if "fc_norm.weight" in state else "cls")
    with torch.device("meta"):  # shapes without memory
        return kind(**encoder_config(config), **arguments)


def convert(source, out, format, heads=None, image_size=None, entry=None):
    """Write what read_weights can read as another library reads it. Returns how to load it there.

    format  "timm": tensors for VisionTransformer, .pt, .pth or .safetensors; "hf": a folder for
            from_pretrained; "own": model.pt
    Raises ValueError when `out` exists, its folder does not, or the format cannot say the model.
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
        import_safetensors()  # now, not when all is read
    state, config = read_weights(source, heads, image_size, entry)
    if "frames" in config:
        raise ValueError(f"{source} is of videos: no other library's ViT has such weights")
    if image_size and pair(image_size) != pair(config["image_size"]):
        known = "x".join(map(str, config["image_size"]))
        raise ValueError(f"{source} is of images of {known}: leave --image-size out")
    model = network(state, config)
    print(load_weights(model, state, keep_head=True))  # onto nothing: it is only compared
    if missing := model.state_dict().keys() - state.keys():
        raise ValueError(f"{source} lacks {', '.join(sorted(missing)[:3])}")
    state = {name: state[name] for name in model.state_dict()}
    with tempfile.TemporaryDirectory(dir=out.absolute().parent, prefix=f"{out.name}.") as folder:
        path = Path(folder, out.name)  # moved when it is whole, gone whatever happens
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
    """Tensors by the names that a table gives them; what has none there is dropped, and said."""
    renamed, dropped = {}, set(state)
    for ours, theirs in tensor_names(table, depth_of(state)):
        if ours in state:
            parts = state[ours].contiguous().chunk(len(theirs))
            renamed |= dict(zip(theirs, parts))
            dropped.remove(ours)
    if dropped:
        print(f"dropped: {', '.join(sorted({name.split('.')[0] for name in dropped}))}")
    return renamed


def write_timm(path, out, state, model):
    """A file for timm's VisionTransformer; the line of Python that builds it and loads `out`."""
    config = model.config
    state = translate(state, TIMM_VIT)
    if config.get("class_names"):
        print("dropped: class_names")
    arguments = {"img_size": tuple(config["image_size"]), "patch_size": model.patch_size}
    arguments |= {"in_chans": config["channels"], "num_classes": getattr(model, "classes", 0)}
    arguments |= {"embed_dim": model.width, "depth": model.layers, "num_heads": model.heads}
    arguments |= {"class_token": True, "fc_norm": "fc_norm.weight" in state}
    arguments["global_pool"] = "avg" if config.get("pool") == "mean" else "token"
    arguments = ", ".join(f"{name}={value!r}" for name, value in arguments.items())
    if config["norm_eps"] != 1e-6:  # timm's own
        norm = f"functools.partial(torch.nn.LayerNorm, eps={config['norm_eps']})"
        arguments += f", norm_layer={norm}"
    load = "torch.load"
    if out.suffix == ".safetensors":
        load = "safetensors.torch.load_file"
        save_safetensors(state, path)
    else:
        write_file(path, state)
    imports = "import functools, timm, torch" + (", safetensors.torch" if "safe" in load else "")
    build = f"model = timm.models.VisionTransformer({arguments})"
    return f"{imports}; {build}; model.load_state_dict({load}({str(out)!r}))"


def write_hugging_face(path, out, state, model):
    """A folder with the names that all versions of transformers read; the line to load `out`."""
    config, options = model.config, ""
    H, W = config["image_size"]
    published = {
        "model_type": "vit",
        "image_size": H if H == W else [H, W],
        "patch_size": model.patch_size,
        "num_channels": config["channels"],
        "hidden_size": model.width,
        "num_hidden_layers": model.layers,
        "num_attention_heads": model.heads,
        "intermediate_size": 4 * model.width,
        "hidden_act": "gelu",
        "qkv_bias": True,
        "layer_norm_eps": config["norm_eps"],
    }
    if isinstance(model, MAE):
        if H != W:
            raise ValueError(f"ViTMAEForPreTraining wants square images, not {H}x{W}")
        kind, (width, layers, heads) = "ViTMAEForPreTraining", config["decoder"]
        published |= {"model_type": "vit_mae", "decoder_hidden_size": width}
        published |= {"decoder_num_hidden_layers": layers, "decoder_num_attention_heads": heads}
        published |= {"decoder_intermediate_size": 4 * width, "mask_ratio": config["mask_ratio"]}
        published |= {"norm_pix_loss": config["normalize_targets"]}
    elif isinstance(model, Classifier):
        if config["pool"] != "cls":
            why = (
                "ViTForImageClassification reads the class token, this head the mean of the patches"
            )
            raise ValueError(f"{why}: --format timm can say that")
        kind, labels = "ViTForImageClassification", config["class_names"]
        labels = labels or [f"LABEL_{number}" for number in range(model.classes)]
        published["id2label"] = dict(enumerate(labels))
        published["label2id"] = {label: number for number, label in enumerate(labels)}
    else:
        kind, options = "ViTModel", ", add_pooling_layer=False"
    published["architectures"] = [kind]
    state = translate(state, HF_FILE)
    if kind != "ViTModel":
        bare = ("classifier.", "decoder.")
        state = {n if n.startswith(bare) else f"vit.{n}": tensor for n, tensor in state.items()}
    path.mkdir()
    write_file(path / "config.json", json.dumps(published, indent=1))
    save_safetensors(state, path / "model.safetensors")
    load = f"model = transformers.{kind}.from_pretrained({str(out)!r}{options})"
    return f"import transformers; {load}"


# --------------------------------------------------------------------------------- the command line


def main(argv=None):
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
    add("--heads", type=int, help="of an IN whose size is unknown")
    add("--image-size", type=pair, help="of an IN whose positions are no square: HEIGHTxWIDTH")
    add("--entry", help="of an IN with several networks: state_dict_ema, or a prefix of names")
    run = parser.parse_args(argv)
    try:
        of_source = run.heads, run.image_size, run.entry
        line = convert(run.source, run.out, run.format, *of_source)
    except (ValueError, OSError) as error:
        fail(error, 2 if isinstance(error, ValueError) else 1)
    except KeyboardInterrupt:
        fail("stopped", 130)
    print(f"wrote {run.out}. To load it:\n{line}")
