"""The command ``lit-stability``: runs by config, checks, reports; one file for each subcommand.

This file imports nothing: a misspelt command line is answered before torch is loaded.
"""
