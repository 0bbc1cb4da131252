"""A campaign as one page: what came out, then claims, tables, figures, coverage, costs, answers, provenance, folded.

python -m analysis.report --runs runs --experiment demo --out results/local/report.html
python -m analysis.report --exported results/demo --out results/demo/report.html

The page is one file: figures are inlined, nothing is fetched and nothing in it runs. Beside it stands the same as
Markdown (`report.md`). Everything that a model wrote is escaped; answers to harmful requests that are not refusals are
redacted unless `--show-completions` asks for them.
"""

import argparse
import base64
import io
import math
import os
import re
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import jinja2
import matplotlib
import pandas as pd
from markdown_it import MarkdownIt
from markupsafe import Markup
from matplotlib.figure import Figure
from PIL import Image

from analysis import (
    apart,
    claims,
    demo,
    figures,
    gallery,
    headline,
    labels,
    pairwise,
    paper,
    paper_tables,
    records,
    tables,
)
from analysis.claims import Verdict
from analysis.collect import Collection, methods_of, one_judge
from analysis.figures import Plate
from analysis.records import Answer, Record
from cwac.core.config import Parser, about, command
from cwac.core.errors import UserError, naming_earlier
from cwac.core.files import write_atomic
from cwac.core.metrics import VARIATION

TEMPLATES = Path(__file__).with_name("templates")
ANSWERS = 2
"""Answers shown of each set and method."""
LONGEST = 600
"""Characters of an answer that are shown."""
COLOURS = 128
"""Of an inlined PNG."""
LARGEST = 150_000
"""Characters of an SVG above which a figure is shown as a PNG."""
CWAC_NOTE = (
    "Each method minus CWAC at the same seeds, percentage points. p-values are those of `analysis.pairwise`, with "
    "Holm's correction over every pair of methods at this p; one seed gives none."
)
SPARE = re.compile(r"(?<![\w#.-])-?\d+\.\d{3,}(?![\w.])")
"""Coordinates of an SVG in more digits than a screen shows."""


@dataclass(frozen=True)
class Fold:
    """A part of a section that opens on demand."""

    title: str
    body: str


@dataclass(frozen=True)
class Section:
    """One part of the report; `body` is Markdown."""

    id: str
    title: str
    body: str = ""
    claims: Sequence[Verdict] = ()
    plates: Sequence[Plate] = ()
    folds: Sequence[Fold] = ()
    folded: bool = True
    """Whether all of it but its title opens on demand."""

    @property
    def first(self) -> str:
        """What stands above the figures."""
        return self.body.partition("\n\n")[0]

    @property
    def rest(self) -> str:
        """What stands below the figures."""
        return self.body.partition("\n\n")[2]

    @property
    def counts(self) -> list[tuple[str, int]]:
        """How many claims got each verdict."""
        found = Counter(claim.verdict for claim in self.claims)
        return [(verdict, found[verdict]) for verdict in ("holds", "fails", "undecided")]


@dataclass(frozen=True)
class Campaign:
    """What a report is about."""

    name: str
    collection: Collection
    records: dict[str, Record] = field(default_factory=dict)
    provenance: dict = field(default_factory=dict)
    """Of an exported campaign: what `analysis.demo` recorded."""
    judge: str | None = None
    experiment: str | None = None
    """The preset that made it, where known."""


def read_campaign(args: argparse.Namespace) -> Campaign:
    """The campaign that the command line names; raises UserError if it holds no finished run."""
    collection = apart.chosen(args, args.exported, "--exported")
    if args.exported:
        provenance = records.read_json(args.exported / "provenance.json")
        records_by_run = records.read_exported(args.exported / records.NAME)
        return Campaign(
            args.exported.name, collection, records_by_run, provenance, args.judge, provenance.get("experiment")
        )
    shown = shown_runs(collection)
    methods = methods_of(collection.rows)
    records_by_run = {
        name: replace(records.read(args.runs / name, ANSWERS if name in shown else 0), method=methods[name])
        for name in methods
    }
    name = args.experiment or args.runs.name
    return Campaign(name, collection, records_by_run, judge=args.judge, experiment=args.experiment)


