"""How well the classifier does, of whole sentences: what comes next, and which number."""

from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from models.causal.batches import Batch
from models.causal.heads import Prediction
from models.causal.losses import probabilities


class CausalMetrics(Metric):
    """What a prediction is worth, over an epoch; `nan` where no sentence of the kind was seen.

    `accuracy`: share of sentences whose next token, `<NUM>` included, has the highest probability.
    `num_accuracy`: the same of the sentences after which a number comes. `num_rank`: mean rank of
    `<NUM>` there, 1 the best. `num_probability`: its mean probability there. `num_false`: share
    of the other sentences at which `<NUM>` is ranked first. `value_mae`, `value_median_error`:
    mean and median absolute error of the median prediction, in the units of the numbers, where a
    number that is not missing comes next.
    """

    full_state_update = False

    def __init__(self, num_id: int, threshold: float, **kwargs: Any) -> None:
        """Take the class of a number and the threshold of the scores."""
        super().__init__(**kwargs)
        self.num_id, self.threshold = num_id, threshold
        for name in ("right", "first", "ranks", "probabilities", "wrong", "numbers", "words"):
            self.add_state(name, torch.tensor(0.0, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("errors", [], dist_reduce_fx="cat")

    def update(self, prediction: Prediction, batch: Batch) -> None:
        """Take in a batch."""
        p_BK = probabilities(prediction.scores_BK, self.threshold)
        best_B, number_B = p_BK.argmax(dim=1), batch.target_B == self.num_id
        p_number_B = p_BK[:, self.num_id]
        rank_B = (p_BK > p_number_B.unsqueeze(1)).sum(dim=1) + 1
        self.right += (best_B == batch.target_B).sum()
        self.first += (best_B == self.num_id)[number_B].sum()
        self.wrong += (best_B == self.num_id)[~number_B].sum()
        self.ranks += rank_B[number_B].sum()
        self.probabilities += p_number_B[number_B].double().sum()
        self.numbers += number_B.sum()
        self.words += (~number_B).sum()
        errors_B = prediction.value_B.loc.double() - batch.value_B.double()
        self.errors.append(errors_B[batch.known_B].abs())

    def compute(self) -> dict[str, Tensor]:
        """Give every figure."""
        errors = torch.cat(self.errors) if isinstance(self.errors, list) else self.errors
        nothing = torch.tensor(float("nan"), device=errors.device)
        return {
            "accuracy": self.right / (self.numbers + self.words),
            "num_accuracy": self.first / self.numbers,
            "num_rank": self.ranks / self.numbers,
            "num_probability": self.probabilities / self.numbers,
            "num_false": self.wrong / self.words,
            "value_mae": errors.mean() if len(errors) else nothing,
            "value_median_error": errors.median() if len(errors) else nothing,
        }
