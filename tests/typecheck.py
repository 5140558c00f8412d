"""Checks calls against their annotations; `conftest.py` says whose."""

import beartype


def check_types(function):
    """As Python's numeric tower has it: an int where a float is expected."""
    return beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))(function)
