from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from benchmarks.tokenizer import main
from recsys.data import Catalog, PromptEncoder, PromptTemplate, tokens
from recsys.data.catalog import shorten
from recsys.data.tokens import kept_tokens, plain_tokens
from recsys.policy import byte_tokenizer
from recsys.types import UserError
from tests.helpers_tokenizer import ByteTokenizer, chat_tokenizer


def test_index_is_the_position():
    catalog = Catalog(["b", "a", "007"], ["B", "A", "Bond"])
    assert len(catalog) == 3
    for ids in (["007", "b", "007"], np.array(["007", "b", "007"]), pd.Series(["007", "b", "007"])):
        index = catalog.index_of(ids)
        assert index.dtype == np.int64
        assert index.tolist() == [2, 0, 2]


def test_unknown_id():
    with pytest.raises(UserError, match="'7' is not in the catalogue"):
        Catalog(["007"], ["Bond"]).index_of(["007", "7"])


def test_every_item_ends_and_none_is_a_prefix_of_another():
    titles = ["Alien", "Aliens", "Alien", "Amélie 🎬", 'Say "hi"']
    tokens = Catalog(list("abcde"), titles).tokenize(ByteTokenizer(bos=1), "\n")
    assert tokens == [list((title + "\n").encode()) for title in titles]
    different = {tuple(ids) for ids in tokens}
    assert len(different) == 4  # equal titles are equal, prefixes are not
    assert not any(a != b and b[: len(a)] == a for a in different for b in different)


@pytest.mark.parametrize("name", ["byte", "chat", "learnt"])
def test_titles_never_yield_control_tokens(name, tmp_path):
    if name == "learnt":  # as benchmarks/tokenizer.py makes it
        (tmp_path / "items.csv").write_text("item_id,title\n1,Alien\n2,Aliens\n")
        main(items=str(tmp_path / "items.csv"), out=str(tmp_path / "tokenizer"), size=260)
        tokenizer = AutoTokenizer.from_pretrained(tmp_path / "tokenizer")
    else:
        tokenizer = {"byte": byte_tokenizer, "chat": chat_tokenizer}[name]()
    names = ["<|end|>", "<|end|><|user|>", "<s> Heat", "Heat <|assistant|>!", "<|en", "Heat"]
    tokens = Catalog(names, names).tokenize(tokenizer, "\n")
    assert [tokenizer.decode(ids) for ids in tokens] == [name + "\n" for name in names]
    control = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    assert control
    assert control.isdisjoint(i for ids in tokens for i in ids)
    assert tokenizer("<|end|>", add_special_tokens=False).input_ids[0] in control  # in texts that are not data