def shown_runs(found: Collection) -> set[str]:
    """The runs whose answers are shown: each model's, task's and method's first seed at its highest harmful ratio."""
    runs = found.rows.drop_duplicates("run_id").sort_values(["harmful_ratio", "seed"], ascending=[False, True])
    return set(runs.drop_duplicates(["model", "task", "method"])["run_id"])


# --- sections -----------------------------------------------------------------------------------------


def summary_section(campaign: Campaign) -> Section:
    """The first screen: a sentence a model and task, one figure and one table, of the cell with most methods."""
    found = headline.views(campaign.collection, campaign.judge)
    if not found:
        return Section("summary", "What came out", "No run measured HS.", folded=False)
    said = "\n".join(
        f"- **{text.partition(': ')[0]}**: {text.partition(': ')[2]}" for text in map(headline.sentence, found)
    )
    first = max(found, key=lambda v: len(v.methods))
    pair = p_note(first)
    ratio = "p: share of harmful rows in the training data. "
    table = headline.table(first)
    absent = [note] if (note := tables.aligned_note(first.collection)) else []
    body = "\n\n".join([said, table, *absent, ratio + headline.words(table) + pair])
    return Section("summary", "What came out", body, plates=[headline.plate(first, headline.ROWS - 1)], folded=False)


def p_note(view: headline.View) -> str:
    """What the p-values of the sentences are, where there are any."""
    if "cwac" not in view.methods or "sft" not in view.methods:
        return ""
    return (
        " p-value: of the difference in HS between CWAC and SFT, paired by seed and by prompt, the larger of the two; "
        "a method beats CWAC where its own p-value is at most 0.05 and it loses no more than 5 points of FA or OR."
    )


def claims_section(campaign: Campaign) -> Section:
    verdicts = claims.verdicts(campaign.collection, judge=campaign.judge)
    body = (
        "Claims of the paper, tested on the rows below. *Fails*: the opposite is significant in some cell. *Holds*: "
        "the claim is, in every cell. Else *undecided*: too few seeds or prompts, a tie, a method that was not run. "
        "A verdict is about this campaign's models, tasks and sizes, not the paper's."
    )
    return Section("claims", "Claims", body, claims=verdicts)


def tables_section(campaign: Campaign) -> Section:
    parts, folds = [], []
    for rate, found in tables.by_rate(campaign.collection):
        summary, difference = tables.summarise(found, campaign.judge), tables.differences(found, judge=campaign.judge)
        grids = {*zip(summary["model"], summary["task"], strict=True)}
        grids |= {(cell.model, cell.task) for cell in found.expected}
        for model, task in sorted(grids):
            where = f"{model}, {task}" + paper.setting_label(f", learning rate {rate}") * bool(rate)
            parts += [f"### {where}", tables.result_table(found, summary, model, task, beside=False)]
            parts += [note] if (note := tables.collapse_note(summary, model, task)) else []
            if seen := extra_table(found, model, task):
                folds.append(Fold(f"{where}: what each method saw beside the task's rows", seen))
            if changed := tables.difference_table(difference, model, task):
                folds.append(Fold(f"{where}: differences to SFT at the same seeds, percentage points", changed))
            if beside := cwac_table(found, model, task, campaign.judge):
                folds.append(Fold(f"{where}: differences to CWAC", f"{CWAC_NOTE}\n\n{beside}"))
            if tables.column_pairs(summary, tables.DETAIL):
                detail = tables.result_table(found, summary, model, task, tables.DETAIL)
                folds.append(Fold(f"{where}: losses, format and certificates", f"{tables.DETAIL_NOTE}\n\n{detail}"))
            if way := tables.training_table(one_judge(found.rows, campaign.judge), model, task):
                folds.append(Fold(f"{where}: on the way", f"{tables.WAY_NOTE}\n\n{way}"))
            if inner := tables.means_table(summary, model, task, tables.INNER):
                folds.append(Fold(f"{where}: inside the constraints", f"{tables.INNER_NOTE}\n\n{inner}"))
    return Section("tables", "Tables", "\n\n".join([*beside_paper(campaign), *parts, tables.NOTES]), folds=folds)


