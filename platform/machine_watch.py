"""MLflow's own watch of the machine that a run is on: processor, memory, disk, network and GPU, under `system/`."""

import logging
from typing import TYPE_CHECKING

from esper.platform.console import say

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor


class MachineWatch:
    """MLflow's monitor for one run. An outage of the server ends that: `keep`, called often, begins it again."""

    def __init__(self, uri: str) -> None:
        self.wanted = True
        self._uri = uri
        self._monitor: SystemMetricsMonitor | None = None

    def keep(self, client: "MlflowClient", run_id: str) -> None:
        """Let MLflow watch the machine, unless it does."""
        if not self.wanted:
            return
        if self._monitor is not None and self._monitor._process is not None and self._monitor._process.is_alive():
            return
        logging.getLogger("mlflow.system_metrics").setLevel(logging.CRITICAL)
        try:
            from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

            client.get_run(run_id)  # where it does not answer, the monitor would count from 0 again
            self._monitor = SystemMetricsMonitor(run_id, resume_logging=True, tracking_uri=self._uri)
            self._monitor.start()
        except ImportError as error:
            self.wanted = False
            say(f"MLflow cannot watch this machine ({error}): pip install {error.name}.")
        except Exception:  # the next look tries again
            return

    def end(self, *, wait: bool) -> None:
        """Let it stop; where that is waited for, its last values are sent."""
        self.wanted = False
        monitor, self._monitor = self._monitor, None
        if monitor is not None and wait:
            monitor.finish()
        elif monitor is not None:
            monitor._shutdown_event.set()
