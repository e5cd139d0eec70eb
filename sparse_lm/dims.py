"""The legend of shape letters. An array's suffix names its axes in order: `x_GSD` has shape [groups, tokens, model].

| letter | axis | | letter | axis |
|---|---|---|---|---|
| B | batch (sequences) | | G | routing groups |
| L | length (tokens of a sequence) | | S | tokens of a group |
| T | keys and values a query may look at | | E | experts |
| D | model width | | K | experts chosen for a token |
| F | hidden width of an MLP or an expert | | C | slots (capacity) of an expert |
| H | query heads | | N | layers |
| J | key/value heads | | V | vocabulary |
| I | width of a head | | U | statistics units (see `moe.types.RouterStats`) |
| M | all tokens of a device, groups flat | | R | rows of an expert (its slots in all groups) |
| P | latents of keys and values | | Q | latents of queries |
| A | rotated width of a head, where another is not | | W | width of a value, where it differs from I |

Letters on parameters and activations are the logical axes that `sparse_lm.sharding` maps to mesh axes.
"""

LETTERS = {
    "B": "batch",
    "L": "length",
    "T": "keys",
    "D": "model",
    "F": "hidden",
    "H": "query heads",
    "J": "key/value heads",
    "I": "head width",
    "G": "groups",
    "S": "tokens per group",
    "E": "experts",
    "K": "chosen experts",
    "C": "slots per expert",
    "N": "layers",
    "V": "vocabulary",
    "U": "statistics units",
    "R": "rows of an expert",
    "M": "tokens of a device",
    "P": "latents of keys and values",
    "Q": "latents of queries",
    "A": "rotated head width",
    "W": "value width",
}
