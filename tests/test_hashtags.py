"""support/hashtags.py: canonical tags, the vocabulary, sampling weights, and their index."""

import json
import math
from collections import Counter

import numpy as np
import pytest
from conftest import (
    captioned,
    epoch_counts,
    full_disk,
    npy,
    one_line,
    opened,
    picture_batches,
    run_main,
    tile,
    write_tar,
)

import data
from support import hashtags
from support import pack as pack_module
from support import shards as shards_module

MARKS = "\u0928\u092e\u0938\u094d\u0924\u0947"  # letters with combining marks


@pytest.mark.parametrize(
    "tags, canonical",
    [
        (["#Blue-Square"], {"bluesquare"}),
        (["#\uff23\uff21\uff34"], {"cat"}),  # full-width letters
        (["#Stra\u00dfe"], {"strasse"}),
        (["#!?"], set()),
        ([f"#{MARKS}"], {MARKS}),
        (["#kitten"], {"cat"}),  # by the synonyms
        (["#a #b", "#c#d"], {"a", "b", "c", "d"}),
        (
            f"My #Cat, and the #DOG! no tag, a#b (#{MARKS}) #blue-square",
            {"cat", "dog", "b", "bluesquare", MARKS},
        ),
    ],
)
def test_canonical_tags_by_hand(tags, canonical):
    assert hashtags.canonical(tags, {"kitten": "cat"}) == canonical


@pytest.mark.parametrize("wrong", [{"a": 1}, ["#a", 3], None, 7])
def test_what_is_no_list_of_tags_is_refused(wrong):
    with pytest.raises(ValueError, match="list of texts"):
        hashtags.canonical(wrong, {})


def tagged_members(tags_of_samples):
    for number, tags in enumerate(tags_of_samples):
        yield f"{number:05}.png", tile(number % 256)
        if tags is not None:
            content = tags if isinstance(tags, bytes) else json.dumps(tags).encode()
            yield f"{number:05}.json", content


# Of 60 samples: "all" on 57, "half" on 29, "few" on 6; 3 without a tag.
LONG_TAIL = [
    [] if i in (1, 2, 3) else ["#all"] + ["#half"] * (i % 2 == 0) + ["#FEW"] * (i % 10 == 0)
    for i in range(60)
]


@pytest.fixture
def tagged(tmp_path):
    """Four shards of 15 samples with the tags of LONG_TAIL: their pattern."""
    for shard in range(4):
        write_tar(tmp_path / f"t-{shard}.tar", tagged_members(LONG_TAIL[15 * shard :][:15]))
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
    ({"json": b'{"hashtags": []}', "txt": b"#b"}, {"b"}),
    ({"json": b'{"hashtags": ["#", ""]}', "txt": b"#b"}, {"b"}),
    ({"json": b'{"hashtags": ""}', "txt": b"#b"}, {"b"}),
    ({"json": b'{"hashtags": "none"}', "txt": b"#b"}, {"b"}),
    ({"json": b'{"hashtags": null}', "txt": b"#b"}, {"b"}),
    ({"json": b"[]", "txt": b"#b"}, {"b"}),
    ({"json": b"null", "txt": b"#b"}, {"b"}),
    ({"json": b'"no tag"', "txt": b"#b"}, {"b"}),
    ({"json": b'["#a"]', "txt": b"#b"}, {"a"}),
    ({"json": b'{"hashtags": []}'}, set()),
    ({"json": IMG2DATASET}, set()),
    ({"json": IMG2DATASET, "txt": b"none"}, set()),
    ({}, set()),
    ({"json": b'{"hashtags": [3]}', "txt": b"#b"}, None),  # damaged is not "none"
    ({"json": b'{"hashtags": 5}', "txt": b"#b"}, None),
    ({"json": b'{"hashtags": false}', "txt": b"#b"}, None),
    ({"json": b"{broken", "txt": b"#b"}, None),
    ({"json": IMG2DATASET, "txt": b"caf\xe9 #b"}, None),
]