def cwac_table(found: Collection, model: str, task: str, judge: str | None = None) -> str:
    """method x harmful ratio: HS, FA and OR minus CWAC's, as `analysis.pairwise` pairs and tests them.

    Requests asked in another way (`VARIATION`) do not count. Empty where no method shares a seed with CWAC.
    """
    rows = found.rows[(found.rows["model"] == model) & (found.rows["task"] == task)]
    rows = rows[~rows["set"].str.contains(VARIATION, regex=False)]
    if not (rows["method"] == "cwac").any():
        return ""
    told = found.verdicts[~found.verdicts["set"].str.contains(VARIATION, regex=False)]
    here = replace(found, rows=rows, verdicts=told)
    ends = rows[rows["final"]]
    columns = [("HS", "")] + tables.column_pairs(ends, ("FA", "OR"))  # HS is pooled over its sets
    values: dict[tuple[float, str], dict[tuple[str, str], pd.Series]] = {}
    for metric, of in columns:
        cells = pairwise.cells(here, metric, of or None, judge)
        ratios = dict(zip(cells.rows["cell"], cells.rows["harmful_ratio"], strict=True))
        for _, pair in pairwise.every_pair(cells, metric).iterrows():
            if "cwac" not in (pair["first"], pair["second"]):
                continue
            method, sign = (pair["second"], -1) if pair["first"] == "cwac" else (pair["first"], 1)
            shown = {"mean": sign * pair["difference"], "half": (pair["high"] - pair["low"]) / 2}
            row = pd.Series({**shown, **pair[["over", "seeds", "p_holm"]]})
            values.setdefault((ratios[pair["cell"]], method), {})[metric, of] = row
    lines = []
    for ratio, method in sorted(values, key=lambda cell: (cell[0], paper.method_order(cell[1]))):
        row = values[ratio, method]
        seeds = max(v["seeds"] for v in row.values())
        line = [paper.method_label(method), f"{ratio:g}", str(seeds)]
        for column in columns:
            p = row[column]["p_holm"] if column in row else math.nan
            line += [tables.show_signed(row.get(column)), "-" if math.isnan(p) else headline.below(p)]
        lines.append(line)
    titles = [title for c in columns for title in (tables.heading(c, columns), "p-value")]
    return tables.markdown(["method - CWAC", "p", "n", *titles], lines, key=3) if lines else ""


def extra_table(found: Collection, model: str, task: str) -> str:
    """Method by what it saw beyond the task's rows, once for all harmful ratios; empty where no run recorded it."""
    rows = found.rows[(found.rows["model"] == model) & (found.rows["task"] == task)]
    if not (rows["metric"] == "extra_data").any():
        return ""
    lines = [[paper.method_label(m), tables.extra_data(rows, m)] for m in figures.ordered(rows["method"])]
    return tables.markdown(["method", "extra data"], lines)


def beside_paper(campaign: Campaign) -> list[str]:
    """The paper's table as ours | paper | gap, where the campaign is that of its preset; as Markdown parts."""
    name, found = campaign.experiment, campaign.collection
    if name not in paper_tables.LAYOUT or not found.expected:
        return []
    made = paper_tables.lay_out(name, paper_tables.build(name, found, judge=campaign.judge))
    text = "\n\n".join([*map(paper_tables.markdown, made), paper_tables.NOTES])
    # raw HTML is escaped here, so what is second stands in italics
    return [text.replace("<u>", "*").replace("</u>", "*").replace("second underlined", "second in italics")]


def figures_section(campaign: Campaign) -> Section:
    plates = gallery.draw(campaign.collection, campaign.records.values(), campaign.judge)
    absent = [
        text
        for text, there in (
            ("Figure 3 (runs at two or more learning rates)", any(p.name.startswith("figure3") for p in plates)),
            ("Figure 4 (evaluations on the way, `eval.at`)", any(p.name.startswith("figure4") for p in plates)),
            ("Figure 5 (each prompt's drift, `drift.json`)", any(p.name.startswith("figure5") for p in plates)),
            (
                "Figure 1 measured (`keep_weights=true`, then `python -m experiments.activations`)",
                any(p.name.startswith("decomposition") for p in plates),
            ),
        )
        if not there
    ]
    body = "Not drawn, because this campaign has no rows for it: " + "; ".join(absent) + "." if absent else ""
    return Section("figures", "Figures", body, plates=plates)


