"""Refuse to submit what nodes without a network could not fetch, and say how to bring it here."""

import os
from pathlib import Path

from peft_dist.common.errors import ClusterError, LaunchError
from peft_dist.config import Recipe
from peft_dist.config.cluster import Cluster
from peft_dist.config.method import hub_adapter
from peft_dist.data.fetched import missing_of_adapter, missing_of_dataset, missing_of_model
from peft_dist.data.first_rows import hub_sources

VARIABLES = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
"""What keeps libraries from asking, and from waiting for an answer."""


def check_model(cluster: Cluster, name: str, revision: str | None, *, remedy: str) -> None:
    """Refuse a hub model that a node could not fetch.

    Raises:
        LaunchError: Naming what is missing.
    """
    if not cluster.offline or Path(name).is_absolute():
        return
    missing = missing_of_model(name, revision, _environ(cluster))
    if missing:
        raise LaunchError(
            f"{name} {missing}, and nodes reach no network", where="model.name", remedy=remedy
        )


def check_recipe(cluster: Cluster, recipe: Recipe, recipe_file: str) -> list[str]:
    """Refuse what a node could not fetch of a recipe; return what is only worth a word.

    Raises:
        LaunchError: Naming what is missing.
    """
    if not cluster.offline:
        return []
    remedy = f"`peft-dist fetch {recipe_file} --cluster FILE` on a login node"
    check_model(cluster, recipe.model.name, recipe.model.revision, remedy=remedy)
    start = hub_adapter(recipe.method.start_from or "")
    if start is not None and (missing := missing_of_adapter(*start, _environ(cluster))):
        raise LaunchError(
            f"{start[0]} {missing}, and nodes reach no network",
            where="method.start_from",
            remedy=remedy,
        )
    for source in hub_sources(recipe):
        missing = missing_of_dataset(source.name, source.split, _environ(cluster))
        if missing:
            raise LaunchError(
                f"{source.name} {missing}, and nodes reach no network", where="data", remedy=remedy
            )
    if recipe.tracking.wandb.mode == "online":
        return ["tracking.wandb.mode: nodes reach no network: `peft-dist sync` sends what they log"]
    return []


def check_image(cluster: Cluster) -> None:
    """Refuse an image that nodes would have to pull.

    Raises:
        ClusterError: Naming it.
    """
    container = cluster.container
    if not cluster.offline or container is None or container.runtime in ("shifter", "edf"):
        return
    image = container.image
    if "://" in image or (container.runtime == "pyxis" and not image.startswith(("/", "."))):
        raise ClusterError(
            f"{image} is pulled from a registry, and nodes reach no network",
            where="container.image",
            remedy="pull it into a file on a login node, and name that",
        )


def _environ(cluster: Cluster) -> dict[str, str]:
    return {**os.environ, **{name: str(value) for name, value in cluster.environment.items()}}
