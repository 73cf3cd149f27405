"""The ledger by hand: who signs it, what it holds, and the change of its key.

python -m privacy show LEDGER
python -m privacy public-key [--key-file FILE]
python -m privacy rotate LEDGER [--key-file OLD] --new-key-file NEW
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from privacy.ledger import Ledger, LedgerError, LedgerView, public_key_of, read_ledger
from privacy.secrets import SecretError, create_key_file, load_master_secret, read_key_file, signing_seed

EPILOG = """\
exit status:
  0  done
  1  refused: the ledger or the key is missing, damaged, foreign or in use; nothing was changed
  2  wrong usage

No secret is ever printed. Where --key-file is left out, the environment's SFUMATO_SECRET is taken.
"""
ROTATE = """\
Hands a ledger to a new key: the old one signs the change, and nothing after it.

NEW is made (mode 0600) where it is not there yet. Do it while no run uses the ledger, then give every run the new
secret. Sampling and noise keys change with it; no noise is ever drawn twice, for the ledger charges each (stage, step,
attempt) once, under whichever key. A stage under way may go on where each step draws by Poisson and has noise of its
own; one with shuffled epochs or correlated noise must end first.

The old secret still tells the noise and the draws of every step before the change: destroy it, or keep it secret.
"""


def main(arguments: list[str] | None = None) -> int:
    """Run one command; the exit status."""
    given = _parser().parse_args(arguments)
    try:
        if given.command == "show":
            show(read_ledger(given.ledger, public_key=given.public_key, every_signature=given.every_signature))
        elif given.command == "public-key":
            print(public_key_of(signing_seed(load_master_secret(given.key_file))))
        else:
            rotate(given.ledger, given.key_file, given.new_key_file)
    except (LedgerError, SecretError, OSError) as error:
        print(f"privacy: {error}", file=sys.stderr)
        return 1
    return 0


def show(view: LedgerView) -> None:
    """Print what a verified ledger holds: whose it is, who signs it, and one line a stage."""
    opening = view.opening
    cap = "none" if opening["dataset_cap"] is None else f"epsilon {opening['dataset_cap']:g}"
    print(f"ledger      {opening['ledger_id']}: {view.num_records} records, {view.num_charges} charges, verified")
    print(f"protects    one {opening['unit']} of {opening['dataset_root']}, delta {opening['delta']:g}, cap {cap}")
    print(f"head        {view.head}")
    print(f"public key  {view.public_key}")
    for number, key in enumerate(view.public_keys[:-1]):
        print(f"gave up     {key} ({'opened with it' if number == 0 else 'rotated to it'})")
    if view.torn_bytes:
        print(f"torn        {view.torn_bytes} bytes after the last whole line: nobody acted on them")
    wasted = dict.fromkeys(view.stages, 0)
    for stage, _, _ in view.unfinished.values():
        wasted[stage] += 1
    for stage in sorted(view.stages | view.plans):
        tally = view.stages.get(stage)
        charges, steps, finished = 0, 0, 0
        if tally is not None:
            charges, steps, finished = sum(tally.attempts.values()), len(tally.attempts), len(tally.finished)
        planned = f" of {view.plans[stage]['steps']} planned" if stage in view.plans else ""
        print(
            f"stage       {stage}: {finished} steps done{planned}; {charges} charges, "
            f"{charges - steps} of them replays, {wasted.get(stage, 0)} not done"
        )


def rotate(path: Path, key_file: Path | None, new_key_file: Path) -> None:
    """Hand the ledger from one secret to another, making the new key file where there is none."""
    seed = signing_seed(load_master_secret(key_file))
    view = read_ledger(path)
    opening = view.opening
    with Ledger.open(
        path,
        delta=opening["delta"],
        unit=opening["unit"],
        dataset_root=opening["dataset_root"],
        signing_seed=seed,
        fencing_epoch=view.fencing_epoch,
    ) as ledger:
        if not new_key_file.exists():
            create_key_file(new_key_file)
        ledger.rotate(signing_seed(read_key_file(new_key_file)))
        print(f"{path} is signed by {ledger.public_key} from here on")
    print(f"give every run the secret in {new_key_file} (privacy.key_file or SFUMATO_SECRET)")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m privacy",
        description="The ledger by hand: who signs it, what it holds, and the change of its key.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    shown = commands.add_parser("show", help="verify a ledger and print what it holds, one line a stage")
    shown.add_argument("ledger", type=Path, metavar="LEDGER")
    shown.add_argument("--public-key", metavar="HEX", help="refuse a ledger that this key never signed")
    shown.add_argument("--every-signature", action="store_true", help="verify each one: a minute a million records")
    public = commands.add_parser("public-key", help="print the public key of a secret, for auditors to keep")
    rotated = commands.add_parser(
        "rotate",
        help="hand a ledger to a new key",
        description=ROTATE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    rotated.add_argument("ledger", type=Path, metavar="LEDGER")
    rotated.add_argument("--new-key-file", type=Path, metavar="NEW", required=True, help="made where it is missing")
    for command, name in ((public, "FILE"), (rotated, "OLD")):
        command.add_argument("--key-file", type=Path, metavar=name, help="default: the environment's SFUMATO_SECRET")
    return parser


if __name__ == "__main__":
    sys.exit(main())