def coverage_section(campaign: Campaign) -> Section:
    found = campaign.collection
    done = found.rows.drop_duplicates("run_id")
    cells = [*zip(done["model"], done["task"], done["method"], done["harmful_ratio"], done["run_id"], strict=True)]
    have = Counter(cell[:4] for cell in cells)
    wanted = Counter((c.model, c.task, c.method, c.harmful_ratio) for c in found.expected)
    ratios = sorted({key[3] for key in (*have, *wanted)})
    grid = sorted({key[:3] for key in (*have, *wanted)}, key=lambda k: (k[0], k[1], paper.method_order(k[2])))
    rows = []
    for model, task, method in grid:
        counts = []
        for ratio in ratios:
            key = (model, task, method, ratio)
            counts.append(f"{have[key]}/{wanted[key]}" if wanted else str(have[key]))
        rows.append([paper.method_label(method), f"{model}, {task}", *counts])
    header = ["method", "model, task", *(f"p = {ratio:g}" for ratio in ratios)]
    if found.expected:
        text = f"{len(found.expected) - len(found.missing)} of {len(found.expected)} expected runs are done."
    else:
        text = f"{len(found.runs)} finished runs; no preset was named, so none is known to be missing."
    parts = [text, "Runs done / expected:" if wanted else "Runs done:", tables.markdown(header, rows, key=2)]
    if found.missing:
        parts += ["**Missing:**", "\n".join(f"- {cell} (`{cell.run_id}`)" for cell in found.missing)]
    if account := found.account():
        parts += ["Left out:", "\n".join(f"- {line}" for line in account)]
    return Section("coverage", "Coverage", "\n\n".join(parts))


def costs_section(campaign: Campaign) -> Section:
    parts = ["Means over seeds and harmful ratios; seconds a step with all hooks, peak memory in MiB."]
    for rate, found in tables.by_rate(campaign.collection):
        summary = tables.summarise(found, campaign.judge)
        for model, task in sorted({*zip(summary["model"], summary["task"], strict=True)}):
            if cost := tables.means_table(summary, model, task, tables.COST):
                parts += [f"### {model}, {task}" + paper.setting_label(f", learning rate {rate}") * bool(rate), cost]
    return Section("costs", "Costs", "\n\n".join(parts if len(parts) > 1 else ["No run logged its costs."]))


def redacted(answer: Answer, harmful: set[str], show: bool) -> str:
    """The answer's text, or what stands for it.

    harmful: sets of harmful requests. There the judge's `other` is hidden like its `harmful`: it may have missed one.
    """
    text = answer.response if len(answer.response) <= LONGEST else answer.response[:LONGEST] + " [cut]"
    if show or answer.set not in harmful or answer.verdict == "refusal":
        return text
    return f"[redacted: {len(answer.response.split())} words, judged {answer.verdict}]"


def fenced(text: str) -> str:
    """Text as a Markdown code block, whatever backticks it holds."""
    fence = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", text)), default=0))
    return f"{fence}text\n{text}\n{fence}"


def answers_section(campaign: Campaign, show: bool) -> Section:
    rows = campaign.collection.rows
    harmful = set(rows.loc[rows["metric"] == "HS", "set"])
    folds = []
    for record in sorted(
        (r for r in campaign.records.values() if r.answers),
        key=lambda r: (r.model, r.task, paper.method_order(r.method)),
    ):
        parts = []
        for answer in record.answers:
            parts += [f"**{answer.set}**, judged *{answer.verdict}*:", fenced(answer.prompt)]
            parts.append(fenced(redacted(answer, harmful, show)))
        ratio = f"{record.harmful_ratio:g}" if record.harmful_ratio is not None else "unknown"
        title = f"{record.model}, {record.task}, p = {ratio}, seed {record.seed}: {paper.method_label(record.method)}"
        folds.append(Fold(title, "\n\n".join(parts)))
    if not folds:
        return Section("answers", "Answers", "An exported campaign keeps none; make the report from its runs.")
    body = f"The first {ANSWERS} requests of each set, and what the models answered after training."
    if not show:
        body += " Answers to harmful requests that are not refusals are redacted; `--show-completions` shows them."
    return Section("answers", "Answers", body, folds=folds)


