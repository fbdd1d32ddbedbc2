"""Days of a run on a machine that fails now and then: expected, and at a percentile by simulation. No JAX.

Notation (seconds):
    W   work: steps, evaluations and growths without any pause
    T   work between two saves
    C   pause of the run for a save
    R   restart after a failure, until work goes on: detection, queue, restore, compilation
    M   mean time between failures of all devices together

Failures are independent of each other (exponential times between them), also during saves and restarts. A failure loses
the work since the last save. The expected time (J. T. Daly, "A higher order estimate of the optimum checkpoint interval
for restart dumps", 2006) is
    M exp(R / M) (exp((T + C) / M) - 1) W / T
and the interval that makes it least is about (the same paper; the first term is J. W. Young's of 1974)
    T = sqrt(2 C M) (1 + sqrt(C / 2M) / 3 + C / 18M) - C     if C < 2M, otherwise M
Example: C = 8 s and M = 10,000 s. sqrt(160,000) = 400, sqrt(C / 2M) = 0.02 and C / 18M = 0.0000444, so that
T = 400 (1 + 0.00667 + 0.0000444) - 8 = 394.7 s.
"""

import dataclasses
import math

import numpy as np

SECONDS_A_DAY = 86_400
# Failures of a device a day. Llama 3 405B had 419 unexpected interruptions in 54 days on 16,384 H100 (arXiv 2407.21783,
# table 5): 4.7e-4. OPT-175B had at least 35 restarts and over 100 exchanged hosts in two months on 992 A100 (arXiv
# 2205.01068, section 2.5): 6e-4 to 1.7e-3. The default lies between both.
FAILURES_A_DEVICE_DAY = 1e-3
SIMULATED_RUNS = 4_000


@dataclasses.dataclass(frozen=True)
class Operation:
    """Assumptions on how a run is operated; none was measured.

    Attributes:
        hours_between_failures: mean time between failures of all devices together.
        storage: bytes/s that all hosts together write to and read from storage.
        host_link: bytes/s from one device to the memory of its host; a save pauses the run for this copy alone.
        restart: seconds from a failure until the run restores: detection, queue and start of the processes.
    """

    hours_between_failures: float
    storage: float = 10e9
    host_link: float = 20e9
    restart: float = 600.0

    @property
    def seconds_between_failures(self) -> float:
        """Mean time between failures in seconds."""
        return self.hours_between_failures * 3600


def default_hours_between_failures(devices: int) -> float:
    """Mean time between failures of `devices` devices together, at FAILURES_A_DEVICE_DAY."""
    return 24 / (FAILURES_A_DEVICE_DAY * devices)


@dataclasses.dataclass(frozen=True)
class Phase:
    """A part of a run in which saves and restarts cost the same: a stage.

    Attributes:
        work, interval, save, restart: W, T, C and R in seconds.
    """

    work: float
    interval: float
    save: float
    restart: float


def best_interval(save: float, between_failures: float) -> float:
    """Seconds of work between two saves that lose the least time.

    Args:
        save: pause of the run for a save, in seconds; more than 0.
        between_failures: mean time between failures in seconds.
    """
    if save >= 2 * between_failures:
        return between_failures
    share = save / (2 * between_failures)
    return math.sqrt(2 * save * between_failures) * (1 + math.sqrt(share) / 3 + share / 9) - save


def expected_seconds(phase: Phase, between_failures: float) -> float:
    """Expected duration of a phase, pauses and failures included."""
    attempt = math.expm1((phase.interval + phase.save) / between_failures)
    restarts = math.exp(phase.restart / between_failures)
    return between_failures * restarts * attempt * phase.work / phase.interval


def simulated_seconds(phase: Phase, between_failures: float, seed: int, runs: int = SIMULATED_RUNS) -> np.ndarray:
    """Durations of a phase in simulated runs.

    Args:
        runs: number of simulated runs, N.

    Returns:
        Seconds, float64 (N,). The mean tends to expected_seconds for a phase of many intervals.
    """
    rng = np.random.default_rng(seed)
    cycle = phase.interval + phase.save
    cycles = phase.work / phase.interval
    total = np.full(runs, cycles * cycle)
    left = np.full(runs, cycles)  # cycles of work and save that a run still needs
    restart = np.zeros(runs)  # seconds of a restart that stand before them
    running = np.arange(runs)
    elapsed = np.zeros(runs)
    while len(running):
        failure = rng.exponential(between_failures, len(running))
        needed = restart[running] + left[running] * cycle
        done = failure >= needed
        total[running[done]] = elapsed[running[done]] + needed[done]
        running, failure = running[~done], failure[~done]
        elapsed[running] += failure
        worked = np.maximum(failure - restart[running], 0)  # a failure during a restart starts it again
        left[running] -= np.floor(worked / cycle)
        restart[running] = phase.restart
    return total


@dataclasses.dataclass(frozen=True)
class Calendar:
    """Days of a run.

    Attributes:
        pure: of steps alone.
        expected: of everything: steps, evaluations, growths, saves and restarts.
        percentile: days that 90 of 100 runs do not exceed.
        failures: expected number of failures.
    """

    pure: float
    expected: float
    percentile: float
    failures: float


def calendar(phases: list[Phase], steps: float, operation: Operation) -> Calendar:
    """The calendar of a run of `phases`, one after another.

    Args:
        steps: seconds of all steps.
    """
    between = operation.seconds_between_failures
    expected = sum(expected_seconds(phase, between) for phase in phases)
    runs = sum(simulated_seconds(phase, between, seed) for seed, phase in enumerate(phases))
    return Calendar(
        pure=steps / SECONDS_A_DAY,
        expected=expected / SECONDS_A_DAY,
        percentile=float(np.percentile(runs, 90)) / SECONDS_A_DAY,
        failures=expected / between,
    )
