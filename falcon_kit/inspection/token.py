"""One token of a text."""

from dataclasses import dataclass

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
