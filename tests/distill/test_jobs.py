"""Episode jobs of a step."""

from __future__ import annotations

from distill.step import jobs_for
from distill.tasks import TaskSource
from envs.types import Task


def test_a_batch_that_runs_over_into_the_next_epoch_has_no_two_jobs_of_one_id() -> None:
    tasks = [Task(id=name, messages=({"role": "user", "content": name},)) for name in "abc"]
    jobs = jobs_for(TaskSource(tasks, seed=0).take(8), group_size=2, step=4, seed=1)
    assert len({job.id for job in jobs}) == len(jobs) == 16
    for name in "abc":
        samples = [job.sample_index for job in jobs if job.task.id == name]
        assert samples == list(range(len(samples)))
