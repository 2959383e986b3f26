"""tasks/lit.py: captions, tokenizers, the two towers, their loss, and what is measured by names."""

import io
import os
import pickle
import shutil
import sys
from collections import Counter
from functools import partial
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
import torch
import torch.nn.functional as F
from conftest import (
    SIZES,
    STEPS,
    TINY_TEXT,
    Memory,
    captioned,
    one_line,
    opened,
    same_batch,
    stage,
    tile,
    training_batches,
    write_files,
)

import data
from support import hashtags, toy
from support.labels import read_labels
from tasks import lit

# ----------------------------------------------------------------------------------------- captions

# What a .json file beside a picture holds, its captions and its titles. None: it is damaged.
JSON_FILES = [
    (b'{"caption": "a red star"}', ["a red star"], []),
    (b'{"caption": ["a star", "\\u661f"], "title": "x"}', ["a star", "\u661f"], ["x"]),
    (b'{"caption": null}', [], []),
    (b'{"title": "a moon", "hashtags": ["#no"]}', [], ["a moon"]),
    (b'["#tag"]', [], []),
    (b'"we like #tags"', [], []),
    (b'{"caption": 5}', None, []),
    (b'{"caption": ["a", 5]}', None, []),
    (b'{"caption": {"en": "a"}}', None, []),
    (b'{"caption": "cut', None, None),
    (b"\xff\xff", None, None),
    (b"", None, None),
]


def test_captions_of_all_that_may_hold_them(tmp_path):
    path = captioned(tmp_path / "a.tar", [{"json": content} for content, *_ in JSON_FILES])
    for column, key in ((1, "caption"), (2, "title")):
        source, _ = data.open_sources(path, caption_key=key)
        for number, row in enumerate(JSON_FILES):
            captions = source.read(number)["captions"]
            if row[column] is None:
                with pytest.raises(ValueError, match="the file of its captions is damaged"):
                    captions()
            else:
                assert captions() == row[column]


def test_a_text_file_is_one_caption_and_holds_hashtags_too(tmp_path):
    nothing = (b'""', b'[" ", "#"]')  # a caption of no word hides nothing
    cases = [
        ({"txt": b"a red\n  star #sky\n"}, ["a red\n  star #sky"]),
        ({"txt": b" \n"}, []),
        ({"txt": "\ufeff\u0441\u043e".encode()}, ["\u0441\u043e"]),
        ({"txt": b"caf\xe9 noir"}, ["caf\ufffd noir"]),
        ({"txt": b"the text", "json": b'{"id": 7}'}, ["the text"]),
        ({"txt": b"the text", "json": b'{"caption": "the json"}'}, ["the json"]),
        ({}, []),
        *[({"txt": b"the text", "json": b'{"caption": %s}' % c}, ["the text"]) for c in nothing],
    ]
    source = opened(captioned(tmp_path / "a.tar", [files for files, _ in cases]))
    for number, (_, expected) in enumerate(cases):
        assert source.read(number)["captions"]() == expected
    assert hashtags.canonical(source.read(0)["hashtags"](), {}) == {"sky"}


@pytest.fixture
def labelled(tmp_path):
    """labelled(name, content, key): the source of pictures a.png, b.png and c.png with this file of
    labels, and {picture: captions}."""
    write_files(tmp_path / "p", {f"{name}.png": tile(i) for i, name in enumerate("abc")})

    def read(name, content, key="caption"):
        write_files(tmp_path, {name: content.encode()})
        options = {"labels": f"{tmp_path}/{name}", "caption_key": key}
        source, _ = data.open_sources(f"{tmp_path}/p", **options)
        return source, {path: source.read(i)["captions"]() for i, path in enumerate(source.paths)}

    return read


