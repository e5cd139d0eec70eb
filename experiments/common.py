"""What the mains share: flags for an experiment, virtual devices, and errors as one line instead of a traceback."""

import gc
import os
import sys
import traceback
from collections.abc import Callable

from absl import app, flags, logging
from overrides import define_config, experiment, fail, parse

__all__ = ["DEVICES", "WITHOUT_A_TPU", "define_config", "experiment", "run"]

DEVICES = flags.DEFINE_integer("devices", None, "Run on N virtual CPU devices; None uses the machine's own.", 1)
# The TPU compiler needs no TPU: it shall not look for one, nor keep other processes from compiling.
WITHOUT_A_TPU = {"ALLOW_MULTIPLE_LIBTPU_LOAD": "1", "TPU_SKIP_MDS_QUERY": "1"}
# Of XLA's pool, as large as there are cores or devices. A program from the compilation cache has lost the order of its
# collectives, and each that waits for other devices holds a thread: all threads can be waiting.
THREADS_PER_DEVICE = 32
AGAIN = 75  # the status of an error that may be gone at the next try


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
            threads = THREADS_PER_DEVICE * DEVICES.value
            os.environ["NPROC"] = str(max(threads, int(os.environ.get("NPROC") or 0)))
        from sparse_lm.config import ConfigError
        from sparse_lm.data.documents import DataError
        from sparse_lm.memory import keep_freed
        from sparse_lm.train.distributed import HostsError
        from sparse_lm.train.loop import TrainingError
        from sparse_lm.train.manifest import CheckpointError

        keep_freed(os.environ)
        gc.freeze()  # what is imported stays: looking through it took half of the time to read the quickstart text
        try:
            main()
        except HostsError as error:
            _end(error, AGAIN)
        except (ConfigError, DataError, CheckpointError, TrainingError) as error:
            if jax.distributed.is_initialized():
                _end(error, 2)
            fail(error)
        except (Exception, KeyboardInterrupt):
            if jax.distributed.is_initialized():
                traceback.print_exc()
                _end("the other processes end as well", 1)
            raise

    app.run(start, flags_parser=parse)


def _end(message: object, status: int) -> None:
    """Ends one of several processes at once: an orderly end would wait for the others, who wait for this one."""
    print(f"error: {message}", file=sys.stderr, flush=True)
    sys.stdout.flush()
    os._exit(status)
