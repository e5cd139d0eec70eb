"""In what language a text is, natural or of programs: known by domain, from the source of the data or as declared."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Int

from sparse_lm.analysis.classes import Labels
from sparse_lm.config import ConfigError, closest
from sparse_lm.data.config import DataConfig

STDLIB = {"code": "Python", "docs": "English", "license": "English"}


def parse(declared: str | None) -> dict[str, str]:
    """`en=English,src=C,German` as {en: English, src: C, German: German}: a domain alone is named by its language.

    Raises `ConfigError` for a part without a name, and a domain that is named twice.
    """
    found: dict[str, str] = {}
    for part in declared.split(",") if declared else ():
        domain, _, language = (word.strip() for word in part.partition("="))
        if not domain or ("=" in part and not language):
            raise ConfigError("languages", part, "expected domain=language, or the name of a domain that is a language")
        if domain in found:
            raise ConfigError("languages", part, f"{domain} is {found[domain]} already; name a domain once")
        found[domain] = language or domain
    return found


def languages(data: DataConfig, domains: Sequence[str], declared: Mapping[str, str]) -> tuple[str | None, ...]:
    """The language of each domain; None where nothing tells.

    What is declared comes first. Of `stdlib`, code is Python and all else English. Each chain of `grammar` is a
    language of its own. Neither the name of a folder nor that of a file says what is written there, so that domains of
    `text` have the language that is declared, if any. Raises `ConfigError` when a declared domain is not of the data.
    """
    for name in declared:
        if name not in domains:
            raise ConfigError("languages", name, f"is no domain of these data; {closest(name, domains)}")
    known = {"stdlib": STDLIB, "grammar": dict(zip(domains, domains, strict=True))}.get(data.source, {})
    return tuple(declared.get(name, known.get(name)) for name in domains)


def language_labels(of_domain: Sequence[str | None], domain_M: Int[np.ndarray, "M"]) -> Labels:
    """The language of every token, -1 where it is not known; names are those that a token has, in order."""
    there = {name for i in np.unique(domain_M) if (name := of_domain[int(i)]) is not None}
    names = tuple(sorted(there))
    number = np.array([-1 if name not in there else names.index(name) for name in map(str, of_domain)], int)
    return Labels(names, number[domain_M])
