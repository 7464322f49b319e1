"""The shipped recipes: a YAML file each, whose first line says what it does."""

from __future__ import annotations

from importlib import resources

from hf_kd.options import nearest

DEFAULT = "digits"


def names() -> list[str]:
    """The names of the shipped recipes, the default one first."""
    files = [entry.name for entry in resources.files(__name__).iterdir()]
    found = [name.removesuffix(".yaml") for name in files if name.endswith(".yaml")]
    return sorted(found, key=lambda name: (name != DEFAULT, name))


def text(name: str) -> str:
    """The YAML of a recipe.

    Raises:
        ValueError: no recipe of that name; the message offers the nearest one.
    """
    if name not in names():
        raise ValueError(
            f"no recipe is called {name!r}{nearest(name, names())} (there are {', '.join(names())})"
        )
    return (resources.files(__name__) / f"{name}.yaml").read_text(encoding="utf-8")


def launch_files() -> list[str]:
    """Paths of the shipped configurations of Accelerate."""
    folder = resources.files("hf_kd") / "accelerate"
    return sorted(str(entry) for entry in folder.iterdir() if entry.name.endswith(".yaml"))


def summary(name: str) -> str:
    """The first line of a recipe, without the comment sign."""
    return text(name).splitlines()[0].lstrip("# ")
