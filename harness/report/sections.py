"""The sections of a card: each a piece of Markdown about one question, and the block of that name in other pages."""

import shlex

from tabulate import tabulate

from harness.formats.names import KEPT
from harness.record.stats import RESAMPLES
from harness.report import columns, sensitivity_tables, speed_tables
from harness.report.evidence import Evidence
from harness.report.numbers import format_bytes
from harness.report.pieces import Link, image, no_record, paragraphs, part, reference, setups_of, table
from harness.suite.names import NOISE, SOURCE, row_name
from harness.suite.schema import Suite


def size_section(evidence: Evidence, link: Link) -> str:
    """The bytes of each variant before and after, and by role what was quantized."""
    totals = evidence.tables["totals"]
    return paragraphs(
        None if not totals else table(evidence, link, totals),
        None if not totals else f"**By role**\n\n{_roles(evidence, link)}",
        no_record(evidence, "build"),
    )


def _roles(evidence: Evidence, link: Link) -> str:
    """A row for each role of the source, and beside its bytes what every variant makes of them. Builds of other sources
    would have other roles, and a row for each all the same."""
    records = evidence.records["build"]
    found: dict[tuple[str, int, int, int], dict[str, str]] = {}
    for variant, record in records.items():
        for role in record.kind("role"):
            same = (role["role"], role["num_tensors"], role["num_params"], role["source_bytes"])
            kept = role["format"] == KEPT
            after = KEPT if kept else f"{format_bytes(role['output_bytes'])}, {role['format']}"
            found.setdefault(same, {})[variant] = after
    rows = [
        (name, f"{tensors:,}", f"{params:,}", format_bytes(size), *(after.get(variant, "—") for variant in records))
        for (name, tensors, params, size), after in found.items()
    ]
    headers = ("role", "tensors", "parameters", "before", *map(columns.escape, records))
    align = ("left", *("right" for _ in headers[1:]))
    table = tabulate(rows, headers=headers, tablefmt="pipe", colalign=align, disable_numparse=True)
    runs = (f"{columns.escape(variant)} {reference(evidence, link, record)}" for variant, record in records.items())
    return f"runs {' · '.join(runs)}\n\n{table}"


def method_section(evidence: Evidence, link: Link) -> str:
    """How scales and codes were chosen, and the calibration data."""
    frame, sources = evidence.tables["method"], evidence.tables["calibration"]
    return paragraphs(
        None if not frame else table(evidence, link, frame),
        None
        if not frame
        else "Scales and codes say how the 8-bit scale of each block of 16 weights and the 4-bit codes under it were "
        "chosen: `absmax` and `rtn` round to nearest without data, `search` and `weighted-search` try scales, `gptq` "
        "corrects each column for what the ones before it lost. Digests are the first digits of SHA-256.",
        part(evidence, link, "Calibration", sources),
        image(evidence, link, "experts"),
        no_record(evidence, "build"),
    )


def roundtrip_section(evidence: Evidence, link: Link) -> str:
    """The error of decoded weights by role, and what `harness verify` found."""
    frame, findings = evidence.tables["roundtrip"], evidence.tables["findings"]
    clean = [name for name, record in evidence.records["verify"].items() if not record.kind("finding")]
    return paragraphs(
        None if not frame else table(evidence, link, frame),
        f"`harness verify` finds nothing to object to in {', '.join(f'`{name}`' for name in clean)}."
        if clean
        else None,
        None if not findings else table(evidence, link, findings),
        no_record(evidence, "verify"),
    )


def sensitivity_section(evidence: Evidence, link: Link) -> str:
    """The layer error of each format by group of linear layers, with what it says in words."""
    frame = evidence.tables["sensitivity"]
    if not frame:
        return paragraphs(no_record(evidence, "sensitivity"))
    record = evidence.records["sensitivity"][SOURCE]
    return paragraphs(
        f"{' '.join(sensitivity_tables.sensitivity_words(frame))} {reference(evidence, link, record)}",
        image(evidence, link, "sensitivity"),
        table(evidence, link, frame),
        "Round-to-nearest with nothing else quantized, on the calibration samples. The layer error is the energy of "
        "what one group in that format changes at the end of its half of the decoder layer (attention or DeltaNet; MLP "
        "or experts), over the energy of what that half adds to the hidden states: the median over layers, and in "
        "brackets the layer where it is largest. The last column adds up what FP8 would take away from it in all "
        "layers. How much the loss depends on a half is not in these numbers.",
    )


