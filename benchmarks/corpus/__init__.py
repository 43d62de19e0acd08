"""A fixed set of failing and healthy runs on which protections of a fit are compared.

`entries` reads the list of runs, ``corpus_1.csv``; `sources` finds them in the other benchmarks.
`records` runs them and keeps what it has run, `observer` sees what a protection changes, `scores`
computes the figures and `report` the tables. `docs/corpus.md` explains the figures and shows how to
enter a protection.
"""
