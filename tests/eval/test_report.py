"""The report: one page that needs nothing else, whatever stands in a prompt or a completion."""

import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import pytest

import dllm_gym
from dllm_gym.eval.report import page as report
from dllm_gym.eval.report.data import payload
from dllm_gym.eval.report.page import write_report

HOSTILE = '</script><script>document.title="owned"</script><img src="http://example.com/x" onerror="alert(1)"><!--'
SETTINGS = {
    "policy_settings": {},
    "env": {"id": "MaskedDiffusion-Countdown-v0", "denoiser": "embedded", "dataset": "embedded", "gen_length": 12}
    | {"block_length": None, "temperature": 0.0, "alpha": 1.0},
    "split": "test",
    "seed": 0,
    "films": 2,
    "version": dllm_gym.__version__,
}


def write_results(
    path: Path, samplers: dict[str, float], problems: int = 4, samples: int = 2, text: str = "3 + 4 = 7", **env
) -> Path:
    """A results file; each sampler is right on that share of the problems, and has one step more than the last."""
    lines = []
    for number, (sampler, share) in enumerate(samplers.items()):
        settings = SETTINGS | {"sampler": sampler, "policy": sampler.partition(":")[0].title()}
        settings |= {"problems": problems, "samples": samples, "env": SETTINGS["env"] | env}
        steps = 3 + number

        def add(kind: str, cell: str = f"{path.stem}{number}", **record) -> None:
            lines.append(json.dumps({"kind": kind, "cell": cell} | record) + "\n")

        add("cell", settings=settings)
        for index in range(problems):
            about = {"problem_id": f"countdown/embedded/test/{index}", "prompt": f"problem {index} {text}"}
            right = index < share * problems
            values = {"correct": right, "score": float(right), "nfe": steps, "reward": 0.5 * right, "length": 9}
            values |= {"log_likelihood": -2.0, "completion": f"{text} by {sampler}"}
            add("problem", index=index, **about, **{name: [value] * samples for name, value in values.items()})
            if index < 2:
                tokens, step_of = ["3", " +", text, "<eos>"], [1, 2, steps, 1]
                add(
                    "film",
                    **about,
                    tokens=tokens,
                    step_of=step_of,
                    confidence=[0.9, 0.2, 0.55, 1.0],
                    correct=right,
                    nfe=steps,
                )
        chain = (
            {"chain": {"acceptance": [0.5, 0.25], "log_likelihood": [-9.0, -4.0, -3.0]}}
            if "metropolis" in sampler
            else {}
        )
        add("end", seconds=2.0, tokens=problems * samples * 9, forwards=7, **chain)
    path.write_text("".join(lines), encoding="utf-8")
    return path


