"""A sweep on a Ray cluster: a task each cell.

hydra-ray-launcher ends the sweep with the first task whose process was lost, and with it the tasks that still run.
Here such a task is a failed cell, named at the end of the sweep like any other, and the rest go on. Needs the extra
`ray`; `failures.OnSharedDisk` imports it for such a sweep alone.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import time
from collections.abc import Sequence
from pathlib import Path

import ray
from hydra.core.singleton import Singleton
from hydra.core.utils import JobReturn, configure_log, filter_overrides, setup_globals
from hydra_plugins.hydra_ray_launcher import ray_launcher
from hydra_plugins.hydra_ray_launcher._launcher_util import launch_job_on_ray, start_ray
from omegaconf import open_dict

from cwac.core import failures
from cwac.core.errors import UsageError

log = logging.getLogger(__name__)


def knock(address: str | None) -> None:
    """Raises OSError where nothing listens at `host:port`, which Ray itself takes many minutes to say.

    `auto` is RAY_ADDRESS where that is set; any other address is left to Ray.
    """
    named = os.environ.get("RAY_ADDRESS", "") if address == "auto" else address or ""
    host, _, port = named.rpartition(":")
    if host and "/" not in host and port.isdigit():
        socket.create_connection((host, int(port)), timeout=10).close()


class RayLauncher(ray_launcher.RayLauncher):
    """`ray`, whose sweep outlives a lost task."""

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> list[JobReturn]:
        """Start the cells, wait for all; a lost one is recorded and returns infinity (`failures.lost`).

        Ray itself starts a task whose process died again, `hydra.launcher.ray.remote.max_retries` times (3 where that
        is not set); the cell then goes on from its last checkpoint. Raises UsageError where there is no cluster.
        """
        setup_globals()
        configure_log(self.config.hydra.hydra_logging, self.config.hydra.verbose)
        Path(str(self.config.hydra.sweep.dir)).mkdir(parents=True, exist_ok=True)
        signals = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
        try:
            knock(self.ray_cfg.init.get("address"))
            start_ray(self.ray_cfg.init)
        except (OSError, ValueError) as error:
            raise UsageError(
                f"hydra/launcher=ray_cluster: Ray could not be reached at hydra.launcher.ray.init.address="
                f"{self.ray_cfg.init.get('address')} ({str(error).splitlines()[0]}); start the cluster (ray start "
                "--head), or set hydra.launcher.ray.init.address=null for one of this sweep's own"
            ) from None
        for number, handler in signals.items():  # Ray's own for SIGTERM aborts the process without a word
            signal.signal(number, handler)
        numbers = range(initial_job_idx, initial_job_idx + len(job_overrides))
        tasks = [self.task(number, overrides) for number, overrides in zip(numbers, job_overrides, strict=True)]
        log.info("Ray took the sweep's %d cells", len(tasks))
        while ray.wait(tasks, num_returns=len(tasks), timeout=0)[1]:
            time.sleep(1)  # here a signal reaches us as it is; Ray's own waiting makes Ctrl-C of every one
        returned = []
        for number, overrides, task in zip(numbers, job_overrides, tasks, strict=True):
            try:
                returned.append(ray.get(task))
            except ray.exceptions.RayError as error:
                ended = f"Ray's task ended without a result ({type(error).__name__})"
                returned.append(failures.lost(number, overrides, ended))
        return returned

    def task(self, number: int, overrides: Sequence[str]):
        """The cell as Ray's task: what will hold its `JobReturn`."""
        log.info("\t#%d : %s", number, " ".join(filter_overrides(overrides)))
        config = self.hydra_context.config_loader.load_sweep_config(self.config, list(overrides))
        with open_dict(config):
            config.hydra.job.id, config.hydra.job.num = f"job_id_for_{number}", number
        state = Singleton.get_state()
        return launch_job_on_ray(self.hydra_context, self.ray_cfg.remote, config, self.task_function, state)
