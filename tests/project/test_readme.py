"""The README's code runs; its figures and those of benchmarks/README.md are of the last benchmark run."""

import json
import re
from pathlib import Path

import pytest

from falcon_kit.display.tables import format_bytes
from falcon_kit.falconet import corpus
from falcon_kit.tuning.settings import Tuning
from tests.project.notebook_memory import shorten

ROOT = Path(__file__).parents[2]
PAGES = {
    name: (ROOT / name).read_text(encoding="utf-8")
    for name in ("README.md", "docs/features.md", "benchmarks/README.md")
}
README, FEATURES, BENCHMARKS = PAGES.values()
CHINESE = {"README.zh-CN.md": README, "docs/features.zh-CN.md": FEATURES}
"""Each translation, with the page that it translates."""


def figures_of(benchmark):
    return json.loads((ROOT / f"benchmarks/results/{benchmark}.json").read_text())["figures"]


def table_rows(text, columns):
    """Rows of the tables with `columns` columns: {first cell: the other cells}."""
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:2] == "| "]
    return {row[0]: row[1:] for row in rows if len(row) == columns and row[0]}


def section(benchmark):
    """The section of benchmarks/README.md whose heading names a benchmark."""
    return next(each for each in BENCHMARKS.split("\n## ") if f"`{benchmark}`" in each.splitlines()[0])


def sentence(benchmark):
    return " ".join(section(benchmark).split())


# The pages


@pytest.mark.filterwarnings("ignore:.*conversations are cut")  # the shortened runs have rows of 64 tokens
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


@pytest.mark.parametrize("page", [*PAGES, *CHINESE])
def test_every_link_leads_to_a_file(page):
    links = re.findall(r"\]\((?!https?:)([^)#]+)[^)]*\)", (ROOT / page).read_text(encoding="utf-8"))
    assert [link for link in links if not ((ROOT / page).parent / link).exists()] == []


@pytest.mark.parametrize("page", CHINESE)
def test_a_chinese_page_has_the_same_code_and_notebooks(page):
    chinese = (ROOT / page).read_text(encoding="utf-8")
    for pattern in (r"```(?:python|sh)\n.*?```", r"notebooks/\w+\.ipynb", r"`FALCON_KIT_\w+`"):
        found = [set(re.findall(pattern, text, re.DOTALL)) for text in (chinese, CHINESE[page])]
        assert found[0] == found[1]


@pytest.mark.parametrize("page", CHINESE)
def test_a_chinese_page_lists_as_many_things_as_the_english_one(page):
    chinese = (ROOT / page).read_text(encoding="utf-8")
    for each in (r"^- \*\*", r"^\| (?!---)", r"^!\[.*(?=docs/)", "^## "):
        assert len(re.findall(each, chinese, re.MULTILINE)) == len(re.findall(each, CHINESE[page], re.MULTILINE))


def test_every_benchmark_is_on_the_page_of_benchmarks():
    names = [file.stem for file in (ROOT / "benchmarks").glob("[a-z]*.py")]
    assert [name for name in names if f"`{name}`" not in BENCHMARKS] == []


# The figures


@pytest.mark.parametrize("page", ["README.md", "README.zh-CN.md"])
def test_the_readme_states_the_figures_of_the_last_benchmarks(page):
    decode = {(each["batch"], each["context"]): each for each in figures_of("decode")["decode"]}
    one, many, cache = decode[1, 512]["ms per step"], decode[16, 2000]["ms per step"], decode[16, 2000]["cache bytes"]
    gpu = figures_of("gpu")["slice of the 40B, bfloat16"]["decode"]
    token = figures_of("generation")["ms per token"]
    peak = next(each for each in figures_of("inspection")["lengths"] if each["tokens"] == 2048)["peak MiB"]
    tuned, cold = figures_of("tuning")["medians"], figures_of("cold_start")["seconds of the processor"]
    prompts = figures_of("batches")["seconds"]
    expected = [
        (f"{one['kit']:.0f} ms", one["transformers"], one["llama.cpp"]),
        (f"{many['kit']:.0f} ms", many["transformers"], many["llama.cpp"]),
        (format_bytes(cache["kit"]), format_bytes(cache["transformers"])),
        (f"{gpu['kit, batch 8']['ms per step']:.1f} ms", f"{gpu['transformers, batch 8']['ms per step']:.1f}"),
        (f"{token['kit generate']:.2f} ms", f"{token['transformers generate']:.2f}"),
        (f"{peak['kit']:.0f} MiB", peak["output_attentions"], peak["nnsight"]),
        (f"{tuned['kit']['tokens per second']:.0f}", tuned["SFTTrainer, packing"]["tokens per second"]),
        (f"{prompts['kit, batches of 8']} s", f"{prompts['transformers, batches of 8']}"),
        (f"{cold['kit']:.1f} s", f"{cold['transformers pipeline']:.1f}"),
    ]
    text = (ROOT / page).read_text(encoding="utf-8")
    shown = [cells for cells in table_rows(text, columns=3).values() if cells[0][0].isdigit()]
    assert [kit for kit, _ in shown] == [kit for kit, *_ in expected]
    for (_, peers), (_, *theirs) in zip(shown, expected, strict=True):
        assert re.findall(r"\d[\d.]*(?: GiB)?", peers) == [
            each if isinstance(each, str) else f"{each:.0f}" for each in theirs
        ]


