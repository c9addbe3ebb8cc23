# SPDX-License-Identifier: Apache-2.0
"""The gate for tests that need QEMU, tried on runs of its own."""

from __future__ import annotations

from pathlib import Path

import pytest

TESTS = """
    import pytest

    @pytest.mark.qemu
    def test_cell(): pass

    def test_other(): pass
"""


def run(
    pytester: pytest.Pytester, qemu: str | None, debian: bool, *args: str, full: bool = True
) -> pytest.RunResult:
    # Workers are processes of their own and have to find the plugin again.
    here = Path(__file__).parent
    pytester.makeini(f"[pytest]\npythonpath = {here}\nmarkers =\n    qemu: needs QEMU\n")
    pytester.makeconftest(
        f"""
        from qemu_gate import QemuGate

        def pytest_configure(config):
            config.pluginmanager.register(QemuGate(qemu={qemu!r}, debian={debian}, full_run={full}))
        """
    )
    return pytester.runpytest_inprocess("-rs", *args)


def test_runs_where_qemu_is(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(TESTS)
    result = run(pytester, "/usr/bin/qemu-system-x86_64", True)
    result.assert_outcomes(passed=2)
    assert result.ret == pytest.ExitCode.OK


def test_skips_with_the_reason_where_it_is_not(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(TESTS)
    result = run(pytester, None, False)
    result.assert_outcomes(passed=1, skipped=1)
    result.stdout.fnmatch_lines(["*qemu-system-x86_64 is not installed*"])
    assert result.ret == pytest.ExitCode.OK


def test_fails_on_debian_where_it_is_not(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(TESTS)
    result = run(pytester, None, True, full=False)
    result.assert_outcomes(passed=1, errors=1)
    result.stdout.fnmatch_lines(["*apt install qemu-system-x86*"])
    assert result.ret == pytest.ExitCode.TESTS_FAILED


@pytest.mark.parametrize("body", ["def test_other(): pass", "def other(): pass"])
def test_full_run_on_debian_without_a_cell_fails(pytester: pytest.Pytester, body: str) -> None:
    pytester.makepyfile(body)
    result = run(pytester, "/usr/bin/qemu-system-x86_64", True)
    result.stdout.fnmatch_lines(["*no test reached QEMU*"])
    assert result.ret == pytest.ExitCode.TESTS_FAILED


def test_skipped_cells_do_not_count(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(
        """
        import pytest

        @pytest.mark.qemu
        def test_cell(): pytest.skip("not today")
        """
    )
    result = run(pytester, "/usr/bin/qemu-system-x86_64", True)
    result.assert_outcomes(skipped=1)
    assert result.ret == pytest.ExitCode.TESTS_FAILED


@pytest.mark.parametrize(("debian", "full"), [(False, True), (True, False)])
def test_no_cell_is_fine_elsewhere_and_in_part_of_a_run(
    pytester: pytest.Pytester, debian: bool, full: bool
) -> None:
    pytester.makepyfile("def test_other(): pass")
    assert run(pytester, None, debian, full=full).ret == pytest.ExitCode.OK


def test_counts_across_workers(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(TESTS)
    result = run(pytester, "/usr/bin/qemu-system-x86_64", True, "-n", "2", "-p", "xdist")
    result.assert_outcomes(passed=2)
    assert result.ret == pytest.ExitCode.OK
    pytester.makepyfile("def test_other(): pass")
    result = run(pytester, "/usr/bin/qemu-system-x86_64", True, "-n", "2", "-p", "xdist")
    assert result.ret == pytest.ExitCode.TESTS_FAILED
