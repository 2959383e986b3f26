"""Images and texts: a text tower is trained beside the frozen image encoder (LiT, arXiv
2111.07991), and classes are recognised by their names (zero-shot)."""

import copy
import hashlib
import json
import math
import os
import re
from functools import partial
from itertools import chain
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import data
import model as models
from data import CAPTION, make_picture, normalize, one_line, random_bits
from kernels import split_heads
from model import Block, ViT, encoder_config, initialize, pool, sync_gradients, triple
from support import flags, plan
from support.checkpoints import barrier, find_checkpoint
from support.formats import fingerprint, infer_shape, name_of, read_file
from support.labels import read_all, read_class_names, read_lines, texts_in
from support.probe import extract

# ------------------------------------------------------------------------------ captions and tokens


def all_captions(source):
    """The captions of all samples of a source: a list of lists of texts, not cleaned."""
    return list(read_all(source, "caption", lambda sample: sample["captions"](), []))


def captions_in(members, key):
    """The captions of a sample of a shard, {extension: bytes}: a list of texts.

    They are the text or the list of texts under `key` in .json, else the content of .txt.
    Raises ValueError if the .json is damaged.
    """
    try:
        content = json.loads(members.get("json", b"{}"))
        texts = texts_in(content.get(key) if isinstance(content, dict) else None)
    except ValueError as error:
        raise ValueError(f"the file of its captions is damaged ({error})") from None
    if any(map(clean, texts)):
        return texts
    text = members.get("txt", b"").decode("utf-8-sig", "replace").strip()
    return [text] if text else []


def clean(text):
    """A caption without # signs (the paper strips and sanitises: unverified), with single
    spaces for white space and control characters. Joiners stay: scripts need them."""
    return re.sub(r"[#\uff03\s\x00-\x1f\x7f-\x9f]+", " ", text).strip()


BOS, PADDING, EOS, UNKNOWN = range(4)  # as in fairseq, and so in XLM-R


