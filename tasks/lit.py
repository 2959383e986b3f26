"""Pictures and texts: a text tower learns to meet the frozen encoder (LiT, arXiv 2111.07991), and
classes are recognised by their names (zero-shot)."""

import copy
import hashlib
import itertools
import json
import math
import os
import re
from collections import Counter
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

import data
import kernels
import model as models
from data import one_line, read_all
from evaluate import best_five, extract
from model import Block, ViT, initialize, pool, triple
from support import launch
from support.checkpoints import barrier, find_checkpoint, last_line
from support.formats import infer_shape, name_of, read_file
from support.labels import names_of_list, say_same_names, texts_in
from support.plan import (
    block_flops,
    fitting_batch,
    flops_per_image,
    memory_budget,
    settle_sharding,
    training_memory,
)

# ----------------------------------------------------------------------------------------- captions


def all_captions(source):
    """The captions of each sample of a source, as they are: a list of lists of texts."""
    return list(read_all(source, "caption", lambda sample: sample["captions"](), []))


def captions_in(members, key):
    """From .json (a text or a list of texts under `key`) or, where that has none, .txt. Raises
    ValueError if it is damaged."""
    try:
        content = json.loads(members.get("json", b"{}"))
        texts = texts_in(content.get(key) if isinstance(content, dict) else None)
    except ValueError as error:
        raise ValueError(f"the file of its captions is damaged ({error})") from None
    text = members.get("txt", b"").decode("utf-8-sig", "replace").strip()
    return texts if any(map(clean, texts)) else [text] * bool(text)


# ----------------------------------------------------------------------------------- text to tokens


BOS, PAD, EOS, UNKNOWN = range(4)


def clean(text):
    """A caption without # signs (the paper strips them and sanitises: recalled), and with single
    spaces for white space and control characters. (Joiners stay: emoji and scripts need them.)"""
    return re.sub(r"[#\uff03\s\x00-\x1f\x7f-\x9f]+", " ", text).strip()


