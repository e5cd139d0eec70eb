"""What the mains share: flags for an experiment, virtual devices, and errors as one line instead of a traceback."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from absl import app, flags, logging
from ml_collections import ConfigDict, config_flags

DEVICES = flags.DEFINE_integer("devices", None, "Run on N virtual CPU devices; None uses the machine's own.", 1)
_OFF: list[str] = []  # dotted keys that the command line sets to None
_SET: list[str] = []  # dotted keys that it sets to something else


def define_config() -> flags.FlagHolder:
    """The flag --config=FILE with its overrides --config.KEY=VALUE; VALUE None turns an option off."""
    for i, argument in reversed(list(enumerate(sys.argv))):
        key, _, value = argument.lstrip("-").partition("=")
        if key == "config" and value and not Path(value.partition(":")[0]).is_file():
            fail(f"--config={value}: there is no such file; those that come with the project are in configs/")
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
        if name == "kind":  # another kind starts from its own defaults, not from the options of the file's
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


def _parse(argv: list[str]) -> list[str]:
    try:
        return app.parse_flags_with_usage(argv)
    except (KeyError, ValueError) as error:  # what the flags raise on a.b where there is no a, or it is off
        fail(f"one of {', '.join(f'--config.{key}' for key in reversed(_SET))} names no option: {error}")


def run(main: Callable[[], None]) -> None:
    """Parses the flags, sets up the devices and calls `main`; an expected error is one line and exit status 2."""

    def start(argv: list[str]) -> None:
        if len(argv) > 1:
            raise app.UsageError(f"unexpected arguments: {' '.join(argv[1:])}")
        logging.set_verbosity(logging.ERROR)
        import jax

        if DEVICES.value:
            jax.config.update("jax_platforms", "cpu")
            jax.config.update("jax_num_cpu_devices", DEVICES.value)
        from sparse_lm.config import ConfigError
        from sparse_lm.data.documents import DataError
        from sparse_lm.train.loop import TrainingError
        from sparse_lm.train.manifest import CheckpointError

        try:
            main()
        except (ConfigError, DataError, CheckpointError, TrainingError) as error:
            fail(error)

    app.run(start, flags_parser=_parse)
