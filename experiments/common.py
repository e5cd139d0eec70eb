"""What the mains share: flags for an experiment, virtual devices, and errors as one line instead of a traceback."""

from collections.abc import Callable

from absl import app, flags, logging
from overrides import define_config, experiment, fail, parse

__all__ = ["DEVICES", "define_config", "experiment", "run"]

DEVICES = flags.DEFINE_integer("devices", None, "Run on N virtual CPU devices; None uses the machine's own.", 1)


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

    app.run(start, flags_parser=parse)