class Tokenizer:
    """Turn texts into token ids: bytes of UTF-8 (byte b has the id 4 + b), or the pieces of
    XLM-R's sentencepiece.bpe.model or of a file that was trained like it.

    The file has <unk> 0, <s> 1, </s> 2, then the pieces. fairseq has <s> 0, <pad> 1, </s> 2,
    <unk> 3, then each piece one higher, then <mask>: 250,002 in all.
    """

    def __init__(self, path=None):
        self.pieces, self.vocabulary, self.identity = None, 4 + 256, "bytes of UTF-8"
        if not path:
            return
        try:
            import sentencepiece
        except ImportError:
            raise ValueError(f"{path} needs a package: pip install sentencepiece") from None
        self.pieces = pieces = sentencepiece.SentencePieceProcessor()
        try:
            content = Path(path).read_bytes()
            pieces.LoadFromSerializedProto(content)
            if [pieces.unk_id(), pieces.bos_id(), pieces.eos_id()] != [0, 1, 2]:
                raise ValueError("<unk>, <s> and </s> are not its first three, as in XLM-R's")
        except (OSError, RuntimeError, ValueError) as error:
            raise ValueError(f"{path} is no tokenizer of XLM-R's: {one_line(error)}") from None
        self.vocabulary = pieces.vocab_size() + 2
        self.identity = f"sentencepiece {hashlib.sha256(content).hexdigest()[:16]}"

    def ids(self, text):
        content = text.encode(errors="replace")  # lone surrogates become question marks
        if not self.pieces:
            return [4 + byte for byte in content]
        return [id + 1 if id else UNKNOWN for id in self.pieces.encode(content.decode())]

    def __call__(self, texts, context):
        """A list of n texts -> (n, T) int64: BOS, at most `context` tokens, EOS, PADDING.

        T is at most context + 2, and else a multiple of 8, so that few shapes occur.
        """
        rows = [[BOS, *self.ids(text)[:context], EOS] for text in texts]
        width = min(-(-max(map(len, rows)) // 8) * 8, context + 2)
        return torch.tensor([row + [PADDING] * (width - len(row)) for row in rows])


def tokenizer_for(path, text):
    """Tokenizer(path) for a text tower with the config `text`, {} for a new one. Raises
    ValueError if it is not the tokenizer that the tower was trained with."""
    tokenizer = Tokenizer(path)
    known, size = text.get("tokenizer"), text.get("vocabulary", tokenizer.vocabulary)
    if known not in (None, tokenizer.identity) or size != tokenizer.vocabulary:
        raise ValueError(
            f"the text tower knows {size} tokens{f' of {known}' if known else ''}, "
            f"{tokenizer.identity} has {tokenizer.vocabulary}: "
            "give its sentencepiece file as --tokenizer"
        )
    return tokenizer


# ----------------------------------------------------------------------------------- the two towers

# (width, layers, heads): XLM-R's Base and Large (arXiv 1911.02116); toy is our choice.
TEXT_SIZES = {"toy": (128, 3, 4), "XLMR-B": (768, 12, 12), "XLMR-L": (1024, 24, 16)}
BUILT_FROM = {"size", "vocabulary", "positions", "norm_eps"}  # a TextTower's arguments


class TextBlock(Block):
    """Post-norm transformer block, as in XLM-R: LayerNorm follows each residual sum."""

    one_length = False

    def forward(self, x, mask, queries=None):
        """x (B, T, D); mask (B, 1, 1, T), True for tokens -> (B, queries, D): the first
        `queries` tokens, or all if None."""
        q, k, v = split_heads(self.attn.qkv(x), self.attn.heads)
        branch = F.scaled_dot_product_attention(q[:, :, :queries], k, v, attn_mask=mask)
        x = self.norm1(x[:, :queries] + self.attn.proj(branch.transpose(1, 2).flatten(2)))
        return self.norm2(x + self.mlp(x))


class TextTower(nn.Module):
    """XLM-R's encoder: learned positions, post-norm blocks, output of the first token.

    size        a name in TEXT_SIZES or "WIDTHxLAYERSxHEADS"
    vocabulary  number of token ids
    positions   rows of the position table: the tokens of the longest text plus two
    norm_eps    of every LayerNorm (fairseq's)
    """

    def __init__(self, size, vocabulary, positions=514, norm_eps=1e-5):
        super().__init__()
        known = TEXT_SIZES.get(size)
        width, layers, heads = known or triple(size, f"one of {[*TEXT_SIZES]}")
        self.width = width
        self.token_embedding = nn.Embedding(vocabulary, width)
        self.position_embedding = nn.Embedding(positions, width)
        self.embedding_norm = nn.LayerNorm(width, norm_eps)
        blocks = (TextBlock(width, heads, norm_eps) for _ in range(layers))
        self.blocks = nn.ModuleList(blocks)

    def forward(self, tokens):
        """tokens (B, T) int64, padded with PADDING -> (B, D)."""
        mask = tokens != PADDING
        # As in fairseq, tokens have the positions PADDING + 1, ...; padding has PADDING.
        positions = mask.cumsum(dim=1) * mask + PADDING
        x = self.token_embedding(tokens) + self.position_embedding(positions)  # (B, T, D)
        x, mask = self.embedding_norm(x), mask[:, None, None]
        for block in self.blocks[:-1]:
            x = block(x, mask)
        return self.blocks[-1](x, mask, 1)[:, 0]  # only the first token's output is used


class TwoTowers(ViT):
    """An image encoder and a text encoder, both projected into one space (CLIP, LiT).

    text          arguments of the TextTower; "context", the most tokens of a text without
                  BOS and EOS; and "tokenizer", the identity of its Tokenizer
    pool          of the image tokens: "cls" as released, or "mean"
    other arguments: see ViT
    """

    large = ("text.token_embedding",)

    def __init__(self, size="B", text=None, shared_width=768, pool="cls", **encoder_arguments):
        super().__init__(size, **encoder_arguments)
        text = {"size": "XLMR-B", "vocabulary": 250_002, "context": 100, **(text or {})}
        self.config |= {"text": text, "shared_width": shared_width, "pool": pool}
        self.text = TextTower(**{name: text[name] for name in BUILT_FROM & text.keys()})
        self.image_projection = nn.Parameter(torch.empty(self.width, shared_width))
        self.text_projection = nn.Parameter(torch.empty(self.text.width, shared_width))
        self.logit_scale = nn.Parameter(torch.empty(1))  # a logarithm
        self.init_std = {"image_projection": self.width**-0.5}  # maws repository
        self.init_std["text_projection"] = self.text.width**-0.5
        initialize(self)

    def features(self, images):
        """(B, C, H, W) float, normalised -> (B, D), by the frozen image encoder."""
        return pool(super().forward(images), self.config["pool"])

    def forward(self, features=None, tokens=None):
        """features (B, D), tokens (B, T) int64 -> two (B, shared_width) of unit length, None
        without an input, and the scale of the logits (1,), all fp32."""
        if features is not None:  # fp32, even if the weights compute in bf16
            features = features.to(self.image_projection.dtype) @ self.image_projection
            features = F.normalize(features.float(), dim=1)
        if tokens is not None:
            tokens = self.text(tokens) @ self.text_projection
            tokens = F.normalize(tokens.float(), dim=1)
        return features, tokens, self.logit_scale.float().exp()


ROWS = 512  # rows of the matrix of logits that are in memory at once


def contrastive_loss(images, texts, scale, weight):
    """This process's part of the mean of two softmax cross-entropies over the global batch:
    each image against all texts, and each text against all images (CLIP, arXiv 2103.00020).

    images, texts  (b, S) float, of unit length; b is the same on each process
    scale          (1,), multiplies the cosines
    weight         (b,); pairs of weight 0 do not exist

    Returns (). The loss is the sum over the processes, and so is the gradient of scale; those
    of images and texts are exact.
    """
    alone = not dist.is_initialized()
    gather = (lambda part: part) if alone else Gather.apply
    kept, own = gather(weight) > 0, weight > 0  # (processes * b,), (b,)
    images, texts = images[own], gather(texts)[kept]  # (m, S), (n, S)
    before = 0 if alone else dist.get_rank() * len(weight)
    first = int(kept[:before].sum())
    pairs = slice(first, first + len(images))  # this process's among the n

    def log_sums(images):
        logits = scale * images @ texts.T  # (rows, n)
        return logits.logsumexp(dim=1), logits.logsumexp(dim=0)

    # The matrix (m, n) is never whole in memory: its rows are computed again in backward.
    again = partial(checkpoint, use_reentrant=False, preserve_rng_state=False)
    blocks = [again(log_sums, part) for part in images.split(ROWS)]
    over_texts, over_images = zip(*blocks)  # (rows,) each, (n,) each
    over_images = gather(torch.stack(over_images).logsumexp(dim=0, keepdim=True))
    over_images = over_images.logsumexp(dim=0)[pairs]  # (m,)
    logits = scale * (images * texts[pairs]).sum(dim=1)  # (m,)
    losses = (torch.cat(over_texts) + over_images) / 2 - logits
    return losses.sum() / max(1, len(texts))


class Gather(torch.autograd.Function):
    """(b, ...) -> (processes * b, ...), the rows of all processes."""

    @staticmethod
    def forward(ctx, part):
        whole = part.new_empty(dist.get_world_size() * len(part), *part.shape[1:])
        dist.all_gather_into_tensor(whole, part.contiguous())
        return whole

    @staticmethod
    def backward(ctx, gradient):
        gradient = gradient.contiguous()
        dist.all_reduce(gradient)
        return gradient.chunk(dist.get_world_size())[dist.get_rank()]


def read_text_weights(path, heads=None):
    """(state, arguments) of the TextTower in a file of XLM-R or of TwoTowers. Raises ValueError
    if there is none or parts are missing. heads: see read_weights."""
    path, style, state, config = read_file(path, flag=None)
    state = {n.removeprefix("text."): t for n, t in state.items() if n.startswith("text.")}
    with models.one_line_errors(path):
        if not state:
            raise ValueError("there is no text tower in it")
        if style == "our own":
            text = config["text"]
            config = {name: text[name] for name in BUILT_FROM & text.keys()}
        else:
            config = infer_text_config(state, heads, config)
        with torch.device("meta"):
            wanted = TextTower(**config).state_dict()
        fits = lambda name: name in state and state[name].shape == wanted[name].shape
        if misfits := [name for name in wanted if not fits(name)]:
            raise ValueError(f"{', '.join(misfits[:3])} are missing or of another shape")
    return state, config


def infer_text_config(state, heads=None, published=None):
    """The arguments of the TextTower of these tensors: see infer_config."""
    published = published or {}
    vocabulary, width = state["token_embedding.weight"].shape
    heads = heads or published.get("num_attention_heads")
    shape = infer_shape(state, "blocks", width, TEXT_SIZES.values(), heads)
    return {
        "size": name_of(shape, TEXT_SIZES),
        "vocabulary": vocabulary,
        "positions": len(state["position_embedding.weight"]),
        "norm_eps": float(published.get("layer_norm_eps", 1e-5)),
    }


# ---------------------------------------------------------------------------------------- measuring


def add_text_flags(parser, task):
    """Add the flags of evaluate.py --task zeroshot or retrieval to its parser."""
    add = parser.add_argument
    add("--tokenizer", help="XLM-R's sentencepiece file, if the texts were cut by it")
    if task == "zeroshot":
        add("--classnames", help="file of names, a line for each class (the data's names)")
        add("--templates", help="file of sentences with {} for a name (a few of ours)")
    else:
        add("--caption-key", default="caption", help="of the captions in .json (caption)")


def build_towers(path, state, config):
    """TwoTowers for these weights. Raises ValueError if a part of them is missing."""
    if "text" not in config:
        raise ValueError(f"{path} has no text tower: finetune.py --task lit makes one")
    names = [name for name in ("text", "shared_width", "pool") if name in config]
    model = TwoTowers(**encoder_config(config), **{name: config[name] for name in names})
    if missing := model.state_dict().keys() - state.keys():
        raise ValueError(f"{path} lacks {', '.join(sorted(missing)[:3])}: half a pair")
    return model


@torch.inference_mode()
def embed_texts(model, texts, tokenizer, device):
    """Embeddings (n, S) float32 on the CPU of n texts, by TwoTowers on `device`."""
    context, found = model.config["text"]["context"], []
    for start in range(0, len(texts), 256):
        tokens = tokenizer(texts[start : start + 256], context).to(device)
        found.append(model(tokens=tokens)[1].float().cpu())
    return torch.cat(found)


NO_CAPTIONS = "want .txt or .json (--caption-key) in shards, or --labels (path,caption)"


def retrieval(model, source, tokenizer, extract):
    """Recall at 1, 5 and 10 among all images and captions of a source.

    extract: support/probe.py's with its options bound. Equal captions are one text, of several
    images. Images without a caption are left out. A tie counts as wrong. Returns the numbers
    "images" and "texts", and the fractions "text_recall_at_1", ... of the images (one of their
    captions is found) and "image_recall_at_1", ... of the texts (one of their images is).
    """
    function = lambda images: model(model.features(images))[0]
    images, _, numbers = extract({"": function}, source, model.config)
    captions, texts, pairs = all_captions(source), {}, []
    for row, number in enumerate(numbers.tolist()):
        for caption in filter(None, map(clean, captions[number])):
            pairs.append((row, texts.setdefault(caption, len(texts))))
    if not pairs:
        raise ValueError(f"no captions in {source.identity}: {NO_CAPTIONS}")
    rows, answers = torch.tensor(pairs).unbind(dim=1)
    kept, rows = rows.unique(return_inverse=True)
    images = images[""][kept]
    found = embed_texts(model, [*texts], tokenizer, model.logit_scale.device)
    of_text = ranks_of(images, found, rows, answers)
    of_image = ranks_of(found, images, answers, rows)
    result = {"images": len(images), "texts": len(texts)}
    for k in (1, 5, 10):
        result[f"text_recall_at_{k}"] = (of_text < k).double().mean().item()
        result[f"image_recall_at_{k}"] = (of_image < k).double().mean().item()
    return result


def ranks_of(asked, offered, rows, answers):
    """Number of wrong answers that are as similar as the best right one, (n,) int64.

    asked (n, S), offered (m, S); asked[rows[i]] and offered[answers[i]] are right pairs.
    """
    ranks = torch.zeros(len(asked), dtype=torch.int64)
    for part in torch.arange(len(asked)).split(1024):  # bounds the memory
        similarity, mine = asked[part] @ offered.T, (rows >= part[0]) & (rows <= part[-1])
        right = rows[mine] - part[0], answers[mine]
        best = torch.full((len(part),), -torch.inf)
        best.scatter_reduce_(0, right[0], similarity[right], "amax")
        similarity[right] = -torch.inf
        least = best[:, None] - 1e-6  # so that rounding makes no hit
        ranks[part] = (similarity > least).sum(dim=1)
    return ranks


def recall_table(found):
    """A table to print of retrieval's results."""
    images, texts = found["images"], found["texts"]
    title = f"{images} pictures, {texts} different captions"
    lines = [f"{title:45}recall at 1       5      10"]
    rows = {
        "a caption of a picture": [found[f"text_recall_at_{k}"] for k in (1, 5, 10)],
        "a picture of a caption": [found[f"image_recall_at_{k}"] for k in (1, 5, 10)],
        "(chance, about)": [min(1, k / max(images, texts)) for k in (1, 5, 10)],
    }
    for name, recalls in rows.items():
        lines.append(f"  {name:47}" + " ".join(f"{recall:7.2%}" for recall in recalls))
    return "\n".join(lines)


def zeroshot(model, source, tokenizer, names, templates, extract):
    """Recognise classes by their names: {"top1", "top5", "pictures", "classes"}.

    names, templates: files or None, see read_class_names and read_templates; extract:
    extract of support/probe.py with its options bound. Images without a label are left out.
    """
    names, templates = read_class_names(names, source.classes), read_templates(templates)
    count = sum(map(len, names))
    print(f"{len(names)} classes, {count} names, {len(templates)} templates, {tokenizer.identity}")
    device = model.logit_scale.device
    classes = class_embeddings(model, names, templates, tokenizer, device).to(device)

    def best(images):
        similarity = model(model.features(images))[0] @ classes.T
        return similarity.topk(min(5, len(names))).indices  # (b, 5)

    found, labels, _ = extract({"": best}, source, model.config)
    known = labels >= 0
    if (labels >= len(names)).any():
        last = len(names) - 1
        raise ValueError(f"label {int(labels.max())} is over {last}, the last class with a name")
    if not known.any():
        raise ValueError(f"no labels in {source.identity}: want class folders or .cls files")
    if not known.all():
        print(f"{int((~known).sum())} pictures without a label are left out")
    hits = found[""][known].long() == labels[known, None]  # (n, 5)
    top1, top5 = hits[:, 0].double().mean().item(), hits.any(dim=1).double().mean().item()
    line = f"zero-shot top-1 {top1:.2%}, top-5 {top5:.2%} on {len(hits)} pictures"
    print(f"{line} (chance {1 / len(names):.2%})")
    return {"top1": top1, "top5": top5, "pictures": len(hits), "classes": len(names)}


def class_embeddings(model, names, templates, tokenizer, device):
    """(classes, S): the normalised mean over the names of a class, a list of synonyms each,
    in all templates (maws repository, eval_zeroshot.py)."""
    classes, texts = [], []
    for number, synonyms in enumerate(names):
        for name in synonyms:
            texts += [template.replace("{}", name) for template in templates]
            classes += [number] * len(templates)
    found = embed_texts(model, texts, tokenizer, device)
    sums = torch.zeros(len(names), found.shape[1])
    return F.normalize(sums.index_add_(0, torch.tensor(classes), found), dim=1)


TEMPLATES = ("{}", "a {}", "the {}")  # sentences for the name of a class (ours)
TEMPLATES += ("a photo of a {}.", "a picture of one {}.", "an image of the {}.")


def read_templates(path):
    """The lines of a file, or TEMPLATES. Raises ValueError if a line has no {} or is repeated."""
    lines = read_lines(path, "templates") if path else TEMPLATES
    for number, line in enumerate(lines, 1):
        if "{}" not in line:
            raise ValueError(f"{path}: line {number} has no {{}} for a name: {line!r}")
        if line in lines[: number - 1]:
            raise ValueError(f"{path}: line {number} repeats an earlier one: {line!r}")
    return lines


# ---------------------------------------------------------------------------------- a training step


def make_pair(sample, key, tokenizer, context, size=None, channels=3, min_crop=None, flip=True):
    """A row of a batch: tokens (T,) int64 of a caption that is drawn, weight 0 if there is
    none, and, with a size, images (C, H, W) uint8: see data.make_picture."""
    captions = sample["captions"]() if sample else []
    texts = [text for text in map(clean, captions) if text] or [""]
    text = texts[int(random_bits(1, *key, CAPTION)[0] % len(texts))]
    row = {"tokens": tokenizer([text], context)[0], "weight": float(text != "")}
    if size:
        row["images"] = make_picture(sample, key, size, channels, min_crop, flip=flip)
    return row


def learn_pairs(run, model, micro_batches, totals):
    """A step on pairs of image and caption, exact for any number of micro-batches: see train.

    With several, first only the embeddings are computed. The loss of the whole batch gives
    their gradients. Then each micro-batch is computed again, with its gradient (GradCache,
    arXiv 2101.06983). The frozen image encoder runs once.
    """
    inputs, weights = [], []
    towers = getattr(model, "module", model)  # DistributedDataParallel only has forward
    for batch in micro_batches:
        totals.unreadable += batch["bad"]
        weight = batch["weight"]
        if run.features is None:
            with torch.no_grad():
                features = towers.features(normalize(batch["images"])).float()
        else:
            features = run.features[batch["samples"].cpu()].to(run.device)
            weight = weight * features.isfinite().all(dim=1)  # unreadable images have nan
            features = features.nan_to_num()
        tokens = batch["tokens"]
        inputs.append((features, tokens.masked_fill(tokens < 0, PADDING)))  # see data.stack
        weights.append(weight)
    several = len(inputs) > 1
    with torch.set_grad_enabled(not several):
        found = [model(*pair) for pair in inputs]
    images, texts, scales = ([x.detach() for x in parts] for parts in zip(*found))
    leaves = torch.cat(images), torch.cat(texts), scales[0]
    leaves = [leaf.requires_grad_() for leaf in leaves]
    weight = torch.cat(weights)
    loss = contrastive_loss(*leaves, weight)
    (loss * run.processes).backward()  # gradients are averaged over the processes
    of_images, of_texts = (leaf.grad.split([*map(len, weights)]) for leaf in leaves[:2])
    of_scale = leaves[2].grad / len(inputs)
    for i, gradients in enumerate(zip(of_images, of_texts)):
        with sync_gradients(model, last=i == len(inputs) - 1):
            outputs = model(*inputs[i]) if several else found[i]
            torch.autograd.backward(outputs, (*gradients, of_scale))
    # The loss is the mean of the batch already.
    part = run.batch_size / run.processes
    totals.add(loss.detach(), part, unknown=(weight == 0).sum())


# ----------------------------------------------------------------------------------- stage 3's task

# image size: (text size, width of the shared space) of the maws repository; others as L
PAIRS = {"toy": ("toy", 128), "B": ("XLMR-B", 768), "L": ("XLMR-L", 1024)}
PAIRS |= {"H": ("XLMR-L", 1024), "2B": ("XLMR-L", 2048)}
LIT_CROP = 0.9  # least area: captions describe the whole image (from open_clip)


def add_flags(groups):
    flags.add_label_flags(groups, pool="that of --init, or cls", min_crop=LIT_CROP, classes=False)
    flags.add_resume_flags(groups)
    add = groups["data"].add_argument
    add("--caption-key", default="caption", help="of the captions in .json (caption)")
    add("--cache-features", action="store_true", help="of pictures' centres, computed once")
    add = groups["model"].add_argument
    add("--text-size", help=f"{' '.join(TEXT_SIZES)}, or WIDTHxLAYERSxHEADS (by size)")
    add("--text-init", help="XLM-R's weights for the text tower to start from")
    add("--tokenizer", help="XLM-R's sentencepiece file (without: bytes)")
    add("--context", type=flags.count, help="tokens that a caption may have (100; toy: 40)")
    add("--shared-width", type=flags.count, help="of the space for both (by size)")
    add = groups["optimisation"].add_argument
    add("--lr", type=flags.positive, help="peak (1e-3)")
    add("--weight-decay", type=flags.not_negative, help="not of 1-D parameters (0.01)")


def prepare(run, finetune):
    finetune.read_init(run, config=("text", "shared_width"))
    finetune.open_pictures(run, caption_key=run.caption_key)
    if not run.weights:
        raise ValueError("--task lit wants --init: the encoder is frozen")
    run.pool, run.classes = run.pool or run.pool_of_init, 0
    run.train, run.val = data.hold_out(run.train, run.val, 1000, share=0.1)
    if not run.val.sizes.any():
        raise ValueError(f"{run.train.identity} is too small: a tenth of it is held out")
    captions = [*filter(None, map(clean, chain(*all_captions(run.val))))]
    if not captions:
        raise ValueError(f"no captions in {run.val.identity}: {NO_CAPTIONS}")
    settle_text_tower(run)
    tokens = run.tokenizer(captions[:256], run.context)
    run.mean_tokens = (tokens != PADDING).sum().item() / len(tokens)
    pairs = int(run.train.sizes.sum())
    if (run.batch_size or 0) > pairs:
        raise ValueError(f"--batch-size {run.batch_size}: the data has {pairs} pairs")
    # Of little data, a smaller batch: a pair must not meet itself in it.
    batch_size = 256 if run.toy else min(32_768, 2 ** max(1, (pairs // 8).bit_length()))
    # The batch size is recalled of the paper, unverified. The lr (not scaled with it), weight
    # decay, warm-up and clipping are big_vision's, as the paper's are unknown.
    run.lr_origin = "--lr" if run.lr else "the recipe's at any batch size"
    recipe = {"batch_size": batch_size, "lr": 1e-3, "weight_decay": 0.01, "epochs": 1}
    recipe |= {"warmup": 0.05 if run.toy else 0.03, "caption_key": "caption"}
    return recipe | {"cache_features": False, "min_crop": LIT_CROP, "val_crop": 1.0}


def settle_text_tower(run):
    """Set run.tokenizer and run.context, and what config and weights have of the texts."""
    known = run.config.get("text", {})  # where --init is a pair of towers already
    if run.text_init:
        if known:
            raise ValueError(f"{run.init} has a text tower: leave --text-init out")
        text_weights, known = read_text_weights(run.text_init)
        run.fingerprint += f", text {fingerprint(text_weights)}"
        weights, grid = run.weights
        run.weights = weights | {f"text.{n}": t for n, t in text_weights.items()}, grid
    size, shared_width = PAIRS.get(run.config["size"], PAIRS["L"])
    size = run.text_size or known.get("size", size)
    if size != known.get("size", size):
        raise ValueError(f"--text-size {size}: the weights are of size {known['size']}")
    run.tokenizer_file, run.tokenizer = run.tokenizer, tokenizer_for(run.tokenizer, known)
    text = {"size": size, "vocabulary": run.tokenizer.vocabulary}
    text["context"] = 40 if size == "toy" else 100  # toy: the first object of a caption
    text |= known | {"tokenizer": run.tokenizer.identity}
    text["context"] = run.context = run.context or text["context"]
    most = text.get("positions", 514) - 4  # begin, end, and positions start at 2
    if run.context > most:
        raise ValueError(f"--context {run.context} is over {most}")
    shared_width = run.config.get("shared_width", run.shared_width or shared_width)
    if run.shared_width not in (None, shared_width):
        raise ValueError(f"--shared-width: that of {run.init} is {shared_width}")
    run.config |= {"text": text, "shared_width": shared_width}


def main(run, finetune):
    options = {"workers": run.workers, "device": run.device, "max_bad": run.max_bad}
    bound = partial(extract, centre=run.val_crop, **options)
    with torch.device("meta"):
        model = TwoTowers(pool=run.pool, **run.config)
    model = finetune.load_init(run, model)
    for name, parameter in model.named_parameters():
        trained = name.startswith(("text", "image_projection", "logit_scale"))
        parameter.requires_grad_(trained)
    config, run.features = model.config, None
    make = partial(make_pair, tokenizer=run.tokenizer, context=run.context)
    flops = plan.block_flops(model.text.width, run.mean_tokens)
    flops *= 3 * len(model.text.blocks)
    if run.cache_features:  # for a run that will not be refused
        find_checkpoint(run.out, run.resume, run.identity | {"steps": run.steps})
        run.features = cached_features(run, model.to(run.device), bound)
    else:
        shape = {"size": run.image_size, "channels": config["channels"]}
        make = partial(make, min_crop=run.min_crop, flip=not run.no_flip, **shape)
        flops += plan.flops_per_image(model)
    run.micro_batch = run.micro_batch or largest_micro_batch(run, model)

    def optimizer(model):
        adam = finetune.adamw(models.parameter_groups(model, run.weight_decay), run)
        # As CLIP does. Right after a step, FSDP's weights are the ones that stay.
        clamp = lambda *_: model.logit_scale.detach().clamp_(max=math.log(100))
        adam.register_step_post_hook(clamp)
        return adam

    def measure(model):
        model.eval()
        found = retrieval(model, run.val, run.tokenizer, bound)
        model.train()
        return found

    more = {"measure": measure, "methods": ("features",), "clip": 1.0, "target": "caption"}
    more["shown"] = {"text_recall_at_1": "text recall@1 {:.1%}"}
    more["shown"] |= {"image_recall_at_1": "picture recall@1 {:.1%}"}
    if not finetune.train(run, model, optimizer, make, flops, learn_pairs, **more):
        return
    result, weights = measure(model), models.full_state(model)  # every process takes part
    run.say(recall_table(result))
    typed = {"tokenizer": run.tokenizer_file}
    if run.val.classes:
        return finetune.finish(run, weights, config, result, "zeroshot", typed)
    typed["caption_key"] = run.caption_key
    finetune.finish(run, weights, config, result, "retrieval", typed)


def largest_micro_batch(run, model):
    """The largest even micro-batch that divides a process's part of a batch and fits in
    memory. A token keeps as much for backward as in support/plan.py."""
    run, share = copy.copy(run), run.batch_size // run.processes
    run.shard_group = plan.settle_sharding(model, run)
    element = 2 if run.precision == "bf16" else 4
    per_text = 16 * element * len(model.text.blocks) * model.text.width * (run.context + 2)
    room = plan.memory_budget(model, run)
    room -= plan.training_memory(model, run, 0)["peak"]
    most = min(plan.fitting_batch(model, share, run), room / per_text)
    fitting = (n for n in range(2, share + 1, 2) if share % n == 0 and n <= most)
    return max(fitting, default=2)


def cached_features(run, model, extract):
    """(n, D) features of the centres of train's pictures, nan where unreadable."""
    encoder = encoder_config(run.config)  # --heads change it, and no tensor
    settings = encoder, run.val_crop, run.pool, run.max_pixels
    facts = run.train.identity, run.fingerprint, *settings
    path = run.out / f"features-{data.stable_hash(str(facts)).hex()}.npy"
    found = path.exists()
    barrier()  # all have looked before the first one writes
    if not found:
        x, _, rows = extract({"": model.features}, run.train, model.config)
        table = torch.full((int(run.train.sizes.sum()), model.width), torch.nan)
        table[rows] = x[""]
        if run.process == 0:
            run.out.mkdir(parents=True, exist_ok=True)
            np.save(f"{path}.tmp.npy", table.numpy())
            os.replace(f"{path}.tmp.npy", path)
            run.say(f"wrote {path}: features of {len(rows)} pictures")
        barrier()
    return torch.from_numpy(np.load(path, mmap_mode="c"))