def test_the_page_states_the_times_of_generation():
    figures = figures_of("generation")
    ratios = figures["ratio to transformers generate"]
    expected = {way: [f"{ms:.2f}", f"{ratios[way]:.2f}"] for way, ms in figures["ms per token"].items()}
    assert table_rows(section("generation"), columns=3).items() >= expected.items()


def test_the_page_states_the_times_of_many_prompts():
    seconds = figures_of("batches")["seconds"]
    peers, ways = ("transformers", "kit"), ("one at a time", "batches of 8")
    expected = {way: [str(seconds[f"{peer}, {way}"]) for peer in peers] for way in ways}
    assert table_rows(section("batches"), columns=3).items() >= expected.items()


def test_the_page_states_the_decoding_times():
    cells = {f"{cell['batch']} x {cell['context']} tokens": cell for cell in figures_of("decode")["decode"]}
    shown = {row: cells for row, cells in table_rows(section("decode"), columns=6).items() if " x " in row}
    assert len(shown) == 4
    for row, stated in shown.items():
        times = [f"{cells[row]['ms per step'][name]:.0f}" for name in ("transformers", "kit", "llama.cpp")]
        sizes = [format_bytes(cells[row]["cache bytes"][name]) for name in ("transformers", "kit")]
        assert stated == times + sizes


def test_the_page_states_the_share_of_the_bandwidth_of_one_text():
    share = figures_of("decode")["decode"][0]["share of bandwidth"]["kit"]
    assert f"{share:.0%} of the memory's bandwidth" in sentence("decode")


def test_the_page_states_the_times_of_each_dtype_on_a_cpu():
    peers = ["llama.cpp bfloat16", "llama.cpp q8_0", "llama.cpp q4_0"]
    names = ["transformers bfloat16", "kit bfloat16", "kit int8", "kit int4", *peers]
    expected = {}
    for instructions, label in {"all": "", "AVX2 and VNNI": " (AVX2 and VNNI)", "AVX2": " (AVX2)"}.items():
        for work, ms in figures_of("cpu")["ms by instructions"][instructions]["ms"].items():
            row = work.removeprefix("one step of ").replace(" x 512", " x 512 tokens") + label
            times = [ms.get(name) for name in names]
            expected[row] = ["" if each is None else f"{each:.{int(each < 100)}f}" for each in times]
    shown = table_rows(section("cpu"), columns=8)
    assert {row: cells for row, cells in shown.items() if row != "ms"} == expected


def test_the_page_states_the_memory_and_time_of_inspection():
    names = ("kit", "forward pass", "output_attentions", "nnsight")
    expected = {
        f"{each['tokens']} tokens": [
            *(f"{each['peak MiB'][name]:.0f}" for name in names),
            f"{each['kit takes, of a forward pass']:.2f}",
        ]
        for each in figures_of("inspection")["lengths"]
    }
    shown = table_rows(section("inspection"), columns=6)
    assert {row: cells for row, cells in shown.items() if row.endswith(" tokens")} == expected


def test_the_page_states_the_decoding_times_of_the_last_run_on_a_gpu():
    expected = {}
    for part, label in (("7B, bfloat16", "7B"), ("slice of the 40B, bfloat16", "33 layers of the 40B")):
        expected |= _gpu_rows(figures_of("gpu")[part], f"{label} x {{}}")
    expected |= _gpu_rows(figures_of("gpu")["7B, bfloat16, compiled"], "7B x {}, compiled")
    shown = table_rows(section("gpu"), columns=5)
    assert {row: shown[row] for row in expected} == expected
    assert figures_of("gpu")["slice of the 40B, bfloat16"]["layers"] == 33


