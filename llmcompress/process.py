"""How the threads of a process wait for work: asleep. Spinning ones slow down tenfold where cores are shared with other
programs, and take them from the kernels that run between two products, torch's or LAPACK's."""

#: environment variables, to be set before numpy, scipy and torch are loaded: of OpenMP, and of OpenBLAS, whose threads
#: then spin for 2^14 cycles instead of 2^26
WAITING = {"OMP_WAIT_POLICY": "PASSIVE", "OPENBLAS_THREAD_TIMEOUT": "14"}
