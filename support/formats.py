"""Weights of other libraries: recognised by their tensors' names, and read.

read_public   a file or folder -> tensors by our names, and the config of their model
read_file     the same for a text tower as well; the config is what the file or folder has
infer_config  the config of tensors that come without one
inherit       the weights of --init, and the config that a stage takes over from them
"""

import argparse
import hashlib
import itertools
import json
import math
import os
import re
from pathlib import Path

import torch

from model import DECODERS, SIZES, check_weights, load_file, one_line_errors, pair, read_weights
from support.checkpoints import last_line

# -------------------------------------------------------------------------------- names


def names(ours, theirs, prefix="", their_prefix=""):
    """{our name: theirs} of two texts with one name a word, in the same order."""
    words = zip(ours.split(), theirs.split())
    return {prefix + our: their_prefix + their for our, their in words}


# Our names of modules and of tensors outside of them. They are timm's and the public MAE's
# where these have one. {i} is the number of a block.
VIT = "cls_token pos_embed patch_embed.proj norm head fc_norm"
DECODER = "mask_token decoder_pos_embed decoder_embed decoder_norm decoder_pred"
TEXT = "token_embedding position_embedding embedding_norm type_embedding"
PROJECTIONS = "image_projection text_projection logit_scale"
BLOCK = "attn.qkv attn.proj norm1 norm2 mlp.fc1 mlp.fc2"
RELATIVE = "attn.rel_pos_t attn.rel_pos_h attn.rel_pos_w"
BLOCKS, DECODER_BLOCKS, TEXT_BLOCKS = "blocks.{i}.", "decoder_blocks.{i}.", "text.blocks.{i}."

# The same in other libraries, in the same order. "query+key+value" are three tensors that we
# store as one; "in_proj_" has no dot before weight and bias.
HF_VIT = """embeddings.cls_token embeddings.position_embeddings
    embeddings.patch_embeddings.projection layernorm classifier"""
HF_BLOCK = """attention.attention.query+key+value attention.output.dense
    layernorm_before layernorm_after intermediate.dense output.dense"""
HF_5_BLOCK = """attention.q_proj+k_proj+v_proj attention.o_proj
    layernorm_before layernorm_after mlp.fc1 mlp.fc2"""
XLMR_TEXT = "word_embeddings position_embeddings LayerNorm token_type_embeddings"
XLMR_BLOCK = """attention.self.query+key+value attention.output.dense
    attention.output.LayerNorm output.LayerNorm intermediate.dense output.dense"""
MAWS_PROJECTIONS = "vision_projection text_projection logit_scale"
TORCHTEXT = "token_embedding positional_embedding.embedding embedding_layer_norm"
TORCHTEXT_BLOCK = "self_attn.in_proj_ self_attn.out_proj norm1 norm2 linear1 linear2"
TORCHTEXT_OLD_BLOCK = """attention.input_projection attention.output_projection
    attention_layer_norm final_layer_norm residual_mlp.mlp.0 residual_mlp.mlp.3"""


def same(words, prefix=""):
    return names(words, words, prefix, prefix)


def hugging_face(block, blocks, decoder_blocks):
    """The names of a ViT or ViTMAE of transformers."""
    table = names(VIT, HF_VIT) | names(DECODER, DECODER, "", "decoder.")
    table |= names(BLOCK, block, BLOCKS, blocks)
    return table | names(BLOCK, block, DECODER_BLOCKS, decoder_blocks)


def maws(block, blocks):
    """The names of a released pair: timm's ViT and torchtext's XLM-R."""
    table = {ours: f"vision_encoder.{theirs}" for ours, theirs in TIMM_VIT.items()}
    table |= names(TEXT, TORCHTEXT, "text.", "encoder.transformer.")
    table |= names(BLOCK, block, TEXT_BLOCKS, f"encoder.transformer.{blocks}")
    return table | names(PROJECTIONS, MAWS_PROJECTIONS)