def test_hashtags_are_those_of_the_first_file_that_has_any(tmp_path, capsys):
    path = captioned(tmp_path / "a.tar", [files for files, _ in HASHTAGS_OF])
    pack_module.write_listing(shards_module.Shards(path))
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
        batch = picture_batches(source, (4, 4), 3, len(HASHTAGS_OF), vocabulary=vocabulary)[0]
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
    assert list(hashtags.count_hashtags(source, size=2, min_count=1).counts) == ["all", "half"]
    assert list(hashtags.count_hashtags(source, min_count=7).counts) == ["all", "half"]
    merged = hashtags.count_hashtags(source, min_count=1, synonyms={"few": "half"})
    assert merged.counts == {"all": 57, "half": 29} and merged.ids(["#FEW"]) == [1]
    with pytest.raises(ValueError, match="0 hashtags on 100 pictures") as error:
        hashtags.count_hashtags(source, min_count=100)
    one_line(error)


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
    tags = LONG_TAIL[:57]
    drawn = [i for i, names in enumerate(tags) if names]
    importance = {
        i: (6 if "#FEW" in tags[i] else 28 if "#half" in tags[i] else 54) ** -0.5 for i in drawn
    }
    tail = {i for i in drawn if "#FEW" in tags[i]}
    sums = {part: sum(v for i, v in importance.items() if (i in tail) == part) for part in (0, 1)}
    weights = draws["weights"](0, 57) / hashtags.WEIGHT
    for i in range(57):
        part = i in tail
        wanted = len(drawn) * (0.7, 0.3)[part] * importance.get(i, 0) / sums[part]
        assert weights[i] == pytest.approx(wanted, abs=1e-5)
    shards = [draws["weights"](first, min(first + 15, 57)) for first in (0, 15, 30, 45)]
    assert draws["totals"].tolist() == [units.sum() for units in shards]
    assert weights.sum() == pytest.approx(len(drawn), abs=1e-3)
    # And the order draws each sample as often: rounded in each epoch, exactly on average.
    order = hashtags.WeightedOrder(train.sizes, 0, 2, **draws)
    epochs, total = 500, Counter()
    for epoch in range(epochs):
        counts = epoch_counts(order, epoch)
        missing = [math.floor(weights[i]) - counts[i] for i in range(57)]
        assert sum(n for n in missing if n > 0) <= 1  # the sum of the weights is not whole
        assert all(counts[i] <= math.ceil(weights[i]) for i in range(57))
        total += counts
    for i in range(57):
        wanted = weights[i] * order.length / weights.sum()
        assert abs(total[i] / epochs - wanted) <= 5 * math.sqrt(0.25 / epochs) * (weights[i] > 0)


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
    other = opened(write_tar(tmp_path / "other.tar", tagged_members(LONG_TAIL)))
    far = npy(np.load(out / "rarest.npy") + 1000)
    for used, name, content, why in (
        (other, "rarest.npy", None, "of other data"),
        (source, "rarest.npy", far, "do not fit"),
        (source, "rarest.npy", b"", "no hashtags in"),
        (source, "totals.npy", b"", "no hashtags in"),
        (source, "totals.npy", npy(np.zeros(9, np.int64)), "do not fit"),
        (source, "vocabulary.json", b"{", "no hashtags in"),
    ):
        whole = (out / name).read_bytes()
        (out / name).write_bytes(whole if content is None else content)
        hashtags.open_array.cache_clear()
        with pytest.raises(ValueError, match=why) as error:
            hashtags.open_hashtags(used, out)
        assert "python data.py hashtags" in one_line(error)
        (out / name).write_bytes(whole)
    (out / "vocabulary.json").unlink()  # as a kill leaves it
    with pytest.raises(ValueError, match="no hashtags in"):
        hashtags.open_hashtags(source, out)


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
    tables = {
        "bad.tsv": "one column\n",
        "two.tsv": "a#b\tc\n",  # two tags in a cell
        "both.tsv": "a\tb\na\tc\n",
        "chain.tsv": "#Few\tfewer\nFEWER\thalf\n",
        "circle.tsv": "a\tb\nb\ta\n",
    }
    wrong = [("--synonyms", tmp_path / name) for name in tables]
    for name, text in tables.items():
        (tmp_path / name).write_text(text)
    for flags in (*wrong, ("--min-count", 99), ("--labels", "no")):
        assert run_main(monkeypatch, "hashtags", tagged, "--out", tmp_path / "new", *flags) == 2
        assert len(capsys.readouterr().err.strip().splitlines()) == 1
    assert not (tmp_path / "new" / "vocabulary.json").exists()
