"""docs/troubleshooting.md: every symptom has a reproducer, and it shows the message that stands there."""

import doctest
import re
from pathlib import Path

import pytest

PAGE = Path(__file__).parents[2] / "docs" / "troubleshooting.md"
SYMPTOMS = re.findall(r"^### (.+?)\n(.*?)(?=^##|\Z)", PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize(("symptom", "text"), SYMPTOMS, ids=[symptom for symptom, _ in SYMPTOMS])
def test_every_symptom_has_a_reproducer_and_a_remedy(symptom, text):
    assert ">>> " in text
    prose = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    assert len(prose.split()) > 8


def test_the_reproducers_show_what_the_page_says():
    failed, examples = doctest.testfile(str(PAGE), module_relative=False, optionflags=doctest.ELLIPSIS)
    assert (failed, examples > 20) == (0, True)
