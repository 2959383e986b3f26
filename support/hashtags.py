"""Hashtags: their canonical form, the vocabulary of classes, and sampling weights.

python data.py hashtags DATA --out TAGS      vocabulary and sampling weights of a data set
"""

import hashlib
import itertools
import json
import math
import os
import re
import sys
import unicodedata
from collections import Counter
from functools import lru_cache, partial
from pathlib import Path
from zipfile import BadZipFile

import numpy as np
import torch
from tqdm import tqdm

from data import (
    HELD_OUT,
    OFFSET,
    Batches,
    Order,
    Subset,
    hold_out,
    one_line,
    random_bits,
    running_sum,
)
from support.launch import progress
from support.loader import loader
from support.toy import Toy

TAG_CHUNK = 4096  # samples whose tags a loader process reads together
# Tags counted at once. With more, the rarest are forgotten, and their counts are too low.
MOST_TAGS = 4_000_000


def hashtags_in(members):
    """The hashtags of a shard's sample, {extension: bytes}: a list of tags or a text.

    They are those of its .json (a list, a text, or either under "hashtags") or, if that
    has none, those of its .txt. Raises ValueError if the file is damaged.
    """
    try:
        content = json.loads(members.get("json", b"[]"))
        tags = content.get("hashtags") if isinstance(content, dict) else content
        if tags is None or not canonical(tags, {}):
            # img2dataset's .json describes the picture, its .txt has the tags.
            tags = members.get("txt", b"").decode()
        return tags
    except ValueError as error:
        raise ValueError(f"the file of its hashtags is damaged ({error})") from None


WEIGHT = 1 << 16  # a sampling weight of 1.0: weights are whole numbers, so that sums are exact


