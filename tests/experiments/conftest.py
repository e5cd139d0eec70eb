"""Makes the modules of experiments/ importable, as they are for a main in that folder."""

import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2] / "experiments"))