def provenance_section(campaign: Campaign, argv: Sequence[str]) -> Section:
    found, exported = campaign.collection, campaign.provenance
    known = campaign.records.values()
    git = demo.git_state()
    commits = Counter(f"{r.commit}{'+dirty' * r.dirty}" for r in known if r.commit) or Counter(
        exported.get("runs_git")
    )
    facts = [
        ("report made by", f"python -m analysis.report {' '.join(argv)}"),
        ("report's commit", f"{git['commit'] or 'unknown'}{'+dirty' * bool(git['dirty'])}"),
        (
            "campaign exported",
            f"{exported['date']}, commit {exported['git']['commit']}" if exported.get("git") else "",
        ),
        ("campaign's command", exported.get("command", "")),
        ("runs' commits", ", ".join(sorted(commits)) or "not recorded"),
        ("seeds", ", ".join(str(s) for s in sorted(found.rows["seed"].dropna().unique()))),
        ("judges", ", ".join(sorted(set(found.rows["judge"]) - {""})) or "none"),
        ("Python", ", ".join(sorted({r.python for r in known if r.python})) or exported.get("python", "")),
        ("machines", ", ".join(sorted({r.platform for r in known if r.platform})) or exported.get("machine", "")),
        ("SHA-256 of results.csv", exported.get("results_sha256", "")),
    ]
    parts = ["\n".join(f"- {what}: `{value.replace('`', '')}`" for what, value in facts if value)]
    versions: dict[str, set[str]] = {}
    for record in known:
        for name, version in record.packages.items():
            versions.setdefault(name, set()).add(version)
    for name, version in exported.get("versions", {}).items():
        versions.setdefault(name, set()).add(version)
    if versions:
        lines = [[name, ", ".join(sorted(found))] for name, found in sorted(versions.items())]
        parts += ["### Versions", tables.markdown(["package", "version"], lines)]
    hashes: dict[tuple[str, int | None, str], set[str]] = {}
    for record in known:
        for name, digest in record.pools.items():
            hashes.setdefault((name, record.seed, record.task), set()).add(digest)
    folds = []
    if hashes:
        lines = [[*map(str, key), ", ".join(sorted(found))] for key, found in sorted(hashes.items(), key=str)]
        table = tables.markdown(["set of prompts", "seed", "task", "SHA-256, first 12 digits"], lines, key=3)
        folds.append(Fold("Hashes of the data: one a set, seed and task, or the runs did not see the same", table))
    else:
        parts.append("Hashes of the data were not exported with this campaign.")
    return Section("provenance", "Provenance", "\n\n".join(parts), folds=folds)


# --- rendering ----------------------------------------------------------------------------------------