def perplexity_section(evidence: Evidence, link: Link) -> str:
    """The perplexity of each row by each protocol, with its difference from the source."""
    if evidence.suite.ppl is None:
        return "The suite measures no perplexity."
    frame = evidence.tables["perplexity"]
    if not frame:
        return "No record yet: run `nox -s ppl`."
    units = set(frame["unit"])
    return paragraphs(
        image(evidence, link, "losses"),
        table(evidence, link, frame),
        "Δ is paired: variant and source scored the same tokens, and their difference is taken window by window. The "
        f"interval is a bootstrap over blocks of neighbouring windows ({RESAMPLES:,} resamples)."
        if "token" in units
        else None,
        "Where PPL is per word, Δ is per word too, its pairs are documents, and the bootstrap is over documents."
        if "word" in units
        else None,
        _no_perplexity(evidence),
    )


def _no_perplexity(evidence: Evidence) -> str | None:
    """Which variants have no run by which protocol; None if none is missing."""
    protocols = evidence.suite.ppl.protocols if evidence.suite.ppl else ()
    missing = [
        f"`{variant}`" + (f" by {protocol}" if len(protocols) > 1 else "")
        for protocol in protocols
        for variant in _rows_of_perplexity(evidence.suite)
        if variant not in evidence.perplexities.get(protocol, {})
    ]
    return f"No record yet of {', '.join(missing)}: run `nox -s ppl`." if missing else None


def _rows_of_perplexity(suite: Suite) -> list[str]:
    names = (SOURCE, *suite.variants)
    return [row_name(name, setup) for setup in (None, *setups_of(suite, "ppl")) for name in names]


def fidelity_section(evidence: Evidence, link: Link) -> str:
    """The divergence from the source, beside the source's divergence from itself."""
    if evidence.suite.fidelity is None:
        return "The suite measures no fidelity."
    frame, bands = evidence.tables["fidelity"], evidence.tables["bands"]
    if not frame:
        return paragraphs(no_record(evidence, "fidelity"))
    noise = evidence.records["fidelity"].keys() & set(NOISE)
    return paragraphs(
        image(evidence, link, "divergence"),
        table(evidence, link, frame),
        "KL(source ‖ variant) of every next-token prediction: its mean with a bootstrap over blocks of windows, and "
        "its percentiles over single predictions. RMS Δp is the root mean square of what the probability of the token "
        "that came has changed by.",
        "The `noise-` rows are the source beside itself, in a second pass, another batch or on another engine, as the "
        f"suite asks; what does not exceed them prints as {columns.AT_NOISE}."
        if noise
        else "**There is no noise floor yet: `nox -s fidelity` measures the source beside itself.**",
        part(evidence, link, "By the tokens before", bands, "depth"),
        no_record(evidence, "fidelity"),
    )


def tasks_section(evidence: Evidence, link: Link) -> str:
    """The scores of each row in each task, and the audit of generated answers."""
    if not evidence.suite.tasks:
        return "The suite has no tasks."
    missing = [
        f"`{variant}` in `{label}`"
        for label in evidence.suite.tasks
        for variant in (SOURCE, *evidence.suite.variants)
        if variant not in evidence.tasks.get(label, {})
    ]
    no_record = f"No record yet of {', '.join(missing)}: run `nox -s tasks`." if evidence.tasks else None
    if not evidence.tables["tasks"]:
        return "No record yet: run `nox -s tasks`."
    answers = evidence.tables["answers"]
    return paragraphs(
        table(evidence, link, evidence.tables["tasks"]),
        "Scores, their names (metric, filter) and standard errors are lm-eval's own. Δ is paired: variant and source "
        "answered the same prompts. Its interval is Tango's for answers that are right or wrong, and otherwise a "
        f"bootstrap over documents ({RESAMPLES:,} resamples). Lost and won count the items that only the source, and "
        "only the variant, gets right; p is of no difference at all (McNemar's exact test or a permutation), by Holm "
        "over all tasks.",
        part(evidence, link, "Generated answers", answers),
        None
        if not answers
        else "Cut off: answers that came to the most new tokens that they may have. Unclosed: thoughts without their "
        "end. Not found: answers in which the task's filters see none. A run with too many of these is invalid and "
        "compared with nothing. Seconds are those of the whole run, answers of a batch together.",
        no_record if missing else None,
    )


