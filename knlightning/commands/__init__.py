"""The command `knl`: a file for each of its commands.

A module here that defines `main` is a command, named after the file; the first line of its docstring is its
help. `main.py` finds it, nothing else needs to know of it.
"""