TIMM_VIT = same(VIT) | same(BLOCK, BLOCKS)
OURS = TIMM_VIT | same(DECODER) | same(BLOCK, DECODER_BLOCKS) | same(RELATIVE, BLOCKS)
OURS |= same(TEXT, "text.") | same(BLOCK, TEXT_BLOCKS) | same(f"{PROJECTIONS} time_embed")
HF = hugging_face(HF_BLOCK, "encoder.layer.{i}.", "decoder.decoder_layers.{i}.")
# transformers 5 has other names in the files of a ViTMAE, and in memory.
HF_5 = hugging_face(HF_BLOCK, "encoder.layer.{i}.", "decoder.decoder_encoder.layer.{i}.")
HF_5_MEMORY = hugging_face(HF_5_BLOCK, "layers.{i}.", "decoder.decoder_layers.{i}.")
XLMR = names(TEXT, XLMR_TEXT, "text.", "embeddings.")
XLMR |= names(BLOCK, XLMR_BLOCK, TEXT_BLOCKS, "encoder.layer.{i}.")
MAWS = maws(TORCHTEXT_BLOCK, "layers.layers.{i}.")
MAWS_OLD = maws(TORCHTEXT_OLD_BLOCK, "layers.{i}.")
FORMATS = [("timm-named", OURS), ("Hugging Face", HF), ("Hugging Face", HF_5)]
FORMATS += [("Hugging Face", HF_5_MEMORY), ("Hugging Face", XLMR)]
FORMATS += [("torchtext-named", MAWS), ("torchtext-named", MAWS_OLD)]
UNUSED = ("pooler.", "lm_head.", "embeddings.position_ids")  # layers that our models lack

# Prefixes of a part of a network; of a whole network, by PyTorch, Lightning, solo-learn and
# others. A library's own names may begin like the latter ("encoder.layer.0"): so a network is
# found by the name of its embedding.
PART = r"(vit\.|roberta\.|text_encoder\.)?"
WRAPPERS = r"((state_dict|module|model|backbone|encoder)[./])*"
NETWORK = re.compile(
    rf"(|.+?[./]){PART}((vision_encoder\.)?patch_embed\.proj|"
    r"embeddings\.patch_embeddings\.projection|embeddings\.word_embeddings|"
    r"text\.token_embedding|encoder\.transformer\.token_embedding)\.weight"
)


def tensor_names(table, state):
    """{our name: [theirs]} of the weights and biases of all modules in a table.

    Blocks are numbered up to the highest number in the names of `state`.
    """
    numbers = [int(n) for name in state for n in re.findall(r"\.(\d{1,3})\.", name)]
    blocks, found = range(1 + max(numbers, default=0)), {}
    for (ours, theirs), end in itertools.product(table.items(), ("", ".weight", ".bias")):
        start, dot, last = theirs.rpartition(".")
        parts = [f"{start}{dot}{part}{end}".replace("_.", "_") for part in last.split("+")]
        for i in blocks if "{i}" in ours else (0,):
            found[ours.format(i=i) + end] = [part.format(i=i) for part in parts]
    return found


def without(pattern, state):
    """Tensors with a pattern removed from their names. ValueError if two names collide."""
    renamed = {re.sub(pattern, "", name): tensor for name, tensor in state.items()}
    if len(renamed) < len(state):
        raise ValueError("some tensors have the same name but for a prefix")
    return renamed


def recognise(state):
    """(format, {our name: tensor}, other names) by the table that explains the most names."""
    state, style, explained = without(f"^{PART}", state), None, {}
    for other, table in FORMATS:
        known = tensor_names(table, state).items()
        found = {name: parts for name, parts in known if state.keys() >= set(parts)}
        if len(found) > len(explained):
            style, explained = other, found
    ours = {}
    for name, parts in explained.items():
        tensors = [state[part] for part in parts]
        ours[name] = torch.cat(tensors) if len(tensors) > 1 else tensors[0]
    types = ours.pop("text.type_embedding.weight", None)
    if types is not None:  # all tokens are of the first type: a part of their positions
        name = "text.position_embedding.weight"
        ours[name] = ours[name].float() + types[:1].float()
    if "logit_scale" in ours:
        ours["logit_scale"] = ours["logit_scale"].reshape(1)
    return style, ours, set(state).difference(*explained.values())


# ------------------------------------------------------------------------------ reading


def import_safetensors():
    try:
        import safetensors.torch
    except ImportError:
        raise ValueError(".safetensors needs a package: pip install safetensors") from None
    return safetensors


