"""What pytest does not collect: a script that imports `pytorch_lightning` is run by a test."""

collect_ignore = ["under_pytorch_lightning.py"]
