"""What is saved of a run that goes wrong, by this suite and by everything else that could be used.

`tasks` are the models and their data, `troubles` what goes wrong, `table` and `healthy` the
scenarios, `run` one fit under one protection, `workers` many of them, `judge`, `report` and
`picture` what comes out.
"""
