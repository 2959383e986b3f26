"""support/hashtags.py: canonical tags, the vocabulary, sampling weights, and their index."""

import json
import math
from collections import Counter
from functools import partial

import numpy as np
import pytest
from conftest import (
    Memory,
    captioned,
    epoch_counts,
    full_disk,
    npy,
    one_line,
    opened,
    picture_batches,
    run_main,
    stream,
)

import data
from support import hashtags
from support.pack import write_listing
from support.shards import Shards
from weak_pretrain import make_sample

MARKS = "\u0928\u092e\u0938\u094d\u0924\u0947"  # letters with combining marks


CANONICAL = [
    (["#Blue-Square"], {"bluesquare"}),
    (["#\uff23\uff21\uff34"], {"cat"}),  # full-width letters
    (["#Stra\u00dfe"], {"strasse"}),
    (["#!?"], set()),
    ([f"#{MARKS}"], {MARKS}),
    (["#kitten"], {"cat"}),  # by the synonyms
    (["#a #b", "#c#d"], {"a", "b", "c", "d"}),
    ("My #Cat, and the #DOG! no tag, a#b (#blue-square)", {"cat", "dog", "b", "bluesquare"}),
]


def test_canonical_tags_by_hand():
    for tags, canonical in CANONICAL:
        assert hashtags.canonical(tags, {"kitten": "cat"}) == canonical
    for wrong in ({"a": 1}, ["#a", 3], None, 7):
        with pytest.raises(ValueError, match="list of texts"):
            hashtags.canonical(wrong, {})


# Of 60 samples: "all" on 57, "half" on 29, "few" on 6; 3 without a tag.
LONG_TAIL = [
    [] if i in (1, 2, 3) else ["#all"] + ["#half"] * (i % 2 == 0) + ["#FEW"] * (i % 10 == 0)
    for i in range(60)
]


def tagged_shard(path, tags_of_samples):
    return captioned(path, [{"json": json.dumps(tags).encode()} for tags in tags_of_samples])


@pytest.fixture
def tagged(tmp_path):
    """Four shards of 15 samples with the tags of LONG_TAIL: their pattern."""
    for shard in range(4):
        tagged_shard(tmp_path / f"t-{shard}.tar", LONG_TAIL[15 * shard :][:15])
    return f"{tmp_path}/t-*.tar"


IMG2DATASET = b'{"url": "http://x", "caption": "a #cat", "key": "0", "width": 4, "sha256": "0"}'


HASHTAGS_OF = [  # ({extension: bytes}, tags, None if damaged)
    ({"json": b'["#a", "b"]'}, {"a", "b"}),
    ({"json": b'"we like #a"'}, {"a"}),
    ({"json": b'{"hashtags": ["#a"], "caption": "#no"}'}, {"a"}),
    ({"json": b'{"x": 1}'}, set()),
    ({"txt": b"first #one"}, {"one"}),
    ({"txt": "\u00fcber #zw\u00f6lf".encode()}, {"zw\u00f6lf"}),
    ({"json": IMG2DATASET, "txt": b"a #cat and a #Dog"}, {"cat", "dog"}),
    ({"txt": b"a #cat", "json": IMG2DATASET}, {"cat"}),  # whichever comes first in the tar
    ({"json": b'{"hashtags": ["#a"]}', "txt": b"#b"}, {"a"}),
    ({"json": b'{"hashtags": "we like #a"}', "txt": b"#b"}, {"a"}),
    ({"json": b'["#a"]', "txt": b"#b"}, {"a"}),
    *(
        ({"json": empty, "txt": b"#b"}, {"b"})
        for empty in (b'{"hashtags": []}', b'{"hashtags": ["#", ""]}', b'{"hashtags": ""}',
                      b'{"hashtags": "none"}', b'{"hashtags": null}', b"[]", b"null", b'"no tag"')
    ),
    ({"json": b'{"hashtags": []}'}, set()),
    ({"json": IMG2DATASET}, set()),
    ({"json": IMG2DATASET, "txt": b"none"}, set()),
    ({}, set()),
    *(
        ({"json": damaged, "txt": b"#b"}, None)  # damaged is not "none"
        for damaged in (b'{"hashtags": [3]}', b'{"hashtags": 5}', b'{"hashtags": false}', b"{cut")
    ),
    ({"json": IMG2DATASET, "txt": b"caf\xe9 #b"}, None),
]  # fmt: skip