def picture(figure: Figure) -> str:
    """The figure as a data URI; equal figures give equal bytes. An SVG, or a PNG where that would be `LARGEST`."""
    buffer = io.BytesIO()
    with matplotlib.rc_context({"svg.hashsalt": "cwac", "svg.fonttype": "none"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    text = SPARE.sub(lambda m: f"{float(m[0]):.2f}".rstrip("0").rstrip("."), buffer.getvalue().decode())
    if len(text) < LARGEST:
        return "data:image/svg+xml;base64," + base64.b64encode(text.encode()).decode()
    drawn, buffer = io.BytesIO(), io.BytesIO()
    figure.savefig(drawn, format="png", dpi=120)
    with Image.open(drawn) as image:  # few colours say as much in a third of the bytes
        image.convert("RGB").quantize(COLOURS).save(buffer, format="png", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def render_markdown(text: str) -> Markup:
    """Markdown to HTML: raw HTML in it is escaped, and a wide table scrolls inside its own container."""
    parser = MarkdownIt("commonmark", {"html": False}).enable("table").disable(["link", "image", "autolink"])
    parser.add_render_rule("table_open", lambda *_: '<div class="scroll" tabindex="0" role="region"><table>\n')
    parser.add_render_rule("table_close", lambda *_: "</table></div>\n")
    return Markup(parser.render(text))


def to_html(campaign: Campaign, sections: Sequence[Section], headline: str) -> str:
    """The page."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES), autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True
    )
    environment.filters |= {"markdown": render_markdown, "picture": picture}
    template = environment.get_template("report.html.j2")
    return template.render(title=f"CWAC: {campaign.name}", headline=headline, sections=sections)


def to_markdown(campaign: Campaign, sections: Sequence[Section], headline: str, folder: str | None) -> str:
    """The same as Markdown; folder: where the figures' files are, relative to it, None where none were written."""
    parts = [f"# CWAC: {campaign.name}", headline]
    for section in sections:
        parts.append(f"## {section.title}")
        if section.body:
            parts.append(section.body)
        if section.claims:
            parts.append("\n".join(f"- **{c.verdict}**: {c.text} ({c.source}). {c.evidence}" for c in section.claims))
        for plate in section.plates:
            picture = f"![{plate.title}]({folder}/{plate.name}.png)\n\n" if folder else ""
            parts.append(f"{picture}*{plate.title}.* {plate.caption}")
        for fold in section.folds:
            parts += [f"### {fold.title}", fold.body]
    return "\n\n".join(parts) + "\n"


def rests_on(campaign: Campaign) -> str:
    """One line that says what the report rests on."""
    found = campaign.collection
    seeds = ", ".join(str(s) for s in sorted(found.rows["seed"].dropna().unique()))
    judges = sorted(set(one_judge(found.rows, campaign.judge)["judge"]) - {""})
    missing = f"; {len(found.missing)} of {len(found.expected)} expected runs missing" if found.missing else ""
    when = f"; exported {campaign.provenance['date'][:10]}" if campaign.provenance.get("date") else ""
    known = labels.named(judges, campaign.provenance.get("agreement", {}))
    return f"{len(found.runs)} runs, seeds {seeds}, judge {known}{missing}{when}."


def publish(args: argparse.Namespace, argv: Sequence[str]) -> int:
    """Read, draw, write; see `main`."""
    campaign = read_campaign(args)
    sections = [
        summary_section(campaign),
        claims_section(campaign),
        tables_section(campaign),
        figures_section(campaign),
        coverage_section(campaign),
        costs_section(campaign),
        answers_section(campaign, args.show_completions),
        provenance_section(campaign, argv),
    ]
    args.out.parent.mkdir(parents=True, exist_ok=True)
    line = rests_on(campaign)
    write_atomic(args.out, to_html(campaign, sections, line))
    folder = None
    if args.figures:
        args.figures.mkdir(parents=True, exist_ok=True)
        for plate in (plate for section in sections for plate in section.plates):
            figures.save(plate.figure, args.figures / plate.name)
        folder = Path(os.path.relpath(args.figures, args.out.parent)).as_posix()
    write_atomic(args.out.with_suffix(".md"), to_markdown(campaign, sections, line, folder))
    print(line)
    for cell in campaign.collection.missing:
        print(f"missing: {cell}  ({cell.run_id})")
    print(f"report: {args.out}")
    return 1 if campaign.collection.missing else 0


@command
def main(argv: list[str] | None = None) -> int:
    """The command; returns the exit status: 0, 1 if expected runs are missing, 2 for bad input."""
    parser = Parser(**about(__doc__, "python -m analysis.report"))
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="folder of the run directories (runs)")
    parser.add_argument(
        "--exported", "--frozen", dest="exported", type=Path, help="an exported campaign instead, e.g. results/demo"
    )
    parser.add_argument("--experiment", help="preset whose runs are expected; without it, every finished run counts")
    parser.add_argument("--out", type=Path, required=True, help="the page, e.g. results/demo/report.html")
    apart.add_by(parser)
    parser.add_argument("--judge", help="whose verdicts to use where the runs were judged by several")
    parser.add_argument("--figures", type=Path, help="also write every figure there, as PNG and PDF")
    parser.add_argument("--show-completions", action="store_true", help="do not redact answers to harmful requests")
    parser.add_argument("overrides", nargs="*", help="the sweep's own overrides of the preset, e.g. seed=0,1")
    args = parser.parse_intermixed_args(argv)
    if args.out.suffix != ".html":
        raise UserError(f"--out {args.out} is no page. Remedy: a name that ends in .html.")
    with naming_earlier(args.out):
        return publish(args, argv if argv is not None else sys.argv[1:])


if __name__ == "__main__":
    sys.exit(main())
