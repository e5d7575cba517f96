"""One token: of a text, and by itself."""

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

Bytes = bytes  # the type, for classes with a field of the same name


@dataclass(frozen=True)
class Token:
    """One token of a text."""

    id: int
    text: str
    """The characters of the text that it contains; a character of which it contains only some bytes is included."""
    bytes: Bytes
    """The bytes of the UTF-8 text that it contains."""
    span: tuple[int, int]
    """Its character offsets in the text: the first character, and the one after the last."""
    special: bool
    """Whether it is a special token, such as the end-of-sequence token."""

    @property
    def partial(self) -> bool:
        """Whether it contains only some bytes of a character."""
        return self.bytes != self.text.encode()


def token_text(tokenizer: Any, token: int) -> str:
    """The text of a token by itself; bytes that are a part of a character are written as in Python: "\\xe4\\xbd"."""
    text = str(tokenizer.decode([token]))
    name = tokenizer.convert_ids_to_tokens(token) if "\ufffd" in text else ""
    return token_bytes(name).decode(errors="backslashreplace") if name and alphabet().keys() >= {*name} else text


def quoted(text: str) -> str:
    """The text of a token in quotes, as `repr`, which would double the backslash of bytes."""
    return repr(text).replace("\\\\x", "\\x")


def token_bytes(name: str) -> bytes:
    """The bytes of a token, from its name in the vocabulary: "Ġa" is b" a". Raises ValueError if it has none."""
    try:
        return bytes(alphabet()[symbol] for symbol in name)
    except KeyError:
        raise ValueError(f"token {name!r} does not consist of bytes: give a byte-level tokenizer") from None


@lru_cache(maxsize=1)
def alphabet() -> dict[str, int]:
    """The 256 characters that stand for bytes in a byte-level vocabulary, with their bytes."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    return {symbol: byte for byte, symbol in bytes_to_unicode().items()}
