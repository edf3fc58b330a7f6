"""Who carries bytes between ranks.

`mpi` has the protocol of a step, over MPI or whatever else is a
`contract.Communicator`; `loopback` is one inside a process.
"""
