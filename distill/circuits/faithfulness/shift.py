"""Off distribution: does the circuit answer as the model does where the prompts change?"""

import torch

from distill.circuits.answers import two_way_loss
from distill.circuits.circuit import Circuit
from distill.circuits.faithfulness.check import Check, verdict_of
from distill.circuits.faithfulness.limits import Limits
from distill.circuits.faithfulness.runs import Runs
from distill.circuits.faithfulness.statistics import by_pair, share_p, spread_of
from distill.circuits.objectives import answer_kl
from distill.circuits.tasks import TaskBatch
from distill.model.run import Runnable


@torch.no_grad()
def shift(
    model: Runnable,
    circuit: Circuit,
    shifted: TaskBatch,
    *,
    limits: Limits | None = None,
    runs: Runs | None = None,
) -> Check:
    """The share of shifted prompts on which circuit and model prefer the same of the two answers.

        agreement = mean over prompts of [d_C > 0] = [d_M > 0],  d = logit of the right minus that of the wrong answer

    Agreement with the model and not with the label: where the model errs, so should its circuit. `shifted` holds
    prompts of the task's shifted split. Flagged below `agreement`; p is a binomial test that more pairs than that share
    agree in both their prompts. Details: arg max over the vocabulary, both losses, spread of the KL on the answers.
    CircuitMismatchError for a circuit of another model.
    """
    limits, runs = limits or Limits(), runs or Runs(model, circuit)
    logits, ours = runs.full(shifted), runs.ours(shifted)
    full, difference = runs.difference(shifted, logits), runs.difference(shifted, ours)
    same = ((full > 0) == (difference > 0)).double()
    agreement, both = float(same.mean()), int((by_pair(same) == 1).sum())
    seen = f"on shifted prompts circuit and model answer alike in {agreement:.1%} of cases"
    complaints = [f"{seen}, less than {limits.agreement:.1%}"] if agreement < limits.agreement else []
    verdict, reason = verdict_of(complaints, seen)
    return Check(
        name="shift",
        value=agreement,
        threshold=limits.agreement,
        verdict=verdict,
        reason=reason,
        n=len(shifted),
        p=share_p(both, len(shifted) // 2, limits.agreement),
        details={
            "agreement_vocabulary": float((logits.argmax(-1) == ours.argmax(-1)).double().mean()),
            "loss_circuit": float(two_way_loss(difference)),
            "loss_full": float(two_way_loss(full)),
            **spread_of("kl_answers", answer_kl(full, difference)),
        },
    )