def test_hashtags_are_those_of_the_first_file_that_has_any(tmp_path, capsys):
    path = captioned(tmp_path / "a.tar", [files for files, _ in HASHTAGS_OF])
    write_listing(Shards(path))
    expected = Counter(tag for _, tags in HASHTAGS_OF for tag in tags or ())
    names = [f"{number:05}" for number, (_, tags) in enumerate(HASHTAGS_OF) if tags is None]
    for where in (path, f"pipe:cat {path}"):
        source, _ = data.open_sources(where, cache=(f"{tmp_path}/cache", "1M"))
        for number, (_, tags) in enumerate(HASHTAGS_OF):
            found = source.read(number)["hashtags"]
            if tags is None:
                with pytest.raises(ValueError, match="the file of its hashtags is damaged"):
                    found()
            else:
                assert hashtags.canonical(found(), {}) == tags
        vocabulary = hashtags.count_hashtags(source, min_count=1)
        assert vocabulary.counts == expected
        printed = capsys.readouterr()
        assert f"unreadable hashtags: {len(names)}" in printed.out
        lines = [line for line in printed.err.splitlines() if "unreadable" in line]
        assert [line.split(": ")[1][-5:] for line in lines] == names
        shape = {"size": (4, 4), "channels": 3, "vocabulary": vocabulary}
        batch = data.Batches(source, partial(make_sample, **shape), len(HASHTAGS_OF))[0]
        ids = [sorted(vocabulary.numbers[tag] for tag in tags or ()) for _, tags in HASHTAGS_OF]
        assert [[i for i in row if i >= 0] for row in batch["tags"].tolist()] == ids
        assert batch["weight"].tolist() == [float(bool(tags)) for _, tags in HASHTAGS_OF]
        assert [line.split(": ")[0][-5:] for line in batch["bad"]] == names


def test_hashtags_and_captions_are_read_only_where_they_are_used(tmp_path, monkeypatch):
    """Stage 1 uses neither, and its loader must not wait for them."""
    source = opened(captioned(tmp_path / "a.tar", [{"json": b'{"hashtags": ["#a"]}'}] * 3))
    monkeypatch.setattr(data.json, "loads", lambda content: pytest.fail("a .json was read"))
    batch = picture_batches(source, (4, 4), 3, 3)[0]
    assert batch["bad"] == [] and batch["weight"].tolist() == [1, 1, 1]


def test_a_vocabulary_counts_pictures_and_is_cut_at_both_ends(tagged):
    source = opened(tagged)
    vocabulary = hashtags.count_hashtags(source, min_count=1)
    assert vocabulary.counts == {"all": 57, "half": 29, "few": 6}  # most frequent first
    assert vocabulary.ids(["#few", "#nothing", "ALL", "all"]) == [0, 2]
    for options in ({"size": 2, "min_count": 1}, {"min_count": 7}):
        assert list(hashtags.count_hashtags(source, **options).counts) == ["all", "half"]
    merged = hashtags.count_hashtags(source, min_count=1, synonyms={"few": "half"})
    assert merged.counts == {"all": 57, "half": 29} and merged.ids(["#FEW"]) == [1]
    with pytest.raises(ValueError, match="0 hashtags on 100 pictures") as error:
        hashtags.count_hashtags(source, min_count=100)
    one_line(error)


def test_the_prior_by_hand():
    vocabulary = hashtags.Vocabulary({"a": 5, "b": 3, "c": 1, "never": 0}, {})
    shares = [5 / 10, 3 / 10, 1 / 10, 1 / 10]  # a count of 0 counts as 1
    assert vocabulary.prior().tolist() == pytest.approx(np.log(shares).tolist())


def test_counting_and_weighing_do_not_depend_on_chunks_and_workers(tagged, tmp_path, monkeypatch):
    found, sets = [], [{tag[1:].lower() for tag in tags} for tags in LONG_TAIL]
    for chunk, workers in ((4096, 0), (7, 0), (15, 2)):
        monkeypatch.setattr(hashtags, "TAG_CHUNK", chunk)
        assert list(hashtags.read_tags(opened(tagged), {}, workers, "reading")) == sets
        out = tmp_path / f"tags-{chunk}"
        hashtags.write_hashtags(opened(tagged), out, 10, workers)
        found.append([(out / name).read_bytes() for name in ("vocabulary.json", "rarest.npy")])
    assert found[0] == found[1] == found[2]


