"""A sweep on SLURM: a job of one array each cell, followed by `squeue` to the end of the last of them.

hydra-submitit-launcher asks `sacct` how its jobs fare, which says nothing where the cluster keeps no accounts, and
stops at the first job that was lost. Here a job that ended without a result is a failed cell, named at the end of the
sweep like any other, and the rest go on. Needs the extra `slurm`; `failures.OnSharedDisk` imports it for such a sweep
alone.
"""

from __future__ import annotations

import dataclasses
import logging
import shutil
from collections.abc import Sequence

from hydra.core.singleton import Singleton
from hydra.core.utils import JobReturn, filter_overrides
from hydra_plugins.hydra_submitit_launcher import submitit_launcher
from hydra_plugins.hydra_submitit_launcher.config import BaseQueueConf

from cwac.core import failures
from cwac.core.errors import UsageError
from cwac.core.slurm_jobs import follow

log = logging.getLogger(__name__)


class SlurmLauncher(submitit_launcher.SlurmLauncher):
    """`submitit_slurm`, whose jobs are followed by `squeue` and whose sweep outlives a lost job."""

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> list[JobReturn]:
        """Submit the cells, wait for all; a lost one is recorded and returns infinity (`failures.lost`).

        Raises UsageError where there is no SLURM or where it refuses the jobs.
        """
        jobs = self.submit(job_overrides, initial_job_idx)
        array = jobs[0].job_id.split("_")[0]
        log.info("SLURM took the sweep's %d cells as job %s", len(jobs), array)
        try:
            lost = follow(jobs)
        except KeyboardInterrupt:
            log.warning("the sweep's jobs stay in SLURM's queue and go on; scancel %s ends them", array)
            raise
        returned = []
        for number, (job, overrides) in enumerate(zip(jobs, job_overrides, strict=True), initial_job_idx):
            if (state := lost.get(job.job_id)) is None and job.exception() is not None:
                state = "an error of the process itself"
            if state is None:
                returned.append(job.result())
                continue
            log_file = f"its log is {job.paths.stderr}"
            returned.append(failures.lost(number, overrides, f"SLURM's job {job.job_id} ended ({state}); {log_file}"))
        return returned

    def submit(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> list:
        """The jobs of submitit, one a cell."""
        import submitit

        if missing := [name for name in ("sbatch", "srun", "squeue") if shutil.which(name) is None]:
            raise UsageError(
                f"hydra/launcher=slurm: no {' and no '.join(missing)} on this machine; start the sweep on a machine "
                "that submits to SLURM, or choose hydra/launcher=local"
            )
        params = dict(self.params)
        folder, timeouts = params.pop("submitit_folder"), params.pop("max_num_timeout")
        shared = {field.name for field in dataclasses.fields(BaseQueueConf)}
        executor = submitit.AutoExecutor(cluster="slurm", folder=folder, slurm_max_num_timeout=timeouts)
        executor.update_parameters(**{k if k in shared else f"slurm_{k}": v for k, v in params.items()})
        numbers = range(initial_job_idx, initial_job_idx + len(job_overrides))
        for number, overrides in zip(numbers, job_overrides, strict=True):
            log.info("\t#%d : %s", number, " ".join(filter_overrides(overrides)))
        calls = [
            (list(overrides), "hydra.sweep.dir", number, f"job_id_for_{number}", Singleton.get_state())
            for number, overrides in zip(numbers, job_overrides, strict=True)
        ]
        try:
            return executor.map_array(self, *zip(*calls, strict=True))
        except submitit.core.utils.FailedJobError as error:
            raise UsageError(
                f"SLURM refused the sweep's {len(calls)} jobs: {' '.join(str(error).split())}; mend hydra.launcher "
                "(partition, account, qos, timeout_min, gpus_per_node, mem_gb, ...), or sweep fewer cells at once "
                "where the queue or an array may not be as long"
            ) from None
