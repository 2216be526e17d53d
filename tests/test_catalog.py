import numpy as np
import pandas as pd
import pytest

from recsys.data import Catalog
from recsys.types import UserError
from tests.helpers_tokenizer import ByteTokenizer


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


def test_title_and_end_are_tokenised_apart():
    class Merging(ByteTokenizer):
        """Merges the last letter and a newline into one token, as real vocabularies do with punctuation."""

        def __call__(self, text, add_special_tokens=True):
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