class WeightedOrder(Order):
    """An Order in which a sample comes as often in an epoch as its weight says, rounded up
    or down.

    Sample i owns a stretch of length weights[i] of a line of length sum(weights). The draws
    are the points on it that lie WEIGHT apart, from a random offset on that is new in each
    epoch. (This is systematic sampling.)

    Example: weights 0.5, 1 and 2 (times WEIGHT). Their stretches are 0 - 0.5, 0.5 - 1.5,
    1.5 - 3.5. The sum is 3.5, so an epoch has 3 draws, and the gap between two points is
    3.5 / 3: what is left of the sum is shared out among the first gaps. With an offset of
    0.2 the points are 0.2, 1.37 and 2.53: samples 0, 1 and 2. With 0.7: 0.7, 1.87 and 3.03,
    samples 1, 2 and 2.

    totals   (S,) int64, the sum of each shard's weights in units of 1 / WEIGHT
    weights  (first, stop) -> int64 weights of these samples in the same units
    largest  of the weights
    """

    def __init__(self, sizes, seed=0, lanes=None, *, totals, weights, largest):
        super().__init__(sizes, seed, lanes)
        self.weights, self.most = weights, math.ceil(largest / WEIGHT)
        self.ends = running_sum(np.asarray(totals, dtype=np.int64)[self.shards])  # (S + 1,)
        self.set_length(int(self.ends[-1]) // WEIGHT)

    def gaps(self, epoch):
        """(offset of the first point, the least gap, how many gaps are wider by one)."""
        gap, wider = divmod(int(self.ends[-1]), self.length)
        offset = int(random_bits(1, self.seed, epoch, 0, OFFSET)[0] % gap)
        return offset, gap, wider

    def edges_of(self, epoch):
        """(S + 1,) how many points lie before each shard's stretch."""
        offset, gap, wider = self.gaps(epoch)
        rest = self.ends - offset
        # Rounded up: of the first points, which are gap + 1 apart, or of those behind them.
        return np.maximum(-(-rest // (gap + 1)), -((wider - rest) // gap)).clip(min=0)

    def samples_at(self, epoch, places, shards):
        offset, gap, wider = self.gaps(epoch)
        points = offset + places * gap + np.minimum(places, wider) - self.ends[shards]
        samples = np.empty_like(places)
        for shard in np.unique(shards):
            first = self.first[shard]
            ends = np.cumsum(self.weights(first, first + self.sizes[shard]))
            mine = shards == shard
            samples[mine] = first + np.searchsorted(ends, points[mine], "right")
        return samples


class Vocabulary:
    """The hashtags that are classes. Their ids are their positions in `counts`.

    counts     {canonical tag: number of pictures that carry it}, the most frequent first
    synonyms   {canonical tag: the canonical tag that it counts as}
    identity   a hash of the index that it comes from
    """

    def __init__(self, counts, synonyms, identity=""):
        self.counts, self.synonyms, self.identity = counts, synonyms, identity
        self.numbers = {tag: number for number, tag in enumerate(counts)}

    def __len__(self):
        return len(self.counts)

    def prior(self):
        """The logarithm of each tag's share of all tags, (V,) float32. A count of 0 counts as 1."""
        counts = torch.tensor(list(self.counts.values()), dtype=torch.float64).clamp(min=1)
        return (counts / counts.sum()).log().float()

    def ids(self, hashtags):
        """The ids of a sample's hashtags in order, each once, without unknown ones."""
        tags = canonical(hashtags, self.synonyms)
        return sorted(self.numbers[tag] for tag in tags if tag in self.numbers)


def canonical(hashtags, synonyms):
    """The set of canonical tags in a list of tags, or in a text with #tags in it.

    Unicode's NFKC, case-folded, without # and punctuation ("#Blue-Square" becomes
    "bluesquare"), then the synonyms. Raises ValueError for anything else.
    """
    if isinstance(hashtags, str):
        text = unicodedata.normalize("NFKC", hashtags)
        hashtags = re.findall(r"#([^\s#,.;:!?()\[\]\"']+)", text)
    if not isinstance(hashtags, list) or not all(isinstance(tag, str) for tag in hashtags):
        raise ValueError(f"hashtags must be a list of texts, or a text: {hashtags!r:.80}")
    parts = (unicodedata.normalize("NFKC", part) for tag in hashtags for part in tag.split("#"))
    parts = (unicodedata.normalize("NFKC", part.casefold()) for part in parts)
    plain = {"".join(c for c in p if unicodedata.category(c)[0] not in "PZC") for p in parts}
    return {synonyms.get(tag, tag) for tag in plain - {""}}


def tags_of(sample, key, synonyms):
    """A row of data.Batches: {"tags": set of canonical tags}."""
    return {"tags": canonical(sample["hashtags"](), synonyms) if sample else set()}


def read_tags(source, synonyms, workers, title, named=20):
    """Yield the set of canonical tags of each sample, read ahead by worker processes.

    Damaged ones are counted, and the first `named` of them are named.
    """
    batches, bad = Batches(source, partial(tags_of, synonyms=synonyms), TAG_CHUNK), 0
    made = loader(batches, range(len(batches)), workers)
    for batch in progress(made, len(batches), title, " batches"):
        for text in batch["bad"][: max(0, named - bad)]:
            tqdm.write(f"unreadable hashtags: {text}", file=sys.stderr)
        bad += len(batch["bad"])
        yield from itertools.compress(batch["tags"], batch["samples"] >= 0)  # without padding
    if bad and named:
        print(f"samples with unreadable hashtags: {bad}")


def count_hashtags(source, size=28_000, min_count=5, synonyms=None, workers=0):
    """The Vocabulary of a source: at most `size` tags, each on at least `min_count` pictures.

    28,000 is the paper's number of classes. Raises ValueError if fewer than two are left.
    """
    synonyms, counts = synonyms or {}, Counter()
    for tags in read_tags(source, synonyms, workers, "counting"):
        counts.update(tags)
        if len(counts) > MOST_TAGS:
            counts = Counter(dict(counts.most_common(MOST_TAGS // 2)))
    ranked = sorted(counts.items(), key=lambda item: (-item[1], item[0]))[:size]
    ranked = {tag: count for tag, count in ranked if count >= min_count}
    if len(ranked) < 2:
        found = f"{len(ranked)} hashtags on {min_count} pictures or more among {source.identity}"
        raise ValueError(f"{found}: want two at least (of a folder, they come from --labels)")
    return Vocabulary(ranked, synonyms)


def write_hashtags(source, out, tail_below=None, workers=0, **counting):
    """Index the hashtags of a source, but for the slice that is held out, in a folder.

    rarest.npy       (samples,) int32, the id of the rarest tag of each, -1 if it has none
    totals.npy       (shards,) int64, the sum of the sampling weights of each
    vocabulary.json  the tags, their counts, and the sampling weight that each gives

    tail_below: see weights_of_tags. counting: see count_hashtags. An epoch has as many
    samples as there are pictures with a known tag. The others are never drawn.
    """
    train, held_out = hold_out(source, None, HELD_OUT)
    vocabulary = count_hashtags(train, workers=workers, **counting)
    os.makedirs(out, exist_ok=True)
    ids, counts = vocabulary.numbers, np.array(list(vocabulary.counts.values()))
    total, index = int(train.sizes.sum()), Path(out, "vocabulary.json")
    # A new file: a run that reads an earlier index goes on with that.
    rarest = np.lib.format.open_memmap(f"{out}/rarest.new.npy", "w+", np.int32, (total,))
    drawn = np.zeros(len(counts) + 1, dtype=np.int64)  # by rarest tag; the last: without tags
    samples = read_tags(train, vocabulary.synonyms, workers, "weighing", named=0)
    for number, tags in enumerate(samples):
        rarest[number] = max((ids[tag] for tag in tags & ids.keys()), default=-1)
        drawn[rarest[number]] += 1
    rarest.flush()
    drawn = drawn[:-1]
    tail_below = tail_below or min(5000, math.ceil(total / 100))
    weights = weights_of_tags(counts, drawn, tail_below)
    edges = itertools.pairwise(running_sum(train.sizes))
    totals = [int(weights[rarest[start:stop]].sum()) for start, stop in edges]
    if index.exists():
        print(f"{out} held an index already: it is replaced")
    # vocabulary.json is removed first and written last: without it, there is no index.
    index.unlink(missing_ok=True)
    os.replace(f"{out}/rarest.new.npy", f"{out}/rarest.npy")
    np.save(f"{out}/totals.npy", np.array(totals, dtype=np.int64))
    tags = [
        {"tag": tag, "id": i, "count": int(counts[i]), "weight": int(weights[i])}
        for tag, i in ids.items()
    ]
    content = {"data": train.identity, "tail_below": tail_below, "tags": tags}
    content["synonyms"] = vocabulary.synonyms
    index.write_text(json.dumps(content, ensure_ascii=False, indent=0), encoding="utf-8")
    in_tail = drawn[counts < tail_below].sum()
    numbers = f"{drawn.sum()} of {total} pictures are drawn, {in_tail} of them tail"
    print(f"{len(vocabulary)} hashtags; {numbers}; {held_out.sizes.sum()} are held out")


def weights_of_tags(counts, drawn, tail_below):
    """Sampling weights of pictures by their rarest tag: (tags + 1,) int64, in 1 / WEIGHT.

    counts  (tags,) pictures that carry each tag
    drawn   (tags,) pictures of which it is the rarest tag

    SWAG's sampler (paper: arXiv 2201.08371). The tail is the pictures with a tag that fewer
    than `tail_below` pictures carry, the head is the others. 70 % of an epoch is drawn from
    the head, 30 % from the tail. Within each, the importance of a picture is the maximum
    over its tags of 1 / sqrt(pictures with that tag) (unverified): its rarest tag decides.
    The last weight is 0, of pictures without a tag.
    """
    tail, importance = counts < tail_below, counts**-0.5
    parts = [("head", ~tail, 0.7), ("tail", tail, 0.3)]
    parts = [part for part in parts if drawn[part[1]].any()]
    weights = np.zeros(len(counts) + 1, dtype=np.int64)
    for name, mask, share in parts:
        if len(parts) == 1:
            print(f"all pictures are in the {name}: it has all draws")
            share = 1.0
        which = np.flatnonzero(mask & (drawn > 0))
        scale = share * drawn.sum() / (drawn * importance)[which].sum()
        weights[which] = np.maximum(1, np.rint(scale * importance[which] * WEIGHT))
    return weights


def open_hashtags(source, folder):
    """(Vocabulary, source to train on, slice to measure on, WeightedOrder's arguments).

    They come from a folder that write_hashtags wrote for this source. The toy world needs
    no folder: its first pictures give the vocabulary, and it has no weights. Raises
    ValueError if the folder is missing, damaged or of other data.
    """
    if not folder and source.endless:
        vocabulary = count_hashtags(Subset(source, range(TAG_CHUNK)))
        return vocabulary, source, Subset(Toy("val", source.sides), range(HELD_OUT)), {}
    train, held_out = hold_out(source, None, HELD_OUT)
    try:
        text = Path(folder or "", "vocabulary.json").read_text(encoding="utf-8")
        content, totals = json.loads(text), np.load(f"{folder}/totals.npy")
        counts = {entry["tag"]: entry["count"] for entry in content["tags"]}
        digest = hashlib.sha256(text.encode()).hexdigest()[:16]
        vocabulary = Vocabulary(counts, content["synonyms"], digest)
        weights = [entry["weight"] for entry in content["tags"]]
        table = np.array([*weights, 0], dtype=np.int64)
        rarest = open_array(f"{folder}/rarest.npy")
        if content["data"] != train.identity or len(rarest) != train.sizes.sum():
            raise ValueError(f"it is of other data: {content['data']}")
        if len(totals) != len(train.sizes) or not -1 <= rarest.min() <= rarest.max() < len(counts):
            raise ValueError("its files do not fit each other")
        if table.min() < 0 or not isinstance(vocabulary.synonyms, dict):
            raise ValueError("its weights or synonyms are damaged")
    except (OSError, ValueError, KeyError, TypeError, EOFError, OverflowError, BadZipFile) as error:
        where = f"in {folder} ({one_line(error)})" if folder else "are given"
        raise ValueError(
            f"no hashtags {where}: write them with python data.py hashtags DATA --out TAGS, and "
            "give --tags TAGS (and both the same --labels, if any)"
        ) from None
    draws = partial(weights_of, f"{folder}/rarest.npy", table)
    options = {"totals": totals, "weights": draws, "largest": table.max()}
    return vocabulary, train, held_out, options


def weights_of(rarest, table, start, stop):
    """(stop - start,) int64 sampling weights of these samples: see WeightedOrder."""
    return table[open_array(rarest)[start:stop]]


@lru_cache(1)
def open_array(path):
    return np.load(path, mmap_mode="r")


def read_synonyms(path):
    """{canonical tag: canonical tag} of lines of two columns with a tab between them.

    Raises ValueError if a line is something else, if a tag has two meanings, or if it
    counts as a tag that counts as another one.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").split("\n")
        rows = [line.split("\t") for line in lines if line.strip()]
        rows = [[canonical([cell], {}) for cell in row] for row in rows]
        rows = [(tag, other) for (tag,), (other,) in rows]  # two cells, one tag in each
        pairs = dict(rows)
        for tag, other in rows:
            if pairs[tag] != other or pairs.get(other, other) != other:
                raise ValueError(f"{tag} counts as {other}, which another line contradicts")
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} is no list of synonyms (two columns, a tab): {error}") from None
    return pairs


# How the step line shows name_hits. In brackets: what the tags' frequencies alone reach.
HITS_SHOWN = {
    "held_out_loss": "held-out {:.4f}",
    "held_out_loss_by_frequency": "(by frequency {:.4f})",
    "hit_1": "hit-1 {:.1%}",
    "hit_1_by_frequency": "({:.1%})",
    "hit_5": "hit-5 {:.1%}",
    "hit_5_by_frequency": "({:.1%})",
}


def name_hits(found):
    """{name: value} for metrics.jsonl of what evaluate.hit_rates has found with prior() as its
    constant; {} if no sample counts. found: None if batches were lacking."""
    rates, count, losses = found or ((), 0, ())
    if not count:
        return {}
    values = [value for loss, hits in zip(losses, rates) for value in (loss, *hits)]
    names = "held_out_loss", "hit_1", "hit_5"
    return dict(zip([n + end for end in ("", "_by_frequency") for n in names], values))


def print_hits(last):
    """Print what stage 2 has reached, beside what frequencies alone reach. last: its metrics."""
    if "hit_1_by_frequency" not in last:  # nothing was held out, or could be read
        return
    print("held-out pictures     loss   hit-1   hit-5")
    for title, suffix in (("tags' frequencies", "_by_frequency"), ("trained", "")):
        loss, hit_1, hit_5 = (last[name + suffix] for name in ("held_out_loss", "hit_1", "hit_5"))
        print(f"  {title:17} {loss:6.4f}  {hit_1:6.1%}  {hit_5:6.1%}")
