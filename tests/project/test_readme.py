"""The README's code runs, and its figures are those of the model cards and of the last benchmark run."""

import json
import re
from pathlib import Path

import pytest

from falcon_kit.catalogue.names import embedded_directory
from falcon_kit.display.tables import format_bytes
from falcon_kit.falconet import corpus
from falcon_kit.tuning.settings import Tuning
from tests.project.notebook_memory import shorten

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()


def figures_of(benchmark):
    return json.loads((ROOT / f"benchmarks/results/{benchmark}.json").read_text())["figures"]


def table_rows(text, columns):
    """Rows of the tables with `columns` columns: {first cell: the other cells}."""
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:2] == "| "]
    return {row[0]: row[1:] for row in rows if len(row) == columns and row[0]}


def test_the_readmes_code_runs_as_it_stands(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for owner, name in ((Tuning, "for_model"), (corpus, "documents")):  # for the original to come back
        monkeypatch.setattr(owner, name, getattr(owner, name))
    shorten()
    names: dict[str, object] = {}
    for block in re.findall(r"```python\n(.*?)```", README, re.DOTALL):
        exec(block, names)  # noqa: S102  # our own page
    assert "Giraffes eat acacia leaves." in capsys.readouterr().out
    assert (tmp_path / "runs/mine/adapter").is_dir()


def test_the_chinese_readme_has_the_same_code_and_notebooks_and_no_broken_link():
    chinese = (ROOT / "README.zh-CN.md").read_text(encoding="utf-8")
    for pattern in (r"```(?:python|sh)\n.*?```", r"\]\(notebooks/[\w.]+\)"):
        assert set(re.findall(pattern, README, re.DOTALL)) == set(re.findall(pattern, chinese, re.DOTALL))
    links = re.findall(r"\]\((?!https?:)([^)#]+)\)", chinese)
    assert [link for link in links if not (ROOT / link).exists()] == []


def test_the_chinese_readme_lists_as_many_things_as_the_english_one():
    chinese = (ROOT / "README.zh-CN.md").read_text(encoding="utf-8")
    for each in (r"^- \*\*", r"^\| \[\d", r"^!\[.*(?=docs/)"):
        assert len(re.findall(each, chinese, re.MULTILINE)) == len(re.findall(each, README, re.MULTILINE))


@pytest.mark.parametrize(("name", "column"), [("falconet", 0), ("falconet-instruct", 1)])
def test_the_readme_states_the_figures_of_the_model_card(name, column):
    card = table_rows((embedded_directory(name) / "README.md").read_text(), columns=2)
    shown = table_rows(README, columns=3)
    assert len(card) == 8
    assert {row: [shown[row][column]] for row in card} == card


def test_the_readme_states_the_figures_of_the_last_benchmark():
    figures = figures_of("generation")
    ratios = figures["ratio to transformers generate"]
    expected = {way: [f"{ms:.2f}", f"{ratios[way]:.2f}"] for way, ms in figures["ms per token"].items()}
    shown = table_rows(README, columns=3)
    assert {way: shown[way] for way in expected} == expected


def test_the_readme_states_the_decoding_times_of_the_last_benchmark():
    cells = {f"{cell['batch']} x {cell['context']} tokens": cell for cell in figures_of("decode")["decode"]}
    shown = {row: cells for row, cells in table_rows(README, columns=6).items() if " x " in row}
    assert len(shown) == 4
    for row, stated in shown.items():
        times = [f"{cells[row]['ms per step'][name]:.0f}" for name in ("transformers", "kit", "llama.cpp")]
        sizes = [format_bytes(cells[row]["cache bytes"][name]) for name in ("transformers", "kit")]
        assert stated == times + sizes


def test_the_readme_states_the_times_of_each_dtype_on_a_cpu():
    peers = ["llama.cpp bfloat16", "llama.cpp q8_0", "llama.cpp q4_0"]
    names = ["transformers bfloat16", "kit bfloat16", "kit int8", "kit int4", *peers]
    expected = {}
    for instructions, label in {"all": "", "AVX2": " (AVX2)"}.items():
        for work, ms in figures_of("cpu")["ms by instructions"][instructions]["ms"].items():
            row = work.removeprefix("one step of ").replace(" x 512", " x 512 tokens") + label
            times = [ms.get(name) for name in names]
            expected[row] = ["" if each is None else f"{each:.{int(each < 100)}f}" for each in times]
    assert {row: cells for row, cells in table_rows(README, columns=8).items() if row != "ms"} == expected


def test_the_readme_states_the_memory_of_the_last_inspection_benchmark():
    names = ("kit", "forward pass", "output_attentions", "nnsight")
    expected = {
        f"{each['tokens']} tokens": [f"{each['peak MiB'][name]:.0f}" for name in names]
        for each in figures_of("inspection")["lengths"]
    }
    assert {row: cells for row, cells in table_rows(README, columns=5).items() if row.endswith(" tokens")} == expected


def test_the_readme_states_the_decoding_times_of_the_last_run_on_a_gpu():
    expected = {}
    for part, label in (("7B, bfloat16", "7B"), ("slice of the 40B, bfloat16", "41 layers of the 40B")):
        expected |= _gpu_rows(figures_of("gpu")[part], f"{label} x {{}}")
    expected |= _gpu_rows(figures_of("gpu")["7B, bfloat16, compiled"], "7B x {}, compiled")
    shown = table_rows(README, columns=5)
    assert {row: shown[row] for row in expected} == expected
    assert figures_of("gpu")["slice of the 40B, bfloat16"]["layers"] == 41


def _gpu_rows(part, label):
    rows = {}
    for name, kit in part["decode"].items():
        if name.startswith("kit, batch "):
            batch = name.removeprefix("kit, batch ")
            theirs = part["decode"][f"transformers, batch {batch}"]
            fits = theirs.get("fits", True)
            times = [f"{theirs['ms per step']:.1f}" if fits else "does not fit", f"{kit['ms per step']:.1f}"]
            ratio = f"{part['ratios'][f'batch {batch}']:.2f}" if fits else ""
            rows[label.format(batch)] = [*times, ratio, f"{kit['share of the bandwidth']:.0%}"]
    return rows


def test_the_readme_states_the_ratios_of_the_last_tuning_benchmark():
    figures = figures_of("tuning")
    formats = {"kit's tokens/s, as a ratio": ".1f", "kit's memory, as a ratio": ".2f"}
    formats["kit's held-out loss, difference"] = "+.2f"
    peers = figures["kit's memory, as a ratio"]
    expected = {peer: [format(figures[name][peer], spec) for name, spec in formats.items()] for peer in peers}
    assert {row: cells for row, cells in table_rows(README, columns=4).items() if row != "peer"} == expected


def test_the_readme_states_how_far_plans_were_off():
    figures = figures_of("planning")
    median, worst = figures["off by, median"]["peak"], figures["off by, at most"]["peak"]
    assert f"{len(figures['rows'])} cells" in README
    assert f"{median:.1%} in the median and by {worst:.1%} at most" in README
    assert figures["off by, at most"]["weights"] == figures["off by, at most"]["cache"] == 0


def test_the_readme_states_how_the_playground_keeps_up():
    speeds = figures_of("playground")["tokens per second"]
    assert all(speeds[f"paced at {pace}"]["ratio"] > 0.99 for pace in (50, 100))
    assert f"{speeds['falconet']['bare loop']:.0f} tokens/s it reaches {speeds['falconet']['ratio']:.2f}" in README


def test_the_readme_states_the_ratios_of_the_last_evaluation_benchmark():
    figures, text = figures_of("evaluation"), " ".join(README.split())
    of_the_loop, harness = figures["kit takes, of the bare loop"], "lm-eval takes so many times the kit's time"
    assert f"takes {of_the_loop:.2f} times as long as a bare loop" in text
    assert f"takes {figures[harness]:.1f} times as long as the kit" in text


def test_every_link_of_the_readme_leads_to_a_file():
    links = re.findall(r"\]\((?!https?:)([^)]+)\)", README)
    assert [link for link in links if not (ROOT / link).exists()] == []