def test_sampling_weights_by_hand(tagged, tmp_path):
    """Of the first 57: "few" on 6 is the tail. Head: weight ~ 54 ** -0.5, or 27 ** -0.5 with "half"."""
    source = opened(tagged)
    hashtags.write_hashtags(source, tmp_path / "tags", 10, min_count=1)
    vocabulary, train, held_out, draws = hashtags.open_hashtags(source, tmp_path / "tags")
    assert held_out.sizes.sum() == 3 and train.sizes.tolist() == [15, 15, 15, 12]  # 5 % of 60
    assert vocabulary.counts == {"all": 54, "half": 28, "few": 6}
    few = np.array(["#FEW" in tags for tags in LONG_TAIL[:57]])
    half = np.array(["#half" in tags for tags in LONG_TAIL[:57]])
    importance = np.where(few, 6, np.where(half, 28, 54)) ** -0.5
    importance[[not tags for tags in LONG_TAIL[:57]]] = 0
    drawn, wanted = (importance > 0).sum(), np.zeros(57)
    for part, share in ((~few, 0.7), (few, 0.3)):
        wanted[part] = share * drawn * importance[part] / importance[part].sum()
    weights = draws["weights"](0, 57) / hashtags.WEIGHT
    assert weights == pytest.approx(wanted, abs=1e-5)
    shards = [draws["weights"](first, min(first + 15, 57)) for first in (0, 15, 30, 45)]
    assert draws["totals"].tolist() == [units.sum() for units in shards]
    # And the order draws each sample as often.
    check_draws(hashtags.WeightedOrder(train.sizes, 0, 2, **draws), weights, epochs=500)


def test_where_all_is_head_or_tail_it_has_all_draws(tagged, tmp_path, capsys):
    source = opened(tagged)
    for tail_below, name in ((2, "head"), (100, "tail")):
        hashtags.write_hashtags(source, tmp_path / name, tail_below)
        assert f"all pictures are in the {name}" in capsys.readouterr().out
        totals = hashtags.open_hashtags(source, tmp_path / name)[3]["totals"]
        assert totals.sum() / hashtags.WEIGHT == pytest.approx(54, abs=1e-3)


def test_an_index_of_hashtags_is_replaced_whole_or_not_at_all(
    tagged, tmp_path, capsys, monkeypatch
):
    source, out = opened(tagged), tmp_path / "tags"
    hashtags.write_hashtags(source, out)
    files = {path: path.read_bytes() for path in out.iterdir()}
    in_use = hashtags.open_hashtags(source, out)[3]["weights"]
    before = in_use(0, 10).tolist()
    with pytest.raises(ValueError, match="want two at least"):
        hashtags.write_hashtags(source, out, min_count=50)  # only one tag is that frequent
    assert {path: path.read_bytes() for path in out.iterdir()} == files
    hashtags.write_hashtags(source, out, min_count=1)
    assert "held an index already: it is replaced" in capsys.readouterr().out
    assert in_use(0, 10).tolist() == before  # a run that reads the earlier one goes on with it
    monkeypatch.setattr(hashtags.np, "save", full_disk)
    with pytest.raises(OSError):
        hashtags.write_hashtags(source, out)
    with pytest.raises(ValueError, match="no hashtags in"):
        hashtags.open_hashtags(source, out)


