"""Run the papers on a Slurm cluster: `python -m benchmarks.slurm submit`, `status` and `cancel`. See README.md in this folder.

submit.py    checks, and submits the jobs with submitit
tasks.py     which jobs there are
snapshot.py  a copy of the code for them
cluster.py   what Slurm's commands say
job.py       what each process of a job does
journal.py   the events of a job, in a file; requeues a job that did not finish
status.py    a table of all jobs of an output folder, and how to cancel them
"""
