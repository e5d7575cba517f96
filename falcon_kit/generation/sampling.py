"""The settings of generation, checked on creation."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

from falcon_kit.display.documented import documented
from falcon_kit.display.errors import (
    check_flag,
    check_whole,
    is_encodable,
    is_number,
    plain_scalar,
    require,
    shown,
    unknown_name,
)
from falcon_kit.display.reading import texts_by_name

MAX_SEQUENCES = 1024
"""The most texts per prompt in one call."""
MAX_STOP_CHARACTERS = 10_000
"""The most characters of all stop strings together."""
_LEAST = {"max_new_tokens": 1, "max_length": 1, "top_k": 0, "num_return_sequences": 1, "seed": 0, "alternatives": 0}
_TEMPERATURES = 1e-30, 1e30
_NAMES = texts_by_name(Path(__file__).with_name("other_names.json"))
OTHER_NAMES, _INSTEAD = _NAMES["called"], _NAMES["instead"]
"""Names of other libraries for settings that exist, and what to do instead of settings that do not."""


@documented
@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the next token is chosen and when generation stops. Settings that transformers has keep their meanings.

    For a setting that is not given, the value in the checkpoint's generation_config.json counts, as in transformers;
    `Falcon.generation_settings` returns these values.
    """

    max_new_tokens: int | None = None
    """Maximum number of new tokens; 200 unless `max_length` is given. The context of the model limits it too."""
    max_length: int | None = None
    """Maximum number of tokens of prompt and new text together, as in the model card's example."""
    do_sample: bool | None = None
    """Sample the next token, or take the most probable one. Unset: sample if temperature, top_k or top_p is given."""
    temperature: float | None = None
    """Logits are divided by it: below 1 sharpens, above 1 flattens, 0 takes the most probable token."""
    top_k: int | None = None
    """Sample from the k most probable tokens only; 0: from all."""
    top_p: float | None = None
    """Sample from the smallest set of tokens whose probabilities sum to p (Holtzman et al. 2020, arXiv 1904.09751)."""
    num_return_sequences: int = 1
    """Texts per prompt."""
    stop: str | Sequence[str] | None = ()
    """Stop strings: they end the text and are cut from it, also inside a token. A special token may be one. None: none.
    """
    seed: int | None = None
    """The same seed gives the same text, on the same machine and batch. torch's global random state does not change."""
    truncate: Literal["left"] | None = None
    """"left" drops the first tokens of a prompt that leaves too little room for the new tokens. The new tokens then get
    at most half the context, or half of `max_length`. Of a conversation it drops the oldest turns, whole, and keeps the
    system message. Unset: a prompt that leaves no room is an error."""
    alternatives: int = 0
    """Number of most probable tokens to return at each step, see `Piece.alternatives`."""

    def __post_init__(self) -> None:
        """Raises ValueError for a value out of range."""
        for name in SAMPLING_FIELDS:
            object.__setattr__(self, name, plain_scalar(getattr(self, name)))  # the dataclass is frozen
        check_flag("do_sample", self.do_sample, None)
        self._check_whole_numbers()
        self._check_numbers()
        stop_strings(self.stop)  # raises for what is none
        require(
            self.max_new_tokens is None or self.max_length is None,
            f"give max_new_tokens or max_length, not both (got {self.max_new_tokens} and {self.max_length})",
        )
        truncates = isinstance(self.truncate, str) and self.truncate == "left"
        require(self.truncate is None or truncates, f'truncate must be None or "left", got {shown(self.truncate)}')
        require(
            self.do_sample is not False or not self._sampling_is_set,
            "temperature, top_k and top_p have no effect with do_sample=False: leave them out, or set do_sample=True",
        )

    def _check_whole_numbers(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name in _LEAST and value is not field.default:
                check_whole(field.name, value, _LEAST[field.name])
        require(
            self.num_return_sequences <= MAX_SEQUENCES,
            f"num_return_sequences must be at most {MAX_SEQUENCES}, got {self.num_return_sequences}: call again, with "
            "another seed, for more",
        )

    def _check_numbers(self) -> None:
        temperature, top_p = self.temperature, self.top_p
        for name, value in {"temperature": temperature, "top_p": top_p}.items():
            is_real = isinstance(value, int | float) and not isinstance(value, bool)
            require(value is None or is_real, f"{name} must be a number, got {shown(value)}")
        require(
            temperature is None or temperature >= 0,
            f"temperature must be 0 (the most probable token) or more, got {shown(temperature)}",
        )
        require(
            not temperature or is_number(temperature, *_TEMPERATURES),
            f"temperature must be 0, or from {_TEMPERATURES[0]} to {_TEMPERATURES[1]}, which float32 can divide logits "
            f"by; got {shown(temperature)}",
        )
        require(top_p is None or 0 < top_p <= 1, f"top_p must be above 0 and at most 1, got {shown(top_p)}")

    @property
    def _sampling_is_set(self) -> bool:
        return bool(self.temperature) or (self.temperature is None and bool(self.top_k or self.top_p))

    @property
    def samples(self) -> bool:
        """Whether tokens are sampled; otherwise the most probable one is taken."""
        return self._sampling_is_set if self.do_sample is None else self.do_sample and self.temperature != 0

    @property
    def stop_strings(self) -> tuple[str, ...]:
        """`stop` as a tuple."""
        return stop_strings(self.stop)

    def generate_arguments(self) -> dict[str, Any]:
        """The arguments of transformers' `generate` that set how a token is chosen."""
        if not self.samples:
            return {"do_sample": False}
        given = {"temperature": self.temperature, "top_p": self.top_p}
        floats = {name: float(value) for name, value in given.items() if value is not None}  # whole ones are refused
        return {"do_sample": True, "top_k": self.top_k or 0, **floats}  # without top_k, transformers would take 50


SAMPLING_FIELDS = tuple(field.name for field in fields(Sampling))
"""The names of the kit's own settings; all others belong to transformers or an endpoint."""


def split_settings(settings: Mapping[str, Any]) -> tuple[Sampling, dict[str, Any]]:
    """The kit's own settings as `Sampling`, and all others. None is unset. Raises ValueError as `Sampling` does."""
    sampling = {name: value for name, value in settings.items() if name in SAMPLING_FIELDS and value is not None}
    return Sampling(**sampling), {name: value for name, value in settings.items() if name not in SAMPLING_FIELDS}


def stop_strings(stop: Any) -> tuple[str, ...]:
    """One stop string or several as a tuple; None is none. Raises ValueError for anything else, and for those that are
    empty or too long."""
    require(
        isinstance(stop, str | list | tuple | None) and all(isinstance(word, str) for word in stop or ()),
        f"stop must be a text or a list of texts, got {shown(stop)}",
    )
    words = (stop,) if isinstance(stop, str) else tuple(stop or ())
    require(all(words), "stop must not contain an empty string: it would end every text at once")
    length = sum(map(len, words))
    require(
        length <= MAX_STOP_CHARACTERS,
        f"stop has {length} characters; the limit for all stop strings together is {MAX_STOP_CHARACTERS}",
    )
    require(
        all(map(is_encodable, words)),
        "stop has a lone surrogate, which no text of a model contains: give whole characters",
    )
    return words


def unknown_setting(name: str, known: Collection[str], of: str = "") -> str:
    """The error text for a setting that nobody has: what to do instead, its name here, or the nearest of `known`.

    of: whose settings these are, as an error names it.
    """
    subject = f"setting for {of}:" if of else "setting"
    if (other := OTHER_NAMES.get(name)) in known:
        return f"Unknown {subject} {name!r}. It is called {other} here."
    return (
        f"Unknown {subject} {name!r}. {_INSTEAD[name]}." if name in _INSTEAD else unknown_name(subject, name, [*known])
    )
