"""The options of the configuration's groups, as Hydra lists them."""

from hydra import initialize_config_dir
from hydra.core.global_hydra import GlobalHydra

from cwac.core import config, paths  # noqa: F401  config registers the searches of the methods


def options(group: str) -> list[str]:
    """The options Hydra finds in a group."""
    with initialize_config_dir(str(paths.CONF), version_base="1.3"):
        found = GlobalHydra.instance().config_loader().get_group_options(group)
    return [name for name in found if not name.startswith("_")]  # `_hub` is what the hub models share


METHODS, MODELS, TASKS, PRESETS = (options(g) for g in ("method", "model", "task", "experiment"))