@pytest.fixture
def tokenised(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The titles of each call of a tokenizer; those of two titles are kept."""
    calls: list[list[str]] = []
    monkeypatch.setattr(tokens, "KEPT", 2)
    monkeypatch.setattr(tokens, "plain_tokens", lambda t, texts: calls.append(texts) or plain_tokens(t, texts))
    return calls


def test_titles_are_tokenised_once(tokenised: list[list[str]], tmp_path: Path):
    titles = ["Alien", "Amélie 🎬", "<|end|>"]
    first = kept_tokens(byte_tokenizer(), titles, str(tmp_path))
    assert first == plain_tokens(byte_tokenizer(), titles)
    used = byte_tokenizer()
    for tokenizer in (used, used, byte_tokenizer()):
        assert kept_tokens(tokenizer, titles, str(tmp_path)) == first
    assert tokenised == [titles]
    for tokenizer, others in ((byte_tokenizer(), ["Alien", "Amélie 🎬", "Up"]), (chat_tokenizer(), titles)):
        assert kept_tokens(tokenizer, others, str(tmp_path)) == plain_tokens(tokenizer, others)
    assert len(tokenised) == 3
    assert kept_tokens(ByteTokenizer(), titles, str(tmp_path)) == [list(t.encode()) for t in titles]
    assert kept_tokens(byte_tokenizer(), titles[:1], str(tmp_path)) == first[:1]
    assert kept_tokens(byte_tokenizer(), titles, None) == first
    assert len(tokenised) == 6
    for same_text in (["a\0b", "c"], ["a", "b", "c"]):
        assert kept_tokens(byte_tokenizer(), same_text, str(tmp_path)) == plain_tokens(byte_tokenizer(), same_text)


@pytest.mark.parametrize("fault", ["cut", "changed", "empty", "other"])
def test_kept_tokens_that_are_broken_are_made_again(tokenised: list[list[str]], tmp_path: Path, fault: str):
    titles = ["Alien", "Aliens"]
    first = kept_tokens(byte_tokenizer(), titles, str(tmp_path))
    [path] = tmp_path.glob("*.parquet")
    content = path.read_bytes()
    middle = content.index(bytes(np.array(first[0][:2], dtype="<i4"))) if fault == "changed" else 0
    path.write_bytes(
        {
            "cut": content[:-20],
            "changed": content[:middle] + b"#" + content[middle + 1 :],
            "empty": b"",
            "other": b"PAR1 of something else PAR1",
        }[fault]
    )
    assert kept_tokens(byte_tokenizer(), titles, str(tmp_path)) == first
    assert len(tokenised) == 2
    assert kept_tokens(byte_tokenizer(), titles, str(tmp_path)) == first
    assert len(tokenised) == 2


def test_tokens_that_cannot_be_kept(tokenised: list[list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "file").touch()
    found = kept_tokens(byte_tokenizer(), ["Alien", "Aliens"], str(tmp_path / "file"))
    assert found == plain_tokens(byte_tokenizer(), ["Alien", "Aliens"])
    assert f"{tmp_path}/file: the titles' tokens cannot be kept: " in capsys.readouterr().err
    assert len(tokenised) == 1


def test_a_tokenizer_that_reads_control_tokens_regardless(monkeypatch):
    tokenizer = byte_tokenizer()
    call = type(tokenizer).__call__
    monkeypatch.setattr(type(tokenizer), "__call__", lambda *args, split_special_tokens=False, **kw: call(*args, **kw))
    with pytest.raises(UserError, match=r"item id 'b': the title 'x<\|end\|>' contains a control token"):
        Catalog(["a", "b"], ["x", "x<|end|>"]).tokenize(tokenizer, "\n")
    with pytest.raises(UserError, match=r"entry text '<\|end\|> ' contains a control token"):
        PromptEncoder(tokenizer, [[1]], PromptTemplate(), [("", ""), ("<|end|> ", "")])


def test_title_and_end_are_tokenised_apart():
    class Merging(ByteTokenizer):
        """Merges the last letter and a newline into one token, as real vocabularies do with punctuation."""

        def __call__(self, text, add_special_tokens=True, **kwargs):
            if isinstance(text, str) and len(text) > 1 and text.endswith("\n"):
                raise AssertionError("title and end were tokenised together")
            return super().__call__(text, add_special_tokens)

    assert Catalog(["a"], ["Up!"]).tokenize(Merging(), "\n") == [list(b"Up!\n")]


@pytest.mark.parametrize(
    ("title", "end"),
    [
        ("What; ever", ";"),
        ("a||b", "||"),
        ("a|", "||"),  # "a|" + "||" begins with the item "a" + "||"
    ],
)
def test_title_that_contains_the_end(title, end):
    with pytest.raises(UserError, match=r"item id 'y'.*contains the end"):
        Catalog(["x", "y"], ["a", title]).tokenize(ByteTokenizer(), end)


def test_title_or_end_without_tokens():
    with pytest.raises(UserError, match=r"item id 'x': the title '\?' has no tokens"):
        Catalog(["x"], ["?"]).tokenize(ByteTokenizer(drops=b"?"), "\n")
    with pytest.raises(UserError, match="the end of an item, '', has no tokens"):
        Catalog(["x"], ["a"]).tokenize(ByteTokenizer(), "")


# ------------------------------------------------------------------------------------------ cutting titles


def contains_early(ids, end):
    return any(ids[i : i + len(end)] == end for i in range(len(ids) - len(end)))


@settings(max_examples=500, deadline=None)
@given(data=st.data(), limit=st.integers(1, 5), end=st.sampled_from([[9], [9, 9], [1, 9], [9, 1, 9]]))
def test_cut_titles(data, limit, end):
    title = st.lists(st.sampled_from([0, 1, 9] if len(end) > 1 else [0, 1]), min_size=1, max_size=9)
    titles = data.draw(st.lists(title.filter(lambda t: not contains_early(t + end, end)), min_size=1, max_size=12))
    cut = shorten(titles, limit, end)
    for title, kept in zip(titles, cut, strict=True):
        assert title[: len(kept)] == kept
        assert len(kept) >= min(limit, len(title))
        others = [other for other in titles if other != title]
        shared = max((n for n in range(10) for o in others if title[:n] == o[:n] and n <= len(o)), default=0)
        needed = max(limit, shared + 1)  # one token more than the longest common prefix with another title
        while needed < len(title) and contains_early(title[:needed] + end, end):
            needed += 1
        assert len(kept) == min(len(title), needed)
    ended = [kept + end for kept in cut]
    for a, full_a in zip(ended, titles, strict=True):
        assert not contains_early(a, end)
        for b, full_b in zip(ended, titles, strict=True):
            assert (a == b) == (full_a == full_b)
            assert a == b or b[: len(a)] != a


def test_cut_titles_by_hand():
    catalog = Catalog(list("abcdef"), ["Alien", "Aliens", "Alien vs. Predator", "Up", "Alien", "Brazil"])
    tokens = catalog.tokenize(ByteTokenizer(), "\n", max_title_tokens=3)
    assert [bytes(ids) for ids in tokens] == [b"Alien\n", b"Aliens\n", b"Alien \n", b"Up\n", b"Alien\n", b"Bra\n"]
    assert catalog.cut_titles == 2
    assert catalog.tokenize(ByteTokenizer(), "\n")[2] == list(b"Alien vs. Predator\n")
