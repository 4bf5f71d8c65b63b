"""What is told of the machine, and the allocator's thresholds."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from kvcompress.measure import machine


def test_a_measured_process_gets_thresholds_and_threads(benchmark):
    malloc = benchmark("speed.malloc")
    tuned, plain = malloc.environment(3), malloc.environment(1, "default")
    assert tuned["OMP_NUM_THREADS"] == "3" and plain["OMP_NUM_THREADS"] == "1"
    assert "GLIBC_TUNABLES" not in plain
    assert ("GLIBC_TUNABLES" in tuned) == machine.uses_glibc()


@pytest.mark.skipif(not machine.uses_glibc(), reason="the allocator is not glibc's")
def test_a_script_starts_again_once_with_its_arguments(benchmark, tmp_path):
    script = tmp_path / "s.py"
    script.write_text(
        "import sys\nfrom kvcompress.measure import machine\n"
        "from speed.malloc import restart_tuned\n"
        "print('start', flush=True)\nrestart_tuned(2)\n"
        "print(machine.malloc_words(), sys.argv[1:])\n",
        encoding="utf-8",
    )
    own = {k: v for k, v in os.environ.items() if k not in ("GLIBC_TUNABLES", "OMP_NUM_THREADS")}
    own["PYTHONPATH"] = os.pathsep.join(sys.path)
    done = subprocess.run(
        [sys.executable, str(script), "--x", "1"], env=own, capture_output=True, text=True
    )
    assert done.stdout.splitlines() == [
        "start",
        "start",
        "glibc, thresholds raised ['--x', '1']",
    ], done.stderr


@pytest.mark.skipif(not machine.uses_glibc(), reason="the allocator is not glibc's")
def test_kept_memory_costs_no_page_faults():
    """128 MiB taken and given back again and again, in a process of its own."""
    code = (
        "import resource, sys\nfrom kvcompress.measure import machine\n"
        "if sys.argv[1] == 'keep': assert machine.keep_freed_memory()\n"
        "def turn():\n    x = bytearray(2**27); del x\n"
        "turn(); before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt\n"
        "for _ in range(3): turn()\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)\n"
    )
    own = {k: v for k, v in os.environ.items() if k != "GLIBC_TUNABLES"}
    own["PYTHONPATH"] = os.pathsep.join(sys.path)
    faults = [
        int(subprocess.check_output([sys.executable, "-c", code, how], env=own, text=True))
        for how in ("default", "keep")
    ]
    assert faults[1] < 1000
    if "never" in _huge_pages():
        assert faults[0] > 90_000  # 3 times 32768 pages of 4 KiB


def _huge_pages() -> str:
    """Which setting is in force: huge pages make few faults of many."""
    try:
        with open("/sys/kernel/mm/transparent_hugepage/enabled", encoding="utf-8") as file:
            return file.read().partition("[")[2].partition("]")[0]
    except OSError:
        return ""


def test_the_machine_is_told_without_guessing():
    assert machine.cpu_words()
    memory = machine.memory_bytes()
    assert memory is None or memory > 2**28
    assert machine.memory_bytes("NoSuchLine") is None
    found = machine.versions("torch", "no-such-package-at-all")
    assert "torch" in found and "no-such-package-at-all" not in found