def test_captions_of_a_folder_come_from_its_labels(labelled, tmp_path):
    rows = 'path,caption\na.png,a dog\n"./a.png","a ""big"" dog, or two"\nb.png,\nc.png,x'
    rest = '{"path": "b.png", "caption": ""}\n{"path": "c.png", "caption": "x"}'
    both = '{"path": "a.png", "caption": ["a dog", "a \\"big\\" dog, or two"]}\n'
    one_each = '{"path": "a.png", "caption": "a dog"}\n' + both.replace('"a dog", ', "")
    titles = rows.replace("caption", "title"), "title"
    files = (
        ("a.csv", rows),
        ("b.csv", *titles),
        ("a.jsonl", both + rest),
        ("b.jsonl", one_each + rest),
    )
    sources, found = zip(*(labelled(*file) for file in files))
    expected = {"a.png": ["a dog", 'a "big" dog, or two'], "b.png": [""], "c.png": ["x"]}
    assert list(found) == [expected] * 4
    (identity,) = {source.identity for source in sources}
    assert labelled("c.csv", f"{rows}\nc.png,y")[0].identity != identity
    assert all(opened(tmp_path / "p").read(number)["captions"]() == [] for number in range(3))
    # Labels without captions are the data set that they were before captions were read.
    rows = '{"path": "a.png", "class": 1, "hashtags": ["#x"]}\n{"path": "b.png", "class": 2}'
    assert labelled("labels.jsonl", rows)[0].identity == "2 pictures, e23d8e52339fdadb"


def test_captions_of_a_csv_keep_their_spaces(labelled):
    """They are part of what a checkpoint compares."""
    rows = 'path,caption\na.png, a cat \nb.png,"a ""big"" dog, or two "\nc.png, a "b" c\n'
    source, found = labelled("a.csv", rows)
    expected = {"a.png": [" a cat "], "b.png": ['a "big" dog, or two '], "c.png": [' a "b" c']}
    assert found == expected
    assert source.identity == "3 pictures, 1a7ee00735acd09f"  # as before spaces were looked at
    rows = 'class, caption ,path\n cat , a "b" c, a.png \n'  # paths and classes are stripped
    source, found = labelled("b.csv", rows)
    assert found == {"a.png": [' a "b" c']} and source.classes == ["cat"]


DAMAGED_CSV = (
    b"path,caption\na.png,a dog\nb.png,a dog, too\nc.txt,a\nd.png\na.png,more\nf.png,caf\xe9"
)
DAMAGED_JSONL = b"""{"path": "a.png", "caption": 5}
{"path": "b.png", "caption": ["x", null]}
{"path": "c.png", "class": 1, "caption": "x"}
{"path": "d.png", "caption": null}
{"path": "c.png", "class": 2, "caption": "y"}"""


def test_damaged_captions_of_labels_are_counted_and_left_out(tmp_path, capsys):
    left = {"c.png": {"class": "1", "captions": ["x"]}, "d.png": {"captions": []}}
    write_files(tmp_path, {"a.csv": DAMAGED_CSV, "a.jsonl": DAMAGED_JSONL})
    assert read_labels(f"{tmp_path}/a.csv") == {"a.png": {"captions": ["a dog", "more"]}}
    assert capsys.readouterr().err.endswith(": 4\n")
    assert read_labels(f"{tmp_path}/a.jsonl") == left
    assert capsys.readouterr().err.endswith(": 3\n")


def test_all_captions_of_a_source_are_read_without_its_pictures(tmp_path, monkeypatch, capsys):
    files = [{"json": b'{"caption": ["a #dog", "b"]}'}, {"json": b"{cut"}, {"txt": b"c"}, {}]
    path = captioned(tmp_path / "a.tar", files)
    monkeypatch.setattr(data.Image, "open", None)
    assert lit.all_captions(opened(path)) == [["a #dog", "b"], [], ["c"], []]
    printed = capsys.readouterr().err
    assert "unreadable caption: " in printed and f"{path}:00001" in printed
    assert lit.all_captions(data.Subset(opened("toy"), [5])) == [toy.toy_sample(5)["captions"]()]