def test_the_page_states_the_dtypes_of_the_last_run_on_a_gpu():
    shown = table_rows(section("gpu"), columns=6)
    for row, cells in shown.items():
        if row.startswith(("7B, ", "33 layers of the 40B, ")):
            figures = figures_of("gpu")[row.replace("33 layers", "slice")]
            prefill = figures["prefill"].get("kit", figures["prefill"])
            steps = [f"{figures['decode'][f'kit, batch {batch}']['ms per step']:.1f}" for batch in (1, 32)]
            peak = [f"{prefill['peak, GiB']:.1f}", f"{prefill['planned over measured']:.2f}"]
            assert cells == [*steps, f"{prefill['ms']:.0f}", *peak]
    assert {"7B, int8", "7B, nf4", "7B, int4", "33 layers of the 40B, int4"} < shown.keys()


def test_the_page_states_the_tunings_of_the_last_run_on_a_gpu():
    figures, shown = figures_of("gpu"), table_rows(section("gpu"), columns=6)
    for dtype in ("bfloat16", "nf4", "int4"):
        kit, peer = figures[f"tuning, {dtype}"], figures.get(f"tuning with SFTTrainer, {dtype}")
        theirs = [f"{peer['tokens/s']:.0f}", f"{peer['peak, GiB']:.1f}"] if peer else ["", ""]
        ours = [f"{kit['tokens/s']:.0f}", f"{kit['peak, GiB']:.1f}", f"{kit['planned over measured']:.2f}"]
        assert shown[dtype] == [theirs[0], ours[0], theirs[1], *ours[1:]]


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


def test_the_page_states_the_ratios_of_tuning():
    figures = figures_of("tuning")
    formats = {"kit's tokens/s, as a ratio": ".1f", "kit's memory, as a ratio": ".2f"}
    formats["kit's held-out loss, difference"] = "+.2f"
    peers = figures["kit's memory, as a ratio"]
    expected = {peer: [format(figures[name][peer], spec) for name, spec in formats.items()] for peer in peers}
    shown = table_rows(section("tuning"), columns=4)
    assert {row: cells for row, cells in shown.items() if row != "peer"} == expected


def test_the_page_states_the_cold_start():
    seconds = figures_of("cold_start")["seconds of the processor"]
    assert f"takes {seconds['kit']:.1f} seconds" in sentence("cold_start")
    assert f"and {seconds['transformers pipeline']:.1f} by `transformers.pipeline`" in sentence("cold_start")


def test_the_page_states_how_far_plans_were_off():
    figures = figures_of("planning")
    median, worst = figures["off by, median"]["peak"], figures["off by, at most"]["peak"]
    assert f"{len(figures['rows'])} cells" in sentence("planning")
    assert f"{median:.1%} in the median and by {worst:.1%} at most" in sentence("planning")
    assert f"the weights by {figures['off by, at most']['weights']:.1%} at most, and the cache agrees" in sentence(
        "planning"
    )
    assert figures["off by, at most"]["cache"] == 0


def test_the_page_states_the_size_and_the_frames_of_the_view_of_explain():
    figures = figures_of("explanation")
    slowest = max(each["slowest"] for each in figures["ms of a frame while dragging"].values())
    text = " ".join(section("explanation").split())
    assert f"takes {figures['kB of a page of 40 tokens']} kB" in text
    assert f"the slowest frame takes {slowest} ms" in text


def test_the_page_states_how_the_playground_keeps_up():
    speeds = figures_of("playground")["tokens per second"]
    assert all(speeds[f"paced at {pace}"]["ratio"] > 0.99 for pace in (50, 100))
    stated = f"{speeds['falconet']['bare loop']:.0f} tokens/s it reaches {speeds['falconet']['ratio']:.2f}"
    assert stated in sentence("playground")


def test_the_page_states_the_ratios_of_evaluation():
    figures = figures_of("evaluation")
    of_the_loop, harness = figures["kit takes, of the bare loop"], "lm-eval takes so many times the kit's time"
    assert f"takes {of_the_loop:.2f} times as long as a bare loop" in sentence("evaluation")
    assert f"takes {figures[harness]:.1f} times as long as the kit" in sentence("evaluation")
    assert (figures["threads"], "one thread of the processor" in sentence("evaluation")) == (1, True)


def test_the_page_states_what_guardrails_take_of_a_stream():
    cost = figures_of("evaluation")["guardrails, microseconds a token"]
    speed = figures_of("playground")["tokens per second"]["falconet"]["bare loop"]
    slow, fast = (f"{cost * pace / 1e6:.1%} of a stream of" for pace in (50, speed))
    stated = f"take {cost} microseconds a token: {slow} 50 tokens/s, and {fast} Falconet's {speed:.0f} tokens/s"
    assert stated in sentence("evaluation")