def test_an_unfinished_damaged_or_foreign_index_of_hashtags_is_refused(tagged, tmp_path):
    source, out = opened(tagged), tmp_path / "tags"
    hashtags.write_hashtags(source, out)
    other = opened(tagged_shard(tmp_path / "other.tar", LONG_TAIL))
    far = npy(np.load(out / "rarest.npy") + 1000)
    for used, name, content, why in (
        (other, "rarest.npy", None, "of other data"),
        (source, "rarest.npy", far, "do not fit"),
        (source, "rarest.npy", npy(np.zeros(3, np.int32)), "of other data"),
        (source, "rarest.npy", b"", "no hashtags in"),
        (source, "totals.npy", b"", "no hashtags in"),
        (source, "totals.npy", npy(np.zeros(9, np.int64)), "do not fit"),
        (source, "totals.npy", b"PK\x03\x04", "no hashtags in"),
        (source, "rarest.npy", npy(np.full(57, -2, np.int32)), "do not fit"),
        (source, "vocabulary.json", changed(out, weight=-1), "weights or synonyms are damaged"),
        (source, "vocabulary.json", changed(out, weight=1 << 64), "no hashtags in"),
        (source, "vocabulary.json", b"{", "no hashtags in"),
        (source, "vocabulary.json", b"", "no hashtags in"),  # as a kill leaves it
    ):
        whole = (out / name).read_bytes()
        (out / name).write_bytes(whole if content is None else content)
        hashtags.open_array.cache_clear()
        with pytest.raises(ValueError, match=why) as error:
            hashtags.open_hashtags(used, out)
        assert "python data.py hashtags" in one_line(error)
        (out / name).write_bytes(whole)


def changed(folder, weight):
    """The bytes of a vocabulary.json whose first tag has another weight."""
    content = json.loads((folder / "vocabulary.json").read_text())
    content["tags"][0]["weight"] = weight
    return json.dumps(content).encode()


def test_hashtags_on_the_command_line(tagged, tmp_path, monkeypatch, capsys):
    (tmp_path / "map.tsv").write_text("#Few\thalf\n\nALL\t#all\n")
    out = tmp_path / "out" / "tags"
    flags = ["--synonyms", tmp_path / "map.tsv", "--min-count", 2, "--workers", 0]
    assert run_main(monkeypatch, "hashtags", tagged, "--out", out, *flags) == 0
    assert "2 hashtags; 54 of 57 pictures are drawn" in capsys.readouterr().out
    content = json.loads((out / "vocabulary.json").read_text())
    assert content["tags"] == [
        {"tag": "all", "id": 0, "count": 54, "weight": content["tags"][0]["weight"]},
        {"tag": "half", "id": 1, "count": 28, "weight": content["tags"][1]["weight"]},
    ]
    tables = ["one column\n", "a#b\tc\n", "a\tb\na\tc\n"]  # a#b: two tags in a cell
    tables += ["#Few\tfewer\nFEWER\thalf\n", "a\tb\nb\ta\n"]
    wrong = [("--synonyms", tmp_path / f"{number}.tsv") for number in range(len(tables))]
    for (_, path), text in zip(wrong, tables):
        path.write_text(text)
    for flags in (*wrong, ("--min-count", 99), ("--labels", "no")):
        assert run_main(monkeypatch, "hashtags", tagged, "--out", tmp_path / "new", *flags) == 2
        assert len(capsys.readouterr().err.strip().splitlines()) == 1
    assert not (tmp_path / "new" / "vocabulary.json").exists()


# ----------------------------------------------------------------------------- order by weights


class Weights:
    """Sampling weights, a list for each shard, as Order wants them; remembers what it asked for."""

    def __init__(self, shards):
        self.shards = [np.round(np.array(w) * hashtags.WEIGHT).astype(np.int64) for w in shards]
        self.weights, self.asked = np.concatenate(self.shards), set()

    def __call__(self, first, stop):
        self.asked.add((first, stop))
        return self.weights[first:stop]

    def order(self, **options):
        sizes, totals = [len(w) for w in self.shards], [w.sum() for w in self.shards]
        options = {"largest": hashtags.WEIGHT} | options
        return hashtags.WeightedOrder(sizes, totals=totals, weights=self, **options)


def check_draws(order, weights, epochs):
    """A weight is rounded down or up, by a coin: 5 standard deviations of its mean. An epoch has
    the sum rounded down. What that leaves over is missing anywhere, one draw in all at most."""
    total, left_over = np.zeros(len(weights)), weights.sum() % 1
    assert order.length == int(weights.sum())
    for epoch in range(epochs):
        counts = epoch_counts(order, epoch)
        counts = np.array([counts[sample] for sample in range(len(weights))])
        assert (np.floor(weights) - counts).clip(0).sum() <= math.ceil(left_over)
        assert (counts <= np.ceil(weights)).all()
        total += counts
    share = np.full(len(weights), 0.5) if left_over else weights % 1
    limit = 5 * np.sqrt(share * (1 - share) / epochs) * (weights > 0)
    assert (abs(total / epochs - weights * order.length / weights.sum()) <= limit).all()


