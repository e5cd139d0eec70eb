"""Settings of the data pipeline that must not run are refused, with the key, the value and the way out."""

from __future__ import annotations

import pytest

from sparse_lm.config import ConfigError, from_dict, to_dict
from sparse_lm.data.config import MAX_TABLE, DataConfig, FactsConfig, GrammarConfig

REFUSED = [
    (DataConfig, {"source": "text"}, "path", "needs a path"),
    (DataConfig, {"source": "stdlib", "path": "/corpus"}, "path", "only data.source=text reads one"),
    (DataConfig, {"source": "facts", "length": 256}, "length", "multiple of 3"),
    (DataConfig, {"source": "web"}, "source", "stdlib"),
    (DataConfig, {"validation_fraction": 0.0}, "validation_fraction", "greater than 0"),
    (DataConfig, {"validation_fraction": 1.0}, "validation_fraction", "less than 1"),
    (DataConfig, {"max_bytes": 0}, "max_bytes", "at least 1"),
    (DataConfig, {"invalid_utf8": "ignore"}, "invalid_utf8", "replace"),
    (DataConfig, {"grammar": {"branching": 33}}, "grammar.branching", "num_symbols=32"),
    (DataConfig, {"grammar": {"num_symbols": 257}}, "grammar.num_symbols", "at most 256"),
    (GrammarConfig, {"order": 4}, "order", "at most 3"),
    (GrammarConfig, {"order": 3, "num_symbols": 64, "branching": 5}, "order", f"over {MAX_TABLE}"),
    (FactsConfig, {"num_values": 1}, "num_values", "at least 2"),
]


@pytest.mark.parametrize(
    ("kind", "values", "key", "says"), REFUSED, ids=[f"{case[2]}-{i}" for i, case in enumerate(REFUSED)]
)
def test_refused_with_key_and_way_out(kind, values, key, says):
    with pytest.raises(ConfigError) as caught:
        from_dict(kind, values)
    assert caught.value.key == key
    assert says in str(caught.value)


def test_largest_table_is_accepted():
    config = GrammarConfig(order=3, num_symbols=64, branching=4, num_domains=4)
    assert config.num_domains * config.num_symbols**config.order * config.branching == MAX_TABLE


def test_round_trip():
    config = DataConfig(source="facts", length=30, facts=FactsConfig(num_a=3))
    assert from_dict(DataConfig, to_dict(config)) == config
