"""A method that takes its time, for testing what ends a sweep's jobs early."""

import os
import time
from dataclasses import dataclass

from cwac.methods.base import Method


@dataclass
class Pause(Method):
    """SFT that sleeps for CWAC_TEST_PAUSE seconds in every step, none where that is not set."""

    def penalty(self, model, step):
        time.sleep(float(os.environ.get("CWAC_TEST_PAUSE", "0")))
