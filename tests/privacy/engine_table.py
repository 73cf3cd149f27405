"""Prints docs/results/engines.md's table: `python -m tests.privacy.engine_table`."""

import torch

from tests.privacy.clipped_sums import ENGINES
from tests.privacy.layer_cases import CASES, SEVERAL_ROWS
from tests.privacy.test_clipping import ALL, batch, clipped_sum, expected_sum, losses_on, relative_error, small_dit
from tests.privacy.test_engines import OPACUS, error_of


def worst_of_layer(cases: dict, layer: str, engine: str, dtype: torch.dtype) -> float:
    return max(error_of(cases[layer](num_tokens).to(dtype), engine) for num_tokens in (3, 40))


def worst_of_dit(engine: str, dtype: torch.dtype) -> float:
    errors: list[float] = []
    for num_draws in (1, 3):
        model, inputs = small_dit(dtype), batch(num_draws, dtype)
        expected, bound = expected_sum(engine, model, inputs)
        errors.append(relative_error(clipped_sum(engine, model, losses_on(inputs), ALL, bound), expected))
    return max(errors)


def main() -> None:
    torch.manual_seed(0)
    print(f"| layer | {' | '.join(ENGINES)} | Opacus |")
    print("|---|" + "---|" * (len(ENGINES) + 1))
    dtypes = (torch.float64, torch.float32)
    for kind, cases in (("", CASES), (", 3 rows a record", SEVERAL_ROWS)):
        for layer in cases:
            cells = (" / ".join(f"{worst_of_layer(cases, layer, e, d):.0e}" for d in dtypes) for e in ENGINES)
            print(f"| {layer}{kind} | {' | '.join(cells)} | {'yes' if layer in OPACUS and not kind else ''} |")
    cells = (" / ".join(f"{worst_of_dit(engine, dtype):.0e}" for dtype in dtypes) for engine in ENGINES)
    print(f"| whole DiT, 1 and 3 rows a record | {' | '.join(cells)} | |")


if __name__ == "__main__":
    main()
