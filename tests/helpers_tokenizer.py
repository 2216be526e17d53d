"""A stand-in for a ``transformers`` tokenizer: one token per UTF-8 byte."""

from types import SimpleNamespace


class ByteTokenizer:
    """Token ids are byte values, minus the bytes in ``drops``; with ``bos`` it starts each text with that id."""

    def __init__(self, bos=None, drops=b""):
        self.bos_token_id = bos
        self.drops = drops

    def __call__(self, text, add_special_tokens=True):
        texts = [text] if isinstance(text, str) else text
        bos = [self.bos_token_id] if add_special_tokens and self.bos_token_id is not None else []
        ids = [bos + [b for b in t.encode() if b not in self.drops] for t in texts]
        return SimpleNamespace(input_ids=ids[0] if isinstance(text, str) else ids)

    def decode(self, ids):
        return bytes(ids).decode()
