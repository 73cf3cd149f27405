#!/usr/bin/env python3
"""Sample from a trained model: prompt in, PNG out; image in, caption out."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

EPILOG = """examples:
  sample.py --model runs/shapes --prompt "two large red circles on the left"       draws it into sample.png
  sample.py --model runs/shapes:pretrain --prompt "one small cyan ring at the top" --number 8 --guidance 3
  sample.py --model runs/shapes/export/model --image photo.png                     its caption, on the screen
  sample.py --model runs/shapes --image a.png --temperature 0.8 --number 4         four captions, drawn by chance
  sample.py --model runs/shapes --image a.png --prompt "<|image|> one large red square" --make image
  sample.py --model runs/shapes --prompt - --out drawn/ < prompts.txt              a PNG each, as the model made it
  sample.py --model runs/digits --label 3 --label 7 --number 10                    of a model of classes

Images are a function of the weights, the prompt, its place among all and --seed; captions too, at temperature 0 of the
weights and the image alone.

exit status: 0 done, 2 something for you to mend
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status."""
    arguments = _parser().parse_args(argv)
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    from train import check_packages

    try:
        check_packages()
        from train.sampling import sample

        return sample(arguments)
    except (ValueError, OSError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped: nothing more is written", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="sample.py", description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", required=True, metavar="RUN[:STAGE]|FOLDER", help="a run's last or named stage, or an export")
    add("--prompt", action="append", default=[], help="what to draw; repeatable; <|image|> stands for an --image; "
        "- reads lines from the standard input")  # fmt: skip
    add("--image", action="append", default=[], type=Path, metavar="FILE", help="what to tell in words; repeatable")
    add("--label", action="append", default=[], type=int, metavar="CLASS", help="of a model of classes; repeatable")
    add("--make", choices=("image", "text"), help="what comes next (default: image after prompts, else text)")
    add("--number", type=_positive, default=1, metavar="N", help="samples of each (default: %(default)s)")
    add("--out", type=Path, default=Path("sample.png"), help="one sheet, FILE.png, or a folder (default: %(default)s)")
    add("--guidance", type=_not_negative, default=2.0, help="how hard to press the prompt (default: %(default)s)")
    add("--sampler", choices=("euler", "heun"), default="euler", help="(default: %(default)s)")
    add("--steps", type=_positive, default=50, help="of the sampler (default: %(default)s)")
    add("--temperature", type=_not_negative, default=0.0, help="of captions; 0: the likeliest (default: %(default)s)")
    add("--seed", type=_seed, default=0, help="(default: %(default)s)")
    return parser


def _positive(text: str) -> int:
    if (value := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"{value} is too few: give at least 1")
    return value


def _seed(text: str) -> int:
    if not 0 <= (value := int(text)) < 2**64:
        raise argparse.ArgumentTypeError(f"{value} is out of range: give 0 to {2**64 - 1}")
    return value


def _not_negative(text: str) -> float:
    if not 0 <= (value := float(text)) < float("inf"):
        raise argparse.ArgumentTypeError(f"{value} is out of range: give 0 or more")
    return value


if __name__ == "__main__":
    sys.exit(main())
