"""The flag --config=FILE with its overrides, and the experiment that they describe."""

import sys
from pathlib import Path
from typing import NoReturn

from absl import app, flags
from ml_collections import ConfigDict, config_flags

_OFF: list[str] = []  # dotted keys that the command line sets to None
_SET: list[str] = []  # dotted keys that it sets to something else


def define_config() -> flags.FlagHolder:
    """The flag --config=FILE with its overrides --config.KEY=VALUE; VALUE None turns an option off."""
    for i, argument in reversed(list(enumerate(sys.argv))):
        key, _, value = argument.lstrip("-").partition("=")
        if argument.startswith("-") and key == "config":
            file = value or "".join(sys.argv[i + 1 : i + 2])
            if not Path(file.partition(":")[0]).is_file():
                fail(f"--config={file}: there is no such file; those that come with the project are in configs/")
        if not argument.startswith("-") or not key.startswith("config."):
            continue
        (_OFF if value == "None" else _SET).append(key.removeprefix("config."))
        if value == "None":
            del sys.argv[i]
    # Keys that the file does not have are let through, so that the error can name the closest one that there is.
    return config_flags.DEFINE_config_file(
        "config", None, "Experiment to run, a file of configs/.", lock_config=False, accept_new_attributes=True
    )


def experiment(config):
    """The checked experiment that the flags describe. Raises `ConfigError`."""
    from sparse_lm.config import ConfigError, closest, from_dict
    from sparse_lm.experiment import Experiment

    for key in _OFF:
        node, name = _node(config, key)
        if node is None or name not in node:
            raise ConfigError(key, None, f"unknown key; {closest(name, node or config)}")
        with node.ignore_type():
            node[name] = None
    for key in _SET:
        node, name = _node(config, key)
        # Another kind starts from its own defaults, not from the options of the file's.
        if node is not None and name == "kind":
            chosen = {k.rpartition(".")[2] for k in _SET if k.rpartition(".")[0] == key.rpartition(".")[0]}
            for other in [option for option in node if option not in chosen]:
                del node[other]
    return from_dict(Experiment, config)


def _node(config, key: str):
    *parents, name = key.split(".")
    for parent in parents:
        config = config.get(parent) if isinstance(config, ConfigDict) else None
    return config if isinstance(config, ConfigDict) else None, name


def fail(message: object) -> NoReturn:
    """Ends the process with one line of error."""
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)


def parse(argv: list[str]) -> list[str]:
    """Parses the flags; what is wrong with them ends the process with one line."""
    try:
        return app.parse_flags_with_usage(argv)
    except (KeyError, ValueError) as error:  # what the flags raise on a.b where there is no a, or it is off
        fail(f"one of {', '.join(f'--config.{key}' for key in reversed(_SET))} names no option: {error}")
