"""Mirrors a run to Weights & Biases under `logger=wandb`; the files in the run directory stay the source."""

from __future__ import annotations

from omegaconf import DictConfig, OmegaConf

from cwac.core.run_dir import Run

BESIDE = ("n", "stderr")
"""What stands beside a value in the summary, as `n/<metric>/<set>`."""


class Tracker:
    """Context manager; does nothing under `logger=csv`."""

    def __init__(self, cfg: DictConfig, run: Run):
        self.cfg, self.run, self.session = cfg, run, None

    def __enter__(self) -> Tracker:
        if self.cfg.logger.name == "wandb" and self.run.leads:
            import wandb

            self.session = wandb.init(
                project=self.cfg.logger.project,
                entity=self.cfg.logger.entity,
                mode=self.cfg.logger.mode,
                id=self.run.id,
                name=self.run.id,
                resume="allow",
                dir=str(self.run.dir),
                config=OmegaConf.to_container(self.cfg, resolve=True),
            )
        return self

    def __exit__(self, kind, value, traceback) -> None:
        if self.session is not None:
            self.session.finish(exit_code=0 if kind is None else 1)

    def log(self, row: dict) -> None:
        """A line of the loss log; `step` becomes the x axis."""
        if self.session is not None:
            self.session.log({f"train/{k}": v for k, v in row.items() if v is not None}, step=row["step"])

    def summary(self, rows: list[dict]) -> None:
        """Final metric values, with the n and standard error of each. Generations never leave the machine."""
        if self.session is None:
            return
        for r in rows:
            if r.get("final"):
                beside = {f"{k}/{r['metric']}/{r['set']}": r[k] for k in BESIDE if r.get(k) is not None}
                self.session.summary.update({f"{r['metric']}/{r['set']}": r["value"], **beside})