class Tokenizer:
    """Texts -> ids. A subclass has ids(text), a list; vocabulary, how many ids there are; and
    identity, a text that says which one it is."""

    def __call__(self, texts, context):
        """A list of n texts -> (n, T) int64: BOS, at most `context` tokens, EOS, and PAD.

        T is the longest row's length, up to a multiple of 8 or context + 2: few shapes occur.
        """
        rows = [[BOS, *self.ids(text)[:context], EOS] for text in texts]
        width = min(-(-max(map(len, rows)) // 8) * 8, context + 2)
        return torch.tensor([row + [PAD] * (width - len(row)) for row in rows])


class ByteTokenizer(Tokenizer):
    """The bytes of UTF-8: for any language, without a file. Byte b is 4 + b."""

    vocabulary, identity = 4 + 256, "bytes of UTF-8"

    def ids(self, text):
        return [4 + byte for byte in text.encode(errors="replace")]  # lone surrogates: ?


class SentencePieceTokenizer(Tokenizer):
    """XLM-R's, of its file sentencepiece.bpe.model, or another one that was trained likewise.

    The file numbers <unk> 0, <s> 1, </s> 2 and then pieces; fairseq (and XLM-R's embeddings) <s> 0,
    <pad> 1, </s> 2, <unk> 3, the same pieces, each one higher, and <mask>: 250,002 in all.
    """

    def __init__(self, path):
        try:
            import sentencepiece
        except ImportError:
            raise ValueError(f"{path} wants another package: pip install sentencepiece") from None
        self.model = sentencepiece.SentencePieceProcessor()
        try:
            content = Path(path).read_bytes()
            self.model.LoadFromSerializedProto(content)
            if [self.model.unk_id(), self.model.bos_id(), self.model.eos_id()] != [0, 1, 2]:
                raise ValueError("<unk>, <s> and </s> are not its first three, as in XLM-R's")
        except (OSError, RuntimeError, ValueError) as error:
            raise ValueError(f"{path} is no tokenizer of XLM-R's: {one_line(error)}") from None
        self.vocabulary = self.model.vocab_size() + 2
        self.identity = f"sentencepiece {hashlib.sha256(content).hexdigest()[:16]}"

    def ids(self, text):
        text = text.encode(errors="replace").decode()  # lone surrogates: ?
        return [id + 1 if id else UNKNOWN for id in self.model.encode(text)]


def open_tokenizer(path):
    """XLM-R's from a file or, without one, of bytes. Raises ValueError, one line."""
    return SentencePieceTokenizer(path) if path else ByteTokenizer()


# (width, layers, heads) of text towers: XLM-R's Base and Large (arXiv 1911.02116); toy is ours.
TEXT_SIZES = {"toy": (128, 3, 4), "XLMR-B": (768, 12, 12), "XLMR-L": (1024, 24, 16)}


# image size: (text size, width of the space that both are projected to), as released (maws
# repository); others get L's.
PAIRS = {"toy": ("toy", 128), "B": ("XLMR-B", 768), "L": ("XLMR-L", 1024)}


PAIRS |= {"H": ("XLMR-L", 1024), "2B": ("XLMR-L", 2048)}


PADDING = 1  # the token that fills up a text (fairseq's, and so XLM-R's)


# ----------------------------------------------------------------------------------- the two towers


class TextBlock(Block):
    """Post-norm transformer block, as XLM-R's: the sums are normalised, not what goes in."""

    one_length = False

    def forward(self, x, mask, queries=None):
        """x (B, T, D); mask (B, 1, 1, T), True where there is a token -> the first `queries`."""
        q, k, v = kernels.split_heads(self.attn.qkv(x), self.attn.heads)
        branch = F.scaled_dot_product_attention(q[:, :, :queries], k, v, attn_mask=mask)
        x = self.norm1(x[:, :queries] + self.attn.proj(branch.transpose(1, 2).flatten(2)))
        return self.norm2(x + self.mlp(x))


class TextTower(nn.Module):
    """XLM-R's encoder (RoBERTa's): learned positions, post-norm blocks, the first token's state.

    size        a name in TEXT_SIZES or "WIDTHxLAYERSxHEADS"
    vocabulary  number of token ids
    positions   rows of the position table: two more than the longest text has tokens
    norm_eps    of every LayerNorm (fairseq's)
    """

    def __init__(self, size, vocabulary, positions=514, norm_eps=1e-5):
        super().__init__()
        width, layers, heads = TEXT_SIZES.get(size) or triple(size, f"one of {[*TEXT_SIZES]}")
        self.width = width
        self.token_embedding = nn.Embedding(vocabulary, width)
        self.position_embedding = nn.Embedding(positions, width)
        self.embedding_norm = nn.LayerNorm(width, norm_eps)
        self.blocks = nn.ModuleList(TextBlock(width, heads, norm_eps) for _ in range(layers))

    def forward(self, tokens):
        """tokens (B, T) int64, filled up with PADDING -> (B, D)."""
        mask = tokens != PADDING
        # Positions are counted from the padding's id on; padding has that itself (fairseq).
        positions = mask.cumsum(dim=1) * mask + PADDING
        x = self.token_embedding(tokens) + self.position_embedding(positions)  # (B, T, D)
        x, mask = self.embedding_norm(x), mask[:, None, None]
        for block in self.blocks[:-1]:
            x = block(x, mask)
        return self.blocks[-1](x, mask, 1)[:, 0]  # nobody looks at the other tokens' last state


class TwoTowers(ViT):
    """An encoder of pictures beside one of texts, both projected into one space (CLIP, LiT).

    text          arguments of the TextTower; also "context", how many tokens a text may have
                  beside its begin and end, and "tokenizer", which one it was trained with
    shared_width  of that space (paper's repository: PAIRS)
    pool          of the picture's tokens: "cls" as released, or "mean"
    other arguments: see ViT
    """

    large = ("text.token_embedding",)

    def __init__(self, size="B", text=None, shared_width=768, pool="cls", **encoder_arguments):
        super().__init__(size, **encoder_arguments)
        text = {"size": "XLMR-B", "vocabulary": 250_002, "context": 100, **(text or {})}
        self.config |= {"text": text, "shared_width": shared_width, "pool": pool}
        built_from = ("size", "vocabulary", "positions", "norm_eps")
        self.text = TextTower(**{name: text[name] for name in built_from if name in text})
        self.image_projection = nn.Parameter(torch.empty(self.width, shared_width))
        self.text_projection = nn.Parameter(torch.empty(self.text.width, shared_width))
        self.logit_scale = nn.Parameter(torch.empty(1))  # the logarithm of what multiplies cosines
        initialize(self)

    def features(self, images):
        """(B, C, H, W) normalised -> (B, D), the picture's part that LiT keeps as it is."""
        return pool(super().forward(images), self.config["pool"])

    def forward(self, features=None, tokens=None):
        """Embeddings of unit length and the scale of the logits: (B, shared_width) of features
        (B, D), the same of texts, (B, T) int64 tokens, and (1,): fp32. What is not given is None.
        """
        if features is not None:  # cached ones are fp32 wherever the weights compute in bf16
            features = features.to(self.image_projection.dtype) @ self.image_projection
            features = F.normalize(features.float(), dim=1)
        if tokens is not None:
            tokens = F.normalize((self.text(tokens) @ self.text_projection).float(), dim=1)
        return features, tokens, self.logit_scale.float().exp()


class Contrastive(torch.autograd.Function):
    """See contrastive_loss. The gradient comes with the loss, some rows of logits at a time."""

    ROWS = 512  # of logits that are in memory together

    @staticmethod
    def forward(ctx, images, texts, scale, weight):
        rank, b, tables = 0, len(images), (images, texts, weight)
        if dist.is_initialized():
            rank, processes = dist.get_rank(), dist.get_world_size()
            tables = [t.new_empty(processes * b, *t.shape[1:]) for t in (images, texts, weight)]
            for table, part in zip(tables, (images, texts, weight)):
                dist.all_gather_into_tensor(table, part.contiguous())
        kept = tables[2] > 0  # of the global batch: the others neither ask nor are an answer
        images, texts = tables[0][kept], tables[1][kept]  # (n, S) each
        n, first, own = len(images), int(kept[: rank * b].sum()), weight > 0
        parts = torch.arange(first, first + int(own.sum()), device=kept.device).split(
            Contrastive.ROWS
        )

        # Twice over this process's rows of the matrix: the first time for the sums of both
        # softmaxes, along the rows and, with all processes, along the columns.
        rows, columns = [], images.new_full((n,), -math.inf)
        for part in parts:
            logits = scale * images[part] @ texts.T  # (ROWS, n)
            rows.append(logits.logsumexp(dim=1))
            columns = torch.logaddexp(columns, logits.logsumexp(dim=0))
        if dist.is_initialized():
            every = columns.new_empty(processes * n)
            dist.all_gather_into_tensor(every, columns)
            columns = every.view(processes, n).logsumexp(dim=0)
        sums, for_images, for_texts = images.new_zeros(2), [], torch.zeros_like(texts)
        for part, row in zip(parts, rows):
            cosines = images[part] @ texts.T
            logits, pairs = scale * cosines, (torch.arange(len(part), device=part.device), part)
            gradient = (logits - row[:, None]).exp() + (logits - columns).exp()  # of the logits
            gradient[pairs] -= 2
            losses = row + columns[part] - 2 * logits[pairs]
            sums += torch.stack([losses.sum(), (gradient * cosines).sum()])
            for_images.append(scale * gradient @ texts)
            for_texts.addmm_(gradient.T, images[part])
        loss = sums[:1].clone()
        if dist.is_initialized():
            dist.all_reduce(loss)
            dist.all_reduce(for_texts)
        gradients = tables[0].new_zeros(2, b, texts.shape[1])
        if for_images:
            gradients[0, own] = torch.cat(for_images)
            gradients[1, own] = scale * for_texts[first : first + int(own.sum())]
        ctx.save_for_backward(gradients / (2 * max(n, 1)), sums[1:] / (2 * max(n, 1)))
        return loss[0] / (2 * max(n, 1))

    @staticmethod
    def backward(ctx, grad):
        (for_images, for_texts), for_scale = ctx.saved_tensors
        return grad * for_images, grad * for_texts, grad * for_scale, None


def contrastive_loss(images, texts, scale, weight):
    """How well each picture finds its text and each text its picture among all of the global batch.

    images, texts (b, S) of unit length, this process's pairs, the same number on each; scale (1,)
    multiplies their cosines; weight (b,): pairs of weight 0 do not exist. The mean of two softmax
    cross-entropies over all processes' pairs (CLIP, arXiv 2103.00020), the same on each. Gradients
    are exact: of this process's embeddings, and of scale its part, to be summed over processes.
    """
    dtype = torch.promote_types(images.dtype, torch.float32)
    return Contrastive.apply(images.to(dtype), texts.to(dtype), scale.to(dtype), weight)


# ------------------------------------------------------------------------------------------ weights


def read_text_weights(path, heads=None):
    """(state, arguments) of the TextTower in a file: XLM-R's, or that of a pair. See read_weights.

    Raises ValueError, one line, when it holds none, or not all of one.
    """
    path, style, state, config = read_file(path, flag=None)
    state = {n.removeprefix("text."): t for n, t in state.items() if n.startswith("text.")}
    wanted = ("size", "vocabulary", "positions", "norm_eps")
    try:
        if not state:
            raise ValueError("no text tower is among them")
        if style == "our own":
            config = {key: config["text"][key] for key in wanted if key in config["text"]}
        else:
            config = infer_text_config(state, heads, config)
        with torch.device("meta"):
            wanted = TextTower(**config).state_dict()
        if misfits := [n for n in wanted if n not in state or state[n].shape != wanted[n].shape]:
            raise ValueError(f"{', '.join(misfits[:3])} are missing or of another shape")
    except (TypeError, ValueError, LookupError, AttributeError, RuntimeError) as error:
        raise ValueError(f"the weights in {path} cannot be used: {last_line(error):.300}") from None
    return state, config


def infer_text_config(state, heads=None, published=None):
    """The arguments of a TextTower with these tensors: see infer_config."""
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


# Sentences that a class's name is put into (ours).
TEMPLATES = (
    "{}",
    "a {}",
    "the {}",
    "a photo of a {}.",
    "a picture of one {}.",
    "an image of the {}.",
)


# ---------------------------------------------------------------------------------------- measuring


def tokenizer_for(path, text):
    """The tokenizer of a file (None: bytes) for a text tower with this config ({}: a new one)."""
    tokenizer = open_tokenizer(path)
    known, size = text.get("tokenizer"), text.get("vocabulary", tokenizer.vocabulary)
    if known not in (None, tokenizer.identity) or size != tokenizer.vocabulary:
        why = f"the text tower knows {size} tokens{f' of {known}' if known else ''}"
        found = f"{tokenizer.identity} has {tokenizer.vocabulary}"
        raise ValueError(f"{why}, {found}: give its sentencepiece file as --tokenizer")
    return tokenizer


@torch.inference_mode()
def embed_texts(model, texts, tokenizer, device):
    """models.TwoTowers' embeddings (n, S) float32 of a list of texts, on the CPU."""
    context, found = model.config["text"]["context"], []
    for start in range(0, len(texts), 256):
        tokens = tokenizer(texts[start : start + 256], context).to(device)
        found.append(model(tokens=tokens)[1].float().cpu())
    return torch.cat(found)


def retrieval(model, source, tokenizer, **options):
    """{"text_recall_at_1": share of the pictures of which a caption is the most similar one of all
    captions, ..., "image_recall_at_1": share of the captions that find a picture of theirs, ...}.

    Equal captions are one text, which several pictures may answer. Pictures without any are left
    out. options: see extract. Exact, up to ties, which count as wrong.
    """
    function = lambda images: model(model.features(images))[0]
    images, _, numbers = extract({"": function}, source, model.config, **options)
    captions, texts, pairs = all_captions(source), {}, []
    for row, number in enumerate(numbers.tolist()):
        for caption in filter(None, map(clean, captions[number])):
            pairs.append((row, texts.setdefault(caption, len(texts))))
    if not pairs:
        want = "want .txt or .json (--caption-key) in shards, or --labels (path,caption)"
        raise ValueError(f"no captions in {source.identity}: {want}")
    rows, answers = torch.tensor(pairs).unbind(dim=1)
    kept, rows = rows.unique(return_inverse=True)
    images = images[""][kept]
    found = embed_texts(model, [*texts], tokenizer, options.get("device", "cpu"))
    ranks = {"text": ranks_of(images, found, rows, answers)}
    ranks["image"] = ranks_of(found, images, answers, rows)
    return {
        f"{what}_recall_at_{k}": (rank < k).double().mean().item()
        for what, rank in ranks.items()
        for k in (1, 5, 10)
    } | {"images": len(images), "texts": len(texts)}


def ranks_of(asked, offered, rows, answers):
    """How many wrong answers are at least as similar as the best right one: (n,) for asked (n, S).

    offered (m, S); (rows[i], answers[i]) are the right pairs.
    """
    ranks = torch.zeros(len(asked), dtype=torch.int64)
    for part in torch.arange(len(asked)).split(1024):  # bounds the memory, changes nothing
        similarity, mine = asked[part] @ offered.T, (rows >= part[0]) & (rows <= part[-1])
        right = rows[mine] - part[0], answers[mine]
        best = torch.full((len(part),), -torch.inf)
        best.scatter_reduce_(0, right[0], similarity[right], "amax")
        similarity[right] = -torch.inf
        ranks[part] = (similarity > best[:, None] - 1e-6).sum(dim=1)  # rounding makes no winner
    return ranks


def class_embeddings(model, names, templates, tokenizer, device):
    """(classes, S): of each class the normalised mean of all its names in all the templates.

    names: a list of synonyms for each class (maws repository, eval_zeroshot.py).
    """
    prompts = ((i, t, name) for i, some in enumerate(names) for name in some for t in templates)
    classes, texts = zip(*((i, template.replace("{}", name)) for i, template, name in prompts))
    found = embed_texts(model, texts, tokenizer, device)
    sums = torch.zeros(len(names), found.shape[1]).index_add_(0, torch.tensor(classes), found)
    return F.normalize(sums, dim=1)


def read_lines(path, what):
    """The lines of a text file. ValueError where one is blank."""
    try:
        lines = [line.strip() for line in Path(path).read_text("utf-8-sig").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"cannot read {what} from {path}: {error}") from None
    if "" in lines:
        where = f"line {lines.index('') + 1} is blank"
        raise ValueError(f"{path}: {where}: want one of the {what} in each")
    if not lines:
        raise ValueError(f"{path} is empty: want {what}, one in each line")
    return lines


def read_class_names(path, classes):
    """For each class of the data its names: a list of lists.

    path     a file with a line for each class, in their order: names separated by commas; or, after
             the class (what the data calls it) and a tab, in any order. None: the data's names
    classes  the data's, or None where it only numbers them

    A list without tabs may have more lines than the data has classes: see names_of_list. Classes
    that share their names cannot be told apart: they are counted, and said.
    """
    if not path:
        if not classes:
            raise ValueError("the data does not name its classes: give --classnames")
        lines = [name.replace("_", " ").replace("-", " ") for name in classes]
        return say_same_names("the data", [[line] for line in lines])
    lines, keyed = read_lines(path, "class names"), None
    tabs = ["\t" in line for line in lines]
    if any(tabs) and not all(tabs):
        raise ValueError(f"{path}: line {tabs.index(False) + 1} has no tab, others have one")
    if all(tabs):
        keyed = dict(line.split("\t", 1) for line in lines)
        if len(keyed) < len(lines):
            again = Counter(line.split("\t")[0] for line in lines).most_common(1)[0][0]
            raise ValueError(f"{path} names {again} twice")
        classes = classes or [str(i) for i in range(len(keyed))]
    elif classes and len(lines) != len(classes):
        order = names_of_list(len(lines), classes)
        if not order:
            why = f"{path} has {len(lines)} lines, the data {len(classes)} classes"
            raise ValueError(f"{why}: begin each line with the class's name in the data, and a tab")
        keyed = dict(zip(order, lines))
    elif classes and all(map(str.isdecimal, classes)):
        # Shards that were packed when numbers were sorted as texts list them in that order.
        keyed = dict(zip(data.sort_classes(classes), lines))
    if keyed:
        if missing := [name for name in classes if name not in keyed]:
            raise ValueError(f"{path} has no names for {', '.join(missing[:3])} ({len(missing)})")
        lines = [keyed[name] for name in classes]
    names = [[name.strip() for name in line.split(",") if name.strip()] for line in lines]
    if [] in names:
        raise ValueError(f"{path}: line {names.index([]) + 1} holds no name")
    return say_same_names(path, names)


def read_templates(path):
    lines = read_lines(path, "templates") if path else TEMPLATES
    for number, line in enumerate(lines, 1):
        if "{}" not in line:
            raise ValueError(f"{path}: line {number} has no {{}} for the name of a class: {line!r}")
        if line in lines[: number - 1]:
            raise ValueError(f"{path}: line {number} repeats an earlier one: {line!r}")
    return lines


def task_zeroshot(model, sources, run):
    source, device = sources[-1], run.options["device"]
    tokenizer = tokenizer_for(run.tokenizer, model.config["text"])
    names = read_class_names(run.classnames, source.classes)
    templates, count = read_templates(run.templates), sum(map(len, names))
    print(f"{len(names)} classes, {count} names, {len(templates)} templates, {tokenizer.identity}")
    classes = class_embeddings(model, names, templates, tokenizer, device).to(device)
    function = lambda images: best_five(model(model.features(images))[0] @ classes.T)
    run.options["centre"] = run.val_crop
    found, labels, _ = extract({"": function}, source, model.config, **run.options)
    known = labels >= 0
    if (labels >= len(names)).any():
        raise ValueError(f"there is a label {int(labels.max())}, and names of {len(names)} classes")
    if not known.any():
        raise ValueError(f"no labels in {source.identity}: want class folders or .cls files")
    if not known.all():
        print(f"{int((~known).sum())} pictures without a label are left out")
    hits = found[""][known][:, :-1].long() == labels[known, None]
    top1, top5 = hits[:, 0].double().mean().item(), hits.any(dim=1).double().mean().item()
    measured, chance = f"top-1 {top1:.2%}, top-5 {top5:.2%}", f"(chance {1 / len(names):.2%})"
    print(f"zero-shot {measured} on {len(hits)} pictures {chance}")
    return {"top1": top1, "top5": top5, "pictures": len(hits), "classes": len(names)}


def task_retrieval(model, sources, run):
    tokenizer = tokenizer_for(run.tokenizer, model.config["text"])
    found = retrieval(model, sources[-1], tokenizer, centre=run.val_crop, **run.options)
    print(recall_table(found))
    return found


def recall_table(found):
    """What retrieval found, in lines to read."""
    images, texts = found["images"], found["texts"]
    table = f"{images} pictures, {texts} different captions".ljust(45)
    table += "recall at 1       5      10"
    rows = {
        "a caption of a picture": [found[f"text_recall_at_{k}"] for k in (1, 5, 10)],
        "a picture of a caption": [found[f"image_recall_at_{k}"] for k in (1, 5, 10)],
        "(chance, about)": [min(1, k / max(images, texts)) for k in (1, 5, 10)],
    }
    for title, shares in rows.items():
        table += f"\n  {title:47}" + " ".join(f"{share:7.2%}" for share in shares)
    return table


LIT_CROP = 0.9  # least area: captions speak of the whole picture (borrowed of open_clip)


# Of lit, batch size (recalled of the paper, unsure), then what is borrowed of big_vision's LiT, as
# the paper's is unknown: lr (not scaled with the batch), weight decay, warm-up, gradient clipping.
LIT = (32_768, 1e-3, 0.01, 0.03, 1.0)


# ----------------------------------------------------------------------------------------- training


def make_pair(sample, key, tokenizer, context, size=None, channels=3, min_crop=None):
    """A row of a batch: tokens (T,) int64 of one of the captions, filled up with PADDING to a
    multiple of 8 or context + 2: few shapes occur; images (C, H, W) uint8, if a size is given.

    Captions are cleaned, and one is drawn. The weight is 0 if there is none. See
    data.make_picture for the other arguments.
    """
    captions = sample["captions"]() if sample else []
    texts = [text for text in map(clean, captions) if text] or [""]
    chosen = int(data.random_bits(1, *key, data.CAPTION)[0] % len(texts))
    text = texts[chosen]
    row = {"tokens": tokenizer([text], context)[0], "weight": torch.tensor(float(text != ""))}
    if size:
        row["images"] = data.make_picture(sample, key, size, channels, min_crop)
    return row


def learn_pairs(run, model, micro_batches, totals):
    """A step on pairs of picture and caption: see train. Exact however the batch is cut in pieces.

    Of several micro-batches, first only the embeddings are computed. The loss of the whole batch says how
    each should move, and with that each piece is computed again, now with its gradient (GradCache,
    arXiv 2101.06983). Pictures are seen once: their tower is frozen.
    """
    kept = []
    towers = getattr(model, "module", model)  # DistributedDataParallel hands on forward alone
    for batch in micro_batches:
        totals.unreadable += batch["bad"]
        weight = batch["weight"]
        if run.features is None:
            with torch.no_grad():
                features = towers.features(data.normalize(batch["images"])).float()
        else:
            features = run.features[batch["samples"].cpu()].to(run.device)
            weight = weight * features.isfinite().all(dim=1)  # those of unreadable pictures are nan
            features = features.nan_to_num()
        tokens = batch["tokens"].masked_fill(batch["tokens"] < 0, PADDING)  # see data.stack
        kept.append((features, tokens, weight))
    with torch.set_grad_enabled(len(kept) == 1):
        found = [model(features, tokens) for features, tokens, _ in kept]
    images, texts, scales = ([x.detach() for x in parts] for parts in zip(*found))
    leaves = [x.requires_grad_() for x in (torch.cat(images), torch.cat(texts), scales[0])]
    weight = torch.cat([weight for *_, weight in kept])
    loss = contrastive_loss(*leaves, weight)
    (loss * run.processes).backward()  # gradients are averaged over the processes
    sizes = [len(weight) for *_, weight in kept]
    gradients = zip(*(leaf.grad.split(sizes) for leaf in leaves[:2]))
    for i, gradient in enumerate(gradients):
        if len(kept) > 1:
            with models.sync_gradients(model, last=i == len(kept) - 1):
                found[i] = model(*kept[i][:2])
                torch.autograd.backward(found[i], (*gradient, leaves[2].grad / len(kept)))
        else:
            torch.autograd.backward(found[i], (*gradient, leaves[2].grad))
    # The loss is the batch's mean already.
    part = run.batch_size / run.processes
    totals.add(loss.detach() / run.processes, part, unknown=(weight == 0).sum())


# ----------------------------------------------------------------------------------- stage 3's task

CONFIG = ("text", "shared_width")
SAME = ("lr", "weight_decay", "cache_features", "caption_key")


def add_flags(groups):
    """Add the flags of stage 3's task."""
    launch.add_label_flags(groups)
    launch.add_resume_flags(groups)
    add = groups["data"].add_argument
    add("--caption-key", default="caption", help="of the captions in .json (caption)")
    add("--cache-features", action="store_true", help="of pictures' centres, computed once")
    add = groups["model"].add_argument
    add("--text-size", help=f"{' '.join(TEXT_SIZES)}, or WIDTHxLAYERSxHEADS (by size)")
    add("--text-init", help="XLM-R's weights for the text tower to start from")
    add("--tokenizer", help="XLM-R's sentencepiece file (without: bytes)")
    add("--context", type=launch.count, help="tokens that a caption may have (100; toy: 40)")
    add("--shared-width", type=launch.count, help="of the space for both (by size)")
    add = groups["optimisation"].add_argument
    add("--lr", type=launch.positive, help="peak (1e-3)")
    add("--weight-decay", type=launch.not_negative, help="not of 1-D parameters (0.01)")


def prepare(run):
    """The tokenizer, the text tower, and the pairs that are held out."""
    if not run.weights:
        raise ValueError("--task lit wants --init: the encoder is frozen, it must have learned")
    run.pool, run.classes = run.pool or run.pool_of_init, 0
    run.train, run.val = data.hold_out(run.train, run.val, 1000, share=0.1)
    if not run.val.sizes.any():
        raise ValueError(f"{run.train.identity} is too small: a tenth of it is held out")
    if not any(map(clean, itertools.chain(*all_captions(run.val)))):
        want = f"want .txt or .json with {run.caption_key!r} in shards, or --labels (path,caption)"
        raise ValueError(f"no captions in {run.val.identity}: {want}")
    known = run.config.get("text", {})  # where --init is a pair of towers already
    if known and run.text_init:
        raise ValueError(f"{run.init} has a text tower: leave --text-init out")
    run.text_weights = None
    if run.text_init:
        run.text_weights, known = read_text_weights(run.text_init)
        run.origin += f", text {models.fingerprint(run.text_weights)}"
    if known and run.text_size not in (None, known["size"]):
        raise ValueError(f"--text-size {run.text_size}: the weights are of size {known['size']}")
    run.tokenizer_file = run.tokenizer
    run.tokenizer = tokenizer_for(run.tokenizer_file, known)
    size, shared_width = PAIRS.get(run.config["size"], PAIRS["L"])
    text = {"size": run.text_size or size, "vocabulary": run.tokenizer.vocabulary}
    text["context"] = 40 if text["size"] == "toy" else 100  # toy: the first object of a caption
    text |= known | {"tokenizer": run.tokenizer.identity}
    text["context"] = run.context = run.context or text["context"]
    if run.context > text.get("positions", 514) - 4:  # begin, end, and positions start at 2
        raise ValueError(f"--context {run.context} is over {text.get('positions', 514) - 4}")
    run.config |= {"text": text, "shared_width": run.config.get("shared_width", shared_width)}
    if run.shared_width not in (None, run.config["shared_width"]) and known.get("context"):
        raise ValueError(f"--shared-width: that of {run.init} is {run.config['shared_width']}")
    run.config["shared_width"] = run.shared_width or run.config["shared_width"]
    batch_size, lr, weight_decay, warmup, _ = LIT
    # Of less data, a smaller one: a pair must not meet itself in a batch.
    pairs = int(run.train.sizes.sum())
    batch_size = 256 if run.toy else min(batch_size, 2 ** max(1, (pairs // 8).bit_length()))
    if (run.batch_size or 0) > pairs:
        raise ValueError(f"--batch-size {run.batch_size}: the data has {pairs} pairs")
    recipe = {"batch_size": batch_size, "lr": lr, "weight_decay": weight_decay, "epochs": 1}
    recipe["warmup"] = max(warmup, 0.05) if run.toy else warmup
    return recipe | {"min_crop": LIT_CROP, "val_crop": 1.0}


def main(run, stage):
    with torch.device("meta"):
        model = TwoTowers(pool=run.pool, **run.config)
    model = model.to_empty(device="cpu")
    models.initialize(model, run.seed)
    run.say(models.load_weights(model, *run.weights))
    if run.text_weights:
        model.text.load_state_dict(run.text_weights)
        run.say(f"text tower: {len(run.text_weights)} tensors loaded from {run.text_init}")
    config, tokenizer = model.config, run.tokenizer
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith(("text", "image_projection", "logit_scale")))
    run.features = None
    if run.cache_features:  # for a run that will not be refused
        find_checkpoint(run.out, run.resume, run.identity | {"steps": run.steps})
        run.features = cached_features(run, model.to(run.device), stage.extract)

    def optimizer(model):
        adam = stage.adamw(models.parameter_groups(model, run.weight_decay), run)

        @torch.no_grad()
        def clamp(*_):  # as CLIP's; right after a step FSDP's weights are the ones that stay
            model.logit_scale.clamp_(max=math.log(100))

        adam.register_step_post_hook(clamp)
        return adam

    def measure(model):
        options = {"workers": run.workers, "device": run.device, "max_bad": run.max_bad}
        model.eval()
        found = retrieval(model, run.val, tokenizer, centre=run.val_crop, **options)
        model.train()
        return found

    # What a text's blocks keep for its backward, as a picture's do: see models.training_memory.
    settled = copy.copy(run)
    settled.shard_group = settle_sharding(model, run)
    length, share = run.context + 2, run.batch_size // run.processes
    each = 16 * (2 if run.precision == "bf16" else 4) * len(model.text.blocks) * model.text.width
    room = memory_budget(model, settled)
    room -= training_memory(model, settled, 0, False)["peak"]
    most = min(fitting_batch(model, share, settled), room / (each * length))
    fitting = (n for n in range(2, share + 1, 2) if share % n == 0 and n <= most)
    run.micro_batch = run.micro_batch or max(fitting, default=2)
    some = data.Subset(run.train, range(min(256, int(run.train.sizes.sum()))))
    some = [captions[0] if captions else "" for captions in all_captions(some)]
    some = tokenizer(some, run.context)
    length = (some != PADDING).sum().item() / max(1, len(some))
    flops = 3 * len(model.text.blocks) * block_flops(model.text.width, length)
    flops += 0 if run.cache_features else flops_per_image(model)
    shown = {"size": run.image_size, "channels": run.config["channels"], "min_crop": run.min_crop}
    make = partial(make_pair, tokenizer=tokenizer, context=run.context)
    make = partial(make, **({} if run.cache_features else shown))
    more = {"measure": measure, "methods": ("features",), "clip": LIT[4], "nothing": "caption"}
    if not stage.train(run, model, optimizer, make, flops, learn_pairs, **more):
        return
    result, weights = measure(model), models.full_state(model)  # every process takes part
    run.say(recall_table(result))
    task = "zeroshot" if run.val.classes else "retrieval"
    flags = stage.names_given(run, "tokenizer_file")
    if task == "retrieval" and run.caption_key != "caption":
        flags += ["--caption-key", run.caption_key]
    stage.finish(run, weights, config, result, task, flags)


def cached_features(run, model, extract):
    """(n, D) features of the centres of train's pictures, nan where unreadable: a file in --out."""
    encoder = models.encoder_config(run.config)  # --heads change it, and no tensor
    facts = run.train.identity, run.origin, encoder, run.val_crop, run.pool
    facts += (run.max_pixels,) if run.max_pixels != data.MAX_PIXELS else ()
    path = run.out / f"features-{data.stable_hash(str(facts)).hex()}.npy"
    found = path.exists()
    barrier()  # all have looked before the first one writes
    if not found:
        options = {"workers": run.workers, "device": run.device, "max_bad": run.max_bad}
        options["centre"] = run.val_crop
        x, _, rows = extract({"": model.features}, run.train, model.config, **options)
        table = torch.full((int(run.train.sizes.sum()), model.width), torch.nan)
        table[rows] = x[""]
        if run.process == 0:
            run.out.mkdir(parents=True, exist_ok=True)
            np.save(f"{path}.tmp.npy", table.numpy())
            os.replace(f"{path}.tmp.npy", path)
            run.say(f"wrote {path}: features of {len(rows)} pictures")
        barrier()
    return torch.from_numpy(np.load(path, mmap_mode="c"))
