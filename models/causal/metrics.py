"""Metrics of the causal classifier: accuracy of the next token and error of the number."""

from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from models.causal.batches import Batch
from models.causal.heads import Prediction
from models.causal.losses import probabilities


class CausalMetrics(Metric):
    """Metrics over an epoch; `nan` if no sentence of the kind occurred.

    `accuracy`: share of sentences whose next token, `<NUM>` included, has the highest probability.
    `num_accuracy`: the same for sentences that continue with a number. `num_rank`: mean rank of
    `<NUM>` in them, 1 being best. `num_probability`: mean probability of `<NUM>` in them.
    `num_false`: share of the other sentences in which `<NUM>` is ranked first. `value_mae`,
    `value_median_error`: mean and median absolute error of the predicted median, in the units of
    the numbers, for sentences that continue with a number that is not missing.
    """

    full_state_update = False

    def __init__(self, num_id: int, threshold: float, **kwargs: Any) -> None:
        """Creates the counters.

        Args:
            num_id: Class of `<NUM>`.
            threshold: Threshold of the scores.
            kwargs: Options of `torchmetrics.Metric`.
        """
        super().__init__(**kwargs)
        self.num_id, self.threshold = num_id, threshold
        counters = ("n_correct", "n_num_correct", "sum_rank", "sum_probability")
        for name in (*counters, "n_num_false", "n_numbers", "n_words"):
            self.add_state(name, torch.tensor(0.0, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("errors", [], dist_reduce_fx="cat")

    def update(self, prediction: Prediction, batch: Batch) -> None:
        """Adds a batch."""
        p_BK = probabilities(prediction.scores_BK, self.threshold)
        best_B, number_B = p_BK.argmax(dim=1), batch.target_B == self.num_id
        p_number_B = p_BK[:, self.num_id]
        rank_B = (p_BK > p_number_B.unsqueeze(1)).sum(dim=1) + 1
        self.n_correct += (best_B == batch.target_B).sum()
        self.n_num_correct += (best_B == self.num_id)[number_B].sum()
        self.n_num_false += (best_B == self.num_id)[~number_B].sum()
        self.sum_rank += rank_B[number_B].sum()
        self.sum_probability += p_number_B[number_B].double().sum()
        self.n_numbers += number_B.sum()
        self.n_words += (~number_B).sum()
        errors_B = prediction.value_B.loc.double() - batch.value_B.double()
        self.errors.append(errors_B[batch.known_B].abs())

    def compute(self) -> dict[str, Tensor]:
        """Returns all metrics by name."""
        errors = torch.cat(self.errors) if isinstance(self.errors, list) else self.errors
        nan = torch.tensor(float("nan"), device=errors.device)
        return {
            "accuracy": self.n_correct / (self.n_numbers + self.n_words),
            "num_accuracy": self.n_num_correct / self.n_numbers,
            "num_rank": self.sum_rank / self.n_numbers,
            "num_probability": self.sum_probability / self.n_numbers,
            "num_false": self.n_num_false / self.n_words,
            "value_mae": errors.mean() if len(errors) else nan,
            "value_median_error": errors.median() if len(errors) else nan,
        }
