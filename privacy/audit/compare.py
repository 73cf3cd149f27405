"""Two runs side by side: whether they draw on one budget, what each cost, and in what their configurations differ.

Two copies of one ledger that went on apart are the case to fear: noise is a function of (secret, ledger id, stage,
step, attempt), so both have used the same noise, and where it met other inputs the difference shows the data.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from itertools import chain, zip_longest
from pathlib import Path
from typing import Any, cast

from privacy.audit.claims import Claim, short
from privacy.audit.report import AuditReport, Spending, StageSpending

Record = Mapping[str, Any]
NoiseKey = tuple[str, int, int]  # stage, step, attempt


@dataclass(frozen=True)
class Row:
    """One thing of both runs, as text."""

    what: str
    first: str
    second: str

    @property
    def differs(self) -> bool:
        """Whether the two are not alike."""
        return self.first != self.second


@dataclass(frozen=True)
class Comparison:
    """Two audited runs; `claims` are about the two together, beside those of each report."""

    first: AuditReport
    second: AuditReport
    ledgers: str
    claims: list[Claim]
    rows: list[Row]

    @property
    def exit_code(self) -> int:
        """0 where every claim of either run and of the two together holds, else 1."""
        apart = any(not claim.holds for claim in self.claims)
        return 1 if apart or self.first.exit_code or self.second.exit_code else 0

    def as_dict(self) -> dict[str, Any]:
        """The comparison as JSON values, without the two reports themselves."""
        return {
            "runs": [self.first.run, self.second.run],
            "verdicts": [self.first.verdict, self.second.verdict],
            "exit_code": self.exit_code,
            "ledgers": self.ledgers,
            "claims": [asdict(claim) for claim in self.claims],
            "rows": [{**asdict(row), "differs": row.differs} for row in self.rows],
        }


def compare(first: AuditReport, second: AuditReport) -> Comparison:
    """Set two audit reports side by side. Where both ledgers have one id, the two files are read again."""
    rows = [Row("verdict", first.verdict, second.verdict)]
    spent = first.spending, second.spending
    if spent[0] is None or spent[1] is None:
        ledgers, claims = (
            "There are no two budgets to compare: at least one run has no ledger that could be read.",
            [],
        )
    else:
        ledgers, claims = _relation(spent[0], spent[1])
        rows += _spending_rows(spent[0], spent[1])
    return Comparison(first, second, ledgers, claims, rows + _stage_rows(first, second) + _config_rows(first, second))


# --- the two ledgers ---


def _relation(first: Spending, second: Spending) -> tuple[str, list[Claim]]:
    """How the two ledgers stand to each other, and what follows from it."""
    if first.ledger_id != second.ledger_id:
        if first.dataset_root != second.dataset_root:
            return "Different ledgers of different data sets: the runs spend nothing of each other's budget.", []
        claim = "one ledger holds all that was spent on the data set"
        seen = f"ledgers {first.ledger_id} and {second.ledger_id} are for the same data set {short(first.dataset_root)}"
        said = "Different ledgers of ONE data set: its records pay for both runs, and neither ledger says so."
        return said, [Claim(claim, False, seen)]
    if first.ledger == second.ledger:
        return "One ledger: both runs drew on the same budget, and its epsilon covers both.", []
    common, tails = _fork(Path(first.ledger), Path(second.ledger))
    claim = "no noise was used by both copies of the ledger"
    if not all(tails):
        said = "Two copies of one ledger" + (", alike." if not any(tails) else "; one goes on where the other ends.")
        return said, [Claim(claim, True, f"the first {common} lines are the same, and at most one goes on")]
    earlier = _charges_at(
        Path(first.ledger), {record["charge"] for tail in tails for record in tail if "charge" in record}
    )
    used = [_noise_keys(tail, earlier) for tail in tails]
    both = used[0].keys() & used[1].keys()
    other = sum(used[0][key] != used[1][key] for key in both)
    return (
        f"Two copies of one ledger that went apart after line {common}.",
        [Claim(claim, not both, f"both used {len(both)} noise keys, {other} of them with another input digest")],
    )


def _fork(first: Path, second: Path) -> tuple[int, tuple[list[Record], list[Record]]]:
    """How many lines two ledgers share from the beginning, and the records that follow in each."""
    with first.open("rb") as one, second.open("rb") as other:
        common = 0
        for left, right in zip_longest(one, other, fillvalue=b""):
            if left != right:
                return common, (_records([left, *one]), _records([right, *other]))
            common += 1
    return common, ([], [])


def _records(lines: Iterable[bytes]) -> list[Record]:
    return [json.loads(line) for line in lines if line.endswith(b"\n")]  # a torn last line is no record


def _charges_at(ledger: Path, seqs: set[int]) -> list[Record]:
    """The charges of these numbers; a record's number is that of its line, from 0."""
    with ledger.open("rb") as file:
        lines = [line for seq, line in enumerate(file) if seq in seqs]
    return [record for record in _records(lines) if record["type"] == "charge"]