def open_weights(path):
    """(content, path) of a file of weights, or of the one in a folder of transformers.

    An index.json and the files that it lists are one. No code runs from a file.
    Raises ValueError, one line, if it cannot be read.
    """
    path = Path(path)
    if path.is_dir():
        files = ("model.safetensors", "pytorch_model.bin")
        files = [path / f"{file}{end}" for file in files for end in ("", ".index.json")]
        path = next((file for file in files if file.is_file()), files[0])
    if not path.name.endswith(".index.json"):
        return open_file(path), path
    with one_line_errors(path):
        listed = json.loads(path.read_text())["weight_map"]
        files = {file: open_file(path.with_name(file)) for file in set(listed.values())}
        return {name: files[file][name] for name, file in listed.items()}, path


def open_file(path):
    """The content of one file: see open_weights."""
    if path.suffix != ".safetensors" or not path.is_file():
        return load_file(path)
    safetensors = import_safetensors()
    try:
        return safetensors.torch.load_file(path)
    except (safetensors.SafetensorError, OSError, ValueError) as error:
        raise ValueError(f"cannot read weights from {path}: {last_line(error):.200}") from None


def flatten(content, prefix=""):
    """(name, tensor) of all tensors in nested dicts, named like "state_dict/cls_token"."""
    for key, value in content.items() if isinstance(content, dict) else ():
        if isinstance(value, torch.Tensor):
            yield f"{prefix}{key}", value
        elif isinstance(value, dict):
            yield from flatten(value, f"{prefix}{key}/")


def hint(others, flag):
    """The end of a message on a file with other networks: how to read one of these."""
    return f"; {flag} reads what is in {' or '.join(others)}" if others and flag else ""


def one_network(content, entry=None, flag="--entry"):
    """(prefix, {name behind the prefix: tensor}, other networks, other tensors) of a file.

    The prefix of the network is one of WRAPPERS or, if given, `entry`, itself below a usual
    one or not, and WRAPPERS behind it. torch.compile's "_orig_mod." is left out. Raises
    ValueError if there is no such network, or there are several.
    """
    state = without(r"_orig_mod\.", dict(flatten(content)))
    found = sorted({match[1] for name in state if (match := NETWORK.fullmatch(name))})
    below = rf"((model|state_dict)[./])?{re.escape(entry)}[./]" if entry else ""
    fitting = [prefix for prefix in found if re.fullmatch(below + WRAPPERS, prefix)]
    others = [prefix.rstrip("./") for prefix in found if prefix and [prefix] != fitting]
    if len(fitting) != 1:
        problem = "several networks" if fitting else "no ViT or text tower known here"
        names, where = ", ".join(state) or content, f" in {entry}" if entry else ""
        raise ValueError(f"{problem}{where}, of {names!s:.120}{hint(others, flag)}")
    (prefix,) = fitting
    rest = [name for name in state if not name.startswith(tuple(found))]
    # Behind the prefix there may be entries with other things: an optimizer, averages.
    state = {n.removeprefix(prefix): t for n, t in state.items() if n.startswith(prefix)}
    state = {name: tensor for name, tensor in state.items() if "/" not in name}
    if odd := [n for n, t in state.items() if t.layout != torch.strided or t.is_meta]:
        raise ValueError(f"{odd[0]} is sparse, or a shape without numbers")
    return prefix, state, others, rest