WEIGHTS = {
    "whole": [[1, 0, 3], [], [2] * 50, [0, 0], [7], list(range(6)) * 4],
    "12 in all": [[0.25, 1.5, 0.5], [0, 2.125, 0.125], [3.75, 0.75], [1, 2]],
    "5.6 in all": [[0.5, 1, 0.7], [0.3, 2], [1.1]],
    "25.5 in all, equal": [[0.25] * 40, [0.25] * 62],
    "41.85 in all": [[0.1, 0.9, 0.45, 1.3, 0.7, 0.2, 1.0] * n for n in (6, 3)],
}


@pytest.mark.parametrize("lanes", [1, 5, 48])
@pytest.mark.parametrize("name", WEIGHTS)
def test_a_sample_is_drawn_as_often_as_its_weight_says(name, lanes):
    weights = Weights(WEIGHTS[name])
    order = weights.order(seed=5, lanes=lanes)
    check_draws(order, weights.weights / hashtags.WEIGHT, 8_000 // order.length)


def test_a_weight_of_zero_is_never_drawn_even_where_a_point_falls_on_its_edge():
    """65,536 pairs of weights 0 and 1 / 65,536: every point lies on the edge of a pair."""
    totals = np.ones(hashtags.WEIGHT, dtype=np.int64)
    order = hashtags.WeightedOrder(
        totals * 2, seed=1, totals=totals, weights=lambda *_: np.array([0, 1]), largest=1
    )
    assert order.length == 1
    drawn = stream(order, 0, 5)
    assert all(sample % 2 for sample in drawn) and len(set(drawn)) == 5


def test_a_weighted_stream_is_a_pure_function_of_the_position():
    random = np.random.default_rng(0)
    weights = Weights([random.uniform(0, 2, size).tolist() for size in (17, 0, 40, 151, 3, 96, 8)])
    whole = weights.order(seed=4, lanes=12)
    with pytest.raises(ValueError, match="no samples"):
        Weights([[0, 0], [0.5]]).order()
    count = 2 * whole.length + 31  # over two epoch borders
    expected = stream(whole, 0, count)
    for processes in (2, 3, 4):
        for process in range(processes):
            order = weights.order(seed=4, lanes=12)
            mine = [p for p in reversed(range(count)) if p // 2 % processes == process]
            assert [order(position) for position in mine] == [expected[p] for p in mine]


@pytest.mark.parametrize("processes", [2, 4, 6])
def test_weights_are_asked_only_for_the_shards_of_a_processs_lanes(processes):
    asked = []
    for process in range(processes):
        weights = Weights([[0.5, 1.5] * 10] * 48)
        order = weights.order(lanes=48)
        assert not weights.asked  # the totals are enough to begin
        for position in range(order.length):
            if position // 2 % processes == process:
                order(position)
        asked.append(weights.asked)
    assert [len(shards) for shards in asked] == [48 // processes] * processes
    assert set().union(*asked) == {(first, first + 20) for first in range(0, 48 * 20, 20)}


def test_an_unreadable_sample_with_a_weight_comes_as_often_as_the_weight_says():
    order = Weights([[2.5, *[1] * 59]]).order(largest=5 * hashtags.WEIGHT // 2)
    assert order.length == 61 and epoch_counts(order, 0)[0] in (2, 3)
    batches = picture_batches(Memory([60]), (8, 8), 3, 8, order=order)
    for drawn in (5, 100 * 61):  # alone, it never stops a run
        unlabelled = 3 * (1 + drawn // 61)  # at most three times in each epoch
        assert not batches.over_max_bad(1, 0, 0, drawn, 0)
        assert not batches.over_max_bad(0, 0, unlabelled, drawn, 0)
        assert batches.over_max_bad(0, 0, unlabelled + 1, drawn, 0)
        assert batches.over_max_bad(2, 0, 0, drawn, 0)  # two files, however often they come
