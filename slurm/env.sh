# shellcheck shell=bash
# Everything that differs from one cluster to another. The job scripts source this file on the first node, and
# srun passes the environment on to all others. Nothing here is needed where the environment that a job is
# submitted from (an activated .venv, say) exists on the nodes too: sbatch passes that on.

# Modules, the virtual environment, proxies:
#   module load python/3.12 cuda/12.8
#   source /shared/you/l2l_scale/.venv/bin/activate

# The command that runs (what `l2l-scale slurm` submits has the environment that it was called from in PATH).
export L2L_SCALE="${L2L_SCALE:-l2l-scale}"

# How often in a row a job that failed (a process was killed, say) is put back into the queue. A user's mistake
# never is; time limits and preemptions do not count.
export L2L_SCALE_MAX_RESTARTS="${L2L_SCALE_MAX_RESTARTS:-3}"

# The network between nodes, where the library's own choice is wrong:
#   export NCCL_SOCKET_IFNAME=ib0 GLOO_SOCKET_IFNAME=ib0
#   export NCCL_DEBUG=INFO

# Where data sets lie (see the README), and caches that all nodes can write:
#   export L2L_SCALE_DATA=/shared/data HF_HOME=/shared/you/huggingface
