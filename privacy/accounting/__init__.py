"""What a list of mechanism events costs: (epsilon, delta) for one unit, and what may be spent for a target epsilon.

`epsilon` sums up what was charged, by one of three accountants: PLD, by which we promise, and RDP and PRV, which check
it; PRV has nothing of the library that does the other two. `calibrate_noise`, `calibrate_sampling_rate` and `max_steps`
ask the other way round; `EpsilonCurve` answers a training loop's every step with a few dozen queries in all.
"""

from privacy.accounting.bounds import Accountant, delta_warning, describe, epsilon
from privacy.accounting.calibration import EpsilonCurve, calibrate_noise, calibrate_sampling_rate, max_steps
from privacy.accounting.tally import Spent

__all__ = [
    "Accountant",
    "EpsilonCurve",
    "Spent",
    "calibrate_noise",
    "calibrate_sampling_rate",
    "delta_warning",
    "describe",
    "epsilon",
    "max_steps",
]
