"""The incidents of the made-up run: one of each sort of knowledge that the page can show."""

from tests.tensorboard.page_runs import NAN_AT, RATE_AT, WEIGHT_AT, incident, likely_cause

ORIGIN = {
    "op": "log",
    "kernel": "aten.log.default",
    "phase": "forward",
    "cause": "operation",
    "kind": "domain error",
    "value": "nan",
    "overflow": False,
    "dtype": "float16",
    "module": "network.decoder.layers.0.self_attention",
    "module_type": "Attention",
    "file": "/home/ada/translate/models/attention.py",
    "line": 87,
    "tensor": "",
    "inputs": [
        {
            "name": "weights",
            "shape": [8, 4, 64, 64],
            "dtype": "float16",
            "minimum": -0.0012,
            "maximum": 1.0,
            "nonfinite": 0,
        }
    ],
    "note": "",
    "advice": "clamp the argument into the range where the function is defined",
    "source": "def entropy(weights):\n    safe = weights.float()\n    return safe.log()",
    "source_line": 85,
}


def nan_batch(rows):
    return incident(
        1,
        "non-finite loss",
        rows[NAN_AT],
        rows,
        message="loss is nan; 26 parameters have a non-finite gradient",
        origin=ORIGIN,
        layers=[["network.decoder.layers.0.self_attention.query.weight", "nan"]],
        hypotheses=[
            likely_cause(
                "operation outside its domain",
                "certain",
                "log met a number below 0 in network.decoder.layers.0.self_attention",
                do="clamp the argument into the range where the function is defined",
                leave="if it came with one batch and did not return",
            ),
            likely_cause("bad batch", "possible", "the loss alone is out of the ordinary"),
        ],
        responses=["step retried", "step skipped"],
        strikes=2,
        verdict="deterministic",
        path="runs/translation/incidents/00000150-1",
    )


def damaged_weight(rows):
    return incident(
        2,
        "non-finite weight",
        rows[WEIGHT_AT],
        rows,
        message="loss is nan; 1 parameter is non-finite, first encoder.layers.2.norm.weight",
        layers=[["network.encoder.layers.2.norm.weight", "nan"]],
        hypotheses=[
            likely_cause(
                "weights damaged from outside",
                "likely",
                "a weight is non-finite and the step before it was healthy",
                "one element of 64 differs from its neighbours",
                do="look at the memory of the machine and at code that writes into weights",
                leave="if it does not return within a day",
            )
        ],
        evidence=["1 of 64 elements of network.encoder.layers.2.norm.weight is nan"],
        responses=["rolled back and replayed, learning rate x0.5"],
        verdict="transient",
        spans=[[WEIGHT_AT - 20, WEIGHT_AT]],
        path="runs/translation/incidents/00000250-2",
        pruned=True,
    )


def rate_jump(rows):
    return incident(
        3,
        "learning-rate jump",
        rows[RATE_AT],
        rows,
        message="learning rate 0.297 is 99 times the largest the run has tolerated; "
        "the update would move the weights by 0.4 of their norm",
        layers=[["network.decoder.layers.1.norm.weight", 81.0]],
        hypotheses=[
            likely_cause("learning rate jumped", "certain", "0.003 became 0.297 in one step")
        ],
        responses=["learning rate held, x0.0101", "stopped: the learning rate stays where it is"],
        outcome="stopped",
    )


def same_sample(rows):
    """The same bad sample in five epochs, and a spike between them."""
    known = {"origin": ORIGIN, "batch_size": 16, "outcome": "recurring", "batch_idx": 12}
    found = [
        incident(
            number,
            "non-finite loss",
            rows[number * 80],
            rows,
            **known,
            epoch=number,
            samples=[8],
            same_sample_as=1 if number > 1 else None,
            responses=["step skipped"],
        )
        for number in (1, 2, 3, 4, 5)
    ]
    return [*found, incident(6, "loss spike", rows[450], rows, outcome="observed")]


def three_incidents(rows):
    return [nan_batch(rows), damaged_weight(rows), rate_jump(rows)]
