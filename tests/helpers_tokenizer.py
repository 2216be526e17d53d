"""Tokenizers with one token per UTF-8 byte: a stand-in for one of ``transformers``, and a real one that can chat."""

from types import SimpleNamespace

from tokenizers.processors import TemplateProcessing

from recsys.policy import byte_tokenizer

CHAT_FORMAT = (
    "{{ bos_token }}{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def chat_tokenizer(chat_format=CHAT_FORMAT):
    """A byte-level tokenizer that starts each text with <s>, as its chat format does, and has a token for each role."""
    tokenizer = byte_tokenizer()
    roles = [f"<|{role}|>" for role in ("system", "user", "assistant")]
    tokenizer.add_special_tokens({"bos_token": "<s>", "additional_special_tokens": roles})
    bos = ("<s>", tokenizer.bos_token_id)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[bos])
    tokenizer.chat_template = chat_format
    return tokenizer


class ByteTokenizer:
    """Token ids are byte values, minus the bytes in ``drops``; with ``bos`` it starts each text with that id."""

    def __init__(self, bos=None, drops=b""):
        self.bos_token_id = bos
        self.drops = drops

    def __call__(self, text, add_special_tokens=True, split_special_tokens=False):
        texts = [text] if isinstance(text, str) else text
        bos = [self.bos_token_id] if add_special_tokens and self.bos_token_id is not None else []
        ids = [bos + [b for b in t.encode() if b not in self.drops] for t in texts]
        return SimpleNamespace(input_ids=ids[0] if isinstance(text, str) else ids)

    def decode(self, ids):
        return bytes(ids).decode()