def read_file(path, entry=None, flag="--entry"):
    """(path, format, tensors by our names, config) of a file or folder of weights.

    The config is ours or, by the names of transformers, that of its config.json or of the
    arguments of the public MAE code; or {}. entry: see one_network; flag: a user's option for
    it. Raises ValueError, one line, if no network known here can be read.
    """
    content, path = open_weights(path)
    with one_line_errors(path):
        prefix, state, others, rest = one_network(content, entry, flag)
        style, state, unknown = recognise(state)
        config = content.get("config") if prefix.startswith("model/") else None
        config = config if isinstance(config, dict) and "size" in config else {}
        ndims = {name: tensor.ndim for name, tensor in state.items() if tensor.numel()}
        patches = ndims.get("patch_embed.proj.weight")
        texts = ndims.get("text.token_embedding.weight")
        if patches != (5 if "frames" in config else 4) and texts != 2:
            raise ValueError("no (D, C, P, P) embedding of patches, no (V, D) one of tokens")
        if strange := sorted(name for name in unknown if not name.startswith(UNUSED)):
            more = f" and {len(strange) - 3} more" if len(strange) > 3 else ""
            raise ValueError(
                f"it looks {style}, but nothing explains {', '.join(strange[:3])}{more}: "
                f"it is of another architecture{hint(others, flag)}"
            )
    if config:
        style = "our own"
    elif style == "Hugging Face":
        config = published_config(path, state)
    elif "mask_token" in state:
        config = public_arguments(content)
    if os.environ.get("RANK", "0") == "0":
        kind = "ViTMAE" if "mask_token" in state else "ViT" if patches else "XLM-R"
        line = f"{path}: {style} {'CLIP pair' if patches and texts else kind}"
        line += f" in {prefix.rstrip('./')}" if prefix else ""
        depth = max(1, len(re.findall("[./]", prefix)))  # model.encoder. -> model.head
        rest = [".".join(re.split("[./]", name)[:depth]) for name in rest]
        rest = sorted({*rest, *(name.split(".")[0] for name in unknown)})
        line += f"; not read: {', '.join(rest)}" if rest else ""
        line += f"; its args: {config}" if config and style == "timm-named" else ""
        print(line + hint(others, flag))
    return path, style, state, config


def read_public(path, heads=None, image_size=None, entry=None):
    """What model.read_weights returns, of all that it does not read itself.

    heads       number of attention heads, if no config or known size determines it
    image_size  of weights without a config whose positions are not a square grid
    entry       which of several networks to read: an entry of the file, or a prefix
    """
    path, style, state, config = read_file(path, entry)
    if "patch_embed.proj.weight" not in state:
        raise ValueError(f"{path} is a text tower alone: it has no patch_embed.proj.weight")
    if style != "our own":
        norm_eps = 1e-12 if style == "Hugging Face" else 1e-6
        with one_line_errors(path):
            config = infer_config(state, heads, config, norm_eps, image_size)
    check_weights(path, state, config, heads)
    return state, config


