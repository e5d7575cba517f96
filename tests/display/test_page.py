"""The HTML page of a view is isolated from the notebook and from the text that it displays."""

import json
import re

import pytest

from falcon_kit.display.page import Page, direction, visible


@pytest.mark.parametrize("part", ["style", "script"])
def test_a_script_or_style_that_could_close_its_element_is_refused(part):
    with pytest.raises(ValueError, match="could close its element"):
        Page("title", "<p></p>", **{part: "</script>"})


def test_data_is_json_without_html(tmp_path):
    data = ["</script><!-- &lt;", "\ud800"]
    written = Page("title", "", script="root.focus()", data=data).write(tmp_path / "page.html").read_text("utf-8")
    (found,) = re.findall(r'<script type="application/json">(.*?)</script>', written)
    assert json.loads(found) == data
    assert not {"<", ">", "&"} & set(found)


def test_equal_views_have_equal_classes():
    assert Page("title", "body").scope == Page("title", "body").scope != Page("title", "another").scope


@pytest.mark.parametrize(("text", "shown"), [("a\x00", "a␀"), ("\u202e", "[U+202E]"), ("\u0301a", "◌\u0301a")])
def test_invisible_characters_have_visible_stand_ins(text, shown):
    assert visible(text) == shown


@pytest.mark.parametrize(("text", "expected"), [("1 a", "ltr"), ("1 א", "rtl"), ("", "ltr")])
def test_the_direction_is_that_of_the_first_letter(text, expected):
    assert direction(text) == expected
