"""The checks of notebook 03, The tokenizer."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from falcon_kit.exercises.outcome import expect, near

SENTENCE = "Falconers photographed a kestrel hovering above the motorway."


def exercise_1(words: Sequence[str], tokenizer: Any) -> str:
    """A list of words, and the tokenizer: fk.check("03.1", split_words, tokenizer)."""
    from falcon_kit.inspection.tokens import tokens

    expect(not isinstance(words, str), "Give a list of words, not one string.")
    spans = [token.span for token in tokens(SENTENCE, tokenizer).tokens]
    every = list(re.finditer(r"\w+", SENTENCE))
    whole = {word[0] for word in every if any(a <= word.start() and word.end() <= b for a, b in spans)}
    given = {word.strip() for word in words}
    strangers = sorted(given - {word[0] for word in every})
    expect(not strangers, f"{strangers[:3]} are no words of the sentence: give whole words, not their pieces.")
    expect(
        not given & whole, f"{sorted(given & whole)} are one token each. (A space before a word belongs to its token.)"
    )
    missing = len(every) - len(whole) - len(given)
    expect(missing == 0, f"{missing} more words are split: compare each word with the spans of the tokens.")
    return f"{len(given)} of {len(every)} words are split: the vocabulary was learned from other texts."


def exercise_2(sentences: Sequence[str], tokenizer: Any) -> str:
    """A list of five sentences, and the tokenizer: fk.check("03.2", sentences, tokenizer)."""
    from falcon_kit.inspection.languages import compare_tokens, sample_texts

    expect(not isinstance(sentences, str), "Give a list of sentences, not one string.")
    english = list(sample_texts()["English"])
    same = sum(mine == theirs for mine, theirs in zip(sentences, english, strict=False))
    expect(same == 0, f"{same} of the sentences are the English ones: translate them.")
    expect(len(sentences) == len(english), f"Translate all {len(english)} sentences: you gave {len(sentences)}.")
    parity = compare_tokens({"English": english, "yours": list(sentences)}, tokenizer).parity("yours")
    expect(parity > 0.3, "Your sentences are too short to be translations.")
    return f"Your language takes {parity:.2f} times as many tokens as English for the same content."


def exercise_3(shares: Mapping[str, float], tokenizer: Any) -> str:
    """Two shares from 0 to 1, and the tokenizer: fk.check("03.3", {"spaces": ..., "tabs": ...}, tokenizer)."""
    from falcon_kit.inspection.languages import sample_texts
    from falcon_kit.inspection.tokens import tokens

    code, measured = str(sample_texts()["Python"]), {}
    for name, text in {"spaces": code, "tabs": code.replace("    ", "\t")}.items():
        pieces, given = [token.text for token in tokens(text, tokenizer).tokens], float(shares[name])
        right = measured[name] = sum(not piece.strip() for piece in pieces) / len(pieces)
        touching = sum(piece != piece.strip() for piece in pieces) / len(pieces)
        characters = sum(each.isspace() for each in text) / len(text)
        expect(not near(given, 100 * right), f"{name}: that is the share in percent: divide it by 100.")
        expect(near(given, right) or not near(given, touching), f"{name}: count tokens of *only* white space.")
        expect(near(given, right) or not near(given, characters), f"{name}: count tokens, not characters.")
        expect(near(given, right), f"{name}: divide the tokens without text by all {len(pieces)} tokens.")
    less = "less" if measured["tabs"] < measured["spaces"] else "no less"
    shares_of_both = f"{measured['spaces']:.1%} with spaces and {measured['tabs']:.1%} with tabs"
    return f"{shares_of_both}: for this tokenizer, {less} of the context is white space with tabs."