def inherit(init, given, names, heads=None, read=read_weights, entry=None):
    """Read the weights that a run starts from: (weights, config of its model, fingerprint).

    init    a file of weights; None: the result is (None, given, None)
    given   entries of the config that the run sets; ValueError if they change size, patch or
            channels of the weights
    names   entries of the config to inherit; the others are left out
    read    read_weights, or a function with the same arguments and results
    The weights are (state, grid of its position table): arguments of load_weights.
    """
    if not init:
        if heads or entry:
            raise ValueError("--heads and --entry describe the weights in --init: give these")
        return None, given, None
    state, config = read(init, heads, given.get("image_size"), entry)
    for name in ("size", "patch_size", "channels"):
        if given.get(name, config[name]) != config[name]:
            raise ValueError(f"{init} has {name} {config[name]}: it cannot be changed")
    grid = [side // config["patch_size"] for side in config["image_size"]]
    config = {name: config[name] for name in names if name in config} | given
    return (state, grid), config, fingerprint(state)


def fingerprint(state):
    """A hash of the first 8 numbers of each tensor: training changes them all."""
    numbers = [(name, tensor.flatten()[:8].tolist()) for name, tensor in sorted(state.items())]
    return f"weights {hashlib.sha256(repr(numbers).encode()).hexdigest()[:8]}"


# ---------------------------------------------------- the config of tensors without one


def public_arguments(content):
    """The arguments of the public MAE code that say what was predicted, as far as given."""
    args = content.get("args")
    args = vars(args) if isinstance(args, argparse.Namespace) else args
    args = args if isinstance(args, dict) else {}
    types = {"input_size": int | list | tuple, "mask_ratio": float, "norm_pix_loss": int}
    return {name: args[name] for name in types if isinstance(args.get(name), types[name])}


def published_config(path, state):
    """The config.json of transformers beside a file of weights, or {}."""
    path = path.with_name("config.json")
    if not path.is_file():
        return {}
    widths = [len(t) for name, t in state.items() if name.endswith("blocks.0.norm1.weight")]
    known = {"model_type": ("vit", "vit_mae", "xlm-roberta"), "hidden_act": ("gelu",)}
    known["hidden_size"] = widths
    with one_line_errors(path):
        config = json.loads(path.read_text())
        for name, values in known.items():
            if config.get(name) not in (None, *values):
                wanted = " or ".join(map(str, values))
                raise ValueError(f"{name} is {config[name]!r:.40}, wanted {wanted}")
        return config if "model_type" in config else {}


def infer_config(state, heads=None, published=None, norm_eps=1e-6, image_size=None):
    """The config of tensors by our names that come without one.

    published: by the names of transformers. heads, norm_eps, image_size: what it does not
    say. ValueError if the tensors do not determine the architecture. What is not known about
    a decoder is left out.
    """
    published = published or {}
    width, channels, P, _ = state["patch_embed.proj.weight"].shape
    heads = heads or published.get("num_attention_heads")
    said = published.get("image_size", published.get("input_size"))
    shape = infer_shape(state, "blocks", width, SIZES.values(), heads)
    config = {
        "size": name_of(shape, SIZES),
        "image_size": infer_image_size(state, P, said, image_size),
        "patch_size": P,
        "channels": channels,
        "positions": "sincos",
        "norm_eps": float(published.get("layer_norm_eps", norm_eps)),
    }
    if "text.token_embedding.weight" in state:
        from tasks.lit import infer_text_config

        text = {n.removeprefix("text."): t for n, t in state.items() if n.startswith("text.")}
        config["text"] = infer_text_config(text) | {"context": 100}  # maws repository
        config |= {"shared_width": state["image_projection"].shape[1], "pool": "cls"}
    elif "mask_token" in state:
        width, known = state["mask_token"].shape[-1], DECODERS.values()
        heads = published.get("decoder_num_attention_heads")
        config["decoder"] = [*infer_shape(state, "decoder_blocks", width, known, heads)]
        for theirs, ours in (("mask_ratio",) * 2, ("norm_pix_loss", "normalize_targets")):
            config |= {ours: published[theirs]} if theirs in published else {}
    elif "head.weight" in state:
        config["classes"] = len(state["head.weight"])
        config["pool"] = "mean" if "fc_norm.weight" in state else "cls"
        labels = published.get("id2label") or {}
        labels = [str(labels[number]) for number in sorted(labels, key=int)]
        if len(labels) not in (0, config["classes"]):
            raise ValueError(f"id2label has {len(labels)} of {config['classes']} classes")
        config["class_names"] = None if labels[:1] in ([], ["LABEL_0"]) else labels
        if not published and config["pool"] == "cls" and config["image_size"][0] in (512, 518):
            config["val_crop"] = 0.0  # the finetuned ones of the maws repository
    return config


def infer_shape(state, blocks, width, known, heads=None):
    """(width, layers, heads) of the blocks in a state: heads as given or as one of `known`."""
    layers = len({name.split(".")[1] for name in state if name.startswith(f"{blocks}.")})
    heads = heads or next((h for w, l, h, *_ in known if (w, l) == (width, layers)), None)
    if not heads:
        shape = f"{layers} {blocks} of width {width}"
        raise ValueError(f"{shape} have how many heads? Give --heads (of the encoder), or a config")
    return width, layers, heads


def name_of(shape, sizes):
    """The name of (width, layers, heads) in `sizes`, or "WIDTHxLAYERSxHEADS"."""
    known = (name for name, known in sizes.items() if known[:3] == shape)
    return next(known, "x".join(map(str, shape)))


def infer_image_size(state, P, published=None, given=None):
    """[height, width] of the images of a position table: as published, square or given."""
    if "pos_embed" not in state or state["pos_embed"].ndim != 3:
        raise ValueError("there is no (1, 1 + patches, width) pos_embed among the weights")
    rows = state["pos_embed"].shape[1]
    for size in (published, math.isqrt(max(0, rows - 1)) * P, given):
        try:
            height, width = pair(size)
        except ValueError:
            continue
        if rows == 1 + (height // P) * (width // P):
            return [height, width]
    raise ValueError(
        f"pos_embed has {rows} rows, not those of a class token and a square grid: give the "
        f"weights' own --image-size HEIGHTxWIDTH, of {rows - 1} patches of {P} (to model.py "
        "convert, if another is wanted)"
    )
