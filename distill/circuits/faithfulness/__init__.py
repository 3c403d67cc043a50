"""Is a circuit what the model does, or an artefact of pruning? One file per check, each a pure function.

Every check returns a `Check`: a value, the same value for controls where there are any, the threshold, and what
follows from them. `distill.circuits.scorecard` runs them all and says in words what they come to. A check takes the
model, the circuit and a batch of prompts that pruning never saw; `limits` holds every threshold and sample size, `seed`
is that of what it draws, and `runs` what was run already.
"""

from distill.circuits.faithfulness.check import Check, Verdict, skipped
from distill.circuits.faithfulness.limits import Limits
from distill.circuits.faithfulness.runs import Runs

__all__ = ["Check", "Limits", "Runs", "Verdict", "skipped"]
