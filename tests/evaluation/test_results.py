"""Evaluations: tables, figures, files; and comparisons of two of them."""

import json
import re
from dataclasses import replace

import pytest

import falcon_kit as fk
from falcon_kit.evaluation.perplexity import Part, Perplexity
from falcon_kit.evaluation.results import PUBLISHED
from falcon_kit.evaluation.statistics import mcnemar
from falcon_kit.evaluation.task_results import TaskResult


def task(right, name="animals", kind="multiple choice", sha256="a", metric="acc", **facts):
    items = tuple({"where": f"{number}"} for number in range(len(right)))
    return TaskResult(name, kind, sha256, {metric: tuple(map(float, right))}, items, facts)


def text(nats, documents=2, tokens=10, sha256="b"):
    parts = tuple(Part(f"document {number}", tokens, 40, 8, each) for number, each in enumerate(nats))
    return Perplexity("lions", parts, sha256, documents)


def evaluation(*results, model="falconet", **settings):
    texts = tuple(each for each in results if isinstance(each, Perplexity))
    tasks = tuple(each for each in results if isinstance(each, TaskResult))
    return fk.Evaluation(model, {"settings": settings, "revision": None}, texts, tasks)


FOUR = [
    task([1, 0, 1, 1], f"{each['name']} task", "lm-eval", metric=each["metric"], leaderboard=each["name"])
    for each in PUBLISHED["tasks"]
]


def test_a_file_gives_the_same_evaluation_back(tmp_path):
    expected = evaluation(task([1, 0], chance=0.5), text([12.0, 15.0]), chat=True)
    assert fk.Evaluation.load(expected.save(tmp_path / "result.json")) == expected


def test_the_interval_of_a_probability_ends_at_1():
    found = task([0.97, 0.999, 0.999, 0.999], metric="sureness").estimate("sureness")
    assert 0.9 < found.low < found.value < found.high <= 1


def test_the_interval_of_a_difference_of_probabilities_ends_at_1():
    surest, other = (task(values, metric="sureness") for values in ([1.0, 1.0, 0.97], [0.0, 0.0, 0.0]))
    (found,) = evaluation(other).compare(evaluation(surest)).differences
    assert 0 < found.difference.low < found.difference.value < found.difference.high <= 1


@pytest.mark.parametrize(("facts", "shown"), [({"chance": 0.5}, True), ({}, False)])
def test_a_column_beside_the_values_is_there_for_what_stands_in_it(facts, shown):
    html = evaluation(task([1, 0], **facts))._repr_html_()
    assert ("beside it" in html, "chance 0.5" in html) == (shown, shown)
    assert "tokens or items" in html


@pytest.mark.parametrize(
    "content", ["", "[]", "{}", "[" * 10**5, '{"falcon_kit_evaluation": 99}', '{"falcon_kit_evaluation": 1}']
)
def test_another_file_is_no_evaluation(tmp_path, content):
    (tmp_path / "other.json").write_text(content)
    with pytest.raises(ValueError, match=r"other\.json is no evaluation that Evaluation\.save wrote"):
        fk.Evaluation.load(tmp_path / "other.json")


def test_a_damaged_field_is_named_in_one_line(tmp_path):
    file = evaluation(task([1, 0]), text([12.0, 15.0])).save(tmp_path / "result.json")
    file.write_text(file.read_text().replace('"nats": 15.0', '"nats": "many"'))
    with pytest.raises(ValueError, match=r"damaged \(perplexities\.0\.parts\.1\.nats: [^\n]*\)$"):
        fk.Evaluation.load(file)


def test_a_damaged_field_is_named_without_control_characters(tmp_path):
    file = evaluation(task([1, 0])).save(tmp_path / "result.json")
    content = json.loads(file.read_text())
    content["tasks"][0]["metrics"] = {"\x1b[2J": 7}
    file.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"damaged \(tasks\.0\.metrics\.\\x1b\[2J: "):
        fk.Evaluation.load(file)


def test_the_table_has_a_row_for_each_value():
    frame = evaluation(task([1, 0, 1], chance=0.5), text([12.0, 15.0])).to_dataframe()
    assert list(frame["metric"]) == ["per_token", "per_byte", "per_word", "bits_per_byte", "bytes_per_token", "acc"]
    accuracy = frame[frame["metric"] == "acc"].iloc[0]
    assert (accuracy["value"], accuracy["count"], accuracy["chance"]) == (2 / 3, 3, 0.5)
    assert accuracy["low"] < 2 / 3 < accuracy["high"]


def test_the_perplexity_is_one_or_by_name():
    one, other = text([12.0, 15.0]), replace(text([9.0, 9.0]), name="bears")
    assert evaluation(one).perplexity == one
    assert evaluation(one, other).perplexity == {"lions": one, "bears": other}
    with pytest.raises(ValueError, match=r"no text was given: fk\.evaluate"):
        _ = evaluation(task([1])).perplexity


def test_an_unknown_task_is_a_key_error():
    with pytest.raises(KeyError, match=r"Unknown task 'animal'\. Nearest: animals"):
        evaluation(task([1]))["animal"]


def test_the_published_average_stands_beside_the_measured_one_of_four_tasks():
    rows = list(evaluation(*FOUR, model="tiiuae/falcon-40b-instruct").rows())
    assert (rows[-1]["name"], rows[-1]["value"], rows[-1]["published"]) == ("leaderboard average", 75.0, 63.2)
    assert evaluation(*FOUR[:3]).leaderboard is None


