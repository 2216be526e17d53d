import numpy as np
import pytest

from recsys.data import Histories, PromptEncoder, PromptTemplate
from recsys.types import UserError
from tests.helpers_tokenizer import ByteTokenizer

TITLES = ["Alien\n", "Up\n", "Brazil\n", "M\n"]
ITEMS = [list(title.encode()) for title in TITLES]


def encoder(template="Seen:\n{history}Next: ", tokenizer=None, **kwargs):
    return PromptEncoder(tokenizer or ByteTokenizer(), ITEMS, PromptTemplate(template, **kwargs))


def test_joins_text_and_titles_and_says_where_titles_start():
    prompt = encoder().encode(np.array([2, 0, 2]))
    assert bytes(prompt.tokens) == b"Seen:\nBrazil\nAlien\nBrazil\nNext: "
    assert prompt.history == [2, 0, 2]
    assert [bytes(prompt.tokens[s:]).split(b"\n")[0] for s in prompt.starts] == [b"Brazil", b"Alien", b"Brazil"]


def test_text_before_the_history_may_be_all_there_is_around_it():
    assert bytes(encoder("Seen: {history}").encode(np.array([3])).tokens) == b"Seen: M\n"


def test_bos_comes_first_exactly_if_the_tokenizer_adds_one():
    assert encoder("a{history}", ByteTokenizer(bos=1)).encode(np.array([3])).tokens == [1, *b"aM\n"]
    assert encoder("\x01a{history}", ByteTokenizer(bos=1)).encode(np.array([3])).tokens == [1, *b"aM\n"]  # in the text
    only_bos = encoder("{history}", ByteTokenizer(bos=1)).encode(np.array([3]))
    assert (only_bos.tokens, only_bos.starts) == ([1, *b"M\n"], [1])


def test_no_token_before_the_history():
    with pytest.raises(UserError, match="needs some text before"):
        encoder("{history} end")


def test_newest_titles_are_kept():
    assert encoder(max_history=2).encode(np.array([0, 1, 2, 3])).history == [2, 3]


@pytest.mark.parametrize(("max_tokens", "kept"), [(24, [1, 2, 3]), (23, [2, 3]), (21, [2, 3]), (20, [3])])
def test_only_whole_titles_are_kept(max_tokens, kept):
    """12 tokens of text, then from the newest: 2 (M), 7 (Brazil) = 21, 3 (Up) = 24, 6 (Alien) = 30."""
    prompt = encoder(max_tokens=max_tokens).encode(np.array([0, 1, 2, 3]))
    assert prompt.history == kept
    assert len(prompt.tokens) <= max_tokens


def test_a_title_that_does_not_fit_hides_older_ones_that_would():
    assert encoder(max_tokens=24).encode(np.array([3, 0, 2])).history == [2]


def test_longest_title_must_fit():
    encoder(max_tokens=19)
    with pytest.raises(UserError, match=r"max_tokens=18 leaves 6 tokens.*longest has 7: 'Brazil.n'"):
        encoder(max_tokens=18)


def test_empty_history_gives_the_text_alone():
    prompt = encoder().encode(np.array([], dtype=np.int64))
    assert (bytes(prompt.tokens), prompt.history, prompt.starts) == (b"Seen:\nNext: ", [], [])


@pytest.mark.parametrize("template", ["no place", "{history} and {history}", ""])
def test_template_must_have_one_place(template):
    with pytest.raises(UserError, match="exactly once"):
        PromptTemplate(template)


def test_other_braces_in_the_template_are_text():
    assert bytes(encoder('{"a": {}} {history}').encode(np.array([3])).tokens) == b'{"a": {}} M\n'


def test_max_history_must_be_positive():
    with pytest.raises(UserError, match="max_history"):
        PromptTemplate(max_history=0)


@pytest.mark.parametrize("limits", [{}, {"max_tokens": 30}, {"max_history": 3}, {"max_tokens": 25, "max_history": 3}])
def test_lengths_agree_with_encode(limits):
    rng = np.random.default_rng(0)
    histories = Histories(rng.integers(0, 5, 100), rng.integers(0, 4, 100), np.arange(100))
    subject = encoder(**limits)
    prompts = [subject.encode(histories.history(row, 1000)) for row in histories.train]
    assert subject.lengths(histories, histories.train).tolist() == [len(prompt.tokens) for prompt in prompts]
    assert len({len(prompt.history) for prompt in prompts}) > 2