def test_cleaned_captions_by_hand():
    for text, expected in (
        ("a red star", "a red star"),
        ("  #red #star#sky\r\n\tat\u00a0night\u3000 ", "red star sky at night"),
        ("a\x00b\x1b[0m\x7f\u2028c", "a b [0m c"),
        ("\uff03\u72ac #", "\u72ac"),
        ("# \n", ""),
        ("", ""),
        ("\u0928\u092e\u0938\u094d\u0924\u0947", "\u0928\u092e\u0938\u094d\u0924\u0947"),
        ("\U0001f468\u200d\U0001f467", "\U0001f468\u200d\U0001f467"),  # with its joiner
    ):
        assert lit.clean(text) == expected == lit.clean(expected)


# ------------------------------------------------------------------------------------------ tokens

ODD_TEXTS = [
    *("", " ", "\x00", "a\x00b", "a\tb\nc\r\n", "\x07\x1b[0m", "\ufeffbom", "\u2581x", "  a  b  "),
    *("שלום", "\u200f\u202eثعلب\u202c", "日本語", "नमस्ते", "e\u0301 \u00e9", "\ufb01ne \uff21"),
    *("\U0001f468\u200d\U0001f469\u200d\U0001f467", "👍🏽🇫🇷", "\u2764\ufe0f"),
]


def test_tokens_of_bytes_by_hand():
    tokenizer = lit.Tokenizer()
    assert tokenizer.vocabulary == 260
    tokens = tokenizer(["ab", "", "\u00e9\n"], 77)
    assert tokens.dtype == torch.int64 and tokens.tolist() == [
        [0, 4 + 97, 4 + 98, 2, 1, 1, 1, 1],
        [0, 2, 1, 1, 1, 1, 1, 1],
        [0, 4 + 0xC3, 4 + 0xA9, 4 + 10, 2, 1, 1, 1],
    ]
    assert tokenizer(["\ud83d x"], 77).tolist() == tokenizer(["? x"], 77).tolist()
    for row, text in zip(tokenizer(ODD_TEXTS, 100).tolist(), ODD_TEXTS):
        assert bytes(token - 4 for token in row[1 : row.index(2)]).decode() == text