def decode_section(evidence: Evidence, link: Link) -> str:
    """Decode speeds for one user, by depth, by batch size and in setups, and the kernels that ran."""
    frame = evidence.tables["decode"]
    if not frame:
        return paragraphs(no_record(evidence, "bench"))
    return paragraphs(
        part(evidence, link, "One user", speed_tables.single_user(frame), "decode"),
        part(evidence, link, "By depth", speed_tables.by_depth(frame)),
        part(evidence, link, "By batch size, in total and for each user", speed_tables.batch_curve(frame), "batch"),
        part(evidence, link, "In other setups of the engine", speed_tables.in_setups(frame)),
        "Speeds are medians over repetitions with exact order-statistic intervals. The ratio is of runs of one "
        "session, its interval over the engine's starts, since repetitions of one start are alike (of a single start: "
        "over repetitions, by the exact Mann-Whitney test); it is not the quotient of the two medians "
        "beside it. The ceiling is memory bandwidth over the bytes that a step "
        "moves (weights, states, the prompt's keys and values), and a dash where the bandwidth is unknown.",
        part(evidence, link, "Kernels that ran", evidence.tables["kernels"]),
        "**The torch engine decompresses quantized weights before it computes, on every device. Its decode speed says "
        "nothing about NVFP4 kernels.**"
        if any((record.run.engine or {}).get("name") == "torch" for record in evidence.records["bench"].values())
        else None,
        no_record(evidence, "bench"),
    )


def prefill_section(evidence: Evidence, link: Link) -> str:
    """Prefill speeds."""
    frame = evidence.tables["prefill"]
    return paragraphs(None if not frame else table(evidence, link, frame), no_record(evidence, "bench"))


def memory_section(evidence: Evidence, link: Link) -> str:
    """The memory that the engine held."""
    frame = evidence.tables["memory"]
    return paragraphs(None if not frame else table(evidence, link, frame), no_record(evidence, "bench"))


def served_section(evidence: Evidence, link: Link) -> str:
    """Speeds that `vllm bench` measured on another machine."""
    frame = evidence.tables["served"]
    if not frame:
        return "No record yet: `harness import` takes what `vllm bench` wrote on another machine."
    return paragraphs(
        table(evidence, link, frame),
        "By `vllm bench` on another machine, as its files say; imported by `harness import`.",
    )


def overview_section(evidence: Evidence, link: Link) -> str:
    """The figure of sizes, losses and decode steps."""
    return image(evidence, link, "overview") or ""


def reproduce_section(evidence: Evidence, link: Link) -> str:
    """The commands that made the runs, by commit."""
    by_commit: dict[str, dict[str, None]] = {}
    for record in sorted(evidence.chosen, key=lambda record: record.run.started_utc):
        git = record.run.git
        commit = f"{git['commit'][:12]}{' with changes' if git['dirty'] else ''}" if git else "unknown"
        by_commit.setdefault(commit, {})[shlex.join(record.run.command)] = None
    if not by_commit:
        return "No record yet."
    parts = ("\n".join((f"# commit {commit}", *commands)) for commit, commands in by_commit.items())
    return paragraphs(
        "```sh\n" + "\n".join(parts) + "\n```",
        "These are the commands that made the runs below, by the commit of the harness that they ran at. In a checkout "
        "each subcommand is also a nox session that installs what it needs: `python -m pip install nox`, then for "
        "example `python -m nox -s ppl -- --suite FILE`. `harness report` then rewrites this page.",
    )


def runs_section(evidence: Evidence, link: Link) -> str:
    """Where every number comes from: runs, engines, machines, packages."""
    frame = evidence.tables["runs"]
    if not frame:
        return "No record yet."
    artifacts: dict[str, set[str | None]] = {}
    for row in frame.rows:
        artifacts.setdefault(row["variant"], set()).add(row["artifact"])
    changed = [variant for variant, digests in artifacts.items() if len(digests) > 1]
    packages: dict[str, list[str]] = {}
    for row in frame.rows:
        packages.setdefault(row["packages"], []).append(reference(evidence, link, row["run"]))
    return paragraphs(
        table(evidence, link, frame.without("packages")),
        *(
            f"**The runs of `{variant}` are not all of one artifact: measure again what is of an older one.**"
            for variant in changed
        ),
        "Packages:\n\n" + "\n".join(f"- {named}: {', '.join(those)}" for named, those in packages.items()),
    )