def _noise_keys(tail: Iterable[Record], earlier: Iterable[Record]) -> dict[NoiseKey, str | None]:
    """Each noise key that the tail used -> the digest of what went in; None where its step was never finished.

    earlier: charges made before the tail, which it may finish.
    """
    keys = {record["seq"]: _noise_key(record) for record in earlier}
    used: dict[NoiseKey, str | None] = {}
    for record in tail:
        if record["type"] == "charge":
            key = keys[record["seq"]] = _noise_key(record)
            used[key] = None
        elif record["type"] == "done":
            used[keys[record["charge"]]] = record["digest"]
    return used


def _noise_key(charge: Record) -> NoiseKey:
    return charge["stage"], charge["step"], charge["attempt"]


# --- side by side ---


def _spending_rows(first: Spending, second: Spending) -> list[Row]:
    def row(what: str, name: str, form: str = "") -> Row:
        values = (getattr(spent, name) for spent in (first, second))
        return Row(what, *("none" if value is None else format(value, form) for value in values))

    return [
        row("epsilon", "epsilon", ".6g"),
        row("delta", "delta", "g"),
        row("unit", "unit"),
        row("relation", "relation"),
        row("data set", "dataset_root"),
        row("data set's cap", "dataset_cap"),
        row("charges", "charges", ","),
        row("never finished", "wasted", ","),
        row("replays", "replayed", ","),
        row("accountant", "accountant"),
        row("ledger", "ledger_id"),
        row("public key", "public_key"),
    ]


def _stage_rows(first: AuditReport, second: AuditReport) -> list[Row]:
    stages = [{stage.stage: stage for stage in report.stages if stage.own} for report in (first, second)]
    rows: list[Row] = []
    for name in sorted(stages[0].keys() | stages[1].keys()):
        values = [_stage_values(of_run.get(name)) for of_run in stages]
        for what in STAGE_VALUES:
            rows.append(Row(f"{name}: {what}", *(of_stage.get(what, "none") for of_stage in values)))
    return rows


STAGE_VALUES = ("sampling and noise", "steps", "charges", "epsilon alone", "code")


def _stage_values(stage: StageSpending | None) -> dict[str, str]:
    if stage is None:
        return {}
    values = (
        "; ".join(stage.mechanisms),
        f"{stage.steps:,}",
        f"{stage.charges:,}",
        f"{stage.epsilon_alone:.6g}",
        ", ".join(map(short, stage.code_versions)),
    )
    return dict(zip(STAGE_VALUES, values, strict=True))


def _config_rows(first: AuditReport, second: AuditReport) -> list[Row]:
    """Every key in which the finished stages' configurations differ; what is alike is left out."""
    rows: list[Row] = []
    for stage in dict.fromkeys(chain(first.configs, second.configs)):
        if stage in first.configs and stage in second.configs:
            one, other = (dict(_leaves(report.configs[stage])) for report in (first, second))
            keys = sorted(key for key in one.keys() | other.keys() if one.get(key) != other.get(key))
            rows += [Row(f"{stage}: {key}", one.get(key, "absent"), other.get(key, "absent")) for key in keys]
        else:
            rows.append(Row(f"{stage}: finished", *(str(stage in report.configs) for report in (first, second))))
    return rows


def _leaves(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for key, value in config.items():
        if isinstance(value, dict) and value:
            yield from _leaves(cast(dict[str, Any], value), f"{prefix}{key}.")
        else:
            yield prefix + key, json.dumps(value)
