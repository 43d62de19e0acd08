"""Compares how many faulty runs this suite and other protections rescue.

`tasks` defines the models and their data, `disturbances` what goes wrong, `injected`, `recurring`
and `healthy` the scenarios, and `table` lists them. `run` runs one scenario with one protection,
`workers` many of them in parallel. `judge`, `report` and `picture` evaluate the outcomes.
"""