def test_a_row_of_tokens_is_cut_at_the_context_and_few_widths_occur():
    tokenizer, text = lit.Tokenizer(), "abcdefghijkl" * 1000
    for context, length in product((1, 5, 6, 7, 77, 100), (0, 1, 5, 6, 7, 40, 77, 12_000)):
        tokens, kept = tokenizer([text[:length], ""], context), min(length, context)
        ids = [4 + ord(letter) for letter in text[:kept]]
        width = min(-(-(kept + 2) // 8) * 8, context + 2)
        assert tokens.tolist()[0] == [0, *ids, 2] + [1] * (width - kept - 2)


SENTENCES = [
    "a large red striped star on plain green ground and a small blue circle",
    "the quick brown fox jumps over the lazy dog twice on sundays",
    "быстрая лиса прыгает через ленивую собаку",
    "الثعلب البني السريع يقفز فوق الكلب الكسول",
    "敏捷的棕色狐狸跳过了懒狗 今天天气很好",
    "नमस्ते दुनिया यह एक छोटा वाक्य है",
    "red heart ❤️ smile 😀 family 👨\u200d👩\u200d👧 thumbs 👍🏽",
]


def train_sentencepiece(path, **options):
    content = io.BytesIO()
    options |= {"vocab_size": 400, "hard_vocab_limit": False, "character_coverage": 1.0}
    options |= {"sentence_iterator": iter(SENTENCES * 3), "num_threads": 1, "minloglevel": 2}
    sentencepiece.SentencePieceTrainer.train(model_writer=content, **options)
    path.write_bytes(content.getvalue())
    return str(path)


@pytest.fixture(scope="session")
def pieces(tmp_path_factory):
    """A file like XLM-R's, trained on sentences of five scripts and emoji: its path."""
    return train_sentencepiece(tmp_path_factory.mktemp("xlmr") / "sentencepiece.bpe.model")


def test_ids_of_sentencepiece_are_those_of_transformers(pieces, transformers):
    """<s> <pad> </s> <unk>, then sentencepiece's own pieces, from its fourth on; <mask> last."""
    reference = transformers.XLMRobertaTokenizer.from_pretrained(os.path.dirname(pieces))
    tokenizer = lit.Tokenizer(pieces)
    assert tokenizer.vocabulary == len(reference) == reference.mask_token_id + 1
    for text in [*SENTENCES, *ODD_TEXTS, "a red star " * 1000]:
        ids = reference(text, truncation=True, max_length=102)["input_ids"]
        (row,) = tokenizer([text], 100).tolist()
        assert row == ids + [1] * (len(row) - len(ids)), text
    (row,) = tokenizer(["a \u2603 star"], 100).tolist()  # a snowman was not in the sentences
    assert row.count(3) == 1
    assert tokenizer(["", " "], 100).tolist() == [[0, 2, 1, 1, 1, 1, 1, 1]] * 2
    # What looks like a mark in a text is text.
    assert {1, 2, tokenizer.vocabulary - 1}.isdisjoint(tokenizer.ids("<s> </s> <pad> <mask>"))


def test_any_text_has_tokens_of_a_tokenizer_that_is_known_by_its_file(pieces, tmp_path):
    texts = [*ODD_TEXTS, "\ud800", "a\udcffb\udfff", "star " * 2000]
    texts += [letter * 10_000 for letter in ("a", "\U0001f600", "\u0643", "\x00")]
    for path in (None, pieces):
        tokenizer = lit.Tokenizer(path)
        tokens = tokenizer(texts, 100)
        assert tokens.shape == (len(texts), 102) and tokens.max() < tokenizer.vocabulary
        assert (tokens[:, 0] == 0).all() and ((tokens == 2).sum(1) == 1).all()
        assert torch.equal(pickle.loads(pickle.dumps(tokenizer))(texts, 100), tokens)
    other = train_sentencepiece(tmp_path / "other.model", normalization_rule_name="identity")
    copy = shutil.copy(pieces, tmp_path / "copy.model")
    found = [lit.Tokenizer(path).identity for path in (pieces, copy, other, None)]
    assert found[0] == found[1] and len(set(found)) == 3
    known = {"tokenizer": found[0], "vocabulary": lit.Tokenizer(pieces).vocabulary}
    assert lit.tokenizer_for(copy, known).identity == found[0]
    for path in (other, None):
        with pytest.raises(ValueError, match="give its sentencepiece file as --tokenizer"):
            lit.tokenizer_for(path, known)


def test_a_wrong_tokenizer_file_is_one_line_that_names_it(pieces, tmp_path, monkeypatch):
    files = {"empty": b"", "cut": Path(pieces).read_bytes()[:-3], "text": b"hello"}
    write_files(tmp_path, files | {"tar": bytes(10_240), "folder/file": b""})
    train_sentencepiece(tmp_path / "t5", unk_id=2, bos_id=-1, eos_id=1, pad_id=0)
    for name in (*files, "tar", "t5", "folder", "missing"):
        with pytest.raises(ValueError, match=f"{tmp_path}/{name} is no tokenizer") as error:
            lit.Tokenizer(f"{tmp_path}/{name}")
        one_line(error)
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    with pytest.raises(ValueError, match="pip install sentencepiece") as error:
        lit.Tokenizer(pieces)
    assert pieces in one_line(error)


# ----------------------------------------------------------------------------------------- batches


class Captioned(Memory):
    """Sample n has n % 4 captions."""

    def read(self, number):
        captions = [f"#caption {c} of {number}" for c in range(number % 4)]
        return super().read(number) | {"captions": lambda: captions}


def text_of(row):
    """The text of a row of byte tokens."""
    return bytes(token - 4 for token in row.tolist() if token >= 4).decode()


def captioned_batches(process=0, processes=1, source=None, pictures=True, context=77):
    shape = {"size": (8, 12), "channels": 3, "min_crop": 0.2} if pictures else {}
    make = partial(lit.make_pair, tokenizer=lit.Tokenizer(), context=context, **shape)
    order = data.Order(SIZES, seed=4, lanes=6)
    source = source or Captioned(SIZES)
    return data.Batches(source, make, 12, process, processes, order=order, seed=4)


def test_a_caption_is_drawn_by_a_key_of_its_own():
    order, seen = data.Order(SIZES, seed=4, lanes=6), Counter()
    batches = captioned_batches(pictures=False)
    for step in range(120):  # 29 epochs
        batch = batches[step]
        for row, position in enumerate(range(step * 12, step * 12 + 12)):
            number = order(position)
            bits = int(data.random_bits(1, 4, position // 50, position, data.CAPTION)[0])
            captions = [f"caption {c} of {number}" for c in range(number % 4)] or [""]
            text = captions[bits % len(captions)]
            assert text_of(batch["tokens"][row]) == text and batch["samples"][row] == number
            assert batch["weight"][row] == bool(text)
            seen[text] += 1
    assert len(seen) == 1 + sum(number % 4 for number in range(50))  # every caption came


def test_captions_change_nothing_else_and_images_are_opened_only_if_they_are_wanted():
    class Unopened(Captioned):
        def read(self, number):
            return super().read(number) | {"image": lambda: pytest.fail("opened")}

    batches, alone = captioned_batches(), captioned_batches(pictures=False, source=Unopened(SIZES))
    for step in STEPS:
        batch, plain = batches[step], training_batches()[step]
        same = {name: batch[name] for name in ("images", "positions", "samples", "bad")}
        same_batch(same, {name: plain[name] for name in same})
        same_batch(alone[step] | {"images": batch["images"]}, batch)


def test_samples_without_a_caption_weigh_nothing(tmp_path):
    texts = b'{"caption": ["#", "  a \\n#dog", ""]}', b"{cut", b'{"caption": "c"}'
    files = [{"json": text} for text in texts] + [{"txt": b"d\xe9"}, {}, {"txt": b" #\n"}]
    source = opened(captioned(tmp_path / "a.tar", files))
    make = partial(lit.make_pair, tokenizer=lit.Tokenizer(), context=5)
    batch = data.Batches(source, make, 8)[0]
    found = [text_of(row) for row in batch["tokens"]]
    assert found == ["a dog", "", "c", "d\ufffd", "", "", "", ""]
    assert batch["weight"].tolist() == [1, 0, 1, 1, 0, 0, 0, 0]
    assert batch["samples"].tolist() == [0, 1, 2, 3, 4, 5, -1, -1]
    assert batch["tokens"][4].tolist() == [0, 2, 1, 1, 1, 1, 1]
    (line,) = batch["bad"]
    assert "a.tar:00001" in line and "damaged" in line


# --------------------------------------------------------------------------------------- the towers

PAIRS_OF_TWO_WORLDS = """
import os
import torch
import torch.distributed as dist
import torch.nn.functional as F
from tasks import lit

rank, processes = (int(os.environ.get(name, 0)) for name in ("RANK", "WORLD_SIZE"))
if processes:
    dist.init_process_group("gloo")
lit.ROWS = 4  # several of them, the last one shorter
for left_out in ([], [0, 5, 11], range(4), range(12)):
    generator = torch.Generator().manual_seed(3)
    pairs = torch.randn(2, 12, 5, dtype=torch.float64, generator=generator)
    scale = torch.tensor([7.0], dtype=torch.float64, requires_grad=True)
    leaves = [F.normalize(x, dim=1).requires_grad_() for x in pairs]
    weight = torch.ones(12)
    weight[list(left_out)] = 0
    size = 12 // max(1, processes)
    share = slice(size * rank, size * (rank + 1))
    ours = [x.detach()[share].requires_grad_() for x in leaves]
    our_scale = scale.detach().clone().requires_grad_()
    part = lit.contrastive_loss(*ours, our_scale, weight[share])
    (3 * part).backward()  # whatever comes after it scales the gradients
    sums = torch.stack([part.detach(), our_scale.grad[0]])
    if processes:
        dist.all_reduce(sums)

    kept = weight > 0
    if not kept.any():
        assert part == 0 and not any(x.grad.any() for x in ours)
        continue
    logits = scale * leaves[0][kept] @ leaves[1][kept].T
    answers = torch.arange(len(logits))
    whole = (F.cross_entropy(logits, answers) + F.cross_entropy(logits.T, answers)) / 2
    (3 * whole).backward()
    assert (sums - torch.stack([whole.detach(), scale.grad[0]])).abs().max() < 1e-10
    for x, y in zip(ours, leaves):
        assert (x.grad - y.grad[share]).abs().max() < 1e-10
if processes:
    dist.barrier()
    dist.destroy_process_group()
"""


@pytest.mark.parametrize("processes", [None, 2, 3])
def test_the_contrastive_loss_is_that_of_the_whole_matrix(processes):
    ran = stage(processes=processes, code=PAIRS_OF_TWO_WORLDS)
    assert ran.returncode == 0, ran.stderr


def test_a_text_is_embedded_alike_alone_and_among_longer_ones():
    pair = lit.TwoTowers("16x2x2", TINY_TEXT, 8, image_size=16, patch_size=4)
    tokens = torch.randint(4, 30, (3, 9), generator=torch.Generator().manual_seed(0))
    tokens[1, 4:] = tokens[2, 1:] = lit.PADDING
    found = pair(tokens=tokens)[1]
    for row, length in enumerate((9, 4, 1)):
        alone = pair(tokens=tokens[row : row + 1, :length])[1]
        torch.testing.assert_close(alone[0], found[row])
    torch.testing.assert_close(found.norm(dim=1), torch.ones(3))
    swapped = tokens[:1, [0, 2, 1, *range(3, 9)]]  # positions count
    assert (pair(tokens=swapped)[1] - found[0]).abs().max() > 1e-4


# ---------------------------------------------------------------------------------------- measuring


def test_ranks_count_wrong_answers_that_are_as_similar():
    asked, offered = torch.randn(2, 9, 4, generator=torch.Generator().manual_seed(0)).unbind()
    offered = torch.cat([offered, offered[:2]])  # ties
    rows, answers = torch.tensor([*range(9), 0]), torch.tensor([*range(9), 3])
    found = lit.ranks_of(asked, offered, rows, answers).tolist()
    for row in range(9):
        similarity = asked[row] @ offered.T
        right = answers[rows == row]
        wrong = torch.ones(11, dtype=torch.bool).index_fill(0, right, False)
        assert found[row] == (similarity[wrong] > similarity[right].max() - 1e-6).sum()
    collapsed = torch.ones(9, 4)  # where all are alike, nothing is found
    assert lit.ranks_of(collapsed, collapsed, torch.arange(9), torch.arange(9)).min() == 8


def test_class_embeddings_average_templates_and_synonyms():
    def model(tokens):  # a text's embedding is (its length, 1), of unit length
        lengths = (tokens > 2).sum(dim=1).float()
        pair = torch.stack([lengths, torch.ones_like(lengths)], dim=1)
        return None, F.normalize(pair, dim=1), None

    model.config = {"text": {"context": 50}}
    names, templates = [["ox", "kitten"], ["\u732b"]], ("{}", "a {}!")
    found = lit.class_embeddings(model, names, templates, lit.Tokenizer(), "cpu")
    for row, lengths in zip(found, ([2, 5, 6, 9], [3, 6])):
        sums = np.sum([np.array([n, 1]) / np.hypot(n, 1) for n in lengths], axis=0)
        assert row.numpy() == pytest.approx(sums / np.linalg.norm(sums), rel=1e-6)


def test_templates_that_lack_a_place_for_the_name_are_refused(tmp_path):
    (tmp_path / "templates.txt").write_text("a {}\na photo\n")
    with pytest.raises(ValueError, match="line 2 has no {}"):
        lit.read_templates(tmp_path / "templates.txt")
    (tmp_path / "templates.txt").write_text("a {}\nthe {}\na {}\n")
    with pytest.raises(ValueError, match="line 3 repeats an earlier one"):
        lit.read_templates(tmp_path / "templates.txt")
    assert all("{}" in template for template in lit.read_templates(None))
