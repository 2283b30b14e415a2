"""Starting processes: the file list is the process tree.

cli.py          fabric-run: reads the command line, becomes the supervisor
supervisor.py   the supervisor: imports no torch, watches the ranks, reports the first failure
job.py          what a launch holds: server, folder, logs, signals
warm_server.py  the supervisor's handle on its one server process
server.py       the server: imports torch once, then forks what it is asked for
requeue.py      asking Slurm to run the job again
rank.py         a rank: the user's script, as if started by ``python script.py``
elastic.py      the supervisor of one of several nodes: torchelastic's agent over the same server
rendezvous.py   how the supervisors of several nodes meet
in_script.py    starting from inside a script: ``fabric.launch()`` and ``fabric.launch(function)``

command_line.py, messages.py, failure.py, environment.py, process_tree.py hold what several of them use.
"""
