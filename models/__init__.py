"""Reference models that exercise the callbacks, one folder each; each folder has a README."""