def write_run(folder: Path, steps: int = 6, **first) -> Path:
    """The folder of a training run."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"algorithm": "grpo"}))
    rows = [{"step": i + 1, "reward": i / 10, "accuracy": 0.5, "nfe": 4.0} for i in range(steps)]
    rows[0] |= first
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"step": 99, "rew')
    return folder


class Page(HTMLParser):
    """Elements of a page, and the text of its scripts and styles."""

    def __init__(self, path: Path):
        super().__init__()
        self.elements, self.text = [], {}
        self.feed(path.read_text(encoding="utf-8"))
        self.data = json.loads(self.text["data"])

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))

    def handle_data(self, data):
        tag, attributes = self.elements[-1] if self.elements else ("", {})
        if tag in ("script", "style"):
            name = attributes.get("id", tag)
            self.text[name] = self.text.get(name, "") + data

    def all_of(self, tag: str) -> list[dict]:
        return [attributes for name, attributes in self.elements if name == tag]


@pytest.fixture
def results(tmp_path) -> Path:
    samplers = {"threshold:threshold=0.9": 0.75, "confidence:k=4": 0.5, "metropolis:alpha=4,steps=2": 1.0}
    return write_results(tmp_path / "results.jsonl", samplers)


def test_the_page_and_its_plots(results, tmp_path):
    run = write_run(tmp_path / "grpo-run", reward=float("nan"))
    files = write_report([results, run], tmp_path / "new" / "page.html")
    data = Page(tmp_path / "new" / "page.html").data
    assert data["title"] == "3 samplers on Countdown" and data["version"] == dllm_gym.__version__
    assert [cell["label"] for cell in data["cells"]] == ["threshold 0.9", "confidence 4", "metropolis alpha=4 steps=2"]
    figures = data["cells"][0]["summary"]
    assert figures["accuracy"] == 0.75 and figures["nfe"] == 3 and figures["tokens_per_second"] == 36
    assert figures["accuracy_interval"][0] <= 0.75 <= figures["accuracy_interval"][1]
    # Two samples that are always alike: Pass@2 is Pass@1.
    assert [row[:2] for row in data["cells"][0]["passes"]] == [[1, 0.75], [2, 0.75]]
    assert [cell["front"] for cell in data["cells"]] == [True, False, True]
    assert data["cells"][2]["chain"]["acceptance"] == [0.5, 0.25] and data["cells"][0]["chain"] is None
    assert len(data["completions"]) == data["completions_total"] == 24 and len(data["films"]) == 6
    curves = {curve["metric"]: curve["runs"][0] for curve in data["curves"]}
    assert set(curves) == {"reward", "accuracy", "NFE"}
    assert curves["reward"]["step"] == [2, 3, 4, 5, 6] and curves["accuracy"]["step"] == [1, 2, 3, 4, 5, 6]
    names = {"front", "pass-at-k", "acceptance", "log-likelihood"}
    stems = {f"{name}-Countdown" for name in names} | {f"training-{name}" for name in ("reward", "accuracy", "NFE")}
    assert {file.name for file in files} == {f"{stem}.{kind}" for stem in stems for kind in ("png", "svg")}
    for file in files:
        assert file.parent == tmp_path / "new" / "page-plots"
        assert file.read_bytes().startswith(b"\x89PNG" if file.suffix == ".png" else b"<?xml")


def test_what_differs_is_a_column_and_what_is_shared_stands_once(tmp_path):
    samplers = {"threshold:threshold=0.9": 0.5}
    paths = [write_results(tmp_path / f"{n}.jsonl", samplers, block_length=n or None) for n in (0, 4)]
    paths.append(write_results(tmp_path / "t.jsonl", samplers, block_length=4, temperature=0.7))
    data = payload(paths, completions=100)
    assert data["columns"] == ["block length", "temperature"]
    assert [cell["values"] for cell in data["cells"]] == [["none", "0.0"], ["4", "0.0"], ["4", "0.7"]]
    shared = dict(data["shared"])
    assert shared["task"] == "Countdown" and shared["alpha"] == "1.0" and not set(data["columns"]) & set(shared)
    # A plot for each block length, and in the second the two cells are told apart by the temperature.
    assert data["groups"] == ["Countdown, block length none", "Countdown, block length 4"]
    assert [cell["label"] for cell in data["cells"]][1:] == [
        "threshold 0.9, temperature 0.0",
        "threshold 0.9, temperature 0.7",
    ]
    assert len({cell["name"] for cell in data["cells"]}) == 3


def test_untrusted_text_is_data_and_nothing_else(tmp_path):
    hostile = write_results(
        tmp_path / "hostile.jsonl", {"threshold:threshold=0.9": 1.0}, text=HOSTILE + "$data \ud800 ∑"
    )
    write_report([hostile], tmp_path / "page.html")
    page = Page(tmp_path / "page.html")
    assert [attributes.get("id") for attributes in page.all_of("script")] == ["data", None]
    assert not page.all_of("img") and not page.all_of("iframe")
    assert page.data["completions"][0][2].startswith(HOSTILE) and "\ud800" in page.data["completions"][0][2]
    assert page.data["prompts"][0][1].startswith(f"problem 0 {HOSTILE}")
    # The script makes text nodes only, whatever the data.
    script = page.text["script"]
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|Function\(", script)


def test_nothing_is_asked_of_a_network(results, tmp_path):
    write_report([results], tmp_path / "page.html")
    page, source = Page(tmp_path / "page.html"), (tmp_path / "page.html").read_text()
    assert not [
        value for _, attributes in page.elements for key, value in attributes.items() if key in ("src", "srcset")
    ]
    assert {attributes["href"] for attributes in page.all_of("link")} == {"data:,"}
    assert set(re.findall(r"https?://[^\s\"']+", source)) <= {"http://www.w3.org/2000/svg"}
    assert not re.search(r"@import|url\(|fetch\(|XMLHttpRequest|import\(", source)
    (policy,) = (a["content"] for a in page.all_of("meta") if a.get("http-equiv") == "Content-Security-Policy")
    assert "default-src 'none'" in policy and "unsafe" not in policy


def test_the_list_is_cut_at_the_same_problems_and_the_table_is_not(results):
    data = payload([results], completions=13)
    assert data["completions_total"] == 24 and len(data["completions"]) == 12
    assert sorted((row[0], row[1]) for row in data["completions"]) == [(c, p) for c in range(3) for p in (0, 0, 1, 1)]
    assert data["cells"][0]["summary"]["accuracy"] == 0.75


def test_a_cell_that_is_not_finished_says_so(results):
    lines = results.read_text().splitlines(keepends=True)
    results.write_text("".join(line for line in lines[:5] if '"index": 3' not in line))
    (cell,) = payload([results], completions=100)["cells"]
    assert cell["partial"] and cell["summary"]["tokens_per_second"] is None
    # Beside the finished file the fuller version of the same cell counts.
    whole = results.with_name("whole.jsonl")
    whole.write_text("".join(lines))
    assert [c["partial"] for c in payload([whole, results], completions=100)["cells"]] == [None] * 3


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["nowhere.jsonl"], ["nowhere.jsonl"]),
        (["{empty}"], ["{empty}", "config.json"]),
        (["{results}", "--output", "page.txt"], ["page.txt", ".html"]),
        (["{results}", "--completions", "-1"], ["completions=-1"]),
        (["{results}", "--output", "{existing}"], ["{existing}", "--overwrite"]),
    ],
)
def test_mistakes_are_one_line(flags, named, results, tmp_path, capsys):
    names = {"results": results, "empty": tmp_path / "empty", "existing": tmp_path / "existing.html"}
    names["empty"].mkdir()
    names["existing"].write_text("mine")
    assert report.main([flag.format(**names) for flag in flags]) == 2
    line = capsys.readouterr().err.splitlines()[0]
    assert line.startswith("error: ") and all(text.format(**names) in line for text in named)
    assert names["existing"].read_text() == "mine"


def test_the_command(results, tmp_path, capsys):
    flags = [str(results), "--output", str(tmp_path / "page.html")]
    assert report.main(flags) == 0 and report.main([*flags, "--overwrite"]) == 0
    assert str(tmp_path / "page.html") in capsys.readouterr().out
    assert (tmp_path / "page-plots" / "front-Countdown.svg").exists()


@pytest.fixture
def browser():
    """Chromium, where it and playwright are installed."""
    playwright = pytest.importorskip("playwright.sync_api")
    program = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if not program:
        pytest.skip("no chromium")
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--disable-background-networking"]
    with playwright.sync_playwright() as running:
        opened = running.chromium.launch(executable_path=program, args=[*flags, "--no-first-run"])
        yield opened
        opened.close()


def test_in_a_browser(browser, tmp_path):
    from playwright.sync_api import expect

    samplers = {"threshold:threshold=0.9": 0.75, "confidence:k=4": 0.5}
    results = write_results(tmp_path / "results.jsonl", samplers, problems=300, text=HOSTILE)
    write_report([results, write_run(tmp_path / "run")], tmp_path / "page.html")
    page = browser.new_page(viewport={"width": 390, "height": 800})
    heard, asked = [], []
    page.on("console", lambda message: heard.append(message.text))
    page.on("pageerror", lambda error: heard.append(str(error)))
    page.on("dialog", lambda dialog: heard.append(dialog.message))
    page.on("request", lambda request: asked.append(request.url))
    page.goto((tmp_path / "page.html").as_uri())

    assert page.title() == "2 samplers on Countdown"
    assert page.locator("#table tbody tr").count() == 2 and page.locator("figure svg[role=img]").count() == 5
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    page.get_by_role("button", name="accuracy %").click()
    page.get_by_role("button", name="accuracy %").click()
    assert page.locator("#table tbody tr").first.locator("th").inner_text() == "confidence 4"

    # The player: two panes, steps by key, by button and by itself until the last.
    assert page.locator(".pane").count() == 2
    page.locator("#first").click()
    assert (
        page.locator("#step").inner_text() == "step 0 of 4" and page.locator(".token.masked:not(.sample)").count() == 8
    )
    page.keyboard.press("ArrowRight")
    assert (
        page.locator("#step").inner_text() == "step 1 of 4" and page.locator(".token.masked:not(.sample)").count() == 4
    )
    page.locator("#speed").select_option("32")
    page.get_by_role("button", name="Play").click()
    expect(page.locator("#step")).to_have_text("step 4 of 4")  # waits for it
    assert page.locator(".pane .badge.right").count() == 2 and page.locator(".token.masked:not(.sample)").count() == 0

    # The list: forty at first, more when scrolled to, filters.
    assert page.locator("#list li").count() == 40
    page.locator("#list li").last.scroll_into_view_if_needed()
    expect(page.locator("#list li").nth(79)).to_be_attached()
    page.locator("#verdict").select_option("wrong")
    assert page.locator("#count").inner_text().startswith("450 of 1,200")
    page.locator("#of").select_option("0")
    page.locator("#text").fill("problem 299 ")
    assert page.locator("#count").inner_text().startswith("2 of 1,200") and page.locator("#list li").count() == 2
    page.locator("#list summary").first.click()
    assert page.locator("#list pre").nth(1).inner_text() == f"{HOSTILE} by threshold:threshold=0.9"
    assert heard == [] and len(asked) == 1