def test_a_html_table_escapes_names():
    html = evaluation(task([1, 0], name="<b>animals"), text([12.0, 15.0]), model="<i>falcon")._repr_html_()
    assert "&lt;b&gt;animals" in html
    assert ("<i>falcon" in html, "&lt;i&gt;falcon" in html) == (False, True)


@pytest.mark.parametrize("results", [[task([1, 0])], [text([12.0, 15.0])], [task([1, 0]), text([12.0])], FOUR])
def test_a_figure_shows_every_share_and_text(results):
    figure = evaluation(*results).figure()
    labels = [label.get_text() for axes in figure.axes for label in axes.get_yticklabels()]
    for each in results:
        assert any((each.task if isinstance(each, TaskResult) else each.name) in label for label in labels)
    assert ("falcon-40b-instruct, published" in labels) == (results == FOUR)


def test_a_figure_shows_every_metric_from_0_to_1_and_others_where_there_is_nothing_else():
    def labels(*results):
        return [[each.get_text() for each in axes.get_yticklabels()] for axes in evaluation(*results).figure().axes]

    bleu = replace(task([1, 0], metric="f1"), totals={"bleu": 21.5})
    assert labels(bleu) == [["animals, f1"]]
    assert labels(replace(bleu, metrics={})) == [["animals, bleu"]]


def test_the_published_figures_are_those_of_the_blog():
    assert PUBLISHED["averages"] == {
        "falcon-40b-instruct": 63.2,
        "falcon-40b": 60.4,
        "falcon-7b": 48.8,
        "falcon-7b-instruct": 48.4,
    }


# Comparisons


def test_equal_results_show_no_difference():
    one = evaluation(task([1, 0, 1, 1]), text([12.0, 15.0]))
    comparison = one.compare(one)
    assert [each.p_value for each in comparison.differences] == [1.0, 1.0]
    assert {each.verdict for each in comparison.differences} == {"no difference can be shown"}
    assert "no difference can be shown" in comparison._repr_html_()


def test_accuracy_is_compared_by_mcnemars_test():
    first, second = [1] * 3 + [0] * 12 + [1] * 20, [0] * 3 + [1] * 12 + [1] * 20
    (found,) = evaluation(task(first)).compare(evaluation(task(second))).differences
    assert (found.p_value, found.test) == (mcnemar(3, 12), "McNemar, exact")
    assert found.verdict == "the second is higher"
    assert found.difference.value == pytest.approx(9 / 35)


def test_texts_are_compared_by_document():
    first, second = text([10.0 + number for number in range(8)], 8), text([11.0 + number for number in range(8)], 8)
    (found,) = evaluation(first).compare(evaluation(second)).differences
    assert (found.test, found.count, found.p_value) == ("sign flips", 8, 2 / 2**8)
    assert found.difference.value == pytest.approx(found.second - found.first)


def test_documents_are_compared_also_if_the_tokenizers_cut_them_differently():
    nats = [11.0 + number for number in range(8)]
    first, second, other = text([10.0 + number for number in range(8)], 8), text(nats, 8), text(nats, 8, tokens=11)
    found = evaluation(first).compare(evaluation(other)).differences
    assert found == evaluation(first).compare(evaluation(second)).differences


def test_a_metric_with_nan_is_not_comparable():
    first, second = evaluation(task([0.5, 0.25, 0.5])), evaluation(task([0.5, float("nan"), 0.5]))
    (found,) = first.compare(second).differences
    assert (found.verdict, found.p_value != found.p_value) == ("not comparable", True)


def test_another_dtype_and_other_weights_of_the_same_name_are_shown():
    one, two = (
        replace(evaluation(task([1])), record={"dtype": dtype, "chat format": "hub", "fingerprint": hash})
        for dtype, hash in (("float32", "a"), ("nf4", "b"))
    )
    found = one.compare(two)
    assert found.settings == {"dtype": ("float32", "nf4"), "fingerprint": ("a", "b")}
    assert "dtype: 'float32' and 'nf4'" in repr(found)
    assert one.compare(replace(two, model="other")).settings == {"dtype": ("float32", "nf4")}


def test_the_interval_of_the_leaderboards_average_ends_at_100():
    right = [replace(each, metrics=dict.fromkeys(each.metrics, (1.0,) * 4)) for each in FOUR]
    assert evaluation(*right).leaderboard.high == 100


def test_other_settings_are_shown():
    one, two = evaluation(task([1]), chat=True, limit=1), evaluation(task([1]), chat=False, limit=1)
    assert one.compare(two).settings == {"chat": (True, False)}


@pytest.mark.parametrize(
    ("first", "second", "problem"),
    [
        (task([1]), task([1], sha256="other"), "the items of 'animals' differ between the two evaluations"),
        (text([9.0, 8.0]), text([9.0, 8.0], sha256="other"), "the items of 'lions' differ"),
        (task([1]), task([1], name="birds"), "only the first evaluation has the tasks animals"),
        (text([9.0]), task([1]), "only the second evaluation has the tasks animals"),
        (text([9.0], 1), text([9.0], 1, tokens=11), "cut the text 'lions' differently, so blocks cannot be paired"),
    ],
)
def test_what_cannot_be_paired_is_refused(first, second, problem):
    with pytest.raises(ValueError, match=re.escape(problem)):
        evaluation(first).compare(evaluation(second))


def test_nothing_cannot_be_compared():
    with pytest.raises(ValueError, match="nothing to compare"):
        evaluation().compare(evaluation())


def test_a_comparison_is_a_table():
    frame = evaluation(task([1, 0])).compare(evaluation(task([1, 1]))).to_dataframe()
    assert list(frame["difference"]) == [0.5]
    assert json.loads(frame.to_json())["verdict"] == {"0": "no difference can be shown"}
